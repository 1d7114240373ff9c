"""Pixel-wise distillation: at every pixel the student learns the teacher's distribution over the classes."""

import math

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from segfast import _backend

REDUCTIONS = ("none", "mean", "sum", "batchmean")


def pixelwise_kl_reference(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    target: Tensor | None = None,
    ignore_index: int = 255,
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    wide = torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32
    valid = valid_pixels(target, ignore_index, mask)
    logits = (x.to(wide) / temperature for x in (student, teacher))
    if valid is not None:
        logits = (torch.where(valid.unsqueeze(1), x, 0.0) for x in logits)
    log_s, log_t = (x.log_softmax(1) for x in logits)
    kl = temperature**2 * (log_t.exp() * (log_t - log_s)).sum(1)
    if reduction == "none":
        return kl
    if reduction == "sum":
        return kl.sum()
    if reduction == "batchmean":
        return kl.sum() / kl.shape[0]
    return kl.mean() if valid is None or kl.numel() == 0 else kl.sum() / valid.sum().clamp(min=1)


torch.library.define(
    "segfast::pixelwise_kl",
    "(Tensor student, Tensor teacher, Tensor? valid, float temperature, int reduction, bool gradient)"
    " -> (Tensor loss, Tensor saved, Tensor scale)",
)
_backend.register("pixelwise_kl")


def valid_pixels(target: Tensor | None, ignore_index: int, mask: Tensor | None) -> Tensor | None:
    valid = None if target is None else counted(target, ignore_index)
    if mask is None:
        return valid
    return mask if valid is None else valid & mask


def counted(target: Tensor, ignore_index: int) -> Tensor:
    """Where a label is not `ignore_index`. PyTorch compares in the labels' dtype, in which 256 is the uint8 0."""
    if target.is_floating_point() or torch.iinfo(target.dtype).min <= ignore_index <= torch.iinfo(target.dtype).max:
        return target != ignore_index
    return torch.ones_like(target, dtype=torch.bool)


@torch.library.register_fake("segfast::pixelwise_kl")
def _(student, teacher, valid, temperature, reduction, gradient):
    n, _, h, w = student.shape
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    loss = student.new_empty((n, h, w) if REDUCTIONS[reduction] == "none" else (), dtype=dtype)
    saved = torch.empty_like(student, memory_format=_backend.layout(student)) if gradient else student.new_empty((0,))
    return loss, saved, student.new_empty((), dtype=dtype)


@register_flop_formula(torch.ops.segfast.pixelwise_kl)
def _(student, *args, out_shape=None, **kwargs) -> int:
    return 0  # like every softmax: no matrix product


class PixelwiseKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, teacher, valid, temperature, reduction, witness):
        loss, saved, scale = torch.ops.segfast.pixelwise_kl.default(
            student, teacher, valid, temperature, REDUCTIONS.index(reduction), True
        )
        ctx.save_for_backward(saved, scale, witness)
        return loss

    @staticmethod
    def backward(ctx, grad):
        return _backend.once("pixelwise_kl", scale_gradient, *ctx.saved_tensors, grad), None, None, None, None, None


def scale_gradient(saved: Tensor, scale: Tensor, witness: Tensor, grad: Tensor) -> Tensor:
    factor = grad.unsqueeze(1) if grad.dim() else grad
    if saved.dtype == torch.float16:
        factor = factor * scale
    if torch.compiler.is_compiling() or keeps_graph():
        return (saved * factor).to(saved.dtype)
    if factor.dim() == 0 and factor.device.type == "cpu" and factor.item() == 1:
        return saved
    return saved.mul_(factor)


def keeps_graph() -> bool:
    """Whether this backward may be run again: what it saved must then stay as it is."""
    return getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)()


def pixelwise_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    target: Tensor | None = None,
    ignore_index: int = 255,
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Kullback-Leibler divergence of a student's class distribution from a teacher's at every pixel, in nats.

    loss = T^2 KL(softmax(teacher / T) || softmax(student / T))
    (Hinton et al., Distilling the Knowledge in a Neural Network, arXiv:1503.02531; per pixel: Liu et al., Structured Knowledge
    Distillation, arXiv:1903.04197)

    The kernel reads the logits once and leaves the student's gradient behind: no log-softmax is stored. The teacher gets its
    gradient if it requires one.

    Args:
        student: (N, C, H, W) logits, float, any strides.
        teacher: (N, C, H, W) logits, float, of any float dtype.
        temperature: T > 0.
        target: (N, H, W), integer: only says which pixels are ignored, those where it equals `ignore_index`.
        ignore_index: the label of an ignored pixel.
        mask: (N, H, W), bool: True where a pixel counts; with `target` both must agree.
        reduction: "mean" over the pixels that count, "sum", "batchmean" (sum / N), or "none".

    Returns:
        A scalar, or (N, H, W) with reduction="none" and 0 at ignored pixels; float64 if an argument is, else float32. 0, with
        zero gradients, where all pixels are ignored, whatever the logits hold there. NaN for the mean of no pixels at all.

    Raises:
        ValueError: not rank 4, no classes, unequal shapes or devices, a target or mask of another shape, a temperature that is
            not positive and finite, an unknown reduction.
        TypeError: logits not tensors of a real float dtype, a temperature that is no number, target or ignore_index not integer,
            mask not bool.
    """
    check("pixelwise_kl", student, teacher, temperature, target, ignore_index, mask, reduction)
    options = {"temperature": temperature, "reduction": reduction}
    differentiable = torch.is_grad_enabled() and student.requires_grad
    if not _backend.has_kernel("pixelwise_kl", student, teacher) or (torch.is_grad_enabled() and teacher.requires_grad):
        return pixelwise_kl_reference(student, teacher, target=target, ignore_index=ignore_index, mask=mask, **options)
    valid = valid_pixels(target, ignore_index, mask)
    if student.dtype != teacher.dtype and torch.float64 in (student.dtype, teacher.dtype):
        student, teacher = student.double(), teacher.double()
    if differentiable:
        # An empty piece of the student in the backward's arguments: by it a second derivative knows that the gradient depends on
        # the student, and is refused, without the student's memory being held until then.
        witness = student[:0].clone()
        return PixelwiseKL.apply(student, teacher, valid, float(temperature), reduction, witness)
    index = REDUCTIONS.index(reduction)
    return torch.ops.segfast.pixelwise_kl.default(student.detach(), teacher.detach(), valid, float(temperature), index, False)[0]


def check(op: str, student, teacher, temperature, target, ignore_index, mask, reduction) -> None:
    _backend.check_tensors(op, student=student, teacher=teacher)
    for name, x in (("student", student), ("teacher", teacher)):
        if x.dtype not in _backend.DTYPES:
            raise TypeError(f"{op}: want {name} of float32, float64, float16 or bfloat16, got {x.dtype}")
        if x.dim() != 4 or x.shape[1] == 0:
            raise ValueError(f"{op}: want {name} logits of shape (N, C, H, W) with C > 0, got {tuple(x.shape)}")
    if student.shape != teacher.shape:
        got = f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        raise ValueError(f"{op}: want student and teacher logits of one shape, got {got}")
    size = (student.shape[0], *student.shape[2:])
    for name, x in (("target", target), ("mask", mask)):
        if x is None:
            continue
        if (x.dtype != torch.bool) if name == "mask" else (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool):
            raise TypeError(f"{op}: want {name} of {'bool' if name == 'mask' else 'an integer dtype'}, got {x.dtype}")
        if tuple(x.shape) != size:
            raise ValueError(f"{op}: want {name} of shape (N, H, W) = {size}, got {tuple(x.shape)}")
    for name, x in (("teacher", teacher), ("target", target), ("mask", mask)):
        if x is not None and x.device != student.device:
            raise ValueError(f"{op}: want {name} on the student's device {student.device}, got {x.device}")
    _backend.check_whole(op, "ignore_index", ignore_index)
    check_options(op, temperature, reduction)


def check_options(op: str, temperature: float, reduction: str) -> None:
    _backend.check_number(op, "temperature", temperature)
    if not 0 < temperature < math.inf:
        raise ValueError(f"{op}: want temperature > 0 and finite, got {temperature}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: want reduction {', '.join(REDUCTIONS)}, got {reduction!r}")
