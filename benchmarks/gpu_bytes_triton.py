"""The bytes that the Triton kernels move, launch by launch, counted in Triton's interpreter, against the roofline.

    TRITON_INTERPRET=1 python benchmarks/gpu_bytes_triton.py [--select REGEX]

prints JSON; `python benchmarks/gpu_resources.py --part triton_bytes` calls it and keeps what it prints. A byte that a launch
loads several times counts once: what DRAM must give where the caches hold what programs beside each other share. `requested`
counts it every time. `ideal` is the roofline's formula, with A, B and D the elements of input, depthwise result and output.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import re
from collections.abc import Callable, Iterator

import numpy as np
import torch
import triton
from torch import Tensor
from triton.runtime import interpreter


class Accesses:
    """Of one launch: addresses and element sizes of what it loads and stores."""

    def __init__(self, kernel: str):
        self.kernel = kernel
        self.seen: dict[str, dict[int, list[np.ndarray]]] = {"loaded": {}, "stored": {}}
        self.requested = 0

    def add(self, kind: str, pointers, mask) -> None:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        at = pointers.data[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)]
        self.seen[kind].setdefault(size, []).append(at)
        self.requested += size * at.size

    def row(self) -> dict[str, int]:
        row = {
            kind: sum(size * len(np.unique(np.concatenate(a))) for size, a in seen.items()) for kind, seen in self.seen.items()
        }
        return {**row, "requested": self.requested}


@contextlib.contextmanager
def counted() -> Iterator[list[Accesses]]:
    """Within it, every launch appends its accesses."""
    launches: list[Accesses] = []
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, call = builder.create_masked_load, builder.create_masked_store, executor.__call__

    def masked_load(self, pointers, mask, *rest):
        launches[-1].add("loaded", pointers, mask)
        return load(self, pointers, mask, *rest)

    def masked_store(self, pointers, value, mask, *rest):
        launches[-1].add("stored", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def launch(self, *args, **kwargs):
        launches.append(Accesses(self.fn.__name__))
        return call(self, *args, **kwargs)

    builder.create_masked_load, builder.create_masked_store, executor.__call__ = masked_load, masked_store, launch
    try:
        yield launches
    finally:
        builder.create_masked_load, builder.create_masked_store, executor.__call__ = load, store, call


def random(*size: int, dtype: torch.dtype, channels_last: bool = False) -> Tensor:
    x = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def cases() -> Iterator[tuple[str, Callable[[], object], int]]:
    """(name, call, ideal bytes). The blocks are small enough for an interpreter, and the programs that leave partial sums are as
    many fewer as makes these the same share of what is moved as they are of a block 4x64x64x128 to 64 in float16."""
    module = importlib.import_module("segfast.triton.ds_conv")
    module.PARTS, module.TAP_PARTS, module.WEIGHT_PARTS = 32, 8, 8
    launcher = lambda op, schema=None: getattr(importlib.import_module(f"segfast.triton.{op}"), schema or op)  # noqa: E731
    for n, c, k, h, w, stride, dtype in (
        (1, 32, 32, 32, 64, 1, torch.float16),
        (1, 32, 32, 32, 64, 1, torch.float32),
        (1, 32, 48, 64, 96, 2, torch.float16),
    ):
        torch.backends.cuda.matmul.allow_tf32 = True  # the tiles of tensor cores: fewer, and so quicker to interpret
        x = random(n, c, h, w, dtype=dtype, channels_last=True)
        oh, ow = -(-h // stride), -(-w // stride)
        u, y = (random(n, channels, oh, ow, dtype=dtype, channels_last=True) for channels in (c, k))
        one, two = ([torch.rand(channels) + 0.5 for _ in range(4)] for channels in (c, k))
        dw, pw = random(c, 1, 3, 3, dtype=dtype), random(k, c, 1, 1, dtype=dtype)
        options = (stride, stride), (1, 1), (1, 1), 1, 1
        inference = x, dw, None, *one, 1e-5, pw, None, *two, 1e-5, *options
        train = x, dw, None, None, None, *one[2:], 1e-5, pw, None, None, None, *two[2:], 1e-5, *options
        backward = y.clone(), x, u, y, dw, *one, 1e-5, True, pw, *two, 1e-5, True, *options, True
        a, b, d = (dtype.itemsize * t.numel() for t in (x, u, y))
        name = f"{n}x{c}x{h}x{w} to {k} s{stride} {str(dtype).removeprefix('torch.')}"
        for schema, arguments, ideal in (
            ("ds_conv", inference, a + d),
            ("ds_conv_train", train, a + 2 * b + 3 * d),
            ("ds_conv_backward", backward, 2 * a + 4 * b + 4 * d),
        ):
            call = launcher("ds_conv", schema)
            yield f"{schema} {name}", lambda call=call, arguments=arguments: call(*arguments), ideal
    for dtype in (torch.float32, torch.float16):
        for channels_last in (False, True):
            layout = f"{str(dtype).removeprefix('torch.')} {'channels_last' if channels_last else 'contiguous'}"
            for classes, h, w in ((19, 32, 64), (150, 16, 16)):
                s = random(2, classes, h, w, dtype=dtype, channels_last=channels_last)
                yield (
                    f"pixelwise_kl gradient 2x{classes}x{h}x{w} {layout}",
                    lambda s=s: launcher("pixelwise_kl")(s, s + 1, None, 2.0, 1, True),
                    3 * s.numel() * dtype.itemsize,
                )
            x, half = (random(1, channels, 16, 32, dtype=dtype, channels_last=channels_last) for channels in (116, 58))
            yield (
                f"channel_shuffle 1x116x16x32 g2 {layout}",
                lambda x=x: launcher("channel_shuffle")(x, 2),
                2 * x.numel() * dtype.itemsize,
            )
            yield (
                f"concat_shuffle 58+58x16x32 {layout}",
                lambda half=half: launcher("concat_shuffle")([half, half + 1], 2),
                2 * x.numel() * dtype.itemsize,
            )


def table(select: str = "") -> dict[str, dict]:
    rows = {}
    for name, call, ideal in cases():
        if not re.search(select, name):
            continue
        with counted() as launches:
            call()
        kernels: dict[str, dict[str, int]] = {}
        for launch in launches:
            row = kernels.setdefault(launch.kernel, {"loaded": 0, "stored": 0, "requested": 0, "launches": 0})
            for key, value in (launch.row() | {"launches": 1}).items():
                row[key] += value
        moved = sum(row["loaded"] + row["stored"] for row in kernels.values())
        rows[name] = {"ideal": ideal, "ratio": round(moved / ideal, 3), "kernels": kernels}
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--select", default="", help="a regular expression: cases to count")
    assert triton.knobs.runtime.interpret, "TRITON_INTERPRET=1 is wanted"
    print(json.dumps(table(parser.parse_args().select)))
