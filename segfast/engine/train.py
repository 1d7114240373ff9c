"""The training loop. Supervised training and distillation differ in the loss they hand it, and in nothing else."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from segfast import ops

Terms = dict[str, Tensor]
Loss = Callable[..., "Terms | tuple[Tensor, dict[str, float]]"]


def poly(power: float = 0.9, warmup: float = 0.0) -> Callable[[float], float]:
    """The learning rate's factor at the fraction of steps done: (1 - done)^power, times a line from 0.01 to 1 over `warmup`."""
    return lambda done: (1 - done) ** power * (0.01 + 0.99 * done / warmup if done < warmup else 1.0)


POLY = poly()


def train(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, ...]],
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    steps: int,
    schedule: Callable[[float], float] = POLY,
    progress: Callable[[int, dict[str, float]], None] | None = None,
    *,
    start: int = 0,
    accumulate: int = 1,
    clip: float = 0.0,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    scaler: torch.amp.GradScaler | None = None,
    average: Callable[[dict[str, float]], dict[str, float]] | None = None,
    before_step: Callable[[], None] | None = None,
    after_step: Callable[[], dict[str, float]] | None = None,
) -> list[dict[str, float]]:
    """Take optimiser steps on the sum of the loss's terms, going through the loader as often as that needs.

    Args:
        model: trained in place, left in training mode; may be wrapped in DistributedDataParallel.
        loader: gives (images (N, 3, H, W), labels (N, H, W), ...) on the model's device; iterated again when it ends.
        loss: called with (model, *batch), gives the terms by name, weighted; or their sum and their values.
        optimizer: over the model's parameters; its learning rates are the peak.
        steps: number of steps, those before `start` among them.
        schedule: the learning rate's factor at the fraction of steps that is done, 0 to 1; default: poly with power 0.9.
        progress: called after every step with the steps done and the terms, "loss" (their sum) among them.
        start: steps done already, of a run that is resumed; the loader begins behind them.
        accumulate: batches of one step; their mean is what it descends on.
        clip: largest norm of the gradient; 0: any.
        autocast: makes the context of the forward.
        scaler: of the loss, for float16.
        average: of the terms over several processes, so that all of them stop at a loss that is not finite in one.
        before_step: called between the backward and the optimiser's step.
        after_step: called after it; what it returns goes among the terms.

    Returns:
        What `progress` got, a dictionary a step.

    Raises:
        ValueError: the loader gives nothing.
        FloatingPointError: the loss is not finite; the weights are those from before that step.
    """
    model.train()
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
        group["lr"] = group["initial_lr"] * schedule(start / max(steps, 1))
    history: list[dict[str, float]] = []
    batches = iter(())
    for step in range(start, steps):
        optimizer.zero_grad(set_to_none=True)
        values: dict[str, float] = {"loss": 0.0}
        for part in range(accumulate):
            batch = next(batches, None)
            if batch is None:
                batches = iter(loader)
                batch = next(batches, None)
                if batch is None:
                    raise ValueError("train: want a loader that gives batches, got none")
            last = part == accumulate - 1
            with nullcontext() if last else getattr(model, "no_sync", nullcontext)():
                with autocast():
                    given = loss(model, *batch)
                    total, terms = given if isinstance(given, tuple) else (sum(given.values()), given)
                total = total / accumulate
                (scaler.scale(total) if scaler else total).backward()
            for name, term in {"loss": total * accumulate, **terms}.items():
                values[name] = values.get(name, 0.0) + float(term.detach() if isinstance(term, Tensor) else term) / accumulate
        if average:
            values = average(values)
        if values["loss"] - values["loss"] != 0:
            raise FloatingPointError(f"train: the loss is {values['loss']} after step {step + 1}: {values}")
        if before_step:
            before_step()
        if clip:
            if scaler:
                scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip)
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * schedule((step + 1) / steps)
        if after_step:
            values |= after_step()
        history.append(values)
        if progress:
            progress(step + 1, values)
    return history


class Average:
    """An exponential moving average of a network's weights, itself a network, in evaluation mode.

    Args:
        model: averaged from now on.
        decay: the average's share of itself a step; less in the first steps: min(decay, (1 + steps) / (10 + steps)).
    """

    def __init__(self, model: nn.Module, decay: float):
        self.source, self.decay, self.steps = model, decay, 0
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self) -> None:
        """Take the model's present weights in."""
        self.steps += 1
        share = 1 - min(self.decay, (1 + self.steps) / (10 + self.steps))
        for mean, now in zip(self.model.state_dict().values(), self.source.state_dict().values()):
            if mean.is_floating_point():
                mean.lerp_(now, share)
            else:
                mean.copy_(now)

    def state_dict(self) -> dict:
        return {"steps": self.steps, "model": self.model.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.steps = state["steps"]
        self.model.load_state_dict(state["model"])


def cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int = 255, align_corners: bool = False) -> Tensor:
    """Mean over the labelled pixels in nats, of logits at any size; 0 where no pixel has a label."""
    return ops.upsample_cross_entropy(logits, labels, ignore_index=ignore_index, align_corners=align_corners)


def supervised(model: nn.Module, images: Tensor, labels: Tensor) -> Terms:
    """The loss of training on labels: cross-entropy of a network of `segfast.models`."""
    return {"labels": cross_entropy(model.forward_features(images).logits, labels, align_corners=model.align_corners)}


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
        terms = {"labels": cross_entropy(student.logits, labels, align_corners=model.align_corners)}
        if self.pixel:
            terms["pixel-wise"] = self.pixel_weight * self.pixel(student.logits, teacher.logits)
        if self.pair:
            terms["pair-wise"] = self.pair_weight * self.pair(student.features["pre_logits"], teacher.features["pre_logits"])
        return terms
