"""The full score of a trained network on a dataset, with its plots and saved predictions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from segfast._packages import need
from segfast.engine import checkpoint
from segfast.engine.evaluate import boundary_f_score, class_iou, evaluate, mean_iou, pixel_accuracy
from segfast.engine.panels import png


def assess(
    model: Callable[[Tensor], Tensor],
    dataset,
    classes: Sequence[str],
    device: torch.device | str = "cpu",
    workers: int = 0,
    predictions: Path | None = None,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> tuple[dict, Tensor]:
    """Scores by name, and the confusion matrix.

    Args:
        model: images in [0, 1] (N, 3, H, W) to logits or probabilities of their size.
        dataset: items (image, labels); a size of its own each.
        classes: their names.
        device, workers: where the model is, and how many processes read.
        predictions: folder for a label map (PNG, the class a byte) an image; None: none are saved.
        progress: called with the images done and their number.
    """
    boundary, done = [], 0

    def loader():
        for image, labels in DataLoader(dataset, num_workers=workers, generator=torch.Generator()):
            yield image.to(device), labels.to(device)

    def each(prediction: Tensor, labels: Tensor) -> None:
        nonlocal done
        boundary.append(boundary_f_score(prediction[0], labels[0], len(classes)))
        if predictions:
            name = Path(dataset.describe(done)).stem if hasattr(dataset, "root") else f"{done:06d}"
            checkpoint.write(predictions / f"{name}.png", label_png(prediction[0].cpu()))
        done += 1
        progress(done, len(dataset))

    matrix = evaluate(model, loader(), len(classes), each=each)
    fine = [score for score in boundary if not math.isnan(score)]
    scores = {
        "images": len(dataset),
        "miou": mean_iou(matrix),
        "pixel_accuracy": pixel_accuracy(matrix),
        "boundary_f_score": sum(fine) / len(fine) if fine else None,
        "class_iou": {name: None if math.isnan(v) else v for name, v in zip(classes, class_iou(matrix).tolist())},
    }
    return {name: None if isinstance(v, float) and math.isnan(v) else v for name, v in scores.items()}, matrix


def label_png(labels: Tensor) -> bytes:
    return png(labels.to(torch.uint8).numpy()) if labels.max() < 256 else png(labels.numpy().astype(np.uint16))


def plots(matrix: Tensor, classes: Sequence[str], folder: Path) -> list[Path]:
    """confusion.png (rows: labels, as shares of a row) and class_iou.png, in `folder`.

    Raises:
        ImportError: matplotlib is missing.
    """
    need("matplotlib", "plots", "train").use("Agg")
    from matplotlib import pyplot

    shares = matrix.double() / matrix.sum(1, keepdim=True).clamp(min=1)
    side = max(5.0, 0.35 * len(classes))
    figure, axes = pyplot.subplots(figsize=(side + 1, side), layout="constrained")
    shown = axes.imshow(shares.numpy(), vmin=0, vmax=1, cmap="viridis")
    axes.set(xlabel="predicted", ylabel="labelled", xticks=range(len(classes)), yticks=range(len(classes)))
    axes.set_xticklabels(classes, rotation=90)
    axes.set_yticklabels(classes)
    figure.colorbar(shown, shrink=0.8)
    paths = [save_figure(figure, folder / "confusion.png")]
    figure, axes = pyplot.subplots(figsize=(6, 1 + 0.25 * len(classes)), layout="constrained")
    axes.barh(range(len(classes)), class_iou(matrix).nan_to_num().numpy())
    axes.axvline(mean_iou(matrix), linestyle="--", color="black", label=f"mean {mean_iou(matrix):.3f}")
    axes.set(xlim=(0, 1), xlabel="IoU", yticks=range(len(classes)))
    axes.set_yticklabels(classes)
    axes.invert_yaxis()
    axes.legend()
    return [*paths, save_figure(figure, folder / "class_iou.png")]


def save_figure(figure, path: Path) -> Path:
    from matplotlib import pyplot

    figure.canvas.draw()
    picture = np.asarray(figure.canvas.buffer_rgba())[..., :3]
    pyplot.close(figure)
    return checkpoint.write(path, png(picture))
