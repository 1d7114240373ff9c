"""Distillation losses, one paper a file."""

from segfast.distill.structured import PairWiseLoss, PixelWiseLoss

__all__ = ["PairWiseLoss", "PixelWiseLoss"]
