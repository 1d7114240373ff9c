"""Writes docs/models.md: the networks, and what benchmarks/models.json and benchmarks/units.json hold of their speed.

python docs/models.py
"""

from __future__ import annotations

import json
from pathlib import Path

from segfast.engine import catalogue
from segfast.engine.bench import WAYS

ROOT = Path(__file__).resolve().parents[1]
HEAD = """\
# Networks

Written by `python docs/models.py` from the registry and from `benchmarks/*.json`: change those, not this file.

`segfast models` prints the first table; `segfast.create_model(name)` builds a network, `segfast.load_official(name, PATH)` loads
its authors' weights. What papers print is theirs: with their own conventions, GPUs and input sizes, never measured here.
"""


def text() -> str:
    """The whole file."""
    parts = [HEAD, catalogue.markdown()]
    for name, section in (("models.json", speed), ("units.json", units)):
        path = ROOT / "benchmarks" / name
        if path.exists():
            parts.append(section(json.loads(path.read_text(encoding="utf-8"))))
    return "\n".join(parts)


def speed(measured: dict) -> str:
    facts, rows = measured["environment"], []
    for row in measured["rows"]:
        times = [row["milliseconds"].get(way) for way in WAYS]
        rows.append(
            [
                f"`{row['name']}`",
                catalogue.size_text(row["size"]),
                catalogue.count(row["parameters"]),
                catalogue.count(row["macs"]),
                f"{row['activation_bytes'] / 2**20:.0f}",
                *("not measured" if t is None else f"{t['median']:.1f} ({t['p95']:.1f})" for t in times),
            ]
        )
    return f"""## Speed on a CPU

Milliseconds an image, median (95th percentile), by `segfast bench`, all ways of a network in turns; {facts["processor"]},
{facts["threads"]} threads, torch {facts["torch"]}, kernel set {facts["kernel set"]}.

Included: {measured["included"]}.
{measured["ways"][0].upper()}{measured["ways"][1:]}.
Activations: the most bytes that tensors made during an eager forward pass hold at a time.

{catalogue.table(("network", "size", "parameters", "MACs", "activations, MiB", *WAYS), rows)}
"""


def units(measured: dict) -> str:
    columns = list(measured["rows"][0])
    cells = [[row[column] for column in columns] for row in measured["rows"]]
    rows = [["x".join(map(str, cell)) if isinstance(cell, list) else cell for cell in row] for row in cells]
    machine = ", ".join(f"{name} {value}" for name, value in measured["machine"].items())
    return f"""## Fused units

Milliseconds of units of these networks at the networks' own shapes, on this package's kernels and in eager PyTorch, by
`benchmarks/units.py` ({machine}). A ratio below 1 is a loss of the kernels; default is what `segfast.nn` runs there.

{catalogue.table([name.replace("_", " ") for name in columns], rows)}
"""


if __name__ == "__main__":
    (ROOT / "docs" / "models.md").write_text(text(), encoding="utf-8")
