"""Every network by name, with the figures that its tests hold it to."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from segfast._backend import is_whole
from segfast._names import unknown


@dataclass(frozen=True)
class Published:
    """What the authors, or a port where it says so, print; None where nothing is printed. Units in the names."""

    parameters: str | None = None
    macs: str | None = None
    miou: str | None = None
    speed: str | None = None
    source: str | None = None


@dataclass(frozen=True)
class Network:
    """What a network's file declares: counted with 19 classes; `macs` at `size`, convolutions and matrix products only."""

    name: str
    build: Callable[..., nn.Module]
    paper: str
    parameters: int
    macs: int
    size: tuple[int, int]
    published: Published = field(default_factory=Published)
    official: str | None = None
    licence: str | None = None


NETWORKS: dict[str, Network] = {}


def register_model(
    *,
    paper: str,
    parameters: int,
    macs: int,
    size: tuple[int, int] = (1024, 2048),
    published: Published | None = None,
    official: str | None = None,
    licence: str | None = None,
):
    """Register a function `name(num_classes=19, **options) -> SegmentationModel` as the network `name`.

    Args:
        paper: "Authors, title, arXiv:id".
        parameters: number of trainable parameters with 19 classes.
        macs: multiply-accumulates of one image of `size`, convolutions and matrix products only, with 19 classes.
        size: (H, W) of `macs`, in pixels.
        published: what the paper prints, with its conventions.
        official: the authors' repository, or the port that stands for it.
        licence: that of the official weights.
    """

    def register(build):
        if build.__name__ in NETWORKS:
            raise ValueError(f"register_model: want a new name, got {build.__name__!r} twice")
        NETWORKS[build.__name__] = Network(
            build.__name__, build, paper, parameters, macs, size, published or Published(), official, licence
        )
        return build

    return register


def list_models(pattern: str = "*") -> list[str]:
    """The names that `create_model` knows and that match the shell-style pattern, sorted."""
    return sorted(fnmatch.filter(NETWORKS, pattern))


def create_model(name: str, num_classes: int = 19, backbone: str | None = None, **options) -> nn.Module:
    """Build a registered network with random weights, in training mode.

    Args:
        name: one of `list_models()`.
        num_classes: classes of the logits, at least 1.
        backbone: another encoder, one of `segfast.list_backbones()`, for networks whose idea allows it; None: the paper's.
        options: the network's own, see its function in `segfast.models`.

    Raises:
        ValueError: no such network (the nearest names are suggested), or num_classes < 1.
        TypeError: an option that the network does not have, or a name that is none.
    """
    if not isinstance(name, str):
        raise TypeError(f"create_model: want a network's name, got {name!r}")
    if name not in NETWORKS:
        raise unknown("create_model", name, NETWORKS)
    if not is_whole(num_classes) or num_classes < 1:
        raise ValueError(f"create_model: want num_classes >= 1, got {num_classes!r}")
    made_with = {"backbone": backbone, "options": dict(options)}
    if backbone is not None:
        options["backbone"] = backbone
    model = NETWORKS[name].build(num_classes=int(num_classes), **options)
    model.name, model.made_with = name, made_with
    return model
