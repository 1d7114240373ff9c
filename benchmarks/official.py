"""Our networks against the official code with the same weights, in turns in one process: a line of JSON a network, and a table.

    SEGFAST_OFFICIAL=FOLDER python benchmarks/official.py [NAME ...]   # adds to docs/results/official.jsonl what it lacks
    python benchmarks/official.py --table                              # writes official.md beside it

FOLDER holds clones named as on GitHub, and `mmsegmentation`, an unpacked release 0; pytorchcv is a package. Both sides run
eagerly in inference mode, from a normalised float32 image to logits of its size; where the official code stops at its stride,
its logits are resized. Ours is what `segfast.load_official` gives, that is `create_model` with these weights.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from measure import machine
from torch import Tensor, nn

import segfast
from segfast.engine import checkpoint
from segfast.engine.bench import read_size
from segfast.engine.catalogue import table
from segfast.engine.race import interleave

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import official_networks as networks  # noqa: E402
from official_cases import CASES, pytorchcv, seeded, shapes  # noqa: E402

RESULTS = ROOT / "docs" / "results" / "official.jsonl"
FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
LEAST, SEPARABLE = 0.95, 1.5  # of the official time over ours; of networks of depthwise-separable units, in channels_last
AGREE = 1e-4  # of the largest logit


@dataclass(frozen=True)
class Rival:
    """The official code of one network."""

    network: str
    code: str
    build: Callable[[], nn.Module]
    resize: bool | None = None  # what align_corners its logits are resized with, if they are
    size: tuple[int, int] | None = None  # the only one that it takes
    least: float = LEAST


def case(name: str) -> Callable[[], nn.Module]:
    return next(case.build for case in CASES if case.name == name)


def pspnet(depth: int) -> nn.Module:
    """Without the auxiliary head, which the official code computes while evaluating too and ours does not."""
    model = networks.pspnet(depth)
    model.dsn = nn.Identity()
    return model


RIVALS = {
    "contextnet": Rival("contextnet", "pytorchcv", lambda: pytorchcv("contextnet").ctxnet_cityscapes(), least=SEPARABLE),
    "espnet": Rival("espnet", "sacmehta/ESPNet", case("espnet_train")),
    "espnet_c": Rival("espnet_c", "sacmehta/ESPNet", case("espnet_c"), resize=False),
    "fanet18": Rival("fanet18", "feinanshan/FANet", case("fanet18")),
    "fanet34": Rival("fanet34", "feinanshan/FANet", case("fanet34")),
    "fast_scnn": Rival("fast_scnn", "Tramac/Fast-SCNN-pytorch", case("fast_scnn_tramac"), least=SEPARABLE),
    "fast_scnn-pytorchcv": Rival("fast_scnn", "pytorchcv", case("fast_scnn_pytorchcv"), least=SEPARABLE),
    "fasterseg_student": Rival("fasterseg_student", "VITA-Group/FasterSeg", case("fasterseg_student")),
    "fasterseg_teacher": Rival("fasterseg_teacher", "VITA-Group/FasterSeg", case("fasterseg_teacher")),
    "icnet": Rival("icnet", "hszhao/ICNet's prototxt, layer by layer in PyTorch", case("icnet"), size=(1025, 2049)),
    "linknet": Rival("linknet", "pytorchcv", case("linknet")),
    "pspnet_r18": Rival("pspnet_r18", "irfanICMLL/structure_knowledge_distillation", lambda: pspnet(18), resize=True),
    "pspnet_r101": Rival("pspnet_r101", "irfanICMLL/structure_knowledge_distillation", lambda: pspnet(101), resize=True),
    "semantic_fpn": Rival(
        "semantic_fpn", "sail-sg/poolformer, mmsegmentation", functools.partial(networks.poolformer_fpn, 19), False
    ),
    "swiftnet_rn18": Rival("swiftnet_rn18", "orsic/swiftnet", case("swiftnet_rn18")),
    "swiftnet_rn34": Rival("swiftnet_rn34", "orsic/swiftnet", case("swiftnet_rn34")),
    "swiftnet_rn18_pyramid": Rival("swiftnet_rn18_pyramid", "orsic/swiftnet", case("swiftnet_rn18_pyramid")),
}


def logits(model: nn.Module, align_corners: bool | None, images: Tensor) -> Tensor:
    y = model(images)
    y = y if isinstance(y, Tensor) else y[0]
    return y if align_corners is None else F.interpolate(y, images.shape[2:], mode="bilinear", align_corners=align_corners)


def measure(name: str, size: tuple[int, int], seconds: float) -> dict:
    """Race one network in both memory formats.

    Raises:
        AssertionError: the two compute something else.
    """
    rival = RIVALS[name]
    size = rival.size or size
    images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    calls, weights = {}, None
    for layout, memory_format in FORMATS.items():
        theirs = rival.build().eval()
        weights = weights or seeded(shapes(theirs))
        theirs.load_state_dict(weights, strict=False)
        ours = segfast.load_official(rival.network, weights)
        pair = [model.to(memory_format=memory_format) for model in (ours, theirs)]
        x = images.to(memory_format=memory_format)
        calls |= {
            ("segfast", layout): functools.partial(pair[0], x),
            ("official", layout): functools.partial(logits, pair[1], rival.resize, x),
        }
    with torch.inference_mode():
        exact = calls["official", "contiguous"]()
        for way, call in calls.items():
            off = float((call() - exact).abs().max() / exact.abs().max())
            if not off <= AGREE:
                raise AssertionError(f"{name}, {' '.join(way)}: off by {off:.2g} of the largest logit: not measured")
        taken = interleave(calls, seconds)
    medians = {way: statistics.median(times) for way, times in taken.items()}
    return {
        "network": name,
        "code": rival.code,
        **machine(),
        "size": list(size),
        "runs": min(map(len, taken.values())),
        **{f"{side} {layout} ms": round(ms, 3) for (side, layout), ms in medians.items()},
        **{f"ratio {layout}": round(medians["official", layout] / medians["segfast", layout], 3) for layout in FORMATS},
    }


def text(rows: dict[str, dict]) -> str:
    """official.md."""
    columns = [f"{side} {layout} ms" for layout in FORMATS for side in ("segfast", "official")]
    cells = []
    for name, rival in RIVALS.items():
        row, shown = rows.get(name), [f"`{rival.network}`", rival.code]
        if row is None:
            cells.append([*shown, *["not run"] * 5, "", ""])
            continue
        ratios = []
        for layout, least in zip(FORMATS, (rival.least, LEAST)):
            ratio = row[f"ratio {layout}"]
            ratios.append(f"{ratio:.2f}" if ratio >= least else f"**{ratio:.2f}**")
        times = [f"{row[column]:.1f}" for column in columns]
        cells.append([*shown, "x".join(map(str, row["size"])), *times[:2], ratios[0], *times[2:], ratios[1]])
    machines = sorted({", ".join(f"{key} {row[key]}" for key in machine()) for row in rows.values()})
    head = ["network", "official code", "size"]
    for layout in FORMATS:
        head += [f"segfast, {layout}", f"official, {layout}", "ratio"]
    return f"""# Our networks and the official code

Written by `python benchmarks/official.py --table` from official.jsonl: milliseconds an image, medians, all four of a row in turns
in one process, eager, float32, with the same weights; logits agree within {AGREE:g} of the largest. Ratio: the official time
over ours, bold below {LEAST:g}, and for Fast-SCNN and ContextNet in channels_last below {SEPARABLE:g}. PSPNet's official code
runs without its auxiliary head, and its InPlaceABN (CUDA alone) as PyTorch's BatchNorm; ICNet's is Caffe's, read from its
prototxt; mmcv's units are written again in tests/official_networks.py. Networks that are not here have no official PyTorch code.

{table(head, cells)}

Measured on: {"; ".join(machines) or "nothing yet"}.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", metavar="NAME", help=f"of {', '.join(RIVALS)}; none: all")
    parser.add_argument("--size", type=read_size, default=(512, 1024))
    parser.add_argument("--seconds", type=float, default=20.0, help="of timing a network")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--again", action="store_true", help="measure what the file holds already, in its place")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = {}
    if options.out.is_file():
        rows = {row["network"]: row for row in map(json.loads, options.out.read_text(encoding="utf-8").splitlines())}
    if not options.table:
        for name in options.networks or RIVALS:
            if name in rows and not options.again:
                continue
            try:
                rows[name] = measure(name, options.size, options.seconds)
            except pytest.skip.Exception as reason:  # the official code is not there
                print(f"{name}: {reason}", flush=True)
                continue
            checkpoint.write(options.out, "".join(f"{json.dumps(rows[key])}\n" for key in RIVALS if key in rows))
            print(rows[name], flush=True)
    checkpoint.write(options.out.with_suffix(".md"), text(rows))


if __name__ == "__main__":
    main()
