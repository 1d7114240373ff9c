"""What a network has to beat: two predictors that look at no shape."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Majority(nn.Module):
    """The most frequent class, everywhere."""

    def __init__(self, loader: Iterable[tuple[Tensor, Tensor]], num_classes: int, ignore_index: int = 255):
        super().__init__()
        counts = sum(torch.bincount(y[y != ignore_index].flatten(), minlength=num_classes) for _, y in loader)
        self.register_buffer("scores", counts.double())

    def forward(self, images: Tensor) -> Tensor:
        n, _, h, w = images.shape
        return self.scores.view(1, -1, 1, 1).expand(n, -1, h, w)


class ColourRegression(nn.Module):
    """Multinomial logistic regression on a pixel's colour (its three values, their squares and products).

    Fitted by L-BFGS on a random sample of the pixels, every class weighing the same if `balanced`.
    """

    def __init__(
        self,
        loader: Iterable[tuple[Tensor, Tensor]],
        num_classes: int,
        ignore_index: int = 255,
        samples: int = 40_000,
        balanced: bool = False,
    ):
        super().__init__()
        pixels, labels = zip(*((x.permute(0, 2, 3, 1).reshape(-1, 3), y.flatten()) for x, y in loader))
        pixels, labels = torch.cat(pixels), torch.cat(labels)
        known = (labels != ignore_index).nonzero().flatten()
        chosen = known[torch.randperm(len(known), generator=torch.Generator().manual_seed(0))[:samples]]
        x, y = self.expand(pixels[chosen]), labels[chosen]
        self.register_buffer("mean", x.mean(0))
        self.register_buffer("std", x.std(0).clamp(min=1e-6))
        x = (x - self.mean) / self.std
        self.linear = nn.Linear(x.shape[1], num_classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        weight = None
        if balanced:
            weight = 1 / torch.bincount(y, minlength=num_classes).clamp(min=1).float()
        optimizer = torch.optim.LBFGS(self.linear.parameters(), max_iter=60, line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            loss = F.cross_entropy(self.linear(x), y, weight)
            loss.backward()
            return loss

        optimizer.step(closure)

    @staticmethod
    def expand(pixels: Tensor) -> Tensor:
        r, g, b = pixels.unbind(-1)
        return torch.stack([r, g, b, r * r, g * g, b * b, r * g, g * b, b * r], -1)

    def forward(self, images: Tensor) -> Tensor:
        x = (self.expand(images.permute(0, 2, 3, 1)) - self.mean) / self.std
        return self.linear(x).permute(0, 3, 1, 2)
