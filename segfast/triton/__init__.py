"""Triton kernels, one file an op, with a launcher for each of its schemas; `segfast._backend` finds them by name.

Every launcher takes tensors of one device and makes that device current, launches on the current stream, never waits for the
device and allocates by shapes alone, so that a CUDA graph can capture it. Offsets are 64 bits wide. Sums run in two stages, in
a fixed order, without atomics: results are bitwise the same from run to run.
"""
