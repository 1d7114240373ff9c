"""The main job in small: check the kernels, train a teacher, distil a student, and train the same student alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from segfast import create_model
from segfast.data import CamVid, SyntheticStreets, transforms
from segfast.distill import PairWiseLoss, PixelWiseLoss
from segfast.engine.baselines import ColourRegression, Majority
from segfast.engine.environment import backend_table, environment
from segfast.engine.evaluate import class_iou, evaluate, mean_iou
from segfast.engine.kernels import OPS, check, timings
from segfast.engine.train import Distillation, supervised, train

SIZES = {"synthetic": (96, 192), "camvid": (120, 160)}


@dataclass(frozen=True)
class Settings:
    """What `run` does.

    Args:
        data: "synthetic" or "camvid"; `root` is CamVid's folder.
        seed: of the scenes, the weights and the order of the batches.
        steps: the teacher's training steps; both students take two thirds of them.
        labels: labelled images that the students have; the teacher has labels for all of them.
        images, validation: how many images to train on and to score on, at most.
        width: the student's channels, as a fraction of the teacher's.
        batch: images a step.
        pixel_weight, pair_weight: factors of the two distillation losses.
        learning_rate: AdamW's peak.
        timing_seconds: how long each kernel is timed.
    """

    data: str = "synthetic"
    root: str | None = None
    seed: int = 0
    steps: int = 600
    labels: int = 24
    images: int = 512
    validation: int = 64
    width: float = 0.25
    batch: int = 8
    pixel_weight: float = 2.0
    pair_weight: float = 5.0
    learning_rate: float = 4e-3
    timing_seconds: float = 1.0

    def __post_init__(self):
        if self.data not in SIZES:
            raise ValueError(f"demo: want data to be one of {', '.join(SIZES)}, got {self.data!r}")
        if self.data == "camvid" and not self.root:
            raise ValueError("demo: want root with data 'camvid', got none")
        for name, least in {"steps": 1, "validation": 1, "labels": 2, "images": 2, "batch": 2}.items():
            if getattr(self, name) < least:  # BatchNorm wants two images a step
                raise ValueError(f"demo: want {name} >= {least}, got {getattr(self, name)}")


Progress = Callable[[str, int, int, str], None]


class Batches:
    """Shuffled, mirrored at random, from tensors in memory; the last, smaller batch is left out."""

    def __init__(self, images: Tensor, labels: Tensor, size: int, seed: int):
        self.images, self.labels, self.size = images, labels, min(size, len(images))
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.images), generator=self.generator)
        for chosen in order.split(self.size):
            if len(chosen) == self.size:
                images, labels = self.images[chosen], self.labels[chosen]
                if torch.rand((), generator=self.generator) < 0.5:
                    images, labels = images.flip(-1), labels.flip(-1)
                yield images.contiguous(memory_format=torch.channels_last), labels


def datasets(settings: Settings):
    size = SIZES[settings.data]
    if settings.data == "camvid":
        resize = transforms.Resize(size)
        return CamVid(settings.root, "train", resize), CamVid(settings.root, "val", resize)
    seed = 2 * settings.seed
    return SyntheticStreets(settings.images, size, seed), SyntheticStreets(settings.validation, size, seed + 1)


def load(dataset, limit: int, progress: Progress, stage: str) -> tuple[Tensor, Tensor]:
    count = min(limit, len(dataset))
    items = []
    for i in range(count):
        items.append(dataset[i * len(dataset) // count])
        progress(stage, i + 1, count, "")
    images, labels = (torch.stack(column) for column in zip(*items))
    return images, labels


def run(settings: Settings, progress: Progress = lambda *_: None, show: Callable[[str, list], None] = lambda *_: None) -> dict:
    """Do the whole job.

    Args:
        settings: what to do.
        progress: called with (stage, steps done, steps in all, a line about it).
        show: called with ("checks", list of Check), ("timings", list of Timing) and ("scores", list of dict) as they come.

    Returns:
        Everything measured, ready for JSON, but for "panel": tensors for the report's pictures.
    """
    began = time.perf_counter()
    train_set, validation_set = datasets(settings)
    num_classes = len(train_set.classes)

    checks = []
    for i, op in enumerate(OPS):
        checks.append(check(op))
        progress("check the kernels", i + 1, len(OPS), op)
    show("checks", checks)
    taken = []
    for timing in timings(settings.timing_seconds):
        taken.append(timing)
        progress("time the kernels", len(taken), 0, timing.op)
    progress("time the kernels", len(taken), len(taken), "")
    show("timings", taken)

    pictures, labels = load(train_set, settings.images, progress, "training images")
    validation_pictures, validation_labels = load(validation_set, settings.validation, progress, "validation images")
    validation_plain = batches(validation_pictures, validation_labels)
    few = min(settings.labels, len(pictures))
    partial = torch.cat([labels[:few], torch.full_like(labels[few:], 255)])
    baselines = {
        "majority class": Majority([(pictures, labels)], num_classes),
        "colour alone": ColourRegression([(pictures[:128], labels[:128])], num_classes),
    }
    scores = {name: score(model, validation_plain, num_classes) for name, model in baselines.items()}

    pictures, validation_pictures = normalize(pictures), normalize(validation_pictures)
    validation = batches(validation_pictures, validation_labels)
    student_steps = max(1, 2 * settings.steps // 3)
    seconds, curves, networks = {}, {}, {}

    def fit(name: str, width: float, seed: int, data: tuple[Tensor, Tensor], loss, steps: int) -> nn.Module:
        start = time.perf_counter()
        torch.manual_seed(seed)
        model = create_model("fast_scnn", num_classes, width=width).to(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(model.parameters(), settings.learning_rate, weight_decay=1e-4)
        loader = Batches(*data, settings.batch, seed)
        curves[name] = train(
            model, loader, loss, optimizer, steps, progress=lambda done, terms: progress(name, done, steps, line(terms))
        )
        seconds[name] = time.perf_counter() - start
        scores[name] = score(model, validation, num_classes)
        networks[name] = model.eval()
        return model

    seed = 1000 * settings.seed
    teacher = fit("teacher", 1.0, seed, (pictures, labels), supervised, settings.steps)
    distillation = Distillation(
        teacher.requires_grad_(False), PixelWiseLoss(), PairWiseLoss(node_size=2), settings.pixel_weight, settings.pair_weight
    )
    fit("student, distilled", settings.width, seed + 1, (pictures, partial), distillation, student_steps)
    fit("student, alone", settings.width, seed + 1, (pictures[:few], labels[:few]), supervised, student_steps)
    show("scores", [{"name": name, **values} for name, values in scores.items()])

    with torch.no_grad():
        chosen = torch.arange(min(4, len(validation_labels))) * (len(validation_labels) // min(4, len(validation_labels)))
        panel = {name: model(validation_pictures[chosen]).argmax(1) for name, model in networks.items()}
    gain = scores["student, distilled"]["miou"] - scores["student, alone"]["miou"]
    return {
        "settings": asdict(settings),
        "environment": environment(),
        "backends": [dict(zip(("op", "device", "backend"), row)) for row in backend_table()],
        "checks": [c.asdict() for c in checks],
        "timings": [t.asdict() for t in taken],
        "classes": list(train_set.classes),
        "labelled_images": {"teacher": len(labels), "students": few},
        "parameters": {name: sum(p.numel() for p in model.parameters()) for name, model in networks.items()},
        "scores": scores,
        "gain": gain,
        "distillation_helped": gain > 0,
        "curves": curves,
        "seconds": {**seconds, "all": time.perf_counter() - began},
        "panel": {
            "palette": train_set.palette,
            "image": validation_pictures[chosen] * 0.25 + 0.5,
            "truth": validation_labels[chosen],
            **panel,
        },
    }


def normalize(images: Tensor) -> Tensor:
    return (images - 0.5) / 0.25


def batches(images: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(x.contiguous(memory_format=torch.channels_last), y) for x, y in zip(images.split(16), labels.split(16))]


def score(model: nn.Module, loader, num_classes: int) -> dict:
    matrix = evaluate(model, loader, num_classes)
    return {"miou": mean_iou(matrix), "class_iou": [None if v != v else v for v in class_iou(matrix).tolist()]}


def line(terms: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.3f}" for name, value in terms.items())
