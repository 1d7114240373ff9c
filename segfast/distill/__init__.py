"""Distillation losses, one paper a file."""

from segfast.distill.structured import PairWiseLoss

__all__ = ["PairWiseLoss"]
