"""The training loop. Supervised training and distillation differ in the loss they hand it, and in nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Terms = dict[str, Tensor]


def train(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    loss: Callable[[nn.Module, Tensor, Tensor], Terms],
    optimizer: torch.optim.Optimizer,
    steps: int,
    schedule: Callable[[float], float] = lambda done: (1 - done) ** 0.9,
    progress: Callable[[int, dict[str, float]], None] | None = None,
) -> list[dict[str, float]]:
    """Take `steps` optimiser steps on the sum of the loss's terms, going through the loader as often as that needs.

    Args:
        model: trained in place, left in training mode.
        loader: gives (images (N, 3, H, W), labels (N, H, W)) on the model's device; iterated again when it ends.
        loss: called with (model, images, labels), gives the terms by name, weighted.
        optimizer: over the model's parameters; its learning rates are the peak.
        steps: number of steps.
        schedule: the learning rate's factor at the fraction of steps that is done, 0 to 1; default: poly with power 0.9.
        progress: called after every step with the steps done and the terms, "loss" (their sum) among them.

    Returns:
        What `progress` got, a dictionary a step.

    Raises:
        ValueError: the loader gives nothing.
        FloatingPointError: the loss is not finite.
    """
    model.train()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step / max(steps, 1)))
    history: list[dict[str, float]] = []
    batches = iter(())
    while len(history) < steps:
        batch = next(batches, None)
        if batch is None:
            batches = iter(loader)
            batch = next(batches, None)
            if batch is None:
                raise ValueError("train: want a loader that gives batches, got none")
        terms = loss(model, *batch)
        total = sum(terms.values())
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        optimizer.step()
        scheduler.step()
        values = {"loss": float(total.detach()), **{name: float(term.detach()) for name, term in terms.items()}}
        history.append(values)
        if values["loss"] - values["loss"] != 0:
            raise FloatingPointError(f"train: the loss is {values['loss']} after step {len(history)}: {values}")
        if progress:
            progress(len(history), values)
    return history


def cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int = 255) -> Tensor:
    """Mean over the labelled pixels in nats; 0 where no pixel has a label."""
    total = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="sum")
    return total / (labels != ignore_index).sum().clamp(min=1)


def supervised(model: nn.Module, images: Tensor, labels: Tensor) -> Terms:
    """The loss of training on labels: cross-entropy."""
    return {"labels": cross_entropy(model(images), labels)}


class Distillation:
    """The loss of training on labels and on a frozen teacher (Liu et al., Structured Knowledge Distillation, CVPR 2019).

    loss = cross-entropy + pixel_weight * pixel(logits, teacher's logits) + pair_weight * pair(features, teacher's features)

    Both networks give `forward_features(images)`, as every network of `segfast.models` does. The pixel-wise term compares
    logits at the student's own stride, the pair-wise one the maps that the classifiers read.

    Args:
        teacher: put into evaluation mode; gets no gradient.
        pixel: loss of (student logits, teacher logits); None leaves the term out.
        pair: loss of (student features, teacher features); None leaves the term out.
        pixel_weight, pair_weight: factors of the terms.
    """

    def __init__(
        self,
        teacher: nn.Module,
        pixel: Callable[[Tensor, Tensor], Tensor] | None,
        pair: Callable[[Tensor, Tensor], Tensor] | None,
        pixel_weight: float = 1.0,
        pair_weight: float = 1.0,
    ):
        self.teacher = teacher.eval()
        self.pixel, self.pair, self.pixel_weight, self.pair_weight = pixel, pair, pixel_weight, pair_weight

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Terms:
        with torch.no_grad():
            teacher = self.teacher.forward_features(images)
        student = model.forward_features(images)
        logits = F.interpolate(student.logits, images.shape[2:], mode="bilinear", align_corners=model.align_corners)
        terms = {"labels": cross_entropy(logits, labels)}
        if self.pixel:
            terms["pixel-wise"] = self.pixel_weight * self.pixel(student.logits, teacher.logits)
        if self.pair:
            terms["pair-wise"] = self.pair_weight * self.pair(student.features["pre_logits"], teacher.features["pre_logits"])
        return terms
