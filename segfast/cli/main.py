"""The typer application; without a command it prints what `segfast info` prints."""

from __future__ import annotations

import typer

from segfast.cli import data
from segfast.cli.bench import bench
from segfast.cli.demo import demo
from segfast.cli.evaluate import evaluate, predict
from segfast.cli.export import export
from segfast.cli.info import info
from segfast.cli.models import models
from segfast.cli.quantize import quantize
from segfast.cli.train import distill, train

app = typer.Typer(
    help="Compact, real-time semantic segmentation in PyTorch.",
    epilog="Example: segfast demo --out segfast-demo",
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(info)
app.command()(demo)
app.command()(models)
app.command()(bench)
app.command()(train)
app.command()(distill)
app.command("eval")(evaluate)
app.command()(predict)
app.command()(export)
app.command()(quantize)
app.add_typer(data.app, name="data")


@app.callback(invoke_without_command=True)
def default(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        info()


def main() -> None:
    """The entry point of `segfast` and `python -m segfast`."""
    app()
