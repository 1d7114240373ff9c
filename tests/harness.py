"""How the generic tests call an op: on its kernels or its reference, with gradients, whatever its arguments look like."""

from __future__ import annotations

import contextlib
import math
import sys
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import keystr, tree_flatten, tree_flatten_with_path, tree_leaves, tree_map, tree_unflatten

from segfast import _backend, ops, testing

OPS = [name for name in ops.__all__ if isinstance(getattr(ops, name), FunctionType)]
DTYPES = _backend.DTYPES
CPU = torch.device("cpu")
NOT_DIFFERENTIABLE = ("running_mean", "running_var", "num_batches_tracked", "mask", "target", "['weight']")


def reference_of(op: str) -> FunctionType | None:
    return getattr(sys.modules[getattr(ops, op).__module__], f"{op}_reference", None)


def samples_of(op: str, dtype: torch.dtype) -> list[testing.Sample]:
    return list(testing.SAMPLES[op](dtype, CPU)) if op in testing.SAMPLES else []


@contextlib.contextmanager
def reference_only():
    """The public functions take their references, as on a machine without kernels."""
    kept = {op: dict(owners) for op, owners in _backend.table.items()}
    try:
        for owners in _backend.table.values():
            owners.clear()
        yield
    finally:
        for op, owners in kept.items():
            _backend.table[op].update(owners)


def lay_out(tree: Any, layout: str) -> Any:
    """The same values with every 4-d tensor in one of testing.LAYOUTS."""

    def one(x):
        if not isinstance(x, Tensor) or x.dim() != 4:
            return x
        if layout == "strided":
            return x.repeat_interleave(2, dim=-1)[..., ::2]
        if layout == "transposed":
            return x.transpose(-1, -2).contiguous().transpose(-1, -2)
        return x.contiguous(memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format)

    return tree_map(one, tree)


def copy(x: Tensor) -> Tensor:
    """A copy with the strides of x, also where they leave gaps, which clone() would close."""
    if x.numel() == 0 or x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return x.detach().clone()
    extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
    y = x.detach().new_zeros(extent).as_strided(x.shape, x.stride())
    return y.copy_(x.detach())


def cast(tree: Any, dtype: torch.dtype) -> Any:
    def one(x):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        return copy(x) if x.dtype == dtype else x.detach().to(dtype)

    return tree_map(one, tree)


def inputs_of(call: Any) -> list[int]:
    """Positions, among the leaves of (args, kwargs), of the tensors that an op has gradients for."""
    leaves, _ = tree_flatten_with_path(call)
    return [
        i
        for i, (path, leaf) in enumerate(leaves)
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and not any(name in keystr(path) for name in NOT_DIFFERENTIABLE)
    ]


@dataclass
class Result:
    outputs: list[Tensor]
    buffers: list[Tensor]  # tensors among the arguments that are no inputs, after the call: running statistics
    grads: list[Tensor | None]

    def all(self) -> list[Tensor | None]:
        return [*self.outputs, *self.buffers, *self.grads]


def evaluate(function, sample: testing.Sample, subset: list[int] | None = None, backward: bool = True) -> Result:
    """Calls on copies; gradients of <outputs, fixed random cotangents> for the inputs in `subset` (all when None)."""
    leaves, spec = tree_flatten((sample.args, sample.kwargs))
    positions = inputs_of((sample.args, sample.kwargs))
    leaves = [copy(x) if isinstance(x, Tensor) else x for x in leaves]
    wanted = [p for k, p in enumerate(positions) if backward and (subset is None or k in subset)]
    for p in wanted:
        leaves[p].requires_grad_()
    args, kwargs = tree_unflatten(leaves, spec)
    outputs = [y for y in tree_leaves(function(*args, **kwargs)) if isinstance(y, Tensor)]
    grads: list[Tensor | None] = []
    differentiable = [y for y in outputs if y.requires_grad]
    if wanted and differentiable:
        cotangents = []
        for k, y in enumerate(differentiable):
            generator = torch.Generator().manual_seed(1000 + k)
            random = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(torch.bfloat16).to(y.dtype)
            cotangents.append(torch.empty_like(y).copy_(random))
        grads = list(torch.autograd.grad(differentiable, [leaves[p] for p in wanted], cotangents, allow_unused=True))
    taken = set(positions)
    buffers = [x.detach() for i, x in enumerate(leaves) if isinstance(x, Tensor) and i not in taken and x.is_floating_point()]
    return Result([y.detach() for y in outputs], buffers, grads)


def as_dtype(sample: testing.Sample, dtype: torch.dtype) -> testing.Sample:
    args, kwargs = cast((sample.args, sample.kwargs), dtype)
    return testing.Sample(sample.name, args, kwargs)


def relaid(sample: testing.Sample, layout: str) -> testing.Sample:
    args, kwargs = lay_out((sample.args, sample.kwargs), layout)
    return testing.Sample(f"{sample.name}-as-{layout}", args, kwargs)


def error(x: Tensor, exact: Tensor) -> float:
    """Largest absolute difference where both are finite; infinite where NaNs or infinities are not the same."""
    x, exact = x.double(), exact.double()
    if x.shape != exact.shape:
        return math.inf
    same = (x == exact) | (x.isnan() & exact.isnan())
    if same.all():
        return 0.0
    difference = (x - exact)[~same].abs()
    return math.inf if not difference.isfinite().all() else difference.max().item()


def scale(exact: Tensor) -> float:
    finite = exact[exact.isfinite()].abs()
    return finite.max().item() if finite.numel() else 0.0


EPS_RATIO = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps


def judge(title: str, names: list[str], actual, run, call: Any, dtype: torch.dtype) -> None:
    """The error rule for the tensors `actual`, where run(call) gives the reference's in the dtype of the call's tensors.

    |actual - exact| <= 2 (error of the same-dtype reference) + 4 eps(dtype) max|exact|, exact being the reference in float64.

    - float64 has no finer oracle: there the reference's error is its float32 error scaled by the ratio of the two eps, and it is
      allowed once more, for `exact` is off by as much. Where the reference sums float32 tensors in float64, that is too small:
      `exact` can be off by ten times as much as the kernel. So at the points within rounding, below, the reference runs in
      float64 in the other memory format too, where it sums in another order, and how far that is from `exact` counts as well.
    - eps is that of the tensor; for a float32 buffer or gradient of a half-precision call (of BatchNorm's tensors) that of the
      call, whose rounding they inherit.
    - The reference's error at one point is one draw: of few elements it may be nothing by luck, and where an activation's input
      lies within rounding of a kink the gradient is one thing or another in eager too. So a tensor that fails is judged again
      with the largest of the reference's errors at this point and at testing.NEIGHBOURS points within rounding of it, each
      against its own float64 result; and once more with eight times as many: the weight of a single channel between two
      BatchNorms has a gradient of one element that is nearly all cancellation, of which nine draws say little.
    - A gradient that is zero but for rounding (of a bias before a BatchNorm that takes the batch's statistics, of the similarity
      of a single node) has no scale of its own. It is taken for a zero where max|exact| <= 4 eps S, S being the larger of the
      largest gradient of the call and max|output| / max|float tensor of the call|, and is then allowed 4 eps S.
    - A loss that is the difference of numbers of size 1 (of the similarities of a single node) is zero to within float64's
      rounding: every output is allowed 16 eps(float64), every gradient that over the largest input.
    - A whole number (the best class) jumps where two classes are within rounding of each other: every element is that of the
      exact result at this point or at one of testing.NEIGHBOURS points within rounding of it.
    """
    half = cast(call, torch.float32) if dtype == torch.float64 else call
    low = torch.float32 if dtype == torch.float64 else dtype
    times = 3 if dtype == torch.float64 else 2

    def estimates(k: int) -> list[float]:
        near = testing.neighbour(half, k, low)
        pairs = zip(run(near), run(cast(near, torch.float64)), strict=True)
        if dtype != torch.float64:
            return [error(a, b) if a is not None else 0.0 for a, b in pairs]
        other = lay_out(testing.neighbour(call, k, dtype), "contiguous" if k % 2 else "channels_last")
        moved = zip(run(other), exact) if k else ()
        moves = [error(a, b) if a is not None else 0.0 for a, b in moved] or [0.0] * len(exact)
        return [max(EPS_RATIO * error(a, b), move) if a is not None else 0.0 for (a, b), move in zip(pairs, moves)]

    reference, exact = run(call), run(cast(call, torch.float64))
    drawn = [estimates(0)]
    assert len(actual) == len(reference) == len(exact) == len(names)
    inputs = max((scale(x) for x in tree_leaves(call) if isinstance(x, Tensor) and x.is_floating_point()), default=0.0)
    sizes, zero = {n: scale(e) for n, e in zip(names, exact) if e is not None}, 16 * torch.finfo(torch.float64).eps
    size = max((s for n, s in sizes.items() if n.startswith("grads")), default=0.0)
    size = max(size, max((s for n, s in sizes.items() if n.startswith("outputs")), default=0.0) / inputs if inputs else 0.0)
    for i, (name, a, r, e) in enumerate(zip(names, actual, reference, exact)):
        if a is None or r is None:
            only = a if r is None else r
            assert only is None or not only.any(), f"{title}: {name} is None on one side only"
            continue
        assert a.dtype == r.dtype, f"{title}: {name} is {a.dtype}, the reference's {r.dtype}"
        assert a.shape == r.shape, f"{title}: {name} is {tuple(a.shape)}, the reference's {tuple(r.shape)}"
        if name.startswith("outputs") and a.numel():
            strides = [[step for step, size in zip(y.stride(), y.shape) if size > 1] for y in (a, r)]
            assert strides[0] == strides[1], f"{title}: {name} has strides {strides[0]}, the reference's {strides[1]}"
        if not a.is_floating_point():
            off = a != e
            for k in range(1, 1 + testing.NEIGHBOURS if off.any() else 1):
                off &= a != run(cast(testing.neighbour(half, k, low), torch.float64))[i]
            assert not off.any(), f"{title}: {name} is wrong at {off.nonzero()[0].tolist()}"
            continue
        eps = torch.finfo(a.dtype).eps
        if not name.startswith("outputs"):
            eps = max(eps, torch.finfo(dtype).eps)
        off, floor = error(a, e), 4 * eps * scale(e)
        if name.startswith("outputs"):
            floor = max(floor, zero)
        elif inputs:
            floor = max(floor, zero / inputs)
        if name.startswith("grads") and scale(e) <= 4 * eps * size:
            floor = max(floor, 4 * eps * size)
        for more in (1 + testing.NEIGHBOURS, 1 + 8 * testing.NEIGHBOURS):
            if off > times * max(estimate[i] for estimate in drawn) + floor:
                drawn += [estimates(k) for k in range(len(drawn), more)]
        bound = times * max(estimate[i] for estimate in drawn) + floor
        assert off <= bound, f"{title}: {name} is off by {off:.3g}, allowed {bound:.3g}"


def check_rule(op: str, sample: testing.Sample, subset: list[int] | None = None) -> None:
    """The error rule of `judge` for outputs, buffers and gradients of one call of an op."""
    function = getattr(ops, op)
    actual = evaluate(function, sample, subset)
    call = (sample.args, sample.kwargs)
    dtype = next(x.dtype for x in tree_leaves(call) if isinstance(x, Tensor) and x.is_floating_point())
    names = [f"{kind}[{i}]" for kind in ("outputs", "buffers", "grads") for i in range(len(getattr(actual, kind)))]
    run = lambda call: evaluate(function, testing.Sample(sample.name, *call), subset).all()  # noqa: E731
    with reference_only():
        judge(f"{op} {sample}", names, actual.all(), run, call, dtype)


class Recorder(TorchDispatchMode):
    """Notes every raw op of the package that runs, with copies of its arguments."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.namespace == "segfast":
            keep = lambda x: copy(x) if isinstance(x, Tensor) else x  # noqa: E731
            self.calls.append((function, tree_map(keep, args), tree_map(keep, kwargs)))
        return function(*args, **kwargs)


def record(function, sample: testing.Sample, subset: list[int] | None = None, backward: bool = True) -> Recorder:
    with Recorder() as recorder:
        evaluate(function, sample, subset, backward)
    return recorder


def same_bits(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))
        and torch.equal(a.isnan(), b.isnan())
    )
