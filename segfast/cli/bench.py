"""`segfast bench`."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from segfast.engine import bench as job
from segfast.engine import race as races
from segfast.engine.catalogue import count, networks, size_text
from segfast.models import create_model

EXAMPLES = """
Examples:

  segfast bench --model fast_scnn --size 512x1024

  segfast bench --model "fanet*" --way eager --way segfast

  segfast bench --model all --seconds 10 --json models.json

  segfast bench --model fast_scnn --size 1024x2048 --peers --dtype bfloat16 --out fast_scnn

Exit codes: 0 done, 1 a way of running computes something else, 2 wrong arguments, 130 interrupted (the file holds what was
measured).
"""


class Dtype(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"


WITH_PEERS, WITHOUT_PEERS = ("dtype", "logits", "out"), ("way", "runs", "file", "as_json")


def bench(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="A network, a pattern, or all.")] = "all",
    size: Annotated[str, typer.Option(help="Height x width of the image.")] = "512x1024",
    way: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(job.WAYS)}; may be repeated. Default: all.")] = None,
    seconds: Annotated[float, typer.Option(min=0, help="How long to time each network.")] = 5.0,
    runs: Annotated[int, typer.Option(min=1, help="Least number of runs of each way.")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of PyTorch. Default: its own choice.")] = None,
    file: Annotated[Path | None, typer.Option("--json", help="File of the figures; those of other networks in it stay.")] = None,
    as_json: Annotated[bool, typer.Option("--print-json", help="Print JSON and nothing else.")] = False,
    peers: Annotated[bool, typer.Option("--peers", help="Race segfast.optimize against the peers, image to class map.")] = False,
    peer: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(races.PEERS)}; may be repeated. Default: all.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="What the networks run in, with --peers.")] = Dtype.float32,
    logits: Annotated[bool, typer.Option("--logits", help="With --peers: to the logits, not to the class map.")] = False,
    out: Annotated[Path, typer.Option(help="With --peers: folder of bench.json and bench.html.")] = Path("segfast-bench"),
) -> None:
    """Time the networks on this CPU: eager, channels_last, compiled and this package's kernels, in turns.

    With --peers: `segfast.optimize` against eager PyTorch, torch.compile, ONNX Runtime and OpenVINO.
    """
    ways = tuple(way) if way else tuple(job.WAYS)
    console = Console(stderr=as_json)
    measurements: list[job.Measurement] = []
    try:
        shape = job.read_size(size)
        names = [row["name"] for row in networks("*" if model == "all" else model)]
        racing = peers or bool(peer)
        given = {name for name in context.params if context.get_parameter_source(name).name != "DEFAULT"}
        if ignored := sorted(given & set(WITHOUT_PEERS if racing else WITH_PEERS)):
            options = ", ".join({"as_json": "--print-json", "file": "--json"}.get(name, f"--{name}") for name in ignored)
            raise ValueError(f"{options}: {'not with' if racing else 'only with'} --peers")
        if threads:
            most = 4 * (os.cpu_count() or 1)
            if threads > most:
                raise ValueError(f"want at most {most} threads on {os.cpu_count()} processors, got {threads}")
            torch.set_num_threads(threads)
        if racing:
            run_races(console, names, shape, tuple(peer or races.PEERS), dtype, "logits" if logits else "classes", seconds, out)
            return
        watch(console, names, shape, ways, seconds, runs, file, measurements)
    except AssertionError as error:
        typer.echo(f"segfast bench: {error}", err=True)
        raise typer.Exit(1) from error
    except (ValueError, ImportError, OSError) as error:
        typer.echo(f"segfast bench: {error}", err=True)
        raise typer.Exit(2) from error
    except KeyboardInterrupt:
        typer.echo("segfast bench: interrupted", err=True)
        raise typer.Exit(130) from None
    if as_json:
        typer.echo(json.dumps([asdict(m) for m in measurements], indent=1))
        return
    console.print(result_table(measurements, ways))
    for line in (f"included: {job.INCLUDED}", job.WAYS_NOTE, *([f"wrote {file}"] if file else [])):
        console.print(line, markup=False, highlight=False)


def run_races(console: Console, names, shape, peers, dtype: Dtype, target: str, seconds: float, out: Path) -> None:
    done: list[races.Race] = []
    with Progress(
        TextColumn("{task.description}"), TextColumn("{task.fields[text]}"), TimeElapsedColumn(), console=console
    ) as bars:
        for name in names:
            task = bars.add_task(name, text="building")
            say = lambda text, task=task: bars.update(task, text=text)  # noqa: E731
            kind = races.DTYPES[dtype.value]
            network = create_model(name).eval()
            done.append(races.race(name, network, shape, dtype=kind, target=target, peers=peers, seconds=seconds, say=say))
            say(races.verdict(done[-1]))
            paths = races.write(out, done)
    console.print(race_table(done, peers))
    for line in (f"included: {races.INCLUDED[target]}", races.NOTE, *(f"wrote {path}" for path in paths)):
        console.print(line, markup=False, highlight=False)


def race_table(done: list[races.Race], peers) -> Table:
    table = Table(title="Milliseconds: median (95th percentile)", title_justify="left")
    for column in ("network", "size", "dtype", "segfast", *peers, "best peer / segfast"):
        table.add_column(column, justify="left" if column in ("network", "size", "dtype") else "right")
    for r in done:
        ways = (r.milliseconds.get(way) for way in ("segfast", *peers))
        times = [f"{t.median:.1f} ({t.p95:.1f})" if t else "–" for t in ways]
        table.add_row(r.name, size_text(r.size), r.dtype, *times, f"{r.ratio:.2f}" if r.ratio else "–")
    return table


def watch(console: Console, names, shape, ways, seconds, runs, file, measurements) -> None:
    columns = [TextColumn("{task.description}"), BarColumn(24), TextColumn("{task.fields[text]}"), TimeElapsedColumn()]
    with Progress(*columns, console=console) as bars:
        for name in names:
            task = bars.add_task(name, total=1.0, text="building, compiling")
            prepared = job.prepare(name, shape, ways)
            bars.update(task, text="timing")
            measured = prepared.measure(seconds, runs, lambda done, task=task: bars.update(task, completed=done))
            fastest = min(measured.milliseconds, key=lambda way, m=measured: m.milliseconds[way].median)
            bars.update(task, completed=1.0, text=f"{measured.milliseconds[fastest].median:.1f} ms ({fastest})")
            measurements.append(measured)
            if file:
                job.write(file, [measured])


def result_table(measurements: list[job.Measurement], ways) -> Table:
    table = Table(title="Milliseconds an image: median (95th percentile)", title_justify="left")
    for column in ("network", "size", "parameters", "MACs", "activations", *ways):
        table.add_column(column, justify="left" if column in ("network", "size") else "right")
    for m in measurements:
        times = [f"{m.milliseconds[way].median:.1f} ({m.milliseconds[way].p95:.1f})" for way in ways]
        memory = f"{m.activation_bytes / 2**20:.0f} MiB"
        table.add_row(m.name, size_text(m.size), count(m.parameters), count(m.macs), memory, *times)
    return table


bench.__doc__ += EXAMPLES
