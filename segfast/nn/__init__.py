"""Layers and blocks over the ops."""

from segfast.nn.channel_shuffle import ChannelShuffle, ConcatShuffle
from segfast.nn.context import BNActConv, FastAttention, PyramidPooling, SpatialPyramidPooling, fast_attention
from segfast.nn.convert import convert, unconvert
from segfast.nn.convolution import BatchNorm2d, ConvBNAct, activation
from segfast.nn.ds_conv import DSConv
from segfast.nn.residual import BasicBlock, Bottleneck, Residual, SkipConcat
from segfast.nn.sampling import adaptive_avg_pool2d, resize
from segfast.nn.upsample import UpsampleCrossEntropy

__all__ = [
    "BNActConv",
    "BasicBlock",
    "BatchNorm2d",
    "Bottleneck",
    "ChannelShuffle",
    "ConcatShuffle",
    "ConvBNAct",
    "DSConv",
    "FastAttention",
    "PyramidPooling",
    "Residual",
    "SkipConcat",
    "SpatialPyramidPooling",
    "UpsampleCrossEntropy",
    "activation",
    "adaptive_avg_pool2d",
    "convert",
    "fast_attention",
    "resize",
    "unconvert",
]
