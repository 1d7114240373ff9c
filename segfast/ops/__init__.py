"""The fused operations. One file an op; each has a `<op>_reference` twin in plain PyTorch, which is its oracle."""

from segfast.ops.channel_shuffle import channel_shuffle

__all__ = ["channel_shuffle"]
