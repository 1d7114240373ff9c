"""The run folder: what it holds, and that a run which was stopped goes on as if it had not been."""

import functools
import json
import math
import os
import pickle
import random
import re
import resource
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import EFFORT, count, extra
from torch import nn

from segfast.data import Stream, SyntheticStreets, TorchvisionTransform
from segfast.engine import Average, Config, LabelLoss, Stopped, checkpoint, fit, load_network
from segfast.engine import config as configs
from segfast.engine.run import make_dataset
from segfast.models import Output

TINY = {
    "model_options": {"width": 0.25}, "images": 6, "val_images": 2, "size": (32, 64), "crop": (32, 64), "batch": 2, "steps": 6,
    "log_every": 1, "save_every": 2, "examples": 1, "device": "cpu",
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread(restore):
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("teacher")
    fit(Config(**{**TINY, "steps": 2, "examples": 0, "seed": 5}), folder)
    return folder


def lines(folder: Path) -> list[dict]:
    """metrics.jsonl without the times."""
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in entry.items() if "seconds" not in name} for entry in entries]


def same_runs(one: Path, other: Path) -> None:
    assert lines(one) == lines(other)
    for name in ("last.safetensors", "best.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes()


class Killed(BaseException):
    pass


def kill_at(step: int):
    def progress(stage, done, of, values):
        if stage == "train" and done == step:
            raise Killed

    return progress


def test_run_folder(tmp_path):
    said, seen = [], []
    result = fit(Config(**{**TINY, "eval_every": 3}), tmp_path / "run", said.append, lambda *now: seen.append(now))
    folder = tmp_path / "run"
    names = {path.name for path in folder.iterdir()} - {"events"}
    assert names == {
        *("config.yaml", "environment.json", "metrics.jsonl", "examples", "result.json"),
        *("last.safetensors", "best.safetensors", "state.safetensors"),
    }
    assert sorted(path.name for path in (folder / "examples").iterdir()) == ["step_000003.png", "step_000006.png"]
    steps = [entry["step"] for entry in lines(folder) if "loss" in entry]
    assert steps == [1, 2, 3, 4, 5, 6]
    scores = [entry for entry in lines(folder) if "miou" in entry]
    assert [entry["step"] for entry in scores] == [3, 6]
    assert result["best_miou"] == max(entry["miou"] for entry in scores)
    assert result["miou"] == scores[-1]["miou"]
    assert len(said) == 2
    assert [now[1] for now in seen if now[0] == "train"] == steps
    assert configs.load(folder / "config.yaml") == Config(**{**TINY, "eval_every": 3})
    assert "torch" in json.loads((folder / "environment.json").read_text())
    model, network = load_network(folder)
    assert not model.training
    assert network.classes[0] == "road"
    assert fit(Config(**{**TINY, "eval_every": 3}), folder) == result
    with pytest.raises(ValueError, match=r"another config \(steps: 6 -> 7"):
        fit(Config(**{**TINY, "eval_every": 3, "steps": 7}), folder)


def test_tensorboard_events(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = Config(**{**TINY, "eval_every": 3})
    with pytest.raises(Killed):
        fit(config, tmp_path, progress=kill_at(5))  # the events of step 5 are purged: the run goes on from step 4
    time.sleep(1.1)  # files are read in the order of their names: the second, then a counter in which 10 comes before 9
    fit(config, tmp_path)
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    got = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert set(got) == {
        "loss", "labels", "learning_rate", "seconds", "miou", "pixel_accuracy", "evaluation_seconds"
    }  # fmt: skip
    assert [step for step, _ in got["loss"]] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in got["miou"]] == [3, 6]
    entries = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for tag, values in got.items():
        logged = [(entry["step"], entry[tag]) for entry in entries if tag in entry]
        assert [step for step, _ in values] == [step for step, _ in logged]
        assert [value for _, value in values] == pytest.approx([value for _, value in logged], rel=1e-6)


@pytest.mark.drawn(1 / 2)
@pytest.mark.parametrize("method", [None, "pixel-wise+overhaul"])
def test_compiled_runs_take_the_same_steps(tmp_path, teacher, monkeypatch, method):
    options = {**TINY, "model": "unet", "model_options": {"width": 2}, "steps": 3, "examples": 0, "ema": 0.9, "optimizer": "sgd"}
    options |= {"method": method, "teacher": str(teacher) if method else None}
    fit(Config(**options), tmp_path / "eager")
    graphs, backend = [], torch._dynamo.lookup_backend("inductor" if EFFORT == "full" else "aot_eager")

    def counted(graph, inputs):
        graphs.append(graph)
        return backend(graph, inputs)

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counted))
    said = []
    fit(Config(**options, compile=True), tmp_path / "compiled", said.append)
    assert graphs
    assert any(line.startswith("compile: ") for line in said)
    for eager, compiled in zip(lines(tmp_path / "eager"), lines(tmp_path / "compiled"), strict=True):
        eager.pop("class_iou", None), compiled.pop("class_iou", None)
        assert compiled == pytest.approx(eager, rel=1e-3)
    weights = [checkpoint.load(tmp_path / name / "last.safetensors")[0] for name in ("eager", "compiled")]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-3, atol=1e-4)


VARIANTS = {
    "adamw, average, several batches a step": {
        "ema": 0.9, "accumulate": 2, "clip": 1.0, "warmup": 2, "colour": 0.2, "eval_every": 4, "label_smoothing": 0.1
    },
    "sgd, bfloat16, hard pixels": {"optimizer": "sgd", "precision": "bf16", "ohem": 0.7, "class_weights": "balanced"},
    "distillation with a critic and an auto-encoder": {
        "method": "structured+adaptation", "method_options": {"adaptation": {"steps": 2}},
    },
    "distillation from the cache": {"method": "pixel-wise", "cache": True, "workers": 1},
}  # fmt: skip


@pytest.mark.drawn(1 / 2)
@pytest.mark.parametrize("name", VARIANTS)
def test_resume_is_exact(tmp_path, teacher, name):
    options = {**TINY, **VARIANTS[name]}
    if "method" in options:
        options["teacher"] = str(teacher)
    if options.pop("cache", False):
        options["cache"] = str(tmp_path / "cache")
    fit(Config(**options), tmp_path / "whole")
    for step in (1, 5):  # before the first save, and after it
        with pytest.raises(Killed):
            fit(Config(**options), tmp_path / "killed", progress=kill_at(step))
    torch.manual_seed(99)  # whatever the process did before must not matter
    fit(Config(**options), tmp_path / "killed")
    same_runs(tmp_path / "whole", tmp_path / "killed")


def test_torchvision_transforms_on_cached_logits(tmp_path, teacher):
    extra("torchvision")
    from torchvision.transforms import v2

    joint = [v2.ScaleJitter((32, 64), (0.8, 1.5)), v2.RandomCrop((32, 64), pad_if_needed=True), v2.RandomHorizontalFlip()]
    augment = TorchvisionTransform(v2.Compose(joint))
    config = Config(**TINY, method="pixel-wise", teacher=str(teacher), cache=str(tmp_path / "cache"))
    fit(config, tmp_path / "whole", augment=augment)
    with pytest.raises(Killed):
        fit(config, tmp_path / "killed", progress=kill_at(5), augment=augment)
    fit(config, tmp_path / "killed", augment=augment)
    same_runs(tmp_path / "whole", tmp_path / "killed")
    fit(config, tmp_path / "own")
    assert lines(tmp_path / "own")[0]["pixel-wise"] != lines(tmp_path / "whole")[0]["pixel-wise"]


DRIVER = textwrap.dedent(
    """
    import json, os, signal, sys, time
    from pathlib import Path
    import torch
    from segfast.engine import Config, checkpoint, fit

    torch.set_num_threads(1)
    options, folder, moments = json.loads(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    config = Config(**options)

    def start(path):
        child = os.fork()
        if child == 0:
            try:
                fit(config, path)
                os._exit(0)
            except BaseException as error:
                print(repr(error), file=sys.stderr, flush=True)
                os._exit(1)
        return child

    assert os.waitpid(start(folder / "whole"), 0)[1] == 0
    killed, metrics = 0, folder / "killed" / "metrics.jsonl"
    for step, delay in moments:
        child = start(folder / "killed")
        while not (metrics.is_file() and metrics.read_text().count("loss") >= step):
            if os.waitpid(child, os.WNOHANG)[0]:
                break
            time.sleep(0.001)
        else:
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
            killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        for path in (folder / "killed").glob("*.safetensors"):
            checkpoint.load(path)  # whole at every moment
    assert os.waitpid(start(folder / "killed"), 0)[1] == 0
    print(killed)
    """
)


def test_kill_9(tmp_path):
    kills, steps = count(3, 20), count(8, 40)
    draw = random.Random(0)
    moments = sorted((draw.randint(0, steps - 1), draw.uniform(0, 0.05)) for _ in range(kills))
    options = {**TINY, "steps": steps, "ema": 0.9, "eval_every": steps // 2, "save_every": 3}
    command = [sys.executable, "-c", DRIVER, json.dumps(options), str(tmp_path), json.dumps(moments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= kills // 2
    same_runs(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_stop(tmp_path, number):
    def progress(stage, done, of, values):
        if stage == "train" and done == 3:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(Stopped) as stop:
        fit(Config(**{**TINY, "save_every": 100}), tmp_path, progress=progress)
    assert (stop.value.signal, stop.value.step) == (number, 3)
    assert signal.getsignal(number) == before
    assert checkpoint.load_state(tmp_path / "state.safetensors")["step"] == 3


def test_signal_while_evaluating(tmp_path):
    def progress(stage, done, of, values):
        if stage == "evaluate" and done == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped):
        fit(Config(**TINY), tmp_path / "run", progress=progress)
    assert not (tmp_path / "run" / "result.json").exists()
    fit(Config(**TINY), tmp_path / "run")
    fit(Config(**TINY), tmp_path / "whole")
    same_runs(tmp_path / "run", tmp_path / "whole")


def test_a_loss_that_is_not_finite_names_the_files(tmp_path):
    with pytest.raises(FloatingPointError, match=r"the batch: scene \d of seed 0, 32 x 64, scene \d.*last saved state") as error:
        fit(Config(**{**TINY, "optimizer": "sgd", "learning_rate": 1e30, "save_every": 1}), tmp_path)
    assert "after step 1:" not in str(error.value)
    state = checkpoint.load_state(tmp_path / "state.safetensors")
    assert f"after step {state['step'] + 1}:" in str(error.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_cannot_be_read_loses_no_step(tmp_path, monkeypatch, workers):
    """The state after the last step is kept: with the file mended the run ends as if nothing had been."""
    broken = "scene 4 of seed 0, 32 x 64"
    whole = fit(Config(**TINY), tmp_path / "whole")
    original = SyntheticStreets.__getitem__

    def read(self, index):
        if self.describe(index) == broken:
            raise ValueError(f"cannot read {broken}")
        return original(self, index)

    monkeypatch.setattr(SyntheticStreets, "__getitem__", read)
    options = {**TINY, "save_every": 100, "workers": workers}
    with pytest.raises(
        ValueError, match=rf"^cannot read {broken}\. (The last saved state is in .*|No state was saved yet)$"
    ) as error:
        fit(Config(**options), tmp_path / "run")
    assert "\n" not in str(error.value)
    step = len(lines(tmp_path / "run"))
    assert step > 0
    assert checkpoint.load_state(tmp_path / "run" / "state.safetensors")["step"] == step
    monkeypatch.undo()
    assert fit(Config(**options), tmp_path / "run")["miou"] == whole["miou"]


KEEPER = textwrap.dedent(
    """
    import json, sys
    import torch
    from segfast.data import SyntheticStreets
    from segfast.engine import Config, fit

    def read(self, index):
        raise ValueError("cannot read it")

    torch.set_num_threads(1)
    SyntheticStreets.__getitem__ = read
    try:
        fit(Config(**json.loads(sys.argv[1])), sys.argv[2])
    except ValueError as error:
        kept = error
    print(kept)
    """
)


def test_a_program_that_keeps_the_error_of_a_run_ends(tmp_path):
    """The error keeps the processes that load data; at the program's exit they end."""
    command = [sys.executable, "-c", KEEPER, json.dumps({**TINY, "workers": 2}), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "cannot read it. No state was saved yet\n"


LOADER = textwrap.dedent(
    """
    import sys
    from torch.utils.data import DataLoader
    from segfast.engine.run import be_quiet

    if __name__ == "__main__":
        given = {"num_workers": 1, "worker_init_fn": be_quiet, "multiprocessing_context": "forkserver"}
        batches = iter(DataLoader(range(1000), **given))
        next(batches)
        print(batches._workers[0].pid, flush=True)
        sys.stdin.read()
    """
)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_loaders_of_a_killed_program_end(tmp_path):
    """Under forkserver PyTorch's own watch looks at the server."""
    (tmp_path / "program.py").write_text(LOADER)
    command = [sys.executable, str(tmp_path / "program.py")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as started:
        status = Path("/proc", started.stdout.readline().strip(), "status")
        assert status.is_file()
        started.kill()
    until = time.monotonic() + 60
    while status.is_file() and "State:\tZ" not in status.read_text():
        assert time.monotonic() < until, status.read_text()
        time.sleep(0.1)


def test_signal_to_all_processes_of_a_run(tmp_path):
    """SIGTERM to the group, as schedulers send it: the processes that load data stay until the state is saved."""
    options = [
        f"--{name.replace('_', '-')}={json.dumps(v) if isinstance(v, dict) else v}"
        for name, v in TINY.items()
        if name not in ("size", "crop", "steps")
    ]
    command = [
        sys.executable,
        "-m",
        "segfast",
        "train",
        *options,
        "--size",
        "32",
        "64",
        "--crop",
        "32",
        "64",
        "--steps",
        "5000",
        "--workers",
        "2",
        "--out",
        str(tmp_path / "run"),
    ]
    started = subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while started.poll() is None and not (metrics.is_file() and len(metrics.read_text().splitlines()) > 2):
        time.sleep(0.05)
    os.killpg(started.pid, signal.SIGTERM)
    output, _ = started.communicate(timeout=120)
    assert started.returncode == 128 + signal.SIGTERM, output
    assert "the state is saved" in output
    assert checkpoint.load_state(tmp_path / "run" / "state.safetensors")["step"] > 2


def test_a_start_that_failed_claims_nothing(tmp_path):
    with pytest.raises(ValueError, match="options that the network takes"):
        fit(Config(**{**TINY, "model_options": {"nonsense": 1}}), tmp_path / "run")
    fit(Config(**TINY), tmp_path / "run")
    torn = tmp_path / "run" / ".state.safetensors.x1y2"
    torn.write_bytes(b"half")
    fit(Config(**TINY), tmp_path / "run")
    assert not torn.exists()


def test_other_inputs_are_seen(tmp_path, teacher, monkeypatch):
    options = {**TINY, "method": "kd", "teacher": str(teacher)}
    with pytest.raises(Killed):
        fit(Config(**options), tmp_path, progress=kill_at(3))
    other = tmp_path / "other"
    fit(Config(**{**TINY, "steps": 1, "seed": 9}), other)
    (tmp_path / "config.yaml").write_text(configs.text(Config(**{**options, "teacher": str(other)})))
    with pytest.raises(ValueError, match=r"state\.safetensors is of a run on other inputs \(teacher .* then, .* now\)"):
        fit(Config(**{**options, "teacher": str(other)}), tmp_path)


def test_no_labels_to_score(tmp_path, monkeypatch):
    """JSON without NaN."""
    original = SyntheticStreets.__getitem__

    def unlabelled(self, index):
        image, labels = original(self, index)
        return image, torch.full_like(labels, 255) if len(self) == TINY["val_images"] else labels

    monkeypatch.setattr(SyntheticStreets, "__getitem__", unlabelled)
    assert fit(Config(**TINY), tmp_path)["miou"] is None
    assert "NaN" not in (tmp_path / "result.json").read_text() + (tmp_path / "metrics.jsonl").read_text()


@pytest.mark.parametrize("damage", ["truncated", "pickle", "weights", "zeros"])
def test_damaged_state_is_named_and_left_alone(tmp_path, damage):
    with pytest.raises(Killed):
        fit(Config(**TINY), tmp_path, progress=kill_at(3))
    path = tmp_path / "state.safetensors"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "pickle":
        torch.save({"x": torch.ones(2)}, path)
    elif damage == "zeros":
        path.write_bytes(bytes(100))
    else:
        path.write_bytes((tmp_path / "last.safetensors").read_bytes())
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"state\.safetensors"):
        fit(Config(**TINY), tmp_path)
    assert path.read_bytes() == before


class Evil:
    def __reduce__(self):
        return os.mkdir, ("/tmp/segfast-was-here",)


def test_pickles_are_refused_unopened(tmp_path):
    (tmp_path / "old").write_bytes(pickle.dumps(Evil()))
    torch.save({"w": torch.ones(1)}, tmp_path / "new")
    for name in ("old", "new"):
        with pytest.raises(ValueError, match="is a pickle"):
            checkpoint.load(tmp_path / name)
    assert not os.path.exists("/tmp/segfast-was-here")
    with pytest.raises(FileNotFoundError, match="absent"):
        checkpoint.load(tmp_path / "absent")


def test_weights_that_do_not_fit(tmp_path):
    checkpoint.save(tmp_path / "w", {"weight": torch.ones(2, 2), "more": torch.ones(1)}, {})
    layer = nn.Linear(2, 3)
    before = layer.weight.clone()
    with pytest.raises(ValueError, match=r"w does not fit.*1 missing \['bias'\], 1 surplus \['more'\], 1 of another shape"):
        checkpoint.load_weights(layer, tmp_path / "w")
    assert torch.equal(layer.weight, before)
    with pytest.raises(ValueError, match="does not say what network"):
        load_network(tmp_path / "w")
    with pytest.raises(FileNotFoundError, match=r"want best\.safetensors"):
        load_network(tmp_path)


def test_full_disk_keeps_the_old_file(tmp_path):
    path = checkpoint.write(tmp_path / "file", b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        # A file may not grow beyond this: the system's own error, in the middle of writing.
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        with pytest.raises(OSError, match=r"cannot write .*file: "):
            checkpoint.write(path, bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_full_disk_in_a_run_loses_no_state(tmp_path, monkeypatch):
    with pytest.raises(Killed):
        fit(Config(**TINY), tmp_path / "run", progress=kill_at(3))
    state = (tmp_path / "run" / "state.safetensors").read_bytes()
    real = os.replace

    def full(source, target):
        if Path(target).name == "state.safetensors":
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match=r"cannot write .*state.safetensors: No space left"):
        fit(Config(**TINY), tmp_path / "run")
    monkeypatch.undo()
    assert (tmp_path / "run" / "state.safetensors").read_bytes() == state
    fit(Config(**TINY), tmp_path / "run")
    fit(Config(**TINY), tmp_path / "whole")
    same_runs(tmp_path / "run", tmp_path / "whole")


def test_states_of_any_shape(tmp_path):
    state = {
        "step": 3, "nested": {0: {"x": torch.arange(3), "betas": (0.9, 0.999)}, 1: None}, "list": [True, "a", 1.5],
        "view": torch.ones(4, 4).t()[1:], "empty": torch.empty(0), "half": torch.ones(2, dtype=torch.bfloat16),
    }  # fmt: skip
    checkpoint.save_state(tmp_path / "s", state)
    loaded = checkpoint.load_state(tmp_path / "s")
    assert loaded["nested"][0]["betas"] == (0.9, 0.999)
    assert loaded["nested"][1] is None
    assert loaded["list"] == [True, "a", 1.5]
    for name in ("view", "empty", "half"):
        assert torch.equal(loaded[name], state[name])
        assert loaded[name].dtype == state[name].dtype
    with pytest.raises(TypeError, match=r"set at state\.x"):
        checkpoint.save_state(tmp_path / "s", {"x": {1}})


def test_config_files(tmp_path):
    config = Config(**TINY, method="structured", teacher="t", method_options={"pixel_wise": {"weight": 1e-5}}, learning_rate=1e-5)
    checkpoint.write(tmp_path / "c.yaml", configs.text(config))
    assert configs.load(tmp_path / "c.yaml") == config
    assert configs.differences(config, config) == []
    for content, message in {
        "stepz: 3": "did you mean steps",
        "steps: x": r"no YAML|steps to be int, got 'x'",
        "steps: true": "steps to be int, got True",
        "crop: [3]": "crop to be",
        "- 3": "c.yaml",
        "data: 5": "data to be str",
        "steps: 0": "steps to be at least 1",
        'data: "camvid"': "root with data 'camvid'",
        'method: "structured"': "teacher and method together",
        'precision: "int8"': "precision to be one of",
        "scale: [2, 1]": "low <= high",
    }.items():
        (tmp_path / "c.yaml").write_text(content + "\n")
        with pytest.raises(ValueError, match=message):
            configs.load(tmp_path / "c.yaml")
    with pytest.raises(FileNotFoundError, match="absent"):
        configs.load(tmp_path / "absent.yaml")


def test_config_in_yaml_of_any_style(tmp_path):
    pytest.importorskip("yaml")
    (tmp_path / "c.yaml").write_text(
        "# a run\nsteps: 5\nlearning_rate: 2e-3\ncrop:\n  - 32\n  - 64\nmodel_options: {width: 0.25}\n"
    )
    config = configs.load(tmp_path / "c.yaml")
    assert (config.steps, config.learning_rate, config.crop, config.model_options) == (5, 2e-3, (32, 64), {"width": 0.25})
    (tmp_path / "c.yaml").write_text("steps: [5\n")
    with pytest.raises(ValueError, match=r"c.yaml is no YAML"):
        configs.load(tmp_path / "c.yaml")


def test_average():
    model = nn.BatchNorm1d(2)
    average = Average(model, 0.5)
    with torch.no_grad():
        model.weight.fill_(3.0)
    model.num_batches_tracked.fill_(7)
    average.update()
    share = 1 - min(0.5, 2 / 11)
    assert average.model.weight.tolist() == pytest.approx([1 + 2 * share] * 2)
    assert average.model.num_batches_tracked == 7
    assert not average.model.training


class Net(nn.Module):
    align_corners = True


def test_label_loss_against_its_formula():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64).float()
    target = torch.randint(0, 3, (2, 7, 9), generator=generator)
    target[0, :3] = 255
    large = F.interpolate(logits, (7, 9), mode="bilinear", align_corners=True)
    plain = LabelLoss()(Net(), Output(logits, (logits, 2 * logits), {}), target)
    torch.testing.assert_close(plain["labels"], F.cross_entropy(large, target, ignore_index=255))
    auxiliary = sum(F.cross_entropy(k * large, target, ignore_index=255) for k in (1, 2))
    torch.testing.assert_close(plain["auxiliary"], 0.4 * auxiliary)
    assert set(LabelLoss(aux_weight=0)(Net(), Output(logits, (logits,), {}), target)) == {"labels"}
    weights = [1.0, 3.0, 0.5]
    given = LabelLoss(weights, label_smoothing=0.1)(Net(), Output(logits, (), {}), target)["labels"]
    expected = F.cross_entropy(large, target, torch.tensor(weights), ignore_index=255, label_smoothing=0.1)
    torch.testing.assert_close(given, expected)
    nothing = LabelLoss(weights)(Net(), Output(logits, (), {}), torch.full_like(target, 255))["labels"]
    assert nothing == 0


@pytest.mark.parametrize("bar, keep", [(0.5, 0.01), (0.01, 0.4), (0.9, 1.0)])
def test_hard_pixels_against_their_formula(bar, keep):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(1, 4, 6, 8, generator=generator).requires_grad_()
    target = torch.randint(0, 4, (1, 6, 8), generator=generator)
    target[0, 0] = 255
    losses = F.cross_entropy(logits, target, ignore_index=255, reduction="none")[target != 255]
    ranked = losses.sort(descending=True).values
    hard = max(int((ranked > -math.log(bar)).sum()), int(keep * len(ranked)))
    loss = LabelLoss(ohem=bar, ohem_keep=keep)(Net(), Output(logits, (), {}), target)["labels"]
    torch.testing.assert_close(loss, ranked[:hard].mean())
    loss.backward()
    assert int((logits.grad.abs().sum(1) > 0).sum()) == hard


def test_hard_pixels_of_no_loss_count(tmp_path):
    """Pixels of probability 1 are among the hardest where there are no others; so too of several processes."""
    logits, target = torch.zeros(1, 3, 4, 4), torch.zeros(1, 16, 16, dtype=torch.uint8)
    logits[:, 0] = 20
    target[0, 0, 0] = 1
    weights = [1.0, 2.0, 3.0]
    want = 20 * 2 / (2 + 255)

    def loss():
        return LabelLoss(weights, ohem=0.7, ohem_keep=1.0)(Net(), Output(logits, (), {}), target)["labels"]

    assert loss() == pytest.approx(want, rel=1e-5)
    assert LabelLoss(weights)(Net(), Output(logits, (), {}), target)["labels"] == pytest.approx(want, rel=1e-5)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert loss() == pytest.approx(want, rel=1e-5)
    finally:
        torch.distributed.destroy_process_group()


TWO = textwrap.dedent(
    """
    import json, os, sys
    import torch
    from torch import nn
    from segfast.data import SyntheticStreets
    from segfast.engine import Config, fit
    from segfast.models import Output, SegmentationModel, register_model

    torch.set_num_threads(1)

    class Small(SegmentationModel):
        name, min_size = "small", 1

        def __init__(self, classes):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1))
            self.head, self.side = nn.Conv2d(8, classes, 1), nn.Conv2d(8, classes, 1)

        def outputs(self, images):
            x = self.body(images)
            return Output(self.head(x), (self.side(x),) if self.training else (), {"pre_logits": x})

    @register_model(paper="", parameters=0, macs=0)
    def small(num_classes=19):
        return Small(num_classes)

    options, folder, port, worlds, broken = json.loads(sys.argv[1]), sys.argv[2], *sys.argv[3:4], *map(json.loads, sys.argv[4:])
    read = SyntheticStreets.__getitem__

    def item(self, index):
        image, labels = read(self, index)
        return image * float("nan") if index == broken else image, labels

    SyntheticStreets.__getitem__ = item
    children = []
    for world in worlds:
        for rank in range(world):
            child = os.fork()
            if child:
                children.append(child)
                continue
            try:
                ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                os.environ.update({name: str(value) for name, value in ranks.items()})
                fit(Config(**options), f"{folder}/{world}")
                os._exit(0)
            except BaseException as error:
                print(repr(error), file=sys.stderr, flush=True)
                os._exit(1)
    sys.exit(any(os.waitpid(child, 0)[1] for child in children))
    """
)


def free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


SMALL = {**TINY, "model": "small", "model_options": {}, "batch": 4}


def processes(folder: Path, options: dict, worlds: list[int], broken: int = -1) -> subprocess.CompletedProcess:
    """Runs of as many processes as `worlds` says; the scene `broken` is read as NaN."""
    command = [sys.executable, "-c", TWO, json.dumps(options), folder, free_port(), worlds, broken]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=240, check=False)


def test_two_processes_are_one_with_the_doubled_batch(tmp_path):
    options = {**SMALL, "steps": 4, "freeze_bn": True, "optimizer": "sgd"}
    options |= {"accumulate": 2, "learning_rate": 0.1, "clip": 1.0}
    done = processes(tmp_path, options, [1, 2])
    assert done.returncode == 0, done.stderr
    # What is logged is of all processes, not of the first one's share.
    for alone, together in zip(*([entry for entry in lines(tmp_path / name) if "loss" in entry] for name in ("1", "2"))):
        assert set(alone) == {"step", "learning_rate", "loss", "labels", "auxiliary"}
        assert together == pytest.approx(alone, rel=1e-5)
    one, two = (checkpoint.load(tmp_path / name / "last.safetensors")[0] for name in ("1", "2"))
    for which in ("miou", "pixel_accuracy"):
        assert lines(tmp_path / "1")[-1][which] == pytest.approx(lines(tmp_path / "2")[-1][which], abs=0.01)
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-6)


def test_a_loss_that_is_not_finite_in_one_process_stops_all(tmp_path):
    options = {**SMALL, "images": 12}
    stream = Stream(make_dataset(Config(**options), "train"), None, seed=0)
    second = [stream.index(position) for position in (6, 7)]  # the second process's share of the second step
    done = processes(tmp_path, options, [2], max(second))
    errors = done.stderr.split("FloatingPointError(")[1:]  # two processes may write into one line
    assert len(errors) == 2, done.stderr
    for error in errors:
        assert "the loss is nan after step 2:" in error
        assert [int(number) for number in re.findall(r"scene (\d+) of", error)] == second


@pytest.mark.drawn(1 / 2)
@pytest.mark.parametrize(
    "launcher",
    [
        ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
        ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "PORT"],
    ],
)
def test_launchers(tmp_path, launcher):
    checkpoint.write(tmp_path / "c.yaml", configs.text(Config(**{**TINY, "batch": 4, "steps": 2})))
    launcher = [str(free_port()) if word == "PORT" else word for word in launcher]
    command = [*launcher, "-m", "segfast", "train", "--config", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "run")]
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["processes"] == "2"
    assert [entry["step"] for entry in lines(tmp_path / "run")] == [1, 2, 2]
    assert "wrote" in done.stdout
