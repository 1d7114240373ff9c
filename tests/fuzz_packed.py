"""Random calls of the private operations over packed weights, for fuzz.py: float32 and bfloat16 near float64, int8 to the bit."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

KINDS = ("dense", "depthwise", "separable", "inverted")
ACTS = (lambda x: x, F.relu, F.relu6, F.silu, F.hardswish)
NEAR = {"float32": 1e-4, "bfloat16": 0.1}  # of the largest element: far above rounding, far below a wrong element


def draw(integer, choice) -> dict[str, Any]:
    dtype = choice(("float32", "bfloat16", "int8"))
    size, dilation, padding = choice((1, 1, 3, 3, 5, 2)), choice((1, 1, 2)), integer(0, 3)
    least = max(1, dilation * (size - 1) + 1 - 2 * padding)
    return {
        "dtype": dtype,
        "kind": choice(KINDS),
        "size": [integer(0, 2), integer(1, 40), least + integer(0, 9), least + integer(0, 40)],
        "expanded": integer(1, 70),
        "out": integer(1, 70),
        "kernel": [size, size],
        "stride": [integer(1, 3), integer(1, 3)],
        "padding": [padding, padding],
        "dilation": [dilation, dilation],
        "acts": [integer(0, 2 if dtype == "int8" else 4) for _ in range(3)],
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
        gots.append(ops.packed_winograd(x, ops.pack_winograd(*flat, 1), *geometry, acts[0], more))
    if len(weights) == 1:
        gots.append(ops.packed_conv(x, ops.pack_conv(*flat, groups, kept), *geometry, acts[0], more))
    elif len(weights) == 2:
        gots.append(ops.packed_ds_conv(x, ops.pack_ds_conv(*flat, kept), *geometry, *acts[:2], more))
    else:
        gots.append(ops.packed_inverted_residual(x, ops.pack_inverted_residual(*flat, kept), *geometry, *acts, more))
    for got in gots if y.numel() else ():
        off, largest = float((got.double() - y).abs().max()), float(y.abs().max())
        assert off <= NEAR[dtype] * (largest + 1), f"off by {off} of {largest}"


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
