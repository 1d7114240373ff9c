"""Depthwise-separable convolution in Triton, channels_last: a pixel is a row, a product is rows x channels.

Output pixels are numbered through images, rows and columns. Inference in one kernel: a program makes the depthwise result of
BLOCK_PIXELS x BLOCK_CHANNELS in registers, multiplies it into BLOCK_PIXELS x BLOCK_OUT and stores that once; where C_out needs
more than one such tile, each makes the depthwise result again. Training keeps u (depthwise) and z (pointwise) and recomputes the
rest: BatchNorm and activation are the prologue of each product, the statistics its epilogue. Sums run in two stages: a program
adds STEPS tiles, a second kernel adds the programs' sums in order, in float64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from segfast import _backend

# The depthwise half in CUDA C++, for contiguous x: its tile with the halo lies in shared memory.
HAS_DEPTHWISE = _backend.has_compiled("depthwise") and _backend.has_compiled("depthwise_train")

# Tiles by what a product multiplies. BLOCK_OUT shrinks to C_out.
CONFIGS = {
    "ieee": {"BLOCK_PIXELS": 32, "BLOCK_CHANNELS": 16, "BLOCK_OUT": 32, "num_warps": 4, "num_stages": 1},
    "tf32": {"BLOCK_PIXELS": 64, "BLOCK_CHANNELS": 32, "BLOCK_OUT": 64, "num_warps": 4, "num_stages": 2},
    torch.float16: {"BLOCK_PIXELS": 64, "BLOCK_CHANNELS": 32, "BLOCK_OUT": 128, "num_warps": 4, "num_stages": 2},
    torch.bfloat16: {"BLOCK_PIXELS": 64, "BLOCK_CHANNELS": 32, "BLOCK_OUT": 128, "num_warps": 4, "num_stages": 2},
    torch.float64: {"BLOCK_PIXELS": 16, "BLOCK_CHANNELS": 16, "BLOCK_OUT": 16, "num_warps": 2, "num_stages": 1},
}
# Those of the backward's products where C_out, up to BLOCK_OUT, is one tile: one kernel makes both, with the partial gradient of
# the weight in registers, so that a tile has fewer pixels.
BOTH = {
    "ieee": {"BLOCK_PIXELS": 32, "BLOCK_CHANNELS": 16, "BLOCK_OUT": 128, "num_warps": 8, "num_stages": 1},
    "tf32": {"BLOCK_PIXELS": 32, "BLOCK_CHANNELS": 32, "BLOCK_OUT": 128, "num_warps": 8, "num_stages": 1},
    torch.float16: {"BLOCK_PIXELS": 32, "BLOCK_CHANNELS": 32, "BLOCK_OUT": 128, "num_warps": 8, "num_stages": 1},
    torch.bfloat16: {"BLOCK_PIXELS": 32, "BLOCK_CHANNELS": 32, "BLOCK_OUT": 128, "num_warps": 8, "num_stages": 1},
    torch.float64: {"BLOCK_PIXELS": 16, "BLOCK_CHANNELS": 16, "BLOCK_OUT": 16, "num_warps": 2, "num_stages": 1},
}
ELEMENTWISE = {"BLOCK_PIXELS": 32, "BLOCK_CHANNELS": 32, "num_warps": 4}
COMBINE = {"BLOCK_PARTS": 64, "BLOCK_CHANNELS": 16, "num_warps": 4}
PARTS = 512  # programs, at most, that leave partial sums of a channel
TAP_PARTS = 128  # the same where a partial sum is a depthwise weight
WEIGHT_PARTS = 64  # and where it is a pointwise one, at least where there is enough to do


# 1: relu, 2: relu6, 3: silu, 4: hardswish, as in ACTIVATIONS of segfast/ops/ds_conv.py
@triton.jit
def activate(v, ACT: tl.constexpr):
    if ACT == 1:
        v = tl.where(v < 0, 0.0, v)
    elif ACT == 2:
        v = tl.where(v < 0, 0.0, tl.where(v > 6, 6.0, v))
    elif ACT == 3:
        v = v / (tl.exp(-v) + 1)
    elif ACT == 4:
        r = v + 3
        v = v * tl.where(r < 0, 0.0, tl.where(r > 6, 6.0, r)) / 6
    return v


# The gradient of the activation at v, times g.
@triton.jit
def activate_gradient(v, g, ACT: tl.constexpr):
    if ACT == 1:
        g = tl.where(v <= 0, 0.0, g)
    elif ACT == 2:
        g = tl.where((v <= 0) | (v >= 6), 0.0, g)
    elif ACT == 3:
        s = 1 / (tl.exp(-v) + 1)
        g = g * s * (1 + v * (1 - s))
    elif ACT == 4:
        g = tl.where(v < -3, 0.0, tl.where(v <= 3, g * (v / 3 + 0.5), g))
    return g


@triton.jit
def optional(pointer, index, inside, missing: tl.constexpr, ACC: tl.constexpr):
    if pointer is None:
        return tl.full(index.shape, missing, ACC)
    else:
        return tl.load(pointer + index, mask=inside, other=missing).to(ACC)


# BatchNorm as v = scale * u + shift. `mean` None: there is none.
@triton.jit
def fold(mean, var, gamma, beta, index, inside, EPS: tl.constexpr, ACC: tl.constexpr):
    if var is None:
        scale = optional(gamma, index, inside, 1.0, ACC)
    else:
        inverse = 1 / tl.sqrt(optional(var, index, inside, 1.0, ACC) + tl.full((), EPS, ACC))
        scale = optional(gamma, index, inside, 1.0, ACC) * inverse
    shift = optional(beta, index, inside, 0.0, ACC) - optional(mean, index, inside, 0.0, ACC) * scale
    return scale, shift


# The depthwise sums of pixels (image, oy, ox) and `channel`: sum over taps of x[image, oy * SH - PH + ky * DH, ...] * w[c, tap].
@triton.jit
def depthwise_tile(
    x, weight, image, oy, ox, present, channel, inside, h, w, c,
    ACC: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr,
    PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
):  # fmt: skip
    acc = tl.zeros((image.shape[0], channel.shape[0]), ACC)
    for tap in range(KH * KW):  # a loop, not unrolled: nine taps of addresses at once would not fit the registers
        iy = oy * SH - PH + (tap // KW) * DH
        ix = ox * SW - PW + (tap % KW) * DW
        there = present & (iy >= 0) & (iy < h) & (ix >= 0) & (ix < w)
        at = ((image * h + iy) * w + ix) * c
        value = tl.load(x + at[:, None] + channel[None, :], mask=there[:, None] & inside[None, :], other=0.0).to(ACC)
        acc += value * tl.load(weight + channel * (KH * KW) + tap, mask=inside, other=0.0).to(ACC)[None, :]
    return acc


@triton.jit
def place(pixel, oh, ow):
    row = pixel // ow
    image = row // oh
    return image, row - image * oh, pixel - row * ow


# y[pixel, k] = act(scale2 * (sum_c act(scale1 * u[pixel, c] + shift1) * pw[k, c] + pw_bias) + shift2)
@triton.jit
def inference(
    x, y, dw_weight, dw_bias, dw_mean, dw_var, dw_gamma, dw_beta, pw_weight, pw_bias, pw_mean, pw_var, pw_gamma, pw_beta,
    pixels, h, w, c, k, oh, ow, out_tiles,
    DW_EPS: tl.constexpr, PW_EPS: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr, DW_ACT: tl.constexpr, ACT: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, DEPTHWISE: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)  # the tiles of one pixel block follow each other: they share x in the L2 cache
    block = program // out_tiles
    pixel = block * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    present = pixel < pixels
    image, oy, ox = place(pixel, oh, ow)
    out = (program - block * out_tiles) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    kept = out < k
    acc = tl.zeros((BLOCK_PIXELS, BLOCK_OUT), ACC)
    for first in range(0, c, BLOCK_CHANNELS):
        channel = first + tl.arange(0, BLOCK_CHANNELS).to(tl.int64)
        inside = channel < c
        if DEPTHWISE:
            v = depthwise_tile(
                x, dw_weight, image, oy, ox, present, channel, inside, h, w, c, ACC, KH, KW, SH, SW, PH, PW, DH, DW
            )
            scale, shift = fold(dw_mean, dw_var, dw_gamma, dw_beta, channel, inside, DW_EPS, ACC)
            shift += optional(dw_bias, channel, inside, 0.0, ACC) * scale
            v = activate(v * scale[None, :] + shift[None, :], DW_ACT)
            v = tl.where(inside[None, :], v, 0.0)
        else:
            v = tl.load(x + pixel[:, None] * c + channel[None, :], mask=present[:, None] & inside[None, :], other=0.0).to(ACC)
        matrix = tl.load(pw_weight + out[None, :] * c + channel[:, None], mask=kept[None, :] & inside[:, None], other=0.0)
        acc = tl.dot(v.to(DOT), matrix.to(DOT), acc, input_precision=PRECISION, out_dtype=ACC)
    scale, shift = fold(pw_mean, pw_var, pw_gamma, pw_beta, out, kept, PW_EPS, ACC)
    shift += optional(pw_bias, out, kept, 0.0, ACC) * scale
    result = activate(acc * scale[None, :] + shift[None, :], ACT)
    to = y + pixel[:, None] * k + out[None, :]
    tl.store(to, result.to(y.dtype.element_ty), mask=present[:, None] & kept[None, :])


# u = depthwise(x) + bias, through BatchNorm and activation where NORMALISE; the moments of STEPS tiles where STATISTICS:
# means[program, c] and squares[program, c], the sum of squares about that mean.
@triton.jit
def depthwise(
    x, u, weight, bias, mean, var, gamma, beta, means, squares, pixels, h, w, c, oh, ow, steps,
    EPS: tl.constexpr, ACT: tl.constexpr, NORMALISE: tl.constexpr, STATISTICS: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, ACC: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1).to(tl.int64) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    inside = channel < c
    moment = tl.zeros((BLOCK_CHANNELS,), ACC)
    square = moment
    before = tl.full((), 0.0, ACC)
    for step in range(steps):
        start = (program * steps + step) * BLOCK_PIXELS
        pixel = start + tl.arange(0, BLOCK_PIXELS)
        present = pixel < pixels
        image, oy, ox = place(pixel, oh, ow)
        v = depthwise_tile(x, weight, image, oy, ox, present, channel, inside, h, w, c, ACC, KH, KW, SH, SW, PH, PW, DH, DW)
        v += optional(bias, channel, inside, 0.0, ACC)[None, :]
        if NORMALISE:
            scale, shift = fold(mean, var, gamma, beta, channel, inside, EPS, ACC)
            v = activate(v * scale[None, :] + shift[None, :], ACT)
        stored = v.to(u.dtype.element_ty)
        tl.store(u + pixel[:, None] * c + channel[None, :], stored, mask=present[:, None] & inside[None, :])
        if STATISTICS:
            moment, square, before = add_moments(
                stored.to(ACC), present, pixels - start, moment, square, before, ACC, BLOCK_PIXELS
            )
    if STATISTICS:
        tl.store(means + program * c + channel, moment, mask=inside)
        tl.store(squares + program * c + channel, square, mask=inside)


# Moments of a tile, `left` of whose rows are there, joined to those of the `before` rows before it.
@triton.jit
def add_moments(v, present, left, mean, square, before, ACC: tl.constexpr, BLOCK_PIXELS: tl.constexpr):
    number = tl.maximum(tl.minimum(left, BLOCK_PIXELS), 0).to(ACC)
    here = tl.sum(tl.where(present[:, None], v, 0.0), 0) / tl.maximum(number, 1)
    centred = tl.where(present[:, None], v - here[None, :], 0.0)
    delta = here - mean
    after = before + number
    share = number / tl.maximum(after, 1)
    square += tl.sum(centred * centred, 0) + delta * delta * (before * share)
    return mean + delta * share, square, after


# z = act(bn(u)) @ pw' + bias, and its moments.
@triton.jit
def pointwise(
    u, z, dw_mean, dw_var, dw_gamma, dw_beta, weight, bias, means, squares, pixels, c, k, steps,
    DW_EPS: tl.constexpr, DW_ACT: tl.constexpr, STATISTICS: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    out = tl.program_id(1).to(tl.int64) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    kept = out < k
    moment = tl.zeros((BLOCK_OUT,), ACC)
    square = moment
    before = tl.full((), 0.0, ACC)
    for step in range(steps):
        start = (program * steps + step) * BLOCK_PIXELS
        pixel = start + tl.arange(0, BLOCK_PIXELS)
        present = pixel < pixels
        acc = tl.zeros((BLOCK_PIXELS, BLOCK_OUT), ACC)
        for first in range(0, c, BLOCK_CHANNELS):
            channel = first + tl.arange(0, BLOCK_CHANNELS).to(tl.int64)
            inside = channel < c
            scale, shift = fold(dw_mean, dw_var, dw_gamma, dw_beta, channel, inside, DW_EPS, ACC)
            v = tl.load(u + pixel[:, None] * c + channel[None, :], mask=present[:, None] & inside[None, :], other=0.0)
            v = activate(v.to(ACC) * scale[None, :] + shift[None, :], DW_ACT)
            v = tl.where(inside[None, :], v, 0.0)
            matrix = tl.load(weight + out[None, :] * c + channel[:, None], mask=kept[None, :] & inside[:, None], other=0.0)
            acc = tl.dot(v.to(DOT), matrix.to(DOT), acc, input_precision=PRECISION, out_dtype=ACC)
        stored = (acc + optional(bias, out, kept, 0.0, ACC)[None, :]).to(z.dtype.element_ty)
        tl.store(z + pixel[:, None] * k + out[None, :], stored, mask=present[:, None] & kept[None, :])
        if STATISTICS:
            moment, square, before = add_moments(
                stored.to(ACC), present, pixels - start, moment, square, before, ACC, BLOCK_PIXELS
            )
    if STATISTICS:
        tl.store(means + program * k + out, moment, mask=kept)
        tl.store(squares + program * k + out, square, mask=kept)


# Mean and variance of all pixels from those of `parts` programs of `size` pixels, the last one shorter.
@triton.jit
def combine_moments(means, squares, mean, var, pixels, size, parts, c, BLOCK_PARTS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    channel = tl.program_id(0).to(tl.int64) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    inside = channel < c
    sums = tl.zeros((BLOCK_PARTS, BLOCK_CHANNELS), tl.float64)
    for first in range(0, parts, BLOCK_PARTS):
        part = first + tl.arange(0, BLOCK_PARTS).to(tl.int64)
        there = (part < parts)[:, None] & inside[None, :]
        number = tl.maximum(tl.minimum(pixels - part * size, size), 0).to(tl.float64)
        sums += tl.load(means + part[:, None] * c + channel[None, :], mask=there, other=0.0).to(tl.float64) * number[:, None]
    centre = tl.sum(sums, 0) / tl.cast(pixels, tl.float64)
    sums = tl.zeros((BLOCK_PARTS, BLOCK_CHANNELS), tl.float64)
    for first in range(0, parts, BLOCK_PARTS):
        part = first + tl.arange(0, BLOCK_PARTS).to(tl.int64)
        there = (part < parts)[:, None] & inside[None, :]
        number = tl.maximum(tl.minimum(pixels - part * size, size), 0).to(tl.float64)
        delta = tl.load(means + part[:, None] * c + channel[None, :], mask=there, other=0.0).to(tl.float64) - centre[None, :]
        within = tl.load(squares + part[:, None] * c + channel[None, :], mask=there, other=0.0).to(tl.float64)
        sums += tl.where(there, within + delta * delta * number[:, None], 0.0)
    tl.store(mean + channel, centre.to(mean.dtype.element_ty), mask=inside)
    tl.store(var + channel, (tl.sum(sums, 0) / tl.cast(pixels, tl.float64)).to(var.dtype.element_ty), mask=inside)


# y = act(bn(z)), of images of `area` pixels in any dense order.
@triton.jit
def normalise(
    z, y, mean, var, gamma, beta, pixels, k, area, image_stride, pixel_stride, channel_stride,
    EPS: tl.constexpr, ACT: tl.constexpr, ACC: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    pixel = tl.program_id(0).to(tl.int64) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    channel = tl.program_id(1).to(tl.int64) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    inside = channel < k
    there = (pixel < pixels)[:, None] & inside[None, :]
    image = pixel // area
    at = (image * image_stride + (pixel - image * area) * pixel_stride)[:, None] + (channel * channel_stride)[None, :]
    scale, shift = fold(mean, var, gamma, beta, channel, inside, EPS, ACC)
    v = activate(tl.load(z + at, mask=there, other=0.0).to(ACC) * scale[None, :] + shift[None, :], ACT)
    tl.store(y + at, v.to(y.dtype.element_ty), mask=there)


# bn(u + bias) as scale * u + shift, for the depthwise kernel in C++.
@triton.jit
def affine(bias, mean, var, gamma, beta, scales, shifts, c, EPS: tl.constexpr, ACC: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    channel = tl.program_id(0).to(tl.int64) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    inside = channel < c
    scale, shift = fold(mean, var, gamma, beta, channel, inside, EPS, ACC)
    shift += optional(bias, channel, inside, 0.0, ACC) * scale
    tl.store(scales + channel, scale, mask=inside)
    tl.store(shifts + channel, shift, mask=inside)


# Per channel, sum g and sum g * (z - mean) of STEPS tiles, where g = grad * act'(bn(z)).
@triton.jit
def gradient_sums(
    grad, z, mean, var, gamma, beta, sums, products, pixels, k, steps, EPS: tl.constexpr, ACT: tl.constexpr,
    ACC: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1).to(tl.int64) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    inside = channel < k
    scale, shift = fold(mean, var, gamma, beta, channel, inside, EPS, ACC)
    middle = optional(mean, channel, inside, 0.0, ACC)
    total = tl.zeros((BLOCK_CHANNELS,), ACC)
    product = total
    for step in range(steps):
        pixel = (program * steps + step) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
        there = (pixel < pixels)[:, None] & inside[None, :]
        at = pixel[:, None] * k + channel[None, :]
        value = tl.load(z + at, mask=there, other=0.0).to(ACC)
        g = tl.load(grad + at, mask=there, other=0.0).to(ACC)
        g = activate_gradient(value * scale[None, :] + shift[None, :], g, ACT)
        total += tl.sum(g, 0)
        product += tl.sum(tl.where(there, g * (value - middle[None, :]), 0.0), 0)
    tl.store(sums + program * k + channel, total, mask=inside)
    tl.store(products + program * k + channel, product, mask=inside)


# From the programs' sums: the gradients of beta, gamma and the convolution's bias, and what BatchNorm's backward subtracts:
# grad_z = scale * (g - center - slope * (z - mean)).
@triton.jit
def combine_gradients(
    sums, products, var, gamma, grad_beta, grad_gamma, grad_bias, center, slope, pixels, parts, c,
    EPS: tl.constexpr, BATCH: tl.constexpr, BLOCK_PARTS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0).to(tl.int64) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    inside = channel < c
    total = tl.zeros((BLOCK_PARTS, BLOCK_CHANNELS), tl.float64)
    product = total
    for first in range(0, parts, BLOCK_PARTS):
        part = first + tl.arange(0, BLOCK_PARTS).to(tl.int64)
        there = (part < parts)[:, None] & inside[None, :]
        at = part[:, None] * c + channel[None, :]
        total += tl.load(sums + at, mask=there, other=0.0).to(tl.float64)
        product += tl.load(products + at, mask=there, other=0.0).to(tl.float64)
    beta = tl.sum(total, 0)
    along = tl.sum(product, 0)
    inverse = 1 / tl.sqrt(optional(var, channel, inside, 1.0, tl.float64) + tl.full((), EPS, tl.float64))
    tl.store(grad_beta + channel, beta.to(grad_beta.dtype.element_ty), mask=inside)
    tl.store(grad_gamma + channel, (along * inverse).to(grad_gamma.dtype.element_ty), mask=inside)
    if BATCH:
        number = tl.cast(pixels, tl.float64)
        bias = tl.zeros((BLOCK_CHANNELS,), tl.float64)
        tl.store(center + channel, (beta / number).to(center.dtype.element_ty), mask=inside)
        tl.store(slope + channel, (along * inverse * inverse / number).to(slope.dtype.element_ty), mask=inside)
    else:
        bias = beta * optional(gamma, channel, inside, 1.0, tl.float64) * inverse
    tl.store(grad_bias + channel, bias.to(grad_bias.dtype.element_ty), mask=inside)


# grad_z of a tile, recomputed from the incoming gradient and z wherever it is wanted.
@triton.jit
def gradient_tile(
    grad, z, mean, var, gamma, beta, center, slope, pixel, present, out, kept, k,
    EPS: tl.constexpr, ACT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    scale, shift = fold(mean, var, gamma, beta, out, kept, EPS, ACC)
    there = present[:, None] & kept[None, :]
    at = pixel[:, None] * k + out[None, :]
    value = tl.load(z + at, mask=there, other=0.0).to(ACC)
    g = activate_gradient(value * scale[None, :] + shift[None, :], tl.load(grad + at, mask=there, other=0.0).to(ACC), ACT)
    if center is not None:
        middle = optional(mean, out, kept, 0.0, ACC)
        g -= optional(center, out, kept, 0.0, ACC)[None, :]
        g -= optional(slope, out, kept, 0.0, ACC)[None, :] * (value - middle[None, :])
    return tl.where(there, g * scale[None, :], 0.0)


# g1 = (grad_z @ pw) * act'(bn(u)), and its sums as in gradient_sums. WEIGHT, where C_out is one tile: and the weight's gradient,
# as pointwise_weight_gradient has it, from the grad_z and u that are there.
@triton.jit
def pointwise_backward(
    grad, z, pw_mean, pw_var, pw_gamma, pw_beta, pw_center, pw_slope, weight,
    u, grad_u, dw_mean, dw_var, dw_gamma, dw_beta, sums, products, partial, pixels, c, k, steps,
    DW_EPS: tl.constexpr, PW_EPS: tl.constexpr, DW_ACT: tl.constexpr, ACT: tl.constexpr, WEIGHT: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0).to(tl.int64) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    program = tl.program_id(1).to(tl.int64)  # the tiles of channels follow each other: they share grad and z in the L2 cache
    inside = channel < c
    scale, shift = fold(dw_mean, dw_var, dw_gamma, dw_beta, channel, inside, DW_EPS, ACC)
    middle = optional(dw_mean, channel, inside, 0.0, ACC)
    total = tl.zeros((BLOCK_CHANNELS,), ACC)
    product = total
    grad_weight = tl.zeros((BLOCK_OUT, BLOCK_CHANNELS), ACC)
    for step in range(steps):
        pixel = (program * steps + step) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
        present = pixel < pixels
        there = present[:, None] & inside[None, :]
        at = pixel[:, None] * c + channel[None, :]
        value = tl.load(u + at, mask=there, other=0.0).to(ACC)
        v = value * scale[None, :] + shift[None, :]
        acc = tl.zeros((BLOCK_PIXELS, BLOCK_CHANNELS), ACC)
        for first in range(0, k, BLOCK_OUT):
            out = first + tl.arange(0, BLOCK_OUT).to(tl.int64)
            kept = out < k
            g = gradient_tile(
                grad, z, pw_mean, pw_var, pw_gamma, pw_beta, pw_center, pw_slope, pixel, present, out, kept, k, PW_EPS, ACT, ACC
            ).to(DOT)
            matrix = tl.load(weight + out[:, None] * c + channel[None, :], mask=kept[:, None] & inside[None, :], other=0.0)
            acc = tl.dot(g, matrix.to(DOT), acc, input_precision=PRECISION, out_dtype=ACC)
            if WEIGHT:
                normal = tl.where(there, activate(v, DW_ACT), 0.0).to(DOT)
                grad_weight = tl.dot(tl.trans(g), normal, grad_weight, input_precision=PRECISION, out_dtype=ACC)
        g1 = activate_gradient(v, acc, DW_ACT)
        tl.store(grad_u + at, g1.to(grad_u.dtype.element_ty), mask=there)
        total += tl.sum(tl.where(there, g1, 0.0), 0)
        product += tl.sum(tl.where(there, g1 * (value - middle[None, :]), 0.0), 0)
    tl.store(sums + program * c + channel, total, mask=inside)
    tl.store(products + program * c + channel, product, mask=inside)
    if WEIGHT:
        out = tl.arange(0, BLOCK_OUT).to(tl.int64)
        to = partial + (program * k + out[:, None]) * c + channel[None, :]
        tl.store(to, grad_weight, mask=(out < k)[:, None] & inside[None, :])


# partial[program, k, c] = sum over the program's pixels of grad_z[pixel, k] * act(bn(u))[pixel, c]
@triton.jit
def pointwise_weight_gradient(
    grad, z, pw_mean, pw_var, pw_gamma, pw_beta, pw_center, pw_slope, u, dw_mean, dw_var, dw_gamma, dw_beta, partial,
    pixels, c, k, steps,
    DW_EPS: tl.constexpr, PW_EPS: tl.constexpr, DW_ACT: tl.constexpr, ACT: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    out = tl.program_id(0).to(tl.int64) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    channel = tl.program_id(1).to(tl.int64) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    program = tl.program_id(2).to(tl.int64)
    kept = out < k
    inside = channel < c
    scale, shift = fold(dw_mean, dw_var, dw_gamma, dw_beta, channel, inside, DW_EPS, ACC)
    acc = tl.zeros((BLOCK_OUT, BLOCK_CHANNELS), ACC)
    for step in range(steps):
        pixel = (program * steps + step) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
        present = pixel < pixels
        g = gradient_tile(
            grad, z, pw_mean, pw_var, pw_gamma, pw_beta, pw_center, pw_slope, pixel, present, out, kept, k, PW_EPS, ACT, ACC
        )
        there = present[:, None] & inside[None, :]
        v = tl.load(u + pixel[:, None] * c + channel[None, :], mask=there, other=0.0).to(ACC)
        v = tl.where(there, activate(v * scale[None, :] + shift[None, :], DW_ACT), 0.0)
        acc = tl.dot(tl.trans(g.to(DOT)), v.to(DOT), acc, input_precision=PRECISION, out_dtype=ACC)
    to = partial + (program * k + out[:, None]) * c + channel[None, :]
    tl.store(to, acc, mask=kept[:, None] & inside[None, :])


# Over the input's pixels, each of which gathers grad_u of the output pixels that saw it, (iy + PH - ky * DH) / SH where that is
# whole: grad_x = sum over taps of grad_u * w[c, tap], and partial[program, c, tap] = sum over the program's pixels of grad_u * x.
# grad_u = scale * (g1 - center - slope * (u - mean)) is made where it is wanted and never stored.
@triton.jit
def depthwise_backward(
    x, u, g1, weight, mean, var, gamma, center, slope, grad_x, partial, pixels, h, w, c, oh, ow, steps,
    EPS: tl.constexpr, INPUT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr, ACC: tl.constexpr, TAPS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1).to(tl.int64) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    inside = channel < c
    scale, _ = fold(mean, var, gamma, None, channel, inside, EPS, ACC)
    middle = optional(mean, channel, inside, 0.0, ACC)
    lane = tl.arange(0, TAPS)
    sums = tl.zeros((TAPS, BLOCK_CHANNELS), ACC)
    for step in range(steps):
        pixel = (program * steps + step) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
        present = pixel < pixels
        image, iy, ix = place(pixel, h, w)
        at = pixel[:, None] * c + channel[None, :]
        there = present[:, None] & inside[None, :]
        seen = tl.load(x + at, mask=there, other=0.0).to(ACC)
        acc = tl.zeros((BLOCK_PIXELS, BLOCK_CHANNELS), ACC)
        for tap in range(KH * KW):
            up = iy + PH - (tap // KW) * DH
            along = ix + PW - (tap % KW) * DW
            oy = up // SH
            ox = along // SW
            within = present & (up >= 0) & (along >= 0) & (up % SH == 0) & (along % SW == 0) & (oy < oh) & (ox < ow)
            valid = within[:, None] & inside[None, :]
            source = (((image * oh + oy) * ow + ox) * c)[:, None] + channel[None, :]
            g = tl.load(g1 + source, mask=valid, other=0.0).to(ACC)
            if center is not None:
                value = tl.load(u + source, mask=valid, other=0.0).to(ACC) - middle[None, :]
                g -= optional(center, channel, inside, 0.0, ACC)[None, :]
                g -= optional(slope, channel, inside, 0.0, ACC)[None, :] * value
            g = tl.where(valid, g * scale[None, :], 0.0)
            if INPUT:
                acc += g * tl.load(weight + channel * (KH * KW) + tap, mask=inside, other=0.0).to(ACC)[None, :]
            sums += tl.where((lane == tap)[:, None], tl.sum(tl.where(valid, g * seen, 0.0), 0)[None, :], 0.0)
        if INPUT:
            tl.store(grad_x + at, acc.to(grad_x.dtype.element_ty), mask=there)
    to = partial + (program * c + channel[None, :]) * (KH * KW) + lane[:, None]
    tl.store(to, sums, mask=(lane < KH * KW)[:, None] & inside[None, :])


# total[i] = sum over parts of partial[part, i], in order.
@triton.jit
def add_parts(partial, total, parts, size, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    acc = tl.zeros((BLOCK,), tl.float64)
    for part in range(parts):
        acc += tl.load(partial + tl.cast(part, tl.int64) * size + index, mask=inside, other=0.0).to(tl.float64)
    tl.store(total + index, acc.to(total.dtype.element_ty), mask=inside)


def plan(
    n: int, c: int, k: int, h: int, w: int, oh: int, ow: int, taps: int, element_size: int, block_out: int,
    contiguous: bool = False, compiled: bool = False,
) -> str:  # fmt: skip
    """How to run the block for inference: "fused", "two kernels", "convolutions" (ATen's, cuDNN) or, where x is `contiguous`
    and the C++ kernels are `compiled`, "c++ depthwise" with ATen's product.

    Microseconds of a GPU of 2 TB/s DRAM, 6 TB/s L2, 15 TFLOP/s for the depthwise sums and, for products, 100 TFLOP/s in 16 bits
    and 40 otherwise, of which these kernels are given 60 % and cuBLAS 85 %; 2 us a launch;
    within a kernel, other programs' memory traffic hides behind arithmetic. Only ratios matter. The fused kernel
    reads A and writes D, but makes the depthwise result once for every tile of C_out, from the L2 cache; two kernels move 2 B
    more; both take channels_last, and copy x and y if they must. Convolutions read and write B and D once more for BatchNorm and
    activation, with the C++ depthwise kernel only D, in launches of their own.
    """
    a, b, d = (element_size * n * size for size in (c * h * w, c * oh * ow, k * oh * ow))
    times = -(-k // block_out)
    products = 2 * n * oh * ow * c * k / (100e6 if element_size == 2 else 40e6)
    sums = 2 * n * oh * ow * c * taps / 15e6
    copies = 4 + 2 * (a + d) / 2e6 if contiguous else 0
    fused = copies + 2 + max((a + d) / 2e6, times * a / 6e6, times * sums + products / 0.6)
    two = copies + 4 + max((a + b) / 2e6, sums) + max((b + d) / 2e6, products / 0.6)
    halves = max((a + b) / 2e6, sums) + max((b + d) / 2e6, products / 0.85) + 2 * d / 2e6
    ways = [(fused, "fused"), (two, "two kernels"), (12 + halves + 2 * b / 2e6, "convolutions")]
    if contiguous and compiled:
        ways.append((8 + halves, "c++ depthwise"))
    return min(ways)[1]


def rows(x: Tensor) -> Tensor:
    """(N, C, H, W) as dense (N, H, W, C)."""
    return x.permute(0, 2, 3, 1).contiguous()


def images(x: Tensor, like: Tensor) -> Tensor:
    """(N, H, W, C) as (N, C, H, W) in the layout of `like`."""
    x = x.permute(0, 3, 1, 2)
    return x if _backend.layout(like) == torch.channels_last else x.contiguous()


class Shape:
    """What the kernels of one call share: sizes, geometry, tiles, types."""

    def __init__(self, x, dw_weight, pw_weight, stride, padding, dilation):
        self.n, self.c, self.h, self.w = x.shape
        self.k = pw_weight.shape[0]
        kh, kw = dw_weight.shape[2:]
        self.oh = (self.h + 2 * padding[0] - dilation[0] * (kh - 1) - 1) // stride[0] + 1
        self.ow = (self.w + 2 * padding[1] - dilation[1] * (kw - 1) - 1) // stride[1] + 1
        self.pixels = self.n * self.oh * self.ow
        self.sizes = stride, padding, dilation
        self.contiguous = _backend.layout(x) == torch.contiguous_format
        self.geometry = dict(zip(("KH", "KW", "SH", "SW", "PH", "PW", "DH", "DW"), (kh, kw, *stride, *padding, *dilation)))
        self.wide = x.dtype == torch.float64
        self.statistics = torch.float64 if self.wide else torch.float32
        self.acc = tl.float64 if self.wide else tl.float32
        dot = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}.get(x.dtype, self.acc)
        precision = "tf32" if x.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"
        self.kind = precision if x.dtype == torch.float32 else x.dtype
        tile = CONFIGS[self.kind]
        block_out = max(16, min(tile["BLOCK_OUT"], triton.next_power_of_2(self.k)))
        self.tile = {**tile, "BLOCK_OUT": block_out, "ACC": self.acc, "DOT": dot, "PRECISION": precision}
        self.elementwise = {**ELEMENTWISE, "ACC": self.acc}

    def parts(self, block: int, most: int | None = None, pixels: int | None = None) -> tuple[int, int]:
        """Programs that share the pixels, and tiles of each; from sizes alone, so that sums never change order."""
        tiles = triton.cdiv(self.pixels if pixels is None else pixels, block)
        steps = triton.cdiv(tiles, most or PARTS)
        return triton.cdiv(tiles, steps), steps

    def weight_parts(self) -> int:
        """Programs, at most, that leave a partial gradient of the pointwise weight each: as many as move a twentieth of what the
        pass moves anyway, but no fewer than fill a GPU."""
        moved = 2 * self.pixels * (self.c + self.k)
        return min(PARTS, max(WEIGHT_PARTS, moved // (40 * max(1, self.c * self.k))))

    def backward_tile(self) -> tuple[dict, bool]:
        """The tile of the products of the backward, and whether C_out is one: then one kernel makes both."""
        both, out = BOTH[self.kind], max(16, triton.next_power_of_2(self.k))
        if out > both["BLOCK_OUT"]:
            return {**self.tile, "BLOCK_OUT": min(self.tile["BLOCK_OUT"], 64), "num_warps": both["num_warps"]}, False
        return {**self.tile, **both, "BLOCK_OUT": out}, True


def ds_conv(
    x, dw_weight, dw_bias, dw_mean, dw_var, dw_gamma, dw_beta, dw_eps,
    pw_weight, pw_bias, pw_mean, pw_var, pw_gamma, pw_beta, pw_eps, stride, padding, dilation, dw_act, act,
):  # fmt: skip
    s = Shape(x, dw_weight, pw_weight, stride, padding, dilation)
    taps = s.geometry["KH"] * s.geometry["KW"]
    sizes = s.n, s.c, s.k, s.h, s.w, s.oh, s.ow, taps, x.element_size(), s.tile["BLOCK_OUT"]
    how = plan(*sizes, contiguous=s.contiguous, compiled=HAS_DEPTHWISE)
    if s.wide and how == "fused":
        how = "two kernels"  # float64 addresses, sums and tiles in one kernel spill on Ampere
    if how in ("convolutions", "c++ depthwise"):
        first, second = (dw_mean, dw_var, dw_gamma, dw_beta, dw_eps, dw_act), (pw_mean, pw_var, pw_gamma, pw_beta, pw_eps, act)
        return convolutions(s, x, dw_weight, dw_bias, first, pw_weight, pw_bias, second, how == "c++ depthwise")
    source, dw, pw = rows(x), dw_weight.contiguous(), pw_weight.contiguous()
    y = x.new_empty((s.n, s.oh, s.ow, s.k))
    if y.numel() == 0:
        return images(y, x)
    with torch.cuda.device_of(x):
        if how == "two kernels":
            v = x.new_empty((s.n, s.oh, s.ow, s.c))
            block = s.elementwise
            grid = triton.cdiv(s.pixels, block["BLOCK_PIXELS"]), triton.cdiv(s.c, block["BLOCK_CHANNELS"])
            depthwise[grid](
                *(source, v, dw, dw_bias, dw_mean, dw_var, dw_gamma, dw_beta, None, None, s.pixels, s.h, s.w, s.c, s.oh, s.ow, 1),
                **(s.geometry | {"EPS": dw_eps, "ACT": dw_act, "NORMALISE": True, "STATISTICS": False}), **block,
            )  # fmt: skip
            source = v
        out_tiles = triton.cdiv(s.k, s.tile["BLOCK_OUT"])
        inference[(triton.cdiv(s.pixels, s.tile["BLOCK_PIXELS"]) * out_tiles,)](
            *(source, y, dw, dw_bias, dw_mean, dw_var, dw_gamma, dw_beta, pw, pw_bias, pw_mean, pw_var, pw_gamma, pw_beta),
            *(s.pixels, s.h, s.w, s.c, s.k, s.oh, s.ow, out_tiles),
            **(s.geometry | {"DW_EPS": dw_eps, "PW_EPS": pw_eps, "DW_ACT": dw_act, "ACT": act, "DEPTHWISE": how == "fused"}),
            **s.tile,
        )  # fmt: skip
    return images(y, x)


def convolutions(s: Shape, x, dw_weight, dw_bias, dw_norm, pw_weight, pw_bias, pw_norm, compiled: bool) -> Tensor:
    """The pointwise product is ATen's, and so is the depthwise convolution where it is not `compiled` here."""
    if s.pixels == 0 or s.k == 0:
        return images(x.new_empty((s.n, s.oh, s.ow, s.k)), x)
    with torch.cuda.device_of(x):
        if compiled:
            scale, shift = (x.new_empty(s.c, dtype=s.statistics) for _ in "ss")
            grid = (triton.cdiv(s.c, 128),)
            affine[grid](dw_bias, *dw_norm[:4], scale, shift, s.c, EPS=dw_norm[4], ACC=s.acc, BLOCK_CHANNELS=128)
            v = torch.ops.segfast.depthwise(x, dw_weight, scale, shift, *s.sizes, dw_norm[5])
        else:
            v = normalised(s, F.conv2d(x, dw_weight, dw_bias, *s.sizes, s.c), *dw_norm)
        z = normalised(s, F.conv2d(v, pw_weight, pw_bias), *pw_norm)
    return z.contiguous(memory_format=_backend.layout(x))


def normalised(s: Shape, z: Tensor, mean, var, gamma, beta, eps: float, act: int, y: Tensor | None = None) -> Tensor:
    """act(bn(z)), in `y` or in place; z: (N, C, H, W), dense in either format."""
    n, channels, h, w = z.shape
    area = h * w
    strides = (area, 1) if z.is_contiguous() else (1, channels)
    block = s.elementwise
    grid = triton.cdiv(n * area, block["BLOCK_PIXELS"]), triton.cdiv(channels, block["BLOCK_CHANNELS"])
    y = z if y is None else y
    normalise[grid](
        *(z, y, mean, var, gamma, beta, n * area, channels, area, channels * area, strides[1], strides[0]),
        EPS=eps, ACT=act, **block,
    )  # fmt: skip
    return y


def ds_conv_train(
    x, dw_weight, dw_bias, dw_mean, dw_var, dw_gamma, dw_beta, dw_eps,
    pw_weight, pw_bias, pw_mean, pw_var, pw_gamma, pw_beta, pw_eps, stride, padding, dilation, dw_act, act,
):  # fmt: skip
    s = Shape(x, dw_weight, pw_weight, stride, padding, dilation)
    dw, pw = dw_weight.contiguous(), pw_weight.contiguous()
    u, z, y = (x.new_empty((s.n, s.oh, s.ow, channels)) for channels in (s.c, s.k, s.k))
    one, two = (
        [x.new_empty(size, dtype=s.statistics) for _ in "mv"]
        if mean is None
        else [t.to(s.statistics, copy=True) for t in (mean, var)]
        for mean, var, size in ((dw_mean, dw_var, s.c), (pw_mean, pw_var, s.k))
    )
    if s.pixels == 0 or s.k == 0:
        for t, given in ((one, dw_mean), (two, pw_mean)):
            if given is None:
                for v in t:
                    v.fill_(float("nan"))
        return images(y, x), u.permute(0, 3, 1, 2), z.permute(0, 3, 1, 2), *one, *two
    with torch.cuda.device_of(x):
        if HAS_DEPTHWISE and s.contiguous and s.c > 0:  # u is copied to channels_last, not x: 2 (A - B) less, nothing at stride 1
            u, *moments = torch.ops.segfast.depthwise_train(x, dw, dw_bias, *s.sizes)
            u, one = rows(u), moments if dw_mean is None else one
        else:
            block = s.elementwise
            parts, steps = s.parts(block["BLOCK_PIXELS"])
            means, squares = (x.new_empty((parts, s.c), dtype=s.statistics) for _ in "ms") if dw_mean is None else (None, None)
            depthwise[(parts, triton.cdiv(s.c, block["BLOCK_CHANNELS"]))](
                *(rows(x), u, dw, dw_bias, None, None, None, None, means, squares, s.pixels, s.h, s.w, s.c, s.oh, s.ow, steps),
                **(s.geometry | {"EPS": dw_eps, "ACT": 0, "NORMALISE": False, "STATISTICS": dw_mean is None}), **block,
            )  # fmt: skip
            if dw_mean is None:
                join_moments(means, squares, one, s, steps * block["BLOCK_PIXELS"])
        parts, steps = s.parts(s.tile["BLOCK_PIXELS"])
        means, squares = (x.new_empty((parts, s.k), dtype=s.statistics) for _ in "ms") if pw_mean is None else (None, None)
        pointwise[(parts, triton.cdiv(s.k, s.tile["BLOCK_OUT"]))](
            *(u, z, *one, dw_gamma, dw_beta, pw, pw_bias, means, squares, s.pixels, s.c, s.k, steps),
            **{"DW_EPS": dw_eps, "DW_ACT": dw_act, "STATISTICS": pw_mean is None}, **s.tile,
        )  # fmt: skip
        if pw_mean is None:
            join_moments(means, squares, two, s, steps * s.tile["BLOCK_PIXELS"])
        z = z.permute(0, 3, 1, 2)
        normalised(s, z, *two, pw_gamma, pw_beta, pw_eps, act, y.permute(0, 3, 1, 2))
    return images(y, x), u.permute(0, 3, 1, 2), z, *one, *two


def join_moments(means: Tensor, squares: Tensor, statistics: list[Tensor], s: Shape, size: int) -> None:
    parts, channels = means.shape
    grid = (triton.cdiv(channels, COMBINE["BLOCK_CHANNELS"]),)
    combine_moments[grid](means, squares, *statistics, s.pixels, size, parts, channels, **COMBINE)


def ds_conv_backward(
    grad, x, u, z, dw_weight, dw_mean, dw_var, dw_gamma, dw_beta, dw_eps, dw_batch,
    pw_weight, pw_mean, pw_var, pw_gamma, pw_beta, pw_eps, pw_batch, stride, padding, dilation, dw_act, act, need_input,
):  # fmt: skip
    s = Shape(x, dw_weight, pw_weight, stride, padding, dilation)
    source, gy, u, z = (rows(t) for t in (x, grad, u, z))
    dw, pw = dw_weight.contiguous(), pw_weight.contiguous()
    taps = s.geometry["KH"] * s.geometry["KW"]
    grad_x = x.new_empty((s.n if need_input else 0, s.h, s.w, s.c))
    g1 = torch.empty_like(u)
    grad_dw, grad_pw = torch.empty_like(dw), torch.empty_like(pw)
    ones = [x.new_empty(s.c), *(x.new_empty(s.c, dtype=s.statistics) for _ in "gb")]
    twos = [x.new_empty(s.k), *(x.new_empty(s.k, dtype=s.statistics) for _ in "gb")]
    result = lambda: (  # noqa: E731
        images(grad_x, x) if need_input else grad_x.permute(0, 3, 1, 2), grad_dw, *ones, grad_pw, *twos,
    )  # fmt: skip
    if s.pixels == 0 or s.k == 0:
        for t in (grad_x, grad_dw, grad_pw, *ones, *twos):
            t.zero_()
        return result()
    one, two = (dw_mean, dw_var, dw_gamma, dw_beta), (pw_mean, pw_var, pw_gamma, pw_beta)
    with torch.cuda.device_of(x):
        block = s.elementwise
        parts, steps = s.parts(block["BLOCK_PIXELS"])
        sums, products = (x.new_empty((parts, s.k), dtype=s.statistics) for _ in "sp")
        grid = parts, triton.cdiv(s.k, block["BLOCK_CHANNELS"])
        gradient_sums[grid](gy, z, *two, sums, products, s.pixels, s.k, steps, EPS=pw_eps, ACT=act, **block)
        pw_center, pw_slope = join_gradients(sums, products, pw_var, pw_gamma, twos, s, pw_eps, pw_batch)

        tile, together = s.backward_tile()
        shared = {"DW_EPS": dw_eps, "PW_EPS": pw_eps, "DW_ACT": dw_act, "ACT": act}
        weight_parts, weight_steps = s.parts(tile["BLOCK_PIXELS"], s.weight_parts())
        parts, steps = (weight_parts, weight_steps) if together else s.parts(tile["BLOCK_PIXELS"])
        partial = x.new_empty((weight_parts, s.k, s.c), dtype=s.statistics)
        sums, products = (x.new_empty((parts, s.c), dtype=s.statistics) for _ in "sp")
        pointwise_backward[(triton.cdiv(s.c, tile["BLOCK_CHANNELS"]), parts)](
            *(gy, z, *two, pw_center, pw_slope, pw, u, g1, *one, sums, products, partial if together else None),
            *(s.pixels, s.c, s.k, steps), WEIGHT=together, **shared, **tile,
        )  # fmt: skip
        if not together:
            grid = triton.cdiv(s.k, tile["BLOCK_OUT"]), triton.cdiv(s.c, tile["BLOCK_CHANNELS"]), weight_parts
            pointwise_weight_gradient[grid](
                *(gy, z, *two, pw_center, pw_slope, u, *one, partial, s.pixels, s.c, s.k, weight_steps), **shared, **tile
            )
        add_parts[(triton.cdiv(grad_pw.numel(), 256),)](partial, grad_pw, weight_parts, grad_pw.numel(), BLOCK=256)
        dw_center, dw_slope = join_gradients(sums, products, dw_var, dw_gamma, ones, s, dw_eps, dw_batch)

        pixels = s.n * s.h * s.w
        parts, steps = s.parts(block["BLOCK_PIXELS"], TAP_PARTS, pixels)
        partial = x.new_empty((parts, s.c, taps), dtype=s.statistics)
        depthwise_backward[(parts, triton.cdiv(s.c, block["BLOCK_CHANNELS"]))](
            *(source, u, g1, dw, dw_mean, dw_var, dw_gamma, dw_center, dw_slope, grad_x, partial),
            *(pixels, s.h, s.w, s.c, s.oh, s.ow, steps),
            **(s.geometry | {"EPS": dw_eps, "INPUT": need_input, "TAPS": triton.next_power_of_2(taps)}), **block,
        )  # fmt: skip
        add_parts[(triton.cdiv(grad_dw.numel(), 256),)](partial, grad_dw, parts, grad_dw.numel(), BLOCK=256)
    return result()


def join_gradients(sums, products, var, gamma, outputs, s: Shape, eps: float, batch: bool) -> tuple[Tensor | None, Tensor | None]:
    parts, channels = sums.shape
    center, slope = (torch.empty_like(sums[0]) for _ in "cs") if batch else (None, None)
    bias, grad_gamma, grad_beta = outputs
    combine_gradients[(triton.cdiv(channels, COMBINE["BLOCK_CHANNELS"]),)](
        *(sums, products, var, gamma, grad_beta, grad_gamma, bias, center, slope, s.pixels, parts, channels),
        EPS=eps, BATCH=batch, **COMBINE,
    )  # fmt: skip
    return center, slope
