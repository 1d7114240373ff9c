"""Official networks: where their repositories are, and weights that depend on names and shapes alone."""

from __future__ import annotations

import math
import os
import zlib
from pathlib import Path

import pytest
import torch
from torch import Tensor


def repository(name: str) -> Path:
    """The folder of an official repository in SEGFAST_OFFICIAL; the test skips where it is absent."""
    root = os.environ.get("SEGFAST_OFFICIAL")
    if not root or not (Path(root) / name).is_dir():
        pytest.skip(f"no official repository {name}: set SEGFAST_OFFICIAL to a folder that holds it")
    return Path(root) / name


def random_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Weights such that a deep network's activations stay in range, with BatchNorm statistics that are not the initial ones."""
    return {key: random_tensor(key, tuple(shape)) for key, shape in shapes.items() if not key.endswith("num_batches_tracked")}


def random_tensor(key: str, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    if len(shape) > 1:
        return torch.randn(shape, generator=generator) * (2 / math.prod(shape[1:])) ** 0.5
    if key.endswith(("running_var", "weight")):
        return torch.rand(shape, generator=generator) + 0.5
    return torch.randn(shape, generator=generator) / 10


def image(height: int, width: int) -> Tensor:
    return torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0))
