"""Scores from a confusion matrix over all pixels of all images, as the Pascal VOC and Cityscapes benchmarks count."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def confusion_matrix(prediction: Tensor, labels: Tensor, num_classes: int, ignore_index: int = 255) -> Tensor:
    """Counts (num_classes, num_classes), int64: rows are labels, columns predictions; ignored pixels are left out.

    Raises:
        ValueError: shapes differ, or a counted label or prediction is outside 0 to num_classes - 1.
    """
    if prediction.shape != labels.shape:
        raise ValueError(f"confusion_matrix: want one shape, got {tuple(prediction.shape)} and {tuple(labels.shape)}")
    valid = labels != ignore_index
    prediction, labels = prediction[valid].long(), labels[valid].long()
    for values in (prediction, labels):
        if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < num_classes:
            raise ValueError(
                f"confusion_matrix: want classes 0 to {num_classes - 1}, got {int(values.min())} to {int(values.max())}"
            )
    return torch.bincount(labels * num_classes + prediction, minlength=num_classes**2).reshape(num_classes, num_classes)


def class_iou(matrix: Tensor) -> Tensor:
    """Intersection over union a class, float64; NaN for a class that is neither labelled nor predicted."""
    hits = matrix.diagonal().double()
    return hits / (matrix.sum(0) + matrix.sum(1) - matrix.diagonal()).double()


def mean_iou(matrix: Tensor) -> float:
    """The mean of `class_iou` over the classes that occur in the labels, 0 to 1; NaN when none does."""
    return float(class_iou(matrix)[matrix.sum(1) > 0].mean())


def pixel_accuracy(matrix: Tensor) -> float:
    """The share of the counted pixels that are right, 0 to 1; NaN when none is counted."""
    return float(matrix.diagonal().sum().double() / matrix.sum())


def boundary_f_score(
    prediction: Tensor, labels: Tensor, num_classes: int, ignore_index: int = 255, tolerance: float = 0.0075
) -> float:
    """How well the outlines of one image fit, 0 to 1 (Csurka, Larlus and Perronnin, BMVC 2013); NaN without an outline.

    A class's outline is its pixels with a 4-neighbour of another class. Precision is the share of the predicted outline that
    lies within the tolerance of the true one, recall the other way round, F = 2 P R / (P + R), averaged over the classes that
    are in the labels.

    Args:
        prediction, labels: (H, W); ignored pixels belong to no outline.
        num_classes, ignore_index: as in `confusion_matrix`.
        tolerance: distance (of rows and of columns), as a share of the image's diagonal; at least one pixel.
    """
    reach = max(1, round(tolerance * (labels.shape[0] ** 2 + labels.shape[1] ** 2) ** 0.5))
    scores = []
    valid = labels != ignore_index
    prediction = torch.where(valid, prediction, ignore_index)
    for label in labels[valid].unique().tolist():
        lines = [outline(x == label, valid) for x in (prediction, labels)]
        near = [F.max_pool2d(x[None].float(), 2 * reach + 1, 1, reach)[0] > 0 for x in lines]
        counts = [int(x.sum()) for x in lines]
        if not any(counts):
            continue
        precision, recall = (int((lines[i] & near[1 - i]).sum()) / max(1, counts[i]) for i in (0, 1))
        scores.append(2 * precision * recall / (precision + recall) if precision + recall else 0.0)
    return sum(scores) / len(scores) if scores else float("nan")


def outline(inside: Tensor, valid: Tensor) -> Tensor:
    # Neighbours that are ignored do not make an edge: nothing is known there.
    edge = torch.zeros_like(inside)
    edge[1:] |= (inside[1:] != inside[:-1]) & valid[:-1]
    edge[:-1] |= (inside[:-1] != inside[1:]) & valid[1:]
    edge[:, 1:] |= (inside[:, 1:] != inside[:, :-1]) & valid[:, :-1]
    edge[:, :-1] |= (inside[:, :-1] != inside[:, 1:]) & valid[:, 1:]
    return edge & inside & valid


class Inference:
    """A network with test-time options, a function from images to class probabilities.

    Args:
        model: images (N, 3, H, W) to logits of their size.
        scales: the images are run at each of these sizes, and the probabilities averaged.
        flip: each mirrored as well.
        window: (H, W) of a sliding window, for images that are larger; None: whole images.
        overlap: share of a window that lies in the next one.
    """

    def __init__(
        self,
        model: Callable[[Tensor], Tensor],
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
        window: tuple[int, int] | None = None,
        overlap: float = 1 / 3,
    ):
        if not scales or min(scales) <= 0 or not 0 <= overlap < 1:
            raise ValueError(f"Inference: want positive scales and an overlap in [0, 1), got {list(scales)} and {overlap}")
        self.model, self.scales, self.flip, self.window, self.overlap = model, tuple(scales), flip, window, overlap

    def __call__(self, images: Tensor) -> Tensor:
        total = 0
        for scale in self.scales:
            size = [max(1, round(s * scale)) for s in images.shape[2:]]
            scaled = images if scale == 1 else F.interpolate(images, size, mode="bilinear", antialias=scale < 1)
            for mirrored in (False, True)[: 1 + self.flip]:
                logits = self.slide(scaled.flip(-1) if mirrored else scaled)
                logits = logits.flip(-1) if mirrored else logits
                if scale != 1:
                    logits = F.interpolate(logits, images.shape[2:], mode="bilinear")
                total = total + logits.float().softmax(1)
        return total / (len(self.scales) * (1 + self.flip))

    def slide(self, images: Tensor) -> Tensor:
        size = images.shape[2:]
        if self.window is None or all(s <= w for s, w in zip(size, self.window)):
            return self.model(images)
        starts = []
        for length, window in zip(size, self.window):
            count = 1 if length <= window else -(-(length - window) // max(1, int(window * (1 - self.overlap)))) + 1
            last = max(0, length - window)
            starts.append([round(i * last / max(1, count - 1)) for i in range(count)])
        total, times = 0, images.new_zeros(size)
        for top in starts[0]:
            for left in starts[1]:
                cut = (..., slice(top, top + self.window[0]), slice(left, left + self.window[1]))
                logits = self.model(images[cut])
                if isinstance(total, int):
                    total = logits.new_zeros(*logits.shape[:2], *size)
                total[cut] += logits
                times[cut[1:]] += 1
        return total / times


@torch.no_grad()
def evaluate(
    model: nn.Module | Callable[[Tensor], Tensor],
    loader: Iterable[tuple[Tensor, Tensor]],
    num_classes: int,
    ignore_index: int = 255,
    each: Callable[[Tensor, Tensor], None] | None = None,
) -> Tensor:
    """The confusion matrix of `model(images).argmax(1)` against the labels.

    A module runs in evaluation mode and gets its mode back; any function from images to logits, or to the classes (N, H, W),
    serves as well. `each` is called with every batch's predictions and labels.
    """
    training = getattr(model, "training", False)
    if isinstance(model, nn.Module):
        model.eval()
    matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    for images, labels in loader:
        scores = model(images)
        prediction = scores if scores.dim() == 3 else scores.argmax(1)
        matrix += confusion_matrix(prediction, labels, num_classes, ignore_index).cpu()
        if each:
            each(prediction, labels)
    if training:
        model.train()
    return matrix
