"""`segfast eval` and `segfast predict`."""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from segfast._files import check_writable
from segfast.cli.options import Reporter, explained, merged
from segfast.deploy.artefact import SUFFIXES, load
from segfast.engine import checkpoint
from segfast.engine.assess import assess, plots
from segfast.engine.evaluate import Inference
from segfast.engine.predict import predict as predict_files
from segfast.engine.race import ToClasses
from segfast.engine.run import Network, choose_device, load_network, make_dataset, preprocess
from segfast.optimize import optimize

Weights = Annotated[
    Path,
    typer.Argument(
        help="A run folder, one of save_pretrained, a .safetensors file of segfast's, or an exported .onnx, .pt2 or .pte file."
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Scale = Annotated[list[float] | None, typer.Option("--scale", help="Test-time size; give several to average over them.")]
Flip = Annotated[bool, typer.Option(help="Average over the image and its mirror image.")]
Window = Annotated[tuple[int, int] | None, typer.Option(help="H W of a sliding window.")]
Overlap = Annotated[float, typer.Option(min=0, max=0.95, help="Share of a window that lies in the next one.")]
CODES = "Exit codes: 0 done, 2 wrong arguments, data or files, 130 Ctrl-C."


def build(
    weights: Path,
    device: str,
    scale: list[float] | None,
    flip: bool,
    window: tuple[int, int] | None,
    overlap: float,
    fast: bool = False,
):
    """(images in [0, 1] to probabilities or, by `segfast.optimize`, classes; what the weights say of their network; device)."""
    scales = scale or [1.0]
    if weights.suffix in SUFFIXES:
        artefact = load(weights)
        if not artefact.about["head"]:
            return Inference(artefact, scales, flip, window, overlap), artefact.network(), torch.device("cpu")
        if scale or flip or window:
            raise ValueError(f"{weights} gives classes: want one exported with --no-head for --scale, --flip and --window")
        return artefact, artefact.network(), torch.device("cpu")
    model, network = load_network(weights)
    network = network.named()
    place = choose_device(device)
    model = model.to(place, memory_format=torch.channels_last)
    prepare = preprocess(model)
    plain = scales == [1.0] and not flip and window is None
    if fast and plain:
        infer = optimize(ToClasses(model.eval(), cast=False), class_dtype=torch.uint8 if network.num_classes <= 256 else None)
    else:
        infer = Inference(optimize(model.eval()) if fast else model, scales, flip, window, overlap)

    def run(images):
        return infer(prepare(images.to(place)).contiguous(memory_format=torch.channels_last))

    return run, network, place


def evaluate(
    weights: Weights,
    config: Annotated[Path | None, typer.Option(help="YAML file that names the data; default: the run folder's.")] = None,
    data: Annotated[str | None, typer.Option(help="Dataset, instead of the config's.")] = None,
    root: Annotated[str | None, typer.Option(help="Its folder.")] = None,
    split: Annotated[str | None, typer.Option(help="Its split; default: the config's val_split.")] = None,
    label_map: Annotated[str | None, typer.Option(help="Labels of the files to classes, as in segfast train.")] = None,
    scale: Scale = None,
    flip: Flip = False,
    window: Window = None,
    overlap: Overlap = 1 / 3,
    device: Device = "auto",
    workers: Annotated[int, typer.Option(min=0, help="Processes that read images.")] = 0,
    out: Annotated[Path | None, typer.Option(help="JSON file for the scores.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Folder for confusion.png and class_iou.png (needs matplotlib).")] = None,
    save_predictions: Annotated[Path | None, typer.Option(help="Folder for a label map an image.")] = None,
) -> None:
    """Score a trained network: mean IoU, IoU a class, pixel accuracy, boundary F-score."""
    with explained("eval"):
        if config is None and weights.is_dir() and (weights / "config.yaml").is_file():
            config = weights / "config.yaml"
        given = {"data": data, "root": root, "label_map": label_map, "val_split": split}
        settings = merged(config, {name: value for name, value in given.items() if value is not None})
        if out:
            check_writable(out)
        model, network, place = build(weights, device, scale, flip, window, overlap)
        if settings.data == "folder" and not settings.num_classes:  # nor classes.txt, which goes before it
            settings = dataclasses.replace(settings, num_classes=network.num_classes)
        dataset = make_dataset(settings, settings.val_split)
        if network.num_classes != len(dataset.classes):
            raise ValueError(
                f"{weights}: want a network of the dataset's {len(dataset.classes)} classes, got {network.num_classes}"
            )
        with Reporter() as reporter:
            scores, matrix = assess(
                model, dataset, dataset.classes, place, workers, save_predictions,
                lambda done, of: reporter.progress("evaluate", done, of, {}),
            )  # fmt: skip
        table = Table("class", "IoU", title=f"{weights}, {len(dataset)} images", title_justify="left")
        for name, value in scores["class_iou"].items():
            table.add_row(name, "–" if value is None else f"{value:.4f}")
        for name in ("miou", "pixel_accuracy", "boundary_f_score"):
            value = scores[name]
            table.add_row(f"[bold]{name.replace('_', ' ')}", "–" if value is None else f"[bold]{value:.4f}")
        Console().print(table)
        written = [checkpoint.write(out, json.dumps(scores, indent=1) + "\n")] if out else []
        written += plots(matrix, dataset.classes, plot) if plot else []
        for path in written:
            reporter.say(f"wrote {path}")


def predict(
    weights: Weights,
    source: Annotated[
        Path | None,
        typer.Argument(help="An image, a folder of images, a video (needs PyAV or OpenCV), or camera:0, a webcam (OpenCV)."),
    ] = None,
    file: Annotated[Path | None, typer.Option("--model", help="The network, in the place of WEIGHTS.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for label maps, coloured maps, overlays and legend.png.")] = Path(
        "predictions"
    ),
    opacity: Annotated[float, typer.Option(min=0, max=1, help="Of the classes over the image.")] = 0.5,
    beside: Annotated[bool, typer.Option("--side-by-side", help="Overlays have the image itself at their left.")] = False,
    frames: Annotated[int | None, typer.Option(min=1, help="Of a video or a camera, at most; a camera stops at Ctrl-C.")] = None,
    scale: Scale = None,
    flip: Flip = False,
    window: Window = None,
    overlap: Overlap = 1 / 3,
    device: Device = "auto",
    fast: Annotated[bool, typer.Option("--optimize/--no-optimize", help="Run the network by segfast.optimize.")] = True,
) -> None:
    """Predict an image, a folder of images, a video or a webcam with a trained network."""
    with explained("predict"):
        weights, source = (file, weights) if file and source is None else (weights, source)
        if source is None:
            raise ValueError("want a network and what to predict, got one of them")
        model, network, _ = build(weights, device, scale, flip, window, overlap, fast)
        spent: list[float] = []

        def timed(images):
            start = time.perf_counter()
            result = model(images)
            spent.append(time.perf_counter() - start)
            return result

        with Reporter() as reporter:
            start = time.perf_counter()
            written = predict_files(
                timed, source, out, *names(network), opacity, lambda done, of: reporter.progress("predict", done, of, {}),
                beside, frames,
            )  # fmt: skip
            whole = time.perf_counter() - start
            reporter.say(f"wrote {len(written)} files to {out}")
            middle = statistics.median(spent)
            reporter.say(
                f"{len(spent) / whole:.1f} images a second, with reading, preparing the network and writing; "
                f"{1 / middle:.1f} from the image tensor to the class map (median)"
            )


def names(network: Network) -> tuple:
    return network.classes, network.palette


evaluate.__doc__ += f"\n\nExample: segfast eval student --scale 0.75 --scale 1 --flip --plot plots\n\n{CODES}\n"
predict.__doc__ += f"""

Examples:

  segfast predict student frame.jpg --out predictions

  segfast predict --model student.onnx frame.jpg

  segfast predict student camera:0 --side-by-side

{CODES}
"""
