"""Every network as ONNX, fixed and free sizes, logits and class maps, in ONNX Runtime and OpenVINO, against PyTorch.

    python benchmarks/export.py --out docs/results/export.jsonl [NETWORK ...]   # runs what the file lacks, a line a file
    python benchmarks/export.py --out docs/results/export.jsonl --table         # writes export.md beside it

The weights are random; the BatchNorms have seen images, so that the logits spread over the classes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from pathlib import Path

import torch
from torch import nn

import segfast
from segfast import deploy
from segfast.deploy.artefact import Session
from segfast.deploy.export import AGREEMENT, TOLERANCE

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
    import openvino

    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda images: torch.from_numpy(compiled(images.numpy())[0])


@torch.no_grad()
def worst(model: nn.Module, run, sizes, head: bool) -> float:
    """The largest error of the logits, relative to the largest logit, or the smallest share of equal pixels."""
    found = []
    for size in sizes:
        images = torch.randn(1, 3, *size)
        want, got = model(images), run(images)
        if head:
            found.append(float((got == want.argmax(1)).float().mean()))
        else:
            found.append(float((got - want).abs().max() / want.abs().max()))
    return min(found) if head else max(found)


def measure(name: str, free: bool, head: bool) -> dict:
    row = {"network": name, "free": free, "head": head, "segfast": segfast.__version__, "torch": torch.__version__}
    model = network(name)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        try:
            done = deploy.export_onnx(model, path, SIZE, dynamic=free, head=head)
        except ValueError as error:
            return {**row, "refused": str(error)[:300]}
        row |= {"bytes": done.bytes, "unstripped": done.unstripped, "tensorrt_refuses": list(done.refused)}
        for runtime, load in (("onnxruntime", lambda path: Session(str(path), "benchmark")), ("openvino", openvino_session)):
            torch.manual_seed(1)
            try:
                row[runtime] = worst(model, load(path), FREE if free else (SIZE,), head)
            except Exception as error:  # neither runtime's errors have a class of their own
                row[runtime] = f"{type(error).__name__}: {error}"[:300]
    return row


def cell(row: dict | None) -> str:
    if row is None:
        return "not run"
    if "refused" in row:
        return "refused"
    values = []
    for runtime in ("onnxruntime", "openvino"):
        value = row[runtime]
        if isinstance(value, str):
            values.append("does not run")
            continue
        fits = value >= AGREEMENT if row["head"] else value <= TOLERANCE
        text = f"{value:.2%}" if row["head"] else f"{value:.1e}"
        values.append(text if fits else f"**{text}**")
    return " / ".join(values)


def table(rows: list[dict]) -> str:
    last = {(row["network"], row["free"], row["head"]): row for row in rows}
    lines = [
        "# Every network as ONNX",
        "",
        f"Written by `benchmarks/export.py --table` from export.jsonl. Exported at {SIZE[0]} x {SIZE[1]}; files of free size",
        f"were run at {', '.join(f'{h} x {w}' for h, w in FREE)}. ONNX Runtime / OpenVINO: of logits the worst error against",
        "PyTorch relative to the largest logit, of class maps the smallest share of equal pixels. Bold: beyond 1e-4,",
        "or below 99.9 %.",
        "",
        "| network | logits, fixed | logits, free | classes, fixed | classes, free | TensorRT's parser refuses |",
        "|---|---|---|---|---|---|",
    ]
    for name in segfast.list_models():
        found = [last.get((name, free, head)) for head, free in itertools.product((False, True), (False, True))]
        refused = sorted({operator for row in found if row for operator in row.get("tensorrt_refuses", ())})
        cells = " | ".join(cell(row) for row in found)
        lines.append(f"| `{name}` | {cells} | {', '.join(refused) or '-' if any(found) else 'not run'} |")
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
    had = {(row["network"], row["free"], row["head"]) for row in rows}
    for name, free, head in itertools.product(options.networks or segfast.list_models(), (False, True), (False, True)):
        if (name, free, head) in had:
            continue
        row = measure(name, free, head)
        with options.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)


if __name__ == "__main__":
    main()
