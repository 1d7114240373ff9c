"""Pair-wise loss on the GPU: products of unit vectors by cuBLAS in float64 where that is fast, else Triton tiles in float32.

With A and B the unit vectors of student and teacher, channels x nodes, the loss is ||A'A - B'B||^2 / (N M^2).
Gram form: ||AA'||^2 + ||BB'||^2 - 2 ||AB'||^2, products of channels x channels, which cancel: float64 only.
Direct form: A'A - B'B itself, float64 by cuBLAS for few nodes, and otherwise a tile at a time in float32, never stored.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from segfast.triton.pairwise_cosine import gradient_like, normalise, undo

CHUNK = 1 << 22  # elements of normalised features at a time in the Gram form
SQUARES = {"BLOCK": 1024, "STEPS": 8, "num_warps": 4}
TILE = {"BLOCK_NODES": 32, "BLOCK_CHANNELS": 16, "num_warps": 4, "num_stages": 2}
GRADIENT = {**TILE, "BLOCK_OUT": 32, "num_stages": 3}  # with 2 stages ptxas spills on sm_87, and of direct_rows with 3 on sm_90


def has_fast_float64(device: torch.device) -> bool:
    """Whether float64 runs at half of float32's rate or more: the data centre parts V100, A100, H100, B200."""
    if device.type != "cuda":
        return True
    return torch.cuda.get_device_capability(device) in ((6, 0), (7, 0), (8, 0), (9, 0), (10, 0))


# partial[program] = weight(column) * sum of x^2 over BLOCK * STEPS elements of a matrix of `columns` columns; the weight is 1,
# and -2 from column `split` on.
@triton.jit
def squares(x, partial, total, columns, split, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    acc = tl.zeros((BLOCK,), tl.float64)
    for step in range(STEPS):
        index = (program * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(x + index, mask=index < total, other=0.0).to(tl.float64)
        acc += tl.where(index % columns < split, value * value, -2.0 * value * value)
    tl.store(partial + program, tl.sum(acc, 0))


@triton.jit
def finish(partial, loss, parts, pairs, BLOCK: tl.constexpr):
    acc = tl.zeros((BLOCK,), tl.float64)
    for at in range(0, parts, BLOCK):
        index = at + tl.arange(0, BLOCK).to(tl.int64)
        acc += tl.load(partial + index, mask=index < parts, other=0.0)
    total = tl.sum(acc, 0)
    total = tl.where(total < 0, 0.0, total)  # rounding, where student and teacher are the same
    tl.store(loss, (total / tl.cast(pairs, tl.float64)).to(loss.dtype.element_ty))


@triton.jit
def difference_tile(
    a, b, i, j, nodes, a_channels, b_channels, BLOCK_NODES: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    acc = tl.zeros((BLOCK_NODES, BLOCK_NODES), tl.float32)
    for first in range(0, a_channels, BLOCK_CHANNELS):
        channel = first + tl.arange(0, BLOCK_CHANNELS).to(tl.int64)
        here = channel < a_channels
        left = tl.load(a + channel[None, :] * nodes + i[:, None], mask=here[None, :] & (i < nodes)[:, None], other=0.0)
        right = tl.load(a + channel[:, None] * nodes + j[None, :], mask=here[:, None] & (j < nodes)[None, :], other=0.0)
        acc = tl.dot(left, right, acc, input_precision="ieee")
    for first in range(0, b_channels, BLOCK_CHANNELS):
        channel = first + tl.arange(0, BLOCK_CHANNELS).to(tl.int64)
        here = channel < b_channels
        left = tl.load(b + channel[None, :] * nodes + i[:, None], mask=here[None, :] & (i < nodes)[:, None], other=0.0)
        right = tl.load(b + channel[:, None] * nodes + j[None, :], mask=here[:, None] & (j < nodes)[None, :], other=0.0)
        acc = tl.dot(-left, right, acc, input_precision="ieee")
    return acc


# partial[image, row of tiles] = the squares of a row of tiles of A'A - B'B. The sum over columns runs in order.
@triton.jit
def direct_rows(
    a, b, partial, nodes, a_channels, b_channels, tiles, BLOCK_NODES: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    image = program // tiles
    row = program - image * tiles
    i = row * BLOCK_NODES + tl.arange(0, BLOCK_NODES)
    acc = tl.zeros((BLOCK_NODES,), tl.float64)
    for column in range(0, tiles):
        j = tl.cast(column, tl.int64) * BLOCK_NODES + tl.arange(0, BLOCK_NODES)
        d = difference_tile(
            a + image * a_channels * nodes, b + image * b_channels * nodes, i, j, nodes, a_channels, b_channels,
            BLOCK_NODES, BLOCK_CHANNELS,
        )  # fmt: skip
        acc += tl.sum(d * d, 1).to(tl.float64)
    tl.store(partial + program, tl.sum(acc, 0))


# g[image, c, i] = sum over j of a[image, c, j] (A'A - B'B)[j, i], the difference made again a tile at a time.
@triton.jit
def direct_gradient(
    a, b, g, nodes, a_channels, b_channels, tiles, channel_blocks, BLOCK_NODES: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    image = program // (tiles * channel_blocks)
    rest = program - image * tiles * channel_blocks
    i = (rest // channel_blocks) * BLOCK_NODES + tl.arange(0, BLOCK_NODES)
    channel = (rest % channel_blocks) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    own = a + image * a_channels * nodes
    acc = tl.zeros((BLOCK_OUT, BLOCK_NODES), tl.float32)
    for column in range(0, tiles):
        j = tl.cast(column, tl.int64) * BLOCK_NODES + tl.arange(0, BLOCK_NODES)
        d = difference_tile(own, b + image * b_channels * nodes, j, i, nodes, a_channels, b_channels, BLOCK_NODES, BLOCK_CHANNELS)
        there = (channel < a_channels)[:, None] & (j < nodes)[None, :]
        left = tl.load(own + channel[:, None] * nodes + j[None, :], mask=there, other=0.0)
        acc = tl.dot(left, d, acc, input_precision="ieee")
    to = g + image * a_channels * nodes + channel[:, None] * nodes + i[None, :]
    tl.store(to, acc, mask=(channel < a_channels)[:, None] & (i < nodes)[None, :])


def padded(size: int) -> int:
    return (size + 7) // 8 * 8


def tiled(student: Tensor, teacher: Tensor) -> bool:
    return torch.float64 not in (student.dtype, teacher.dtype) and not has_fast_float64(student.device)


def unit_vectors_of(x: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    y = x.new_empty(x.shape, dtype=dtype)
    normalise(x, y, eps, 0, x.shape[1])
    return y


def chunks(student: Tensor, teacher: Tensor) -> list[tuple[int, int]]:
    nodes = student.shape[2]
    size = max(256, CHUNK // max(1, student.shape[0] * (padded(student.shape[1]) + padded(teacher.shape[1]))))
    return [(first, min(size, nodes - first)) for first in range(0, nodes, size)]


def stacked(student: Tensor, teacher: Tensor, eps: float, first: int, nodes: int, sign: float) -> Tensor:
    """[A; sign B] of some nodes, float64, both with zero channels up to multiples of 8."""
    a, b = padded(student.shape[1]), padded(teacher.shape[1])
    z = student.new_empty((student.shape[0], a + b, nodes), dtype=torch.float64)
    normalise(student, z, eps, 0, a, first)
    normalise(teacher, z, eps, a, b, first, sign)
    return z


def sum_of_squares(matrices: list[tuple[Tensor, int]], pairs: int, loss: Tensor) -> None:
    """loss = (sum of the squares, those from a matrix's column `split` on times -2) / pairs"""
    size = SQUARES["BLOCK"] * SQUARES["STEPS"]
    parts = [triton.cdiv(x.numel(), size) for x, _ in matrices]
    partial = loss.new_empty((sum(parts),), dtype=torch.float64)
    with torch.cuda.device_of(loss):
        first = 0
        for (x, split), number in zip(matrices, parts):
            squares[(number,)](x, partial[first:], x.numel(), x.shape[-1], split, **SQUARES)
            first += number
        finish[(1,)](partial, loss, first, pairs, BLOCK=1024)


def forward(student: Tensor, teacher: Tensor, eps: float, gram: bool) -> tuple[Tensor, Tensor]:
    n, c, nodes = student.shape
    a, b = padded(c), padded(teacher.shape[1])
    wide = torch.float64 in (student.dtype, teacher.dtype)
    loss = student.new_empty((), dtype=torch.float64 if wide else torch.float32)
    size = (n, a, a + b) if gram else (n, padded(nodes), padded(nodes))
    pairs = n * nodes * nodes
    if n == 0:
        return loss.fill_(float("nan")), student.new_empty(size, dtype=torch.float64)
    if tiled(student, teacher):
        one, two = (unit_vectors_of(x, eps, torch.float32) for x in (student, teacher))
        tiles = triton.cdiv(nodes, TILE["BLOCK_NODES"])
        partial = student.new_empty((n * tiles,), dtype=torch.float64)
        with torch.cuda.device_of(student):
            direct_rows[(n * tiles,)](one, two, partial, nodes, c, teacher.shape[1], tiles, **TILE)
            finish[(1,)](partial, loss, n * tiles, pairs, BLOCK=1024)
        return loss, student.new_zeros(size, dtype=torch.float64)
    if not gram:
        one, two = (unit_vectors_of(x, eps, torch.float64) for x in (student, teacher))
        difference = torch.baddbmm(torch.bmm(one.transpose(1, 2), one), two.transpose(1, 2), two, alpha=-1)
        saved = student.new_zeros(size, dtype=torch.float64)
        saved[:, :nodes, :nodes] = difference
        sum_of_squares([(saved, size[2])], pairs, loss)
        return loss, saved
    saved = student.new_zeros(size, dtype=torch.float64)
    other = student.new_zeros((n, b, b), dtype=torch.float64)
    for first, number in chunks(student, teacher):
        z = stacked(student, teacher, eps, first, number, 1.0)
        saved.baddbmm_(z[:, :a], z.transpose(1, 2))
        other.baddbmm_(z[:, a:], z[:, a:].transpose(1, 2))
    sum_of_squares([(saved, a), (other, b)], pairs, loss)
    return loss, saved


def pairwise_loss(student: Tensor, teacher: Tensor, eps: float, gram: bool) -> tuple[Tensor, Tensor]:
    return forward(student, teacher, eps, gram)


def pairwise_loss_backward(
    grad: Tensor, student: Tensor, teacher: Tensor, saved: Tensor | None, eps: float, gram: bool, detach_norm: bool
) -> Tensor:
    n, c, nodes = student.shape
    out = gradient_like(student)
    if out.numel() == 0:
        return out
    factor = 4.0 / (n * nodes * nodes)
    if tiled(student, teacher):
        one, two = (unit_vectors_of(x, eps, torch.float32) for x in (student, teacher))
        g = torch.empty_like(one)
        tiles, channel_blocks = triton.cdiv(nodes, TILE["BLOCK_NODES"]), triton.cdiv(c, GRADIENT["BLOCK_OUT"])
        with torch.cuda.device_of(student):
            direct_gradient[(n * tiles * channel_blocks,)](
                one, two, g, nodes, c, teacher.shape[1], tiles, channel_blocks, **GRADIENT
            )
        undo(student, g, out, grad, eps, factor, detach_norm, 0)
        return out
    if saved is None:
        _, saved = forward(student, teacher, eps, gram)
    if not gram:
        one = unit_vectors_of(student, eps, torch.float64)
        undo(student, torch.bmm(one, saved[:, :nodes, :nodes]), out, grad, eps, factor, detach_norm, 0)
        return out
    for first, number in chunks(student, teacher):
        z = stacked(student, teacher, eps, first, number, -1.0)
        undo(student, torch.bmm(saved, z), out, grad, eps, factor, detach_norm, first)
    return out
