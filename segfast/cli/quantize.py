"""`segfast quantize`."""

from __future__ import annotations

import dataclasses
import json
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, Subset

from segfast._files import check_writable
from segfast.cli.evaluate import CODES
from segfast.cli.options import Reporter, explained, merged
from segfast.data import Augment, Stream
from segfast.engine import checkpoint
from segfast.engine.evaluate import evaluate, mean_iou
from segfast.engine.run import load_network, make_dataset, preprocess
from segfast.optimize import optimize

MODES = ("static", "aware", "weights", "bf16", "fp16")
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def quantize(
    weights: Annotated[Path, typer.Argument(help="A run folder, one of save_pretrained, or a .safetensors file of segfast's.")],
    out: Annotated[Path, typer.Argument(help="The file: .safetensors, or .onnx with QuantizeLinear pairs (static, aware).")],
    mode: Annotated[str, typer.Option(help=f"{', '.join(MODES)}.")] = "static",
    observer: Annotated[
        str | None, typer.Option(help="Ranges of activations: mse, percentile or min-max (static, aware). [default: mse]")
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="Training images to calibrate with.")] = 32,
    size: Annotated[tuple[int, int] | None, typer.Option(help="H W that images are resized to. [default: their own]")] = None,
    max_drop: Annotated[
        float | None, typer.Option(help="Points of mIoU to lose at most; costly layers stay in float (static).")
    ] = None,
    sensitivity: Annotated[bool, typer.Option(help="Print what each layer alone costs in int8 (static, aware).")] = False,
    dynamic: Annotated[bool, typer.Option(help="Batch, height and width are free (static, aware).")] = False,
    steps: Annotated[int, typer.Option(min=1, help="Of quantisation-aware training.")] = 200,
    batch: Annotated[int, typer.Option(min=1, help="Of quantisation-aware training.")] = 4,
    learning_rate: Annotated[float, typer.Option(help="Of quantisation-aware training.")] = 2e-4,
    config: Annotated[Path | None, typer.Option(help="YAML file that names the data; default: the run folder's.")] = None,
    data: Annotated[str | None, typer.Option(help="Dataset, instead of the config's.")] = None,
    root: Annotated[str | None, typer.Option(help="Its folder.")] = None,
    runs: Annotated[int, typer.Option(min=0, help="Timed runs an entry of the table; 0: no times.")] = 10,
    report: Annotated[Path | None, typer.Option(help="A JSON file for the table.")] = None,
) -> None:
    """Quantise a trained network, and print float, bf16 and int8 side by side: mIoU, size, milliseconds.

    The times are of one image to logits of its size, by segfast.optimize (fp16: eager PyTorch).
    """
    from segfast import deploy
    from segfast.deploy import int8 as q

    with explained("quantize"), Reporter() as reporter:
        if mode not in MODES:
            why = "; torchao has dynamic int8 for linear layers alone, and these networks have none" if mode == "dynamic" else ""
            raise ValueError(f"want a mode among {', '.join(MODES)}, got {mode!r}{why}")
        if out.suffix not in (".safetensors", ".onnx") or (out.suffix == ".onnx" and mode not in ("static", "aware")):
            raise ValueError(f"want a .safetensors file, or .onnx with mode static or aware, got {out} with {mode}")
        if dynamic and mode not in ("static", "aware"):
            raise ValueError(f"want mode static or aware with --dynamic, got {mode}: its file takes images of any size as it is")
        for option, value, fitting in (
            ("--observer", observer, ("static", "aware")), ("--max-drop", max_drop, ("static",)),
            ("--sensitivity", sensitivity or None, ("static", "aware")),
        ):  # fmt: skip
            if value is not None and mode not in fitting:
                raise ValueError(f"want mode {' or '.join(fitting)} with {option}, got {mode}")
        for path in filter(None, (out, report)):
            check_writable(path)
        if config is None and weights.is_dir() and (weights / "config.yaml").is_file():
            config = weights / "config.yaml"
        given = {"data": data, "root": root}
        settings = merged(config, {name: value for name, value in given.items() if value is not None})
        model, network = load_network(weights)
        model = model.to(memory_format=torch.channels_last)
        prepare, about = preprocess(model), dataclasses.asdict(network)
        train_set, val_set = make_dataset(settings, settings.train_split), make_dataset(settings, settings.val_split)
        if len(val_set.classes) != network.num_classes:
            raise ValueError(f"{weights}: want the dataset's {len(val_set.classes)} classes, got {network.num_classes}")

        def sized(x: torch.Tensor) -> torch.Tensor:
            x = x if size is None else F.interpolate(x, size, mode="bilinear", antialias=True)
            return x.contiguous(memory_format=torch.channels_last)

        @torch.no_grad()
        def score(run: Callable) -> float:
            def whole(x: torch.Tensor) -> torch.Tensor:
                logits = run(sized(x))
                return logits if size is None else F.interpolate(logits, x.shape[2:], mode="bilinear")

            batches = ((prepare(x), labels) for x, labels in DataLoader(val_set, generator=torch.Generator()))
            return mean_iou(evaluate(whole, batches, network.num_classes))

        step = max(1, len(train_set) // images)
        calibration = [sized(prepare(train_set[i][0][None]))[0] for i in range(0, len(train_set), step)][:images]
        if len({x.shape for x in calibration}) > 1:
            raise ValueError("want calibration images of one size, got several: name one by --size H W")
        if size is None and not dynamic and val_set[0][0].shape != calibration[0].shape:
            raise ValueError("want validation images of the calibration's size, got another: --size H W, or --dynamic")
        options = {"observer": observer or "mse", "network": about, "dynamic": dynamic}
        table = {"float": (model, checkpoint_size(model.state_dict()))}
        for name in ("bf16", "fp16") if mode == "fp16" else ("bf16",):
            table[name] = q.half(model, HALVES[name]), checkpoint_size(model.state_dict(), HALVES[name])
        quantized, files, costs = None, {}, {}
        if mode == "aware":
            stream = Stream(train_set, Augment(settings.crop, settings.scale, settings.flip, 0.0), settings.seed)
            loader = DataLoader(Subset(stream, range(steps * batch)), batch, generator=torch.Generator())
            batches = [(prepare(x), labels) for x, labels, *_ in loader]
            quantized = deploy.quantize_aware(
                model, calibration, batches, steps, learning_rate=learning_rate, **options,
                progress=lambda done, values: reporter.progress("train", done, steps, values),
            )  # fmt: skip
        elif mode == "static":
            limit = {"score": score, "max_drop": max_drop} if max_drop is not None else {}
            quantized = deploy.quantize(model, calibration, say=reporter.say, **limit, **options)
            costs = quantized.about.get("sensitivity", {})
        if sensitivity and not costs:
            costs = deploy.sensitivity(model, calibration, score)
            for name, cost in costs.items():
                reporter.say(f"  {name}: {cost:+.2f}")
        made = shlex.join(["segfast", *sys.argv[1:]])
        scores = {name: score(run) for name, (run, _) in table.items()}
        times = {name: milliseconds(fast(name, model, run), calibration[0][None], runs) for name, (run, _) in table.items()}
        sizes = {name: size for name, (_, size) in table.items()}
        if quantized is not None:
            scores["int8"] = score(quantized)
            times["int8"] = milliseconds(optimize(quantized), calibration[0][None], runs)
            if out.suffix == ".onnx":
                with tempfile.TemporaryDirectory() as folder:
                    sizes["int8"] = deploy.save_quantized(quantized, Path(folder) / "a.safetensors").stat().st_size
                    whole = deploy.export_onnx(
                        model, Path(folder) / "a.onnx", quantized.about["size"], dynamic=dynamic, head=True
                    )
                done = deploy.quantize_onnx(quantized, out, miou=scores["int8"], made=made)
                files = {"float": whole.bytes, "int8": done.bytes}
                reporter.say(
                    f"{out}: {done.agreement:.2%} of the pixels as PyTorch's int8; {done.bytes / 1e6:.2f} MB, "
                    f"{whole.bytes / done.bytes:.2f} times smaller than the float network's {whole.bytes / 1e6:.2f} MB"
                )
                if done.refused:
                    reporter.say(f"TensorRT's parser does not take: {', '.join(done.refused)}")
            else:
                sizes["int8"] = deploy.save_quantized(quantized, out, scores["int8"], made).stat().st_size
        elif mode == "weights":
            rounded = q.weights_only(model)
            scores["int8 weights"], times["int8 weights"] = score(rounded), times["float"]
            q.save_weights_only(model, out, about, scores["int8 weights"], made)
            sizes["int8 weights"] = out.stat().st_size
        else:
            tensors = {k: x.to(HALVES[mode]) if x.is_floating_point() else x for k, x in model.state_dict().items()}
            checkpoint.save(out, tensors, deploy.export.describe(model, None, False, about, scores[mode], made))
        show(scores, sizes, times)
        if report is not None:
            entries = {name: {"miou": scores[name], "bytes": sizes[name], "milliseconds": times[name]} for name in scores}
            told = {**about, "mode": mode, "made": made, "table": entries, "onnx": files, "sensitivity": costs}
            checkpoint.write(report, json.dumps(told, indent=1) + "\n")
        reporter.say(f"wrote {out}: {out.stat().st_size / 1e6:.2f} MB")


def fast(name: str, model: torch.nn.Module, run: Callable) -> Callable:
    """The quickest way here to run what the entry stands for."""
    if name == "fp16":
        return run
    return optimize(model, dtype=torch.bfloat16 if name == "bf16" else torch.float32)


def checkpoint_size(tensors, dtype: torch.dtype | None = None) -> int:
    return sum(x.numel() * (dtype.itemsize if dtype and x.is_floating_point() else x.element_size()) for x in tensors.values())


@torch.no_grad()
def milliseconds(run: Callable, image: torch.Tensor, runs: int) -> float | None:
    if not runs:
        return None
    image, times = image.contiguous(memory_format=torch.channels_last), []
    for _ in range(runs + 3):
        began = time.perf_counter()
        run(image)
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times[3:])


def show(scores: dict, sizes: dict, times: dict) -> None:
    columns = ("weights", "mIoU", "difference", "MB", "times smaller", "ms")
    table = Table(*columns, title=f"{torch.get_num_threads()} threads", title_justify="left")
    for name, value in scores.items():
        ms = "–" if times[name] is None else f"{times[name]:.1f}"
        size = f"{sizes[name] / 1e6:.2f}", f"{sizes['float'] / sizes[name]:.2f}"
        table.add_row(name, f"{value:.4f}", f"{100 * (value - scores['float']):+.2f}", *size, ms)
    Console().print(table)


quantize.__doc__ += f"\n\nExample: segfast quantize student student-int8.onnx --max-drop 0.5\n\n{CODES}\n"
