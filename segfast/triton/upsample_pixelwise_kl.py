"""Pixel-wise Kullback-Leibler divergence at image size in Triton; the two passes are those of upsample_cross_entropy."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from segfast import _backend
from segfast.triton.upsample import Axis, accumulation, between, place

CONFIGS = {
    "pixels": {"BLOCK": 128, "num_warps": 4},
    "gather": {"BLOCK_CLASSES": 4, "BLOCK_COLUMNS": 32, "num_warps": 4},
}
NONE, MEAN, SUM, BATCHMEAN = range(4)


# As `divergence` of pixelwise_kl.py, one class after the other: when the maxima grow by -shift, Z and D follow.
@triton.jit
def divergences(
    s, t, valid, s_rows, s_row_weights, s_columns, s_column_weights, t_rows, t_row_weights, t_columns, t_column_weights,
    max_s_out, sum_s_out, max_t_out, sum_t_out, loss_out, degrees_in, height, width, classes, blocks,
    s_image, s_class, s_row, s_column, t_image, t_class, t_row, t_column,
    MASKED: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    image = program // blocks
    pixel = (program - image * blocks) * BLOCK + tl.arange(0, BLOCK)
    pixels = (tl.zeros((), tl.int64) + height) * width
    inside = pixel < pixels
    to = image * pixels + pixel
    sy0, sy1, sh0, sh1 = place(s_rows, s_row_weights, pixel // width, height, inside)
    sx0, sx1, sw0, sw1 = place(s_columns, s_column_weights, pixel % width, width, inside)
    ty0, ty1, th0, th1 = place(t_rows, t_row_weights, pixel // width, height, inside)
    tx0, tx1, tw0, tw1 = place(t_columns, t_column_weights, pixel % width, width, inside)
    s_from = s + image * s_image + tl.zeros((1, BLOCK), tl.int64)
    t_from = t + image * t_image + tl.zeros((1, BLOCK), tl.int64)
    degrees = tl.load(degrees_in)
    # The lowest finite number: a class of -inf gives exp(-inf), not the exponential of NaN.
    max_s = tl.full((BLOCK,), -1.7976931348623157e308 if ACC == tl.float64 else -3.4028234663852886e38, ACC)  # noqa: SIM300
    max_t = max_s
    sum_s = tl.zeros((BLOCK,), ACC)
    sum_t = sum_s
    difference = sum_s
    for c in range(0, classes):
        s_at = s_from + (tl.zeros((), tl.int64) + c) * s_class
        t_at = t_from + (tl.zeros((), tl.int64) + c) * t_class
        a = tl.sum(between(s_at, s_row, s_column, sy0, sy1, sx0, sx1, sh0, sh1, sw0, sw1, inside[None, :], ACC), 0) / degrees
        b = tl.sum(between(t_at, t_row, t_column, ty0, ty1, tx0, tx1, th0, th1, tw0, tw1, inside[None, :], ACC), 0) / degrees
        next_s = tl.maximum(max_s, a)
        next_t = tl.maximum(max_t, b)
        shift_s = max_s - next_s
        shift_t = max_t - next_t
        alpha_t = tl.exp(shift_t)
        exp_t = tl.exp(b - next_t)
        difference = alpha_t * (difference + sum_t * (shift_t - shift_s)) + exp_t * ((b - next_t) - (a - next_s))
        sum_s = sum_s * tl.exp(shift_s) + tl.exp(a - next_s)
        sum_t = sum_t * alpha_t + exp_t
        max_s = next_s
        max_t = next_t
    keep = inside
    if MASKED:
        keep = tl.load(valid + to, mask=inside, other=0) != 0
    value = degrees * degrees * (difference / sum_t + tl.log(sum_s / sum_t))
    tl.store(loss_out + to, tl.where(keep, value, 0.0), mask=inside)
    tl.store(max_s_out + to, max_s, mask=inside)
    tl.store(sum_s_out + to, sum_s, mask=inside)
    tl.store(max_t_out + to, max_t, mask=inside)
    tl.store(sum_t_out + to, sum_t, mask=inside)


@triton.jit
def gradient(
    s, t, valid, s_rows, s_row_weights, row_ranges, s_columns, s_column_weights, column_ranges,
    t_rows, t_row_weights, t_columns, t_column_weights, max_s_in, sum_s_in, max_t_in, sum_t_in, factor_in, out, degrees_in,
    height, width, classes, blocks, size_y, size_x,
    s_image, s_class, s_row, s_column, t_image, t_class, t_row, t_column, o_image, o_class, o_row, o_column,
    MASKED: tl.constexpr, EACH: tl.constexpr, ACC: tl.constexpr, BLOCK_CLASSES: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    image = (program // (blocks * size_y)).to(tl.int64)
    i = ((program // blocks) % size_y).to(tl.int64)
    j = (program % blocks).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    c = tl.program_id(1).to(tl.int64) * BLOCK_CLASSES + tl.arange(0, BLOCK_CLASSES)
    there = j < size_x
    tile = (c < classes)[:, None] & there[None, :]
    s_from = s + image * s_image + (c * s_class)[:, None]
    t_from = t + image * t_image + (c * t_class)[:, None]
    first = tl.load(column_ranges + j, mask=there, other=0).to(tl.int64)
    last = tl.load(column_ranges + size_x + j, mask=there, other=0).to(tl.int64)
    longest = tl.max(last - first, 0)
    degrees = tl.load(degrees_in)
    sums = tl.zeros((BLOCK_CLASSES, BLOCK_COLUMNS), ACC)
    across = tl.zeros((BLOCK_COLUMNS,), tl.int64)
    along = tl.zeros((BLOCK_COLUMNS,), ACC)
    for y in range(tl.load(row_ranges + i), tl.load(row_ranges + size_y + i)):
        y0 = tl.load(s_rows + y).to(tl.int64) + across
        y1 = tl.load(s_rows + height + y).to(tl.int64) + across
        h0 = tl.load(s_row_weights + y) + along
        h1 = tl.load(s_row_weights + height + y) + along
        ty0 = tl.load(t_rows + y).to(tl.int64) + across
        ty1 = tl.load(t_rows + height + y).to(tl.int64) + across
        th0 = tl.load(t_row_weights + y) + along
        th1 = tl.load(t_row_weights + height + y) + along
        share_of_row = tl.where(y0 == i, h0, 0.0) + tl.where(y1 == i, h1, 0.0)
        for k in range(0, longest):
            column = first + k
            inside = there & (column < last)
            x0, x1, w0, w1 = place(s_columns, s_column_weights, column, width, inside)
            tx0, tx1, tw0, tw1 = place(t_columns, t_column_weights, column, width, inside)
            portion = share_of_row * (tl.where(x0 == j, w0, 0.0) + tl.where(x1 == j, w1, 0.0))
            at = (image * height + y) * width + column
            keep = inside
            if MASKED:
                keep = tl.load(valid + at, mask=inside, other=0) != 0
            masked = tile & keep[None, :]
            a = between(s_from, s_row, s_column, y0, y1, x0, x1, h0, h1, w0, w1, masked, ACC) / degrees
            b = between(t_from, t_row, t_column, ty0, ty1, tx0, tx1, th0, th1, tw0, tw1, masked, ACC) / degrees
            max_s = tl.load(max_s_in + at, mask=inside, other=0.0)
            sum_s = tl.load(sum_s_in + at, mask=inside, other=1.0)
            max_t = tl.load(max_t_in + at, mask=inside, other=0.0)
            sum_t = tl.load(sum_t_in + at, mask=inside, other=1.0)
            if EACH:
                factor = tl.load(factor_in + at, mask=inside, other=0.0)
            else:
                factor = tl.load(factor_in) + along
            g = tl.exp(a - max_s[None, :]) / sum_s[None, :] - tl.exp(b - max_t[None, :]) / sum_t[None, :]
            sums += tl.where(masked, g * (degrees * factor * portion)[None, :], 0.0)
    to = out + image * o_image + (c * o_class)[:, None] + i * o_row + (j * o_column)[None, :]
    tl.store(to, sums.to(out.dtype.element_ty), mask=tile)


class Pixels:
    """What the first kernel leaves of every pixel."""

    def __init__(self, student, teacher, valid, size, temperature, align_corners, backward):
        n, classes = student.shape[:2]
        self.student, self.teacher = student, teacher
        self.height, self.width = size
        acc = accumulation(student)
        self.kind = tl.float64 if acc == torch.float64 else tl.float32
        self.valid = None if valid is None else valid.contiguous().view(torch.uint8)
        self.degrees = torch.full((), temperature, dtype=acc, device=student.device)
        self.loss, *self.state = (student.new_empty((n, *size), dtype=acc) for _ in range(5))
        if n == 0:
            return
        with torch.cuda.device_of(student):
            self.axes = [
                Axis(student, x.shape[2 + d], size[d], align_corners, backward and x is student)
                for x in (student, teacher)
                for d in range(2)
            ]
            tables = [table for axis in self.axes for table in (axis.places, axis.weights)]
            blocks = triton.cdiv(self.height * self.width, CONFIGS["pixels"]["BLOCK"])
            divergences[(n * blocks,)](
                *(student, teacher, self.valid, *tables, *self.state, self.loss, self.degrees),
                *(self.height, self.width, classes, blocks, *student.stride(), *teacher.stride()),
                MASKED=valid is not None,
                ACC=self.kind,
                **CONFIGS["pixels"],
            )

    def gradient(self, factor: Tensor, dtype: torch.dtype) -> Tensor:
        """The student's gradient, where `factor` is that of the loss, of every pixel or of all."""
        s, t = self.student, self.teacher
        out = torch.empty_like(s, dtype=dtype, memory_format=_backend.layout(s))
        n, classes, h, w = s.shape
        if n == 0:
            return out
        config = CONFIGS["gather"]
        blocks = triton.cdiv(w, config["BLOCK_COLUMNS"])
        rows, columns, t_rows, t_columns = self.axes
        with torch.cuda.device_of(s):
            gradient[(n * h * blocks, triton.cdiv(classes, config["BLOCK_CLASSES"]))](
                *(s, t, self.valid, rows.places, rows.weights, rows.ranges, columns.places, columns.weights, columns.ranges),
                *(t_rows.places, t_rows.weights, t_columns.places, t_columns.weights, *self.state, factor, out, self.degrees),
                *(self.height, self.width, classes, blocks, h, w, *s.stride(), *t.stride(), *out.stride()),
                MASKED=self.valid is not None,
                EACH=factor.dim() > 0,
                ACC=self.kind,
                **config,
            )
        return out


def upsample_pixelwise_kl(
    student, teacher, valid, size, temperature, align_corners, reduction, gradient
) -> tuple[Tensor, Tensor]:
    backward = gradient and reduction != NONE
    pixels = Pixels(student, teacher, valid, size, temperature, align_corners, backward)
    loss, dtype = pixels.loss, pixels.loss.dtype
    saved = student.new_empty((0,), dtype=dtype)
    if reduction == NONE:
        return loss, saved
    count = {SUM: 1, BATCHMEAN: student.shape[0], MEAN: loss.numel()}[reduction]
    if loss.numel() == 0 and reduction != SUM:
        divisor = torch.full((), math.nan, dtype=torch.float64, device=student.device)
    elif reduction == MEAN and valid is not None:
        divisor = valid.sum(dtype=torch.float64).clamp(min=1)
    else:
        divisor = torch.full((), count, dtype=torch.float64, device=student.device)
    if backward:
        saved = pixels.gradient((1.0 / divisor).to(dtype), dtype)
    return (loss.sum(dtype=torch.float64) / divisor).to(dtype), saved


def upsample_pixelwise_kl_backward(grad, student, teacher, valid, size, temperature, align_corners, reduction) -> Tensor:
    pixels = Pixels(student, teacher, valid, size, temperature, align_corners, True)
    return pixels.gradient(grad.contiguous(), student.dtype)
