"""The speed-regression gate: the ratios of a run against those recorded for the same machine.

    python benchmarks/compare.py run.json [more.json ...]     fails when a ratio fell below 0.9 of the recorded one
    python benchmarks/compare.py run.json --record            replaces the machine's figures by the run's
    python benchmarks/compare.py --write-readme               fills the README's table from the recorded figures
    python benchmarks/compare.py --write-docs                 and the tables of docs/results/ds_conv.md, of all machines

Ratios are times faster than the peers, so they travel better than times; still they hold for one processor, kernel set, thread
count and release of PyTorch. What is not recorded yet is recorded, said, and not judged.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ALLOWED = 0.9  # of the recorded ratio
KEY = ("processor", "kernel set", "threads", "torch")
START, END = re.compile(r"<!-- figures: [^\n]*? -->\n"), "<!-- end of figures -->"


def load(path: Path) -> dict[str, dict[str, dict]]:
    """{machine: {figure: {"ratios", "milliseconds", ...}}} of a pytest-benchmark file; only what has ratios is a figure."""
    runs: dict[str, dict[str, dict]] = {}
    for benchmark in json.loads(path.read_text())["benchmarks"]:
        info = benchmark.get("extra_info", {})
        if "ratios" in info and "machine" in info:
            key = ", ".join(f"{name} {info['machine'][name]}" for name in KEY)
            runs.setdefault(key, {})[benchmark["name"]] = {name: value for name, value in info.items() if name != "machine"}
    return runs


def compare(run: dict[str, dict], recorded: dict[str, dict]) -> list[tuple[str, str, float, float | None]]:
    """(figure, against, ratio, recorded ratio or None) of one machine, in the order of the run."""
    return [
        (name, label, ratio, recorded.get(name, {}).get("ratios", {}).get(label))
        for name, figure in run.items()
        for label, ratio in figure["ratios"].items()
    ]


def fell(ratio: float, before: float | None) -> bool:
    return before is not None and not ratio >= ALLOWED * before


def table(rows: list[tuple[str, str, float, float | None]]) -> str:
    lines = ["| figure | against | times faster | recorded | |", "|---|---|---|---|---|"]
    for name, label, ratio, before in rows:
        state = "new" if before is None else "FELL" if fell(ratio, before) else ""
        lines.append(f"| {name} | {label} | {ratio:.2f} | {'' if before is None else f'{before:.2f}'} | {state} |")
    return "\n".join(lines)


def rounded(value):
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def mean_and_lowest(values: list[float]) -> tuple[str, str]:
    """The geometric mean first."""
    return f"{math.exp(sum(map(math.log, values)) / len(values)):.2f}", f"{min(values):.2f}"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows))


def by_machine(baseline: dict[str, dict[str, dict]], test: str, label: str, suffix: str = "]") -> dict[str, dict[str, float]]:
    """One test's ratios: {processor, kernel set: {shape: ratio}} of the machines that have some."""
    found = {}
    for machine, figures in baseline.items():
        name = re.fullmatch(r"processor (.*), kernel set (.*), threads .*", machine)
        found[", ".join(name.groups())] = {
            name.removeprefix(f"{test}[").removesuffix(suffix): f["ratios"][label]
            for name, f in figures.items()
            if name.startswith(f"{test}[") and name.endswith(suffix) and label in f["ratios"]
        }
    return {machine: ratios for machine, ratios in found.items() if ratios}


def inference(baseline: dict[str, dict[str, dict]]) -> dict[str, dict[str, float]]:
    return by_machine(baseline, "test_ds_conv_inference", "best peer", "-float32]")


def training(baseline: dict[str, dict[str, dict]]) -> dict[str, dict[str, float]]:
    return by_machine(baseline, "test_ds_conv_training", "eager, channels_last")


def shapes_table(machines: dict[str, dict[str, float]]) -> str:
    """A row a machine and a column a shape."""
    heads = sorted({head for ratios in machines.values() for head in ratios})
    rows = [
        [machine, *(f"{ratios[h]:.2f}" if h in ratios else "" for h in heads), *mean_and_lowest(list(ratios.values()))]
        for machine, ratios in machines.items()
    ]
    return markdown(["processor, kernel set", *heads, "geometric mean", "lowest"], rows)


def machines_table(baseline: dict[str, dict[str, dict]]) -> str:
    """The README's: `ds_conv` on every machine."""
    of = inference(baseline), training(baseline)
    rows = [
        [machine, *("; ".join(mean_and_lowest([*half[machine].values()])) if machine in half else "" for half in of)]
        for machine in dict.fromkeys([*of[0], *of[1]])
    ]
    return markdown(["processor, kernel set", "`ds_conv`, inference, float32 (geometric mean; lowest)", "training step"], rows)


def shapes_tables(baseline: dict[str, dict[str, dict]]) -> tuple[str, str]:
    """Those of docs/results/ds_conv.md: inference in float32, and the training step."""
    return shapes_table(inference(baseline)), shapes_table(training(baseline))


def figures_table(machine: str, figures: dict[str, dict]) -> str:
    """The README's table for one machine; a figure that was not measured says so."""

    def ratios(prefix: str, label: str, suffix: str = "") -> list[float]:
        return [
            f["ratios"][label]
            for name, f in figures.items()
            if name.startswith(prefix) and name.endswith(suffix) and label in f["ratios"]
        ]

    def one(values: list[float]) -> str:
        return f"{values[0]:.2f}" if values else "not measured yet"

    def spread(values: list[float]) -> str:
        if not values:
            return "not measured yet"
        return "; ".join(mean_and_lowest(values))

    def pair(prefix: str, *labels: str) -> str:
        return "; ".join(one(ratios(prefix, label)) for label in labels)

    training = "test_ds_conv_training["
    saved = [f["saved_bytes"] for name, f in figures.items() if name.startswith(training) and "saved_bytes" in f]
    share = max((s["segfast"] / s["eager"] for s in saved), default=None)
    peers = "the best of eager, frozen Inductor, ONNX Runtime, OpenVINO"
    rows = [
        (
            "`ds_conv`, inference, float32, five shapes (geometric mean; lowest)",
            peers,
            spread(ratios("test_ds_conv_inference[", "best peer", "float32]")),
        ),
        (
            "`ds_conv`, inference, bfloat16, the same shapes (geometric mean; lowest)",
            "eager bfloat16",
            spread(ratios("test_ds_conv_inference[", "best peer", "bfloat16]")),
        ),
        (
            "`ds_conv`, training step, five shapes (geometric mean; lowest)",
            "eager, channels_last",
            spread(ratios(training, "eager, channels_last")),
        ),
        (
            "`ds_conv`, bytes saved for backward (the largest share of the five)",
            "eager",
            "not measured yet" if share is None else f"{100 * share:.0f} % of them",
        ),
    ]
    for text, prefix, labels, against in (
        (
            "`pairwise_loss`, 64 x 64 nodes, 128 channels, forward and backward",
            "test_pairwise_loss[128]",
            ("official", "torch.compile"),
            "the released code's formula; the same compiled",
        ),
        (
            "`pairwise_loss`, student 128, teacher 512 channels",
            "test_pairwise_loss[512]",
            ("official", "torch.compile"),
            "the released code's formula; the same compiled",
        ),
        (
            "`pixelwise_kl`, 2 x 19 x 512 x 1024, forward and backward",
            "test_pixelwise_kl[2x19x512x1024]",
            ("eager", "torch.compile"),
            "eager; `torch.compile`",
        ),
        (
            "`pixelwise_kl`, 2 x 150 x 128 x 128",
            "test_pixelwise_kl[2x150x128x128]",
            ("eager", "torch.compile"),
            "eager; `torch.compile`",
        ),
        *(
            (f"`{op}`, 19 classes, {sizes}", f"test_{op}", ("eager", "torch.compile"), "eager; `torch.compile`")
            for op, sizes in (
                ("upsample_argmax", "128 x 256 to 1024 x 2048"),
                ("upsample_cross_entropy", "2 x 64 x 128 to 512 x 1024, forward and backward"),
                ("upsample_pixelwise_kl", "the same, teacher 128 x 256"),
            )
        ),
    ):
        rows.append((text, against, pair(prefix, *labels)))
    rows.append(
        (
            "`pixelwise_kl`, 64 x 64, 2 to 1,000 classes (geometric mean; lowest)",
            "eager",
            spread(ratios("test_pixelwise_kl_classes[", "eager")),
        )
    )
    for op, against in (("concat_shuffle", "eager `cat` and shuffle"), ("channel_shuffle", "eager")):
        for work, said in (("forward", "forward"), ("forward_backward", "forward and backward")):
            prefix = f"test_shuffle[{op}-{work}-"
            values = [one(ratios(f"{prefix}{layout}]", "eager")) for layout in ("nchw", "channels_last")]
            rows.append((f"`{op}`, {said} (contiguous; channels_last)", against, "; ".join(values)))
    lines = [f"Measured on: {machine}.", "", "| work | compared with | times faster |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def write_between(path: Path, *texts: str) -> None:
    """Puts each text between a pair of markers, in their order."""
    done, rest = "", path.read_text()
    for text in texts:
        start = START.search(rest)
        end = rest.find(END, start.end()) if start else -1
        if end < 0:
            raise ValueError(f"{path}: want '<!-- figures: ... -->' and, after it, '{END}'")
        done += f"{rest[: start.end()]}\n{text}\n\n{END}"
        rest = rest[end + len(END) :]
    path.write_text(done + rest)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="files of --benchmark-json")
    parser.add_argument("--baseline", type=Path, default=HERE / "baseline.json")
    parser.add_argument("--record", action="store_true", help="the run becomes the baseline; nothing is judged")
    parser.add_argument("--write-readme", action="store_true")
    parser.add_argument("--readme", type=Path, default=HERE.parent / "README.md")
    parser.add_argument("--write-docs", action="store_true")
    parser.add_argument("--docs", type=Path, default=HERE.parent / "docs" / "results" / "ds_conv.md")
    options = parser.parse_args(arguments)
    if not options.runs and not options.write_readme and not options.write_docs:
        parser.error("want a run, --write-readme or --write-docs")
    baseline = json.loads(options.baseline.read_text()) if options.baseline.exists() else {}
    runs: dict[str, dict[str, dict]] = {}
    for path in options.runs:
        for machine, figures in load(path).items():
            runs.setdefault(machine, {}).update(figures)
    if options.runs and not runs:
        print("no figures in the run: was it made by `pytest benchmarks --benchmark-only`?", file=sys.stderr)
        return 2
    failed = False
    for machine, figures in runs.items():
        recorded = baseline.setdefault(machine, {})
        rows = compare(figures, recorded)
        print(f"{machine}\n\n{table(rows)}\n")
        new = {name: f for name, f in figures.items() if options.record or name not in recorded}
        if new:
            recorded.update(rounded(new))
            print(f"recorded {len(new)} figures in {options.baseline.name}")
        bad = [f"{name}, {label}" for name, label, ratio, before in rows if fell(ratio, before)]
        if bad and not options.record:
            print(f"below {ALLOWED} of the recorded ratio: {'; '.join(bad)}")
            failed = True
    if runs:
        options.baseline.write_text(json.dumps(baseline, indent=1, sort_keys=True) + "\n")
    if (options.write_readme or options.write_docs) and not baseline:
        print("nothing recorded yet", file=sys.stderr)
        return 2
    if options.write_readme:
        machine = next(iter(runs), None) or max(baseline, key=lambda key: len(baseline[key]))
        everywhere = f"On every processor that was measured:\n\n{machines_table(baseline)}"
        write_between(options.readme, f"{figures_table(machine, baseline[machine])}\n\n{everywhere}")
    if options.write_docs:
        write_between(options.docs, *shapes_tables(baseline))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
