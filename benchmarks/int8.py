"""int8 against float: whole networks' times with those of peers, and mIoU on CamVid; docs/results/int8.md from all.

python benchmarks/int8.py --speed fast_scnn --size 512x1024
python benchmarks/int8.py --camvid contextnet --root ../shared/camvid --work runs/int8
python benchmarks/int8.py --table
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from camvid import RECIPE
from torch import Tensor, nn

import segfast
from segfast import deploy
from segfast.cli.options import Reporter
from segfast.deploy.int8 import Classes
from segfast.engine import Config, checkpoint, fit
from segfast.engine.catalogue import table
from segfast.engine.race import ToClasses, call_openvino, exported, facts, interleave, make_onnxruntime, make_openvino

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
WAYS = ("segfast int8", "segfast float32", "onnxruntime int8", "openvino int8", "openvino nncf", "inductor int8")
# What differs from the recipe: half the width, and as many steps as large networks do on one core in half an hour.
NETWORKS = {"fast_scnn": {"model_options": {"width": 0.5}}, "linknet": {"steps": 600}, "swiftnet_rn18": {"steps": 300}}
STEPS = 200  # of quantisation-aware training


def stored() -> dict:
    path = RESULTS / "int8.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"speed": {}, "camvid": {}}


def keep(kind: str, name: str, entry: dict) -> None:
    results = stored()
    results[kind][name] = entry
    checkpoint.write(RESULTS / "int8.json", json.dumps(results, indent=1) + "\n")


def inductor(graph: nn.Module, x: Tensor, size: tuple[int, int]) -> Callable[[], Tensor]:
    """The graph and its head on oneDNN's int8 kernels, frozen."""
    import torch._inductor.config

    def whole(images):
        return F.interpolate(graph(images), size, mode="bilinear").argmax(1).to(torch.uint8)

    compiled = torch.compile(whole)

    def call():
        with torch.no_grad(), torch._inductor.config.patch(freezing=True):
            return compiled(x)

    call()
    return call


def nncf(network: nn.Module, images: list[Tensor], folder: Path) -> Callable[[], Tensor]:
    """The float network quantised by OpenVINO's own tool, calibrated on the same images."""
    import nncf
    import openvino

    model = openvino.Core().read_model(exported(network, images[0][None], folder))
    quantized = nncf.quantize(model, nncf.Dataset([image[None].numpy() for image in images]))
    return call_openvino(quantized, images[0][None], torch.bfloat16)


def speed(name: str, size: tuple[int, int], seconds: float) -> None:
    """Images to class maps: int8 by segfast.optimize and by its peers (of the QDQ file), and segfast in float32."""
    torch.manual_seed(0)
    model = segfast.create_model(name, 19).eval()
    images = list(torch.randn(8, 3, *size))
    quantized = deploy.quantize(model, images, observer="min-max")
    x, whole = images[0][None], Classes(quantized, True)
    ours, plain = (segfast.optimize(net, x, class_dtype=torch.uint8) for net in (whole, ToClasses(model, cast=False).eval()))
    calls, absent = {"segfast int8": lambda: ours(x), "segfast float32": lambda: plain(x)}, {}
    with tempfile.TemporaryDirectory() as folder:
        deploy.quantize_onnx(quantized, Path(folder) / "network.onnx")  # where the makers look for the network's file
        calls["onnxruntime int8"] = make_onnxruntime(whole, x, torch.float32, Path(folder))
        # What is left in float runs in bfloat16, as OpenVINO has it by default where that is faster.
        calls["openvino int8"] = make_openvino(whole, x, torch.bfloat16, Path(folder))
        try:
            calls["inductor int8"] = inductor(quantized.graph, x, size)
        except Exception as error:
            absent["inductor int8"] = f"does not compile: {str(error).strip().partition(chr(10))[0]}"
        try:
            (Path(folder) / "float").mkdir()
            calls["openvino nncf"] = nncf(ToClasses(model).eval(), images, Path(folder) / "float")
        except ImportError as error:
            absent["openvino nncf"] = f"not installed: {error}"
        with torch.no_grad():
            want = whole(x)
            for way, call in calls.items():
                same = float((call() == want).double().mean())
                # nncf calibrates in its own way: of random weights, fewer classes agree.
                if way != "segfast float32" and same < (0.8 if way == "openvino nncf" else 0.99):
                    raise SystemExit(f"{way}: {same:.2%} of the classes are those of the quantised graph: not measured")
            taken = interleave(calls, seconds)
    times = {way: round(statistics.median(values), 3) for way, values in taken.items()}
    about = facts()
    where = f"{about['processor'].removesuffix(' Processor')}, {about['kernel set'].split()[0]}"
    keep("speed", f"{name} {size[0]}x{size[1]}, {where}", {"milliseconds": times, "absent": absent, "environment": about})
    print(times, flush=True)


def camvid(name: str, root: str, work: Path) -> None:
    """Train by the recipe of benchmarks/camvid.py, quantise after training and in it, and keep what the command reports."""
    run = work / name
    values = {**RECIPE, "root": root, "seed": 0, "model": name, **NETWORKS.get(name, {})}
    with Reporter() as reporter:
        trained = fit(Config(**values), run, reporter.say, reporter.progress)
    entry = {
        "parameters": trained["parameters"],
        "steps": values["steps"],
        "seconds": trained["seconds"],
        "environment": facts(),
        "modes": {},
    }
    for mode in ("static", "aware"):
        report, out = work / f"{name}-{mode}.json", work / f"{name}-{mode}.onnx"
        command = ["segfast", "quantize", str(run), str(out), "--mode", mode, "--root", root, "--report", str(report)]
        if not report.is_file():
            subprocess.run([sys.executable, "-m", *command, "--steps", str(STEPS)], check=True)
        said = json.loads(report.read_text(encoding="utf-8"))
        entry["modes"][mode] = said["table"]
        entry["onnx"] = entry.get("onnx") or said.get("onnx")
    keep("camvid", name, entry)


def ratio(times: dict) -> str:
    peers = {way: ms for way, ms in times.items() if not way.startswith("segfast")}
    best = min(peers, key=peers.get)
    return f"{peers[best] / times['segfast int8']:.2f} ({best})"


def text(results: dict) -> str:
    lines = [
        "# int8",
        "",
        "Written by `python benchmarks/int8.py --table` from `int8.json`.",
        "",
        "## Speed",
        "",
        "One image, from its normalised float32 tensor to the uint8 class of every pixel; milliseconds, median, all ways of a "
        "row in one process, in turns; random weights, activations calibrated by min-max. The runtimes read the file that "
        "`segfast.deploy.quantize_onnx` writes, `openvino nncf` is the float file quantised by OpenVINO's own tool; OpenVINO "
        "runs what is left in float in bfloat16. "
        "`python benchmarks/int8.py --speed NAME --size HxW`.",
        "",
    ]
    rows = []
    for name, entry in results["speed"].items():
        times = entry["milliseconds"]
        cells = [f"{times[way]:.1f}" if way in times else "–" for way in WAYS]
        rows.append([name, *cells, f"{times['segfast float32'] / times['segfast int8']:.2f}", ratio(times)])
    lines += [table(["network, size, processor, kernel set", *WAYS, "against float32", "against the best peer"], rows), ""]
    lines += [
        "## CamVid",
        "",
        "Validation mIoU in points (101 frames of 360x480), networks trained from scratch by the recipe of "
        "[camvid.md](camvid.md), Fast-SCNN at half width, the large ones for fewer steps; `static`: after training, 32 images; "
        f"`aware`: {STEPS} steps of quantisation-aware training, distilled from the float network. MB: of the weights "
        "as saved, and of the whole ONNX file with its head, stripped. "
        "`python benchmarks/int8.py --camvid NAME --root ROOT`.",
        "",
    ]
    columns = ["network", "parameters", "steps", "float", "static (difference)", "aware (difference)"]
    rows = []
    for name, entry in results["camvid"].items():
        static, aware = entry["modes"]["static"], entry["modes"]["aware"]
        base = static["float"]
        cells = [f"{100 * base['miou']:.2f}"]
        for part in (static, aware):
            cells.append(f"{100 * part['int8']['miou']:.2f} ({100 * (part['int8']['miou'] - base['miou']):+.2f})")
        size = f"{base['bytes'] / 1e6:.2f} / {static['int8']['bytes'] / 1e6:.2f}"
        cells += [size, f"{base['bytes'] / static['int8']['bytes']:.2f}"]
        files = entry.get("onnx") or {}
        cells += (
            [f"{files['float'] / 1e6:.2f} / {files['int8'] / 1e6:.2f}", f"{files['float'] / files['int8']:.2f}"]
            if files
            else ["", ""]
        )
        rows.append([name, f"{entry['parameters']:,}", str(entry["steps"]), *cells])
    lines += [
        table([*columns, "MB of weights", "smaller", "MB of ONNX", "smaller"], rows),
        "",
    ]
    entries = [*results["speed"].values(), *results["camvid"].values()]
    machines = sorted({", ".join(f"{k} {v}" for k, v in e["environment"].items()) for e in entries})
    absent = sorted({f"{way}: {why}" for e in results["speed"].values() for way, why in e["absent"].items()})
    return "\n".join([*lines, *(f"- {line}" for line in [*machines, *absent])]).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speed", help="a network of segfast's")
    parser.add_argument("--size", default="512x1024")
    parser.add_argument("--seconds", type=float, default=10.0, help="of timing")
    parser.add_argument("--camvid", help="a network to train and quantise")
    parser.add_argument("--root", default="../shared/camvid", help="CamVid's folder")
    parser.add_argument("--work", type=Path, default=Path("runs/int8"), help="folder for the run and the files")
    parser.add_argument("--table", action="store_true", help="write the tables anew")
    arguments = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    if arguments.speed:
        speed(arguments.speed, tuple(map(int, arguments.size.split("x"))), arguments.seconds)
    if arguments.camvid:
        camvid(arguments.camvid, arguments.root, arguments.work)
    checkpoint.write(RESULTS / "int8.md", text(stored()))


if __name__ == "__main__":
    main()
