"""Private inference ops, over weights packed once and on maps: schemas. CPU, channels_last, no gradients.

Importing this module defines `torch.ops.segfast.pack_*`, `packed_*` and what joins maps; activations are the numbers of
`ds_conv.ACTIVATIONS`, and 5 for leaky ReLU of slope 0.01. Weights are given in float32 and packed for the dtype of the maps: in
bfloat16 those of the products are rounded to it. A packed weight is opaque bytes, from which no fake tensor can tell the number
of output channels: but for `packed_int8`, which is told, and the maps' `concat_affine`, `resize`, `quantize_map` and
`dequantize_map` there are no fakes, and the operations are to be called on real tensors only, never in a graph that is traced.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from segfast import _backend

_GEOMETRY = "SymInt[] stride, SymInt[] padding, SymInt[] dilation"
_SCHEMAS = {
    "pack_conv": "(Tensor weight, Tensor bias, int groups, ScalarType? dtype=None) -> Tensor",
    "pack_conv_transpose": "(Tensor weight, Tensor bias, int groups, ScalarType? dtype=None) -> Tensor",
    "pack_conv_transpose_overlap": "(Tensor weight, Tensor bias, int groups, ScalarType? dtype=None) -> Tensor",
    "pack_winograd": "(Tensor weight, Tensor bias, int groups, ScalarType? dtype=None) -> Tensor",
    "pack_ds_conv": "(Tensor dw_weight, Tensor dw_bias, Tensor pw_weight, Tensor pw_bias, ScalarType? dtype=None) -> Tensor",
    "pack_inverted_residual": "(Tensor expand_weight, Tensor expand_bias, Tensor dw_weight, Tensor dw_bias, "
    "Tensor project_weight, Tensor project_bias, ScalarType? dtype=None) -> Tensor",
    "packed_conv": f"(Tensor x, Tensor packed, {_GEOMETRY}, int act, Tensor? add=None) -> Tensor",
    "packed_conv_pool": f"(Tensor x, Tensor packed, {_GEOMETRY}, int act, SymInt[] size, SymInt[] kernel, SymInt[] pool_stride, "
    "SymInt[] pool_padding, SymInt[] pool_dilation) -> Tensor",
    "packed_conv_transpose": f"(Tensor x, Tensor packed, {_GEOMETRY}, int act, Tensor? add=None) -> Tensor",
    "packed_conv_transpose_argmax": f"(Tensor x, Tensor packed, {_GEOMETRY}, int act, int bytes) -> Tensor",
    "packed_conv_transpose_overlap": f"(Tensor x, Tensor packed, {_GEOMETRY}, SymInt[] output_padding, int act) -> Tensor",
    "packed_conv_ds_conv": "(Tensor x, Tensor first, SymInt[] first_stride, SymInt[] first_padding, SymInt[] first_dilation, "
    f"int first_act, Tensor packed, {_GEOMETRY}, int dw_act, int act) -> Tensor",
    "packed_winograd": f"(Tensor x, Tensor packed, {_GEOMETRY}, int act, Tensor? add=None, Tensor? more=None, "
    "SymInt[] repeat=[1, 1]) -> Tensor",
    "packed_ds_conv": f"(Tensor x, Tensor packed, {_GEOMETRY}, int dw_act, int act, Tensor? add=None) -> Tensor",
    "packed_ds_conv_chain": f"(Tensor x, Tensor packed, {_GEOMETRY}, int dw_act, int act, Tensor? low, bool align_corners, "
    "Tensor? last, int last_act) -> Tensor",
    "packed_inverted_residual": f"(Tensor x, Tensor packed, {_GEOMETRY}, int expand_act, int dw_act, int act, "
    "Tensor? add=None) -> Tensor",
    "concat_affine": "(Tensor[] xs, Tensor? add, Tensor? scale, Tensor? shift, Tensor? slope, bool relu) -> Tensor",
    "resize": "(Tensor x, SymInt[] size, bool align_corners, bool channels_last) -> Tensor",
    "repeat_pixels": "(Tensor x, SymInt fy, SymInt fx) -> Tensor",
    "max_pool": f"(Tensor x, SymInt[] size, SymInt[] kernel, {_GEOMETRY}) -> Tensor",
    "argmax": "(Tensor x, int bytes) -> Tensor",
    "pack_int8": "(Tensor[] weights, Tensor[] scales, Tensor[] biases, int groups, int[] acts, Tensor map_scales, "
    "int[] map_zeros) -> Tensor",
    "packed_int8": f"(Tensor x, Tensor packed, int[] shape, {_GEOMETRY}, Tensor? add=None, float add_scale=1.0, "
    "int add_zero=0) -> Tensor",
    "quantize_map": "(Tensor x, float scale, int zero) -> Tensor",
    "dequantize_map": "(Tensor x, float scale, int zero) -> Tensor",
}
for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"segfast::{_name}", _schema)


@torch.library.register_fake("segfast::packed_int8")
def _(x, packed, shape, stride, padding, dilation, add=None, add_scale=1.0, add_zero=0):
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, shape[1:])]
    size = [(n + 2 * p - r) // s + 1 for n, p, r, s in zip(x.shape[2:], padding, reach, stride)]
    return x.new_empty((x.shape[0], shape[0], *size)).contiguous(memory_format=torch.channels_last)


@torch.library.register_fake("segfast::concat_affine")
def _(xs, add, scale, shift, slope, relu):
    y = xs[0].new_empty((xs[0].shape[0], sum(x.shape[1] for x in xs), *xs[0].shape[2:]))
    return y.contiguous(memory_format=torch.channels_last)


@torch.library.register_fake("segfast::resize")
def _(x, size, align_corners, channels_last):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return x.new_empty((*x.shape[:2], *size)).contiguous(memory_format=layout)


@torch.library.register_fake("segfast::quantize_map")
def _(x, scale, zero):
    return torch.empty_like(x, dtype=torch.uint8, memory_format=torch.channels_last)


@torch.library.register_fake("segfast::dequantize_map")
def _(x, scale, zero):
    return torch.empty_like(x, dtype=torch.float32, memory_format=torch.channels_last)


Pair = tuple[int, int]
MOST_BIAS = 2.0**30  # of the sums' 32 bits


@dataclass(frozen=True)
class Int8Conv:
    """A quantised convolution and the map that it gives.

    weight: int8 (K, C / groups, kh, kw), symmetric; scale: float32 (K,), of the weights; bias: float32 (K,), real values.
    act: of `ds_conv.ACTIVATIONS`, none, ReLU or ReLU6 alone. out_scale, out_zero: a real value is out_scale (q - out_zero).
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor
    act: int
    out_scale: float
    out_zero: int


def int8_conv_reference(
    x: Tensor, x_scale: float, x_zero: int, conv: Int8Conv, *, stride: Pair = (1, 1), padding: Pair = (0, 0),
    dilation: Pair = (1, 1), groups: int = 1, add: Tensor | None = None, add_scale: float = 1.0, add_zero: int = 0,
) -> Tensor:  # fmt: skip
    """What a quantised convolution is, to the bit.

    s = sum of (x - x_zero) w + round(bias / (x_scale scale)), an integer
    y = out_zero + round(clamp(float32(s) m [+ (add - add_zero) a])), m = x_scale scale / out_scale, a = add_scale / out_scale

    m and a are rounded to float32 and so is each product and the sum; halves are rounded to the even integer; the clamp is that
    of uint8 and the activation (of ReLU6 6 / out_scale, rounded). Padding is x_zero.
    """
    scale = x_scale * conv.scale.double()
    whole = F.conv2d(x.double() - x_zero, conv.weight.double(), None, stride, padding, dilation, groups)
    whole += (conv.bias.double() / scale).clamp(-MOST_BIAS, MOST_BIAS).round().view(1, -1, 1, 1)
    value = whole.float() * (scale / conv.out_scale).float().view(1, -1, 1, 1)
    if add is not None:
        value = value + (add.float() - add_zero) * torch.tensor(add_scale / conv.out_scale, dtype=torch.float64).float()
    low = 0 if conv.act else -conv.out_zero
    high = min(255 - conv.out_zero, round(6 / conv.out_scale) if conv.act == 2 else 255)
    y = (value.clamp(low, high).round() + conv.out_zero).to(torch.uint8)
    return y.contiguous(memory_format=torch.channels_last)


def int8_block_reference(
    x: Tensor, x_scale: float, x_zero: int, convs: list[Int8Conv], stride: Pair, padding: Pair, dilation: Pair, groups: int,
    add: Tensor | None = None, add_scale: float = 1.0, add_zero: int = 0,
) -> Tensor:  # fmt: skip
    """A convolution, a depthwise and a 1x1 one, or a 1x1 one before them: what `int8_block` computes."""
    spatial = 1 if len(convs) == 3 else 0
    for i, conv in enumerate(convs):
        at = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups} if i == spatial else {}
        more = {"add": add, "add_scale": add_scale, "add_zero": add_zero} if i + 1 == len(convs) else {}
        x = int8_conv_reference(x, x_scale, x_zero, conv, **at, **more)
        x_scale, x_zero = conv.out_scale, conv.out_zero
    return x


def int8_block(
    x_scale: float, x_zero: int, convs: list[Int8Conv], *, stride: Pair = (1, 1), padding: Pair = (0, 0),
    dilation: Pair = (1, 1), groups: int = 1,
) -> Callable[..., Tensor]:  # fmt: skip
    """One, two or three quantised convolutions as one function of uint8 maps, its weights packed now.

    For what a quantised graph has between quantised maps: a convolution (groups 1, or depthwise), a depthwise and a 1x1 one, or a
    1x1, a depthwise and a 1x1 one; the geometry is that of the depthwise convolution or the single one. The maps between them
    never leave the cache.

    Returns:
        run(x, add=None, add_scale=1.0, add_zero=0) -> uint8 map, channels_last; `add` is a quantised map of the result's shape,
        added before the last activation. The bits are those of `int8_block_reference` on every kernel set and thread count; where
        nothing is compiled it is what runs.

    Raises:
        RuntimeError: weights, scales or zero points that do not fit, or an activation other than none, ReLU and ReLU6.
    """
    if not _backend.has_compiled("packed_int8", "CPU"):

        def run(x: Tensor, add: Tensor | None = None, add_scale: float = 1.0, add_zero: int = 0) -> Tensor:
            return int8_block_reference(x, x_scale, x_zero, convs, stride, padding, dilation, groups, add, add_scale, add_zero)

        return run
    packed = torch.ops.segfast.pack_int8.default(
        [c.weight for c in convs],
        [c.scale for c in convs],
        [c.bias for c in convs],
        groups,
        [c.act for c in convs],
        torch.tensor([x_scale, *(c.out_scale for c in convs)], dtype=torch.float64),
        [x_zero, *(c.out_zero for c in convs)],
    )
    kernel = torch.ops.segfast.packed_int8.default
    shape = [len(convs[-1].weight), *convs[len(convs) // 3].weight.shape[2:]]

    def run(x: Tensor, add: Tensor | None = None, add_scale: float = 1.0, add_zero: int = 0) -> Tensor:
        return kernel(x, packed, shape, stride, padding, dilation, add, add_scale, add_zero)

    return run
