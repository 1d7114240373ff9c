"""Files to tensors and back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def read_pixels(path: str | Path) -> Tensor:
    """(3, H, W) uint8, RGB; of two bytes a pixel the upper one."""
    with Image.open(path) as image:
        if image.mode.startswith("I"):
            grey = np.array(image).astype(np.int64).clip(0, 65535) // 257
            return torch.from_numpy(grey.astype(np.uint8)).expand(3, -1, -1).clone()
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def read_image(path: str | Path) -> Tensor:
    """(3, H, W) float32 in [0, 1]."""
    return scaled(read_pixels(path))


def scaled(pixels: Tensor) -> Tensor:
    """Bytes to float32 in [0, 1]."""
    return pixels.float().div_(255)


def read_labels(path: str | Path) -> Tensor:
    """(H, W) int64, the bytes (or pairs of bytes, or palette indices) of the file."""
    with Image.open(path) as image:
        if image.mode not in ("L", "P", "I;16"):
            raise ValueError(f"read_labels: want two bytes or one byte a pixel, got mode {image.mode} in {path}")
        return torch.from_numpy(np.array(image).astype(np.int64))


def colour(labels: Tensor, palette) -> Tensor:
    """(H, W) labels to (H, W, 3) uint8 by `palette` (RGB triples); what lies outside it comes out black."""
    table = torch.zeros(256, 3, dtype=torch.uint8)
    table[: len(palette)] = torch.tensor(palette, dtype=torch.uint8)
    return table[labels.clamp(0, 255)]
