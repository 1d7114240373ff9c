"""`segfast models`, `segfast bench`, and the docs made from the same data."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import segfast
from segfast import _backend
from segfast.cli import app
from segfast.engine import bench, catalogue, race
from segfast.nn import DSConv

ROOT = Path(__file__).resolve().parents[1]


def call(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "220", "NO_COLOR": "1", "TERM": "dumb"})


def test_models():
    output = call("models").output
    for name in segfast.list_models():
        assert name in output
    assert "1.14 M" in output
    assert "123.5 fps" in output
    only = call("models", "pspnet*").output
    assert "pspnet_r101" in only
    assert "fast_scnn" not in only


def test_models_as_data():
    rows = json.loads(call("models", "--json").output)
    assert [row["name"] for row in rows] == segfast.list_models()
    for row in rows:
        assert row["parameters"] > 0
        assert row["macs"] > 0
        assert set(row["published"]) == {"parameters", "macs", "miou", "speed", "source"}
    markdown = call("models", "fast_scnn", "--markdown").output
    assert call("models", "--json", "--markdown").exit_code == 2
    assert "| `fast_scnn` | 1,138,051 | 6.71 G at 1024x2048 | 1.11 M |" in markdown
    assert "arXiv:1902.04502" in markdown


def test_no_such_network():
    result = call("models", "fastscn")
    assert result.exit_code == 2
    assert "did you mean fast_scnn" in result.output
    assert call("bench", "--model", "fastscn").exit_code == 2


def test_help():
    assert 'segfast models "*scnn*"' in call("models", "--help").output
    output = call("bench", "--help").output
    assert "segfast bench --model fast_scnn --size 512x1024" in output
    assert "Exit codes" in output


def test_docs_are_current():
    spec = importlib.util.spec_from_file_location("docs_models", ROOT / "docs" / "models.py")
    docs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(docs)
    assert (ROOT / "docs" / "models.md").read_text(encoding="utf-8") == docs.text(), "run: python docs/models.py"


def test_counts_are_readable():
    assert [catalogue.count(x) for x in (999, 1000, 12_770_515, 123_338_627_456)] == ["999", "1.00 k", "12.77 M", "123.34 G"]
    assert catalogue.table(["a"], [["x|y"]]).splitlines()[-1] == "| x\\|y |"


def test_bench(tmp_path):
    file = tmp_path / "out" / "models.json"
    arguments = ("--size", "64x96", "--seconds", "0", "--runs", "2", "--json", file)
    result = call("bench", "--model", "fast_scnn", "--way", "eager", "--way", "segfast", *arguments)
    assert result.exit_code == 0, result.output
    assert "included: one image" in result.output
    data = json.loads(file.read_text())
    (row,) = data["rows"]
    assert row["name"] == "fast_scnn"
    assert row["size"] == [64, 96]
    assert row["parameters"] == 1_138_051
    assert set(row["milliseconds"]) == {"eager", "segfast"}
    for times in row["milliseconds"].values():
        assert times["runs"] == 2
        assert 0 < times["median"] <= times["p95"]
    printed = call("bench", "--model", "contextnet18", "--way", "channels_last", "--print-json", *arguments)
    assert printed.exit_code == 0, printed.output
    rows = json.loads(file.read_text())["rows"]
    assert [row["name"] for row in rows] == ["contextnet18", "fast_scnn"]  # the first file's row stays
    data["environment"]["threads"] = "4711"
    file.write_text(json.dumps(data))
    result = call("bench", "--model", "fast_scnn", "--way", "eager", *arguments)
    assert result.exit_code == 2
    assert "holds measurements of" in result.output


def test_bench_compiles_any_number_of_networks(monkeypatch):
    # they share their forward, of which PyTorch keeps eight compiled versions; the ninth raised. Here the second would.
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **_: compile(model, fullgraph=True, backend="eager"))
    with torch._dynamo.config.patch(recompile_limit=1):
        for name in ("contextnet18", "fast_scnn"):
            assert set(bench.prepare(name, (64, 96), ["compiled"]).runs) == {"compiled"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--size", "512"), "want a size such as 512x1024"),
        (("--size", "8x0"), "want a size such as 512x1024"),
        (("--way", "warp"), "want ways of running among eager, channels_last"),
        (("--size", "1x1"), r"want (N, 3, H, W)"),
        (("--threads", "100000"), "threads on"),
        (("--dtype", "bfloat16", "--logits", "--way", "eager"), "--dtype, --logits: only with --peers"),
        (("--peer", "eager", "--json", "x.json"), "--json: not with --peers"),
    ],
)
def test_bench_bad_arguments(arguments, message):
    result = call("bench", "--model", "fast_scnn", *arguments)
    assert result.exit_code == 2
    assert message in result.output


def test_bench_with_peers(tmp_path):
    """Two peers that every installation has; small, so that nothing but the plumbing is tested."""
    arguments = ("--size", "64x96", "--peers", "--peer", "eager", "--peer", "channels_last", "--seconds", "0", "--out", tmp_path)
    result = call("bench", "--model", "fast_scnn", *arguments)
    assert result.exit_code == 0, result.output
    (row,) = json.loads((tmp_path / "bench.json").read_text())["races"]
    assert set(row["milliseconds"]) == {"segfast", "eager", "channels_last"}
    assert row["ratio"] == pytest.approx(row["milliseconds"][row["best"]]["median"] / row["milliseconds"]["segfast"]["median"])
    assert {step["kind"] for step in row["steps"]} >= {"inverted_residual", "upsample_argmax"}
    page = (tmp_path / "bench.html").read_text()
    assert "inverted_residual" in page
    assert "<svg" in page
    assert "src=" not in page  # self-contained
    wrong = call("bench", "--model", "fast_scnn", "--peer", "abacus", "--size", "64x96")
    assert wrong.exit_code == 2
    assert "want peers of eager" in wrong.output


def test_a_peer_that_computes_something_else_is_not_measured():
    class Wrong(nn.Module):
        calls = 0

        def forward(self, x):
            Wrong.calls += 1
            return x * (-1) ** Wrong.calls

    with pytest.raises(AssertionError, match="not measured"):
        race.race("wrong", Wrong().eval(), (8, 8), peers=("channels_last",), seconds=0)


def optimize_page():
    spec = importlib.util.spec_from_file_location("benchmarks_optimize", ROOT / "benchmarks" / "optimize.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_page_of_whole_networks_is_current():
    page = optimize_page()
    assert page.PAGE.read_text(encoding="utf-8") == page.current(), "run: python benchmarks/optimize.py --docs"
    assert "not run" in page.text({}, {})


def test_references_are_used_within_and_kernels_again_after(monkeypatch):
    monkeypatch.setitem(_backend.table, "ds_conv", {"cpu": "c++"})
    monkeypatch.setattr(_backend, "requested", "auto")
    with bench.references():
        assert not any(_backend.table.values())
        assert _backend.requested == "reference"  # what private operations go by
    assert _backend.table["ds_conv"] == {"cpu": "c++"}
    assert _backend.requested == "auto"


def test_activation_bytes():
    """Two maps of 4 x 8 x 8 floats are alive at a time: what a layer reads and what it makes."""
    layers = nn.Sequential(*(layer for _ in range(3) for layer in (nn.Conv2d(4, 4, 1), nn.ReLU())))
    one = 4 * 8 * 8 * 4
    assert bench.activation_bytes(layers, torch.randn(1, 4, 8, 8)) == 2 * one
    assert bench.activation_bytes(nn.ReLU(inplace=True), torch.randn(1, 4, 8, 8)) == 0
    assert bench.macs(layers, torch.randn(1, 4, 8, 8)) == 3 * 4 * 4 * 64


def test_quantiles():
    times = bench.summary([4.0, 1.0, 2.0, 3.0, 100.0])
    assert (times.median, times.runs) == (3.0, 5)
    assert times.p95 == pytest.approx(80.8)


def test_fused_units_need_less_memory():
    block = DSConv(16, 16).eval()
    images = torch.randn(1, 16, 64, 64).contiguous(memory_format=torch.channels_last)
    with bench.references():
        plain = bench.activation_bytes(block, images)
    assert bench.activation_bytes(block, images) <= plain
