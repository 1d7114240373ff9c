"""Every kernel against its reference, and its time against plain PyTorch: what `segfast demo` shows first."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from types import FunctionType

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_map_with_path

from segfast import _backend, ops
from segfast.nn import DSConv
from segfast.testing import NEIGHBOURS, SAMPLES, Sample, neighbour

OPS = [name for name in ops.__all__ if isinstance(getattr(ops, name), FunctionType)]
BUFFERS = ("running_mean", "running_var", "mask")  # no gradient


@dataclass(frozen=True)
class Check:
    """One operation's samples: `error` is the worst distance from the float64 reference in units of what is allowed."""

    op: str
    backend: str
    samples: int
    error: float

    @property
    def passed(self) -> bool:
        return self.samples > 0 and self.error <= 1

    def asdict(self) -> dict:
        return {**asdict(self), "passed": self.passed}


@dataclass(frozen=True)
class Timing:
    """Medians in milliseconds of the same work done by this package and by eager PyTorch, taken in turns."""

    op: str
    shape: str
    milliseconds: float
    eager_milliseconds: float

    @property
    def speedup(self) -> float:
        return self.eager_milliseconds / self.milliseconds

    def asdict(self) -> dict:
        return {**asdict(self), "speedup": self.speedup}


def check(op: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Check:
    """Run the operation's samples, outputs and gradients, on its kernel and on its reference.

    Allowed is twice the error of the reference in the same dtype plus 4 eps(dtype) max|exact|, both against float64; where that
    does not do, the reference's error is the largest of several points within rounding of the sample (near an activation's kink
    a gradient is one thing or another in eager PyTorch too). What is zero but for rounding takes the largest of the call's
    tensors for max|exact|.
    """
    function = getattr(ops, op)
    reference = function.__globals__[f"{op}_reference"]

    def reference_errors(sample, k: int) -> list[float]:
        near = Sample(sample.name, *neighbour((sample.args, sample.kwargs), k, dtype))
        return [distance(*pair) for pair in zip(results(reference, near, dtype), results(reference, near, torch.float64))]

    worst, count = 0.0, 0
    for sample in SAMPLES[op](dtype, torch.device(device)) if op in SAMPLES else ():
        count += 1
        fused, exact, errors = (
            results(function, sample, dtype),
            results(reference, sample, torch.float64),
            reference_errors(sample, 0),
        )
        if most(fused, exact, errors) > 1:
            drawn = [errors, *(reference_errors(sample, k) for k in range(1, 1 + NEIGHBOURS))]
            errors = [max(column) for column in zip(*drawn)]
        worst = max(worst, most(fused, exact, errors))
    return Check(op, _backend.table.get(op, {}).get(device, "reference"), count, worst)


def results(function: Callable, sample, dtype: torch.dtype) -> list[Tensor]:
    leaves: list[Tensor] = []

    def leaf(path, value):
        if not isinstance(value, Tensor):
            return value
        if not value.is_floating_point():
            return value.clone()
        value = value.detach().to(dtype, copy=True)
        if not any(name in keystr(path) for name in BUFFERS):
            leaves.append(value.requires_grad_())
        return value

    args, kwargs = tree_map_with_path(leaf, (sample.args, sample.kwargs))
    outputs = function(*args, **kwargs)
    outputs = [o for o in (outputs if isinstance(outputs, list | tuple) else [outputs]) if isinstance(o, Tensor)]
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(o.shape, generator=generator).bfloat16().double().to(o.device) for o in outputs]  # exact in any dtype
    scalar = sum((o.double() * w).sum() for o, w in zip(outputs, weights))
    gradients = torch.autograd.grad(scalar, leaves, allow_unused=True) if leaves and scalar.requires_grad else ()
    return [o.detach() for o in outputs] + [g for g in gradients if g is not None]


def distance(x: Tensor, exact: Tensor) -> float:
    x, exact = x.double(), exact.double()
    if not torch.equal(x.isfinite(), exact.isfinite()):
        return float("inf")
    return float((x - exact)[exact.isfinite()].abs().max()) if exact.isfinite().any() else 0.0


def most(fused: list[Tensor], exact: list[Tensor], errors: list[float]) -> float:
    worst = 0.0
    largest = [float(truth[truth.isfinite()].abs().max()) if truth.isfinite().any() else 0.0 for truth in exact]
    for x, truth, error, size in zip(fused, exact, errors, largest, strict=True):
        eps = torch.finfo(x.dtype).eps if x.is_floating_point() else 0.0  # a whole number is right or wrong
        # Zero but for rounding (the gradient of a bias before a BatchNorm): the size of the others is what was rounded.
        size = max(largest) if size <= 4 * eps * max(largest) else size
        allowed, off = 2 * error + 4 * eps * size, distance(x, truth)
        worst = max(worst, off / allowed if allowed else (0.0 if off == 0 else float("inf")))
    return worst


def median(functions: list[Callable[[], object]], seconds: float) -> list[float]:
    """Milliseconds of each, measured in turns, so that what else the machine does falls on all of them."""
    for function in functions:
        function()
    times: list[list[float]] = [[] for _ in functions]
    end = time.perf_counter() + seconds
    while len(times[0]) < 3 or time.perf_counter() < end:
        for function, taken in zip(functions, times):
            start = time.perf_counter()
            function()
            taken.append(1000 * (time.perf_counter() - start))
    return [float(torch.tensor(taken).median()) for taken in times]


def timings(seconds: float = 1.0) -> Iterator[Timing]:
    """Time each operation at a size from practice for about `seconds`, on the CPU, against its PyTorch reference."""
    generator = torch.Generator().manual_seed(0)

    def randn(*size: int, channels_last: bool = False) -> Tensor:
        x = torch.randn(*size, generator=generator)
        return x.contiguous(memory_format=torch.channels_last) if channels_last else x

    def forward_backward(function: Callable, *inputs: Tensor, **kwargs) -> Callable[[], None]:
        def run() -> None:
            student = inputs[0].detach().requires_grad_()
            function(student, *inputs[1:], **kwargs).backward()

        return run

    def inference(module: nn.Module, x: Tensor) -> Callable[[], Tensor]:
        return torch.no_grad()(lambda: module(x))

    def step(module: nn.Module, x: Tensor) -> Callable[[], None]:
        def run() -> None:
            module(x).sum().backward()

        return run

    for name, size, out in (("64x128x256", (1, 64, 128, 256), 64), ("128x64x128", (1, 128, 64, 128), 128)):
        block, x = DSConv(size[1], out).eval().to(memory_format=torch.channels_last), randn(*size, channels_last=True)
        yield Timing("ds_conv, inference", name, *median([inference(block, x), inference(block.conv, x)], seconds))
    block, x = DSConv(64, 64).to(memory_format=torch.channels_last), randn(4, 64, 64, 128, channels_last=True)
    yield Timing("ds_conv, training step", "4x64x64x128", *median([step(block, x), step(block.conv, x)], seconds))
    for op, shape, inputs in (
        ("pixelwise_kl", "2x19x256x512", (randn(2, 19, 256, 512), randn(2, 19, 256, 512))),
        ("pairwise_loss", "2x128x64x64", (randn(2, 128, 64, 64), randn(2, 128, 64, 64))),
    ):
        if op in ops.__all__:
            reference = getattr(ops, op).__globals__[f"{op}_reference"]
            options = {"node_size": 1} if op == "pairwise_loss" else {}
            runs = [forward_backward(f, *inputs, **options) for f in (getattr(ops, op), reference)]
            yield Timing(f"{op}, with gradient", shape, *median(runs, seconds))
    x = randn(1, 116, 128, 128)
    yield Timing("channel_shuffle", "116x128x128", *median(shuffles("channel_shuffle", x), seconds))
    if "concat_shuffle" in ops.__all__:
        yield Timing("concat_shuffle", "2 x 116x128x128", *median(shuffles("concat_shuffle", [x, x + 1]), seconds))


def shuffles(op: str, x) -> list[Callable[[], Tensor]]:
    function = getattr(ops, op)
    reference = function.__globals__[f"{op}_reference"]
    return [lambda: function(x, 2), lambda: reference(x, 2)]
