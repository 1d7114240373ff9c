"""The speed-regression gate, on made-up runs."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parents[1] / "benchmarks" / "compare.py"
if not PATH.exists():
    pytest.skip("the benchmarks are not in this tree", allow_module_level=True)
spec = importlib.util.spec_from_file_location("compare", PATH)
compare = importlib.util.module_from_spec(spec)
spec.loader.exec_module(compare)

MACHINE = {"processor": "Made Up 9000", "kernel set": "avx512", "threads": "2", "torch": "2.14.1"}


def run_file(path: Path, ratios: dict[str, float], label: str = "eager", **machine: str) -> Path:
    info = {"machine": {**MACHINE, **machine}, "milliseconds": {"segfast": 1.0}}
    benchmarks = [{"name": name, "extra_info": {**info, "ratios": {label: ratio}}} for name, ratio in ratios.items()]
    path.write_text(json.dumps({"benchmarks": [*benchmarks, {"name": "not a figure", "extra_info": {}}]}))
    return path


@pytest.fixture
def gate(tmp_path):
    def call(ratios: dict[str, float], *options: str, **machine: str) -> int:
        run = run_file(tmp_path / "run.json", ratios, **machine)
        return compare.main([str(run), "--baseline", str(tmp_path / "baseline.json"), *options])

    call.baseline = lambda: json.loads((tmp_path / "baseline.json").read_text())
    return call


def test_an_unknown_machine_is_recorded_and_said(gate, capsys):
    assert gate({"a": 2.0, "b": 0.5}) == 0
    assert "recorded 2 figures" in capsys.readouterr().out
    (figures,) = gate.baseline().values()
    assert {name: f["ratios"]["eager"] for name, f in figures.items()} == {"a": 2.0, "b": 0.5}


@pytest.mark.parametrize("ratio, code", [(3.0, 0), (2.0, 0), (1.801, 0), (1.8, 0), (1.79, 1), (0.1, 1), (float("nan"), 1)])
def test_fails_below_nine_tenths_of_the_recorded_ratio(gate, capsys, ratio, code):
    gate({"a": 2.0, "b": 1.0})
    before = gate.baseline()
    capsys.readouterr()
    assert gate({"a": ratio, "b": 1.0}) == code
    assert ("FELL" in capsys.readouterr().out) == bool(code)
    assert gate.baseline() == before  # a run that is judged changes nothing


@pytest.mark.parametrize("name", MACHINE)
def test_every_part_of_the_key_makes_another_machine(gate, name):
    gate({"a": 2.0})
    assert gate({"a": 1.0}, **{name: "other"}) == 0
    assert len(gate.baseline()) == 2
    assert gate({"a": 1.0}) == 1


def test_a_new_figure_is_added_beside_the_recorded(gate):
    gate({"a": 2.0})
    assert gate({"a": 2.0, "b": 1.5}) == 0
    assert gate({"b": 1.0}) == 1


def test_record_replaces(gate):
    gate({"a": 2.0})
    assert gate({"a": 1.0}, "--record") == 0
    assert gate({"a": 0.95}) == 0


def test_a_file_without_figures_is_an_error(tmp_path, capsys):
    path = tmp_path / "run.json"
    path.write_text('{"benchmarks": []}')
    assert compare.main([str(path), "--baseline", str(tmp_path / "baseline.json")]) == 2
    assert not (tmp_path / "baseline.json").exists()


def test_write_readme_fills_the_table_and_leaves_the_rest(gate, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- figures: from the baseline -->\n\nold\n\n<!-- end of figures -->\nafter\n")
    shapes = {f"test_ds_conv_training[{i}]": ratio for i, ratio in enumerate((1.0, 4.0))}
    for _ in range(2):  # the markers stay: it can be filled again
        assert gate({**shapes, "test_pixelwise_kl[2x150x128x128]": 0.5}, "--write-readme", "--readme", str(readme)) == 0
    gate({"test_pixelwise_kl[2x150x128x128]": 0.5}, "--write-readme", "--readme", str(readme))
    text = readme.read_text()
    assert text.startswith("before\n<!-- figures: from the baseline -->\n")
    assert text.endswith("<!-- end of figures -->\nafter\n")
    assert "old" not in text
    assert "Made Up 9000" in text
    assert "| 0.50; not measured yet |" in text  # a loss is published


def test_geometric_mean_and_lowest():
    figures = {f"test_ds_conv_training[{i}]": {"ratios": {"eager, channels_last": r}} for i, r in enumerate((1.0, 4.0))}
    assert "| eager, channels_last | 2.00; 1.00 |" in compare.figures_table("machine", figures)


def test_a_readme_without_markers_is_refused(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("nothing\n")
    with pytest.raises(ValueError, match="want '<!-- figures"):
        compare.write_between(readme, "text")
    assert readme.read_text() == "nothing\n"


def test_write_docs_fills_a_row_a_machine(gate, tmp_path, capsys):
    page = tmp_path / "page.md"
    marked = "<!-- figures: a -->\n\nold\n\n<!-- end of figures -->\n"
    page.write_text(f"before\n{marked}between\n{marked}after\n")
    options = ("--write-docs", "--docs", str(page))
    assert compare.main(["--baseline", str(tmp_path / "none.json"), *options]) == 2
    for processor, scale in (("One", 1.0), ("Two", 2.0)):
        ratios = {"test_ds_conv_inference[a-float32]": scale, "test_ds_conv_inference[b-float32]": 4 * scale}
        run = run_file(tmp_path / "run.json", ratios, "best peer", processor=processor)
        assert compare.main([str(run), "--baseline", str(tmp_path / "baseline.json"), *options]) == 0
    text = page.read_text()
    assert "| processor, kernel set | a | b | geometric mean | lowest |\n" in text
    assert "| One, avx512 | 1.00 | 4.00 | 2.00 | 1.00 |\n| Two, avx512 | 2.00 | 8.00 | 4.00 | 2.00 |\n" in text
    assert "old" not in text
    assert text.startswith("before\n")
    assert "\nbetween\n" in text
    assert text.endswith("\nafter\n")


def test_the_page_of_ds_conv_says_what_is_recorded():
    page = PATH.parents[1] / "docs" / "results" / "ds_conv.md"
    if not page.exists():
        pytest.skip("the docs are not in this tree")
    baseline = json.loads((PATH.parent / "baseline.json").read_text())
    for table in compare.shapes_tables(baseline):
        assert table in page.read_text()


def test_the_readme_has_its_markers():
    text = (PATH.parents[1] / "README.md").read_text()
    assert compare.START.search(text)
    assert compare.END in text
