"""The figures of docs/optimize.md: whole networks by segfast.optimize against their peers, a row a call.

python benchmarks/optimize.py --list
python benchmarks/optimize.py --row fast_scnn-1024x2048
python benchmarks/optimize.py --memory fast_scnn-1024x2048
python benchmarks/optimize.py --docs
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

import segfast
from segfast.engine import checkpoint
from segfast.engine.catalogue import table
from segfast.engine.race import INCLUDED, NOTE, PEERS, prepare, race

ROOT = Path(__file__).resolve().parents[1]
ALL = ROOT / "docs" / "results"
MAIN = ALL / "optimize.json"  # of README.md: processors with AMX
OTHERS = {kernels: ALL / f"optimize_{kernels}.json" for kernels in ("avx512", "avx2")}  # have results of their own
KERNEL_SETS = segfast._backend._C.cpu_features()["kernel_sets"] if segfast._backend._C is not None else ["amx"]
RESULTS = MAIN if "amx" in KERNEL_SETS else OTHERS["avx512" if "avx512" in KERNEL_SETS else "avx2"]
PAGE, README = ROOT / "docs" / "optimize.md", ROOT / "README.md"
BEGIN, END = "<!-- networks: filled by benchmarks/optimize.py -->", "<!-- end of networks -->"


@dataclass(frozen=True)
class Row:
    """One figure: what is raced, and how many times faster than whom it is to be."""

    title: str
    build: Callable[[], nn.Module]
    size: tuple[int, int]
    least: float
    aim: float
    dtype: torch.dtype = torch.float32
    target: str = "classes"
    batch: int = 1
    against: tuple[str, ...] = PEERS


def zoo(name: str, **options) -> Callable[[], nn.Module]:
    return lambda: segfast.create_model(name, 19, **options)


def smp(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import segmentation_models_pytorch

        return getattr(segmentation_models_pytorch, name)("mobilenet_v2", encoder_weights=None, classes=19)

    return build


def shuffle_fpn(backbone: str) -> Callable[[], nn.Module]:
    return lambda: segfast.create_model("semantic_fpn", 19, backbone=backbone)


ROWS = {
    "fast_scnn-1024x2048": Row("Fast-SCNN", zoo("fast_scnn"), (1024, 2048), 1.5, 2.2),
    "fast_scnn-512x1024-logits": Row("Fast-SCNN", zoo("fast_scnn"), (512, 1024), 1.25, 2.0, target="logits"),
    "fast_scnn-1024x2048-bfloat16": Row("Fast-SCNN", zoo("fast_scnn"), (1024, 2048), 1.5, 3.0, torch.bfloat16),
    **{
        f"{name}-512x1024": Row(name, zoo(name), (512, 1024), 1.0, 1.3)
        for name in ("contextnet", "espnet", "swiftnet_rn18", "fanet18", "linknet", "icnet", "fasterseg_student")
    },
    **{
        f"{backbone}_fpn-512x1024": Row(
            f"SemanticFPN on {backbone}", shuffle_fpn(backbone), (512, 1024), 1.5, 2.0, against=("channels_last",)
        )
        for backbone in ("shufflenetv1_g3", "shufflenetv2_x1_0")
    },
    "smp_unet-512x1024": Row("segmentation_models.pytorch Unet, mobilenet_v2", smp("Unet"), (512, 1024), 1.2, 2.0),
    "smp_deeplabv3plus-512x1024": Row(
        "segmentation_models.pytorch DeepLabV3Plus, mobilenet_v2", smp("DeepLabV3Plus"), (512, 1024), 1.2, 2.0
    ),
    **{
        f"fast_scnn-{h}x{2 * h}-scaling": Row("Fast-SCNN, scaling", zoo("fast_scnn"), (h, 2 * h), 1.0, 1.0, against=())
        for h in (256, 512, 1024, 2048)
    },
    "fast_scnn-512x1024-batch8": Row("Fast-SCNN, batch 8", zoo("fast_scnn"), (512, 1024), 1.0, 1.0, batch=8, against=()),
}


def measure(name: str, seconds: float) -> dict:
    """Race one row."""
    row = ROWS[name]
    torch.manual_seed(0)
    result = race(
        row.title, row.build().eval(), row.size, batch=row.batch, dtype=row.dtype, target=row.target,
        peers=PEERS if row.against else (), seconds=seconds, say=lambda text: print(f"{name}: {text}", flush=True),
    )  # fmt: skip
    return asdict(result)


def resident(field: str) -> float:
    """MB of this process: VmRSS now, VmHWM at most."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def extra_memory(name: str, way: str) -> float | None:
    """MB that three calls add at their peak to what this process holds when all is prepared."""
    row = ROWS[name]
    torch.manual_seed(0)
    network, images = row.build().eval(), torch.randn(row.batch, 3, *row.size)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        call = prepare(way, network, images, row.dtype, row.target, Path(folder))
        if isinstance(call, str):
            return None
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = resident("VmRSS")
        for _ in range(3):
            call()
        return resident("VmHWM") - before


def measure_memory(name: str) -> dict[str, float]:
    """Every way in a process of its own."""
    found = {}
    for way in ("segfast", *PEERS):
        command = [sys.executable, __file__, "--memory", name, "--way", way, "--threads", str(torch.get_num_threads())]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        value = done.stdout.split()[-1]
        if value != "None":
            found[way] = round(float(value), 1)
    return found


def stored(path: Path = RESULTS) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def ratio(row: Row, result: dict) -> tuple[float, str] | None:
    """(how many times as long the best of the peers that count takes, its name)."""
    times = {way: t["median"] for way, t in result["milliseconds"].items()}
    peers = {way: t for way, t in times.items() if way in row.against}
    if not peers:
        return None
    best = min(peers, key=peers.get)
    return peers[best] / times["segfast"], best


OTHER_TEXTS = {
    "avx512": """## AVX-512 without AMX

On a virtual machine of an AMD EPYC of the fourth generation, whose two threads do 234 GFLOP/s in float32 (a loop of
multiply-adds without memory) and 190 in MKL's product of 2048 x 2048 matrices. Fast-SCNN to logits at 512x1024, 1.25 wanted,
gave 1.56 (while all others took longer), 1.27, 1.27, 1.33 and 1.45; the last is in the table. Before its products asked for
memory ahead it was 1.19 to 1.22: their inner loop does 98 % of the peak on maps in L1, and waited a fifth of the time for what
it writes and what comes next. DeepLabV3Plus, 1.2 wanted, gave 1.40 and 1.26: the peers' times changed, ours did not.
""",
    "avx2": """## Without AVX-512

On a virtual machine of an AMD EPYC of the first generation: AVX2 by halves, a quarter of AVX-512's multiply-adds a cycle. Its two
threads do 79 GFLOP/s in float32 (a loop of multiply-adds without memory), MKL's largest product 67 to 70. What is nearly all 1x1
convolutions is bound by that: Fast-SCNN at 512x1024 has 3.45 GFLOP, 44 ms at least, and ONNX Runtime takes 64, so that no kernel
can be 1.5 times faster there.
""",
}

LIMITS = """## Where the figure is close

segmentation_models.pytorch's DeepLabV3Plus, 1.2 wanted: five runs of its row gave 1.03, 1.28, 1.20, 1.19 and 1.24, of which the
last is in the table; this machine's speed changes within a run. Its 24 GFLOP are nearly all products of 1x1 convolutions, which
ran at 82 % of the rate of MKL's product of 2048 x 2048 matrices: 1.08. What gave the rest is algebra. Interpolation and a
separable block without an activation inside are linear and commute, so the decoder's block is nine 1x1 products of the map
before its interpolation and a block of the 48 other channels (csrc/cpu/taps.h); neither the enlarged map nor the concatenation
is written, and the class scores are computed in the same pass over bands of rows. In one process, two threads:

| what | before, ms | now, ms |
| --- | --- | --- |
| interpolation, 256 channels, 32x64 to 128x256 | 4.4 | |
| concatenation, 304 channels | 3.3 | |
| 3x3 depthwise and 304 -> 256 | 24.1 | |
| class scores, 256 -> 19 | 3.1 | |
| nine products of 256 -> 256 at 32x64 | | 9.8 |
| the rest in one pass | | 9.1 |

Tried before: Winograd's filtering (no dense 3x3); products in AMX (below). Left: the concatenation of the five branches, which
they could write themselves, about 1 ms.

Not finite values are PyTorch's, but for the tiles of Winograd's filtering (below): of oneDNN's activations, which run with its
convolutions, only those are taken that keep NaN.

On a GPU, **not yet run on hardware**: the same graph and the same patterns; depthwise-separable blocks, shuffles and the
head run on the Triton and CUDA kernels, folded convolutions on cuDNN through ATen, in channels_last. The steps of each size
are captured once as one CUDA graph (`segfast/optimize/_replay.py`): a call copies its inputs to the graph's, replays it,
and hands out copies of the results, so that threads and streams may share one network; eight sizes are kept, for each holds
its maps. A step that waits for the device (`class_dtype` of an int64 result that is not a class map) keeps a network out of
the graph; it then runs step by step, and `explain()` says so. The choice of steps and the capture are tested on the CPU,
with a stand-in that records operations and runs them again on the captured tensors (`tests/test_optimize_gpu.py`); `pytest
-m gpu` and `benchmarks/gpu.py` are ready for a GPU.
"""

KERNELS = """## Kernels over packed weights

Separable blocks, inverted residuals, 1x1 convolutions, the first convolution and transposed convolutions into tiles run on
kernels of this package, the maps inside a block staying in the cache; in float32 all convolutions do but grouped ones larger
than 1x1, which oneDNN runs. (Of 31 dense ones of the networks above, on the EPYC of the fourth generation, these kernels take
0.58 to 1.08 of oneDNN's time, of 11 depthwise ones 0.71 to 1.01, of 6 transposed ones 0.88 to 1.03, of 8 grouped ones 0.79 to
1.22. The slower ones, 3x3 of stride 2 and many channels and eight groups of few, are taken for their results' places in
memory.) 3x3 convolutions of stride 1 and enough channels run by Winograd's filtering F(2x2, 3x3): 16 multiplications instead of
36, errors no larger than the direct form's, but a value that is not finite spreads over the 4x4 inputs of its tile. That kernel
reads nearest interpolation, and the concatenation of two maps, in pieces: neither is written. The first convolution's rows go
to the max-pooling, or the separable block, that follows it at once, and those of a transposed convolution into tiles to the
argmax. Bilinear interpolation and the 1x1 convolution behind it change places where that leaves fewer pixels to convolve. Other
concatenation runs with the sum, BatchNorm, ReLU or PReLU that follow it, bilinear interpolation writes channels_last maps, and
N C H W where it is the network's own result. A separable block takes the 1x1 convolution to few channels behind it, such as
class scores, along in bands of rows. The argmax of a map that has its final size is one pass over it, in either memory format.
A product asks for its results' memory before its sums and, block by block, for what the tile after it reads: its arithmetic
hides the wait. Floats are summed 384 at a time (Winograd's: 512), so that deep products are no less exact than PyTorch's, which
sums in pieces on some processors.

- float32: AVX-512, AVX2 or portable. Tried and left out: a float as three bfloat16 and six products of them in AMX's tiles, at
  half the error of float32. 1x1 convolutions of 64 to 256 channels took 0.73 to 0.87 of AVX-512's time while the virtual machine
  had its cores to itself and 1.2 to 1.3 of it while it had not; 3x3 ones were slower than Winograd's filtering either way.
- bfloat16: in the matrix tiles of AMX or by AVX512-BF16's dot products of pairs, summed in float32; taken where the processor has
  one of them, or where oneDNN has no bfloat16. The other kernel sets compute in float32 on the same weights. Biases and depthwise
  weights stay float32. Dense convolutions of more than 8 channels and larger than 1x1, depthwise ones alone and transposed ones
  that overlap run on oneDNN.
- int8: uint8 maps (affine), int8 weights (a scale a channel), 32-bit sums by AMX, AVX512-VNNI or, without saturation, 16-bit
  products; requantised inside, with the same bits on every kernel set. For graphs that torchao's PT2E flow has quantised, such as
  those of `segfast.deploy.quantize`: docs/results/int8.md. `pytest benchmarks/test_speed_packed.py -k int8` times them against
  the float32 and bfloat16 kernels."""


def rows_of(results: dict) -> tuple[str, list[str]]:
    """(the table of ratios, notes on what is absent)."""
    cells, notes = [], []
    for name, row in ROWS.items():
        if not row.against:
            continue
        what = [row.title, f"{row.size[0]}x{row.size[1]}", str(row.dtype).removeprefix("torch."), row.target]
        goal = f"{row.least:g} / {row.aim:g}" + ("" if row.against == PEERS else f" x {row.against[0]}")
        result = results.get(name)
        if result is None:
            cells.append([*what, *["not run"] * (len(PEERS) + 1), "", goal])
            continue
        times = [result["milliseconds"].get(way) for way in ("segfast", *PEERS)]
        value, best = ratio(row, result)
        cells.append([*what, *(f"{t['median']:.1f}" if t else "–" for t in times), f"{value:.2f} ({best})", goal])
        notes += [f"- `{name}`, {peer}: {reason}" for peer, reason in result["absent"].items()]
    return table(["network", "size", "dtype", "to", "segfast", *PEERS, "ratio", "at least / aim"], cells), notes


def text(results: dict, others: dict[str, dict]) -> str:
    """docs/optimize.md. `others`: of processors with other kernels."""
    head = [
        "# Whole networks",
        "",
        "Written by `python benchmarks/optimize.py --docs` from `docs/results/optimize*.json`: change those, not this file.",
        "",
        f"Milliseconds, median; all ways of a row in one process, in turns. To the class map: {INCLUDED['classes']}. "
        f"To logits: {INCLUDED['logits']}. {NOTE[0].upper()}{NOTE[1:]}. Ratio: the best peer's time over segfast's; "
        "where a row names a peer, that peer's.",
        "",
    ]
    rows, notes = rows_of(results)
    parts = [*head, rows, ""]
    for kernels, found in others.items():
        rows, more = rows_of(found)
        parts += [OTHER_TEXTS[kernels], rows, ""]
        notes += [note for note in more if note not in notes]
    cells = []
    for name in ROWS:
        used = next(
            (found[name]["megabytes"] for found in (*others.values(), results) if "megabytes" in found.get(name, {})), None
        )
        if used:
            best = min((mb, way) for way, mb in used.items() if way != "segfast")
            shown = [f"{used[way]:.0f}" if way in used else "–" for way in ("segfast", *PEERS)]
            cells.append([f"`{name}`", *shown, f"{used['segfast'] / best[0]:.2f} ({best[1]})"])
    parts += [
        "## Memory",
        "",
        "MB that three calls add at their peak, each way in a process of its own, its weights ready before. Maps between "
        "steps share one block; results of oneDNN's and PyTorch's own operators lie beside it. Branches run in the order in "
        "which less is alive at the most.",
        "",
    ]
    parts += [table(["row", "segfast", *PEERS, "segfast over the least"], cells), ""]
    scaling = [(name, row, results.get(name)) for name, row in ROWS.items() if not row.against]
    cells = []
    for name, row, result in scaling:
        pixels = row.batch * row.size[0] * row.size[1]
        time = result["milliseconds"]["segfast"]["median"] if result else None
        shown = ["not run", ""] if time is None else [f"{time:.1f}", f"{1e6 * time / pixels:.2f}"]
        cells.append([name, f"{row.batch}", f"{row.size[0]}x{row.size[1]}", *shown])
    parts += ["## Scaling", "", "Fast-SCNN, float32, to the class map.", ""]
    parts += [table(["row", "batch", "size", "milliseconds", "nanoseconds a pixel"], cells), ""]
    parts += [LIMITS, KERNELS, ""]
    ran = [row for found in (results, *others.values()) for row in found.values()]
    machines = sorted({", ".join(f"{k} {v}" for k, v in r["environment"].items()) for r in ran})
    parts += ["## Measured on", "", *(f"- {machine}" for machine in machines), *([""] if machines else []), *notes]
    return "\n".join(parts).rstrip() + "\n"


def current() -> str:
    """docs/optimize.md from what was measured."""
    return text(stored(MAIN), {kernels: stored(path) for kernels, path in OTHERS.items()})


def readme(results: dict) -> str:
    """README.md with its table of whole networks filled anew."""
    ways = ("segfast", "onnxruntime", "openvino", "inductor", "channels_last")
    names = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "inductor": "`torch.compile`, frozen"}
    head = ["network", *(names.get(way, way) for way in ways[:-1]), "eager, channels_last", "ratio to the best of them"]
    cells = []
    for name, row in ROWS.items():
        if not row.against or name not in results:
            continue
        times = results[name]["milliseconds"]
        ms = {way: times[way]["median"] for way in ways if way in times}
        best = min(t for way, t in ms.items() if way != "segfast")
        what = f"{row.title}, {row.size[0]} x {row.size[1]}, {str(row.dtype).removeprefix('torch.')}"
        shown = [f"{ms[way]:.0f}" if way in ms else "none" for way in ways]
        cells.append([what + (", to logits" if row.target == "logits" else ""), *shown, f"{best / ms['segfast']:.2f}"])
    machines = sorted({f"{r['environment']['processor']}, torch {r['environment']['torch']}" for r in results.values()})
    page = README.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{table(head, cells)}\n\nMeasured on: {'; '.join(machines)}; two threads.\n\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", action="append", default=[], choices=[*ROWS, "all"])
    parser.add_argument("--seconds", type=float, default=10.0, help="of timing a row")
    parser.add_argument("--memory", action="append", default=[], choices=list(ROWS), help="of a row that has its times")
    parser.add_argument("--way", choices=["segfast", *PEERS], help="with --memory: measure this process, print MB")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--list", action="store_true", help="the rows' names")
    parser.add_argument("--docs", action="store_true", help="write docs/optimize.md from what was measured")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.list:
        print(*ROWS, sep="\n")
    for name in ROWS if "all" in arguments.row else arguments.row:
        result = measure(name, arguments.seconds)
        checkpoint.write(RESULTS, json.dumps(stored() | {name: result}, indent=1) + "\n")
        print({way: t["median"] for way, t in result["milliseconds"].items()}, ratio(ROWS[name], result), flush=True)
    if arguments.way:
        print(extra_memory(arguments.memory[0], arguments.way))
        return
    for name in arguments.memory:
        entry = stored()[name] | {"megabytes": measure_memory(name)}
        checkpoint.write(RESULTS, json.dumps(stored() | {name: entry}, indent=1) + "\n")
        print(name, entry["megabytes"], flush=True)
    if arguments.docs or arguments.row or arguments.memory:
        checkpoint.write(PAGE, current())
        checkpoint.write(README, readme(stored(MAIN)))


if __name__ == "__main__":
    main()
