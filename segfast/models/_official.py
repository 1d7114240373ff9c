"""Checkpoints in the format of the official repositories, turned into networks of this package."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from segfast._names import unknown
from segfast.models._registry import NETWORKS

Weights = dict[str, Tensor]
IMPORTERS: dict[str, Callable[[str, Weights], tuple[nn.Module, dict[str, str]]]] = {}


def register_importer(*names: str):
    """Register a function `(name, weights) -> (model, keys)` for the networks `names`.

    It reads the variant and the class count off the tensors, builds the network, and gives for every official key the key of
    ours that it becomes. It may pop from `weights` (a copy of the dictionary, without `num_batches_tracked`) what is no
    parameter of ours, such as preprocessing constants. A ValueError says that the tensors are another network's.
    """

    def register(importer):
        for name in names:
            IMPORTERS[name] = importer
        return importer

    return register


def load_official(name: str, source: str | os.PathLike | Weights, *, num_classes: int | None = None) -> nn.Module:
    """Build the network `name` from weights in the format that its authors released; evaluation mode.

    Every official tensor is used exactly once and every parameter and buffer of ours is set, `num_batches_tracked` excepted.

    Args:
        name: one of `list_models()` that has an importer.
        source: a path (`.safetensors`, or what `torch.load(weights_only=True)` takes) or a state dict.
        num_classes: what the caller expects; None takes what the tensors say.

    Raises:
        ValueError: no such network or importer; another network's weights (left-over and missing names are listed); another
            class count; a file that is not weights alone.
        FileNotFoundError: no such file.
    """
    if name not in NETWORKS:
        raise unknown("load_official", name, NETWORKS)
    if name not in IMPORTERS:
        raise ValueError(
            f"load_official: no official weights are known for {name!r}; there are for {', '.join(sorted(IMPORTERS))}"
        )
    weights = {key: value for key, value in read_weights(source).items() if not key.endswith("num_batches_tracked")}
    if weights and all(key.startswith("module.") for key in weights):
        weights = {key.removeprefix("module."): value for key, value in weights.items()}
    try:
        model, keys = IMPORTERS[name](name, weights)
    except KeyError as error:
        raise ValueError(f"load_official: these are not the weights of {name!r}: {error.args[0]!r} is missing") from None
    except (IndexError, TypeError, AttributeError, RuntimeError, ZeroDivisionError) as error:  # of tensors of unexpected shapes
        raise ValueError(f"load_official: these are not the weights of {name!r}: {error!r}") from error
    ours = {key: value for key, value in model.state_dict().items() if not key.endswith("num_batches_tracked")}
    left = [key for key in weights if keys.get(key) not in ours]
    targets = [keys[key] for key in weights if keys.get(key) in ours]
    missing = sorted(set(ours) - set(targets))
    twice = sorted({target for target in targets if targets.count(target) > 1})
    wrong = [
        f"{key} {tuple(value.shape)} for {tuple(ours[keys[key]].shape)}"
        for key, value in weights.items()
        if keys.get(key) in ours and value.shape != ours[keys[key]].shape
    ]
    for what, names in (("left over", left), ("missing", missing), ("used twice", twice), ("of another shape", wrong)):
        if names:
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            raise ValueError(f"load_official: these are not the weights of {name!r}: {what}: {', '.join(names[:8])}{more}")
    found = getattr(model, "num_classes", num_classes)
    if found is not None and found < 1:
        raise ValueError(f"load_official: want weights of at least one class, got {found}")
    if num_classes is not None and found != num_classes:
        raise ValueError(f"load_official: want {num_classes} classes, got weights of {found}")
    model.load_state_dict({keys[key]: value for key, value in weights.items()}, strict=False)
    model.name = name
    if not hasattr(model, "made_with"):
        told(model)
    return model.eval()


def told(model: nn.Module, backbone: str | None = None, **options) -> nn.Module:
    """The model, knowing how `create_model` builds it again."""
    model.made_with = {"backbone": backbone, "options": options}
    return model


def read_weights(source: str | os.PathLike | Weights) -> Weights:
    """A flat dictionary of tensors from a path or a state dict; {"state_dict": ...} and {"model": ...} are opened.

    Raises:
        ValueError: the file holds more than weights, is truncated, or does not hold a dictionary of dense float tensors.
        FileNotFoundError: no such file.
    """
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if not path.is_file():
            raise FileNotFoundError(f"load_official: no file {path}")
        try:
            if path.suffix == ".safetensors":
                from safetensors.torch import load_file

                weights = load_file(path)
            else:
                weights = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file comes as any of a dozen
            raise ValueError(f"load_official: {path} does not load as weights alone: {error!r}") from error
    else:
        weights = source
    for inner in ("state_dict", "model_state_dict", "model"):
        if isinstance(weights, dict) and isinstance(weights.get(inner), dict):
            weights = weights[inner]
    if not isinstance(weights, dict) or not weights or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError(f"load_official: want a dictionary of tensors, got {type(weights).__name__}")
    for key, value in weights.items():
        counter = str(key).endswith("num_batches_tracked")
        if (
            not isinstance(key, str)
            or value.layout is not torch.strided
            or value.is_meta
            or not (value.is_floating_point() or counter)
        ):
            what = "on meta" if value.is_meta else f"{value.dtype}, {value.layout}"
            raise ValueError(f"load_official: want names and dense tensors of real numbers, got {key!r}: {what}")
    return dict(weights)
