"""The commands of training: train, distil, evaluate, predict, check; their options, output and exit codes."""

import dataclasses
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from segfast.cli import app
from segfast.cli.options import Reporter, duration
from segfast.data import CamVid
from segfast.engine import Config, confusion_matrix, load_network, mean_iou
from segfast.engine import config as configs
from segfast.engine.teacher import TeacherLogits

TINY = [
    *("--model-options", '{"width": 0.25}', "--images", "6", "--val-images", "2", "--size", "32", "64", "--crop", "32", "64"),
    *("--batch", "2", "--steps", "4", "--log-every", "1", "--save-every", "2", "--examples", "1", "--device", "cpu"),
]


@pytest.fixture(autouse=True)
def one_thread(restore):
    torch.set_num_threads(1)


def call(*arguments):
    environment = {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    return CliRunner().invoke(app, [str(a) for a in arguments], env=environment)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("cli") / "run"
    result = call("train", "--out", folder, *TINY)
    assert result.exit_code == 0, result.output
    assert "train 4/4" in result.output
    assert "mIoU" in result.output
    return folder


def test_every_field_is_an_option():
    for command in ("train", "distill"):
        output = call(command, "--help").output
        for f in dataclasses.fields(Config):
            assert f"--{f.name.replace('_', '-')}" in output, f.name
        assert "Exit codes" in output
    assert all(f.metadata["help"] for f in dataclasses.fields(Config))


def test_config_file_and_options(tmp_path, run):
    (tmp_path / "c.yaml").write_text(configs.text(Config(steps=77, batch=3)))
    assert call("train", "--config", tmp_path / "c.yaml", "--out", run).exit_code == 2
    again = call("train", "--out", run)  # its own config
    assert again.exit_code == 0, again.output
    assert "mIoU" in again.output
    assert call("train", "--out", run, "--steps", "5").exit_code == 2
    for arguments in (
        ["--data", "kitti"],
        ["--data", "camvid"],
        ["--model-options", "{"],
        ["--steps", "0"],
        ["--model", "nothing"],
        ["--device", "foo"],
        ["--device", "cuda:99"],
        ["--model-options", '{"nonsense": 1}'],
        ["--method", "kd", "--teacher", run, "--method-options", '{"kd": 5}'],
        ["--method", "pixel-wise", "--teacher", run, "--method-options", '{"pixel_wise": {"temperature": "x"}}'],
    ):
        result = call("train", "--out", tmp_path / "new", *TINY, *arguments)
        assert result.exit_code == 2, (arguments, result.output)
    assert call("train", "--out", tmp_path / "c.yaml", *TINY).exit_code == 2
    assert call("train", "--config", tmp_path / "absent.yaml").exit_code == 2
    assert "want --method and --teacher" in call("distill", "--out", tmp_path / "d", *TINY).output


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped(tmp_path, monkeypatch, number, code):
    real = Reporter.progress

    def progress(self, stage, done, total, values):
        real(self, stage, done, total, values)
        if stage == "train" and done == 3:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Reporter, "progress", progress)
    result = call("train", "--out", tmp_path / "run", *TINY)
    assert result.exit_code == code
    assert f"Go on with: segfast train --out {tmp_path}/run" in result.output
    monkeypatch.undo()
    result = call("train", "--out", tmp_path / "run")
    assert result.exit_code == 0
    assert "going on after step 3 of 4" in result.output


def test_loss_not_finite(tmp_path):
    result = call("train", "--out", tmp_path / "run", *TINY, "--optimizer", "sgd", "--learning-rate", "1e30")
    assert result.exit_code == 1
    assert "the batch: scene" in result.output


def test_distil_with_a_cache(tmp_path, run, monkeypatch):
    options = ["--method", "pixel-wise", "--teacher", run, "--cache", tmp_path / "cache", "--out", tmp_path / "student"]
    result = call("distill", *options, *TINY)
    assert result.exit_code == 0, result.output
    assert "cache: 6 frames, " in result.output
    assert "ms of the teacher" in result.output
    assert "pixel-wise" in (tmp_path / "student" / "metrics.jsonl").read_text()
    files = sorted((tmp_path / "cache").glob("*.npy"))
    assert len(files) == 6
    assert np.load(files[0]).dtype == np.float16
    # A second run takes every frame from the cache: the teacher must not run at all.
    teacher, _ = load_network(run)
    monkeypatch.setattr(type(teacher), "name", "fast_scnn")
    calls = []
    outputs = type(teacher).outputs
    monkeypatch.setattr(type(teacher), "outputs", lambda self, x: calls.append(self.training) or outputs(self, x))
    options[-1] = tmp_path / "second"
    assert call("distill", *options, *TINY, "--seed", "0").exit_code == 0
    assert calls.count(True) == 4
    assert calls.count(False) == 2 + 1  # the student on the validation images and the panel
    monkeypatch.undo()
    options[-1] = tmp_path / "third"
    pair = call("distill", *options, *TINY, "--method", "pair-wise")
    assert "cache: not used" in pair.output
    files[0].write_bytes(files[0].read_bytes()[:50])
    options[-1] = tmp_path / "fourth"
    damaged = call("distill", *options, *TINY)
    assert damaged.exit_code == 2
    assert f"cannot read the teacher's logits {files[0]}" in damaged.output
    other = call("train", "--out", tmp_path / "other", *TINY, "--seed", "1")
    assert other.exit_code == 0
    options[3], options[-1] = tmp_path / "other", tmp_path / "fifth"
    assert "teacher.json is of another run (it differs in: teacher)" in call("distill", *options, *TINY).output


def test_cached_logits_equal_the_teachers_own(tmp_path, run):
    from segfast.data import Geometry, SyntheticStreets

    teacher, _ = load_network(run)
    streets = SyntheticStreets(2, (32, 64))
    cache = TeacherLogits(tmp_path, teacher, streets, lambda x: x, torch.device("cpu"))
    with torch.no_grad():
        own = teacher.forward_features(streets[1][0][None]).logits[0]
    seen = cache(1, Geometry(0, 0, 32, 64, (32, 64), False), (32, 64))
    torch.testing.assert_close(seen, own.half().float(), rtol=1e-5, atol=1e-5)
    assert cache.bytes == sum(path.stat().st_size for path in tmp_path.glob("*.npy"))
    assert cache.seconds > 0
    assert TeacherLogits(tmp_path, teacher, streets, lambda x: x, torch.device("cpu")).seconds == 0


def test_eval(tmp_path, run):
    result = call("eval", run, "--out", tmp_path / "s.json", "--save-predictions", tmp_path / "maps")
    assert result.exit_code == 0, result.output
    scores = json.loads((tmp_path / "s.json").read_text())
    stored = json.loads((run / "result.json").read_text())
    assert scores["miou"] == pytest.approx(stored["best_miou"])
    assert "boundary f score" in result.output
    assert sorted(path.name for path in (tmp_path / "maps").iterdir()) == ["000000.png", "000001.png"]
    assert np.array(Image.open(tmp_path / "maps" / "000000.png")).shape == (32, 64)
    options = ["--scale", "1", "--scale", "0.75", "--flip", "--window", "32", "40"]
    assert call("eval", run / "last.safetensors", "--config", run / "config.yaml", *options).exit_code == 0
    assert call("eval", tmp_path).exit_code == 2
    assert call("eval", run, "--data", "camvid", "--root", tmp_path).exit_code == 2
    (tmp_path / "broken.safetensors").write_bytes((run / "last.safetensors").read_bytes()[:-40])
    broken = call("eval", tmp_path / "broken.safetensors", "--config", run / "config.yaml")
    assert broken.exit_code == 2
    assert "broken.safetensors is no whole safetensors file" in broken.output


def test_eval_plots(tmp_path, run):
    pytest.importorskip("matplotlib")
    assert call("eval", run, "--plot", tmp_path).exit_code == 0
    for name in ("confusion.png", "class_iou.png"):
        assert Image.open(tmp_path / name).size[0] > 300


@pytest.fixture
def frames(tmp_path):
    folder = tmp_path / "frames"
    folder.mkdir()
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 255, (33, 65, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"f{i}.jpg")
    return folder


def test_predict(tmp_path, run, frames):
    result = call("predict", run, frames, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "legend.png", *(f"f{i}{end}.png" for i in range(2) for end in ("", "_colour", "_overlay"))
    }  # fmt: skip
    labels = np.array(Image.open(tmp_path / "out" / "f0.png"))
    model, network = load_network(run)
    assert (labels == model.predict(Image.open(frames / "f0.jpg"))).all()
    assert "images a second" in result.output
    plain = call("predict", run, frames, "--out", tmp_path / "plain", "--no-optimize")
    assert plain.exit_code == 0, plain.output
    assert (np.array(Image.open(tmp_path / "plain" / "f0.png")) == labels).mean() > 0.99
    mirrored = call("predict", run, frames, "--out", tmp_path / "mirrored", "--flip")
    assert mirrored.exit_code == 0, mirrored.output
    coloured = np.array(Image.open(tmp_path / "out" / "f0_colour.png"))
    assert tuple(coloured[3, 4]) == tuple(network.palette[labels[3, 4]])
    one = call("predict", run, frames / "f1.jpg", "--out", tmp_path / "one", "--opacity", "0")
    assert one.exit_code == 0
    overlay = np.array(Image.open(tmp_path / "one" / "f1_overlay.png"))
    assert (overlay == np.array(Image.open(frames / "f1.jpg"))).all()
    (frames / "f1.jpg").write_bytes(b"no picture")
    bad = call("predict", run, frames, "--out", tmp_path / "bad")
    assert bad.exit_code == 2
    assert "f1.jpg" in bad.output
    assert call("predict", run, tmp_path / "absent.jpg").exit_code == 2


def test_predict_spares_what_it_reads(tmp_path, run, frames):
    folder = tmp_path / "in"
    folder.mkdir()
    Image.open(frames / "f0.jpg").save(folder / "a.png")
    before = (folder / "a.png").read_bytes()
    result = call("predict", run, folder, "--out", folder)
    assert result.exit_code == 2
    assert "want another folder" in result.output
    assert (folder / "a.png").read_bytes() == before
    Image.open(frames / "f0.jpg").save(folder / "a.jpg")
    assert call("predict", run, folder, "--out", tmp_path / "out").exit_code == 0
    assert {"a.png.png", "a.jpg.png", "a.jpg_overlay.png"} <= {path.name for path in (tmp_path / "out").iterdir()}


def test_predict_video(tmp_path, run):
    from segfast.engine import predict as job

    try:
        writer = job.VideoWriter(tmp_path / "clip.mp4", 10.0, (32, 64))
    except ImportError:
        result = call("predict", run, next(iter(fake_video(tmp_path))))
        assert result.exit_code == 2
        assert "want PyAV or OpenCV" in result.output
        return
    for i in range(4):
        writer.write(np.full((32, 64, 3), 60 * i, np.uint8))
    writer.close()
    assert call("predict", run, tmp_path / "clip.mp4", "--out", tmp_path / "out").exit_code == 0
    read, rate, _ = job.open_video(tmp_path / "out" / "clip_overlay.mp4")
    shown = list(read)
    assert len(shown) == 4
    assert shown[0].shape == (32, 64, 3)
    assert rate == pytest.approx(10)
    (tmp_path / "clip.mp4").write_bytes(b"no video")
    result = call("predict", run, tmp_path / "clip.mp4", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "clip.mp4" in result.output


class Camera:
    """OpenCV's VideoCapture of a camera that the user stops after three frames."""

    CAP_PROP_FPS, CAP_PROP_FRAME_COUNT = 5, 7

    def __init__(self, number):
        assert number == 1
        self.seen = 0

    def isOpened(self):
        return True

    def read(self):
        self.seen += 1
        if self.seen > 3:
            raise KeyboardInterrupt
        return True, np.full((32, 64, 3), 60 * self.seen, np.uint8)

    def get(self, what):
        return {5: 8.0, 7: -1.0}[what]

    def release(self):
        pass


def test_predict_camera(tmp_path, run, monkeypatch):
    pytest.importorskip("av")
    from segfast.engine import predict as job

    monkeypatch.setitem(sys.modules, "cv2", SimpleNamespace(VideoCapture=Camera, CAP_PROP_FPS=5, CAP_PROP_FRAME_COUNT=7))
    for more, count in (((), 3), (("--frames", 2), 2)):
        result = call("predict", run, "camera:1", "--out", tmp_path, "--side-by-side", *more)
        assert result.exit_code == 0, result.output
        shown = list(job.open_video(tmp_path / "camera1_overlay.mp4")[0])
        assert len(shown) == count
        assert shown[0].shape == (32, 128, 3)
    monkeypatch.setitem(sys.modules, "cv2", None)
    result = call("predict", run, "camera:1", "--out", tmp_path)
    assert result.exit_code == 2
    assert "want OpenCV for camera:1" in result.output


def fake_video(folder: Path):
    (folder / "clip.mp4").write_bytes(b"no video")
    yield folder / "clip.mp4"


def camvid(folder: Path, source: Path, count: int) -> Path:
    """A few of CamVid's frames, at a quarter of their size."""
    for split in ("train", "val"):
        data = CamVid(source, split)
        for image, label in list(zip(data.images, data.labels))[:: len(data) // count][:count]:
            for path, kind in ((image, Image.Resampling.BILINEAR), (label, Image.Resampling.NEAREST)):
                target = folder / path.parent.name / path.name
                target.parent.mkdir(parents=True, exist_ok=True)
                with Image.open(path) as picture:
                    picture.resize((120, 90), kind).save(target)
    return folder


def test_a_cache_of_other_images_of_the_same_names(tmp_path, run):
    teacher, _ = load_network(run)
    for shade in (0, 200):
        for split in ("train", "trainannot"):
            (tmp_path / str(shade) / split).mkdir(parents=True)
        Image.new("RGB", (64, 64), (shade, 0, 0)).save(tmp_path / str(shade) / "train" / "a.png")
        Image.new("L", (64, 64)).save(tmp_path / str(shade) / "trainannot" / "a.png")
    cache = lambda shade: TeacherLogits(  # noqa: E731
        tmp_path / "cache", teacher, CamVid(tmp_path / str(shade), "train"), teacher.preprocessing, torch.device("cpu")
    )
    cache(0)
    cache(0)
    with pytest.raises(ValueError, match="it differs in: frames"):
        cache(200)
    (tmp_path / "cache" / "teacher.json").write_text('{"teacher": ')
    with pytest.raises(ValueError, match=r"cannot read .*teacher\.json"):
        cache(0)


def test_camvid_from_check_to_score(tmp_path, data_root):
    root = camvid(tmp_path / "camvid", data_root / "camvid", 4)
    check = call("data", "check", "--data", "camvid", "--root", root)
    assert check.exit_code == 0, check.output
    assert "sizes: 90 x 120 (4)" in check.output
    arguments = ["--data", "camvid", "--root", root, "--model-options", '{"width": 0.25}', "--crop", "64", "64", "--batch", "2"]
    result = call("train", *arguments, "--steps", "3", "--out", tmp_path / "run", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert call("eval", tmp_path / "run", "--save-predictions", tmp_path / "maps").exit_code == 0
    data, matrix = CamVid(root, "val"), 0
    for i, path in enumerate(data.images):
        prediction = torch.from_numpy(np.array(Image.open(tmp_path / "maps" / f"{path.stem}.png"))).long()
        matrix = matrix + confusion_matrix(prediction, data[i][1], 11)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["miou"] == pytest.approx(mean_iou(matrix))
    # Errors in the data come with the file's name, before training or when the file is read.
    broken = tmp_path / "camvid" / "train" / data_names(root)[0]
    content = broken.read_bytes()
    broken.write_bytes(content[: len(content) // 2])
    result = call("train", *arguments, "--steps", "3", "--out", tmp_path / "broken")
    assert result.exit_code == 2
    assert broken.name in result.output
    assert call("data", "check", "--data", "camvid", "--root", root).exit_code == 1
    broken.write_bytes(content)
    mask = root / "trainannot" / f"{broken.stem}.png"
    shutil.copy(mask, tmp_path / "kept.png")
    Image.new("L", (120, 90), 77).save(mask)
    result = call("train", *arguments, "--steps", "3", "--out", tmp_path / "wrong")
    assert result.exit_code == 2
    assert "got 77 in" in result.output
    mask.unlink()
    result = call("train", *arguments, "--steps", "3", "--out", tmp_path / "missing")
    assert result.exit_code == 2
    assert broken.name in result.output


def data_names(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "train").iterdir())


def test_data_check_arguments(tmp_path):
    assert call("data", "check").exit_code == 2
    assert call("data", "check", "--data", "camvid", "--root", tmp_path).exit_code == 2
    assert "Exit codes" in call("data", "check", "--help").output


def test_plain_lines_where_output_is_piped(capsys):
    with Reporter() as reporter:
        for done in range(1, 6):
            reporter.progress("train", done, 5, {"loss": 1.0})
        reporter.say("a line of more than eighty characters, " * 3)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "train 1/5  loss 1.000"
    assert lines[-2].startswith("train 5/5")
    assert len(lines) == 3
    assert (duration(59.6), duration(3600 + 62)) == ("1:00", "1:01:02")
