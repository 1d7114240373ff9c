"""Every network as ONNX, float and int8, fixed and free sizes, logits and class maps: ONNX Runtime and OpenVINO against PyTorch.

    python benchmarks/export.py --out docs/results/export.jsonl [NETWORK ...]   # runs what the file lacks, a line a file
    python benchmarks/export.py --out docs/results/export.jsonl --table         # writes export.md beside it

The weights are random; the BatchNorms have seen images, so that the logits spread over the classes. int8 is compared with the
int8 graph in PyTorch.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy
import torch
from torch import nn

import segfast
from segfast import deploy
from segfast.deploy.artefact import Session
from segfast.deploy.export import AGREEMENT, TOLERANCE

KEY = ("network", "int8", "free", "head")
INT8_AGREEMENT = 0.99
SIZE = (64, 96)
FREE = (SIZE, (97, 147), (33, 50), (128, 257))  # of the images that a file of free size is given


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = segfast.create_model(name, 5)
    with torch.no_grad():
        for _ in range(2):
            model(torch.randn(2, 3, *SIZE))
    return model.eval()


def openvino_session(path: Path):
    """In a process of its own a call: release 2026.4 ends the one it runs in on some graphs."""
    code = (
        "import sys, numpy, openvino; path, data = sys.argv[1:]; "
        "model = openvino.Core().compile_model(path, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'}); "
        "numpy.save(data, model(numpy.load(data))[0])"
    )

    def run(images: torch.Tensor) -> torch.Tensor:
        data = path.with_name("images.npy")
        numpy.save(data, images.numpy())
        done = subprocess.run([sys.executable, "-c", code, path, data], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"OpenVINO ended with {done.returncode}: {done.stderr[-200:]}")
        return torch.from_numpy(numpy.load(data))

    return run


@functools.lru_cache(1)
def int8_network(name: str, free: bool) -> nn.Module:
    images = torch.randn(8, 3, *SIZE, generator=torch.Generator().manual_seed(2))
    return deploy.quantize(network(name), list(images), observer="min-max", dynamic=free)


@torch.no_grad()
def worst(model: nn.Module, run, sizes, head: bool, classes: bool) -> float:
    """The largest error of the logits, relative to the largest logit, or the smallest share of equal pixels."""
    found = []
    for size in sizes:
        images = torch.randn(1, 3, *size)
        want, got = model(images), run(images)
        if classes:
            found.append(float(((got if head else got.argmax(1)) == want.argmax(1)).float().mean()))
        else:
            found.append(float((got - want).abs().max() / want.abs().max()))
    return min(found) if classes else max(found)


def measure(name: str, int8: bool, free: bool, head: bool) -> dict:
    row = dict(zip(KEY, (name, int8, free, head))) | {"segfast": segfast.__version__, "torch": torch.__version__}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        try:
            if int8:
                model = int8_network(name, free)
                done = deploy.quantize_onnx(model, path, head=head)
            else:
                model = network(name)
                done = deploy.export_onnx(model, path, SIZE, dynamic=free, head=head)
        except ValueError as error:
            return {**row, "refused": str(error)[:300]}
        row |= {"bytes": done.bytes, "unstripped": done.unstripped, "tensorrt_refuses": list(done.refused)}
        for runtime, load in (("onnxruntime", lambda path: Session(str(path), "benchmark")), ("openvino", openvino_session)):
            torch.manual_seed(1)
            try:
                row[runtime] = worst(model, load(path), FREE if free else (SIZE,), head, head or int8)
            except Exception as error:  # neither runtime's errors have a class of their own
                row[runtime] = f"{type(error).__name__}: {error}"[:300]
    return row


def cell(rows: list[dict | None]) -> str:
    """What a column says of a network: the worse of its files."""
    rows = [row for row in rows if row]
    if not rows:
        return "not run"
    if any("refused" in row for row in rows):
        return "refused"
    values = []
    for runtime in ("onnxruntime", "openvino"):
        found = [row[runtime] for row in rows]
        if any(isinstance(value, str) for value in found):
            values.append("does not run")
        elif rows[0]["head"] or rows[0]["int8"]:
            least = INT8_AGREEMENT if rows[0]["int8"] else AGREEMENT
            values.append(f"{min(found):.2%}" if min(found) >= least else f"**{min(found):.2%}**")
        else:
            values.append(f"{max(found):.1e}" if max(found) <= TOLERANCE else f"**{max(found):.1e}**")
    return " / ".join(values)


def smaller(float_row: dict | None, int8_row: dict | None) -> str:
    if not float_row or not int8_row or "bytes" not in float_row or "bytes" not in int8_row:
        return "not run"
    return f"{float_row['bytes'] / 1e6:.2f} / {int8_row['bytes'] / 1e6:.2f}: {float_row['bytes'] / int8_row['bytes']:.2f}"


def table(rows: list[dict]) -> str:
    last = {tuple(row[name] for name in KEY): row for row in rows}
    lines = [
        "# Every network as ONNX",
        "",
        f"Written by `benchmarks/export.py --table` from export.jsonl. Exported at {SIZE[0]} x {SIZE[1]}; files of free size",
        f"were run at {', '.join(f'{h} x {w}' for h, w in FREE)}. ONNX Runtime / OpenVINO: of logits the worst error against",
        "PyTorch relative to the largest logit, of class maps the smallest share of equal pixels. int8: QuantizeLinear pairs,",
        "against the int8 graph in PyTorch, classes of files of logits and of class maps (rounding falls differently now and",
        "then, and with random weights classes nearly tie). MB: of the whole stripped file with the head, float / int8.",
        "Bold: beyond 1e-4, or below 99.9 % (int8: 99 %).",
        "",
        "| network | logits, fixed | logits, free | classes, fixed | classes, free | int8, fixed | int8, free "
        "| MB: times smaller | TensorRT's parser refuses |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in segfast.list_models():
        found = {key: last.get((name, *key)) for key in itertools.product((False, True), repeat=3)}
        refused = sorted({operator for row in found.values() if row for operator in row.get("tensorrt_refuses", ())})
        files = [[(False, False, False)], [(False, True, False)], [(False, False, True)], [(False, True, True)]]
        files += [[(True, free, head) for head in (False, True)] for free in (False, True)]
        cells = " | ".join(cell([found[key] for key in keys]) for keys in files)
        ratio = smaller(found[False, False, True], found[True, False, True])
        lines.append(f"| `{name}` | {cells} | {ratio} | {', '.join(refused) or '-' if any(found.values()) else 'not run'} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.is_file() else []
    if options.table:
        options.out.with_suffix(".md").write_text(table(rows))
        return
    had = {tuple(row[name] for name in KEY) for row in rows}
    for key in itertools.product(options.networks or segfast.list_models(), (False, True), (False, True), (False, True)):
        if key in had:
            continue
        row = measure(*key)
        with options.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)


if __name__ == "__main__":
    main()
