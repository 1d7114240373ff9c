"""`segfast data check`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from segfast.cli.options import Reporter, explained, merged
from segfast.data import check as checks
from segfast.engine.run import make_dataset

app = typer.Typer(help="What a dataset is like before a network is trained on it.")


@app.callback()
def data() -> None:
    pass


@app.command()
def check(
    config: Annotated[Path | None, typer.Option(help="YAML file of a run, instead of the options below.")] = None,
    data: Annotated[str | None, typer.Option(help="camvid, cityscapes, ade20k, voc or folder.")] = None,
    root: Annotated[str | None, typer.Option(help="Its folder.")] = None,
    split: Annotated[list[str] | None, typer.Option(help="Splits; default: the training and the validation split.")] = None,
    label_map: Annotated[str | None, typer.Option(help="Labels of the files to classes, as in segfast train.")] = None,
    ignore_index: Annotated[int | None, typer.Option(help="A label that is ignored.")] = None,
    num_classes: Annotated[int | None, typer.Option(min=1, help="Of a folder without classes.txt.")] = None,
) -> None:
    """Read every file: missing pairs, sizes, labels that are no class, pixels a class.

    Example: segfast data check --data camvid --root camvid

    Exit codes: 0 fit to train on, 1 there are problems, 2 wrong arguments, 130 Ctrl-C.
    """
    with explained("data check"):
        given = {"data": data, "root": root, "label_map": label_map, "ignore_index": ignore_index, "num_classes": num_classes}
        settings = merged(config, {name: value for name, value in given.items() if value is not None})
        if settings.data == "synthetic":
            raise ValueError("want --data of files, got the synthetic streets, which need no check")
        healthy = True
        with Reporter() as reporter:
            for name in split or dict.fromkeys((settings.train_split, settings.val_split)):
                dataset = make_dataset(settings, name, complete=False)
                health = checks.check(dataset, lambda done, of, name=name: reporter.progress(name, done, of, {}))
                show(health, dataset.classes, reporter.console)
                healthy &= health.healthy
        raise typer.Exit(0 if healthy else 1)


def show(health: checks.Health, classes, console: Console) -> None:
    total = max(1, sum(health.pixels) + health.ignored)
    table = Table("class", "pixels", "share", "images", title=f"{health.split}: {health.pairs} pairs", title_justify="left")
    for i, (name, pixels) in enumerate(zip(classes, health.pixels)):
        table.add_row(name, f"{pixels:,}", f"{pixels / total:.2%}", str(health.images[i]))
    table.add_row("[i]ignored", f"{health.ignored:,}", f"{health.ignored / total:.2%}", "")
    console.print(table)
    sizes = ", ".join(f"{h} x {w} ({count})" for (h, w), count in health.sizes.most_common(8))
    more = f" and {len(health.sizes) - 8} others" if len(health.sizes) > 8 else ""
    console.print(f"sizes: {sizes or 'none'}{more}", markup=False, highlight=False)
    for lines, what, style in ((health.notes, "note", "yellow"), (health.problems, "problem", "red")):
        for line in lines[:20]:
            console.print(f"{what}: {line}", markup=False, highlight=False, style=style, soft_wrap=True)
        if len(lines) > 20:
            console.print(f"{what}: and {len(lines) - 20} more", style=style)
