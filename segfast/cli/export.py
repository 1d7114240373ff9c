"""`segfast export`."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from segfast.cli.evaluate import CODES
from segfast.cli.options import Reporter, explained
from segfast.engine.run import json_of, load_network, weights_file


def export(
    weights: Annotated[Path, typer.Argument(help="A run folder, one of save_pretrained, or a .safetensors file of segfast's.")],
    out: Annotated[Path, typer.Argument(help="The file: .onnx, .pt2 for torch.export and AOTInductor, .pte for ExecuTorch.")],
    size: Annotated[tuple[int, int], typer.Option(help="H W of the images.")] = (512, 1024),
    dynamic: Annotated[bool, typer.Option(help="Batch, height and width are free (ONNX; where the network allows it).")] = False,
    head: Annotated[bool, typer.Option(help="Resize and argmax inside: the output is a class map of bytes.")] = True,
    opset: Annotated[int, typer.Option(min=18, help="Of ONNX.")] = 20,
    compiled: Annotated[bool, typer.Option(help="A .pt2 file compiled by AOTInductor for this processor.")] = False,
) -> None:
    """Export a trained network, checked against PyTorch before the file is written."""
    from segfast.deploy import export_executorch, export_onnx, export_program

    with explained("export"), Reporter() as reporter:
        model, network = load_network(weights)
        options = {
            "head": head, "network": dataclasses.asdict(network), "miou": measured(weights),
            "made": shlex.join(["segfast", *sys.argv[1:]]),
        }  # fmt: skip
        if out.suffix in (".pt2", ".pte") and dynamic:
            raise ValueError(f"want a fixed size with {out.suffix} (--no-dynamic)")
        if out.suffix == ".pt2":
            done = export_program(model, out, size, compiled=compiled, **options)
        elif out.suffix == ".pte":
            done = export_executorch(model, out, size, **options)
        else:
            done = export_onnx(model, out, size, dynamic=dynamic, opset=opset, **options)
        agrees = f"{done.agreement:.3%} of the pixels" if head else f"logits within {done.error:.1e} of the largest"
        reporter.say(f"agrees with PyTorch: {agrees}")
        if done.operators:
            reporter.say(f"{sum(done.operators.values())} operators of {len(done.operators)} kinds: {', '.join(done.operators)}")
            refused = f"does not take: {', '.join(done.refused)}" if done.refused else "takes them all"
            reporter.say(f"TensorRT's parser {refused}")
        stripped = f", {done.unstripped / 1e6:.2f} MB before stack traces and doc strings were removed" if done.unstripped else ""
        reporter.say(f"wrote {done.path}: {done.bytes / 1e6:.2f} MB{stripped}")


def measured(weights: Path) -> float | None:
    """The mIoU that the folder of the weights notes: a run's of the best ones or the last, or that of save_pretrained."""
    path = weights_file(weights)
    known = {"best.safetensors": ("result.json", "best_miou"), "last.safetensors": ("result.json", "miou")}
    name, key = known.get(path.name, ("config.json", "miou"))
    return json_of(path.with_name(name)).get(key) if path.with_name(name).is_file() else None


export.__doc__ += f"\n\nExample: segfast export student student.onnx --size 360 480\n\n{CODES}\n"
