"""The CUDA kernels as CPU ops: the host build loaded, put in the place of segfast's raw ops, and what its calls should move."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator

import simt_build
import torch

from segfast import _backend, testing

CPU = torch.device("cpu")
OPS = ("channel_shuffle", "concat_shuffle", "pixelwise_kl")  # public functions whose CUDA kernels are compiled for the host
RAW = ("channel_shuffle", "concat_shuffle", "concat_shuffle_backward", "pixelwise_kl", "depthwise", "depthwise_train")
SCHEDULES = ("forward", "reverse", "shuffled")


class Kernels:
    """The library of host-compiled CUDA kernels."""

    def __init__(self):
        path = simt_build.library(simt_build.cache())
        for op in RAW:
            schema = str(getattr(torch.ops.segfast, op).default._schema)
            torch.library.define(f"segfast_simt::{op}", schema[schema.index("(") :])
        torch.ops.load_library(str(path))
        self.library = ctypes.CDLL(str(path))

    def configure(self, order: str = "forward", threads: int = 256, blocks: int = 1 << 16) -> None:
        self.library.simt_configure(SCHEDULES.index(order), threads, ctypes.c_int64(blocks))

    def take_counts(self) -> tuple[int, int, int]:
        """Launches, bytes loaded and bytes stored since the last call."""
        counts = (ctypes.c_int64 * 3)()
        self.library.simt_take_counts(counts)
        return tuple(counts)

    @contextlib.contextmanager
    def own_every_op(self):
        """torch.ops.segfast.<op> is the CUDA kernel, and the table says that there is one."""
        kept = {op: getattr(torch.ops.segfast, op) for op in RAW}
        table = {op: dict(owners) for op, owners in _backend.table.items()}
        try:
            for op in RAW:
                setattr(torch.ops.segfast, op, getattr(torch.ops.segfast_simt, op))
            for op in OPS:
                _backend.table[op]["cpu"] = "cuda"
            self.take_counts()
            yield self
        finally:
            for op, packet in kept.items():
                setattr(torch.ops.segfast, op, packet)
            for op, owners in table.items():
                _backend.table[op].clear()
                _backend.table[op].update(owners)


@functools.cache
def kernels() -> Kernels:
    """Loaded once: a process can register them only once."""
    return Kernels()


def depthwise_inputs(case, dtype):
    size, kernel, *options = case
    x = testing.tensor(*size, dtype=dtype, device=CPU)
    weight = testing.tensor(size[1], 1, *kernel, dtype=dtype, device=CPU, seed=1) / kernel[0]
    wide = torch.promote_types(dtype, torch.float32)
    scale, shift = (testing.tensor(size[1], dtype=wide, device=CPU, seed=i) for i in (2, 3))
    return x, weight, scale, shift, *options


def roofline(op: str, dtype: torch.dtype, layout: str) -> Iterator[tuple[str, Callable[[], object], int]]:
    """(name, call, ideal bytes) by the counts of elements: in and out once, logits twice and their gradient once."""
    size = dtype.itemsize
    raw = getattr(torch.ops.segfast, op).default

    def tensors(number: int, *shape: int) -> list[torch.Tensor]:
        return [testing.tensor(*shape, dtype=dtype, device=CPU, layout=layout, seed=i) for i in range(number)]

    if op == "channel_shuffle":
        for n, c, h, w, groups in ((1, 58, 16, 32, 2), (2, 48, 9, 13, 3), (1, 64, 7, 7, 32)):
            (x,) = tensors(1, n, c, h, w)
            yield f"{n}x{c}x{h}x{w} g{groups}", functools.partial(raw, x, groups), 2 * x.numel() * size
    if op == "concat_shuffle":
        for c in (58, 116):
            pair = tensors(2, 1, c, 8, 16)
            yield f"{c}+{c}x8x16", functools.partial(raw, pair, 2), 4 * pair[0].numel() * size
    if op == "concat_shuffle_backward":
        (grad,) = tensors(1, 1, 116, 8, 16)
        yield "58+58x8x16", functools.partial(raw, grad, [58, 58], 2), 2 * grad.numel() * size
    if op == "pixelwise_kl":
        for classes, h, w in ((19, 40, 64), (21, 16, 32), (150, 16, 16), (1000, 8, 8)):
            pair = tensors(2, 1, classes, h, w)
            logits, valid = pair[0].numel() * size, torch.ones(1, h, w, dtype=torch.bool)
            name = f"{classes}x{h}x{w}"
            yield f"{name} loss", functools.partial(raw, *pair, None, 2.0, 1, False), 2 * logits
            yield f"{name} gradient", functools.partial(raw, *pair, None, 2.0, 1, True), 3 * logits
            # The mask is counted first: the gradient needs the number of pixels.
            yield f"{name} mask", functools.partial(raw, *pair, valid, 2.0, 1, True), 3 * logits + 2 * valid.numel()
    if op.startswith("depthwise") and layout == "contiguous":
        for n, c, h, w, stride in ((1, 2, 64, 128, 1), (1, 2, 128, 256, 2), (1, 3, 128, 256, 1), (1, 4, 32, 64, 1)):
            x, weight, scale, shift, *_ = depthwise_inputs(((n, c, h, w), (3, 3)), dtype)
            options = ((stride, stride), (1, 1), (1, 1))
            arguments = (x, weight, scale, shift, *options, 1) if op == "depthwise" else (x, weight, None, *options)
            yield f"{n}x{c}x{h}x{w} s{stride}", functools.partial(raw, *arguments), (x.numel() + x.numel() // stride**2) * size
