"""`report.html` and `metrics.json` from what `segfast.engine.demo.run` measured."""

from __future__ import annotations

import base64
import io
import json
from html import escape
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from segfast.data.images import colour
from segfast.engine import checkpoint

COLOURS = {"teacher": "#1b6ca8", "student, distilled": "#2a9d4e", "student, alone": "#d1672b"}
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:64rem;margin:2rem auto;padding:0 1rem;color:#222}
h1{font-size:1.7rem}h2{font-size:1.2rem;margin-top:2.2rem}table{border-collapse:collapse}
td,th{padding:.25rem .8rem .25rem 0;text-align:left;border-bottom:1px solid #ddd;vertical-align:top}
td.n,th.n{text-align:right}.good{color:#1d7a3a}.bad{color:#b3261e}.panel img{width:100%;display:block}
.panel{display:grid;grid-template-columns:repeat(5,1fr);gap:4px;font-size:.85rem}
.swatch{display:inline-block;width:.8rem;height:.8rem;margin:0 .3rem 0 .8rem}
.facts td:first-child{white-space:nowrap}
"""


def write(metrics: dict, folder: Path) -> list[Path]:
    """Write both files into `folder` (made if need be), each whole or not at all.

    Returns:
        The paths written.
    """
    panel = metrics["panel"]
    plain = {name: value for name, value in metrics.items() if name != "panel"}
    texts = {"metrics.json": json.dumps(plain, indent=1, allow_nan=False) + "\n", "report.html": html(plain, panel)}
    return [checkpoint.write(folder / name, text) for name, text in texts.items()]


def verdict(metrics: dict) -> str:
    """One sentence: did distillation help?"""
    scores, few = metrics["scores"], metrics["labelled_images"]
    distilled, alone = scores["student, distilled"]["miou"], scores["student, alone"]["miou"]
    points = f"{100 * abs(metrics['gain']):.1f} points of mIoU"
    outcome = f"{points} above" if metrics["distillation_helped"] else f"not above ({points} below)"
    return (
        f"The distilled student ends at {distilled:.3f} mIoU, {outcome} the same student trained alone ({alone:.3f}). "
        f"Both have labels for {few['students']} images; the distilled one also learns from what the teacher, "
        f"trained on {few['teacher']} labelled images, says about the others."
    )


def html(metrics: dict, panel: dict) -> str:
    good = "good" if metrics["distillation_helped"] else "bad"
    return "\n".join(
        [
            "<!doctype html><html lang=en><meta charset=utf-8><title>segfast demo</title>",
            f"<style>{STYLE}</style><h1>segfast demo</h1>",
            f"<p class={good}><b>{escape(verdict(metrics))}</b></p>",
            "<h2>Scores</h2>", score_table(metrics),
            "<h2>Image, truth, teacher, students</h2>", legend(metrics["classes"], panel["palette"]), pictures(panel),
            "<h2>Training</h2>", curves(metrics["curves"]),
            "<h2>Kernels against their references</h2>", check_table(metrics["checks"]),
            "<h2>Kernels against eager PyTorch</h2>", bars(metrics["timings"]),
            "<h2>Environment</h2>", facts(metrics), "</html>\n",
        ]
    )  # fmt: skip


def table(head: list[str], rows: list[list[str]], numbers: int = 1) -> str:
    """Columns from `numbers` on hold numbers."""

    def row(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}{' class=n' if i >= numbers else ''}>{c}</{tag}>" for i, c in enumerate(cells)) + "</tr>"

    return "<table>" + row(head, "th") + "".join(row(r, "td") for r in rows) + "</table>"


def score_table(metrics: dict) -> str:
    rows = []
    for name, values in metrics["scores"].items():
        per_class = ["–" if v is None else f"{v:.2f}" for v in values["class_iou"]]
        parameters, seconds = metrics["parameters"].get(name, ""), metrics["seconds"].get(name, "")
        parameters, seconds = parameters and f"{parameters:,}", seconds and f"{seconds:.0f}"
        rows.append([escape(name), f"<b>{values['miou']:.3f}</b>", parameters, seconds, *per_class])
    return table(["", "mIoU", "parameters", "seconds", *map(escape, metrics["classes"])], rows)


def check_table(checks: list[dict]) -> str:
    marks = {True: "<span class=good>passed</span>", False: "<span class=bad>failed</span>"}
    rows = [[escape(c["op"]), escape(c["backend"]), marks[c["passed"]], str(c["samples"]), f"{c['error']:.2f}"] for c in checks]
    note = (
        "<p>Outputs and gradients in float32 against the float64 reference. Error 1.00 is what is allowed: "
        "twice the float32 reference's own error plus 4 eps max|exact|.</p>"
    )
    return note + table(["operation", "backend", "", "samples", "worst error"], rows, 3)


def bars(timings: list[dict]) -> str:
    top = max([1.0, *(t["speedup"] for t in timings)])
    height = 30 * len(timings) + 24
    parts = [f'<svg viewBox="0 0 900 {height}" width="100%" font-size="13" role="img">']
    scale = 320 / top
    for i, t in enumerate(timings):
        y, fill = 30 * i, "#2a9d4e" if t["speedup"] >= 1 else "#d1672b"
        parts.append(f'<text x="0" y="{y + 17}">{escape(t["op"])}  {escape(t["shape"])}</text>')
        parts.append(f'<rect x="310" y="{y + 3}" width="{t["speedup"] * scale:.1f}" height="20" fill="{fill}"/>')
        label = f"{t['speedup']:.2f}x  ({t['milliseconds']:.2f} ms, eager {t['eager_milliseconds']:.2f} ms)"
        parts.append(f'<text x="{316 + t["speedup"] * scale:.1f}" y="{y + 17}">{label}</text>')
    x = 310 + scale
    parts.append(
        f'<path d="M{x:.1f} 0V{height - 20}" stroke="#888" stroke-dasharray="3 3"/>'
        f'<text x="{x:.1f}" y="{height - 5}" fill="#666">eager</text></svg>'
    )
    return "".join(parts)


def curves(history: dict[str, list[dict[str, float]]]) -> str:
    charts = [chart("cross-entropy on the labels", {name: [h["labels"] for h in steps] for name, steps in history.items()})]
    distilled = {
        name: [h[name] for h in steps] for steps in history.values() for name in steps[0] if name not in ("loss", "labels")
    }
    if distilled:
        charts.append(chart("distillation losses of the student (weighted)", distilled))
    return "".join(charts)


def chart(title: str, series: dict[str, list[float]], width: int = 900, height: int = 240) -> str:
    smooth = {}
    for name, values in series.items():
        window = max(1, len(values) // 60)
        padded = np.concatenate([np.repeat(values[0], window - 1), values])
        smooth[name] = np.convolve(padded, np.ones(window) / window, "valid")
    longest = max(len(v) for v in smooth.values())
    top = max(float(v.max()) for v in smooth.values()) or 1.0
    left, bottom = 50, height - 30
    parts = [
        f'<svg viewBox="0 0 {width} {height}" width="100%" font-size="13" role="img">',
        f'<text x="{left}" y="14">{escape(title)}</text>',
    ]
    for fraction in (0, 0.25, 0.5, 0.75, 1):
        y = bottom - fraction * (bottom - 24)
        parts.append(
            f'<path d="M{left} {y:.1f}H{width - 150}" stroke="#ddd"/>'
            f'<text x="0" y="{y + 4:.1f}" fill="#666">{fraction * top:.2f}</text>'
        )
    palette = ["#2a9d4e", "#7b4fb5", "#1b6ca8", "#d1672b"]
    for i, (name, values) in enumerate(smooth.items()):
        stroke = COLOURS.get(name, palette[i % len(palette)])
        every = max(1, len(values) // 300)
        points = " ".join(
            f"{left + (width - 150 - left) * j / max(1, longest - 1):.1f},{bottom - (bottom - 24) * values[j] / top:.1f}"
            for j in range(0, len(values), every)
        )
        parts.append(f'<polyline points="{points}" fill="none" stroke="{stroke}" stroke-width="2"/>')
        parts.append(f'<text x="{width - 140}" y="{40 + 20 * i}" fill="{stroke}">{escape(name)}</text>')
    parts.append(
        f'<text x="{left}" y="{height - 8}" fill="#666">step 1</text>'
        f'<text x="{width - 190}" y="{height - 8}" fill="#666">{longest}</text></svg>'
    )
    return "".join(parts)


def legend(classes: list[str], palette) -> str:
    names = (f'<span class=swatch style="background:rgb{tuple(rgb)}"></span>{escape(n)}' for n, rgb in zip(classes, palette))
    return f"<p>{''.join(names)}</p>"


def pictures(panel: dict) -> str:
    palette = panel["palette"]
    columns = [name for name in panel if name != "palette"]
    cells = [f"<div>{escape(name)}</div>" for name in columns]
    for i in range(len(panel["truth"])):
        for name in columns:
            value = panel[name][i]
            if name == "image":
                pixels = (value.permute(1, 2, 0).clamp(0, 1) * 255).to(torch.uint8)
            else:
                pixels = colour(value, palette)
            cells.append(f'<img alt="{escape(name)}" src="data:image/png;base64,{png(pixels.numpy())}">')
    return f"<div class=panel>{''.join(cells)}</div>"


def png(pixels: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def facts(metrics: dict) -> str:
    rows = [[escape(k), escape(str(v))] for k, v in {**metrics["environment"], **metrics["settings"]}.items() if v is not None]
    rows += [["who runs what", escape(", ".join(f"{b['op']} on {b['device']}: {b['backend']}" for b in metrics["backends"]))]]
    rows += [["seconds in all", f"{metrics['seconds']['all']:.0f}"]]
    return "<div class=facts>" + table(["", ""], rows, 2) + "</div>"
