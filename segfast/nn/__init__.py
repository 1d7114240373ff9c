"""Layers over the ops."""

from segfast.nn.channel_shuffle import ChannelShuffle, ConcatShuffle

__all__ = ["ChannelShuffle", "ConcatShuffle"]
