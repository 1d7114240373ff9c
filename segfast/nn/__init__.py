"""Layers and blocks over the ops."""

from segfast.nn import cost
from segfast.nn.channel_shuffle import ChannelShuffle, ConcatShuffle
from segfast.nn.context import BNActConv, FastAttention, PyramidPooling, SpatialPyramidPooling, fast_attention
from segfast.nn.convert import convert, unconvert
from segfast.nn.convolution import AsymmetricConv, BatchNorm2d, ConvBNAct, ShuffledConv, ZoomedConv, activation
from segfast.nn.ds_conv import DSConv
from segfast.nn.residual import ESP, BasicBlock, Bottleneck, InvertedResidual, Residual, SkipConcat
from segfast.nn.resize import resize
from segfast.nn.sampling import Downsample, Upsample, adaptive_avg_pool2d
from segfast.nn.shuffle_units import ShuffleV1Unit, ShuffleV2Unit
from segfast.nn.upsample import UpsampleCrossEntropy

__all__ = [
    "ESP",
    "AsymmetricConv",
    "BNActConv",
    "BasicBlock",
    "BatchNorm2d",
    "Bottleneck",
    "ChannelShuffle",
    "ConcatShuffle",
    "ConvBNAct",
    "DSConv",
    "Downsample",
    "FastAttention",
    "InvertedResidual",
    "PyramidPooling",
    "Residual",
    "ShuffleV1Unit",
    "ShuffleV2Unit",
    "ShuffledConv",
    "SkipConcat",
    "SpatialPyramidPooling",
    "Upsample",
    "UpsampleCrossEntropy",
    "ZoomedConv",
    "activation",
    "adaptive_avg_pool2d",
    "convert",
    "cost",
    "fast_attention",
    "resize",
    "unconvert",
]
