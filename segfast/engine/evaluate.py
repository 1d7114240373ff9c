"""Scores from a confusion matrix over all pixels of all images, as the Pascal VOC and Cityscapes benchmarks count."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
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


@torch.no_grad()
def evaluate(
    model: nn.Module | Callable[[Tensor], Tensor],
    loader: Iterable[tuple[Tensor, Tensor]],
    num_classes: int,
    ignore_index: int = 255,
) -> Tensor:
    """The confusion matrix of `model(images).argmax(1)` against the labels.

    A module runs in evaluation mode and gets its mode back; any function from images to logits serves as well.
    """
    training = getattr(model, "training", False)
    if isinstance(model, nn.Module):
        model.eval()
    matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    for images, labels in loader:
        matrix += confusion_matrix(model(images).argmax(1), labels, num_classes, ignore_index).cpu()
    if training:
        model.train()
    return matrix
