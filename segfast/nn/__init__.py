"""Layers over the fused operations."""

from segfast.nn.ds_conv import DSConv

__all__ = ["DSConv"]
