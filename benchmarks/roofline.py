"""How near ds_conv is to what the processor can do in float32: two tables on the terminal.

python benchmarks/roofline.py

The ceilings are measured, in turns with the rest, with the same two threads: the best of PyTorch's own large matrix products
(MKL), and its copy of a map that no cache holds. A training step's floor is its matrix products at the one and the maps that it
must read and write at the other: the batch's statistics are known only when a map is whole, so each is read again after them.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from measure import machine
from test_speed_ds_conv import INFERENCE, TRAINING, block, name, step

from segfast.engine.kernels import median

SECONDS = 10.0
SIZES = (768, 1024, 1536)
COPIED = 1 << 26  # floats


def products() -> tuple[list, list[float]]:
    """The largest products as calls, and the operations of each."""
    squares = [(torch.randn(n, n), torch.randn(n, n), torch.empty(n, n)) for n in SIZES]
    return [lambda a=a, b=b, out=out: torch.mm(a, b, out=out) for a, b, out in squares], [2.0 * n**3 for n in SIZES]


def inference() -> None:
    calls, work = products()
    for channels, out, height, width, stride in INFERENCE:
        module = block(channels, out, stride).eval()
        x = torch.randn(1, channels, height, width).contiguous(memory_format=torch.channels_last)
        calls.append(lambda module=module, x=x: module(x))
        work.append(2 * channels * (9 + out) * (height // stride) * (width // stride))
    with torch.no_grad():
        rates = [w / t / 1e6 for w, t in zip(work, median(calls, SECONDS))]  # GFLOP/s
    ceiling = max(rates[: len(SIZES)])
    print(f"\nLargest matrix product: {ceiling:.0f} GFLOP/s.\n")
    print("| channels in x out x height x width, stride | GFLOP/s | of the largest product |\n|---|---|---|")
    for shape, rate in zip(INFERENCE, rates[len(SIZES) :]):
        print(f"| {name(shape)} | {rate:.0f} | {100 * rate / ceiling:.0f} % |")


def training() -> None:
    source, target = torch.randn(COPIED), torch.zeros(COPIED)
    head = [
        "training step",
        "eager, ms",
        "segfast, ms",
        "products at the ceiling, ms",
        "maps at the copy's rate, ms",
        "eager / both",
    ]
    print(f"\n| {' | '.join(head)} |\n{'|---' * len(head)}|")
    for batch, channels, out, height, width, stride in TRAINING:
        module = block(channels, out, stride).train()
        plain = copy.deepcopy(module.conv)
        x = torch.randn(batch, channels, height, width).contiguous(memory_format=torch.channels_last)
        upstream = torch.randn_like(plain(x).detach())
        calls, work = products()
        calls += [lambda: target.copy_(source), step(plain, x, upstream), step(module, x, upstream)]
        *squares, copied, eager, ours = median(calls, SECONDS)
        ceiling = max(w / t for w, t in zip(work, squares))  # operations a millisecond
        pixels = batch * (height // stride) * (width // stride)
        arithmetic = 3 * 2 * pixels * channels * out / ceiling
        # x, x again and its gradient; u, what comes of it and the gradient between the halves; z, y and y's gradient
        floats = 3 * x.numel() + 6 * pixels * channels + 7 * pixels * out
        traffic = floats / (2 * COPIED) * copied
        shape = (batch, channels, out, height, width, stride)
        times = " | ".join(f"{t:.2f}" for t in (eager, ours, arithmetic, traffic))
        print(f"| {name(shape)} | {times} | {eager / (arithmetic + traffic):.2f} |")


def main() -> None:
    torch.set_num_threads(2)
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    inference()
    training()


if __name__ == "__main__":
    main()
