"""Is a dataset fit to train on? What is missing, unreadable, of the wrong size or labelled with what is no class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from segfast.data.images import read_image, read_labels
from segfast.data.pairs import IGNORED, ImagePairs, read


@dataclass
class Health:
    """What `check` found in one split.

    problems: a line each, with the file's name; with any of them training would stop.
    notes: what does no harm and may surprise.
    sizes: how many images of each (H, W).
    pixels: labelled pixels by class; ignored: the others; images: in how many images a class occurs.
    """

    split: str
    pairs: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    sizes: Counter = field(default_factory=Counter)
    pixels: list[int] = field(default_factory=list)
    ignored: int = 0
    images: Counter = field(default_factory=Counter)

    @property
    def healthy(self) -> bool:
        return self.pairs > 0 and not self.problems


def check(dataset: ImagePairs, progress: Callable[[int, int], None] = lambda *_: None) -> Health:
    """Read every file of a split.

    Args:
        dataset: made with `complete=False`, so that it can be made where label maps are missing.
        progress: called with the pairs read and their number.
    """
    listing, classes = dataset.files, len(dataset.classes)
    health = Health(dataset.split, len(listing.pairs))
    health.problems += [f"no label map for {path}" for path in listing.without_labels]
    health.notes += [f"no image for {path}" for path in listing.without_image]
    if not listing.pairs:
        health.problems.append(f"no pair of image and label map in the split {dataset.split!r} of {dataset.root}")
    total = torch.zeros(IGNORED + 1, dtype=torch.int64)
    for done, (image_path, label_path) in enumerate(listing.pairs, 1):
        try:
            image, raw = read(read_image, image_path), read(read_labels, label_path)
        except ValueError as error:
            health.problems.append(str(error))
            continue
        health.sizes[tuple(image.shape[1:])] += 1
        if image.shape[1:] != raw.shape:
            health.problems.append(f"image {tuple(image.shape[1:])} and labels {tuple(raw.shape)} differ in size: {label_path}")
        labels = dataset.table[raw.clamp(-1, len(dataset.table) - 1)]
        if (labels < 0).any():
            values, counts = raw[labels < 0].unique(return_counts=True)
            found = ", ".join(f"{int(v)} ({int(c)} pixels)" for v, c in zip(values[:8], counts))
            health.problems.append(f"labels that are no class: {found} in {label_path}")
        counted = torch.bincount(labels[labels >= 0], minlength=IGNORED + 1)
        total += counted
        health.images.update(counted[:classes].nonzero()[:, 0].tolist())
        if not counted[:classes].any():
            health.notes.append(f"no labelled pixel in {label_path}")
        progress(done, len(listing.pairs))
    health.pixels, health.ignored = total[:classes].tolist(), int(total[IGNORED])
    health.notes += [f"no pixel of the class {name!r}" for name, pixels in zip(dataset.classes, health.pixels) if not pixels]
    return health
