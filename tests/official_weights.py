"""Weights and images that depend on names and shapes alone."""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor


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
