"""Distillation, one paper a file; `create_method` makes a method of one or several by name."""

from segfast.distill._method import Method, create_method, cross_entropy_task, list_methods
from segfast.distill._taps import Tap, find_taps
from segfast.distill.adaptation import AutoEncoder, train_autoencoder
from segfast.distill.logits import ChannelWiseLoss
from segfast.distill.overhaul import margins
from segfast.distill.structured import Critic, PairWiseLoss, PixelWiseLoss, gradient_penalty

__all__ = [
    "AutoEncoder",
    "ChannelWiseLoss",
    "Critic",
    "Method",
    "PairWiseLoss",
    "PixelWiseLoss",
    "Tap",
    "create_method",
    "cross_entropy_task",
    "find_taps",
    "gradient_penalty",
    "list_methods",
    "margins",
    "train_autoencoder",
]
