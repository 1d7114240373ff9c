"""What there is to build, as rows, and as the Markdown of docs/models.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from segfast._names import unknown
from segfast.models import NETWORKS, list_models

MACS_NOTE = (
    "MACs: multiply-accumulates of convolutions and matrix products, one image of the size given, 19 classes, no auxiliary head"
)


def networks(pattern: str = "*") -> list[dict]:
    """One dictionary a network whose name matches the shell-style pattern, without its builder, sorted by name.

    Raises:
        ValueError: nothing matches (the nearest names are suggested).
    """
    names = list_models(pattern)
    if not names:
        raise unknown("models", pattern, NETWORKS)
    rows = []
    for name in names:
        network = NETWORKS[name]
        rows.append(
            {
                "name": name,
                "parameters": network.parameters,
                "macs": network.macs,
                "size": list(network.size),
                "published": asdict(network.published),
                "paper": network.paper,
                "official": network.official,
                "licence": network.licence,
            }
        )
    return rows


def count(value: float) -> str:
    """12,770,515 as "12.77 M", 123_338_627_456 as "123.34 G"."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return str(value)


def size_text(size: Sequence[int]) -> str:
    return f"{size[0]}x{size[1]}"


def network_cells(row: dict) -> list[str]:
    """A network's cells under `NETWORK_COLUMNS`."""
    published = row["published"]
    return [
        row["name"],
        count(row["parameters"]),
        f"{count(row['macs'])} at {size_text(row['size'])}",
        ", ".join(filter(None, (published["parameters"], published["macs"]))) or "-",
        published["miou"] or "-",
        published["speed"] or "-",
        row["licence"] or "-",
    ]


NETWORK_COLUMNS = ("network", "parameters", "MACs", "published counts", "published mIoU", "published speed", "licence of weights")


def markdown(pattern: str = "*") -> str:
    """The networks as a Markdown table, with papers and sources below it."""
    rows = networks(pattern)
    exact = [[f"`{row['name']}`", f"{row['parameters']:,}", *network_cells(row)[2:]] for row in rows]
    sources = []
    for row in rows:
        parts = [row["paper"]]
        parts += [f"figures: {row['published']['source']}"] if row["published"]["source"] else []
        parts += [f"code: {row['official']}"] if row["official"] else []
        sources.append(f"- `{row['name']}`: {'; '.join(parts)}")
    return "\n".join([table(NETWORK_COLUMNS, exact), "", f"{MACS_NOTE}.", "", *sources, ""])


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; a bar within a cell is escaped."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(columns), line(["---"] * len(columns)), *(line(row) for row in rows)])
