"""`optimize`: a network that runs its own graph, fused, on the sizes that it is called with."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import functools
import reprlib
import statistics
import sys
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from segfast import _backend
from segfast.optimize._capture import Capture, Graph, NotCaptured, Op, capture, first_line, key
from segfast.optimize._memory import Plan, allocate, borrow, give_back, handed_out, ordered, place_next
from segfast.optimize._nodes import Builder, Weights
from segfast.optimize._patterns import Aten, Step, join, match
from segfast.optimize._replay import Replay

DTYPES = (torch.float32, torch.bfloat16)
CLASS_DTYPES = (None, torch.uint8, torch.int32, torch.int64)
PLAIN = (Tensor, nn.Parameter, torch.nn.Buffer)
NOTHING = contextlib.nullcontext()
MAX_CAPTURES, MAX_PROGRAMS = 8, 32
MAX_REPLAYS = 8  # programs kept on a GPU, where each holds its maps
KEEP = 1 << 29  # bytes of a freed block up to which the allocator keeps it
_exporting = threading.Lock()  # torch.export is not for two threads at a time


@functools.cache
def keep_pages() -> None:
    """Let glibc keep freed blocks that are as large as maps are, instead of handing their pages back to the system.

    Every call would else write to fresh pages, and the faults take as long as the convolutions: 180 against 105 ms for
    Fast-SCNN at 1024x2048. Arenas of other runtimes keep theirs too.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-3, KEEP)  # M_MMAP_THRESHOLD
        mallopt(-1, 2 * KEEP)  # M_TRIM_THRESHOLD


@dataclass(frozen=True)
class Line:
    """One operation of a graph and the step that runs it."""

    operation: str  # "conv2d"
    name: str  # in the graph
    scope: str  # the module that it belongs to
    shape: tuple[int, ...] | None  # of its result
    step: int
    kind: str  # of the step: "conv+bn+relu"
    how: str  # what runs the step
    reason: str  # why it is not fused, where it is a kind of operation that could be


class Explanation:
    """What became of every operation. `print` it; `counts()` tells steps by kind.

    lines: an operation each, in the order of their steps.
    reason: why the network runs as it was; empty where it does not.
    sizes: of the inputs.
    note: on a GPU, whether the steps are one captured graph, or why not.
    """

    def __init__(self, lines: list[Line], sizes: tuple, reason: str = "", note: str = ""):
        self.lines, self.sizes, self.reason, self.note = lines, sizes, reason, note

    def counts(self) -> dict[str, int]:
        """Number of steps of each kind; "aten" are operations that run alone."""
        steps = {line.step: line.kind for line in self.lines}
        return dict(sorted(Counter(steps.values()).items()))

    def __str__(self) -> str:
        if self.reason:
            return f"runs as it was: {self.reason}"
        sizes = ", ".join("x".join(map(str, size)) for size in self.sizes)
        rows = [("step", "operation", "of", "result", "runs in", "by", "")]
        for line in self.lines:
            result = "x".join(map(str, line.shape)) if line.shape else ""
            rows.append((str(line.step), line.operation, line.scope, result, line.kind, line.how, line.reason))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        table = "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)
        fused = ", ".join(f"{n} {kind}" for kind, n in self.counts().items())
        steps = f"{len({line.step for line in self.lines})} steps{f' ({self.note})' if self.note else ''}"
        return f"{len(self.lines)} operations on {sizes} in {steps}: {fused}\n{table}"

    __repr__ = __str__


class Program:
    """The steps of one size, as one function without a loop."""

    def __init__(self, graph: Graph, steps: list[Step], builder: Builder):
        names: dict[Op, str] = {op: f"v{i}" for i, op in enumerate(graph.inputs)}
        namespace: dict[str, object] = {}
        self.steps: list[tuple[Step, str, Callable, list[Op]]] = []
        calls = []
        for number, step in enumerate(steps):
            how, run, inputs = builder.build(step)
            self.steps.append((step, how, run, inputs))
            names[step.output] = f"v{len(names)}"
            namespace[f"f{number}"] = run
            calls.append((f"f{number}", inputs, step.output))
        for op, tensor in graph.tensors.items():
            namespace[f"k{id(op)}"] = tensor
        plan = Plan(graph, self.steps, builder.device)
        namespace |= {"borrow": allocate if plan.handed_out else borrow, "give_back": give_back, "place": place_next}
        namespace |= {"narrowed": narrowed, "handed_out": handed_out}
        last: dict[Op, int] = {}
        for number, (_, inputs, output) in enumerate(calls):
            last.update(dict.fromkeys([*inputs, output], number))
        kept = {o for o in graph.outputs if isinstance(o, Op)} | set(graph.tensors)
        self.done: list[list[Op]] = [[op for op, end in last.items() if end == n and op not in kept] for n in range(len(calls))]
        lines, told = [], False
        for number, (run, inputs, output) in enumerate(calls):
            found = [plan.places[key] for key in (steps[number], output) if key in plan.places]
            if found:
                lines.append(f"place({', '.join(f'memory + {offset}, {size}' for offset, size in found)})")
            elif told:  # a place that its kernel did not take is no other's
                lines.append("place(0, 0)")
            told = bool(found)
            arguments = ", ".join(names[op] if op in names else f"k{id(op)}" for op in inputs)
            lines.append(f"{names[output]} = {run}({arguments})")
            done = [names[op] for op in self.done[number] if op in names]
            if done:
                lines.append(f"{' = '.join(done)} = None")
        results = []
        namespace["classes"] = builder.class_dtype
        for position, output in enumerate(graph.outputs):
            if not isinstance(output, Op):
                namespace[f"r{position}"] = output
                results.append(f"r{position}")
                continue
            result = names.get(output, f"k{id(output)}")
            if plan.handed_out:
                result = f"handed_out(arena, {result})"
            if builder.class_dtype is not None and output.dtype == torch.int64:
                result = f"narrowed({result}, classes)"
            # What is the network's own, or given twice, the caller may change.
            again = output in graph.tensors or output in graph.outputs[:position]
            results.append(f"{result}.clone()" if again else result)
        lines.append(f"return [{', '.join(results)}]")
        if plan.bytes:
            inside = [f"    {line}" for line in lines]
            lines = [f"arena = borrow({plan.bytes})", "try:", "    memory = arena.data_ptr()", *inside]
            lines += ["finally:", f"    give_back({None if plan.handed_out else 'arena'})"]
        head = f"def program({', '.join(names[op] for op in graph.inputs)}):"
        exec("\n".join([head, *(f"    {line}" for line in lines)]), namespace)
        self.run = namespace["program"]
        self.inputs, self.tensors = graph.inputs, graph.tensors
        self.structure = graph.structure
        self.alone = len(graph.outputs) == 1 and tree_unflatten([0], graph.structure) == 0
        self.note, self.device = "", None

    def replayed(self, inputs: list) -> None:
        """From now on run as one CUDA graph, if it can be captured with these inputs."""
        self.device = next((v.device for v in inputs if isinstance(v, Tensor)), None)
        try:
            self.run = Replay(self.run, inputs)
            self.note = "one CUDA graph"
        except RuntimeError as error:
            self.note = f"not one CUDA graph: {first_line(error)}"

    def profile(self, inputs: list, runs: int) -> list[tuple[Step, str, float]]:
        taken: list[list[float]] = [[] for _ in self.steps]
        for _ in range(runs):
            values: dict[Op, Tensor] = dict(zip(self.inputs, inputs))
            values.update(self.tensors)
            for number, (step, _, run, operands) in enumerate(self.steps):
                arguments = [values[op] for op in operands]
                for op in self.done[number]:
                    values.pop(op, None)
                start = time.perf_counter()
                values[step.output] = run(*arguments)
                if self.device is not None:
                    torch.cuda.synchronize(self.device)
                taken[number].append(1000 * (time.perf_counter() - start))
                del arguments
        return [(step, how, statistics.median(t)) for (step, how, _, _), t in zip(self.steps, taken)]

    def lines(self) -> list[Line]:
        return [
            Line(op.kind, op.name, op.scope, op.shape, number, step.kind, how, step.reason if isinstance(step, Aten) else "")
            for number, (step, how, _, _) in enumerate(self.steps)
            for op in step.covers
        ]


def narrowed(classes: Tensor, dtype: torch.dtype) -> Tensor:
    """Classes as another dtype.

    Raises:
        ValueError: it does not hold them.
    """
    if classes.dtype == torch.int64 and dtype != torch.int64 and classes.numel():
        low, high = (int(v) for v in classes.aminmax())
        if low < torch.iinfo(dtype).min or high > torch.iinfo(dtype).max:
            raise ValueError(f"optimize: want a class_dtype that holds results from {low} to {high}, got {dtype}")
    return classes.to(dtype)


class OptimizedModel(nn.Module):
    """What `segfast.optimize` gives: the network's signature, its graph fused.

    The weights are read when they are packed, at the first call. After a change of `model` in place call `repack()`;
    `load_state_dict`, `to` and the like on this module do.

    Attributes:
        model: the network as it was given; its state_dict has the prefix "model.".
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, class_dtype: torch.dtype | None):
        super().__init__()
        self.model = model
        self.dtype, self.class_dtype = dtype, class_dtype
        self.training = False
        self._start()

    def _start(self) -> None:
        self._lock = threading.RLock()
        self._programs: OrderedDict[tuple, Program | str] = OrderedDict()
        self._captures: list[Capture] = []
        self._weights: Weights | None = None
        self._twin: nn.Module | None = None

    def __getstate__(self) -> dict:
        state = self.__dict__.copy()
        for name in ("_lock", "_programs", "_captures", "_weights", "_twin"):
            del state[name]
        return state

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._start()

    def repack(self) -> None:
        """Forget graphs and packed weights: the next call makes them from the weights as they are then."""
        with self._lock:
            self._programs.clear()
            self._captures.clear()
            self._weights = self._twin = None

    def _apply(self, *args, **kwargs):
        result = super()._apply(*args, **kwargs)
        self.repack()
        return result

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        self.repack()  # whoever loads, this module or one that holds it, and however it ends

    def train(self, mode: bool = True):
        """Evaluation mode is the only one.

        Raises:
            RuntimeError: training mode.
        """
        if mode:
            raise RuntimeError("optimize: want evaluation mode, got train(): train `model`, then optimize it again")
        return self

    # While one thread exports, PyTorch puts a recorder in the place of nn.Module.__call__, which no other thread may meet.
    __call__ = nn.Module._wrapped_call_impl

    def forward(self, *args, **kwargs):
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or _backend.is_transformed():
            return self.model(*args, **kwargs)
        flat, structure = tree_flatten((args, kwargs))
        tensors = [v for v in flat if isinstance(v, Tensor)]
        if not all(type(v) in PLAIN for v in tensors):
            return self.model(*args, **kwargs)
        program = self._ready(flat, structure)
        device = "cuda" if any(v.is_cuda for v in tensors) else "cpu"
        with torch.no_grad(), torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else NOTHING:
            if isinstance(program, str):
                args, kwargs = tree_unflatten(self._cast(flat), structure)
                return tree_map(self._classes, (self._twin or self.model)(*args, **kwargs))
            results = program.run(*self._cast(flat))
        return results[0] if program.alone else tree_unflatten(results, program.structure)

    def explain(self, *args, **kwargs) -> Explanation:
        """What became of every operation of the network, for these inputs or, without, for those it was last prepared for.

        Raises:
            RuntimeError: no inputs, and none were seen before.
        """
        if args or kwargs:
            flat, structure = tree_flatten((args, kwargs))
            values, program = key(flat), self._ready(flat, structure)
        else:
            with self._lock:
                if not self._programs:
                    raise RuntimeError("optimize: want a call or an example before explain(), got none")
                (values, _), program = next(reversed(self._programs.items()))
        sizes = tuple(v[0] for v in values if isinstance(v[0], tuple))
        if isinstance(program, str):
            return Explanation([], sizes, program)
        return Explanation(program.lines(), sizes, note=program.note)

    def profile(self, *args, runs: int = 5, **kwargs) -> list[tuple[Step, str, float]]:
        """(step, what runs it, median milliseconds) of every step for these inputs, after a first run.

        Raises:
            RuntimeError: the network runs as it was, without steps.
        """
        flat, structure = tree_flatten((args, kwargs))
        program = self._ready(flat, structure)
        if isinstance(program, str):
            raise RuntimeError(f"optimize: want a network in steps for profile(), got one that runs as it was: {program}")
        with torch.no_grad():
            return program.profile(self._cast(flat), runs)

    def _cast(self, flat: list) -> list:
        if self._twin is None:
            return flat
        return [v.to(self.dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for v in flat]

    def _classes(self, value):
        wanted = self.class_dtype is not None and isinstance(value, Tensor) and value.dtype == torch.int64
        return narrowed(value, self.class_dtype) if wanted else value

    def _ready(self, flat: list, structure) -> Program | str:
        """What runs these inputs: a program, or why there is none."""
        name = key(flat), structure
        try:
            program = self._programs.get(name)
        except TypeError as error:
            return f"calls with such arguments cannot be told apart ({error})"
        if program is not None:
            return program
        with self._lock:
            program = self._programs.get(name)
            if program is None:
                try:
                    program = self._program(flat, structure)
                except NotCaptured as reason:
                    program = str(reason)
                self._programs[name] = program
                most = MAX_REPLAYS if isinstance(program, Program) and program.note else MAX_PROGRAMS
                while len(self._programs) > most:
                    self._programs.popitem(last=False)
            return program

    def _program(self, flat: list, structure) -> Program:
        if self._weights is None:
            tensors = [*self.model.named_parameters(remove_duplicate=False), *self.model.named_buffers(remove_duplicate=False)]
            kinds = {t.dtype for _, t in tensors if t.is_floating_point()} or {torch.float32}
            if kinds != {self.dtype}:
                self._twin = copied(self.model).to(self.dtype)
            self._weights = Weights(dict(tensors), self.dtype)
        keep_pages()
        flat = [v.detach() if isinstance(v, Tensor) else v for v in self._cast(flat)]
        device = place([*flat, *self._weights.originals.values()])
        args, kwargs = tree_unflatten(flat, structure)
        graph = self._graph(args, kwargs, flat)
        builder = Builder(graph, self._weights, self.class_dtype, device)
        program = Program(graph, ordered(graph, join(match(graph), builder)), builder)
        if device == "cuda":
            program.replayed(flat)
        return program

    def _graph(self, args: tuple, kwargs: dict, flat: list) -> Graph:
        for captured in self._captures:
            symbols = captured.symbols(flat)
            if symbols is not None:
                return captured.at(symbols)
        # The first size is captured as it is, which is quick; a second one of its kind pays for a graph of all sizes.
        model, kinds = shared(self._twin or self.model), key(flat, sizes=False)
        for dynamic in (True, False) if any(c.kinds == kinds for c in self._captures) else (False,):
            try:
                with _exporting:
                    captured = capture(model, args, kwargs, dynamic)
                symbols = captured.symbols(flat)
                if symbols is None:
                    raise NotCaptured("its graph does not stand for the sizes that it was made from")
                graph = captured.at(symbols)
            except NotCaptured:
                if not dynamic:
                    raise
                continue
            self._captures = [*self._captures, captured][-MAX_CAPTURES:]
            return graph
        raise AssertionError


def place(values: list) -> str:
    """ "cpu" or "cuda", where all tensors are.

    Raises:
        NotCaptured: they are in several places, or in another.
    """
    devices = {v.device for v in values if isinstance(v, Tensor)}
    kinds = {device.type for device in devices} or {"cpu"}
    if len(devices) > 1 or not kinds <= {"cpu", "cuda"}:
        raise NotCaptured(f"it is on {' and '.join(sorted(map(str, devices)))}: want all of it on the CPU or on one GPU")
    return kinds.pop()


def shared(model: nn.Module) -> nn.Module:
    """Other modules with the same tensors: export puts fakes in their place for a while, which no other thread may see."""
    tensors = [*model.parameters(), *model.buffers()]
    return copied(model, {id(t): t for t in tensors})


def copied(model: nn.Module, kept: dict | None = None) -> nn.Module:
    try:
        return copy.deepcopy(model, kept)
    except Exception as error:  # whatever an attribute raises that is not made for it
        raise NotCaptured(f"it cannot be copied: {type(error).__name__}: {error}") from error


def optimize(
    model: nn.Module,
    example=None,
    *,
    dtype: torch.dtype = torch.float32,
    class_dtype: torch.dtype | None = None,
) -> OptimizedModel:
    """A network that computes the same, faster: its graph is captured, fused and run by this package's and oneDNN's kernels.

    Any network of PyTorch in evaluation mode. BatchNorms are folded, weights are packed once, maps lie
    channels_last, and what runs together is found in the graph of ATen operations that torch.export gives: convolutions with
    BatchNorm, sum and activation, depthwise-separable blocks, inverted residuals, shuffles, the interpolation before an
    argmax. What is not recognised runs as it was; `explain()` lists all. The first size is captured by itself, a second one as
    a graph of all sizes as far as export allows. A network that cannot be captured runs as it was, and `explain()` says why.
    On a GPU the steps run on this package's Triton and CUDA kernels and on cuDNN, each size captured once as one CUDA graph
    and replayed (not yet run on hardware: docs/gpu.md).

    For inference: the results have no gradients. Safe to call from several threads; works with deepcopy and pickle (the
    network and the options are saved, and packed again at load) and under torch.inference_mode. torch.export and torch.compile
    of it see the network itself. Maps between steps share one block of memory, which the process keeps for the next call, one for
    each thread that calls at the same time; with glibc it keeps other freed blocks of up to half a gigabyte too, for fresh pages
    at every call cost as much as the convolutions.

    Args:
        model: takes and returns tensors, in lists, tuples, dicts or NamedTuples too. Kept, not copied; not changed.
        example: an input, or a tuple of inputs, to prepare for now; None: prepared at the first call.
        dtype: torch.float32 or torch.bfloat16: what the network runs in. Inputs in another float dtype are cast if the
            network's own dtype is another; the results have this dtype.
        class_dtype: of int64 results, such as class maps: torch.uint8, torch.int32 or torch.int64; None: as they are.

    Raises:
        TypeError: model is not an nn.Module, or the example holds no tensor.
        ValueError: a network in training mode, with parameters that hold no data, or without any module to run; another dtype.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"optimize: want an nn.Module, got {type(model).__name__}")
    if dtype not in DTYPES:
        raise ValueError(f"optimize: want dtype torch.float32 or torch.bfloat16, got {dtype}")
    if class_dtype not in CLASS_DTYPES:
        raise ValueError(f"optimize: want class_dtype torch.uint8, torch.int32, torch.int64 or None, got {class_dtype}")
    training = [name or type(model).__name__ for name, module in model.named_modules() if module.training]
    if training:
        raise ValueError(f"optimize: want a network in evaluation mode (call .eval()), got {training[0]} in training mode")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if isinstance(tensor, nn.parameter.UninitializedTensorMixin) or tensor.device.type == "meta":
            raise ValueError(f"optimize: want a network with its weights loaded, got {name} without data")
    optimized = OptimizedModel(model, dtype, class_dtype)
    if example is not None:
        given = example if isinstance(example, tuple) else (example,)
        leaves, structure = tree_flatten((given, {}))
        if given and not any(isinstance(leaf, Tensor) for leaf in leaves):
            got = reprlib.repr(example)
            raise TypeError(f"optimize: want a tensor or a tuple of inputs as the example, got {got}, without a tensor")
        optimized._ready(leaves, structure)
    return optimized
