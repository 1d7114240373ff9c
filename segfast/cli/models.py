"""`segfast models`."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from segfast.engine import catalogue

EXAMPLES = """
Examples:

  segfast models

  segfast models "*scnn*"

  segfast models --json > models.json

Build one: segfast.create_model("fast_scnn"); load its authors' weights: segfast.load_official("fast_scnn", PATH).

Exit codes: 0 done, 2 no such network, or wrong arguments.
"""


def models(
    pattern: Annotated[str, typer.Argument(help="Shell-style pattern of the names.")] = "*",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with papers and sources.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown, with papers and sources.")] = False,
) -> None:
    """List the networks: exact counts, what their papers print, and the licence of the official weights."""
    if as_json and as_markdown:
        typer.echo("segfast models: want --json or --markdown, got both", err=True)
        raise typer.Exit(2)
    try:
        rows = catalogue.networks(pattern)
        text = json.dumps(rows, indent=1) if as_json else catalogue.markdown(pattern) if as_markdown else None
    except ValueError as error:
        typer.echo(f"segfast models: {error}", err=True)
        raise typer.Exit(2) from error
    if text is not None:
        typer.echo(text)
        return
    console = Console()
    table = Table(title=f"{len(rows)} networks", title_justify="left", show_lines=True)
    for i, column in enumerate(catalogue.NETWORK_COLUMNS):
        table.add_column(column, no_wrap=i < 2, overflow="fold")
    for row in rows:
        table.add_row(*catalogue.network_cells(row))
    console.print(table, markup=False)
    console.print(f"{catalogue.MACS_NOTE}. Papers and sources of the published figures: --json", markup=False, highlight=False)


models.__doc__ += EXAMPLES
