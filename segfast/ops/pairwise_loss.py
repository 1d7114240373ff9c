"""Pair-wise similarity distillation: the student learns which nodes of the teacher's feature map resemble each other."""

import math
from functools import partial

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from segfast import _backend
from segfast.ops.pairwise_cosine import check_features, check_pooling, pool_nodes, unit_vectors


def pairwise_loss_reference(
    student: Tensor,
    teacher: Tensor,
    *,
    node_size: int | tuple[int, int] = 2,
    pool: str = "avg",
    grid: tuple[int, int] | None = None,
    detach_norm: bool = False,
    eps: float = 1e-8,
) -> Tensor:
    s = unit_vectors(pool_nodes(student, node_size, pool, grid), eps, detach_norm)
    t = unit_vectors(pool_nodes(teacher, node_size, pool, grid), eps, detach_norm)
    with torch.autocast(student.device.type, enabled=False):
        difference = torch.bmm(s.transpose(1, 2), s) - torch.bmm(t.transpose(1, 2), t)
    return difference.square().mean()


torch.library.define("segfast::pairwise_loss", "(Tensor student, Tensor teacher, float eps, bool gram) -> (Tensor, Tensor)")
torch.library.define(
    "segfast::pairwise_loss_backward",
    "(Tensor grad, Tensor student, Tensor teacher, Tensor? saved, float eps, bool gram, bool detach_norm) -> Tensor",
)
_backend.register("pairwise_loss", "pairwise_loss_backward")


def gram_pays(nodes: int, student_channels: int, teacher_channels: int) -> bool:
    """Whether channels x channels products cost less than nodes x nodes ones, forward and backward."""
    s, t = student_channels, teacher_channels
    return bool(nodes * (3 * s + t) > 3 * s * s + t * t + 4 * s * t)


@torch.library.register_fake("segfast::pairwise_loss")
def _(student, teacher, eps, gram):
    def padded(size):
        return (size + 7) // 8 * 8

    n, c, m = student.shape
    size = (padded(c), padded(c) + padded(teacher.shape[1])) if gram else (padded(m), padded(m))
    wide = torch.float64 in (student.dtype, teacher.dtype)
    loss = student.new_empty((), dtype=torch.float64 if wide else torch.float32)
    return loss, student.new_empty((n, *size), dtype=torch.float64)


@torch.library.register_fake("segfast::pairwise_loss_backward")
def _(grad, student, teacher, saved, eps, gram, detach_norm):
    nodes_first = student.transpose(1, 2)
    if not student.is_contiguous() and nodes_first.is_contiguous():
        return torch.empty_like(nodes_first).transpose(1, 2)
    return torch.empty_like(student, memory_format=torch.contiguous_format)


@register_flop_formula(torch.ops.segfast.pairwise_loss)
def _(student, teacher, *args, out_shape=None, **kwargs) -> int:
    n, c, m = student
    return 2 * n * m * m * (c + teacher[1])


@register_flop_formula(torch.ops.segfast.pairwise_loss_backward)
def _(grad, student, *args, out_shape=None, **kwargs) -> int:
    n, c, m = student
    return 4 * n * m * m * c


class PairwiseLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, teacher, eps, detach_norm):
        gram = gram_pays(student.shape[2], student.shape[1], teacher.shape[1])
        loss, saved = torch.ops.segfast.pairwise_loss.default(student, teacher, eps, gram)
        ctx.save_for_backward(student, teacher, saved)
        ctx.options = eps, gram, detach_norm
        return loss

    @staticmethod
    def backward(ctx, grad):
        student, teacher, saved = ctx.saved_tensors
        grad_student = grad_teacher = None
        backward = partial(_backend.once, "pairwise_loss", torch.ops.segfast.pairwise_loss_backward.default)
        if ctx.needs_input_grad[0]:
            grad_student = backward(grad, student, teacher, saved, *ctx.options)
        if ctx.needs_input_grad[1]:
            grad_teacher = backward(grad, teacher, student, None, *ctx.options)
        return grad_student, grad_teacher, None, None


def pairwise_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    node_size: int | tuple[int, int] = 2,
    pool: str = "avg",
    grid: tuple[int, int] | None = None,
    detach_norm: bool = False,
    eps: float = 1e-8,
) -> Tensor:
    """Pair-wise distillation loss: squared difference of all node similarities of a student's and a teacher's feature maps.

    loss = mean over n, i, j of (a_S[n, i, j] - a_T[n, i, j])^2,   a[n, i, j] = f_i . f_j / ((|f_i| + eps) (|f_j| + eps))
    where f_i are the M nodes of image n: windows of the feature map, pooled.
    (Liu et al., Structured Knowledge Distillation, arXiv:1903.04197, eq. 2 and 3)

    Where nodes outnumber channels no M x M matrix is formed. All products are float64, so the loss stays accurate where student
    and teacher nearly agree, up to a rotation of the features too. A zero vector has no direction: its similarities are 0 and
    it gets no gradient. The teacher gets its gradient if it requires one.

    Args:
        student: (N, C, H, W), float, any strides.
        teacher: (N, C', H, W), float; with `grid` its H and W may be its own.
        node_size: height and width of a node's window, kernel and stride of the pooling; a window that the edge cuts off pools
            what it covers. 1: no pooling.
        pool: "avg" or "max".
        grid: (rows, columns) of nodes by adaptive pooling instead; `node_size` is then left alone.
        detach_norm: take the norms as constants in the gradient, as the authors' released code does.
        eps: added to the norms, > 0.

    Returns:
        A scalar, float64 if an argument is, else float32. NaN for N = 0, like every mean of nothing.

    Raises:
        ValueError: wrong rank, empty maps, unequal batches, sizes or devices, node_size or grid < 1, an unknown pool, eps not
            positive and finite.
        TypeError: a tensor is not of a real float dtype.
    """
    _backend.check_tensors("pairwise_loss", student=student, teacher=teacher)
    check_features("pairwise_loss", student, teacher)
    check_pooling("pairwise_loss", node_size, pool, grid)
    if student.shape[0] != teacher.shape[0] or (grid is None and student.shape[2:] != teacher.shape[2:]):
        sizes = "equal N" if grid is not None else "equal N, H and W (or a grid)"
        raise ValueError(
            f"pairwise_loss: want student and teacher of {sizes}, got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    if student.device != teacher.device:
        raise ValueError(f"pairwise_loss: want student and teacher on one device, got {student.device} and {teacher.device}")
    _backend.check_number("pairwise_loss", "eps", eps)
    if not 0 < eps < math.inf:
        raise ValueError(f"pairwise_loss: want eps > 0 and finite, got {eps}")
    if not _backend.has_kernel("pairwise_loss", student, teacher):
        return pairwise_loss_reference(
            student, teacher, node_size=node_size, pool=pool, grid=grid, detach_norm=detach_norm, eps=eps
        )
    nodes = (pool_nodes(x, node_size, pool, grid) for x in (student, teacher))
    return PairwiseLoss.apply(*nodes, eps, detach_norm)
