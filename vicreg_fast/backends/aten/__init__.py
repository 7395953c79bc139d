"""The stages of the ATen backend: the closed forms in PyTorch operators, for any device."""
