"""The one place that knows about the compiled module, Triton and SEGFAST_BACKEND."""

from __future__ import annotations

import contextlib
import importlib.util
import numbers
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

_BACKENDS = ("auto", "triton", "reference")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

requested = os.environ.get("SEGFAST_BACKEND", "auto")
if requested not in _BACKENDS:
    raise ValueError(f"SEGFAST_BACKEND: want one of {', '.join(_BACKENDS)}, got {requested!r}")

# {op: {device type: "c++" | "cuda" | "triton"}}. A plain dict: asking the dispatcher at call time breaks fullgraph compilation.
table: dict[str, dict[str, str]] = {}

if importlib.util.find_spec("segfast._C") is None:
    _C = None  # SEGFAST_BUILD=none: every op runs on its reference, and `python -m segfast` says so
else:
    from segfast import _C as _C  # a module that is there but does not load is an error worth seeing

has_triton = importlib.util.find_spec("triton") is not None


def register(op: str, *others: str) -> None:
    """Notes at import who owns (op, device): C++ if it registered, else Triton on CUDA, else nobody.

    `others` are the further schemas of the op, of which segfast/triton/<op>.py has a function each, as it has of `op`.
    """
    owners = table[op] = {}
    if requested == "reference":
        return
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    if requested == "auto" and has(f"segfast::{op}", "CPU"):
        owners["cpu"] = "c++"
    if requested == "auto" and has(f"segfast::{op}", "CUDA"):
        owners["cuda"] = "cuda"
    elif has_triton and (Path(__file__).parent / "triton" / f"{op}.py").exists():
        for schema in (op, *others):
            torch.library.impl(f"segfast::{schema}", "CUDA", triton_launcher(op, schema))
        owners["cuda"] = "triton"


def triton_launcher(op: str, schema: str):
    """segfast.triton.<op>.<schema>, imported when it first runs: `import segfast` does not pay for Triton."""

    def launch(*args):
        return getattr(importlib.import_module(f"segfast.triton.{op}"), schema)(*args)

    return launch


def has_compiled(op: str, device: str = "CUDA") -> bool:
    """Whether a private op, a piece of others, has its compiled kernel. To be asked once, at import."""
    return requested == "auto" and torch._C._dispatch_has_kernel_for_dispatch_key(f"segfast::{op}", device)


def has_kernel(op: str, *tensors: Tensor) -> bool:
    """Whether `op` runs on a kernel for these tensors; else the caller takes its reference.

    The reference serves exported graphs and traces (they hold only ATen), torch.func transforms, forward-mode AD and tensor
    subclasses.
    """
    if tensors[0].device.type not in table[op] or torch.compiler.is_exporting() or is_transformed():
        return False
    if torch.compiler.is_compiling():
        return True
    if torch.jit.is_tracing():
        return False
    return all(type(t) in (Tensor, torch.nn.Parameter) or isinstance(t, torch._subclasses.FakeTensor) for t in tensors)


def is_transformed() -> bool:
    """Whether this is inside grad, vmap, jvp or another transform of torch.func, or forward-mode AD."""
    return torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0


# torch.compiler.assume_constant_result(is_transformed), without its import of torch._dynamo (600 modules): asked while a
# graph is traced too, whose transforms are entered for real meanwhile.
is_transformed._dynamo_marked_constant = True


def is_whole(value) -> bool:
    """Whether a value is an int, numpy's and a traced one too; True and False are none."""
    return isinstance(value, int | torch.SymInt | numbers.Integral) and not isinstance(value, bool)


def check_whole(op: str, name: str, value) -> None:
    """
    Raises:
        TypeError: a value that is to count something is no int.
    """
    if not is_whole(value):
        raise TypeError(f"{op}: want an int for {name}, got {value!r}")


def check_number(op: str, name: str, value) -> None:
    """
    Raises:
        TypeError: a value that is to be a number is none.
    """
    one = isinstance(value, Tensor) and value.numel() == 1
    if not one and not isinstance(value, numbers.Real | torch.SymFloat | torch.SymInt):
        raise TypeError(f"{op}: want a number for {name}, got {type(value).__name__}")


def check_tensors(op: str, **tensors) -> None:
    """
    Raises:
        TypeError: one is something else.
    """
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{op}: want a tensor for {name}, got {type(value).__name__}")


_local = threading.local()


@contextlib.contextmanager
def capturing() -> Iterator[None]:
    """Within, this thread exports for `segfast.optimize`: what other exports spell out (adaptive pooling) stays whole."""
    _local.capturing = True
    try:
        yield
    finally:
        _local.capturing = False


def is_capturing() -> bool:
    return getattr(_local, "capturing", False)


def layout(x: Tensor) -> torch.memory_format:
    """channels_last stays channels_last; anything else, and what is both, comes out contiguous."""
    if x.dim() == 4 and not is_transformed() and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def empty(size: tuple[int, ...], like: Tensor) -> Tensor:
    """An uninitialised tensor in the dtype and layout of `like`; a large one on the CPU asks for large pages.

    Writing a fresh tensor of 40 MB costs 10,000 page faults otherwise, which take longer than most of what fills it.
    """
    x = torch.empty(size, dtype=like.dtype, device=like.device, memory_format=layout(like))
    if _C is not None and type(x) is Tensor and x.device.type == "cpu":
        _C.advise_huge_pages(x.data_ptr(), x.numel() * x.element_size())
    return x


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Under autocast: the tensors cast (differentiably) to its dtype; else as they are. float64 stays, as autocast has it."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, op, kernel, *args):
        ctx.op = op
        return kernel(*args)

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(f"{ctx.op}: cannot be differentiated twice by its kernels; run with SEGFAST_BACKEND=reference")


def once(op: str, kernel, *args):
    """kernel(*args) within a backward. Differentiating it again raises.

    once_differentiable raises only if the incoming gradient requires one: through a pooling, for one, the second derivative
    of a loss would come out as silent zeros.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return Once.apply(op, kernel, *args)
    return kernel(*args)
