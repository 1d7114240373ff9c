import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import segfast
from segfast import _backend
from segfast.cli import app
from segfast.engine import demo as job

SHORT = ["--steps", "2", "--labels", "2", "--images", "8", "--validation", "4", "--timing-seconds", "0"]


def call(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "160", "NO_COLOR": "1", "TERM": "dumb"})


@pytest.mark.parametrize("arguments", [[], ["info"]])
def test_info(arguments):
    result = call(*arguments)
    assert result.exit_code == 0
    assert segfast.__version__ in result.output
    for op in _backend.table:
        assert op in result.output


def test_python_m():
    result = subprocess.run([sys.executable, "-m", "segfast"], capture_output=True, text=True, check=True)
    assert "channel_shuffle" in result.stdout


def test_info_without_kernels(monkeypatch):
    monkeypatch.setattr(_backend, "_C", None)
    output = call("info").output
    assert "runs on its PyTorch reference" in output
    assert "install a C++20 compiler" in output


def test_help():
    assert "segfast demo" in call("--help").output
    output = call("demo", "--help").output
    assert "--data camvid --root" in output
    assert "Exit codes" in output


def test_demo(tmp_path):
    result = call("demo", "--out", tmp_path / "out", *SHORT)
    assert result.exit_code == 0, result.output
    assert "mIoU" in result.output
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["settings"]["steps"] == 2


def test_bad_arguments(tmp_path):
    (tmp_path / "file").write_text("")
    for arguments in (
        ["--data", "camvid"],
        ["--data", "camvid", "--root", tmp_path],
        ["--data", "kitti"],
        ["--steps", "0"],
        ["--out", tmp_path / "file"],
    ):
        assert call("demo", *SHORT, *arguments).exit_code == 2, arguments


@pytest.mark.parametrize("error, code", [(KeyboardInterrupt(), 130), (FloatingPointError("the loss is nan"), 1)])
def test_interrupted(tmp_path, monkeypatch, error, code):
    def stop(*_):
        raise error

    monkeypatch.setattr(job, "run", stop)
    assert call("demo", "--out", tmp_path / "out", *SHORT).exit_code == code
    assert not (tmp_path / "out").exists()
