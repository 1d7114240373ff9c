"""Joint transforms: each takes (image (3, H, W) in [0, 1], labels (H, W)) and gives both back, drawing from torch's generator."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


class Compose:
    """One after the other."""

    def __init__(self, *transforms: Callable):
        self.transforms = transforms

    def __call__(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        for transform in self.transforms:
            image, labels = transform(image, labels)
        return image, labels


class Resize:
    """To (H, W) `size`: the image bilinear with antialiasing, the labels nearest."""

    def __init__(self, size: tuple[int, int]):
        self.size = tuple(size)

    def __call__(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        image = F.interpolate(image[None], self.size, mode="bilinear", antialias=True)[0]
        return image, F.interpolate(labels[None, None].double(), self.size, mode="nearest-exact")[0, 0].long()


class RandomFlip:
    """Mirror left and right with `probability`."""

    def __init__(self, probability: float = 0.5):
        self.probability = probability

    def __call__(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if torch.rand(()) >= self.probability:
            return image, labels
        return image.flip(-1), labels.flip(-1)


class RandomCrop:
    """Cut (H, W) `size` out; what is smaller is padded with zeros and the label 255."""

    def __init__(self, size: tuple[int, int]):
        self.size = tuple(size)

    def __call__(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        pad = [max(0, want - have) for want, have in zip(self.size, labels.shape)]
        image, labels = F.pad(image, (0, pad[1], 0, pad[0])), F.pad(labels, (0, pad[1], 0, pad[0]), value=255)
        top, left = (int(torch.randint(have - want + 1, ())) for want, have in zip(self.size, labels.shape))
        cut = (..., slice(top, top + self.size[0]), slice(left, left + self.size[1]))
        return image[cut], labels[cut]


class Normalize:
    """(image - mean) / std a channel; the defaults map [0, 1] to [-1, 1]."""

    def __init__(self, mean: tuple[float, ...] = (0.5, 0.5, 0.5), std: tuple[float, ...] = (0.5, 0.5, 0.5)):
        self.mean, self.std = (torch.tensor(v).view(3, 1, 1) for v in (mean, std))

    def __call__(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return (image - self.mean) / self.std, labels
