"""The stages in ATen operators, for any device: the closed forms without kernels of our own."""
