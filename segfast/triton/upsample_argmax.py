"""Resize and argmax in Triton: a program holds pixels of one image and walks over the classes, whose rows the caches hold."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from segfast.triton.upsample import Axis, accumulation, between, place

CONFIG = {"BLOCK": 128, "num_warps": 4}


@triton.jit
def best_class(
    x, rows, row_weights, columns, column_weights, best_out, probability_out,
    height, width, classes, blocks, x_image, x_class, x_row, x_column,
    PROBABILITY: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    image = program // blocks
    pixel = (program - image * blocks) * BLOCK + tl.arange(0, BLOCK)
    pixels = (tl.zeros((), tl.int64) + height) * width
    inside = pixel < pixels
    y0, y1, h0, h1 = place(rows, row_weights, pixel // width, height, inside)
    x0, x1, w0, w1 = place(columns, column_weights, pixel % width, width, inside)
    corner = x + image * x_image + tl.zeros((1, BLOCK), tl.int64)
    most = tl.full((BLOCK,), float("-inf"), ACC)
    best = tl.zeros((BLOCK,), tl.int32)
    total = tl.zeros((BLOCK,), ACC)
    for c in range(0, classes):
        at = corner + (tl.zeros((), tl.int64) + c) * x_class
        v = tl.sum(between(at, x_row, x_column, y0, y1, x0, x1, h0, h1, w0, w1, inside[None, :], ACC), 0)
        better = (v > most) | ((v != v) & (most == most))
        if PROBABILITY:
            # Where nothing but -inf came before, there is no sum yet.
            before = tl.where(most > float("-inf"), total * tl.exp(most - v), 0.0)
            total = tl.where(better, before + 1.0, total + tl.where(v > float("-inf"), tl.exp(v - most), 0.0))
        best = tl.where(better, c, best)
        most = tl.where(better, v, most)
    to = image * pixels + pixel
    tl.store(best_out + to, best.to(best_out.dtype.element_ty), mask=inside)
    if PROBABILITY:
        # Without one finite maximum (all -inf, an infinity, NaN) the probability is NaN, as of a softmax.
        tl.store(probability_out + to, tl.where(tl.abs(most) < float("inf"), 1.0 / total, float("nan")), mask=inside)


def upsample_argmax(logits: Tensor, size, align_corners: bool, bytes: int, probability: bool) -> tuple[Tensor, Tensor]:
    n, classes, h, w = logits.shape
    height, width = size
    dtype = {1: torch.uint8, 4: torch.int32, 8: torch.int64}[bytes]
    acc = accumulation(logits)
    best = logits.new_empty((n, height, width), dtype=dtype)
    chance = logits.new_empty((n, height, width) if probability else (0,), dtype=acc)
    if n == 0:
        return best, chance
    blocks = triton.cdiv(height * width, CONFIG["BLOCK"])
    with torch.cuda.device_of(logits):
        rows, columns = Axis(logits, h, height, align_corners, False), Axis(logits, w, width, align_corners, False)
        best_class[(n * blocks,)](
            *(logits, rows.places, rows.weights, columns.places, columns.weights, best, chance),
            *(height, width, classes, blocks, *logits.stride()),
            PROBABILITY=probability,
            ACC=tl.float64 if acc == torch.float64 else tl.float32,
            **CONFIG,
        )
    return best, chance
