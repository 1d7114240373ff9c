"""How near ds_conv's inference is to what the processor can do in float32: a table on the terminal.

python benchmarks/roofline.py

The ceiling is measured, in turns with the rest: the best of PyTorch's own large matrix products (MKL), the same two threads.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from measure import machine
from test_speed_ds_conv import INFERENCE, block, name

from segfast.engine.kernels import median

SECONDS = 10.0


def main() -> None:
    torch.set_num_threads(2)
    sizes = (768, 1024, 1536)
    squares = [(torch.randn(n, n), torch.randn(n, n), torch.empty(n, n)) for n in sizes]
    calls = [lambda a=a, b=b, out=out: torch.mm(a, b, out=out) for a, b, out in squares]
    work = [2 * n**3 for n in sizes]
    for channels, out, height, width, stride in INFERENCE:
        module = block(channels, out, stride).eval()
        x = torch.randn(1, channels, height, width).contiguous(memory_format=torch.channels_last)
        calls.append(lambda module=module, x=x: module(x))
        work.append(2 * channels * (9 + out) * (height // stride) * (width // stride))
    with torch.no_grad():
        rates = [w / t / 1e6 for w, t in zip(work, median(calls, SECONDS))]  # GFLOP/s
    ceiling = max(rates[: len(sizes)])
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    print(f"\nLargest matrix product: {ceiling:.0f} GFLOP/s.\n")
    print("| channels in x out x height x width, stride | GFLOP/s | of the largest product |\n|---|---|---|")
    for shape, rate in zip(INFERENCE, rates[len(sizes) :]):
        print(f"| {name(shape)} | {rate:.0f} | {100 * rate / ceiling:.0f} % |")


if __name__ == "__main__":
    main()
