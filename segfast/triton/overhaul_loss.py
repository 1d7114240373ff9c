"""The partial L2 distance behind a margin ReLU in Triton: one sweep over both maps, with the student's gradient on the way.

A program takes BLOCK neighbours in memory; which channel and pixel each one is decides its margin and its place in the mask.
DRAM sees two reads and one write of the map.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from segfast import _backend

CONFIGS = {
    "run": {"BLOCK": 1024, "num_warps": 4},
    "total": {"BLOCK": 1024, "num_warps": 4},
}
MEAN, SUM, BATCHMEAN = range(3)


@triton.jit
def distance(
    student, teacher, margin, mask, divisor, saved, partial, count, channels, pixels,
    ACC: tl.constexpr, CHANNELS_LAST: tl.constexpr, MASKED: tl.constexpr, GRADIENT: tl.constexpr, DIVIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    at = program * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    present = at < count
    # NCHW: at = (image * channels + channel) * pixels + pixel.  NHWC: at = (image * pixels + pixel) * channels + channel.
    if CHANNELS_LAST:
        place = at // channels
        channel = at - place * channels
    else:
        plane = at // pixels
        image = plane // channels
        channel = plane - image * channels
        place = image * pixels + at - plane * pixels
    s = tl.load(student + at, mask=present, other=0.0).to(ACC)
    t = tl.load(teacher + at, mask=present, other=0.0).to(ACC)
    m = tl.load(margin + channel, mask=present, other=0.0)
    t = tl.where((t > m) | (t != t), t, m)
    keep = present & ~((s <= t) & (t <= 0.0))
    if MASKED:
        keep = keep & (tl.load(mask + place, mask=present, other=0) != 0)
    difference = tl.where(keep, s - t, 0.0)
    tl.store(partial + program, tl.sum((difference * difference).to(tl.float64), 0))
    if GRADIENT:
        gradient = 2.0 * difference
        if DIVIDE:
            gradient = gradient / tl.load(divisor).to(ACC)
        tl.store(saved + at, gradient.to(saved.dtype.element_ty), mask=present)


# The partial sums in order, over the divisor.
@triton.jit
def total(partial, divisor, loss, scale, count, BLOCK: tl.constexpr):
    number = tl.load(divisor).to(tl.float64)
    sums = tl.zeros((BLOCK,), tl.float64)
    for at in range(0, count, BLOCK):
        index = at + tl.arange(0, BLOCK).to(tl.int64)
        sums += tl.load(partial + index, mask=index < count, other=0.0)
    tl.store(loss, (tl.sum(sums, 0) / number).to(loss.dtype.element_ty))
    tl.store(scale, (1.0 / number).to(scale.dtype.element_ty))


def overhaul_loss(
    student: Tensor, teacher: Tensor, margin: Tensor, mask: Tensor | None, reduction: int, gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    n, channels, h, w = student.shape
    kind = _backend.layout(student)
    s, t = (x.contiguous(memory_format=kind) for x in (student, teacher))
    wide = student.dtype == torch.float64
    result = torch.float64 if wide else torch.float32
    loss, scale = s.new_empty((), dtype=result), s.new_empty((), dtype=result)
    saved = torch.empty_like(s, memory_format=kind) if gradient else s.new_empty((0,))
    number = {SUM: 1, BATCHMEAN: n, MEAN: s.numel()}[reduction]
    if s.numel() == 0:  # a mean of nothing, a sum of nothing
        return loss.fill_(0.0 if number else math.nan), saved, scale.fill_(1 / number if number else math.inf)
    if reduction == MEAN and mask is not None:
        divisor = mask.sum().clamp_(min=1) * channels
    else:
        divisor = torch.full((), number, dtype=torch.float64, device=s.device)
    blocks = triton.cdiv(s.numel(), CONFIGS["run"]["BLOCK"])
    partial = s.new_empty((blocks,), dtype=torch.float64)
    with torch.cuda.device_of(s):
        distance[(blocks,)](
            *(s, t, margin, s if mask is None else mask.contiguous().view(torch.uint8), divisor, saved, partial),
            *(s.numel(), channels, h * w),
            ACC=tl.float64 if wide else tl.float32,
            CHANNELS_LAST=kind == torch.channels_last,
            MASKED=mask is not None,
            GRADIENT=gradient,
            DIVIDE=s.dtype != torch.float16,  # float16 has too few small numbers: its gradient is divided at the end
            **CONFIGS["run"],
        )
        total[(1,)](partial, divisor, loss, scale, blocks, **CONFIGS["total"])
    return loss, saved, scale
