"""The int8 kernels in a PT2E graph: convolutions between pairs of quantise and dequantise become uint8 in, uint8 out."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from segfast.ops._packed import Int8Conv, int8_block
from segfast.ops.ds_conv import MAX_TAPS

aten = torch.ops.aten
BYTES = (0, 255, torch.uint8)


class Int8Block(nn.Module):
    """`int8_block` as a module of the lowered graph: uint8 maps in and out."""

    def __init__(self, found: Found):
        super().__init__()
        self.found = found
        self.run = int8_block(
            found.scale, found.zero, found.convs, stride=found.stride, padding=found.padding, dilation=found.dilation,
            groups=found.groups,
        )  # fmt: skip

    def forward(self, x: Tensor, *add) -> Tensor:
        return self.run(x, *add)


@dataclass
class Found:
    """Convolutions and what they read: a uint8 node with its scale and zero point, and one that is added."""

    x: fx.Node
    scale: float
    zero: int
    convs: list[Int8Conv]
    stride: tuple = (1, 1)
    padding: tuple = (0, 0)
    dilation: tuple = (1, 1)
    groups: int = 1
    add: tuple = field(default=())

    @property
    def pointwise(self) -> bool:
        size = self.convs[0].weight.shape[2:]
        plain = self.stride == (1, 1) and self.padding == (0, 0) and self.groups == 1
        return len(self.convs) == 1 and plain and tuple(size) == (1, 1)

    @property
    def depthwise(self) -> bool:
        return len(self.convs) == 1 and self.groups > 1


def lower_int8(quantized: fx.GraphModule) -> fx.GraphModule:
    """A copy of a PT2E-quantised graph (`convert_pt2e`) whose quantised convolutions run on the int8 kernels.

    A convolution (dense, or depthwise) of a uint8 map by int8 weights a channel, with its ReLU or ReLU6 and the quantised map
    that is added, becomes one call; a depthwise and a 1x1 one, or a 1x1, a depthwise and a 1x1 one, whose maps nothing else
    reads, become one call too. All else runs as it was. A result is the graph's own but for the
    rounding of values within float32's error of a half.

    `segfast.deploy.Quantized` has such a graph as `graph`: `lowered = lower_int8(quantized.graph)` takes its place for
    inference on the CPU. `lowered.int8_calls` says how many convolutions each call has.
    """
    module = copy.deepcopy(quantized)
    graph = module.graph
    for node in list(graph.nodes):
        if is_op(node, aten.dropout.default) and node.args[2] is False:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    found = {node: match for node in graph.nodes if (match := convolution(node, module)) is not None}
    for last in list(found):
        if last not in found or not found[last].pointwise:
            continue
        before = sole(found, found[last].x)
        if before is None or not before.depthwise or before.add:
            continue
        match, taken = found[last], [found[last].x]
        first = sole(found, before.x)
        convs, start = [*before.convs, *match.convs], before
        if first is not None and first.pointwise and not first.add:
            convs, start = [*first.convs, *convs], first
            taken.append(before.x)
        for node in taken:
            del found[node]
        found[last] = Found(
            start.x, start.scale, start.zero, convs, before.stride, before.padding, before.dilation, before.groups, match.add
        )
    module.int8_calls = [len(match.convs) for match in found.values()]
    for number, (node, match) in enumerate(found.items()):
        module.add_submodule(f"int8_{number}", Int8Block(match))
        with graph.inserting_before(node):
            call = graph.call_module(f"int8_{number}", (match.x, *match.add))
        node.replace_all_uses_with(call)
        for other in found.values():  # what reads the node by its name
            other.x = call if other.x is node else other.x
            other.add = tuple(call if a is node else a for a in other.add)
        graph.erase_node(node)
    for node in list(graph.nodes):
        if named(node, "dequantize_per_channel") and constant(node.args[0], module) is not None:
            with torch.no_grad():
                weight = node.target(*(constant(v, module) if isinstance(v, fx.Node) else v for v in node.args))
            module.register_buffer(f"{node.name}_value", weight)
            with graph.inserting_before(node):
                value = graph.get_attr(f"{node.name}_value")
            node.replace_all_uses_with(value)
            graph.erase_node(node)
    graph.eliminate_dead_code()
    module.recompile()
    return module


def named(node, name: str) -> bool:
    return (
        isinstance(node, fx.Node) and node.op == "call_function" and str(node.target).startswith(f"quantized_decomposed.{name}.")
    )


def is_op(node, *targets) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def is_relu6(node) -> bool:
    if is_op(node, aten.hardtanh.default, aten.hardtanh_.default):
        return tuple(node.args[1:]) == (0, 6)
    return is_op(node, aten.relu6.default)


def sole(found: dict[fx.Node, Found], node: fx.Node) -> Found | None:
    """What gives a node that one convolution alone reads."""
    readers = list(node.users)
    return found.get(node) if len(readers) == 1 and len(readers[0].users) == 1 else None


def constant(node, module: nn.Module) -> Tensor | None:
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    value = module
    for name in node.target.split("."):
        value = getattr(value, name)
    return value.detach()


def dequantized(node) -> tuple | None:
    """(uint8 node, scale, zero point)."""
    if not named(node, "dequantize_per_tensor") or tuple(node.args[3:6]) != BYTES or not isinstance(node.args[1], float):
        return None
    return node.args[0], float(node.args[1]), int(node.args[2])


def convolution(node: fx.Node, module: nn.Module) -> Found | None:
    """The convolution whose result a node quantises, with all between them."""
    if not named(node, "quantize_per_tensor") or tuple(node.args[3:6]) != BYTES or not isinstance(node.args[1], float):
        return None
    out_scale, out_zero, at, act, add = float(node.args[1]), int(node.args[2]), node.args[0], 0, ()

    def alone(x) -> bool:
        return isinstance(x, fx.Node) and len(x.users) == 1

    if is_op(at, aten.relu.default, aten.relu_.default) and alone(at):
        act, at = 1, at.args[0]
    elif is_relu6(at) and alone(at):
        act, at = 2, at.args[0]
    if is_op(at, aten.add.Tensor, aten.add_.Tensor) and alone(at) and not at.kwargs and len(at.args) == 2:
        for conv, other in (at.args, at.args[::-1]):
            if is_op(conv, aten.conv2d.default) and alone(conv) and dequantized(other) is not None and same_shape(conv, other):
                at, add = conv, dequantized(other)
                break
    if not is_op(at, aten.conv2d.default) or not alone(at):
        return None
    defaults = (None, (1, 1), (0, 0), (1, 1), 1)
    x, weight, *rest = at.args
    bias, stride, padding, dilation, groups = (*rest, *defaults[len(rest) :])
    source = dequantized(x)
    if source is None or not named(weight, "dequantize_per_channel") or any(isinstance(v, str) for v in (stride, padding)):
        return None
    w, scales, zeros = (constant(v, module) for v in weight.args[:3])
    b = torch.zeros(len(w)) if bias is None and w is not None else constant(bias, module)
    if any(v is None for v in (w, scales, zeros, b)) or weight.args[3] != 0 or w.dtype != torch.int8 or bool(zeros.any()):
        return None
    depthwise = groups == w.shape[0] and w.shape[1] == 1
    if w.dim() != 4 or (groups != 1 and not depthwise) or w.shape[2] * w.shape[3] > MAX_TAPS or w[0].numel() > 32768:
        return None
    conv = Int8Conv(w, scales.float(), b.float(), act, out_scale, out_zero)
    return Found(*source, [conv], tuple(stride), tuple(padding), tuple(dilation), groups, add)


def same_shape(a: fx.Node, b: fx.Node) -> bool:
    shapes = [shape(n) for n in (a, b)]
    return shapes[0] is not None and shapes[0] == shapes[1]


def shape(node: fx.Node) -> torch.Size | None:
    """What the graph notes of a node; of quantising, which came later, of what it applies to."""
    while "val" not in node.meta and (named(node, "quantize_per_tensor") or named(node, "dequantize_per_tensor")):
        node = node.args[0]
    return getattr(node.meta.get("val"), "shape", None)
