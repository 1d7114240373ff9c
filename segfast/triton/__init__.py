"""Triton kernels, one file an op; `segfast._backend` finds them by name."""
