"""Pictures of predictions: overlays, panels, legends."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from segfast.data.images import colour


def overlay(image: Tensor, labels: Tensor, palette, opacity: float = 0.5) -> Tensor:
    """The image (3, H, W) in [0, 1] with its labels (H, W) laid over it, (H, W, 3) uint8; unlabelled pixels stay as they are."""
    pixels = image.permute(1, 2, 0).clamp(0, 1) * 255
    mixed = pixels * (1 - opacity) + colour(labels, palette).float() * opacity
    return torch.where((labels < len(palette))[..., None], mixed, pixels).round().to(torch.uint8)


def png(pixels: Tensor | np.ndarray) -> bytes:
    """(H, W, 3) uint8 as a PNG file's content."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG")
    return buffer.getvalue()


@torch.no_grad()
def panel(items: Sequence[tuple[Tensor, Tensor]], predict: Callable[[Tensor], Tensor], palette) -> bytes:
    """A PNG with a row an item: the image, its labels, and what `predict` (images (N, 3, H, W) to classes) makes of it."""
    rows = []
    for image, labels in items:
        plain = (image.permute(1, 2, 0).clamp(0, 1) * 255).round().to(torch.uint8)
        rows.append(torch.cat([plain, colour(labels, palette), colour(predict(image[None])[0], palette)], 1))
    height, width = (max(row.shape[axis] for row in rows) for axis in (0, 1))
    padded = [torch.nn.functional.pad(row, (0, 0, 0, width - row.shape[1], 0, height - row.shape[0])) for row in rows]
    return png(torch.cat(padded).numpy())


def legend(classes: Sequence[str], palette) -> bytes:
    """A PNG with a colour and a name a line."""
    image = Image.new("RGB", (240, 20 * len(classes) + 8), (255, 255, 255))
    brush = ImageDraw.Draw(image)
    for i, (name, rgb) in enumerate(zip(classes, palette)):
        brush.rectangle((8, 20 * i + 6, 28, 20 * i + 20), fill=tuple(rgb), outline=(0, 0, 0))
        brush.text((36, 20 * i + 7), name, fill=(0, 0, 0))
    return png(np.array(image))
