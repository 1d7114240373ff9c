"""The main job, shortened: it runs, what it writes holds together. How good the networks get takes the whole run."""

import json
import os
import re

import pytest
import torch

from segfast import ops
from segfast.engine import checkpoint, report
from segfast.engine.demo import Settings, run
from segfast.engine.kernels import OPS, check, most

SHORT = {"steps": 3, "labels": 2, "images": 8, "validation": 4, "batch": 2, "timing_seconds": 0.0}


def whole(metrics, folder):
    text = (folder / "report.html").read_text()
    assert text.rstrip().endswith("</html>")
    assert not re.search(r"(src|href)=.?(http|/)", text)
    assert text.count("data:image/png;base64,") == 4 * 5
    assert text.count("<svg") == 3
    stored = json.loads((folder / "metrics.json").read_text())
    assert stored["scores"] == metrics["scores"]
    assert set(stored["scores"]) == {"majority class", "colour alone", "teacher", "student, distilled", "student, alone"}
    assert {c["op"] for c in stored["checks"]} == set(OPS)
    assert all(c["passed"] for c in stored["checks"])
    assert sorted(p.name for p in folder.iterdir()) == ["metrics.json", "report.html"]


def test_synthetic(tmp_path):
    seen = []
    metrics = run(Settings(**SHORT), lambda stage, done, total, text: seen.append((stage, done, total)))
    for stage, steps in (("teacher", 3), ("student, distilled", 2), ("student, alone", 2)):
        assert [done for name, done, _ in seen if name == stage] == list(range(1, steps + 1))
    report.write(metrics, tmp_path / "out")
    whole(metrics, tmp_path / "out")
    again = run(Settings(**SHORT))
    assert again["scores"] == metrics["scores"]
    assert again["curves"] == metrics["curves"]


def test_camvid(tmp_path, data_root):
    metrics = run(Settings(data="camvid", root=str(data_root / "camvid"), **SHORT))
    assert len(metrics["classes"]) == 11
    report.write(metrics, tmp_path)
    whole(metrics, tmp_path)


def test_the_report_says_when_distillation_did_not_help():
    scores = {"student, distilled": {"miou": 0.3}, "student, alone": {"miou": 0.35}}
    few = {"teacher": 9, "students": 2}
    assert "not above (5.0 points" in report.verdict(
        {"scores": scores, "labelled_images": few, "gain": -0.05, "distillation_helped": False}
    )


def test_nothing_half_written(tmp_path, monkeypatch):
    path = checkpoint.write(tmp_path / "metrics.json", "old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        checkpoint.write(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.json"]


def test_check_sees_a_wrong_kernel(monkeypatch):
    assert check("channel_shuffle").passed
    monkeypatch.setattr(ops, "channel_shuffle", wrong(ops.channel_shuffle))
    assert not check("channel_shuffle").passed


def wrong(function):
    namespace = {**function.__globals__, "right": function}
    exec("def channel_shuffle(x, groups):\n    return right(x, groups) * 1.001", namespace)
    return namespace["channel_shuffle"]


def test_most():
    exact = [torch.ones(3, dtype=torch.float64)]
    assert most([exact[0].float()], exact, [0.0]) == 0
    assert most([exact[0].float() + 1e-3], exact, [0.0]) > 1
    assert most([exact[0].float() + 1e-3], exact, [1e-3]) < 1
    assert most([torch.full((3,), torch.nan)], exact, [0.0]) == float("inf")


@pytest.mark.parametrize("wrong", [{"data": "kitti"}, {"data": "camvid"}, {"steps": 0}, {"labels": 1}, {"batch": 1}])
def test_settings(wrong):
    with pytest.raises(ValueError, match="demo: want"):
        Settings(**wrong)
