"""Distillation, one paper a file; `create_method` makes a method of one or several by name."""

from segfast.distill._method import Method, create_method, cross_entropy_task, list_methods
from segfast.distill.structured import PairWiseLoss, PixelWiseLoss

__all__ = ["Method", "PairWiseLoss", "PixelWiseLoss", "create_method", "cross_entropy_task", "list_methods"]
