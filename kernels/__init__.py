"""The Triton kernels: ``@triton.jit`` functions, the NamedTuples that they take, and nothing else.

Letters, shapes and buffers (writers, readers, types): docs/notation.md.
"""
