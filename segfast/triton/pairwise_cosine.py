"""Cosine similarities in Triton and ATen: a kernel normalises the nodes, cuBLAS multiplies, a kernel undoes the first."""

import torch
import triton
import triton.language as tl
from torch import Tensor

CONFIG = {"BLOCK_NODES": 32, "BLOCK_CHANNELS": 32, "num_warps": 4}


@triton.jit
def squared_norm(from_, inside, channels, x_channel, ACC: tl.constexpr, BLOCK_NODES: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    total = tl.zeros((BLOCK_CHANNELS, BLOCK_NODES), ACC)
    for first in range(0, channels, BLOCK_CHANNELS):
        channel = first + tl.arange(0, BLOCK_CHANNELS).to(tl.int64)
        there = (channel < channels)[:, None] & inside[None, :]
        x = tl.load(from_[None, :] + channel[:, None] * x_channel, mask=there, other=0.0).to(ACC)
        total += x * x
    return tl.sum(total, 0)


# y[n, c, m] = sign * x[n, c, m] / (|x[n, :, m]| + eps), 0 for a zero vector and for channels [channels, padded). A program holds
# BLOCK_NODES nodes of one image. Of x, nodes [first_node, first_node + nodes) are taken; y begins at channel first_channel.
@triton.jit
def unit_vectors(
    x, y, nodes, first_node, channels, padded, blocks, x_image, x_channel, x_node, y_image, y_channel, first_channel,
    EPS: tl.constexpr, SIGN: tl.constexpr, ACC: tl.constexpr, BLOCK_NODES: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    image = program // blocks
    node = (program - image * blocks) * BLOCK_NODES + tl.arange(0, BLOCK_NODES)
    inside = node < nodes
    from_ = x + image * x_image + (first_node + node) * x_node
    norm = tl.sqrt(squared_norm(from_, inside, channels, x_channel, ACC, BLOCK_NODES, BLOCK_CHANNELS))
    inverse = tl.where(norm == 0, 0.0, SIGN / (norm + tl.full((), EPS, ACC)))
    for first in range(0, padded, BLOCK_CHANNELS):
        channel = first + tl.arange(0, BLOCK_CHANNELS).to(tl.int64)
        there = (channel < channels)[:, None] & inside[None, :]
        v = tl.load(from_[None, :] + channel[:, None] * x_channel, mask=there, other=0.0).to(ACC) * inverse[None, :]
        to = y + image * y_image + (first_channel + channel)[:, None] * y_channel + node[None, :]
        tl.store(to, tl.where(there, v, 0.0).to(y.dtype.element_ty), mask=(channel < padded)[:, None] & inside[None, :])


# From g, the gradient of the normalised features, to that of x:  g / (norm + eps) - y (y . g) / norm, times factor * grad;
# without the second term where the norms are constants; 0 for a zero vector.
@triton.jit
def undo_unit_vectors(
    x, g, out, grad, nodes, first_node, channels, blocks, x_image, x_channel, x_node, g_image, g_channel, o_image, o_channel,
    o_node, factor,
    EPS: tl.constexpr, FACTOR: tl.constexpr, DETACH: tl.constexpr, ACC: tl.constexpr,
    BLOCK_NODES: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    image = program // blocks
    node = (program - image * blocks) * BLOCK_NODES + tl.arange(0, BLOCK_NODES)
    inside = node < nodes
    from_ = x + image * x_image + (first_node + node) * x_node
    norm = tl.sqrt(squared_norm(from_, inside, channels, x_channel, ACC, BLOCK_NODES, BLOCK_CHANNELS))
    inverse = tl.where(norm == 0, 0.0, 1 / (norm + tl.full((), EPS, ACC)))
    along = tl.zeros((BLOCK_NODES,), ACC)
    if not DETACH:
        dots = tl.zeros((BLOCK_CHANNELS, BLOCK_NODES), ACC)
        for first in range(0, channels, BLOCK_CHANNELS):
            channel = first + tl.arange(0, BLOCK_CHANNELS).to(tl.int64)
            there = (channel < channels)[:, None] & inside[None, :]
            v = tl.load(from_[None, :] + channel[:, None] * x_channel, mask=there, other=0.0).to(ACC)
            dots += v * tl.load(g + image * g_image + channel[:, None] * g_channel + node[None, :], mask=there, other=0.0).to(ACC)
        along = tl.where(norm == 0, 0.0, tl.sum(dots, 0) * inverse * inverse / tl.where(norm == 0, 1.0, norm))
    scale = factor if FACTOR == 0 else tl.full((), FACTOR, ACC)
    if grad is not None:
        scale = scale * tl.load(grad).to(ACC)
    for first in range(0, channels, BLOCK_CHANNELS):
        channel = first + tl.arange(0, BLOCK_CHANNELS).to(tl.int64)
        there = (channel < channels)[:, None] & inside[None, :]
        v = tl.load(from_[None, :] + channel[:, None] * x_channel, mask=there, other=0.0).to(ACC)
        w = tl.load(g + image * g_image + channel[:, None] * g_channel + node[None, :], mask=there, other=0.0).to(ACC)
        result = scale * (w * inverse[None, :] - v * along[None, :])
        result = tl.where((norm == 0)[None, :], 0.0, result)
        to = out + image * o_image + channel[:, None] * o_channel + (first_node + node)[None, :] * o_node
        tl.store(to, result.to(out.dtype.element_ty), mask=there)


def normalise(x: Tensor, y: Tensor, eps: float, first_channel: int, padded: int, first_node: int = 0, sign: float = 1.0) -> None:
    """Writes the unit vectors of y.shape[2] nodes of x into channels [first_channel, first_channel + padded) of y."""
    nodes = y.shape[2]
    blocks = triton.cdiv(nodes, CONFIG["BLOCK_NODES"])
    with torch.cuda.device_of(x):
        unit_vectors[(x.shape[0] * blocks,)](
            *(x, y, nodes, first_node, x.shape[1], padded, blocks, *x.stride(), *y.stride()[:2], first_channel),
            EPS=eps, SIGN=sign, ACC=kind(y), **CONFIG,
        )  # fmt: skip


def undo(
    x: Tensor, g: Tensor, out: Tensor, grad: Tensor | None, eps: float, factor: float, detach: bool, first_node: int
) -> None:
    """Writes the gradient of nodes [first_node, ...) of x into `out`, from that of their unit vectors."""
    nodes = g.shape[2]
    blocks = triton.cdiv(nodes, CONFIG["BLOCK_NODES"])
    wide = x.dtype == torch.float64
    with torch.cuda.device_of(x):
        undo_unit_vectors[(x.shape[0] * blocks,)](
            *(x, g, out, grad, nodes, first_node, x.shape[1], blocks, *x.stride(), *g.stride()[:2], *out.stride(), factor),
            EPS=eps, FACTOR=factor if wide else 0, DETACH=detach, ACC=kind(g), **CONFIG,
        )  # fmt: skip


def kind(y: Tensor):
    return tl.float64 if y.dtype == torch.float64 else tl.float32


def gradient_like(x: Tensor) -> Tensor:
    """x's own layout if that is (N, M, C) in memory, else contiguous."""
    nodes_first = x.transpose(1, 2)
    if not x.is_contiguous() and nodes_first.is_contiguous():
        return torch.empty_like(nodes_first).transpose(1, 2)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def unit(x: Tensor, eps: float) -> Tensor:
    y = x.new_empty(x.shape, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    if y.numel() > 0:
        normalise(x, y, eps, 0, x.shape[1])
    return y


def pairwise_cosine(x: Tensor, eps: float) -> Tensor:
    y = unit(x, eps)
    return torch.bmm(y.transpose(1, 2), y).to(x.dtype)


def pairwise_cosine_backward(grad: Tensor, x: Tensor, eps: float) -> Tensor:
    y = unit(x, eps)
    grad = grad.to(y.dtype)
    g = torch.baddbmm(torch.bmm(y, grad), y, grad.transpose(1, 2))
    out = gradient_like(x)
    if out.numel() > 0:
        undo(x, g, out, None, eps, 1.0, False, 0)
    return out
