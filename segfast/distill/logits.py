"""Distillation of the logits alone: with a temperature (Hinton), and channel by channel (Shu)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from segfast import ops
from segfast.distill._method import Batch, Term, register_term, resize, valid_pixels


class ChannelWiseLoss(nn.Module):
    """Channel-wise distillation: where in the image each channel is active.

    loss = T^2 / (N C) sum over n, c of KL(phi(teacher[n, c] / T) || phi(student[n, c] / T)),  phi: softmax over the H W locations
    (Shu et al., Channel-wise Knowledge Distillation for Dense Prediction, arXiv:2011.13256)

    Args:
        temperature: T > 0.

    Raises:
        ValueError: a temperature that is not positive and finite.
    """

    def __init__(self, temperature: float = 4.0):
        super().__init__()
        if not 0 < temperature < math.inf:
            raise ValueError(f"ChannelWiseLoss: want temperature > 0 and finite, got {temperature}")
        self.temperature = temperature

    def forward(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss of two maps (N, C, H, W); locations outside of `mask` (N, H, W) are no part of the distributions."""
        if student.dim() != 4 or student.shape != teacher.shape:
            got = f"{tuple(student.shape)} and {tuple(teacher.shape)}"
            raise ValueError(f"ChannelWiseLoss: want student and teacher of one shape (N, C, H, W), got {got}")
        wide = torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32
        maps = [x.to(wide) / self.temperature for x in (student, teacher)]
        if mask is not None:
            # Finite, so that a location that counts for nobody gives 0 and not the difference of infinities.
            maps = [torch.where(mask.unsqueeze(1), x, -1e30) for x in maps]
        log_s, log_t = (x.flatten(2).log_softmax(2) for x in maps)
        return self.temperature**2 * (log_t.exp() * (log_t - log_s)).sum(2).mean()

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"


class Logits(Term):
    """A term that compares the logits, the teacher's at the student's size: "kd" and "channel-wise"."""

    def __init__(self, name: str, loss, weight: float, ignore_index: int | None):
        super().__init__()
        self.label, self.loss, self.weight, self.ignore_index = name, loss, weight, ignore_index

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        student = batch.student.logits
        teacher = resize(batch.teacher.logits, student.shape[2:])
        mask = None if self.ignore_index is None else valid_pixels(batch.target, student.shape[2:], self.ignore_index)
        return {self.label: self.weight * self.loss(student, teacher, mask=mask)}


@register_term("kd")
def kd(student, teacher, preset: str, ignore_index: int, weight: float = 1.0, temperature: float = 4.0) -> Term:
    """The term "kd": T^2 KL of the softened class distributions, the mean over pixels (Hinton et al., arXiv:1503.02531)."""

    def loss(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        return ops.pixelwise_kl(student, teacher, temperature=temperature, mask=mask)

    return Logits("kd", loss, weight, ignore_index)


@register_term("channel-wise")
def channel_wise(student, teacher, preset: str, ignore_index: int, weight: float = 3.0, temperature: float = 4.0) -> Term:
    """The term "channel-wise": `ChannelWiseLoss` of the logits; weight and temperature are the paper's for logits.

    preset="official" counts ignored pixels too, as the released code does.
    """
    return Logits("channel-wise", ChannelWiseLoss(temperature), weight, None if preset == "official" else ignore_index)
