"""Every network by name, with the figures that its tests hold it to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Network:
    """What a network's file declares: counted with 19 classes; `macs` at `size`, convolutions and matrix products only."""

    name: str
    build: Callable[..., nn.Module]
    paper: str
    parameters: int
    macs: int
    size: tuple[int, int]


NETWORKS: dict[str, Network] = {}


def register_model(*, paper: str, parameters: int, macs: int, size: tuple[int, int] = (1024, 2048)):
    """Register a function `name(num_classes=19, **options) -> nn.Module` as the network `name`.

    The network maps images (N, 3, H, W) to logits (N, num_classes, H, W) in two steps that distillation taps:
    `features(images)` gives the map that the classifier reads, `head(features, size)` the logits at `size`.

    Args:
        paper: "Authors, title, arXiv:id".
        parameters: number of trainable parameters with 19 classes.
        macs: multiply-accumulates of one image of `size`, convolutions and matrix products only, with 19 classes.
        size: (H, W) of `macs`, in pixels.
    """

    def register(build):
        if build.__name__ in NETWORKS:
            raise ValueError(f"register_model: want a new name, got {build.__name__!r} twice")
        NETWORKS[build.__name__] = Network(build.__name__, build, paper, parameters, macs, size)
        return build

    return register


def list_models() -> list[str]:
    """The names that `create_model` knows, sorted."""
    return sorted(NETWORKS)


def create_model(name: str, num_classes: int = 19, **options) -> nn.Module:
    """Build a registered network with random weights, in training mode.

    Args:
        name: one of `list_models()`.
        num_classes: classes of the logits, at least 1.
        options: the network's own, see its function in `segfast.models`.

    Raises:
        ValueError: no such network, or num_classes < 1.
        TypeError: an option that the network does not have.
    """
    if name not in NETWORKS:
        raise ValueError(f"create_model: want one of {', '.join(list_models())}, got {name!r}")
    if num_classes < 1:
        raise ValueError(f"create_model: want num_classes >= 1, got {num_classes}")
    return NETWORKS[name].build(num_classes=num_classes, **options)
