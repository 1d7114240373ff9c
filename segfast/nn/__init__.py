"""Layers over the ops."""

from segfast.nn.channel_shuffle import ChannelShuffle, ConcatShuffle
from segfast.nn.convert import convert, unconvert
from segfast.nn.ds_conv import DSConv
from segfast.nn.upsample import UpsampleCrossEntropy

__all__ = ["ChannelShuffle", "ConcatShuffle", "DSConv", "UpsampleCrossEntropy", "convert", "unconvert"]
