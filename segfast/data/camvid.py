"""CamVid at 360 x 480 in the SegNet split (Brostow, Fauqueur and Cipolla, Pattern Recognition Letters 2009)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from segfast.data.images import read_image, read_labels


class CamVid(Dataset):
    """Street frames with 11 classes; 11 (void) comes out as 255, which losses and metrics ignore.

    Args:
        root: folder that holds `<split>/` (images) and `<split>annot/` (label maps, a byte a pixel), paired by file stem.
        split: "train", "val" or "test".
        transform: called with (image, labels), see `segfast.data.transforms`.

    Items are (image (3, H, W) float32 in [0, 1], labels (H, W) int64).

    Raises:
        FileNotFoundError: a folder is missing or empty, or an image has no label map.
        ValueError: a label map holds a value above 11 or has not its image's size (when the item is read).
    """

    classes = ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist")
    palette = (
        (128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (0, 0, 192), (128, 128, 0),
        (192, 128, 128), (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192),
    )  # fmt: skip

    def __init__(self, root: str | Path, split: str = "train", transform: Callable | None = None):
        images, labels = Path(root) / split, Path(root) / f"{split}annot"
        for folder in (images, labels):
            if not folder.is_dir():
                raise FileNotFoundError(f"CamVid: want the folders {split}/ and {split}annot/ in {root}, got no {folder.name}/")
        stems = {p.stem: p for p in labels.iterdir() if p.suffix.lower() == ".png"}
        self.images = sorted(p for p in images.iterdir() if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
        lacking = [p.name for p in self.images if p.stem not in stems]
        if not self.images or lacking:
            raise FileNotFoundError(f"CamVid: want a label map for every image of {images}, got none for {lacking[:3] or 'any'}")
        self.labels = [stems[p.stem] for p in self.images]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, labels = read_image(self.images[index]), read_labels(self.labels[index])
        if image.shape[1:] != labels.shape:
            raise ValueError(
                f"CamVid: want labels of the image's size, got {image.shape[1:]} and {labels.shape} in {self.labels[index]}"
            )
        void = len(self.classes)
        if labels.numel() and labels.max() > void:
            raise ValueError(f"CamVid: want labels 0 to {void}, got {int(labels.max())} in {self.labels[index]}")
        labels = torch.where(labels == void, 255, labels)
        return self.transform(image, labels) if self.transform else (image, labels)
