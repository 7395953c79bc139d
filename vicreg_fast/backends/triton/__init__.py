"""The stages as Triton kernels, for CUDA and ROCm devices; on the CPU in Triton's interpreter."""
