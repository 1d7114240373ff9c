"""Cross-entropy at image size in Triton: an online softmax a pixel, then each logit gathers its gradient from the pixels around.

The first kernel keeps two numbers a pixel, the maximum and the sum of exponentials. The second holds a tile of classes x logits
of one row and goes through the pixels that they have a part in, in order: no atomics, the same bits from run to run. It forms
each pixel's logits again for each of the four that it lies between; the logits are small and stay in the caches.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from segfast import _backend
from segfast.ops.pixelwise_kl import counted
from segfast.triton.upsample import Axis, accumulation, between, place

CONFIGS = {
    "pixels": {"BLOCK": 128, "num_warps": 4},
    "gather": {"BLOCK_CLASSES": 4, "BLOCK_COLUMNS": 32, "num_warps": 4},
}
NONE, MEAN, SUM = range(3)


# Prints the label at `position` (n * height * width + y * width + x) where it is none of the classes; the assert that ends the
# run cannot name it.
@triton.jit
def report(target, position, height, width, classes, ignore_index):
    at = tl.load(position)
    label = tl.load(target + at).to(tl.int64)
    if (label != ignore_index) & ((label < 0) | (label >= classes)):
        tl.device_print(
            "upsample_cross_entropy: a label outside the classes; label, n, y, x: ",
            label,
            at // width // height,
            at // width % height,
            at % width,
        )


@triton.jit
def losses(
    x, target, weight, smooth, smooth_total, rows, row_weights, columns, column_weights, most_out, sum_out, loss_out, share_out,
    probability_out, height, width, classes, blocks, ignore_index, x_image, x_class, x_row, x_column, share,
    WEIGHT: tl.constexpr, SMOOTH: tl.constexpr, PROBABILITY: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    image = program // blocks
    pixel = (program - image * blocks) * BLOCK + tl.arange(0, BLOCK)
    pixels = (tl.zeros((), tl.int64) + height) * width
    inside = pixel < pixels
    to = image * pixels + pixel
    y0, y1, h0, h1 = place(rows, row_weights, pixel // width, height, inside)
    x0, x1, w0, w1 = place(columns, column_weights, pixel % width, width, inside)
    corner = x + image * x_image + tl.zeros((1, BLOCK), tl.int64)
    label = tl.load(target + to, mask=inside, other=0).to(tl.int64)
    counts = inside & (label != ignore_index)
    label = tl.where(counts & (label >= 0) & (label < classes), label, 0)  # another one is reported, and ends the run

    # The lowest finite number: a class of -inf gives exp(-inf), not the exponential of NaN.
    most = tl.full((BLOCK,), -1.7976931348623157e308 if ACC == tl.float64 else -3.4028234663852886e38, ACC)  # noqa: SIM300
    total = tl.zeros((BLOCK,), ACC)
    spread = tl.zeros((BLOCK,), ACC)
    own = tl.zeros((BLOCK,), ACC)
    for c in range(0, classes):
        at = corner + (tl.zeros((), tl.int64) + c) * x_class
        v = tl.sum(between(at, x_row, x_column, y0, y1, x0, x1, h0, h1, w0, w1, inside[None, :], ACC), 0)
        above = tl.maximum(most, v)
        total = total * tl.exp(most - above) + tl.exp(v - above)
        if SMOOTH:
            spread += tl.load(smooth + c) * v
        own = tl.where(label == c, v, own)
        most = above
    logarithm = tl.log(total)
    part = tl.full((BLOCK,), 1.0, ACC) * tl.load(share)
    if WEIGHT:
        part *= tl.load(weight + label)
    value = part * ((most - own) + logarithm)
    if SMOOTH:
        value += (most + logarithm) * tl.load(smooth_total) - spread
    tl.store(most_out + to, most, mask=inside)
    tl.store(sum_out + to, total, mask=inside)
    tl.store(loss_out + to, tl.where(counts, value, 0.0), mask=inside)
    tl.store(share_out + to, tl.where(counts, part, 0.0), mask=inside)
    if PROBABILITY:
        p = tl.exp(own - most) / total
        tl.store(probability_out + to, tl.where(p == p, p, 0.0), mask=inside)  # what is not a number is hard


@triton.jit
def gradient(
    x, target, smooth, smooth_total, rows, row_weights, row_ranges, columns, column_weights, column_ranges, most_in, sum_in,
    share_in, factor_in, out, height, width, classes, blocks, size_y, size_x, x_image, x_class, x_row, x_column,
    o_image, o_class, o_row, o_column,
    SMOOTH: tl.constexpr, ACC: tl.constexpr, BLOCK_CLASSES: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    image = (program // (blocks * size_y)).to(tl.int64)
    i = ((program // blocks) % size_y).to(tl.int64)
    j = (program % blocks).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    c = tl.program_id(1).to(tl.int64) * BLOCK_CLASSES + tl.arange(0, BLOCK_CLASSES)
    there = j < size_x
    tile = (c < classes)[:, None] & there[None, :]
    corner = x + image * x_image + (c * x_class)[:, None]
    first = tl.load(column_ranges + j, mask=there, other=0).to(tl.int64)
    last = tl.load(column_ranges + size_x + j, mask=there, other=0).to(tl.int64)
    longest = tl.max(last - first, 0)
    sums = tl.zeros((BLOCK_CLASSES, BLOCK_COLUMNS), ACC)
    if SMOOTH:
        smoothing = tl.load(smooth + c, mask=c < classes, other=0.0)
        all_smoothing = tl.load(smooth_total)
    for y in range(tl.load(row_ranges + i), tl.load(row_ranges + size_y + i)):
        y0 = tl.load(rows + y).to(tl.int64)
        y1 = tl.load(rows + height + y).to(tl.int64)
        h0 = tl.load(row_weights + y)
        h1 = tl.load(row_weights + height + y)
        share_of_row = tl.where(y0 == i, h0, 0.0) + tl.where(y1 == i, h1, 0.0)
        across = tl.zeros((BLOCK_COLUMNS,), tl.int64)
        for k in range(0, longest):
            column = first + k
            inside = there & (column < last)
            x0, x1, w0, w1 = place(columns, column_weights, column, width, inside)
            portion = share_of_row * (tl.where(x0 == j, w0, 0.0) + tl.where(x1 == j, w1, 0.0))
            at = (image * height + y) * width + column
            v = between(
                corner, x_row, x_column, y0 + across, y1 + across, x0, x1, h0 + w0 * 0.0, h1 + w0 * 0.0, w0, w1,
                tile & inside[None, :], ACC,
            )  # fmt: skip
            most = tl.load(most_in + at, mask=inside, other=0.0)
            total = tl.load(sum_in + at, mask=inside, other=1.0)
            part = tl.load(share_in + at, mask=inside, other=0.0)
            factor = tl.load(factor_in + at, mask=inside, other=0.0)
            label = tl.load(target + at, mask=inside, other=-1).to(tl.int64)
            p = tl.exp(v - most[None, :]) / total[None, :]
            if SMOOTH:
                g = p * (part + all_smoothing)[None, :] - tl.where(label[None, :] == c[:, None], part[None, :], 0.0)
                g -= smoothing[:, None]
            else:
                g = (p - tl.where(label[None, :] == c[:, None], 1.0, 0.0)) * part[None, :]
            g *= (factor * portion)[None, :]
            sums += tl.where(tile & inside[None, :], g, 0.0)
    to = out + image * o_image + (c * o_class)[:, None] + i * o_row + (j * o_column)[None, :]
    tl.store(to, sums.to(out.dtype.element_ty), mask=tile)


class Pixels:
    """What the first kernel leaves of every pixel."""

    def __init__(self, logits, target, weight, ignore_index, smoothing, probability, align_corners, backward):
        n, classes, h, w = logits.shape
        self.logits, self.target = logits, target.contiguous()
        _, self.height, self.width = target.shape
        acc = accumulation(logits)
        self.kind = tl.float64 if acc == torch.float64 else tl.float32
        smoothing = smoothing if classes > 1 else 0.0  # between classes
        self.weight = weight if weight is None else weight.contiguous()
        self.most, self.sum, self.loss, self.share = (logits.new_empty(target.shape, dtype=acc) for _ in range(4))
        self.probability = logits.new_empty(target.shape if probability else (0,), dtype=acc)
        own = torch.full((), 1 - smoothing, dtype=acc, device=logits.device)
        self.smooth = None
        if smoothing > 0:
            ones = logits.new_ones((classes,), dtype=acc) if weight is None else weight
            self.smooth = ones * (smoothing / classes)
        self.smooth_total = own if self.smooth is None else self.smooth.sum()
        self.valid = counted(self.target, ignore_index)
        wrong = self.valid & ((self.target < 0) | (self.target >= classes))
        if self.target.numel() == 0:
            return
        first = wrong.flatten().to(torch.uint8).argmax()
        with torch.cuda.device_of(logits):
            report[(1,)](self.target, first, self.height, self.width, classes, ignore_index, num_warps=1)
        message = f"upsample_cross_entropy: want labels from 0 to {classes - 1} or {ignore_index}; the one that is not is printed"
        torch._assert_async(~wrong.take(first), message)
        with torch.cuda.device_of(logits):
            self.rows = Axis(logits, h, self.height, align_corners, backward)
            self.columns = Axis(logits, w, self.width, align_corners, backward)
            blocks = triton.cdiv(self.height * self.width, CONFIGS["pixels"]["BLOCK"])
            losses[(n * blocks,)](
                *(logits, self.target, self.weight, self.smooth, self.smooth_total),
                *(self.rows.places, self.rows.weights, self.columns.places, self.columns.weights),
                *(self.most, self.sum, self.loss, self.share, self.probability),
                *(self.height, self.width, classes, blocks, ignore_index, *logits.stride(), own),
                WEIGHT=weight is not None,
                SMOOTH=self.smooth is not None,
                PROBABILITY=probability,
                ACC=self.kind,
                **CONFIGS["pixels"],
            )

    def kept(self, threshold: float, cut: Tensor | None) -> Tensor:
        """The pixels that count."""
        if threshold <= 0:
            return self.valid
        return self.valid & ((self.probability < threshold) | (self.probability <= cut))

    def cut(self, threshold: float, min_kept: int) -> Tensor:
        """The probability of the min_kept-th hardest pixel, below which, or at which, a pixel counts in any case."""
        if threshold <= 0 or min_kept == 0 or self.loss.numel() == 0:
            return torch.full((), -1.0, dtype=self.loss.dtype, device=self.loss.device)
        ranked = torch.where(self.valid, self.probability, torch.inf).flatten()
        return ranked.kthvalue(min(min_kept, ranked.numel())).values

    def gradient(self, factor: Tensor, dtype: torch.dtype) -> Tensor:
        """The gradient of the logits, where `factor` is that of each pixel's loss, 0 where it does not count."""
        x = self.logits
        out = torch.empty_like(x, dtype=dtype, memory_format=_backend.layout(x))
        n, classes, h, w = x.shape
        if n == 0:
            return out
        config = CONFIGS["gather"]
        blocks = triton.cdiv(w, config["BLOCK_COLUMNS"])
        with torch.cuda.device_of(x):
            gradient[(n * h * blocks, triton.cdiv(classes, config["BLOCK_CLASSES"]))](
                *(x, self.target, self.smooth, self.smooth_total, self.rows.places, self.rows.weights, self.rows.ranges),
                *(self.columns.places, self.columns.weights, self.columns.ranges, self.most, self.sum, self.share),
                *(factor.contiguous(), out, self.height, self.width, classes, blocks, h, w, *x.stride(), *out.stride()),
                SMOOTH=self.smooth is not None,
                ACC=self.kind,
                **config,
            )
        return out


def upsample_cross_entropy(
    logits, target, weight, ignore_index, smoothing, threshold, min_kept, align_corners, reduction, gradient
) -> tuple[Tensor, Tensor, Tensor]:
    backward = gradient and reduction != NONE
    pixels = Pixels(logits, target, weight, ignore_index, smoothing, threshold > 0, align_corners, backward)
    dtype = pixels.loss.dtype
    cut = pixels.cut(threshold, min_kept)
    kept = pixels.kept(threshold, cut)
    loss = pixels.loss if threshold <= 0 else torch.where(kept, pixels.loss, 0.0)
    saved = logits.new_empty((0,), dtype=dtype)
    if reduction == NONE:
        return loss, saved, cut
    divisor = 1.0
    if reduction == MEAN:
        share = kept if weight is None else torch.where(kept, weight[torch.where(pixels.valid, pixels.target, 0).long()], 0.0)
        divisor = torch.where(kept.any(), share.sum(dtype=torch.float64), 1.0)
    if backward:
        saved = pixels.gradient((kept / divisor).to(dtype), dtype)
    return (loss.sum(dtype=torch.float64) / divisor).to(dtype), saved, cut


def upsample_cross_entropy_backward(
    grad, logits, target, weight, cut, ignore_index, smoothing, threshold, min_kept, align_corners, reduction
) -> Tensor:
    pixels = Pixels(logits, target, weight, ignore_index, smoothing, threshold > 0, align_corners, True)
    return pixels.gradient(torch.where(pixels.kept(threshold, cut), grad, 0.0), logits.dtype)
