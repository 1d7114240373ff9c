"""On a GPU: build, check and time everything, and write one JSON.

    python benchmarks/gpu.py [--output gpu.json] [--no-build] [--no-check]

Each call is captured in a CUDA graph and replayed; before each replay a buffer larger than the L2 cache is overwritten, outside
the timed interval (the idiom of triton.testing.do_bench). Times are medians between CUDA events, in microseconds, beside those of
the plain PyTorch reference, eager and compiled, taken in the same process. A failed check leaves no times: they would not count.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
REPLAYS = 50
BUDGET = 160.0  # seconds for timing the operations, half as many for networks: what does not fit is reported as left out


def captured(call: Callable[[], object]) -> tuple[torch.cuda.CUDAGraph, object]:
    """A CUDA graph of the call, and what the call gave within it; first it runs three times on a stream of its own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


def median_microseconds(call: Callable[[], object], flush: Tensor) -> float:
    graph, _ = captured(call)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(REPLAYS)]
    for start, end in events:
        flush.zero_()
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    times = sorted(1000 * start.elapsed_time(end) for start, end in events)
    return times[len(times) // 2]


def with_gradient(function: Callable[..., Tensor], inputs: list[Tensor]) -> Callable[[], object]:
    def step():
        y = function()
        return torch.autograd.grad(y, inputs, torch.ones_like(y))

    return step


def cases() -> Iterator[tuple[str, Callable[[], Tensor], Callable[[], Tensor], list[Tensor]]]:
    """(name, the op, its reference, what to differentiate by or nothing)"""
    from segfast import ops
    from segfast.ops.channel_shuffle import channel_shuffle_reference
    from segfast.ops.concat_shuffle import concat_shuffle_reference
    from segfast.ops.ds_conv import ds_conv_reference
    from segfast.ops.pairwise_loss import pairwise_loss_reference
    from segfast.ops.pixelwise_kl import pixelwise_kl_reference
    from segfast.ops.upsample_argmax import upsample_argmax_reference
    from segfast.ops.upsample_cross_entropy import upsample_cross_entropy_reference
    from segfast.ops.upsample_pixelwise_kl import upsample_pixelwise_kl_reference

    def random(*size, dtype=torch.float32, layout=torch.contiguous_format, gradient=False):
        return torch.randn(size, device="cuda").to(dtype).contiguous(memory_format=layout).requires_grad_(gradient)

    def norm(channels):
        return ops.BatchNorm(*(torch.rand(channels, device="cuda") + 0.5 for _ in range(4)))

    last = torch.channels_last
    for dtype in (torch.float32, torch.bfloat16):
        for batch, c, k, h, w, stride in (
            (1, 32, 48, 256, 512, 2), (1, 48, 64, 128, 256, 2), (1, 64, 64, 128, 256, 1), (1, 128, 128, 64, 128, 1),
            (1, 384, 64, 64, 128, 1), (8, 64, 64, 128, 256, 1),
        ):  # fmt: skip
            for training in (False, True):
                x = random(batch, c, h, w, dtype=dtype, layout=last, gradient=training)
                weights = random(c, 1, 3, 3, dtype=dtype, gradient=training), random(k, c, 1, 1, dtype=dtype, gradient=training)
                options = {"dw_bn": norm(c), "pw_bn": norm(k), "stride": stride, "training": training}
                name = f"ds_conv {batch}x{c}x{h}x{w} -> {k} /{stride} {'training' if training else 'inference'} {dtype}"
                yield (
                    name,
                    lambda x=x, weights=weights, options=options: ops.ds_conv(x, *weights, **options),
                    lambda x=x, weights=weights, options=options: ds_conv_reference(x, *weights, **options),
                    [x, *weights] if training else [],
                )
        for layout in (torch.contiguous_format, last):
            kind = "channels_last" if layout == last else "contiguous"
            for n, c, h, w in ((2, 19, 512, 1024), (2, 150, 128, 128)):
                s = random(n, c, h, w, dtype=dtype, layout=layout, gradient=True)
                t = random(n, c, h, w, dtype=dtype, layout=layout)
                yield (
                    f"pixelwise_kl {n}x{c}x{h}x{w} {kind} {dtype}",
                    lambda s=s, t=t: ops.pixelwise_kl(s, t),
                    lambda s=s, t=t: pixelwise_kl_reference(s, t),
                    [s],
                )
            x = random(2, 19, 64, 128, dtype=dtype, layout=layout, gradient=True)
            t = random(2, 19, 128, 256, dtype=dtype, layout=layout)
            target = torch.randint(0, 19, (2, 512, 1024), device="cuda")
            for op, reference, inputs in (
                (ops.upsample_argmax, upsample_argmax_reference, (x, (512, 1024))),
                (ops.upsample_cross_entropy, upsample_cross_entropy_reference, (x, target)),
                (ops.upsample_pixelwise_kl, upsample_pixelwise_kl_reference, (x, t, (512, 1024))),
            ):
                yield (
                    f"{op.__name__} 2x19x64x128 -> 512x1024 {kind} {dtype}",
                    lambda op=op, inputs=inputs: op(*inputs),
                    lambda reference=reference, inputs=inputs: reference(*inputs),
                    [x] if op is not ops.upsample_argmax else [],
                )
            x = random(4, 116, 64, 128, dtype=dtype, layout=layout)
            pair = list(x.chunk(2, 1))
            pair = [p.contiguous(memory_format=layout) for p in pair]
            name = f"4x116x64x128 {kind} {dtype}"
            yield (
                f"channel_shuffle {name}",
                lambda x=x: ops.channel_shuffle(x, 2),
                lambda x=x: channel_shuffle_reference(x, 2),
                [],
            )
            yield (
                f"concat_shuffle {name}",
                lambda pair=pair: ops.concat_shuffle(pair, 2),
                lambda pair=pair: concat_shuffle_reference(pair, 2),
                [],
            )
        s, t = random(2, 128, 64, 64, dtype=dtype, gradient=True), random(2, 128, 64, 64, dtype=dtype)
        yield (
            f"pairwise_loss 2x128x64x64 {dtype}",
            lambda s=s, t=t: ops.pairwise_loss(s, t, node_size=1),
            lambda s=s, t=t: pairwise_loss_reference(s, t, node_size=1),
            [s],
        )


NETWORKS = ("fast_scnn", "contextnet", "espnet", "swiftnet_rn18")


def time_networks() -> dict[str, dict[str, float | str]]:
    """Networks at 1024 x 2048 to logits, batch 1: `segfast.optimize`, eager in channels_last, and compiled with CUDA graphs."""
    import segfast

    results: dict[str, dict[str, float | str]] = {}
    start = time.monotonic()
    for name, dtype in ((name, dtype) for name in NETWORKS for dtype in (torch.float32, torch.bfloat16)):
        model = segfast.create_model(name).eval().cuda().to(dtype).to(memory_format=torch.channels_last)
        x = torch.randn(1, 3, 1024, 2048, device="cuda", dtype=dtype).contiguous(memory_format=torch.channels_last)
        row: dict[str, float | str] = {}
        ways = {
            "segfast": lambda model=model, dtype=dtype: segfast.optimize(model, dtype=dtype),
            "eager": lambda model=model: model,
            "compiled": lambda model=model: torch.compile(model, mode="reduce-overhead"),
        }
        for way, make in ways.items():
            if time.monotonic() - start > BUDGET / 2:
                row[way] = "left out: no time"
                continue
            try:
                row[way] = median_of_calls(make(), x)
            except Exception as error:
                row[way] = f"failed: {error}"
        results[f"{name} 1024x2048 {dtype}"] = row
        print(name, dtype, row, flush=True)
    return results


@torch.inference_mode()
def median_of_calls(model: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Microseconds of one call, from its start on the host to the end on the device."""
    times = []
    for _ in range(5 + REPLAYS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        model(x)
        torch.cuda.synchronize()
        times.append(1e6 * (time.perf_counter() - start))
    return sorted(times[5:])[REPLAYS // 2]


def time_everything() -> dict[str, dict[str, float | str]]:
    cache = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 64 << 20)
    flush = torch.empty(max(2 * cache, 64 << 20), dtype=torch.uint8, device="cuda")
    results: dict[str, dict[str, float | str]] = {}
    start = time.monotonic()
    for name, op, reference, inputs in cases():
        row: dict[str, float | str] = {}
        for provider, function in (("segfast", op), ("eager", reference), ("compiled", torch.compile(reference))):
            if time.monotonic() - start > BUDGET:
                row[provider] = "left out: no time"
                continue
            call = with_gradient(function, inputs) if inputs else function
            try:
                with torch.set_grad_enabled(bool(inputs)):
                    row[provider] = median_microseconds(call, flush)
            except Exception as error:  # one provider that fails is a line of the table, not the end of it
                row[provider] = f"failed: {error}"
        results[name] = row
        print(name, row, flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu.json"))
    parser.add_argument("--no-build", action="store_true", help="the package is built already")
    parser.add_argument("--no-check", action="store_true", help="only time")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no GPU here: nothing is built, checked or timed")
    major, minor = torch.cuda.get_device_capability()
    report: dict[str, object] = {
        "device": torch.cuda.get_device_name(),
        "capability": f"{major}.{minor}",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "replays": REPLAYS,
        "unit": "microseconds, median",
    }
    if not options.no_build:
        build = [sys.executable, "setup.py", "build_ext", "--inplace"]
        arch = {"TORCH_CUDA_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST", f"{major}.{minor}")}
        done = subprocess.run(build, cwd=ROOT, env={**os.environ, **arch}, check=False)
        report["build"] = "ok" if done.returncode == 0 else f"failed ({done.returncode}): Triton serves"
    if not options.no_check:
        done = subprocess.run([sys.executable, "-m", "pytest", "-m", "gpu", "tests"], cwd=ROOT, check=False, timeout=240)
        report["check"] = "ok" if done.returncode == 0 else f"failed ({done.returncode})"
    if report.get("check", "ok") == "ok":
        sys.path.insert(0, str(ROOT))
        from segfast import _backend

        report["owners"] = {op: owners.get("cuda", "reference") for op, owners in _backend.table.items()}
        report["times"] = time_everything()
        report["networks"] = time_networks()
    options.output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {options.output}")
    raise SystemExit(report.get("check", "ok") != "ok")


if __name__ == "__main__":
    main()
