"""Structured Knowledge Distillation for Semantic Segmentation (Liu et al., arXiv:1903.04197): its losses as modules."""

import math
from functools import partial

import torch
from torch import Tensor, nn

from segfast import ops
from segfast.ops.pixelwise_kl import check_options, valid_pixels
from segfast.ops.upsample_argmax import check_size


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

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of feature maps (N, C, H, W) and (N, C', H, W)."""
        node_size, pool = self.node_size, self.pool
        if self.preset == "official":
            height, width = (max(1, int(size * self.scale)) for size in teacher.shape[-2:])
            node_size, pool = (height, width), "max"
        return ops.pairwise_loss(
            student, teacher, node_size=node_size, pool=pool, grid=self.grid, detach_norm=self.detach_norm, eps=self.eps
        )

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
        size: (H, W), or an int for both, to which student and teacher, at strides of their own, are interpolated bilinearly on
            the way (`segfast.ops.upsample_pixelwise_kl`); None: both have one size already.
        align_corners: of the interpolation.

    Raises:
        ValueError: an unknown preset, an option that the preset sets itself, and what `segfast.ops.pixelwise_kl` raises.
    """

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        ignore_index: int = 255,
        reduction: str = "mean",
        preset: str = "paper",
        size: int | tuple[int, int] | None = None,
        align_corners: bool = False,
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
        self.size, self.align_corners = None if size is None else check_size("PixelWiseLoss", size), align_corners

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """The loss of logits (N, C, H, W); `target` and `mask` (N, H, W), of `size` if set, say which pixels count."""
        options = {"target": target, "ignore_index": self.ignore_index, "mask": mask}
        divergence_of = ops.pixelwise_kl
        if self.size is not None:
            divergence_of = partial(ops.upsample_pixelwise_kl, size=self.size, align_corners=self.align_corners)
        if self.preset == "paper":
            return divergence_of(student, teacher, temperature=self.temperature, reduction=self.reduction, **options)
        divergence = divergence_of(student, teacher, reduction="sum", **options)
        entropy = divergence_of(torch.zeros_like(teacher), teacher, reduction="none", **options)
        valid = valid_pixels(target, self.ignore_index, mask)
        pixels = entropy.numel() if valid is None else valid.sum()
        return (divergence + pixels * math.log(teacher.shape[1]) - entropy.sum()) / entropy.shape[2] / entropy.shape[1]

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature}, ignore_index={self.ignore_index}, reduction={self.reduction!r}, "
            f"preset={self.preset!r}" + (f", size={self.size}, align_corners={self.align_corners}" if self.size else "")
        )
