"""Triton kernels, installed as ``vicreg_fast.kernels``: ``@triton.jit`` functions and nothing else."""
