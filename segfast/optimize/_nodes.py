"""What each step runs: one function of tensors a step, with its weights packed, chosen by a table of what was measured faster."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

import segfast.ops._packed  # noqa: F401  defines the packed operations
from segfast import _backend
from segfast.ops.ds_conv import MAX_TAPS
from segfast.optimize._capture import Graph, Op, operands
from segfast.optimize._patterns import (
    IDENTITY,
    Activation,
    Argmax,
    Aten,
    Block,
    Chain,
    Concat,
    Convolution,
    Head,
    Joined,
    Pooled,
    Recode,
    Repeat,
    Resize,
    Scored,
    Shuffle,
    Started,
    Step,
    Swapped,
)

aten = torch.ops.aten
CHANNELS_LAST = torch.channels_last
Run = Callable[..., Tensor]

# oneDNN's names of the activations that it computes with a convolution and that keep NaN. Its ReLU, clamps, GELU and, after a
# transposed convolution, sigmoid turn it into a number: they run in place behind it.
ONEDNN = {"": "none", "silu": "swish", "hardswish": "hardswish", "leaky_relu": "leaky_relu", "tanh": "tanh"}


# Who runs what, where several can, the first of them that is there; by what was measured faster (docs/optimize.md).
PREFER = {
    "conv": ("packed_winograd", "packed_conv", "onednn", "aten"),
    "pointwise": ("packed_conv", "onednn", "aten"),
    "depthwise": ("packed_conv", "onednn", "aten"),
    "transposed": ("packed_conv_transpose", "packed_conv_transpose_overlap", "onednn", "aten"),
    "ds_conv": ("packed_ds_conv", "ds_conv", "parts"),
    "inverted_residual": ("packed_inverted_residual", "ds_conv", "parts"),
}
# Multiply-adds of the pointwise half above which ds_conv, which packs its weights at every call, is faster than two oneDNN
# convolutions. In bfloat16 it computes in float32 and is not.
DS_CONV_FROM = {torch.float32: 1.5e8, torch.bfloat16: float("inf")}
MOST_SCORES = 64  # outputs of a convolution that a separable block takes along
LARGER = 1.3  # a map that is larger by this and the number of taps is better convolved before its interpolation


class Weights:
    """Folded and packed weights by what they were made of, shared by all sizes that a network is called with."""

    def __init__(self, originals: dict[str, Tensor], dtype: torch.dtype):
        self.originals, self.dtype = originals, dtype
        self.packed: dict[tuple, object] = {}

    def get(self, name: tuple | None, make: Callable[[], object]) -> object:
        if name is None:
            return make()
        if name not in self.packed:
            self.packed[name] = make()
        return self.packed[name]

    def exact(self, op: Op, graph: Graph) -> Tensor:
        """A constant in float64, from the network's own parameter where it is one: a bfloat16 copy has lost digits."""
        return self.originals.get(graph.names.get(op), graph.tensors[op]).detach().double()

    def folded(self, step: Convolution, graph: Graph) -> tuple[Tensor, Tensor]:
        """Weight and bias of the convolution with its BatchNorm, float64."""
        weight = self.exact(step.weight, graph)
        groups, outputs = step.groups, weight.shape[0]
        if step.transposed:
            outputs = weight.shape[1] * groups
        bias = weight.new_zeros(outputs) if step.bias is None else self.exact(step.bias, graph)
        for norm in step.norms:
            scale, shift = self.scale(norm, graph)
            if step.transposed:  # (C, K / groups, kh, kw), the outputs second, one group after the other
                parts = scale.view(groups, 1, -1, 1, 1)
                weight = (weight.view(groups, -1, *weight.shape[1:]) * parts).view(weight.shape)
            else:
                weight = weight * scale.view(-1, 1, 1, 1)
            bias = bias * scale + shift
        return weight, bias

    def scale(self, norm: tuple, graph: Graph) -> tuple[Tensor, Tensor]:
        """A BatchNorm as y = scale x + shift, float64."""
        mean, variance, weight, bias, eps = norm
        scale = torch.rsqrt(self.exact(variance, graph) + eps)
        if weight is not None:
            scale = scale * self.exact(weight, graph)
        shift = -self.exact(mean, graph) * scale
        return scale, shift if bias is None else shift + self.exact(bias, graph)


def named(graph: Graph, step: Convolution, *more) -> tuple | None:
    """What tells its folded weights apart from others: the names of the tensors, and in what way they are used."""
    names = [graph.names.get(t) for t in step.tensors]
    norms = [(eps, *(t is None for t in tensors)) for *tensors, eps in step.norms]
    return None if None in names else (*names, step.bias is None, *norms, step.transposed, step.groups, *more)


def geometry_of(step: Convolution) -> tuple[list[int], ...]:
    """Stride, padding and dilation; of a transposed convolution that is not tiled output_padding too."""
    more = [list(step.output_padding)] if step.transposed and not tiled(step) else []
    return list(step.stride), list(step.padding), list(step.dilation), *more


def windows_of(op: Op) -> tuple[list[int], ...]:
    """Of max-pooling: size of the result, kernel, stride, padding, dilation."""
    given = list(op.args[1:5])
    given += [[], [0], [1]][len(given) - 1 :]  # what is left out
    kernel, stride, padding, dilation = (list(numbers) * (2 // max(1, len(numbers))) for numbers in given)
    return list(op.shape[2:]), kernel, stride or kernel, padding, dilation


def direct(step: Convolution) -> bool:
    """In float32 packed_conv takes hardly longer than oneDNN, for many channels or groups, and puts its result where it saves
    memory; in bfloat16 it is faster for the first convolution, of few channels, and for 1x1 ones of enough outputs."""
    if step.output.dtype == torch.float32:
        return (step.dense or step.depthwise or step.grouped) and step.taps <= MAX_TAPS
    return step.weight.shape[0] >= 17 if step.pointwise else few(step)


def few(step: Convolution) -> bool:
    return step.dense and step.weight.shape[1] <= 8 and step.taps <= MAX_TAPS


def winograd(step: Convolution) -> bool:
    """3x3 of stride 1, with so many channels that the direct form is slower."""
    outputs, inputs, *size = step.weight.shape
    plain = size == [3, 3] and tuple(step.stride) == (1, 1) and step.dense and step.output.dtype == torch.float32
    return plain and inputs >= 16 and outputs >= 16


def tiled(step: Convolution) -> bool:
    """A transposed convolution whose outputs are tiles beside one another."""
    size = tuple(step.weight.shape[2:])
    plain = (step.padding, step.output_padding, step.dilation) == ((0, 0), (0, 0), (1, 1)) and step.groups == 1
    whole = step.output.dtype == torch.float32 or step.weight.shape[0] % 2 == 0  # words of bfloat16
    return plain and tuple(step.stride) == size and step.taps <= MAX_TAPS and whole


def unknown(step: Convolution) -> bool:
    """Transposed convolutions that PyTorch has and oneDNN refuses."""
    return step.transposed and any(more >= stride for more, stride in zip(step.output_padding, step.stride))


def overlapping(step: Convolution) -> bool:
    return step.output.dtype == torch.float32 and step.groups == 1 and step.taps <= MAX_TAPS


SUITS = {
    "packed_conv": direct,
    "packed_winograd": winograd,
    "packed_conv_transpose": tiled,
    "packed_conv_transpose_overlap": overlapping,
}
PACKED = {
    op
    for op in (
        "packed_conv", "packed_conv_ds_conv", "packed_conv_pool", "packed_conv_transpose", "packed_conv_transpose_argmax",
        "packed_conv_transpose_overlap", "packed_winograd", "packed_ds_conv", "packed_ds_conv_chain", "packed_inverted_residual",
        "concat_affine", "resize", "repeat_pixels", "max_pool", "argmax", "quantize_map", "dequantize_map",
    )
    if _backend.has_compiled(op, "CPU")
}  # fmt: skip


def onednn(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def packs(dtype: torch.dtype) -> bool:
    """Whether the kernels over packed weights are taken in this dtype.

    In bfloat16 where they have the best of the processor, its matrix tiles (AMX) or dot products of pairs, or where oneDNN has no
    bfloat16.
    """
    if dtype == torch.bfloat16 and onednn(dtype):
        tiles = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
        return _backend._C is not None and _backend._C.cpu_features()["kernel_set"] == ("amx" if tiles else "avx512bf16")
    return dtype in (torch.float32, torch.bfloat16)


class Builder:
    """Makes the function of a step for the sizes of one graph."""

    def __init__(self, graph: Graph, weights: Weights, class_dtype: torch.dtype | None, device: str = "cpu"):
        self.graph, self.weights, self.class_dtype, self.device = graph, weights, class_dtype, device
        self.onednn = device == "cpu" and onednn(weights.dtype)
        self.packs = device == "cpu" and packs(weights.dtype)
        self.owned: set[Op] = set()  # results that only their readers hold: the last one may overwrite them

    def has(self, op: str) -> bool:
        return (self.device == "cpu" and op in PACKED) or self.device in _backend.table.get(op, {})

    def build(self, step: Step) -> tuple[str, Run, list[Op]]:
        """(how it runs, the function, its arguments)."""
        return getattr(self, type(step).__name__.lower())(step)

    def overwritable(self, x: Op, step: Step) -> bool:
        return x in self.owned and len(x.users) == 1 and step.inputs.count(x) == 1

    def native(self, step: Step) -> bool:
        """Whether the result has elements, in the dtype of the packed weights."""
        return step.output.dtype == self.weights.dtype and 0 not in step.output.shape

    def packable(self, step: Step) -> bool:
        """Whether the dtype is that of the kernels over packed weights."""
        return self.native(step) and self.packs

    # -- convolutions

    def convolution(self, step: Convolution) -> tuple[str, Run, list[Op]]:
        self.owned.add(step.output)
        kind = "transposed" if step.transposed else "depthwise" if step.depthwise else "pointwise" if step.pointwise else "conv"
        native = self.native(step)
        for who in PREFER[kind]:
            if who in SUITS and step.act.code is not None and self.packable(step) and self.has(who) and SUITS[who](step):
                pack = getattr(torch.ops.segfast, who.replace("packed_", "pack_"))
                return self.packed(step, [step], pack.default, getattr(torch.ops.segfast, who).default)
            if who == "onednn" and native and self.onednn and not unknown(step):
                return self.onednn_convolution(step)
        return self.aten_convolution(step)

    def packed(self, step: Step, parts: list[Convolution], pack, kernel) -> tuple[str, Run, list[Op]]:
        """One kernel over weights packed for it; the geometry is that of the convolution that has one."""
        spatial = max(parts, key=lambda part: part.depthwise) if len(parts) > 1 else parts[0]
        packed, geometry = self.packed_weights(parts, pack), geometry_of(spatial)
        acts = [part.act.code for part in parts]
        how = kernel.name().partition(".")[0]
        if len(step.inputs) == 1:
            laid = layout_of(step.inputs[0]) if len(parts) == 1 else last_of
            return how, lambda x: kernel(laid(x), packed, *geometry, *acts), step.inputs

        def run(x, add):
            add = add.contiguous(memory_format=CHANNELS_LAST)
            return kernel(x.contiguous(memory_format=CHANNELS_LAST), packed, *geometry, *acts, add)

        return how, run, step.inputs

    def packed_weights(self, parts: list[Convolution], pack) -> Tensor:
        def make():
            tensors = [t.float().contiguous() for part in parts for t in self.weights.folded(part, self.graph)]
            groups = [parts[0].groups] if len(parts) == 1 else []
            return pack(*tensors, *groups, self.weights.dtype)

        names = [named(self.graph, part) for part in parts]
        return self.weights.get(None if None in names else (*(n for part in names for n in part), pack.name()), make)

    def reads_pieces(self, step: Convolution) -> bool:
        """Whether the convolution runs on the kernel that reads its map in pieces."""
        return step.act.code is not None and self.packable(step) and self.has("packed_winograd") and winograd(step)

    def joined(self, step: Joined) -> tuple[str, Run, list[Op]]:
        self.owned.add(step.output)
        conv, kernel = step.conv, torch.ops.segfast.packed_winograd.default
        packed, geometry = self.packed_weights([conv], torch.ops.segfast.pack_winograd.default), geometry_of(conv)

        def run(*maps):
            x, *rest = (x.contiguous(memory_format=CHANNELS_LAST) for x in maps)
            more = rest.pop(0) if step.more else None
            return kernel(x, packed, *geometry, conv.act.code, rest[0] if rest else None, more, step.factors)

        return "segfast::packed_winograd", run, step.inputs

    def pools(self, step: Convolution, pool: Step) -> bool:
        """Whether the convolution runs on the kernel that pools its rows as they come."""
        packed = step.act.code is not None and few(step) and not step.pointwise
        return packed and not step.added and self.packable(step) and self.packable(pool) and self.has("packed_conv_pool")

    def pooled(self, step: Pooled) -> tuple[str, Run, list[Op]]:
        self.owned.add(step.output)
        conv, kernel = step.conv, torch.ops.segfast.packed_conv_pool.default
        packed = self.packed_weights([conv], torch.ops.segfast.pack_conv.default)
        options = (*geometry_of(conv), conv.act.code, *windows_of(step.output))
        laid = layout_of(step.inputs[0])
        return "segfast::packed_conv_pool", lambda x: kernel(laid(x), packed, *options), step.inputs

    def swaps(self, low: Resize, conv: Convolution) -> bool:
        """Whether the convolution had better come before the interpolation."""
        outputs, inputs = conv.weight.shape[:2]
        linear = conv.pointwise and conv.act == IDENTITY and not conv.added
        before, after = (math.prod(op.shape[2:]) for op in (low.inputs[0], low.output))
        return linear and outputs <= inputs and after >= 2 * before > 0 and self.native(low)

    def swapped(self, step: Swapped) -> tuple[str, Run, list[Op]]:
        conv = replace(step.conv, inputs=step.inputs)
        resize = Resize(step.covers, step.inputs, step.low.size, step.low.align_corners)
        return chain([self.convolution(conv), self.resize(resize)], step)

    def classifies(self, step: Convolution) -> bool:
        """Whether the convolution runs on the kernel that keeps the best classes of its result alone."""
        known = step.transposed and step.act.code is not None and not step.added
        return known and self.packable(step) and self.has("packed_conv_transpose_argmax") and tiled(step)

    def scored(self, step: Scored) -> tuple[str, Run, list[Op]]:
        conv, kernel = step.conv, torch.ops.segfast.packed_conv_transpose_argmax.default
        packed = self.packed_weights([conv], torch.ops.segfast.pack_conv_transpose.default)
        options = (*geometry_of(conv), conv.act.code, self.classes(step).itemsize)
        return "segfast::packed_conv_transpose_argmax", lambda x: kernel(last_of(x), packed, *options), step.inputs

    def starts(self, step: Convolution, block: Block) -> bool:
        """Whether both run on the kernel in which the rows of the first go to the block's as they come."""
        packed = step.act.code is not None and few(step) and not step.pointwise and not step.added
        whole = step.weight.shape[0] % 16 == 0
        return packed and whole and self.packable(step) and self.packable(block) and self.has("packed_conv_ds_conv")

    def started(self, step: Started) -> tuple[str, Run, list[Op]]:
        self.owned.add(step.output)
        conv, parts, kernel = step.conv, step.block.parts, torch.ops.segfast.packed_conv_ds_conv.default
        first = self.packed_weights([conv], torch.ops.segfast.pack_conv.default)
        packed = self.packed_weights(parts, torch.ops.segfast.pack_ds_conv.default)
        options = (*geometry_of(conv), conv.act.code, packed, *geometry_of(parts[0]), *(part.act.code for part in parts))
        laid = layout_of(step.inputs[0])
        return "segfast::packed_conv_ds_conv", lambda x: kernel(laid(x), first, *options), step.inputs

    def onednn_convolution(self, step: Convolution) -> tuple[str, Run, list[Op]]:
        shape = step.inputs[0].shape

        def pack():
            weight, bias = (t.to(self.weights.dtype) for t in self.weights.folded(step, self.graph))
            options = (list(step.padding), list(step.stride), list(step.dilation), step.groups, list(shape))
            if step.transposed:
                options = (options[0], list(step.output_padding), *options[1:])
                return torch.ops.mkldnn._reorder_convolution_transpose_weight(weight, *options), bias
            return torch.ops.mkldnn._reorder_convolution_weight(weight, *options), bias

        # Packed for the first size that comes: at another one oneDNN would hardly choose another layout, and could reorder.
        weight, bias = self.weights.get(named(self.graph, step, "onednn"), pack)
        padding, stride, dilation = list(step.padding), list(step.stride), list(step.dilation)
        within = step.act.name in ONEDNN and not step.added
        act = function(IDENTITY if within else step.act)
        name, numbers = (ONEDNN[step.act.name], list(step.act.numbers)) if within else ("none", [])
        if step.transposed:
            kernel = torch.ops.mkldnn._convolution_transpose_pointwise.default
            tail = (weight, bias, padding, list(step.output_padding), stride, dilation, step.groups, name, numbers, "")
            return "oneDNN", lambda x: act(kernel(last_of(x), *tail)), step.inputs
        tail = (weight, bias, padding, stride, dilation, step.groups)
        if not step.added:
            kernel = torch.ops.mkldnn._convolution_pointwise.default
            tail = (*tail, name, numbers, "")
            return "oneDNN", lambda x: act(kernel(last_of(x), *tail)), step.inputs
        tail = (*tail, "add", 1.0, None, [], "")
        if self.overwritable(step.inputs[1], step):
            kernel = torch.ops.mkldnn._convolution_pointwise_.binary
            return "oneDNN, into the map that is added", lambda x, add: act(kernel(last_of(add), last_of(x), *tail)), step.inputs
        kernel = torch.ops.mkldnn._convolution_pointwise.binary
        return "oneDNN", lambda x, add: act(kernel(last_of(x), last_of(add), *tail)), step.inputs

    def aten_convolution(self, step: Convolution) -> tuple[str, Run, list[Op]]:
        dtype = step.output.dtype

        def pack():
            weight, bias = self.weights.folded(step, self.graph)
            return weight.to(dtype).contiguous(memory_format=CHANNELS_LAST), bias.to(dtype)

        weight, bias = self.weights.get(named(self.graph, step, "aten"), pack)
        options = (step.stride, step.padding, step.dilation, step.transposed, step.output_padding or (0, 0), step.groups)
        act = function(step.act)

        def run(x, add=None):
            y = aten.convolution.default(x.contiguous(memory_format=CHANNELS_LAST), weight, bias, *options)
            return act(y if add is None else y.add_(add))

        return "ATen", run, step.inputs

    # -- blocks

    def block(self, step: Block) -> tuple[str, Run, list[Op]]:
        self.owned.add(step.output)
        for who in PREFER[step.kind]:
            if who.startswith("packed_") and self.packable(step) and self.has(who):
                pack = getattr(torch.ops.segfast, who.replace("packed_", "pack_")).default
                return self.packed(step, step.parts, pack, getattr(torch.ops.segfast, who).default)
            known = all(part.act.code < 5 for part in step.parts)
            if who == "ds_conv" and known and self.has(who) and self.large(step):
                made = [self.separable(step, step.parts[-2:])]
                made[:0] = [self.convolution(part) for part in step.parts[:-2]]
                return chain(made, step)
        return chain([self.convolution(part) for part in step.parts], step)

    def chains(self, block: Block) -> bool:
        """Whether the block runs on the kernel that can take a convolution behind it along."""
        return self.packable(block) and self.has("packed_ds_conv_chain")

    def scores(self, last: Convolution) -> bool:
        """Whether that kernel can take this one along: of so few outputs that reading their map again would take longer."""
        outputs, inputs = last.weight.shape[:2]
        fits = last.pointwise and last.act.code is not None and self.packable(last)
        return fits and outputs <= MOST_SCORES and (inputs % 2 == 0 or self.weights.dtype == torch.float32)

    def enlarges(self, block: Block, low: Resize) -> bool:
        """Whether the block's convolutions are better done on the map before its interpolation, a product for each tap."""
        depthwise, last = block.parts
        linear = depthwise.act == IDENTITY and (depthwise.stride, depthwise.dilation) == ((1, 1), (1, 1))
        larger = math.prod(low.output.shape[2:]) / max(1, math.prod(low.inputs[0].shape[2:]))
        suits = last.weight.shape[0] % 16 == 0 and max(depthwise.weight.shape[2:]) <= 8 and self.native(low)
        return linear and suits and self.weights.dtype == torch.float32 and larger >= LARGER * depthwise.taps

    def chain(self, step: Chain) -> tuple[str, Run, list[Op]]:
        self.owned.add(step.output)
        parts, low, last = step.block.parts, step.low, step.last
        pack, conv = torch.ops.segfast.pack_conv.default, torch.ops.segfast.packed_conv.default
        if low is None:
            packed = self.packed_weights(parts, torch.ops.segfast.pack_ds_conv.default)
        else:
            small, packed = self.divided_weights(step)
        scores = None if last is None else self.packed_weights([last], pack)
        options = (*geometry_of(parts[0]), *(part.act.code for part in parts))
        corners, act = low is not None and low.align_corners, 0 if last is None else last.act.code
        kernel = torch.ops.segfast.packed_ds_conv_chain.default

        def run(x, below=None):
            z = None if below is None else conv(last_of(below), small, [1, 1], [0, 0], [1, 1], 0, None)
            return kernel(last_of(x), packed, *options, z, corners, scores, act)

        return "segfast::packed_ds_conv_chain", run, step.inputs

    def divided_weights(self, step: Chain) -> tuple[Tensor, Tensor]:
        """Of a block that reads an interpolated map and another: the products of the small map, one for each tap and output, and
        the block of the other map, with what the depthwise bias of the first comes to."""
        parts, channels = step.block.parts, step.low.output.shape[1]

        def make():
            (depthwise, dw_bias), (pointwise, bias) = (self.weights.folded(part, self.graph) for part in parts)
            cut = channels if step.place == 0 else len(depthwise) - channels
            first, second = slice(None, cut), slice(cut, None)
            low, rest = (first, second) if step.place == 0 else (second, first)
            taps = torch.einsum("kc,ct->tkc", pointwise[:, low, 0, 0], depthwise[low, 0].flatten(1)).flatten(0, 1)
            total = bias + pointwise[:, low, 0, 0] @ dw_bias[low]
            block = (depthwise[rest], dw_bias[rest], pointwise[:, rest], total)
            small = torch.ops.segfast.pack_conv(taps[:, :, None, None].float(), torch.zeros(len(taps)), 1, self.weights.dtype)
            return small, torch.ops.segfast.pack_ds_conv(*(t.float().contiguous() for t in block), self.weights.dtype)

        names = [named(self.graph, part) for part in parts]
        return self.weights.get(None if None in names else (*names[0], *names[1], "divided", step.place, channels), make)

    def large(self, step: Block) -> bool:
        if not self.onednn:
            return True
        n, channels, height, width = step.parts[-1].inputs[0].shape
        return n * channels * height * width * step.output.shape[1] >= DS_CONV_FROM[self.weights.dtype]

    def separable(self, step: Block, parts: list[Convolution]) -> tuple[str, Run, list[Op]]:
        """Depthwise and pointwise by the differentiable kernel's forward, which packs its weights at every call."""
        depthwise, last = parts

        def pack():
            weights = [self.weights.folded(part, self.graph) for part in parts]
            return [t.to(self.weights.dtype).contiguous() for pair in weights for t in pair]

        names = [named(self.graph, part) for part in parts]
        packed = self.weights.get(None if None in names else (*names[0], *names[1], "ds_conv"), pack)
        none = (None, None, None, None, 0.0)
        act = IDENTITY if last.added else last.act
        options = (depthwise.stride, depthwise.padding, depthwise.dilation, depthwise.act.code, act.code)
        kernel = torch.ops.segfast.ds_conv.default
        tail = (packed[0], packed[1], *none, packed[2], packed[3], *none, *options)
        after = function(last.act)

        def run(x, add=None):
            y = kernel(x.contiguous(memory_format=CHANNELS_LAST), *tail)
            return y if add is None else after(y.add_(add))

        return "segfast::ds_conv", run, step.inputs

    # -- the rest

    def concat(self, step: Concat) -> tuple[str, Run, list[Op]]:
        self.owned.add(step.output)
        maps = len(step.inputs) - step.added
        scale = shift = slope = None
        if step.norm is not None:
            scale, shift = self.weights.scale(step.norm, self.graph)
        if step.slope is not None:
            slope = self.weights.exact(step.slope, self.graph).expand(step.output.shape[1])
        if self.has("concat_affine") and self.native(step):
            kernel = torch.ops.segfast.concat_affine.default
            floats = [None if v is None else v.float().contiguous() for v in (scale, shift, slope)]
            relu = step.act.name == "relu"

            def run(*xs):
                return kernel(xs[:maps], xs[maps] if step.added else None, *floats, relu)

            return "segfast::concat_affine", run, step.inputs
        dtype = step.output.dtype
        scale, shift, slope = (None if v is None else v.to(dtype).view(1, -1, 1, 1) for v in (scale, shift, slope))
        act = function(step.act)

        def plain(*xs):
            x = torch.cat(xs[:maps], 1)  # of one too: what follows may be in place
            x = x + xs[maps] if step.added else x
            x = x if scale is None else torch.addcmul(shift, x, scale)
            return act(x) if slope is None else torch.where(x < 0, x * slope, x)

        return "ATen", plain, step.inputs

    def resize(self, step: Resize) -> tuple[str, Run, list[Op]]:
        self.owned.add(step.output)
        x, size, align_corners = step.inputs[0], step.size, step.align_corners
        shape = step.output.shape
        if x.shape == shape:
            self.owned.discard(step.output)
            return "nothing: the same size", lambda x: x, step.inputs
        if x.shape[2:] == (1, 1) and 0 not in shape:  # its layout says nothing; a map that is not channels_last costs its readers
            return "ATen, expanded", lambda x: x.expand(shape).contiguous(memory_format=CHANNELS_LAST), step.inputs
        if self.has("resize") and self.native(step):
            kernel = torch.ops.segfast.resize.default
            between = step.output.users != [None]  # a network's own result is planar, as most who read it want it
            return "segfast::resize", lambda x: kernel(x, size, align_corners, between), step.inputs
        kernel = aten.upsample_bilinear2d.out

        def run(x):
            return kernel(x, size, align_corners, None, None, out=_backend.empty(shape, x))

        return "ATen, into large pages", run, step.inputs

    def repeat(self, step: Repeat) -> tuple[str, Run, list[Op]]:
        self.owned.add(step.output)
        if self.has("repeat_pixels") and self.native(step):
            kernel = torch.ops.segfast.repeat_pixels.default
            return "segfast::repeat_pixels", lambda x: kernel(x, *step.factors), step.inputs
        return "ATen", lambda x: aten.upsample_nearest2d.default(x, step.output.shape[2:]), step.inputs

    def recode(self, step: Recode) -> tuple[str, Run, list[Op]]:
        self.owned.add(step.output)
        op, scale, zero = f"{step.kind}_map", step.scale, step.zero
        if self.has(op):
            kernel = getattr(torch.ops.segfast, op).default
            return f"segfast::{op}", lambda x: kernel(x, scale, zero), step.inputs
        target = step.output.target
        return "ATen", lambda x: target(x, scale, zero, 0, 255, torch.uint8), step.inputs

    def head(self, step: Head) -> tuple[str, Run, list[Op]]:
        size, align_corners = step.size, step.align_corners
        dtype = self.classes(step)
        if not self.has("upsample_argmax"):

            def run(x):
                y = aten.upsample_bilinear2d.vec(x.float(), size, align_corners, None)
                return y.argmax(1).to(dtype)

            return "ATen", run, step.inputs
        kernel, bytes = torch.ops.segfast.upsample_argmax.default, dtype.itemsize
        return "segfast::upsample_argmax", lambda x: kernel(x, size, align_corners, bytes, False)[0], step.inputs

    def classes(self, step: Head | Argmax | Scored) -> torch.dtype:
        """int64 where the network itself goes on to use the classes."""
        if self.class_dtype is None or step.output.users != [None]:
            return torch.int64
        scores = step.conv.output if isinstance(step, Scored) else step.inputs[0]
        classes = scores.shape[1]
        if classes > torch.iinfo(self.class_dtype).max + 1:
            raise ValueError(f"optimize: want a class_dtype that numbers {classes} classes, got {self.class_dtype}")
        return self.class_dtype

    def argmax(self, step: Argmax) -> tuple[str, Run, list[Op]]:
        dtype = self.classes(step)
        if self.has("argmax"):
            kernel, bytes = torch.ops.segfast.argmax.default, dtype.itemsize
            return "segfast::argmax", lambda x: kernel(x, bytes), step.inputs
        return "ATen", lambda x: x.argmax(1).to(dtype), step.inputs

    def shuffle(self, step: Shuffle) -> tuple[str, Run, list[Op]]:
        self.owned.add(step.output)
        groups = step.groups
        if len(step.inputs) > 1:
            if self.has("concat_shuffle"):
                kernel = torch.ops.segfast.concat_shuffle.default
                return "segfast::concat_shuffle", lambda *x: kernel(last(x), groups), step.inputs
            return "ATen", lambda *x: aten.channel_shuffle.default(torch.cat(x, 1), groups), step.inputs
        if self.has("channel_shuffle"):
            kernel = torch.ops.segfast.channel_shuffle.default
            return "segfast::channel_shuffle", lambda x: kernel(x, groups), step.inputs
        return "ATen", lambda x: aten.channel_shuffle.default(x, groups), step.inputs

    def aten(self, step: Aten) -> tuple[str, Run, list[Op]]:
        op = step.output
        target = op.target
        if op.kind in FRESH:
            self.owned.add(op)
        if op.kind in IN_PLACE and op.args and isinstance(op.args[0], Op):
            args = list(op.args)
            commutes = op.kind in ("add", "mul") and op.kwargs.get("alpha", 1) == 1 and len(args) == 2 and isinstance(args[1], Op)
            if commutes and not self.overwritable(args[0], step):
                args.reverse()
            if self.overwritable(args[0], step) and args[0].value == op.value:
                packet = getattr(aten, f"{op.kind}_")
                return self.call(step, getattr(packet, target._overloadname), tuple(args), "ATen, in place")
        batch = op.args and isinstance(op.args[0], Op) and len(op.args[0].shape or ()) == 4
        if op.kind == "max_pool2d" and batch and self.has("max_pool") and self.native(step):
            windows, pool = windows_of(op), torch.ops.segfast.max_pool.default  # without the indices that PyTorch's computes
            return "segfast::max_pool", lambda x: pool(x, *windows), [op.args[0]]
        if op.kind == "matmul" and all(isinstance(a, Op) and a.shape for a in op.args):
            # Of pooling by matrices: ATen goes over a channels_last map channel by channel.
            return "ATen", lambda *xs: target(*(x.contiguous() for x in xs)), operands(op)
        if op.kind == "group_norm" and batch:
            target = group_norm
        if op.kind == "view" and target._overloadname == "default":
            target = aten.reshape.default  # the map may lie in memory otherwise than in the graph
        return self.call(step, target, op.args, "ATen")

    def call(self, step: Aten, target, args: tuple, how: str) -> tuple[str, Run, list[Op]]:
        names: dict[str, object] = {"target": target}
        inputs: list[Op] = []

        def written(value) -> str:
            if isinstance(value, Op) and value not in self.graph.tensors:
                if value not in inputs:
                    inputs.append(value)
                return f"x{inputs.index(value)}"
            if isinstance(value, list | tuple):
                inner = "".join(f"{written(v)}, " for v in value)
                return f"[{inner}]" if isinstance(value, list) else f"({inner})"
            name = f"c{len(names)}"
            names[name] = self.graph.tensors[value] if isinstance(value, Op) else value
            return name

        parts = [written(a) for a in args] + [f"{k}={written(v)}" for k, v in step.output.kwargs.items()]
        signature = ", ".join(f"x{i}" for i in range(len(inputs)))
        return how, eval(f"lambda {signature}: target({', '.join(parts)})", names), inputs


FRESH = {
    "_adaptive_avg_pool2d", "adaptive_avg_pool2d", "add", "avg_pool2d", "cat", "conv2d", "convolution", "div", "elu", "exp",
    "gelu", "group_norm", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "max_pool2d", "mean", "mul", "pixel_shuffle",
    "prelu", "relu", "relu6", "sigmoid", "silu", "softmax", "sub", "tanh", "upsample_bicubic2d", "upsample_nearest2d",
    "segfast::packed_int8",
}  # fmt: skip
IN_PLACE = {"add", "div", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "mul", "relu", "sigmoid", "silu", "sub", "tanh"}


def chain(made: list[tuple[str, Run, list[Op]]], step: Step) -> tuple[str, Run, list[Op]]:
    """One after the other; what is added goes to the last."""
    *before, final = [run for _, run, _ in made]

    def run(x, *add):
        for part in before:
            x = part(x)
        return final(x, *add)

    return ", ".join(how for how, _, _ in made), final if not before else run, step.inputs


def group_norm(x: Tensor, groups: int, *others, **options) -> Tensor:
    """PyTorch's, of a map around its groups' means: its variance of a channels_last one is mean(x^2) - mean(x)^2, in float32."""
    if x.dtype == torch.float32 and x.is_cpu and not x.is_contiguous():
        n, c = x.shape[:2]
        means = x.mean((2, 3)).view(n, groups, -1).mean(2, keepdim=True).expand(n, groups, c // groups)
        x = x - means.reshape(n, c, 1, 1)
    return aten.group_norm.default(x, groups, *others, **options)


def last(tensors: tuple) -> list[Tensor]:
    return [last_of(x) for x in tensors]


def last_of(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=CHANNELS_LAST)


def layout_of(x: Op) -> Callable[[Tensor], Tensor]:
    """To what the kernel of a dense convolution reads: of an odd number of channels, as an image has, any layout."""
    return (lambda t: t) if x.shape[1] % 2 else last_of


def function(act: Activation) -> Callable[[Tensor], Tensor]:
    """The activation in place."""
    name, numbers = act
    if not name:
        return lambda x: x
    if name == "gelu":
        return lambda x: torch.nn.functional.gelu(x, approximate=numbers[0])
    kernel = getattr(aten, f"{name}_").default
    return lambda x: kernel(x, *numbers)
