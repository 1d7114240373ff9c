"""Pixel-wise distillation at image size, of student and teacher logits at their own, unequal strides."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from segfast import _backend
from segfast.ops.pixelwise_kl import REDUCTIONS, check_options, pixelwise_kl_reference, valid_pixels
from segfast.ops.upsample_argmax import check_logits, check_size, pair, upsample, wide_dtype
from segfast.ops.upsample_cross_entropy import gradient_like, scaled


def upsample_pixelwise_kl_reference(
    student: Tensor,
    teacher: Tensor,
    size: int | tuple[int, int],
    *,
    temperature: float = 1.0,
    target: Tensor | None = None,
    ignore_index: int = 255,
    mask: Tensor | None = None,
    reduction: str = "mean",
    align_corners: bool = False,
) -> Tensor:
    wide = wide_dtype(student, teacher)
    s, t = (upsample(x, pair(size), align_corners, wide) for x in (student, teacher))
    options = {"target": target, "ignore_index": ignore_index, "mask": mask, "reduction": reduction}
    return pixelwise_kl_reference(s, t, temperature=temperature, **options)


_OPTIONS = "Tensor? valid, SymInt[] size, float temperature, bool align_corners, int reduction"
torch.library.define(
    "segfast::upsample_pixelwise_kl",
    f"(Tensor student, Tensor teacher, {_OPTIONS}, bool gradient) -> (Tensor loss, Tensor saved)",
)
torch.library.define(
    "segfast::upsample_pixelwise_kl_backward", f"(Tensor grad, Tensor student, Tensor teacher, {_OPTIONS}) -> Tensor"
)
_backend.register("upsample_pixelwise_kl", "upsample_pixelwise_kl_backward")


@torch.library.register_fake("segfast::upsample_pixelwise_kl")
def _(student, teacher, valid, size, temperature, align_corners, reduction, gradient):
    dtype = wide_dtype(student)
    none = REDUCTIONS[reduction] == "none"
    loss = student.new_empty((student.shape[0], size[0], size[1]) if none else (), dtype=dtype)
    return loss, gradient_like(student, dtype) if gradient and not none else student.new_empty((0,), dtype=dtype)


@torch.library.register_fake("segfast::upsample_pixelwise_kl_backward")
def _(grad, student, *args):
    return gradient_like(student, student.dtype)


@register_flop_formula([torch.ops.segfast.upsample_pixelwise_kl, torch.ops.segfast.upsample_pixelwise_kl_backward])
def _(*args, **kwargs) -> int:
    return 0  # like every softmax: no matrix product


class UpsamplePixelwiseKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, teacher, valid, witness, options):
        loss, saved = torch.ops.segfast.upsample_pixelwise_kl.default(student, teacher, valid, *options, True)
        if REDUCTIONS[options[-1]] == "none":
            ctx.options = options
            ctx.save_for_backward(student, teacher, valid)
        else:
            ctx.dtype, ctx.options = student.dtype, None
            ctx.save_for_backward(saved, witness)
        return loss

    @staticmethod
    def backward(ctx, grad):
        if ctx.options is None:
            grad_student = _backend.once("upsample_pixelwise_kl", scaled, *ctx.saved_tensors, grad, ctx.dtype)
        else:
            raw = torch.ops.segfast.upsample_pixelwise_kl_backward.default
            grad_student = _backend.once("upsample_pixelwise_kl", raw, grad, *ctx.saved_tensors, *ctx.options)
        return grad_student, None, None, None, None


def upsample_pixelwise_kl(
    student: Tensor,
    teacher: Tensor,
    size: int | tuple[int, int],
    *,
    temperature: float = 1.0,
    target: Tensor | None = None,
    ignore_index: int = 255,
    mask: Tensor | None = None,
    reduction: str = "mean",
    align_corners: bool = False,
) -> Tensor:
    """Kullback-Leibler divergence of a student's class distribution from a teacher's at every pixel of `size`, in nats.

    loss = pixelwise_kl(F.interpolate(student, size, mode="bilinear"), F.interpolate(teacher, size, mode="bilinear"), ...)
    (Liu et al., Structured Knowledge Distillation, arXiv:1903.04197)

    Neither the interpolated logits nor their softmax nor their gradient are stored. The teacher gets its gradient if it requires
    one, from the reference.

    Args:
        student: (N, C, H_s, W_s) logits, float, any strides.
        teacher: (N, C, H_t, W_t) logits, float, of any float dtype; its own stride, or `size` itself.
        size: (H, W) where the two are compared, larger or smaller by any ratio; an int for both.
        temperature: T > 0: logits / T, loss * T^2.
        target: (N, H, W), integer: only says which pixels are ignored, those where it equals `ignore_index`.
        ignore_index: the label of an ignored pixel.
        mask: (N, H, W), bool: True where a pixel counts; with `target` both must agree.
        reduction: "mean" over the pixels that count, "sum", "batchmean" (sum / N), or "none".
        align_corners: as in `torch.nn.functional.interpolate`.

    Returns:
        A scalar, or (N, H, W) with reduction="none" and 0 at ignored pixels; float64 if an argument is, else float32. 0, with
        zero gradients, where all pixels are ignored, whatever the logits hold there. NaN for the mean of an empty batch.

    Raises:
        ValueError: not rank 4, no classes or pixels, unequal N, C or devices, a size below 1, a target or mask of another shape,
            a temperature that is not positive and finite, an unknown reduction.
        TypeError: logits not of a real float dtype, target or ignore_index not integer, mask or align_corners not bool.
    """
    op = "upsample_pixelwise_kl"
    size = check_size(op, size, align_corners)
    check(op, student, teacher, size, target, mask)
    _backend.check_whole(op, "ignore_index", ignore_index)
    check_options(op, temperature, reduction)
    if not _backend.has_kernel(op, student, teacher) or (torch.is_grad_enabled() and teacher.requires_grad):
        return upsample_pixelwise_kl_reference(
            student, teacher, size, temperature=temperature, target=target, ignore_index=ignore_index, mask=mask,
            reduction=reduction, align_corners=align_corners,
        )  # fmt: skip
    if student.dtype != teacher.dtype and torch.float64 in (student.dtype, teacher.dtype):
        student, teacher = student.double(), teacher.double()
    valid = valid_pixels(target, ignore_index, mask)
    options = size, float(temperature), bool(align_corners), REDUCTIONS.index(reduction)
    if torch.is_grad_enabled() and student.requires_grad:
        # An empty piece of the student in the backward's arguments: by it a second derivative knows what the gradient depends on.
        return UpsamplePixelwiseKL.apply(student, teacher, valid, student[:0].clone(), options)
    return torch.ops.segfast.upsample_pixelwise_kl.default(student.detach(), teacher.detach(), valid, *options, False)[0]


def check(op: str, student, teacher, size, target, mask) -> None:
    for name, x in (("student", student), ("teacher", teacher)):
        check_logits(op, name, x)
    if student.shape[:2] != teacher.shape[:2]:
        got = f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        raise ValueError(f"{op}: want student and teacher logits of equal N and C, got {got}")
    shape = (student.shape[0], *size)
    for name, x in (("target", target), ("mask", mask)):
        if x is None:
            continue
        if (x.dtype != torch.bool) if name == "mask" else (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool):
            raise TypeError(f"{op}: want {name} of {'bool' if name == 'mask' else 'an integer dtype'}, got {x.dtype}")
        if tuple(x.shape) != shape:
            raise ValueError(f"{op}: want {name} of shape (N, H, W) = {shape}, got {tuple(x.shape)}")
    for name, x in (("teacher", teacher), ("target", target), ("mask", mask)):
        if x is not None and x.device != student.device:
            raise ValueError(f"{op}: want {name} on the student's device {student.device}, got {x.device}")
