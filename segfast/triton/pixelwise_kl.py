"""Pixel-wise Kullback-Leibler divergence in Triton: an online softmax over strided classes, the gradient in a second sweep.

A program holds BLOCK_PIXELS pixels of one image and walks over their classes, BLOCK_CLASSES at a time. Classes one by one where
pixels are contiguous (a vector of pixels is a coalesced access), a tile of pixels x classes where classes are (channels_last).
The second sweep finds the logits in the L2 cache: DRAM sees two reads and one write of the logits, whatever their number.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from segfast import _backend

CONFIGS = {
    "planes": {"BLOCK_PIXELS": 256, "BLOCK_CLASSES": 1, "num_warps": 4},
    "channels_last_32": {"BLOCK_PIXELS": 16, "BLOCK_CLASSES": 32, "num_warps": 4},
    "channels_last_64": {"BLOCK_PIXELS": 8, "BLOCK_CLASSES": 64, "num_warps": 4},
    "planes_float64": {"BLOCK_PIXELS": 128, "BLOCK_CLASSES": 1, "num_warps": 4},
    "channels_last_float64": {"BLOCK_PIXELS": 16, "BLOCK_CLASSES": 32, "num_warps": 4},
    "total": {"BLOCK": 1024, "num_warps": 4},
}
NONE, MEAN, SUM, BATCHMEAN = range(4)


def config(channels_last: bool, classes: int, wide: bool) -> dict[str, int]:
    if not channels_last:
        return CONFIGS["planes_float64" if wide else "planes"]
    return CONFIGS["channels_last_float64" if wide else "channels_last_32" if classes <= 32 else "channels_last_64"]


@triton.jit
def scaled(pointer, inside, temperature, ACC: tl.constexpr):
    x = tl.load(pointer, mask=inside, other=float("-inf")).to(ACC)
    return tl.div_rn(x, temperature) if tl.float32 == ACC else x / temperature


# With e = exp(x - max), Z = sum e and D = sum e_t ((t - max t) - (s - max s)):  KL = D / Z_t + log(Z_s / Z_t), and the gradient
# is e_s / Z_s - e_t / Z_t. When the maxima grow by -shift, Z and D follow: D' = alpha_t (D + Z_t (shift_t - shift_s)).
@triton.jit
def divergence(
    student, teacher, valid, divisor, loss, saved, partial,
    pixels, classes, blocks, s_image, s_class, s_pixel, t_image, t_class, t_pixel, temperature,
    ACC: tl.constexpr, TEMPERATURE: tl.constexpr, MASKED: tl.constexpr, GRADIENT: tl.constexpr, REDUCED: tl.constexpr,
    DIVIDE: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_CLASSES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    image = program // blocks
    pixel = (program - image * blocks) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    present = pixel < pixels
    lane = tl.arange(0, BLOCK_CLASSES).to(tl.int64)
    degrees = temperature if TEMPERATURE == 0 else tl.full((), TEMPERATURE, ACC)
    s_from = student + image * s_image + pixel[:, None] * s_pixel
    t_from = teacher + image * t_image + pixel[:, None] * t_pixel

    # The lowest finite number: a class of -inf gives exp(-inf), not the exponential of NaN.
    max_s = tl.full((BLOCK_PIXELS,), -1.7976931348623157e308 if ACC == tl.float64 else -3.4028234663852886e38, ACC)  # noqa: SIM300
    max_t = max_s
    sum_s = tl.zeros((BLOCK_PIXELS,), ACC)
    sum_t = sum_s
    difference = sum_s
    for c in range(0, classes, BLOCK_CLASSES):
        inside = present[:, None] & ((c + lane) < classes)[None, :]
        s = scaled(s_from + (c + lane)[None, :] * s_class, inside, degrees, ACC)
        t = scaled(t_from + (c + lane)[None, :] * t_class, inside, degrees, ACC)
        next_s = tl.maximum(max_s, tl.max(s, 1))
        next_t = tl.maximum(max_t, tl.max(t, 1))
        a = s - next_s[:, None]
        b = t - next_t[:, None]
        exp_t = tl.exp(b)
        shift_s = max_s - next_s
        shift_t = max_t - next_t
        alpha_t = tl.exp(shift_t)
        difference = alpha_t * (difference + sum_t * (shift_t - shift_s))
        difference += tl.sum(tl.where(inside, exp_t * (b - a), 0.0), 1)
        sum_s = sum_s * tl.exp(shift_s) + tl.sum(tl.exp(a), 1)
        sum_t = sum_t * alpha_t + tl.sum(exp_t, 1)
        max_s = next_s
        max_t = next_t

    keep = present
    if MASKED:
        keep = tl.load(valid + image * pixels + pixel, mask=present, other=0) != 0
    value = tl.where(keep, degrees * degrees * (difference / sum_t + tl.log(sum_s / sum_t)), 0.0)
    if REDUCED:
        tl.store(partial + program, tl.sum(value, 0).to(tl.float64))
    else:
        tl.store(loss + image * pixels + pixel, value, mask=present)
    if GRADIENT:
        factor = degrees.to(ACC)
        if DIVIDE:
            factor = factor / tl.load(divisor).to(ACC)
        inverse_s = factor / sum_s
        inverse_t = factor / sum_t
        to = saved + image * s_image + pixel[:, None] * s_pixel
        for c in range(0, classes, BLOCK_CLASSES):
            inside = present[:, None] & ((c + lane) < classes)[None, :]
            s = scaled(s_from + (c + lane)[None, :] * s_class, inside, degrees, ACC)
            t = scaled(t_from + (c + lane)[None, :] * t_class, inside, degrees, ACC)
            g = tl.exp(s - max_s[:, None]) * inverse_s[:, None] - tl.exp(t - max_t[:, None]) * inverse_t[:, None]
            g = tl.where(keep[:, None], g, 0.0).to(saved.dtype.element_ty)
            tl.store(to + (c + lane)[None, :] * s_class, g, mask=inside)


# The partial sums in order, over the divisor.
@triton.jit
def total(partial, divisor, loss, scale, count, REDUCED: tl.constexpr, BLOCK: tl.constexpr):
    number = tl.load(divisor).to(tl.float64)
    tl.store(scale, (1.0 / number).to(scale.dtype.element_ty))
    if REDUCED:
        sums = tl.zeros((BLOCK,), tl.float64)
        for at in range(0, count, BLOCK):
            index = at + tl.arange(0, BLOCK).to(tl.int64)
            sums += tl.load(partial + index, mask=index < count, other=0.0)
        tl.store(loss, (tl.sum(sums, 0) / number).to(loss.dtype.element_ty))


def logits(x: Tensor) -> tuple[Tensor, bool, tuple[int, int, int]]:
    """Dense logits, whether their classes are contiguous, and the strides of images, classes and pixels."""
    _, c, h, w = x.shape
    if _backend.layout(x) == torch.channels_last:
        return x.permute(0, 2, 3, 1).contiguous(), True, (c * h * w, 1, c)
    return x.contiguous(), False, (c * h * w, h * w, 1)


def pixelwise_kl(
    student: Tensor, teacher: Tensor, valid: Tensor | None, temperature: float, reduction: int, gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    n, classes, h, w = student.shape
    pixels = h * w
    s, channels_last, s_strides = logits(student)
    t, _, t_strides = logits(teacher)
    wide = student.dtype == torch.float64
    result = torch.float64 if wide else torch.float32
    loss = s.new_empty((n, h, w) if reduction == NONE else (), dtype=result)
    scale = s.new_empty((), dtype=result)
    saved = torch.empty_like(s) if gradient else s.new_empty((0,))
    number = {NONE: 1, SUM: 1, BATCHMEAN: n, MEAN: n * pixels}[reduction]
    if n * pixels == 0:  # a mean of nothing, a sum of nothing
        value = math.nan if number == 0 else 0.0
        return loss.fill_(value), as_student(saved, gradient and channels_last), scale.fill_(1 / number if number else math.inf)
    if valid is not None:
        valid = valid.contiguous()
    if reduction == MEAN and valid is not None:
        divisor = valid.sum().clamp_(min=1)
    else:
        divisor = torch.full((), number, dtype=torch.float64, device=s.device)
    chosen = config(channels_last, classes, wide)
    blocks = triton.cdiv(pixels, chosen["BLOCK_PIXELS"])
    partial = s.new_empty((n * blocks if reduction != NONE else 0,), dtype=torch.float64)
    with torch.cuda.device_of(s):
        divergence[(n * blocks,)](
            *(s, t, s if valid is None else valid.view(torch.uint8), divisor, loss, saved, partial),
            *(pixels, classes, blocks, *s_strides, *t_strides, temperature),
            ACC=tl.float64 if wide else tl.float32,
            TEMPERATURE=temperature if wide else 0,  # an argument is a float32
            MASKED=valid is not None,
            GRADIENT=gradient,
            REDUCED=reduction != NONE,
            DIVIDE=s.dtype != torch.float16,  # float16 has too few small numbers: its gradient is divided at the end
            **chosen,
        )
        total[(1,)](partial, divisor, loss, scale, partial.numel(), REDUCED=reduction != NONE, **CONFIGS["total"])
    return loss, as_student(saved, gradient and channels_last), scale


def as_student(saved: Tensor, channels_last: bool) -> Tensor:
    return saved.permute(0, 3, 1, 2) if channels_last else saved
