"""Everything a training run depends on, as one flat dataclass: the YAML file and the command line have the same names."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from dataclasses import dataclass, field, fields
from pathlib import Path

from segfast._names import nearest
from segfast.data import DATASETS


def note(help: str, free: bool = False) -> dict:
    """A field's metadata: its help, and whether it may differ when a run is resumed."""
    return {"help": help, "free": free}


def option(default, help: str, free: bool = False):
    """A field with its note."""
    return field(default=default, metadata=note(help, free))


@dataclass(frozen=True)
class Config:
    """What a run does; the help of each field is the command line's. Validated when made: ValueError names the field."""

    data: str = option("synthetic", f"Dataset: {', '.join(DATASETS)}.")
    root: str | None = option(None, "The dataset's folder.")
    train_split: str = option("train", "Split to train on.")
    val_split: str = option("val", "Split to evaluate on.")
    label_map: str | None = option(None, 'Labels of the files to classes: "7:0,8:1" or a JSON file; others are ignored.')
    ignore_index: int | None = option(None, "A label of the files that is ignored, besides 255 and the dataset's own.")
    num_classes: int | None = option(None, "Number of classes, of a folder without classes.txt.")
    keep: bool = option(False, "Keep decoded images in memory, four bytes a pixel, where a dataset has files.", free=True)
    images: int = option(512, "Scenes of the synthetic streets to train on.")
    val_images: int = option(64, "Scenes of the synthetic streets to evaluate on.")
    size: tuple[int, int] = option((96, 192), "H W of the synthetic streets.")

    model: str = option("fast_scnn", "Network, one of segfast.list_models().")
    backbone: str | None = option(None, "Another encoder, for networks whose idea allows it.")
    model_options: dict = field(default_factory=dict, metadata=note('Further options of the network, as JSON: {"width": 0.5}.'))
    weights: str | None = option(None, "Weights to start from: a .safetensors file that segfast wrote.")

    method: str | None = option(None, 'Distillation: names joined by "+", see segfast.distill.list_methods().')
    teacher: str | None = option(None, "The teacher: a run folder or a .safetensors file that segfast wrote.")
    method_options: dict = field(
        default_factory=dict, metadata=note('Options of the method\'s terms, as JSON: {"pixel_wise": {"weight": 5}}.')
    )
    preset: str = option("paper", "Of the method: paper or official.")
    cache: str | None = option(None, "Folder for the teacher's logits on full frames, computed once; used where logits suffice.")

    crop: tuple[int, int] = option((96, 192), "H W of the training crops.")
    scale: tuple[float, float] = option((0.5, 2.0), "Smallest and largest random enlargement.")
    flip: float = option(0.5, "Probability of mirroring.")
    colour: float = option(0.0, "Strength of random brightness, contrast and saturation, 0 to 1.")

    steps: int = option(1000, "Optimiser steps.")
    batch: int = option(8, "Images a batch, over all processes.")
    accumulate: int = option(1, "Batches a step.")
    optimizer: str = option("adamw", "adamw or sgd.")
    learning_rate: float = option(2e-3, "The peak.")
    momentum: float = option(0.9, "Of SGD.")
    weight_decay: float = option(1e-4, "Of the convolutions' weights; BatchNorm and biases get none.")
    power: float = option(0.9, "Of the poly schedule.")
    warmup: int = option(0, "Steps over which the learning rate rises.")
    clip: float = option(0.0, "Largest norm of the gradient; 0: any.")
    ema: float = option(0.0, "Decay of the weights' moving average, which is then evaluated and saved; 0: none.")

    class_weights: str = option("none", "none, balanced (from the labels' pixel counts), or numbers joined by commas.")
    ohem: float = option(0.0, "Only pixels whose class has less than this probability count; 0: all.")
    ohem_keep: float = option(1 / 16, "Share of the pixels that OHEM keeps at least.")
    label_smoothing: float = option(0.0, "Share of the target spread over all classes.")
    aux_weight: float = option(0.4, "Factor of the auxiliary heads' loss.")

    seed: int = option(0, "Of the weights, the order and the augmentation.")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...", free=True)
    precision: str = option("fp32", "fp32, bf16 or fp16 (autocast).")
    channels_last: bool = option(True, "Memory format of images and weights.")
    compile: bool = option(False, "Compile the network with torch.compile.")
    freeze_bn: bool = option(False, "BatchNorm keeps its running statistics.")
    sync_bn: bool = option(False, "BatchNorm over all processes (CUDA).")
    workers: int = option(0, "Processes that read images, beside each training process.", free=True)

    save_every: int = option(200, "Steps between saves of the training state.", free=True)
    eval_every: int = option(0, "Steps between evaluations; 0: at the end only.")
    log_every: int = option(10, "Steps between lines of metrics.jsonl.", free=True)
    examples: int = option(4, "Validation images in the example panels; 0: no panels.", free=True)

    def __post_init__(self):
        for name in ("size", "crop", "scale"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

        def want(good: bool, name: str, what: str):
            if not good:
                raise ValueError(f"config: want {name} {what}, got {getattr(self, name)!r}")

        want(self.data in DATASETS, "data", f"to be one of {', '.join(DATASETS)}")
        want(self.data == "synthetic" or bool(self.root), "root", f"with data {self.data!r}")
        for name in ("images", "val_images", "steps", "batch", "accumulate", "save_every", "log_every"):
            want(getattr(self, name) >= 1, name, "to be at least 1")
        for name in (
            "eval_every",
            "examples",
            "workers",
            "warmup",
            "clip",
            "seed",
            "weight_decay",
            "aux_weight",
            "power",
            "momentum",
        ):
            want(getattr(self, name) >= 0, name, "to be at least 0")
        want(self.learning_rate > 0, "learning_rate", "to be positive")
        for name in ("ema", "ohem", "label_smoothing", "flip", "ohem_keep"):
            want(0 <= getattr(self, name) <= 1, name, "in [0, 1]")
        want(self.ema < 1, "ema", "below 1")
        want(0 <= self.colour < 1, "colour", "in [0, 1)")
        for name, choices in {
            "optimizer": ("adamw", "sgd"),
            "precision": ("fp32", "bf16", "fp16"),
            "preset": ("paper", "official"),
        }.items():
            want(getattr(self, name) in choices, name, f"to be one of {', '.join(choices)}")
        want(len(self.crop) == 2 and min(self.crop) >= 1, "crop", "to be two sizes of at least 1")
        want(len(self.size) == 2 and min(self.size) >= 16, "size", "to be two sizes of at least 16")
        want(len(self.scale) == 2 and 0 < self.scale[0] <= self.scale[1], "scale", "to be 0 < low <= high")
        want(self.class_weights in ("none", "balanced") or numbers(self.class_weights) is not None, "class_weights",
             "to be none, balanced or numbers joined by commas")  # fmt: skip
        want(bool(self.method) == bool(self.teacher), "teacher", "and method together or neither")
        want(self.method is not None or not (self.method_options or self.cache), "method", "with method_options or cache")


def numbers(text: str) -> list[float] | None:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        return None


def kind(annotation) -> tuple[type, bool]:
    """The type behind an annotation of `Config`, and whether None is allowed."""
    if isinstance(annotation, types.UnionType):
        (inner,) = (a for a in typing.get_args(annotation) if a is not type(None))
        return inner, True
    return annotation, False


def from_mapping(values: dict, source: str = "config") -> Config:
    """A config from plain values, lists for tuples.

    Raises:
        ValueError: an unknown name (the nearest are suggested), a value of another type, or one that `Config` refuses.
    """
    hints = typing.get_type_hints(Config)
    known = {}
    for name, value in values.items():
        if name not in hints:
            raise ValueError(f"{source}: {nearest(name, hints)}want fields of segfast.engine.Config, got {name!r}")
        wanted, optional = kind(hints[name])
        known[name] = None if value is None and optional else convert(name, value, wanted, source)
    return Config(**known)


def convert(name: str, value, wanted, source: str):
    error = ValueError(f"{source}: want {name} to be {getattr(wanted, '__name__', wanted)}, got {value!r}")
    if typing.get_origin(wanted) is tuple:
        inner = typing.get_args(wanted)
        if not isinstance(value, (list, tuple)) or len(value) != len(inner):
            raise error
        return tuple(convert(name, v, t, source) for v, t in zip(value, inner))
    if wanted is float and isinstance(value, str):
        try:  # YAML reads 2e-3 as a string
            return float(value)
        except ValueError:
            raise error from None
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
        raise error
    return value


def read(path: str | Path) -> dict:
    """The fields that a YAML file sets. Lines `name: value` with JSON values, as `text` writes them, need no PyYAML.

    Raises:
        FileNotFoundError, ValueError: naming the file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"want the config file {path}, got none")
    content = path.read_text(encoding="utf-8")
    try:
        import yaml
    except ImportError:
        yaml = None
    try:
        try:
            lines = [line for line in content.splitlines() if line.strip() and not line.startswith("#")]
            values = {name.strip(): json.loads(value) for name, value in (line.split(":", 1) for line in lines)}
        except ValueError:
            if not yaml:
                raise
            values = yaml.safe_load(content) or {}
    except Exception as error:  # YAMLError is known only where yaml is
        if not isinstance(error, ValueError) and not (yaml and isinstance(error, yaml.YAMLError)):
            raise
        hint = "" if yaml else " (PyYAML reads the rest of YAML: pip install 'segfast[train]')"
        raise ValueError(f"{path} is no YAML{hint}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: want lines of name: value, got {type(values).__name__}")
    return values


def text(config: Config) -> str:
    """A config as YAML, a field a line, the values in JSON's notation; `read` and any YAML parser read it."""
    return "".join(f"{name}: {json.dumps(value)}\n" for name, value in dataclasses.asdict(config).items())


def load(path: str | Path) -> Config:
    """A config from a YAML file."""
    return from_mapping(read(path), str(path))


def differences(old: Config, new: Config) -> list[str]:
    """The fields that a resumed run must not change, and does: "name: old -> new"."""
    return [
        f"{f.name}: {getattr(old, f.name)!r} -> {getattr(new, f.name)!r}"
        for f in fields(Config)
        if not f.metadata["free"] and getattr(old, f.name) != getattr(new, f.name)
    ]
