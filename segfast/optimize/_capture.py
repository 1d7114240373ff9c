"""A network as a graph of ATen operations with the sizes of one call: torch.export, its guards, the graph at a size."""

from __future__ import annotations

import inspect
import operator
import traceback
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, export
from torch.export.graph_signature import InputKind
from torch.utils._pytree import tree_flatten, tree_map

from segfast import _backend
from segfast.optimize._int8 import lower_int8

_TORCH = str(Path(torch.__file__).parent)
_HERE = str(Path(__file__).parent)

_NOTHING = {"_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range", "sym_constrain_range_for_size"}
_SAME_VALUE = {
    "detach",
    "alias",
    "clone",
    "contiguous",
    "lift_fresh",
    "lift_fresh_copy",
}
_DROPOUT = {"dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"}  # in evaluation nothing
_VIEWS = {"getitem", "type_as", "unsafe_chunk", "unsafe_split", *_DROPOUT}  # whose schemas do not say that they may be


class NotCaptured(Exception):
    """Why a network cannot be captured, with the line of it that stopped it where one did."""


@dataclass(eq=False)
class Op:
    """One operation at one size. Operations among `args` and `kwargs` stand for their results."""

    name: str
    target: Any
    args: tuple
    kwargs: dict[str, Any]
    value: Any  # the result's (shape, dtype), a list of them, or a Python number
    scope: str  # the module that it belongs to, "features.0.conv"
    users: list[Op] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """ "conv2d" of aten.conv2d.default; "input" and "constant" of what is no operation."""
        if isinstance(self.target, str):
            return self.target
        schema = getattr(self.target, "_schema", None)
        return schema.name.removeprefix("aten::") if schema is not None else self.target.__name__

    @property
    def shape(self) -> tuple[int, ...] | None:
        return self.value[0] if isinstance(self.value, tuple) else None

    @property
    def dtype(self) -> torch.dtype | None:
        return self.value[1] if isinstance(self.value, tuple) else None


@dataclass(eq=False)
class Graph:
    """The operations of a call in order, each after its arguments."""

    inputs: list[Op]
    ops: list[Op]
    outputs: list[Any]  # operations, or Python values as they are
    structure: Any  # of the outputs
    tensors: dict[Op, Tensor]  # of the constants
    names: dict[Op, str]  # of those constants that are parameters and buffers


class Capture:
    """An exported network and the sizes that it stands for."""

    def __init__(self, program, flat: list):
        self.program = program
        self.key, self.kinds = key(flat), key(flat, sizes=False)
        user = {spec.arg.name for spec in program.graph_signature.input_specs if spec.kind == InputKind.USER_INPUT}
        values = [n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder" and n.name in user]
        self.sizes = [tuple(map(expression, v.shape)) if isinstance(v, Tensor) else () for v in values]
        symbolic = [s for v in values if isinstance(v, Tensor) for s in v.shape if isinstance(s, torch.SymInt)]
        self.env = symbolic[0].node.shape_env if symbolic else None

    @property
    def dynamic(self) -> bool:
        return self.env is not None

    def symbols(self, flat: list) -> dict | None:
        """{symbol: number} if the graph stands for these inputs, else None."""
        if not self.dynamic:
            return {} if key(flat) == self.key else None
        import sympy  # torch.export of free sizes has loaded it; `import segfast` need not

        if key(flat, sizes=False) != self.kinds:
            return None
        pairs = [
            (want, have) for sizes, value in zip(self.sizes, flat) for want, have in zip(sizes, value.shape if sizes else ())
        ]
        found: dict = {}
        for want, have in pairs:
            if isinstance(want, sympy.Symbol):
                found.setdefault(want, sympy.Integer(have))
        for want, have in pairs:
            unknown = getattr(want, "free_symbols", set()) - set(found)
            if len(unknown) == 1:  # 32 * s: the export found out that the height is a multiple
                solutions = sympy.solve(want - have, *unknown)
                found.update({next(iter(unknown)): s for s in solutions[:1]})
        for want, have in pairs:
            if (want.xreplace(found) if hasattr(want, "xreplace") else want) != have:
                return None
        bounds = self.program.range_constraints
        if not all(s.is_integer and (k not in bounds or bounds[k].lower <= s <= bounds[k].upper) for k, s in found.items()):
            return None
        holds = (self.env.replace(guard.expr).xreplace(found) for guard in self.env.guards)
        return found if all(h in (True, sympy.true) for h in holds) else None

    def at(self, symbols: dict) -> Graph:
        """The graph with the sizes of one call."""
        numbers: dict = {}

        def number(value):
            if not isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
                return value
            expr = expression(value)
            if expr not in numbers:
                result = expr.xreplace(symbols) if hasattr(expr, "xreplace") else expr
                if getattr(result, "free_symbols", None):
                    raise NotCaptured(f"a size depends on the images' values ({expr})")
                kind = {torch.SymInt: int, torch.SymFloat: float, torch.SymBool: bool}[type(value)]
                numbers[expr] = kind(result)
            return numbers[expr]

        def described(value):
            if isinstance(value, Tensor):
                shape = tuple(number(s) for s in value.shape)
                if any(s < 0 for s in shape):
                    raise NotCaptured(f"a map of size {shape}")
                return shape, value.dtype
            if isinstance(value, tuple | list):
                return [described(v) for v in value]
            return number(value)

        return build(self.program, number, described)


def capture(model: nn.Module, args: tuple, kwargs: dict, dynamic: bool) -> Capture:
    """Export `model` for these inputs, with any batch, height and width if `dynamic`.

    Raises:
        NotCaptured: it cannot be exported.
    """
    flat, _ = tree_flatten((args, kwargs))
    try:
        sizes = free_sizes(model, args, kwargs) if dynamic else None
        with warnings.catch_warnings(), torch.no_grad(), _backend.capturing():
            warnings.simplefilter("ignore")
            program = export(model, args, kwargs, dynamic_shapes=sizes, strict=False)
            if any(_name(node.target) == "quantize_per_tensor" for node in program.graph.nodes):
                lowered = lower_int8(export(Inside(model), args, kwargs, strict=False).module())
                program = export(lowered, args, kwargs, strict=False)
            if needs_functional_form(program.graph):
                program = program.run_decompositions({})
    except Exception as error:
        raise NotCaptured(f"{where(error)}{type(error).__name__}: {first_line(error)}") from error
    signature = program.graph_signature
    changed = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]
    if changed:
        raise NotCaptured(f"it changes {', '.join(changed)} at every call")
    return Capture(program, flat)


class Inside(nn.Module):
    """A network one level down: what torch.export makes of one with a part called `graph` cannot be worked on otherwise."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, *args, **kwargs):
        return self.network(*args, **kwargs)


def free_sizes(model: nn.Module, args: tuple, kwargs: dict) -> dict:
    """Batch, height and width of a map may be any; a size of 0 or 1 is a case of its own, for it broadcasts."""

    def one(value):
        if not isinstance(value, Tensor):
            return None
        channels = value.dim() - 3
        return {i: Dim.AUTO for i, size in enumerate(value.shape) if i != channels and size > 1} if channels in (0, 1) else None

    signature = inspect.signature(model.forward)
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in signature.parameters.values()):
        raise ValueError("forward takes *args or **kwargs")
    return tree_map(one, dict(signature.bind(*args, **kwargs).arguments))


def key(flat: Iterable, sizes: bool = True) -> tuple:
    """What tells calls apart: shapes and dtypes of tensors, other values themselves."""
    return tuple(
        (tuple(v.shape) if sizes else v.dim(), v.dtype, v.device)
        if isinstance(v, Tensor)
        else (type(v), str(v) if isinstance(v, float) else v)  # 0.0 and -0.0 are equal, and NaN not to itself
        for v in flat
    )


def expression(value):
    return value.node.expr if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool) else value


def where(error: BaseException) -> str:
    """ "file.py:12 in forward (if x.sum() > 0:): " of the innermost line outside PyTorch."""
    frames = []
    while error is not None and not frames:
        frames = [
            f
            for f in traceback.extract_tb(error.__traceback__)
            if not f.filename.startswith((_TORCH, _HERE, "<"))
            and "/contextlib.py" not in f.filename
            and "/copyreg.py" not in f.filename
        ]
        error = error.__cause__ or error.__context__
    if not frames:
        return ""
    last = frames[-1]
    return f"{Path(last.filename).name}:{last.lineno} in {last.name} ({(last.line or '').strip()}): "


def first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def inplace(target) -> bool:
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def out_of_place(target):
    """aten.relu.default of aten.relu_.default; None where there is none."""
    namespace, _, name = target._schema.name.partition("::")
    packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), None) if name.endswith("_") else None
    return getattr(packet, target._overloadname, None) if packet is not None else None


def needs_functional_form(graph: fx.Graph) -> bool:
    # Renaming serves where the overwritten map has no view; the rest is what PyTorch's functionalisation is for.
    viewed = set()
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            return True
        if inplace(node.target):
            target = node.args[0] if node.args else None
            if (
                not isinstance(target, fx.Node)
                or target in viewed
                or target.op != "call_function"
                or out_of_place(node.target) is None
            ):
                return True
        if views(node.target):
            viewed.add(node)
            viewed.update(a for a in node.all_input_nodes)
    return False


def views(target) -> bool:
    """Whether a result is, or may be, an argument in other clothes."""
    returns = target._schema.returns if isinstance(target, torch._ops.OpOverload) else ()
    return _name(target) in _VIEWS or any(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _name(target) -> str:
    schema = getattr(target, "_schema", None)
    return schema.name.partition("::")[2] if schema is not None else getattr(target, "__name__", "")


def build(program, number, described) -> Graph:
    stored = {}
    for spec in program.graph_signature.input_specs:
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            source = program.state_dict if spec.target in program.state_dict else program.constants
            # What the forward makes itself is another at each size under the same name.
            name = "" if spec.kind == InputKind.CONSTANT_TENSOR else spec.target
            stored[spec.arg.name] = name, source[spec.target]
    inputs, ops, tensors, names = [], [], {}, {}
    current: dict[fx.Node, Any] = {}  # what a node's uses read: an Op, or a Python value

    def argument(value):
        if isinstance(value, fx.Node):
            return current[value]
        if isinstance(value, tuple | list):
            return type(value)(argument(v) for v in value) if type(value) in (tuple, list) else [argument(v) for v in value]
        if isinstance(value, dict):
            return {k: argument(v) for k, v in value.items()}
        return number(value)

    def constant(node, name, tensor):
        op = Op(node.name, "constant", (), {}, (tuple(tensor.shape), tensor.dtype), "")
        tensors[op] = tensor.detach()
        if name:
            names[op] = name
        current[node] = op

    outputs = []
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder":
            if node.name in stored:
                constant(node, *stored[node.name])
            else:
                op = Op(node.name, "input", (), {}, described(value), "")
                inputs.append(op)
                current[node] = op if isinstance(value, Tensor) else value
        elif node.op == "output":
            outputs = list(argument(node.args[0]))
        elif node.op == "get_attr":
            tensor = getattr(program.graph_module, node.target)
            if not isinstance(tensor, Tensor):
                raise NotCaptured(f"a part of it, {node.target}, is a graph of its own")
            constant(node, "", tensor)
        else:
            if _name(node.target) in _NOTHING:
                continue
            if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool | int | float | bool):
                current[node] = number(value)
                continue
            target, args, kwargs = node.target, argument(node.args), argument(node.kwargs)
            if target is operator.getitem and isinstance(args[0], list | tuple):
                current[node] = args[0][args[1]]
                continue
            if isinstance(target, torch._ops.HigherOrderOperator):
                raise NotCaptured(f"it uses {target}, which holds a graph of its own")
            if _name(target) == "as_strided":
                raise NotCaptured("it reads memory by strides (as_strided)")
            if _name(target) == "view" and target._overloadname == "dtype":
                raise NotCaptured("it reads memory as another dtype (view)")
            overwritten = inplace(target)
            if overwritten:
                target = out_of_place(target)
            kept = _name(target) == "clone" and isinstance(args[0], Op) and isinstance(args[0].target, str)  # of an input
            same = _name(target) in _SAME_VALUE or (_name(target) in ("to", "_to_copy") and same_type(args, described(value)))
            if (same and not kept) or (_name(target) in _DROPOUT and args[2] is False):
                current[node] = args[0]
            else:
                op = Op(node.name, target, tuple(args), kwargs, described(value), scope(node))
                current[node] = op
                ops.append(op)
            if overwritten:
                current[node.args[0]] = current[node]
    graph = Graph(inputs, ops, outputs, program.call_spec.out_spec, tensors, names)
    evaluate_constants(graph)
    drop_unused(graph)
    return graph


def same_type(args, value) -> bool:
    return isinstance(args[0], Op) and args[0].dtype == value[1]


def scope(node: fx.Node) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return stack[-1][0].removeprefix("L['self'].") if stack else ""


def operands(op: Op) -> list[Op]:
    return [v for v in tree_flatten((op.args, op.kwargs))[0] if isinstance(v, Op)]


def evaluate_constants(graph: Graph) -> None:
    """What no input goes into (grids of averages, of coordinates) is worked out now."""
    remaining = []
    for op in graph.ops:
        random = torch.Tag.nondeterministic_seeded in getattr(op.target, "tags", ())
        if random or any(o not in graph.tensors for o in operands(op)):
            remaining.append(op)
            continue
        args, kwargs = tree_map(lambda v: graph.tensors[v] if isinstance(v, Op) else v, (op.args, op.kwargs))
        with torch.no_grad():
            result = op.target(*args, **kwargs)
        if not isinstance(result, Tensor):
            remaining.append(op)
            continue
        graph.tensors[op] = result
        op.target, op.args, op.kwargs = "constant", (), {}
    graph.ops = remaining


def drop_unused(graph: Graph) -> None:
    used = {o for o in graph.outputs if isinstance(o, Op)}
    kept = []
    for op in reversed(graph.ops):
        if op in used:
            kept.append(op)
            used.update(operands(op))
    graph.ops = kept[::-1]
    for op in graph.ops:
        for operand in operands(op):
            operand.users.append(op)
    for output in graph.outputs:
        if isinstance(output, Op):
            output.users.append(None)
