"""The fused operations. One file an op; each has a `<op>_reference` twin in plain PyTorch, which is its oracle."""

from segfast.ops.channel_shuffle import channel_shuffle
from segfast.ops.concat_shuffle import concat_shuffle
from segfast.ops.ds_conv import BatchNorm, ds_conv
from segfast.ops.overhaul_loss import overhaul_loss
from segfast.ops.pairwise_cosine import pairwise_cosine
from segfast.ops.pairwise_loss import pairwise_loss
from segfast.ops.pixelwise_kl import pixelwise_kl

__all__ = [
    "BatchNorm",
    "channel_shuffle",
    "concat_shuffle",
    "ds_conv",
    "overhaul_loss",
    "pairwise_cosine",
    "pairwise_loss",
    "pixelwise_kl",
]
