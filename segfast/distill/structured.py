"""Structured Knowledge Distillation for Semantic Segmentation (Liu et al., arXiv:1903.04197): its losses as modules."""

import math

import torch
from torch import Tensor, nn

from segfast import ops
from segfast.distill._method import Batch, Term, register_term, resize, smaller
from segfast.distill._method import valid_pixels as cells
from segfast.ops.pairwise_cosine import pool_nodes
from segfast.ops.pixelwise_kl import check_options, valid_pixels


class PairWiseLoss(nn.Module):
    """Pair-wise distillation of feature maps: `segfast.ops.pairwise_loss` as a module.

    loss = mean over n, i, j of (a_S[n, i, j] - a_T[n, i, j])^2,  a: cosine similarities of pooled nodes    (eq. 2 and 3)

    preset="paper" is that formula with the options below and the true gradient. preset="official" is the authors' released
    code: max-pooling with kernel = stride = (int(H scale), int(W scale)) of the teacher's map, ceil mode, and norms that are
    constants in the gradient; with scale=0.5 an even map has 2 x 2 nodes.

    Args:
        node_size, pool, grid, detach_norm, eps: as in `segfast.ops.pairwise_loss`; detach_norm=None takes the preset's own.
            With "official", node_size, pool and grid are the preset's and must be left alone.
        preset: "paper" or "official".
        scale: of "official" only, in (0, 1].

    Raises:
        ValueError: an unknown preset, an option that the preset sets itself, or a scale outside (0, 1].
    """

    def __init__(
        self,
        *,
        node_size: int | tuple[int, int] = 2,
        pool: str = "avg",
        grid: tuple[int, int] | None = None,
        detach_norm: bool | None = None,
        eps: float = 1e-8,
        preset: str = "paper",
        scale: float = 0.5,
    ) -> None:
        super().__init__()
        if preset not in ("paper", "official"):
            raise ValueError(f'PairWiseLoss: want preset "paper" or "official", got {preset!r}')
        if preset == "official" and (node_size, pool, grid) != (2, "avg", None):
            raise ValueError(
                f'PairWiseLoss: want node_size, pool and grid left alone with preset="official", '
                f"got node_size={node_size}, pool={pool!r}, grid={grid}"
            )
        if not 0 < scale <= 1:
            raise ValueError(f"PairWiseLoss: want scale in (0, 1], got {scale}")
        self.preset, self.scale = preset, scale
        self.node_size, self.pool, self.grid, self.eps = node_size, pool, grid, eps
        self.detach_norm = preset == "official" if detach_norm is None else detach_norm

    def forward(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss of feature maps (N, C, H, W) and (N, C', H, W); the mean over nodes with a pixel where `mask` (N, H, W) holds.

        Both maps are taken for 0 elsewhere: a vector of zeros resembles nothing.
        """
        node_size, pool = self.node_size, self.pool
        if self.preset == "official":
            height, width = (max(1, int(size * self.scale)) for size in teacher.shape[-2:])
            node_size, pool = (height, width), "max"
        if mask is not None:
            student, teacher = (torch.where(mask.unsqueeze(1), x, 0) for x in (student, teacher))
        loss = ops.pairwise_loss(
            student, teacher, node_size=node_size, pool=pool, grid=self.grid, detach_norm=self.detach_norm, eps=self.eps
        )
        if mask is None:
            return loss
        nodes = pool_nodes(mask.unsqueeze(1).float(), node_size, "max", self.grid).flatten(1)
        return loss * (nodes.numel() * nodes.shape[1]) / nodes.sum(1).square().sum().clamp(min=1)

    def extra_repr(self) -> str:
        if self.preset == "official":
            return f"preset='official', scale={self.scale}, detach_norm={self.detach_norm}, eps={self.eps}"
        return f"node_size={self.node_size}, pool={self.pool!r}, grid={self.grid}, detach_norm={self.detach_norm}, eps={self.eps}"


class PixelWiseLoss(nn.Module):
    """Pixel-wise distillation of logits: `segfast.ops.pixelwise_kl` as a module.

    preset="paper": T^2 KL(teacher || student), the mean over the valid pixels of all images (eq. 1, its text and the common use:
    the formula as surveys quote it has the arguments of KL the other way round). preset="official" is the authors' released
    code: the cross-entropy -sum_c p_T log p_S, summed over images and pixels and divided by W and H. It has the gradient of the
    divergence, its value is greater by the teacher's entropy.

    Args:
        temperature, ignore_index, reduction: as in `segfast.ops.pixelwise_kl`. With "official", temperature and reduction are
            the preset's and must be left alone.
        preset: "paper" or "official".

    Raises:
        ValueError: an unknown preset, an option that the preset sets itself, and what `segfast.ops.pixelwise_kl` raises.
    """

    def __init__(
        self, *, temperature: float = 1.0, ignore_index: int = 255, reduction: str = "mean", preset: str = "paper"
    ) -> None:
        super().__init__()
        if preset not in ("paper", "official"):
            raise ValueError(f'PixelWiseLoss: want preset "paper" or "official", got {preset!r}')
        if preset == "official" and (temperature, reduction) != (1.0, "mean"):
            raise ValueError(
                f'PixelWiseLoss: want temperature and reduction left alone with preset="official", '
                f"got temperature={temperature}, reduction={reduction!r}"
            )
        check_options("PixelWiseLoss", temperature, reduction)
        self.temperature, self.ignore_index, self.reduction, self.preset = temperature, ignore_index, reduction, preset

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """The loss of logits (N, C, H, W); `target` and `mask` (N, H, W) say which pixels count."""
        options = {"target": target, "ignore_index": self.ignore_index, "mask": mask}
        if self.preset == "paper":
            return ops.pixelwise_kl(student, teacher, temperature=self.temperature, reduction=self.reduction, **options)
        divergence = ops.pixelwise_kl(student, teacher, reduction="sum", **options)
        entropy = ops.pixelwise_kl(torch.zeros_like(teacher), teacher, reduction="none", **options)
        valid = valid_pixels(target, self.ignore_index, mask)
        pixels = entropy.numel() if valid is None else valid.sum()
        return (divergence + pixels * math.log(teacher.shape[1]) - entropy.sum()) / student.shape[3] / student.shape[2]

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature}, ignore_index={self.ignore_index}, reduction={self.reduction!r}, "
            f"preset={self.preset!r}"
        )


class PixelWise(Term):
    """The term "pixel-wise" of a method: `PixelWiseLoss` of the logits, the teacher's at the student's size.

    Args:
        weight: of the term; the paper's 10.
        temperature: as in `PixelWiseLoss`.
        preset, ignore_index: as in `PixelWiseLoss`; "official" counts ignored pixels too, as the released code does.
    """

    def __init__(self, *, weight: float = 10.0, temperature: float = 1.0, preset: str = "paper", ignore_index: int = 255):
        super().__init__()
        self.weight, self.ignore_index, self.masked = weight, ignore_index, preset == "paper"
        self.loss = PixelWiseLoss(temperature=temperature, ignore_index=ignore_index, preset=preset)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        student = batch.student.logits
        mask = cells(batch.target, student.shape[2:], self.ignore_index) if self.masked else None
        return {"pixel-wise": self.weight * self.loss(student, resize(batch.teacher.logits, student.shape[2:]), mask=mask)}


class PairWise(Term):
    """The term "pair-wise" of a method: `PairWiseLoss` of the maps before the classifiers, both at the smaller one's size.

    Args:
        weight: of the term; the paper's 10, the released code's 0.5.
        taps: (student's, teacher's) instead of the maps that the classifiers read.
        node_size, pool, grid, eps, preset, scale: as in `PairWiseLoss`.
        ignore_index: nodes without a labelled pixel are left out, with preset="official" as the released code does not.
    """

    def __init__(
        self,
        *,
        weight: float = 10.0,
        taps: tuple[str, str] = ("pre_logits", "pre_logits"),
        preset: str = "paper",
        ignore_index: int = 255,
        **options,
    ):
        super().__init__()
        self.weight, self.ignore_index, self.masked = weight, ignore_index, preset == "paper"
        self.student_taps, self.teacher_taps = [taps[0]], [taps[1]]
        self.reads_teacher = False
        self.loss = PairWiseLoss(preset=preset, **options)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        student, teacher = smaller(batch.student_maps[0], batch.teacher_maps[0])
        mask = cells(batch.target, student.shape[2:], self.ignore_index) if self.masked else None
        return {"pair-wise": self.weight * self.loss(student, teacher, mask)}


@register_term("pixel-wise", "structured")
def pixel_wise(student, teacher, preset, ignore_index, weight: float = 10.0, temperature: float = 1.0) -> Term:
    """The pixel-wise term of Structured Knowledge Distillation."""
    return PixelWise(weight=weight, temperature=temperature, preset=preset, ignore_index=ignore_index)


@register_term("pair-wise", "structured")
def pair_wise(
    student, teacher, preset, ignore_index, weight: float | None = None, taps: tuple[str, str] = ("pre_logits", "pre_logits"),
    node_size=2, pool: str = "avg", grid=None, eps: float = 1e-8, scale: float = 0.5,
) -> Term:  # fmt: skip
    """The pair-wise term of Structured Knowledge Distillation."""
    weight = weight if weight is not None else 0.5 if preset == "official" else 10.0
    options = {"node_size": node_size, "pool": pool, "grid": grid, "eps": eps, "scale": scale}
    return PairWise(weight=weight, taps=taps, preset=preset, ignore_index=ignore_index, **options)
