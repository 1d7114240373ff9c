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
NOT_DIFFERENTIABLE = ("running_mean", "running_var", "num_batches_tracked", "mask", "target")


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


def check_rule(op: str, sample: testing.Sample, subset: list[int] | None = None) -> None:
    """Error against float64 at most twice the same-dtype reference's plus 4 eps(dtype) max|exact|: outputs, buffers, gradients.

    float64 has no finer oracle: there the reference's error is its float32 error scaled by the ratio of the two eps.
    """
    function = getattr(ops, op)
    actual = evaluate(function, sample, subset)
    dtype = next(x.dtype for x in tree_leaves((sample.args, sample.kwargs)) if isinstance(x, Tensor) and x.is_floating_point())
    with reference_only():
        reference = evaluate(function, sample, subset)
        exact = evaluate(function, as_dtype(sample, torch.float64), subset)
        if dtype == torch.float64:
            single = as_dtype(sample, torch.float32)
            rough = evaluate(function, single, subset)
            rough_exact = evaluate(function, as_dtype(single, torch.float64), subset)
            ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
            estimates = [ratio * error(a, b) if a is not None else 0.0 for a, b in zip(rough.all(), rough_exact.all())]
        else:
            estimates = [error(a, b) if a is not None else 0.0 for a, b in zip(reference.all(), exact.all())]
    names = [f"{kind}[{i}]" for kind in ("outputs", "buffers", "grads") for i in range(len(getattr(actual, kind)))]
    assert len(actual.all()) == len(reference.all()) == len(exact.all())
    for name, a, r, e, estimate in zip(names, actual.all(), reference.all(), exact.all(), estimates):
        if a is None or r is None:
            zero = a if r is None else r
            assert zero is None or not zero.any(), f"{op} {sample}: {name} is None on one side only"
            continue
        assert a.dtype == r.dtype, f"{op} {sample}: {name} is {a.dtype}, the reference's {r.dtype}"
        assert a.shape == r.shape, f"{op} {sample}: {name} is {tuple(a.shape)}, the reference's {tuple(r.shape)}"
        if name.startswith("outputs") and a.numel():
            strides = [[step for step, size in zip(y.stride(), y.shape) if size > 1] for y in (a, r)]
            assert strides[0] == strides[1], f"{op} {sample}: {name} has strides {strides[0]}, the reference's {strides[1]}"
        bound = 2 * estimate + 4 * torch.finfo(a.dtype).eps * scale(e)
        assert error(a, e) <= bound, f"{op} {sample}: {name} is off by {error(a, e):.3g}, allowed {bound:.3g}"


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
