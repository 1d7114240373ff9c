"""`segfast demo`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from segfast.cli.info import show_environment
from segfast.engine import demo as job
from segfast.engine import report

DEFAULTS = job.Settings()
EXAMPLES = """
Examples:

  segfast demo

  segfast demo --seed 1 --out seed-1

  segfast demo --data camvid --root camvid --out camvid-demo

Exit codes: 0 done, 1 a kernel differs from its reference or training failed, 2 wrong arguments or data, 130 interrupted.
"""


class Data(str, Enum):
    synthetic = "synthetic"
    camvid = "camvid"


def demo(
    out: Annotated[Path, typer.Option(help="Folder of report.html and metrics.json.")] = Path("segfast-demo"),
    data: Annotated[Data, typer.Option(help="What to train on.")] = Data.synthetic,
    root: Annotated[Path | None, typer.Option(help="CamVid's folder, with train/ and trainannot/, val/ and valannot/.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the scenes, the weights and the batches.")] = DEFAULTS.seed,
    steps: Annotated[
        int, typer.Option(min=1, help="Training steps of the teacher; a student takes two thirds.")
    ] = DEFAULTS.steps,
    labels: Annotated[int, typer.Option(min=2, help="Labelled images that the students have.")] = DEFAULTS.labels,
    images: Annotated[int, typer.Option(min=2, help="Training images, at most.")] = DEFAULTS.images,
    validation: Annotated[int, typer.Option(min=1, help="Validation images, at most.")] = DEFAULTS.validation,
    timing_seconds: Annotated[float, typer.Option(min=0, help="How long to time each kernel.")] = DEFAULTS.timing_seconds,
) -> None:
    """Check and time the kernels, train a teacher, distil a student, train the student alone, and write a report.

    Takes at most three minutes on two CPU cores and downloads nothing.
    """
    console = Console()
    show_environment(console)
    try:
        settings = job.Settings(
            data=data.value, root=str(root) if root else None, seed=seed, steps=steps, labels=labels, images=images,
            validation=validation, timing_seconds=timing_seconds,
        )  # fmt: skip
        if out.exists() and not out.is_dir():
            raise ValueError(f"demo: want a folder for --out, got the file {out}")
        metrics = watch(console, settings)
        paths = report.write(metrics, out)
    except (ValueError, OSError) as error:
        typer.echo(f"segfast demo: {error}", err=True)
        raise typer.Exit(2) from error
    except FloatingPointError as error:
        typer.echo(f"segfast demo: {error}", err=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        typer.echo("segfast demo: interrupted, nothing written", err=True)
        raise typer.Exit(130) from None
    console.print(report.verdict(metrics), style="green" if metrics["distillation_helped"] else "yellow", highlight=False)
    for path in paths:
        console.print(f"wrote {path}", markup=False, highlight=False)
    failed = [check["op"] for check in metrics["checks"] if not check["passed"]]
    if failed:
        typer.echo(f"segfast demo: differs from its reference: {', '.join(failed)}", err=True)
        raise typer.Exit(1)


def watch(console: Console, settings: job.Settings) -> dict:
    columns = [
        TextColumn("{task.description}"),
        BarColumn(24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[text]}"),
    ]
    with Progress(*columns, console=console) as bars:
        stages: dict[str, int] = {}

        def progress(stage: str, done: int, total: int, text: str) -> None:
            if stage not in stages:
                stages[stage] = bars.add_task(stage, text="")
            bars.update(stages[stage], completed=done, total=total or None, text=text)

        def show(what: str, rows: list) -> None:
            bars.console.print(TABLES[what](rows))

        return job.run(settings, progress, show)


def check_table(rows: list) -> Table:
    table = Table(
        "operation",
        "backend",
        "samples",
        "worst error (1 is allowed)",
        "",
        title="Kernels against references",
        title_justify="left",
    )
    for c in rows:
        table.add_row(c.op, c.backend, str(c.samples), f"{c.error:.2f}", "[green]passed[/]" if c.passed else "[red]failed[/]")
    return table


def timing_table(rows: list) -> Table:
    table = Table("operation", "shape", "ms", "eager ms", "speed-up", title="Kernels against eager PyTorch", title_justify="left")
    for t in rows:
        table.add_row(t.op, t.shape, f"{t.milliseconds:.2f}", f"{t.eager_milliseconds:.2f}", f"{t.speedup:.2f}x")
    return table


def score_table(rows: list) -> Table:
    table = Table("", "mIoU", title="Scores", title_justify="left")
    for row in rows:
        table.add_row(row["name"], f"{row['miou']:.3f}")
    return table


TABLES = {"checks": check_table, "timings": timing_table, "scores": score_table}
demo.__doc__ += EXAMPLES
