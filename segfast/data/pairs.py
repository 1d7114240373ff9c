"""Datasets of image files and label files: what all of them share, and the layouts that are nothing more than a list of pairs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from segfast.data.images import read_labels, read_pixels, scaled

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
IGNORED = 255


@dataclass(frozen=True)
class Listing:
    """The files of one split: pairs (image, label map), images without a label map, label maps without an image."""

    pairs: tuple[tuple[Path, Path], ...]
    without_labels: tuple[Path, ...] = ()
    without_image: tuple[Path, ...] = ()


class ImagePairs(Dataset):
    """Images with label maps, paired by the layout of a dataset.

    A subclass names its classes and says in `listing` which files belong together.

    Args:
        root, split: where the files are.
        transform: called with (image, labels), see `segfast.data.transforms`.
        label_map: from a file's label to a class; a label that it does not name is ignored. None: the dataset's own.
        ignore_index: a label of the files that is ignored, besides the dataset's own; None: no further one.
        complete: False leaves images without a label map out, where True raises.
        keep: what was read stays in memory, decoded: four bytes a pixel (seven with more than 255 classes).

    Items are (image (3, H, W) float32 in [0, 1], labels (H, W) int64 with 255 where ignored).

    Raises:
        FileNotFoundError: a folder is missing or empty, or an image has no label map.
        ValueError: an unreadable file, a label that is no class, or labels not of the image's size (when an item is read).
    """

    classes: tuple[str, ...] = ()
    palette: tuple[tuple[int, int, int], ...] = ()
    own_label_map: Mapping[int, int] | None = None
    own_ignored: tuple[int, ...] = (IGNORED,)

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        transform: Callable | None = None,
        label_map: Mapping[int, int] | None = None,
        ignore_index: int | None = None,
        complete: bool = True,
        keep: bool = False,
    ):
        self.kept: dict[int, tuple[Tensor, Tensor]] | None = {} if keep else None
        self.root, self.split, self.transform = Path(root), split, transform
        self.name = type(self).__name__
        self.files = listing = self.listing(self.root, split)
        if complete and (listing.without_labels or not listing.pairs):
            lacking = [path.name for path in listing.without_labels[:3]]
            raise FileNotFoundError(
                f"{self.name}: want a label map for every image of the split {split!r} in {root}, got none for {lacking or 'any'}"
            )
        self.images, self.labels = ([pair[i] for pair in listing.pairs] for i in (0, 1))
        self.label_map = self.own_label_map if label_map is None else label_map
        self.ignored = {*self.own_ignored, *(() if ignore_index is None else (ignore_index,))}
        self.table = label_table(self.name, self.label_map, self.ignored, len(self.classes))

    @classmethod
    def listing(cls, root: Path, split: str) -> Listing:
        """The files of a split of `root`; raises FileNotFoundError where a folder is missing."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.images)

    def describe(self, index: int) -> str:
        """What error messages call an item."""
        return str(self.images[index])

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        pixels, labels = self.decoded(index)
        image, labels = scaled(pixels), labels.long()
        return self.transform(image, labels) if self.transform else (image, labels)

    def decoded(self, index: int) -> tuple[Tensor, Tensor]:
        """The image (3, H, W), bytes, and its classes (H, W), integers."""
        if self.kept is not None and index in self.kept:
            return self.kept[index]
        pixels, labels = read(read_pixels, self.images[index]), self.classes_of(self.labels[index])
        if pixels.shape[1:] != labels.shape:
            raise ValueError(
                f"{self.name}: want labels of the image's size, got {tuple(pixels.shape[1:])} and {tuple(labels.shape)} "
                f"in {self.labels[index]}"
            )
        if self.kept is not None:
            self.kept[index] = pixels, labels.to(torch.uint8 if len(self.classes) <= 255 else torch.int32)
        return pixels, labels

    def classes_of(self, path: Path) -> Tensor:
        """A label file's classes (H, W), 255 where ignored."""
        raw = read(read_labels, path)
        labels = self.table[raw.clamp(-1, len(self.table) - 1)]
        if (labels < 0).any():
            unknown = raw[labels < 0].unique().tolist()
            raise ValueError(
                f"{self.name}: want labels 0 to {len(self.classes) - 1} or {self.ignored_text()}, got {some(unknown)} in {path}"
            )
        return labels

    def ignored_text(self) -> str:
        return " or ".join(map(str, sorted(self.ignored)))


def label_table(name: str, label_map: Mapping[int, int] | None, ignored: Iterable[int], classes: int) -> Tensor:
    """Class by raw label, for labels 0 to 65,535; -1: no class; 255: ignored."""
    table = torch.full((65_537,), -1)  # the last entry stands for all that no file can hold
    if label_map is None:
        table[:classes] = torch.arange(classes)
    else:
        table[:] = IGNORED
        for raw, label in label_map.items():
            if not (0 <= raw < 65_536 and (0 <= label < classes or label == IGNORED)):
                raise ValueError(f"{name}: want a label map from 0..65535 to 0..{classes - 1} or 255, got {raw}: {label}")
            table[raw] = label
    for raw in ignored:
        if not 0 <= raw < 65_536:
            raise ValueError(f"{name}: want ignored labels in 0..65535, got {raw}")
        # A map that names the label as a class means it.
        if label_map is None or raw not in label_map:
            table[raw] = IGNORED
    return table


def read(reader: Callable[[Path], Tensor], path: Path) -> Tensor:
    """`reader(path)`, with the path in whatever Pillow says of a file that is no image or ends too early."""
    try:
        return reader(path)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        raise ValueError(f"cannot read {path}: {error}") from error


def some(values: list) -> str:
    return ", ".join(map(str, values[:8])) + (", ..." if len(values) > 8 else "")


def folder(path: Path, name: str) -> Path:
    if not path.is_dir():
        raise FileNotFoundError(f"{name}: want the folder {path}, got none")
    return path


def by_stem(images: Iterable[Path], labels: Iterable[Path], image_key=lambda p: p.stem, label_key=lambda p: p.stem) -> Listing:
    """Pairs of the same key, ordered by the image's path."""
    images, stems = sorted(images), {label_key(p): p for p in labels}
    keys = {image_key(p) for p in images}
    return Listing(
        tuple((p, stems[image_key(p)]) for p in images if image_key(p) in stems),
        tuple(p for p in images if image_key(p) not in stems),
        tuple(p for key, p in sorted(stems.items()) if key not in keys),
    )


def files(path: Path, suffixes: tuple[str, ...] = IMAGES) -> list[Path]:
    return [p for p in path.iterdir() if p.suffix.lower() in suffixes]


def spread_palette(classes: int) -> tuple[tuple[int, int, int], ...]:
    """The palette of Pascal VOC for any number of classes: the bits of the class number dealt out to red, green and blue."""
    colours = []
    for label in range(classes):
        rgb = [0, 0, 0]
        for bit in range(24):
            if label >> bit & 1:
                rgb[bit % 3] |= 1 << (7 - bit // 3)
        colours.append(tuple(rgb))
    return tuple(colours)


class Cityscapes(ImagePairs):
    """Cityscapes (Cordts et al., arXiv:1604.01685): 19 of its labels are classes, the others are ignored.

    `root` holds `leftImg8bit/<split>/<city>/*_leftImg8bit.png` and `gtFine/<split>/<city>/*_gtFine_labelIds.png`, as they are
    downloaded: no file is converted.
    """

    classes = (
        "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain",
        "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
    )  # fmt: skip
    palette = (
        (128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153), (153, 153, 153), (250, 170, 30),
        (220, 220, 0), (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60), (255, 0, 0), (0, 0, 142), (0, 0, 70),
        (0, 60, 100), (0, 80, 100), (0, 0, 230), (119, 11, 32),
    )  # fmt: skip
    own_label_map = dict(
        zip((7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33), range(19))
    )  # label ids of the files

    @classmethod
    def listing(cls, root: Path, split: str) -> Listing:
        images = folder(Path(root) / "leftImg8bit" / split, "Cityscapes")
        labels = folder(Path(root) / "gtFine" / split, "Cityscapes")
        return by_stem(
            images.glob("*/*_leftImg8bit.png"),
            labels.glob("*/*_gtFine_labelIds.png"),
            lambda p: p.name.removesuffix("_leftImg8bit.png"),
            lambda p: p.name.removesuffix("_gtFine_labelIds.png"),
        )


class PascalVOC(ImagePairs):
    """Pascal VOC 2012 segmentation: background and 20 classes; the outlines (255) are ignored.

    `root` is the VOC2012 folder, with JPEGImages/, SegmentationClass/ and ImageSets/Segmentation/<split>.txt.
    """

    classes = (
        "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "dining table",
        "dog", "horse", "motorbike", "person", "potted plant", "sheep", "sofa", "train", "tv monitor",
    )  # fmt: skip
    palette = spread_palette(21)

    @classmethod
    def listing(cls, root: Path, split: str) -> Listing:
        names = Path(root) / "ImageSets" / "Segmentation" / f"{split}.txt"
        if not names.is_file():
            raise FileNotFoundError(f"PascalVOC: want the list {names}, got none")
        stems = names.read_text().split()
        images = folder(Path(root) / "JPEGImages", "PascalVOC")
        labels = folder(Path(root) / "SegmentationClass", "PascalVOC")
        pairs = [(images / f"{stem}.jpg", labels / f"{stem}.png") for stem in stems]
        return Listing(
            tuple(pair for pair in pairs if pair[0].is_file() and pair[1].is_file()),
            tuple(image for image, label in pairs if image.is_file() and not label.is_file()),
            tuple(label for image, label in pairs if not image.is_file()),
        )


class ADE20K(ImagePairs):
    """ADE20K's scene parsing benchmark (Zhou et al., CVPR 2017): 150 classes; 0 in the files is ignored.

    `root` is the ADEChallengeData2016 folder, with images/ and annotations/, each with training/ and validation/; the names of
    the classes are read from its objectInfo150.txt, and are numbers without it.
    """

    classes = tuple(map(str, range(1, 151)))
    palette = spread_palette(151)[1:]
    own_label_map = {0: IGNORED, **{raw: raw - 1 for raw in range(1, 151)}}
    splits = {"train": "training", "val": "validation"}

    def __init__(self, root: str | Path, *args, **options):
        names = Path(root) / "objectInfo150.txt"
        if names.is_file():
            rows = [line.split("\t")[-1].split(",")[0].strip() for line in names.read_text().splitlines()[1:] if line.strip()]
            self.classes = tuple(rows) if len(rows) == 150 else type(self).classes
        super().__init__(root, *args, **options)

    @classmethod
    def listing(cls, root: Path, split: str) -> Listing:
        split = cls.splits.get(split, split)
        images = folder(Path(root) / "images" / split, "ADE20K")
        return by_stem(files(images), files(folder(Path(root) / "annotations" / split, "ADE20K"), (".png",)))


class ImageFolder(ImagePairs):
    """A plain folder: `<root>/<split>/images/` and `<root>/<split>/masks/`, paired by file stem.

    Masks are PNG with a byte (or two) a pixel, or a palette index: the class, 255 where ignored. `<root>/classes.txt` names the
    classes, one a line; without it `num_classes` says how many there are.

    Args:
        num_classes: where there is no classes.txt.
        root and the others: as in `ImagePairs`.
    """

    def __init__(self, root: str | Path, *args, num_classes: int | None = None, **options):
        names = Path(root) / "classes.txt"
        if names.is_file():
            self.classes = tuple(line.strip() for line in names.read_text(encoding="utf-8").splitlines() if line.strip())
        elif num_classes:
            self.classes = tuple(f"class {i}" for i in range(num_classes))
        else:
            raise ValueError(f"ImageFolder: want {names} or num_classes, got neither")
        if not 1 <= len(self.classes) <= IGNORED:
            raise ValueError(f"ImageFolder: want 1 to {IGNORED} classes, got {len(self.classes)}")
        self.palette = spread_palette(len(self.classes) + 1)[1:]
        super().__init__(root, *args, **options)

    @classmethod
    def listing(cls, root: Path, split: str) -> Listing:
        images = folder(Path(root) / split / "images", "ImageFolder")
        return by_stem(files(images), files(folder(Path(root) / split / "masks", "ImageFolder"), (".png",)))


def read_label_map(text: str) -> dict[int, int]:
    """A label map as the command line gives it: "0:255,7:0,8:1", or the path of a JSON file {"7": 0, ...}.

    Raises:
        ValueError: neither.
    """
    try:
        if text.lower().endswith(".json"):
            return {int(raw): int(label) for raw, label in json.loads(Path(text).read_text()).items()}
        return {int(raw): int(label) for raw, label in (item.split(":") for item in text.split(","))}
    except (ValueError, AttributeError) as error:
        raise ValueError(f'label map: want "raw:class,raw:class" or the path of a JSON file, got {text!r}') from error
