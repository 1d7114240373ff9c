"""A training run in a folder: everything around the loop. Stopped at any moment, it goes on where it last saved."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from segfast.data import DATASETS, Augment, Stream, TorchvisionTransform, read_label_map
from segfast.data.pairs import spread_palette
from segfast.distill import create_method
from segfast.engine import checkpoint
from segfast.engine import config as configs
from segfast.engine.config import Config
from segfast.engine.environment import environment
from segfast.engine.evaluate import class_iou, evaluate, mean_iou, pixel_accuracy
from segfast.engine.losses import LabelLoss, balanced_weights
from segfast.engine.panels import panel
from segfast.engine.teacher import TeacherLogits, fingerprint
from segfast.engine.train import Average, poly, train
from segfast.models import Output, _hub, create_model

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Stopped(Exception):
    """A signal stopped the run after it saved its state.

    signal: its number; step: the steps done.
    """

    def __init__(self, number: int, step: int):
        super().__init__(f"stopped by {signal.Signals(number).name} after step {step}")
        self.signal, self.step = number, step


@dataclasses.dataclass(frozen=True)
class Network:
    """What a weights file says of its network, enough to build it again."""

    model: str
    num_classes: int
    backbone: str | None = None
    options: dict = dataclasses.field(default_factory=dict)
    classes: tuple[str, ...] = ()
    palette: tuple[tuple[int, int, int], ...] = ()

    @classmethod
    def described(cls, about: Mapping, path: str | Path) -> Network:
        """From what a file says of itself.

        Raises:
            ValueError: naming the file: it says something that this release does not know.
        """
        try:
            return cls(**about["network"])
        except TypeError as error:
            raise ValueError(f"{path} describes a network as this release does not: {error}") from error

    def named(self) -> Network:
        """The same; classes without names are numbers."""
        if self.classes:
            return self
        names = tuple(map(str, range(self.num_classes)))
        return dataclasses.replace(self, classes=names, palette=spread_palette(self.num_classes))

    def build(self) -> nn.Module:
        """With random weights.

        Raises:
            ValueError: no such network, or options that it does not take.
        """
        try:
            return create_model(self.model, self.num_classes, self.backbone, **self.options)
        except TypeError as error:
            raise ValueError(f"{self.model}: want options that the network takes, got {self.options}: {error}") from error


def weights_file(path: str | Path) -> Path:
    """The weights that a folder or a file stands for: of a run best.safetensors, else last.safetensors; of save_pretrained its.

    Raises:
        FileNotFoundError: none of them is in the folder.
    """
    path = Path(path)
    if path.is_dir():
        wanted = ("best.safetensors", "last.safetensors", _hub.WEIGHTS)
        found = [path / name for name in wanted if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(f"want {', '.join(wanted[:-1])} or {wanted[-1]} in {path}, got none")
        return found[0]
    return path


def load_network(path: str | Path) -> tuple[nn.Module, Network]:
    """A trained network, in evaluation mode, from a run folder, a weights file that a run wrote, or a folder of save_pretrained.

    Raises:
        FileNotFoundError, ValueError: naming the file.
    """
    path = weights_file(path)
    config = path.with_name(_hub.CONFIG)
    if path.name == _hub.WEIGHTS and config.is_file():
        model = _hub.from_pretrained(path.parent)
        return model, Network.described(json_of(config), config)
    _, about = checkpoint.load(path)
    if "network" not in about:
        raise ValueError(f"{path} does not say what network it is for: want a file that `segfast train` wrote")
    network = Network.described(about, path)
    model = network.build()
    checkpoint.load_weights(model, path)
    checkpoint.take_preprocessing(model, about, path)
    return model.eval(), network


def make_dataset(config: Config, split: str, complete: bool = True):
    """The dataset of one split that a config names; the split "val" of the synthetic streets has scenes of its own."""
    kind = DATASETS[config.data]
    if config.data == "synthetic":
        if config.label_map:
            raise ValueError("config: want label_map for data in files, got one for synthetic")
        held_out = split == config.val_split
        return kind(config.val_images if held_out else config.images, config.size, 2 * config.seed + held_out)
    options = {"num_classes": config.num_classes} if config.data == "folder" else {}
    label_map = read_label_map(config.label_map) if config.label_map else None
    return kind(
        config.root, split, label_map=label_map, ignore_index=config.ignore_index, complete=complete, keep=config.keep, **options
    )


def preprocess(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Images in [0, 1] to what a network takes."""
    return lambda images: model.preprocessing(images * 255)


class Features(nn.Module):
    """A network whose forward is `forward_features`: what DistributedDataParallel wraps."""

    def __init__(self, network: nn.Module, freeze_bn: bool):
        super().__init__()
        self.network, self.freeze_bn = network, freeze_bn

    def forward(self, images: Tensor) -> Output:
        return self.network.forward_features(images)

    def train(self, mode: bool = True) -> Features:
        super().train(mode)
        for module in self.modules() if self.freeze_bn else ():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self


def choose_device(text: str) -> torch.device:
    """ "auto", "cpu", "cuda" or another of PyTorch's devices.

    Raises:
        ValueError: no device, or one that this machine lacks.
    """
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if text == "auto" else text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device: want auto, cpu or a GPU that PyTorch sees, such as cuda, got {text!r} ({error})") from error
    return device


def be_quiet(_: int) -> None:
    """In a process that loads data: the signals that end a run are the main process's, which ends this one when it has saved."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigtimedwait"):  # Linux
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # blocked, not thrown away: the thread sees who sent it
        threading.Thread(target=obey, daemon=True).start()


def obey() -> None:
    """Ends this process when the one that started it says so, as it does at its exit, or is no more.

    PyTorch's own watch looks at the parent, which under forkserver is the server.
    """
    parent = multiprocessing.parent_process()
    while parent.is_alive():
        told = signal.sigtimedwait({signal.SIGTERM}, 2)
        if told is not None and told.si_pid == parent.pid:
            break
    os._exit(0)


class Unreadable(ValueError):
    """What was to be read could not be."""


class Processes:
    """This process among those that torchrun or accelerate started; alone otherwise."""

    def __init__(self, device: str):
        self.world, self.rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        local = int(os.environ.get("LOCAL_RANK", 0))
        self.device = choose_device(f"cuda:{local}" if device == "cuda" and self.world > 1 else device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.joined = self.world > 1 and not dist.is_initialized()
        if self.joined:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")

    def reduce(self, x: Tensor, how=dist.ReduceOp.SUM) -> Tensor:
        if self.world > 1:
            x = x.to(self.device)
            dist.all_reduce(x, how)
        return x.cpu()

    def gather(self, x: Tensor) -> Tensor:
        """One tensor (processes, ...) of what every process has."""
        rows = torch.zeros(self.world, *x.shape, dtype=x.dtype)
        rows[self.rank] = x
        return self.reduce(rows)

    def close(self) -> None:
        if self.joined:
            dist.destroy_process_group()


def fit(
    config: Config,
    folder: str | Path,
    say: Callable[[str], None] = lambda _: None,
    progress: Callable[[str, int, int, dict[str, float]], None] = lambda *_: None,
    augment: Augment | TorchvisionTransform | None = None,
) -> dict:
    """Train or distil as a config says, in a run folder; go on with the run if the folder has one.

    The folder gets config.yaml, environment.json, metrics.jsonl, TensorBoard events (where it is installed), examples/,
    last.safetensors and best.safetensors (weights), state.safetensors (all that going on needs) and, at the end, result.json.

    Args:
        config: what to do.
        folder: made if need be.
        say: called with a line about what happens.
        progress: called with (stage, steps done, steps in all, values).
        augment: of the training images, to one size; None: as the config says. No file keeps it: to resume, give it again.

    Returns:
        What result.json holds.

    Raises:
        ValueError, OSError: a bad config, file or folder; the message names it.
        FloatingPointError: the loss is not finite; the message names the batch's files.
        Stopped: SIGINT or SIGTERM came; the state is saved.
    """
    run = Run(config, Path(folder), say, progress, augment)
    try:
        return run.go()
    finally:
        run.close()


class Run:
    """The parts of `fit`, and how they are saved and put back."""

    def __init__(self, config: Config, folder: Path, say, progress, augment):
        self.config, self.folder, self.say, self.progress = config, folder, say, progress
        self.augment = augment or Augment(config.crop, config.scale, config.flip, config.colour)
        self.processes = Processes(config.device)
        self.device, self.alone = self.processes.device, self.processes.rank == 0
        self.method, self.events, self.signal = None, None, 0
        self.step, self.best, self.seconds, self.due = 0, -1.0, 0.0, False
        self.broken: list[int] = []
        self.reading, self.random = 0, None
        if config.batch % self.processes.world:
            raise ValueError(f"config: want batch to be divided by the {self.processes.world} processes, got {config.batch}")
        new = self.claim()
        torch.manual_seed(config.seed)
        self.train_set, self.val_set = make_dataset(config, config.train_split), make_dataset(config, config.val_split)
        self.build()
        # What a run must find again when it goes on; the config says the rest. Read once: hashing the teacher takes time.
        self.inputs = {"training images": len(self.train_set), "validation images": len(self.val_set)}
        if self.method:
            self.inputs["teacher"] = fingerprint(self.teacher)
        state = folder / "state.safetensors"
        if state.is_file():
            self.restore(checkpoint.load_state(state))
            say(f"going on after step {self.step} of {config.steps} in {folder}")
        if self.processes.rank:
            # Every process has its own dropout; only the first one's draws are saved.
            torch.manual_seed(hash((config.seed, self.processes.rank, self.step)))
        if self.alone:
            if new:  # not before: a start that failed claims nothing
                checkpoint.write(folder / "config.yaml", configs.text(config))
            for torn in folder.glob(".*.safetensors.*"):  # by a kill while it was written
                torn.unlink(missing_ok=True)
            self.trim_metrics()
            about = {**environment(), "processes": str(self.processes.world), "device": str(self.device)}
            checkpoint.write(folder / "environment.json", json.dumps(about, indent=1) + "\n")
            self.events = tensorboard(folder / "events", self.step)

    def claim(self) -> bool:
        """Whether the folder is new; it may be another run's."""
        path = self.folder / "config.yaml"
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"want a folder, got the file {self.folder}")
        if path.is_file():
            changed = configs.differences(configs.load(path), self.config)
            if changed:
                raise ValueError(f"{self.folder} holds a run with another config ({'; '.join(changed)}): want another folder")
        return not path.is_file()

    def build(self) -> None:
        config = self.config
        classes, palette = self.train_set.classes, self.train_set.palette
        self.network = Network(
            config.model, len(classes), config.backbone, dict(config.model_options), tuple(classes), tuple(palette)
        )
        model = self.network.build()
        if config.weights:
            checkpoint.load_weights(model, weights_file(config.weights))
        if config.sync_bn and self.processes.world > 1:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        self.model = model.to(self.device, memory_format=self.memory_format)
        self.average = Average(self.model, config.ema) if config.ema else None
        self.prepare = preprocess(self.model)
        self.loss = LabelLoss(self.class_weights(), config.ohem, config.ohem_keep, config.label_smoothing, config.aux_weight)
        self.loss.to(self.device)
        logits = self.distil() if config.method else None
        if config.compile:
            self.say("compile: the first step and the first evaluation wait for the compiler, a minute or more")
            self.model.outputs = torch.compile(self.model.outputs)
        self.trained: nn.Module = Features(self.model, config.freeze_bn)
        if self.processes.world > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            self.trained = nn.parallel.DistributedDataParallel(self.trained, device_ids=ids)
        parameters = [*self.model.parameters(), *(self.method.parameters() if self.method else ())]
        self.optimizer = make_optimizer(config, parameters)
        self.scaler = torch.amp.GradScaler(self.device.type) if config.precision == "fp16" else None
        self.stream = Stream(self.train_set, self.augment, config.seed, logits)

    def class_weights(self) -> list[float] | None:
        text, classes = self.config.class_weights, len(self.train_set.classes)
        if text == "none":
            return None
        if text == "balanced":
            counts = torch.zeros(classes, dtype=torch.int64)
            for i in range(len(self.train_set)):
                labels = self.train_set[i][1]
                counts += torch.bincount(labels[labels != 255], minlength=classes)
                self.progress("count labels", i + 1, len(self.train_set), {})
            return balanced_weights(counts.tolist())
        weights = configs.numbers(text)
        if len(weights) != classes:
            raise ValueError(f"config: want class_weights for {classes} classes, got {len(weights)}")
        return weights

    def distil(self):
        config = self.config
        teacher, about = load_network(config.teacher)
        if about.num_classes != self.network.num_classes:
            raise ValueError(
                f"{config.teacher}: want a teacher of the dataset's {self.network.num_classes} classes, got {about.num_classes}"
            )
        self.teacher = teacher.to(self.device, memory_format=self.memory_format).requires_grad_(False)
        self.convert_preprocessing()
        try:
            self.method = create_method(
                config.method, self.model, self.teacher, task=self.loss, preset=config.preset, **self.method_options()
            )
        except (TypeError, AttributeError) as error:
            raise ValueError(f"config: want method_options that {config.method} takes, a mapping a term: {error}") from error
        self.cached = bool(config.cache) and not any(t.teacher_taps or t.batch_statistics for t in self.method.terms.values())
        if not config.cache:
            return None
        if not self.cached:
            self.say(f"cache: not used, {config.method} reads more of the teacher than its logits")
            return None
        if not self.alone:
            dist.barrier()
        logits = TeacherLogits(
            config.cache, self.teacher, self.train_set, self.prepare, self.device,
            lambda done, of: self.progress("teacher's logits", done, of, {}),
        )  # fmt: skip
        if self.alone and self.processes.world > 1:
            dist.barrier()
        saved = f", {1e3 * logits.seconds:.0f} ms of the teacher for every frame of a batch" if logits.seconds else ""
        self.say(f"cache: {len(self.train_set)} frames, {logits.bytes / 2**20:.1f} MiB in {config.cache}{saved}")
        return logits

    def method_options(self) -> dict[str, dict]:
        """Those of the config; class weights that say "labels" are the label loss's own."""
        own = self.loss.class_weights

        def value(key: str, given):
            return (None if own is None else own.tolist()) if (key, given) == ("class_weights", "labels") else given

        return {term: {k: value(k, v) for k, v in options.items()} for term, options in self.config.method_options.items()}

    def convert_preprocessing(self) -> None:
        theirs, ours = self.teacher.preprocessing, self.model.preprocessing
        if theirs == ours:
            return
        outputs = self.teacher.outputs

        def converted(images: Tensor) -> Output:
            mean, std = (images.new_tensor(v).view(1, 3, 1, 1) for v in (ours.mean, ours.std))
            pixels = (images * std + mean) * ours.divisor
            return outputs(theirs(pixels.flip(1) if ours.bgr else pixels))

        self.teacher.outputs = converted

    def compute_loss(self, trained: nn.Module, images: Tensor, labels: Tensor, logits: Tensor | None = None):
        output = trained(images)
        if self.method is None:
            return self.loss(self.model, output, labels)
        teacher = None if logits is None else Output(logits, (), {})
        return self.method(images, labels, student_out=output, teacher_out=teacher)

    def positions(self, batch: int, rank: int) -> list[int]:
        """A process's share of a batch."""
        own = self.config.batch // self.processes.world
        start = batch * self.config.batch + rank * own
        return list(range(start, start + own))

    def batches(self, first: int, last: int) -> Iterator[tuple[Tensor, ...]]:
        """This process's share of the batches `first` to `last`, on the device, ready for the network."""
        positions = [self.positions(batch, self.processes.rank) for batch in range(first, last)]
        # Its own generator: a loader draws a seed when it starts, which a resumed run would draw once more.
        loader = DataLoader(
            self.stream, batch_sampler=positions, num_workers=self.config.workers, generator=torch.Generator(),
            pin_memory=self.device.type == "cuda", worker_init_fn=be_quiet,
        )  # fmt: skip
        for self.reading, (images, *rest) in enumerate(read(loader), first):
            images = images.to(self.device, non_blocking=True)
            images = self.prepare(images).contiguous(memory_format=self.memory_format)
            yield (images, *(x.to(self.device, non_blocking=True) for x in rest))

    def prepare_method(self) -> None:
        """Let the method train what it trains before the student, once."""
        batches = max(1, len(self.train_set) // self.config.batch)
        steps = max([batches, *(options.get("steps") or 0 for options in self.config.method_options.values())])

        def progress(done: int, values: dict[str, float]) -> None:
            if self.signal and self.processes.world == 1:
                raise Stopped(self.signal, 0)
            self.progress("prepare the method", done, max(done, steps), values)

        try:
            self.method.prepare(Again(lambda: self.batches(0, batches)), progress)
        except FloatingPointError as error:
            names = (self.train_set.describe(self.stream.index(p)) for p in self.positions(self.reading, self.processes.rank))
            raise FloatingPointError(f"preparing the method: {error}; the batch: {', '.join(names)}") from error
        self.save()

    def go(self) -> dict:
        config = self.config
        result = self.folder / "result.json"
        if self.step == config.steps and not self.due and result.is_file():
            return json_of(result)
        with self.signals():
            if self.method and self.step == 0:
                self.prepare_method()
            if self.due:
                self.evaluate()
            began = time.perf_counter() - self.seconds
            dtype, schedule = PRECISIONS[config.precision], poly(config.power, config.warmup / config.steps)
            self.trained.train()

            def after_step() -> dict[str, float]:
                extra = self.average_terms(self.method.extra_step()) if self.method else {}
                if self.average:
                    self.average.update()
                return extra

            def done(step: int, values: dict[str, float]) -> None:
                nonlocal began
                self.step, self.seconds = step, time.perf_counter() - began
                self.random = torch.get_rng_state()
                self.due = step == config.steps or bool(config.eval_every and step % config.eval_every == 0)
                if self.alone:
                    rate = config.learning_rate * schedule((step - 1) / config.steps)  # the step's; the optimiser has the next
                    if step % config.log_every == 0 or step == config.steps:
                        self.log({"step": step, "learning_rate": rate, **values, "seconds": round(self.seconds, 3)})
                    self.progress("train", step, config.steps, values)
                stop = int(self.processes.reduce(torch.tensor(self.signal), dist.ReduceOp.MAX))
                if self.due or stop or step % config.save_every == 0:
                    self.save()
                if stop:
                    raise Stopped(stop, step)
                if self.due:
                    self.evaluate()
                    began = time.perf_counter() - self.seconds
                    self.trained.train()

            try:
                batches = self.batches(self.step * config.accumulate, config.steps * config.accumulate)
                train(
                    self.trained, batches, self.compute_loss, self.optimizer, config.steps,
                    schedule, done,
                    start=self.step, accumulate=config.accumulate, clip=config.clip, scaler=self.scaler,
                    autocast=lambda: torch.autocast(self.device.type, dtype, enabled=dtype is not None),
                    average=self.average_terms,
                    before_step=self.method.average_gradients if self.method and self.processes.world > 1 else None,
                    after_step=after_step,
                )  # fmt: skip
            except FloatingPointError as error:
                names = self.names(self.step)
                raise FloatingPointError(f"{error}; the batch: {', '.join(names)}. {self.state_hint()}") from error
            except Unreadable as error:
                if self.processes.world == 1 and self.random is not None:  # as after the last step
                    torch.set_rng_state(self.random)
                    self.save()
                raise Unreadable(f"{error}. {self.state_hint()}") from error
        scores = json_of(self.folder / "result.json") if self.alone else {}
        return scores

    def average_terms(self, values: dict[str, float]) -> dict[str, float]:
        """Means over all processes; notes which of them have one that is not finite."""
        if not values:
            return values
        rows = self.processes.gather(torch.tensor(list(values.values()), dtype=torch.float64))
        self.broken = [rank for rank, row in enumerate(rows) if not row.isfinite().all()]
        return dict(zip(values, rows.mean(0).tolist()))

    def names(self, step: int) -> list[str]:
        """What the processes that broke a step read for it."""
        batches = range(step * self.config.accumulate, (step + 1) * self.config.accumulate)
        positions = [p for batch in batches for rank in self.broken for p in self.positions(batch, rank)]
        return [self.train_set.describe(self.stream.index(p)) for p in positions]

    def state_hint(self) -> str:
        path = self.folder / "state.safetensors"
        return f"The last saved state is in {path}" if path.is_file() else "No state was saved yet"

    @contextlib.contextmanager
    def signals(self):
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def note(number, _):
            self.signal = number
            for each, handler in before.items():
                signal.signal(each, handler)  # a second one stops at once

        for number in before:
            signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def state(self) -> dict:
        return {
            "step": self.step,
            "best": self.best,
            "seconds": self.seconds,
            "due": self.due,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.state_dict() if self.average else None,
            "method": self.method.state_dict() if self.method else None,
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "inputs": self.inputs,
            "random": {
                "cpu": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            },
        }

    def restore(self, state: dict) -> None:
        path = self.folder / "state.safetensors"
        have, then = self.inputs, state.get("inputs", self.inputs)
        changed = [f"{name} {then[name]} then, {have.get(name)} now" for name in then if then[name] != have.get(name)]
        if changed:
            raise ValueError(f"{path} is of a run on other inputs ({'; '.join(changed)}): want another folder")
        try:
            self.put_back(state)
        except (RuntimeError, KeyError) as error:
            raise ValueError(f"{path} does not fit the network of {len(self.network.classes)} classes: {error}") from error

    def put_back(self, state: dict) -> None:
        self.step, self.best, self.seconds, self.due = (state[name] for name in ("step", "best", "seconds", "due"))
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for part, name in ((self.average, "average"), (self.method, "method"), (self.scaler, "scaler")):
            if part is not None:
                part.load_state_dict(state[name])
        torch.set_rng_state(state["random"]["cpu"])
        if self.device.type == "cuda" and state["random"]["cuda"] is not None:
            torch.cuda.set_rng_state(state["random"]["cuda"], self.device)

    def save(self) -> None:
        if not self.alone:
            return
        # The state goes first: it alone decides where a resumed run goes on.
        checkpoint.save_state(self.folder / "state.safetensors", self.state())
        self.save_weights("last")

    def save_weights(self, name: str) -> None:
        about = {"network": dataclasses.asdict(self.network), "step": self.step}
        checkpoint.save(self.folder / f"{name}.safetensors", self.evaluated().state_dict(), about)

    def evaluated(self) -> nn.Module:
        return self.average.model if self.average else self.model

    def evaluate(self) -> None:
        """Score the validation split, keep the weights if they are the best, draw the panel, and note that it is done."""
        model, count, world = self.evaluated().eval(), len(self.val_set), self.processes.world
        own = range(self.processes.rank, count, world)
        began, done = time.perf_counter(), 0

        def loader():
            nonlocal done
            given = {"num_workers": self.config.workers, "generator": torch.Generator(), "worker_init_fn": be_quiet}
            for image, labels in read(DataLoader(Subset(self.val_set, own), **given)):
                if self.signal and world == 1:
                    raise Stopped(self.signal, self.step)
                image = self.prepare(image.to(self.device)).contiguous(memory_format=self.memory_format)
                yield image, labels.to(self.device)
                done += 1
                if self.alone:
                    self.progress("evaluate", done, len(own), {})

        matrix = self.processes.reduce(evaluate(model, loader(), self.network.num_classes))
        if self.alone:
            self.keep(model, matrix, time.perf_counter() - began)
        self.due = False
        self.save()

    def keep(self, model: nn.Module, matrix: Tensor, seconds: float) -> None:
        iou = class_iou(matrix).tolist()
        scores = {
            "step": self.step,
            "miou": number(mean_iou(matrix)),
            "pixel_accuracy": number(pixel_accuracy(matrix)),
            "class_iou": {name: number(v) for name, v in zip(self.network.classes, iou)},
        }
        self.say(f"step {self.step}: mIoU {shown(scores['miou'])}, pixel accuracy {shown(scores['pixel_accuracy'])}")
        self.log({**scores, "evaluation_seconds": round(seconds, 3)})
        if self.config.examples:
            count = min(self.config.examples, len(self.val_set))
            chosen = [self.val_set[i * len(self.val_set) // count] for i in range(count)]
            png = panel(chosen, lambda x: model(self.prepare(x.to(self.device))).argmax(1).cpu(), self.network.palette)
            checkpoint.write(self.folder / "examples" / f"step_{self.step:06d}.png", png)
        if self.best < 0 or (scores["miou"] or 0.0) > self.best:
            self.best = scores["miou"] or 0.0
            self.save_weights("best")
        if self.step == self.config.steps:
            parameters = sum(p.numel() for p in self.model.parameters())
            result = {**scores, "best_miou": self.best, "parameters": parameters, "seconds": round(self.seconds, 1)}
            checkpoint.write(self.folder / "result.json", json.dumps(result, indent=1) + "\n")

    def trim_metrics(self) -> None:
        path = self.folder / "metrics.jsonl"
        kept = []
        for line in path.read_text().splitlines() if path.is_file() else ():
            with contextlib.suppress(json.JSONDecodeError):  # a line that a kill tore
                entry = json.loads(line)
                if entry["step"] < self.step + (not (self.due and "miou" in entry)):
                    kept.append(line + "\n")
        checkpoint.write(path, "".join(kept))

    def log(self, entry: dict) -> None:
        path = self.folder / "metrics.jsonl"
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error
        if self.events:
            for name, value in entry.items():
                if isinstance(value, float):
                    self.events.add_scalar(name, value, entry["step"])

    def close(self) -> None:
        if self.method:
            self.method.close()
        if self.events:
            self.events.close()
        self.processes.close()


def number(value: float) -> float | None:
    """A score, None in place of NaN, which JSON lacks: there was nothing to score."""
    return None if math.isnan(value) else value


def shown(score: float | None) -> str:
    return "none (no pixel has a label)" if score is None else f"{score:.4f}"


def json_of(path: Path) -> dict:
    """The object in a JSON file.

    Raises:
        ValueError: naming the file: it holds none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"want an object, got {type(found).__name__}")
        return found
    except ValueError as error:
        raise ValueError(f"cannot read {path}: {error}; delete the file and run again") from error


def read(loader: DataLoader) -> Iterator:
    """The batches; an error of a process that loads them as one line."""
    try:
        yield from loader
    except (ValueError, OSError) as error:  # DataLoader puts the process's whole traceback before its last line
        text = str(error).strip()
        own = text.rpartition("\n")[2].partition(": ")[2] if "in DataLoader worker process" in text else text
        raise Unreadable(own) from error
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise Unreadable(f"a process that loads data died ({error}): is memory short? --workers 0 needs none") from error


class Again:
    """An iterable that starts anew each time, made of a function that starts it."""

    def __init__(self, start: Callable[[], Iterator]):
        self.start = start

    def __iter__(self) -> Iterator:
        return self.start()


def make_optimizer(config: Config, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    trained = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, config.learning_rate, momentum=config.momentum)
    return torch.optim.AdamW(groups, config.learning_rate)


def tensorboard(folder: Path, step: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)
