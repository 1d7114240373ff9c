"""Which operations of a graph run together: convolutions with what follows them, blocks of convolutions, shuffles, the head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from segfast.ops.ds_conv import MAX_TAPS
from segfast.optimize._capture import Graph, Op, operands

Pair = tuple[int, int]


class Activation(NamedTuple):
    """An element-wise function by PyTorch's name, and its numbers."""

    name: str
    numbers: tuple = ()

    @property
    def code(self) -> int | None:
        """Its number in the packed kernels; None: they lack it. Those before 5 are segfast.ops.ds_conv.ACTIVATIONS."""
        if self.name == "hardtanh":
            return 2 if tuple(self.numbers) == (0, 6) else None
        if self.name == "leaky_relu":
            return 5 if tuple(self.numbers) == (0.01,) else None
        return {"": 0, "relu": 1, "silu": 3, "hardswish": 4}.get(self.name)


IDENTITY = Activation("")


def pixels(x: Op) -> int:
    """Of a batch of maps."""
    n, _, h, w = x.shape
    return n * h * w


@dataclass(eq=False)
class Step:
    """What runs as one: `covers` in order, the last of them being the result."""

    covers: list[Op]
    inputs: list[Op]
    kind = "aten"
    between = 0  # elements of the map that a step of two kernels hands from one to the other

    @property
    def output(self) -> Op:
        return self.covers[-1]


@dataclass(eq=False)
class Convolution(Step):
    """activation(convolution(x) + bias + add), BatchNorm folded: x is the first of `inputs`, add, if any, the second."""

    weight: Op
    bias: Op | None
    norms: list[tuple]  # (mean, variance, weight, bias, eps), the first three or so operations
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int
    output_padding: Pair | None = None  # of a transposed convolution
    act: Activation = IDENTITY
    added: bool = False

    @property
    def kind(self) -> str:
        name = "conv_transpose" if self.transposed else "depthwise" if self.depthwise else "conv"
        parts = [
            name,
            *(["bn"] if self.norms else []),
            *(["add"] if self.added else []),
            *([self.act.name] if self.act.name else []),
        ]
        return "+".join(parts)

    @property
    def transposed(self) -> bool:
        return self.output_padding is not None

    @property
    def depthwise(self) -> bool:
        shape = self.weight.shape
        return not self.transposed and self.groups == shape[0] > 1 and shape[1] == 1 and self.inputs[0].shape[1] == self.groups

    @property
    def dense(self) -> bool:
        return self.groups == 1 and not self.transposed

    @property
    def of_pixels(self) -> bool:
        """Each pixel of the result comes from that pixel alone."""
        return self.weight.shape[2:] == (1, 1) and self.stride == (1, 1) and self.padding == (0, 0) and not self.transposed

    @property
    def pointwise(self) -> bool:
        return self.dense and self.of_pixels

    @property
    def grouped(self) -> bool:
        """Pointwise in several groups, of more than a channel each."""
        return self.groups > 1 and self.of_pixels and not self.depthwise

    @property
    def taps(self) -> int:
        return self.weight.shape[2] * self.weight.shape[3]

    @property
    def tensors(self) -> list[Op]:
        """The constants that it is made of."""
        norms = [t for norm in self.norms for t in norm[:4]]
        return [t for t in (self.weight, self.bias, *norms) if t is not None]


@dataclass(eq=False)
class Block(Step):
    """Convolutions of which each reads the one before alone: depthwise and pointwise, or pointwise, depthwise and pointwise."""

    parts: list[Convolution]

    @property
    def kind(self) -> str:
        return "inverted_residual" if len(self.parts) == 3 else "ds_conv"


@dataclass(eq=False)
class Concat(Step):
    """activation(BatchNorm(concatenation + add)) that follows no convolution, each of them optional; add is the last input."""

    added: bool = False
    norm: tuple | None = None
    act: Activation = IDENTITY
    slope: Op | None = None  # of a PReLU

    @property
    def kind(self) -> str:
        parts = [
            *(["cat"] if len(self.inputs) - self.added > 1 else []),
            *(["add"] if self.added else []),
            *(["batch_norm"] if self.norm else []),
            *(["relu"] if self.act.name else ["prelu"] if self.slope else []),
        ]
        return "+".join(parts)


@dataclass(eq=False)
class Resize(Step):
    """Bilinear interpolation."""

    size: Pair
    align_corners: bool
    kind = "resize"


@dataclass(eq=False)
class Repeat(Step):
    """Nearest interpolation by whole factors."""

    factors: Pair
    kind = "resize_nearest"


@dataclass(eq=False)
class Joined(Step):
    """A convolution that reads its map in pieces, which nobody writes as one: x, its pixels repeated, and the channels of another
    map behind its own if `more`. Those two and what is added, if anything, are `inputs`."""

    conv: Convolution
    factors: Pair
    more: bool

    @property
    def kind(self) -> str:
        parts = [*(["resize_nearest"] if self.factors != (1, 1) else []), *(["cat"] if self.more else []), self.conv.kind]
        return "+".join(parts)


@dataclass(eq=False)
class Pooled(Step):
    """A convolution and the max-pooling that alone reads it."""

    conv: Convolution

    @property
    def kind(self) -> str:
        return f"{self.conv.kind}+max_pool"


@dataclass(eq=False)
class Swapped(Step):
    """Interpolation and the 1x1 convolution without an activation that alone reads it: both are linear, and the other way round
    there are fewer pixels to convolve, and fewer channels to interpolate."""

    low: Resize
    conv: Convolution

    @property
    def kind(self) -> str:
        return f"{self.low.kind}+{self.conv.kind}"

    @property
    def between(self) -> int:
        return self.conv.weight.shape[0] * pixels(self.low.inputs[0])


@dataclass(eq=False)
class Scored(Step):
    """A convolution and the best class of every pixel of its result, which nobody else reads."""

    conv: Convolution

    @property
    def kind(self) -> str:
        return f"{self.conv.kind}+argmax"


@dataclass(eq=False)
class Started(Step):
    """A convolution and the separable block that alone reads it."""

    conv: Convolution
    block: Block

    @property
    def kind(self) -> str:
        return f"{self.conv.kind}+{self.block.kind}"


@dataclass(eq=False)
class Chain(Step):
    """A separable block and what it is drawn together with, so that the maps between are never whole: before it the concatenation
    of an interpolated map, number `place` of the two, with another; behind it a pointwise convolution to few channels, such as
    the class scores. `inputs` are the other map, or what the block reads, and the small map."""

    block: Block
    low: Resize | None
    place: int
    last: Convolution | None

    @property
    def kind(self) -> str:
        before = ["resize", "cat"] if self.low else []
        return "+".join([*before, self.block.kind, *([self.last.kind] if self.last else [])])

    @property
    def between(self) -> int:
        depthwise, last = self.block.parts
        return depthwise.taps * last.weight.shape[0] * pixels(self.low.inputs[0]) if self.low else 0


@dataclass(eq=False)
class Recode(Step):
    """A float map to uint8, or back."""

    scale: float
    zero: int

    @property
    def kind(self) -> str:
        return "quantize" if self.output.dtype == torch.uint8 else "dequantize"


@dataclass(eq=False)
class Head(Resize):
    """Bilinear interpolation and the best class of every pixel."""

    kind = "upsample_argmax"


@dataclass(eq=False)
class Argmax(Step):
    """The best class of every pixel."""

    kind = "argmax"


@dataclass(eq=False)
class Shuffle(Step):
    """Concatenation, if of several, and channel shuffle."""

    groups: int

    @property
    def kind(self) -> str:
        return "concat_shuffle" if len(self.inputs) > 1 else "channel_shuffle"


@dataclass(eq=False)
class Aten(Step):
    """One operation as it was."""

    reason: str = ""


def match(graph: Graph) -> list[Step]:
    """The steps of a graph in the order in which they can run."""
    taken: dict[Op, Step] = {}
    reasons: dict[Op, str] = {}

    def take(step: Step | None) -> None:
        if step is not None:
            taken.update(dict.fromkeys(step.covers, step))

    free = Free(graph, taken)
    for op in graph.ops:
        if op.kind == "argmax":
            take(head(op, free))
    for op in reversed(graph.ops):  # of two convolutions that are summed the later one adds: the earlier is there by then
        if op not in taken and op.kind in ("conv2d", "convolution", "conv_transpose2d"):
            step = convolution(op, free, graph)
            take(step if isinstance(step, Step) else None)
            if isinstance(step, str):
                reasons[op] = step
    for op in graph.ops:
        if op in taken:
            continue
        if op.kind in ("cat", "view", "reshape", "channel_shuffle", "native_channel_shuffle"):
            take(shuffle(op, free))
        elif op.kind == "upsample_bilinear2d":
            take(resize(op))
        elif op.kind == "upsample_nearest2d":
            take(repeat(op))
        elif op.kind.startswith("quantized_decomposed::"):
            take(recode(op))
        if op not in taken and op.kind in ("cat", "prelu", *NORMS):
            take(concat(op, free, graph))
    # Depthwise and pointwise first: in a row of such pairs the pointwise before a depthwise belongs to the pair before.
    for grown in (separable, inverted):
        for step in dict.fromkeys(taken.values()):
            take(grown(step, taken))
    for op in graph.ops:
        if op not in taken:
            take(Aten([op], operands(op), reasons.get(op) or why(op)))
    place = {op: i for i, op in enumerate(graph.ops)}
    return sorted(dict.fromkeys(taken.values()), key=lambda step: place[step.output])


def why(op: Op) -> str:
    if op.kind in NORMS:
        return "its statistics are the batch's, or it normalises no maps"
    if activation(op) is not None:
        return "what it applies to is no convolution's result, or is read elsewhere too"
    if op.kind == "argmax":
        return "not over the classes of a batch of maps"
    if op.kind.startswith("upsample_bilinear2d"):
        return "its scale factors are not the ratio of the sizes"
    return "no kernel of its own"


class Free:
    """Asks what comes after an operation whose result nothing else reads."""

    def __init__(self, graph: Graph, taken: dict[Op, Step]):
        self.graph, self.taken = graph, taken

    def next(self, op: Op) -> Op | None:
        only = op.users[0] if len(op.users) == 1 else None
        return only if only is not None and only not in self.taken else None


NORMS = ("batch_norm", "_native_batch_norm_legit_no_training", "_batch_norm_no_update", "native_batch_norm", "cudnn_batch_norm")


def norm(op: Op | None, graph: Graph) -> tuple | None:
    """(mean, variance, weight, bias, eps) of a BatchNorm with fixed statistics."""
    if op is None or op.kind not in NORMS:
        return None
    if op.kind == "batch_norm":
        weight, bias, mean, variance, training, _, eps = op.args[1:8]
        if training:
            return None
    elif op.kind == "_native_batch_norm_legit_no_training":
        weight, bias, mean, variance, _, eps = op.args[1:7]
    else:
        return None
    known = [t for t in (mean, variance, weight, bias) if t is not None]
    if mean is None or variance is None or any(t not in graph.tensors for t in known) or len(op.args[0].shape) != 4:
        return None
    return mean, variance, weight, bias, eps


def activation(op: Op | None) -> Activation | None:
    if op is None or not op.args or op.value != getattr(op.args[0], "value", None):
        return None
    numbers = tuple(op.args[1:])
    if op.kind in ("relu", "silu", "hardswish", "sigmoid", "tanh", "hardsigmoid") and not numbers:
        return Activation(op.kind)
    if op.kind == "relu6":
        return Activation("hardtanh", (0, 6))
    if op.kind in ("hardtanh", "clamp"):
        low, high = (*numbers, *((-1, 1) if op.kind == "hardtanh" else (None, None))[len(numbers) :])[:2]
        if low == 0 and high is None:
            return Activation("relu")
        if low is not None and high is not None and low > high:  # all of it is high
            return None
        return Activation("hardtanh", (low, high)) if all(isinstance(v, int | float) for v in (low, high)) else None
    if op.kind == "clamp_min" and numbers == (0,):
        return Activation("relu")
    if op.kind == "leaky_relu":
        return Activation("leaky_relu", numbers or (0.01,))
    if op.kind == "gelu":
        return Activation("gelu", (op.kwargs.get("approximate", "none"),))
    return None


def two(value, default: int) -> Pair:
    values = [value] if isinstance(value, int) else list(value) if value is not None else []
    return tuple((values or [default]) * (1 if len(values) == 2 else 2))


def convolution(op: Op, free: Free, graph: Graph) -> Convolution | str:
    """The step of a convolution and what it takes along, or why there is none."""
    args = dict(zip(PARAMETERS[op.kind], op.args)) | op.kwargs
    x, weight, bias = args["input"], args["weight"], args.get("bias")
    if not isinstance(x, Op) or x.shape is None or len(x.shape) != 4 or len(weight.shape) != 4:
        return "not a batch of maps"
    if weight not in graph.tensors or (bias is not None and bias not in graph.tensors):
        return "its weights are worked out from the input"
    stride, dilation = two(args.get("stride"), 1), two(args.get("dilation"), 1)
    padding, output_padding = args.get("padding", 0), None
    if isinstance(padding, str):
        reach = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:])]
        if padding == "same" and any(r % 2 for r in reach):
            return "padding='same' is uneven here"
        padding = [r // 2 if padding == "same" else 0 for r in reach]
    if op.kind == "conv_transpose2d" or args.get("transposed"):
        output_padding = two(args.get("output_padding"), 0)
    step = Convolution([op], [x], weight, bias, [], stride, two(padding, 0), dilation, args.get("groups", 1), output_padding)
    following = norm(free.next(op), graph)
    if following is not None and free.next(op).args[0] is op:
        step.covers.append(free.next(op))
        step.norms.append(following)
    extend(step, free)
    return step


PARAMETERS = {
    "conv2d": ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    "conv_transpose2d": ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"),
    "convolution": (
        "input", "weight", "bias", "stride", "padding", "dilation", "transposed", "output_padding", "groups",
    ),
}  # fmt: skip


def extend(step: Convolution, free: Free) -> None:
    """Take along an addition of an equal map, and the activation at the end."""
    if not step.transposed:
        add(step, free)
    following = free.next(step.output)
    act = activation(following)
    if act is not None:
        step.covers.append(following)
        step.act = act


def add(step: Convolution | Concat, free: Free) -> None:
    following = free.next(step.output)
    if following is not None and following.kind == "add":
        others = [a for a in following.args[:2] if a is not step.output]
        scale = following.kwargs.get("alpha", 1)
        if (
            len(others) == 1
            and isinstance(others[0], Op)
            and others[0].value == step.output.value == following.value
            and scale == 1
        ):
            step.covers.append(following)
            step.inputs.append(others[0])
            step.added = True


def separable(step: Step, taken: dict[Op, Step]) -> Block | None:
    """A depthwise convolution, not too large for the kernels, and the pointwise one that alone reads it."""
    if not isinstance(step, Convolution) or not step.depthwise or step.added or step.act.code is None or step.taps > MAX_TAPS:
        return None
    after = sole_reader(step, taken)
    if not isinstance(after, Convolution) or not after.pointwise or after.inputs[0] is not step.output or after.act.code is None:
        return None
    if step.output in after.inputs[1:]:
        return None
    return Block([*step.covers, *after.covers], [*step.inputs, *after.inputs[1:]], [step, after])


def inverted(step: Step, taken: dict[Op, Step]) -> Block | None:
    """Such a pair and the pointwise convolution that it alone reads."""
    if not isinstance(step, Block) or len(step.parts) != 2:
        return None
    before = taken.get(step.inputs[0])
    if not isinstance(before, Convolution) or not before.pointwise or before.added or before.act.code is None:
        return None
    if sole_reader(before, taken) is not step or step.inputs[0] in step.inputs[1:]:
        return None
    return Block([*before.covers, *step.covers], [*before.inputs, *step.inputs[1:]], [before, *step.parts])


def sole_reader(step: Step, taken: dict[Op, Step]) -> Step | None:
    users = step.output.users
    return taken.get(users[0]) if len(users) == 1 and users[0] is not None else None


def concat(op: Op, free: Free, graph: Graph) -> Concat | None:
    if op.shape is None or len(op.shape) != 4:
        return None
    inputs = concatenated(op) if op.kind == "cat" else [op.args[0]]
    if inputs is None:
        return None
    step = Concat([op], inputs)
    if op.kind == "cat":
        add(step, free)
        op = free.next(step.output)
    found = norm(op, graph)
    if found is not None and (op is step.output or op.args[0] is step.output):
        step.norm = found
        if op is not step.output:
            step.covers.append(op)
        op = free.next(op)
    slope = prelu(op, graph)
    if step.norm is None and slope is None and op is step.output:
        return None
    if slope is not None:
        step.slope = slope
    elif op is not None and activation(op) == Activation("relu"):
        step.act = Activation("relu")
    if (step.slope or step.act.name) and op is not step.output:
        step.covers.append(op)
    return step


class Abilities(Protocol):
    """What the kernels at hand can draw together."""

    def reads_pieces(self, step: Convolution) -> bool: ...
    def pools(self, step: Convolution, pool: Step) -> bool: ...
    def classifies(self, step: Convolution) -> bool: ...
    def swaps(self, low: Resize, conv: Convolution) -> bool: ...
    def starts(self, step: Convolution, block: Block) -> bool: ...
    def chains(self, block: Block) -> bool: ...
    def scores(self, last: Convolution) -> bool: ...
    def enlarges(self, block: Block, low: Resize) -> bool: ...


def join(steps: list[Step], able: Abilities) -> list[Step]:
    """The steps, with nearest interpolation and concatenation of two maps drawn into a convolution that can read such pieces,
    max-pooling into one that can pool, argmax into one that can choose, separable blocks into chains, and interpolation put
    behind a 1x1 convolution."""
    made = {step.output: step for step in steps}
    readers = {op: step for step in steps for op in step.covers}
    found: dict[Step, Step | None] = {}
    for step in steps:
        if isinstance(step, Block) and len(step.parts) == 2 and len(step.inputs) == 1 and able.chains(step):
            found |= chain(step, made, readers, able)
        elif isinstance(step, Convolution) and step not in found and able.reads_pieces(step):
            drawn, x, more = [], step.inputs[0], []
            if isinstance(before := alone(made.get(x)), Concat) and before.kind == "cat" and len(before.inputs) == 2:
                drawn, (x, *more) = [before], before.inputs
            factors = (1, 1)
            if isinstance(before := alone(made.get(x)), Repeat) and x not in more:
                drawn, x, factors = [before, *drawn], before.inputs[0], before.factors
            if drawn:
                covers = [op for part in (*drawn, step) for op in part.covers]
                found[step] = Joined(covers, [x, *more, *step.inputs[1:]], step, factors, bool(more))
                found |= dict.fromkeys(drawn)
        elif isinstance(step, Convolution) and step not in found:
            before = alone(made.get(step.inputs[0]))
            if type(before) is Resize and before not in found and able.swaps(before, step):
                found[step] = Swapped([*before.covers, *step.covers], before.inputs, before, step)
                found[before] = None
        elif isinstance(step, Aten) and step.output.kind == "max_pool2d":
            before = alone(made.get(step.output.args[0]))
            if isinstance(before, Convolution) and able.pools(before, step):
                found[step] = Pooled([*before.covers, *step.covers], before.inputs, before)
                found[before] = None
        elif isinstance(step, Argmax):
            before = alone(made.get(step.inputs[0]))
            if isinstance(before, Convolution) and able.classifies(before):
                found[step] = Scored([*before.covers, *step.covers], before.inputs, before)
                found[before] = None
    return [found.get(step, step) for step in steps if found.get(step, step) is not None]


def chain(block: Block, made: dict[Op, Step], readers: dict[Op, Step], able: Abilities) -> dict[Step, Step | None]:
    """A separable block with what can be drawn to it: by step what takes its place, if anything."""
    inputs, low, place, last, steps = block.inputs, None, 0, None, [block]
    joined = alone(made.get(block.inputs[0]))
    if isinstance(joined, Concat) and joined.kind == "cat" and len(set(joined.inputs)) == len(joined.inputs) == 2:
        for i, x in enumerate(joined.inputs):
            before = alone(made.get(x))
            if low is None and isinstance(before, Resize) and not isinstance(before, Head) and able.enlarges(block, before):
                inputs, low, place, steps = [joined.inputs[1 - i], *before.inputs], before, i, [before, joined, block]
    after = readers.get(block.output.users[0]) if alone(block) is not None else None
    if isinstance(after, Convolution) and after.inputs == [block.output] and able.scores(after):
        last = after
        steps.append(after)
    if len(steps) == 1:
        before = alone(made.get(block.inputs[0]))
        if isinstance(before, Convolution) and able.starts(before, block):
            return {before: None, block: Started([*before.covers, *block.covers], before.inputs, before, block)}
        return {}
    covers = [op for step in steps for op in step.covers]
    return dict.fromkeys(steps[:-1]) | {steps[-1]: Chain(covers, inputs, block, low, place, last)}


def alone(step: Step | None) -> Step | None:
    """A step whose result one other reads, and the caller does not."""
    return step if step is not None and len(step.output.users) == 1 and None not in step.output.users else None


def concatenated(op: Op) -> list[Op] | None:
    """What a cat joins over the channels."""
    tensors, dim = op.args[0], op.args[1] if len(op.args) > 1 else op.kwargs.get("dim", 0)
    if dim not in (1, -3) or op.shape is None or len(op.shape) != 4:
        return None
    return list(tensors) if all(t.dtype == op.dtype and len(t.shape) == 4 for t in tensors) else None


def prelu(op: Op | None, graph: Graph) -> Op | None:
    """The slope of a PReLU that is known."""
    if op is None or op.kind != "prelu" or op.args[1] not in graph.tensors or op.value != op.args[0].value:
        return None
    return op.args[1]


def interpolation(op: Op | None) -> tuple[Op, Pair, bool] | None:
    """(what is interpolated, size, align_corners) where PyTorch's coordinates follow from the two sizes."""
    if not isinstance(op, Op) or op.kind != "upsample_bilinear2d" or op.target._overloadname not in ("vec", "default"):
        return None
    x, align_corners = op.args[0], bool(op.args[2])
    scales = (op.args[3] if len(op.args) > 3 else None) if op.target._overloadname == "vec" else list(op.args[3:5])
    for scale, before, after in zip(scales or [], x.shape[2:], op.shape[2:]):
        if scale is not None and not align_corners and before * scale != after:
            return None
    return x, op.shape[2:], align_corners


def resize(op: Op) -> Resize | None:
    found = interpolation(op)
    return None if found is None else Resize([op], [found[0]], *found[1:])


def repeat(op: Op) -> Repeat | None:
    x = op.args[0]
    if x.shape is None or len(x.shape) != 4 or 0 in x.shape:
        return None
    sizes = list(zip(x.shape[2:], op.shape[2:]))
    factors = tuple(after // before for before, after in sizes)
    scales = op.args[2] if op.target._overloadname == "vec" and len(op.args) > 2 else list(op.args[2:4])
    whole = all(after % before == 0 for before, after in sizes)
    if not whole or any(scale is not None and scale != factor for scale, factor in zip(scales or [], factors)):
        return None
    return Repeat([op], [x], factors)


def recode(op: Op) -> Recode | None:
    if op.kind.partition("::")[2] not in ("quantize_per_tensor", "dequantize_per_tensor") or len(op.args) < 6:
        return None
    x, scale, zero, *kept = op.args
    if x.shape is None or len(x.shape) != 4 or tuple(kept) != (0, 255, torch.uint8) or not isinstance(scale, float):
        return None
    return Recode([op], [x], scale, int(zero)) if {x.dtype, op.dtype} == {torch.float32, torch.uint8} else None


def head(op: Op, free: Free) -> Head | Argmax | None:
    """argmax over the classes, of an interpolation if that has no other reader."""
    arguments = dict(zip(("input", "dim", "keepdim"), op.args)) | op.kwargs
    x, keep = arguments["input"], arguments.get("keepdim", False)
    if x.shape is None or len(x.shape) != 4 or arguments.get("dim") not in (1, -3):
        return None
    covers = [op]
    if keep:
        following = free.next(op)
        if following is None or following.kind != "squeeze" or tuple(following.args[1:]) not in ((1,), (-3,), ([1],)):
            return None
        covers.append(following)
    found = interpolation(x)
    wide = x if found is None else found[0]
    if wide.dtype.itemsize > 4 or not wide.dtype.is_floating_point:
        return None
    if found is not None and len(x.users) == 1 and x not in free.taken:
        return Head([x, *covers], [found[0]], *found[1:])
    return Argmax(covers, [x])


def shuffle(op: Op, free: Free) -> Shuffle | None:
    """view(N, g, C / g, H, W).transpose(1, 2).view(N, C, H, W), of a concatenation if nothing else reads that."""
    if op.kind in ("channel_shuffle", "native_channel_shuffle"):
        return Shuffle([op], [op.args[0]], op.args[1]) if len(op.shape or ()) == 4 else None
    covers, inputs = [], [op.args[0]]
    if op.kind == "cat":
        covers, inputs = [op], concatenated(op)
        if inputs is None:
            return None
        following = free.next(op)
        if following is not None and following.kind in ("channel_shuffle", "native_channel_shuffle"):
            return Shuffle([op, following], inputs, following.args[1])
        op = following
    if op is None or op.kind not in ("view", "reshape") or op.shape is None or len(op.shape) != 5:
        return None
    before = op.args[0]
    if before.shape is None or len(before.shape) != 4:
        return None
    n, c, h, w = before.shape
    groups = op.shape[1]
    swap = free.next(op)
    back = free.next(swap) if swap is not None else None
    if op.shape != (n, groups, c // groups, h, w) or back is None or back.kind not in ("view", "reshape", "flatten"):
        return None
    swapped = swap.kind in ("transpose", "permute") and swap.shape == (n, c // groups, groups, h, w)
    if not swapped or back.shape != before.shape:
        return None
    if swap.kind == "transpose" and sorted(d % 5 for d in swap.args[1:3]) != [1, 2]:
        return None
    if swap.kind == "permute" and [d % 5 for d in swap.args[1]] != [0, 2, 1, 3, 4]:
        return None
    return Shuffle([*covers, op, swap, back], inputs, groups)
