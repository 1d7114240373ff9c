"""What the heads at image size share in Triton: where an output lies between inputs, and which outputs an input has a part in."""

import torch
import triton
import triton.language as tl
from torch import Tensor

CONFIG = {"BLOCK": 256, "num_warps": 4}


@triton.jit
def quotient(a, b, ACC: tl.constexpr):
    if ACC.primitive_bitwidth == 32:
        return tl.div_rn(a, b)  # Triton's own division of float32 is not rounded to the nearest
    return a / b


# places[0], [1]: the inputs i0 and i1 of output i; weights[0], [1]: their shares. In ACC, with one rounding of the multiply-add,
# as ATen's kernels come out of nvcc: what lies at a place exactly, and so which infinities meet a share of 0, is then the same.
@triton.jit
def positions(places, weights, size_in, size_out, ALIGN: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size_out
    from_ = tl.zeros((BLOCK,), ACC) + size_in
    to = tl.zeros((BLOCK,), ACC) + size_out
    if ALIGN:
        at = i.to(ACC) * quotient(from_ - 1, tl.maximum(to - 1, 1.0), ACC)
    else:
        at = tl.maximum(tl.fma(i.to(ACC) + 0.5, quotient(from_, to, ACC), tl.full((BLOCK,), -0.5, ACC)), 0.0)
    i0 = tl.minimum(at.to(tl.int64), size_in - 1)
    i1 = tl.where(from_ == to, i0, tl.minimum(i0 + 1, size_in - 1))
    w1 = tl.minimum(tl.maximum(at - i0.to(ACC), 0.0), 1.0)
    tl.store(places + i, i0.to(tl.int32), mask=inside)
    tl.store(places + size_out + i, i1.to(tl.int32), mask=inside)
    tl.store(weights + i, (1.0 - w1).to(ACC), mask=inside)
    tl.store(weights + size_out + i, w1.to(ACC), mask=inside)


# ranges[0], [1]: the first output that input j has a part in, and the first after those. Both by bisection: places grow.
@triton.jit
def parts(places, ranges, size_in, size_out, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    j = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = j < size_in
    for which in tl.static_range(2):
        low = tl.zeros((BLOCK,), tl.int64)
        high = low + size_out
        for _ in tl.static_range(STEPS):
            middle = (low + high) // 2
            searching = inside & (low < high)
            place = tl.load(places + (1 - which) * size_out + middle, mask=searching, other=0).to(tl.int64)
            before = (place < j + which) & searching
            low = tl.where(before, middle + 1, low)
            high = tl.where(before | (low >= high), high, middle)
        tl.store(ranges + which * size_in + j, low.to(tl.int32), mask=inside)


# Rows of classes, columns of pixels: the logits between the four places of each pixel.
@triton.jit
def between(corner, x_row, x_column, y0, y1, x0, x1, h0, h1, w0, w1, inside, ACC: tl.constexpr):
    top = corner + (y0 * x_row)[None, :]
    bottom = corner + (y1 * x_row)[None, :]
    left = (x0 * x_column)[None, :]
    right = (x1 * x_column)[None, :]
    a = tl.load(top + left, mask=inside, other=0.0).to(ACC)
    b = tl.load(top + right, mask=inside, other=0.0).to(ACC)
    c = tl.load(bottom + left, mask=inside, other=0.0).to(ACC)
    d = tl.load(bottom + right, mask=inside, other=0.0).to(ACC)
    return (a * w0[None, :] + b * w1[None, :]) * h0[None, :] + (c * w0[None, :] + d * w1[None, :]) * h1[None, :]


# The places and shares of outputs i along one axis.
@triton.jit
def place(places, weights, i, size_out, inside):
    i0 = tl.load(places + i, mask=inside, other=0).to(tl.int64)
    i1 = tl.load(places + size_out + i, mask=inside, other=0).to(tl.int64)
    w0 = tl.load(weights + i, mask=inside, other=0.0)
    w1 = tl.load(weights + size_out + i, mask=inside, other=0.0)
    return i0, i1, w0, w1


class Axis:
    """The tables of one axis, on the device: (2, out) places and weights, and (2, in) ranges where a gradient goes back."""

    def __init__(self, x: Tensor, size_in: int, size_out: int, align_corners: bool, backward: bool):
        acc = accumulation(x)
        self.places = x.new_empty((2, size_out), dtype=torch.int32)
        self.weights = x.new_empty((2, size_out), dtype=acc)
        self.ranges = x.new_empty((2, size_in) if backward else (0,), dtype=torch.int32)
        kind = tl.float64 if acc == torch.float64 else tl.float32
        grid = (triton.cdiv(size_out, CONFIG["BLOCK"]),)
        positions[grid](self.places, self.weights, size_in, size_out, ALIGN=align_corners, ACC=kind, **CONFIG)
        if backward:
            grid = (triton.cdiv(size_in, CONFIG["BLOCK"]),)
            parts[grid](self.places, self.ranges, size_in, size_out, STEPS=size_out.bit_length(), **CONFIG)


def accumulation(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
