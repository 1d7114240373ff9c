"""Feature distillation before the activation: the student learns what the teacher's ReLU lets through, and what it does not."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from segfast import _backend
from segfast.ops.pixelwise_kl import scale_gradient

REDUCTIONS = ("mean", "sum", "batchmean")


def overhaul_loss_reference(
    student: Tensor, teacher: Tensor, margin: Tensor, *, mask: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    wide = torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32
    n, c, h, w = student.shape
    s = student.to(wide)
    t = torch.maximum(teacher.to(wide), margin.to(wide).view(1, c, 1, 1))
    left_out = (s <= t) & (t <= 0)
    if mask is not None:
        left_out = left_out | ~mask.unsqueeze(1)
    total = torch.where(left_out, 0, t - s).square().sum()
    if reduction == "sum":
        return total
    if reduction == "batchmean":
        return total / n
    return total / (n * h * w * c if mask is None or n * h * w == 0 else mask.sum().clamp(min=1) * c)


torch.library.define(
    "segfast::overhaul_loss",
    "(Tensor student, Tensor teacher, Tensor margin, Tensor? mask, int reduction, bool gradient)"
    " -> (Tensor loss, Tensor saved, Tensor scale)",
)
_backend.register("overhaul_loss")


@torch.library.register_fake("segfast::overhaul_loss")
def _(student, teacher, margin, mask, reduction, gradient):
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    saved = torch.empty_like(student, memory_format=_backend.layout(student)) if gradient else student.new_empty((0,))
    return student.new_empty((), dtype=dtype), saved, student.new_empty((), dtype=dtype)


@register_flop_formula(torch.ops.segfast.overhaul_loss)
def _(student, *args, out_shape=None, **kwargs) -> int:
    return 0  # no matrix product


class OverhaulLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, teacher, margin, mask, reduction, witness):
        index = REDUCTIONS.index(reduction)
        loss, saved, scale = torch.ops.segfast.overhaul_loss.default(student, teacher, margin, mask, index, True)
        ctx.save_for_backward(saved, scale, witness)
        return loss

    @staticmethod
    def backward(ctx, grad):
        return _backend.once("overhaul_loss", scale_gradient, *ctx.saved_tensors, grad), None, None, None, None, None


def overhaul_loss(
    student: Tensor, teacher: Tensor, margin: Tensor, *, mask: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    """Partial L2 distance of a student's map from a teacher's behind a margin ReLU, both taken before the activation.

    loss = sum over n, c, h, w of d(S, T),  T = max(teacher, margin[c]),  d(S, T) = 0 if S <= T <= 0 else (T - S)^2
    (Heo et al., A Comprehensive Overhaul of Feature Distillation, arXiv:1904.01866)

    Where the ReLU will make 0 of both it does not matter how far below 0 the student is. The kernel reads both maps once and
    leaves the student's gradient behind. Teacher and margin get their gradients if they require one.

    Args:
        student: (N, C, H, W), float, any strides: the student's map, brought to the teacher's channels and size.
        teacher: (N, C, H, W), float, of any float dtype.
        margin: (C,), float, < 0 in the paper: what the teacher's negative values are worth on average.
        mask: (N, H, W), bool: True where a position counts.
        reduction: "sum"; "batchmean", the sum / N; "mean" over the elements that count, left out by the mask or not by d.

    Returns:
        A scalar, float64 if student or teacher is, else float32. 0, with zero gradients, where the mask leaves nothing, whatever
        the maps hold there. NaN for the mean of no elements at all.

    Raises:
        ValueError: not rank 4, unequal shapes or devices, a margin or mask of another shape, an unknown reduction.
        TypeError: a tensor not of a real float dtype, mask not bool.
    """
    check(student, teacher, margin, mask, reduction)
    others = torch.is_grad_enabled() and (teacher.requires_grad or margin.requires_grad)
    if not _backend.has_kernel("overhaul_loss", student, teacher, margin) or others:
        return overhaul_loss_reference(student, teacher, margin, mask=mask, reduction=reduction)
    if student.dtype != teacher.dtype and torch.float64 in (student.dtype, teacher.dtype):
        student, teacher = student.double(), teacher.double()
    margin = margin.detach().to(torch.float64 if student.dtype == torch.float64 else torch.float32).contiguous()
    if torch.is_grad_enabled() and student.requires_grad:
        # By this empty piece of the student a second derivative is seen, and refused, without the student being kept.
        return OverhaulLoss.apply(student, teacher, margin, mask, reduction, student[:0].clone())
    index = REDUCTIONS.index(reduction)
    return torch.ops.segfast.overhaul_loss.default(student.detach(), teacher.detach(), margin, mask, index, False)[0]


def check(student: Tensor, teacher: Tensor, margin: Tensor, mask: Tensor | None, reduction: str) -> None:
    op = "overhaul_loss"
    for name, x in (("student", student), ("teacher", teacher), ("margin", margin)):
        if x.dtype not in _backend.DTYPES:
            raise TypeError(f"{op}: want {name} of float32, float64, float16 or bfloat16, got {x.dtype}")
    if student.dim() != 4 or student.shape != teacher.shape:
        got = f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        raise ValueError(f"{op}: want student and teacher of one shape (N, C, H, W), got {got}")
    if tuple(margin.shape) != (student.shape[1],):
        raise ValueError(f"{op}: want margin of shape (C,) = ({student.shape[1]},), got {tuple(margin.shape)}")
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(f"{op}: want mask of bool, got {mask.dtype}")
        size = (student.shape[0], *student.shape[2:])
        if tuple(mask.shape) != size:
            raise ValueError(f"{op}: want mask of shape (N, H, W) = {size}, got {tuple(mask.shape)}")
    for name, x in (("teacher", teacher), ("margin", margin), ("mask", mask)):
        if x is not None and x.device != student.device:
            raise ValueError(f"{op}: want {name} on the student's device {student.device}, got {x.device}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: want reduction {', '.join(REDUCTIONS)}, got {reduction!r}")
