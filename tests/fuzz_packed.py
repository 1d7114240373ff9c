"""Random calls of the private operations over packed weights, for fuzz.py: float32 and bfloat16 near float64, int8 to the bit."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

KINDS = ("dense", "depthwise", "separable", "inverted")
FLOAT_KINDS = (*KINDS, "transposed", "maps")
ACTS = (lambda x: x, F.relu, F.relu6, F.silu, F.hardswish, F.leaky_relu)
NEAR = {"float32": 1e-4, "bfloat16": 0.1}  # of the largest element: far above rounding, far below a wrong element


def draw(integer, choice) -> dict[str, Any]:
    dtype = choice(("float32", "bfloat16", "int8"))
    size, dilation, padding = choice((1, 1, 3, 3, 5, 2)), choice((1, 1, 2)), integer(0, 3)
    least = max(1, dilation * (size - 1) + 1 - 2 * padding)
    return {
        "dtype": dtype,
        "kind": choice(KINDS if dtype == "int8" else FLOAT_KINDS),
        "size": [
            integer(0, 2),
            choice((16, 32, integer(1, 40), integer(1, 40), integer(1, 40))),
            least + integer(0, 9),
            least + integer(0, 40),
        ],
        "expanded": integer(1, 70),
        "out": integer(1, 70),
        "kernel": [size, size],
        "stride": [integer(1, 3), integer(1, 3)],
        "padding": [padding, padding],
        "dilation": [dilation, dilation],
        "acts": [integer(0, 2 if dtype == "int8" else 5) for _ in range(3)],
        "add": choice((False, True)),
        "planar": choice((False, True)),
        "seed": integer(0, 999),
    }


def shapes(kind: str, c: int, expanded: int, out: int, kernel: list[int]) -> list[tuple[int, int, list[int]]]:
    """(outputs, inputs a group, kernel) of every convolution."""
    if kind == "dense":
        return [(out, c, kernel)]
    if kind == "depthwise":
        return [(c, 1, kernel)]
    if kind == "separable":
        return [(c, 1, kernel), (out, c, [1, 1])]
    return [(expanded, c, [1, 1]), (expanded, 1, kernel), (out, expanded, [1, 1])]


def call(
    dtype: str, kind: str, size: list[int], expanded: int, out: int, kernel: list[int], stride: list[int], padding: list[int],
    dilation: list[int], acts: list[int], add: bool, planar: bool, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    if kind in ("transposed", "maps"):
        layout = torch.contiguous_format if planar else torch.channels_last
        x = torch.randn(size).to(getattr(torch, dtype)).contiguous(memory_format=layout)
        made = transposed if kind == "transposed" else maps
        pairs = made(x, out, kernel, stride, padding, acts[0], add) if made is transposed else made(x, expanded, out, stride, add)
        for got, y in pairs:
            require_near(got, y, dtype)
        return
    convs = shapes(kind, size[1], expanded, out, kernel)
    spatial = 1 if kind == "inverted" else 0
    groups = {"dense": 1, "inverted": expanded}.get(kind, size[1])
    layout = torch.contiguous_format if planar else torch.channels_last
    if dtype == "int8":
        return call_int8(size, convs, groups, stride, padding, dilation, acts, add, layout)
    kept, ops = getattr(torch, dtype), torch.ops.segfast
    x = torch.randn(size).to(kept).contiguous(memory_format=layout)
    weights = [(torch.randn(k, c, *taps) / (c * taps[0] * taps[1]) ** 0.5, torch.randn(k)) for k, c, taps in convs]
    y, more = x.double(), None
    for i, (weight, bias) in enumerate(weights):
        at = (stride, padding, dilation, groups) if i == spatial else ()
        y = F.conv2d(y, weight.double(), bias.double(), *at)
        if i + 1 == len(weights) and add:
            more = torch.randn(y.shape).to(kept)
            y = y + more
        y = ACTS[acts[i]](y)
    flat = [t for pair in weights for t in pair]
    geometry = (stride, padding, dilation)
    gots = []
    if kind == "dense" and (kernel, stride, dtype) == ([3, 3], [1, 1], "float32"):
        packed = ops.pack_winograd(*flat, 1)
        gots.append(ops.packed_winograd(x, packed, *geometry, acts[0], more))
        cut = size[1] // 2  # the same map in two pieces
        if cut:
            gots.append(ops.packed_winograd(x[:, :cut], packed, *geometry, acts[0], more, x[:, cut:]))
    if kind == "dense" and not add and y.shape[0]:
        pool = ([2, 3], [2, 1], [1, 1], [1, 1])
        pooled = ops.packed_conv_pool(
            x, ops.pack_conv(*flat, 1, kept), *geometry, acts[0], F.max_pool2d(y, *pool).shape[2:], *pool
        )
        require_near(pooled, F.max_pool2d(y, *pool), dtype)
    if len(weights) == 1:
        gots.append(ops.packed_conv(x, ops.pack_conv(*flat, groups, kept), *geometry, acts[0], more))
    elif len(weights) == 2:
        packed = ops.pack_ds_conv(*flat, kept)
        gots.append(ops.packed_ds_conv(x, packed, *geometry, *acts[:2], more))
        if more is None and size[1] % 16 == 0:  # behind a convolution that changes nothing
            same = ops.pack_conv(torch.eye(size[1])[:, :, None, None], torch.zeros(size[1]), 1, kept)
            gots.append(ops.packed_conv_ds_conv(x, same, [1, 1], [0, 0], [1, 1], 0, packed, *geometry, *acts[:2]))
        channels = y.shape[1]
        if more is None and y.numel() and (kept == torch.float32 or channels % 2 == 0):
            identity = torch.eye(channels)[:, :, None, None]
            behind = ops.pack_conv(identity, torch.zeros(channels), 1, kept)
            gots.append(ops.packed_ds_conv_chain(x, packed, *geometry, *acts[:2], None, False, behind, 0))
            if (stride, dilation, kept) == ([1, 1], [1, 1], torch.float32) and channels % 16 == 0:
                none = torch.zeros(x.shape[0], kernel[0] * kernel[1] * channels, 2, 3)
                gots.append(ops.packed_ds_conv_chain(x, packed, *geometry, *acts[:2], none, True, None, 0))
    else:
        gots.append(ops.packed_inverted_residual(x, ops.pack_inverted_residual(*flat, kept), *geometry, *acts, more))
    for got in gots:
        require_near(got, y, dtype)


def require_near(got: Tensor, y: Tensor, dtype: str) -> None:
    if y.numel():
        off, largest = float((got.double() - y).abs().max()), float(y.abs().max())
        assert off <= NEAR[dtype] * (largest + 1), f"off by {off} of {largest}"


def transposed(x: Tensor, out: int, kernel: list[int], stride: list[int], padding: list[int], act: int, add: bool):
    """A transposed convolution whose stride is its kernel, and one of any."""
    ops = torch.ops.segfast
    x = x if x.dtype == torch.float32 or x.shape[1] % 2 == 0 else torch.cat([x, x], 1)
    weight, bias = torch.randn(x.shape[1], out, *kernel) / x.shape[1] ** 0.5, torch.randn(out)
    sizes = [(n - 1) * s - 2 * p + k for n, s, p, k in zip(x.shape[2:], stride, padding, kernel)]
    if x.numel() and min(sizes) > 0:
        packed = ops.pack_conv_transpose_overlap(weight, bias, 1, x.dtype)
        got = ops.packed_conv_transpose_overlap(x, packed, stride, padding, [1, 1], [0, 0], act)
        yield got, ACTS[act](F.conv_transpose2d(x.double(), weight.double(), bias.double(), stride, padding))
    y = F.conv_transpose2d(x.double(), weight.double(), bias.double(), kernel)
    more = torch.randn(y.shape).to(x.dtype) if add else None
    y = ACTS[act](y if more is None else y + more)
    packed = ops.pack_conv_transpose(weight, bias, 1, x.dtype)
    got = ops.packed_conv_transpose(x, packed, kernel, [0, 0], [1, 1], act, more)
    yield got, y
    if more is None:
        classes = ops.packed_conv_transpose_argmax(x, packed, kernel, [0, 0], [1, 1], act, 4)
        yield classes.double(), got.argmax(1).double()


def maps(x: Tensor, expanded: int, out: int, stride: list[int], add: bool):
    """What joins, resizes and recodes maps."""
    ops = torch.ops.segfast
    n, c, h, w = x.shape
    others = [torch.randn(n, k, h, w).to(x.dtype) for k in (out, expanded)]
    total = c + out + expanded
    more = torch.randn(n, total, h, w).to(x.dtype) if add else None
    scale, shift, slope = torch.randn(3, total).unbind()
    y = torch.cat([x, *others], 1).double() + (0 if more is None else more)
    y = y * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)
    yield ops.concat_affine([x, *others], more, scale, shift, slope, False), torch.where(y < 0, y * slope.view(1, -1, 1, 1), y)
    if not x.numel():
        return
    for size in ([expanded, out], [h * stride[0], w * stride[1]]):
        for channels_last in (False, True):
            exact = F.interpolate(x.double(), size, mode="bilinear", align_corners=add)
            yield ops.resize(x, size, add, channels_last), exact
    exact = F.max_pool2d(x.double(), 3, stride, 1, ceil_mode=add)
    yield ops.max_pool(x, exact.shape[2:], [3, 3], stride, [1, 1], [1, 1]), exact
    yield ops.argmax(x, 8).double(), x.argmax(1).double()
    yield ops.repeat_pixels(x, *stride), F.interpolate(x.double(), [h * stride[0], w * stride[1]])
    if x.dtype == torch.float32:
        got, held = ops.dequantize_map(ops.quantize_map(x, 0.1, 128), 0.1, 128), x.double().clamp(-12.8, 12.7)
        yield got, torch.where((got - held).abs() <= 0.05001, got.double(), held)  # of a half either neighbour


def call_int8(size, convs, groups, stride, padding, dilation, acts, add, layout) -> None:
    from segfast.ops._packed import Int8Conv, int8_block, int8_block_reference

    x = torch.randint(0, 256, size, dtype=torch.uint8).contiguous(memory_format=layout)
    zeros = torch.randint(0, 256, (len(convs) + 2,)).tolist()
    made = [
        Int8Conv(
            torch.randint(-128, 128, (k, c, *taps), dtype=torch.int8), torch.rand(k) * 0.02 + 1e-3, torch.randn(k) * 5, act,
            0.02 * (c * taps[0] * taps[1]) ** 0.5, zero,
        )
        for (k, c, taps), act, zero in zip(convs, acts, zeros)
    ]  # fmt: skip
    block = int8_block(0.02, zeros[-1], made, stride=stride, padding=padding, dilation=dilation, groups=groups)
    more: tuple[Tensor, float, int] | tuple[()] = ()
    if add:
        shape = block(x).shape
        more = (torch.randint(0, 256, shape, dtype=torch.uint8).contiguous(memory_format=layout), 0.1, zeros[-2])
    want = int8_block_reference(x, 0.02, zeros[-1], made, stride, padding, dilation, groups, *more)
    assert torch.equal(block(x, *more), want), "other bits than the reference"
