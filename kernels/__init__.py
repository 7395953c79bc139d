"""The Triton kernels: ``@triton.jit`` functions, the NamedTuples that they take, and nothing else.

Letters, shapes and buffers (who writes, who reads, which type): docs/notation.md.
"""
