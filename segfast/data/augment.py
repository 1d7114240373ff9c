"""Random scale, crop, flip and colour, drawn from a generator of one's own, so that a draw can be repeated and replayed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from segfast._packages import need


@dataclass(frozen=True)
class Geometry:
    """A window of a frame, brought to a size and perhaps mirrored.

    Scaling a frame by s and cutting a crop of it is cutting crop / s of the frame and scaling that: only the window is computed.

    Args:
        top, left, height, width: the window in the frame's pixels; what lies outside the frame is black and ignored.
        size: (H, W) that it is brought to.
        mirrored: left and right.
    """

    top: int
    left: int
    height: int
    width: int
    size: tuple[int, int]
    mirrored: bool

    def image(self, image: Tensor) -> Tensor:
        """(C, H, W) to (C, *size): bilinear, with antialiasing where it shrinks."""
        window = self.window(image, 0.0)
        if tuple(window.shape[1:]) != self.size:
            window = F.interpolate(window[None], self.size, mode="bilinear", antialias=True)[0]
        return window.flip(-1) if self.mirrored else window

    def labels(self, labels: Tensor) -> Tensor:
        """(H, W) to size, the nearest label; 255 outside the frame."""
        window = self.window(labels, 255)
        rows, columns = (
            ((torch.arange(size) + 0.5) * (length / size)).long() for size, length in zip(self.size, (self.height, self.width))
        )
        window = window[rows][:, columns] if (self.height, self.width) != self.size else window
        return window.flip(-1) if self.mirrored else window

    def logits(self, logits: Tensor, frame: tuple[int, int], align_corners: bool) -> Tensor:
        """A network's logits (C, h, w) for the whole frame (H, W), seen through the window at their own stride.

        The bilinear upsampling of the logits to the frame, read where the cells of a run on the window alone would lie.

        Args:
            logits: at any stride.
            frame: (H, W) in pixels of the frame that they are for.
            align_corners: how the network upsamples.
        """
        rows, columns = (
            start + (cells(size, count, pixels, align_corners) + 0.5) * (length / size) - 0.5
            for start, length, size, count, pixels in zip(
                (self.top, self.left), (self.height, self.width), self.size, logits.shape[1:], frame
            )
        )
        columns = columns.flip(0) if self.mirrored else columns
        return read_at(logits, rows[:, None].expand(-1, len(columns)), columns.expand(len(rows), -1), frame, align_corners)

    def window(self, x: Tensor, fill: float) -> Tensor:
        height, width = x.shape[-2:]
        outside = (-self.left, self.left + self.width - width, -self.top, self.top + self.height - height)
        outside = tuple(max(0, v) for v in outside)
        cut = x[..., max(0, self.top) : self.top + self.height, max(0, self.left) : self.left + self.width]
        return F.pad(cut, outside, value=fill) if any(outside) else cut


@dataclass(frozen=True)
class Coordinates:
    """Where the pixels of an image lay in its frame before a geometric transform of any kind.

    Args:
        rows, columns: (H, W) of the frame's pixels.
        inside: (H, W), False where there is none.
    """

    rows: Tensor
    columns: Tensor
    inside: Tensor

    def logits(self, logits: Tensor, frame: tuple[int, int], align_corners: bool) -> Tensor:
        """As `Geometry.logits`. A cell between pixels lies between the places of those that are inside; without one, anywhere."""
        size = tuple(self.inside.shape)
        rows, columns = (
            cells(length, count, pixels, align_corners) for length, count, pixels in zip(size, logits.shape[1:], frame)
        )
        maps = torch.stack([self.rows * self.inside, self.columns * self.inside, self.inside])
        grid = rows[:, None].expand(-1, len(columns)), columns.expand(len(rows), -1)
        *places, share = read_at(maps, *grid, size, align_corners=False)
        return read_at(logits, *(place / share.clamp(min=1e-6) for place in places), frame, align_corners)


def cells(size: int, count: int, pixels: int, align_corners: bool) -> Tensor:
    """Where the cells of a network's logits lie along `size` pixels, if it has `count` cells for `pixels`."""
    count = max(1, round(size * count / pixels))
    return torch.linspace(0, size - 1, count) if align_corners else (torch.arange(count) + 0.5) * (size / count) - 0.5


def read_at(maps: Tensor, rows: Tensor, columns: Tensor, frame: tuple[int, int], align_corners: bool) -> Tensor:
    """(C, h, w), bilinearly upsampled to the frame (H, W), at these rows and columns (r, c) of it: (C, r, c)."""
    y, x = (
        2 * at / max(pixels - 1, 1) - 1 if align_corners else (2 * at + 1) / pixels - 1
        for at, pixels in zip((rows, columns), frame)
    )
    grid = torch.stack([x, y], -1)
    return F.grid_sample(maps[None].float(), grid[None], padding_mode="border", align_corners=align_corners)[0]


class Augment:
    """Random scale, crop, flip and colour.

    Args:
        crop: (H, W) of the result.
        scale: (low, high): the frame's enlargement, drawn evenly on a logarithmic axis.
        flip: probability of mirroring.
        colour: strength of brightness, contrast and saturation: each is scaled by a factor in 1 - colour to 1 + colour.
    """

    def __init__(
        self,
        crop: tuple[int, int],
        scale: tuple[float, float] = (0.5, 2.0),
        flip: float = 0.5,
        colour: float = 0.0,
    ):
        if min(crop) < 1 or not 0 < scale[0] <= scale[1] or not 0 <= flip <= 1 or not 0 <= colour < 1:
            raise ValueError(
                f"Augment: want a crop of at least 1 x 1, 0 < low <= high scale, flip in [0, 1] and colour in [0, 1), "
                f"got {tuple(crop)}, {tuple(scale)}, {flip} and {colour}"
            )
        self.crop, self.scale, self.flip, self.colour = tuple(crop), tuple(scale), flip, colour

    def apply(self, image: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Geometry]:
        """Image and labels, moved and tinted, and how they were moved."""
        geometry = self.draw(tuple(labels.shape), generator)
        return self.tint(geometry.image(image), generator), geometry.labels(labels), geometry

    def draw(self, frame: tuple[int, int], generator: torch.Generator) -> Geometry:
        """A window of a frame (H, W): inside it where it fits, else around it."""
        u = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
        low, high = self.scale
        scale = low * (high / low) ** u[0]
        lengths = [max(1, round(size / scale)) for size in self.crop]
        top, left = (
            int(v * (have - length + 1)) if have >= length else -int(v * (length - have + 1))
            for v, have, length in zip(u[1:3], frame, lengths)
        )
        return Geometry(top, left, *lengths, self.crop, u[3] < self.flip)

    def tint(self, image: Tensor, generator: torch.Generator) -> Tensor:
        """Brightness, then contrast about the mean grey, then saturation about each pixel's grey."""
        if not self.colour:
            return image
        brightness, contrast, saturation = (1 + self.colour * (2 * torch.rand(3, generator=generator) - 1)).tolist()
        grey = image.new_tensor((0.299, 0.587, 0.114)).view(3, 1, 1)
        image = (image * brightness).clamp_(0, 1)
        mean = (image * grey).sum(0).mean()
        image = ((image - mean) * contrast + mean).clamp_(0, 1)
        tone = (image * grey).sum(0, keepdim=True)
        return ((image - tone) * saturation + tone).clamp_(0, 1)


class Stream(Dataset):
    """A dataset as training reads it: position 0, 1, 2, ... without end, shuffled anew each epoch and augmented.

    What lies at a position is a function of the seed and the position alone: any number of workers and processes, and a run that
    was stopped and resumed, read the same.

    Args:
        dataset: items (image, labels).
        augment: an `Augment` or a `TorchvisionTransform`; None: items as they are.
        seed: of the order and the draws.
        logits: called with (index, geometry, the frame's (H, W)) for a third entry of the items, see `segfast.engine.teacher`.
    """

    def __init__(
        self,
        dataset: Dataset,
        augment: Augment | TorchvisionTransform | None,
        seed: int = 0,
        logits: Callable[[int, Geometry | Coordinates, tuple[int, int]], Tensor] | None = None,
    ):
        if len(dataset) == 0:
            raise ValueError("Stream: want a dataset with items, got an empty one")
        self.dataset, self.augment, self.seed, self.logits = dataset, augment, seed, logits
        self.epoch, self.order = -1, []

    def index(self, position: int) -> int:
        """The dataset's index at a position."""
        epoch, place = divmod(position, len(self.dataset))
        if epoch != self.epoch:
            self.epoch = epoch
            self.order = torch.randperm(len(self.dataset), generator=generator("order", self.seed, epoch)).tolist()
        return self.order[place]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, position: int) -> tuple[Tensor, ...]:
        index = self.index(position)
        image, labels = self.dataset[index]
        frame = tuple(labels.shape)
        if self.augment is None:
            geometry = Geometry(0, 0, *frame, frame, False)
        else:
            image, labels, geometry = self.augment.apply(image, labels, generator("augment", self.seed, position))
        item = image.contiguous(), labels.contiguous()
        return (*item, self.logits(index, geometry, frame)) if self.logits else item


def generator(*what: str | int) -> torch.Generator:
    """A generator that depends on nothing but `what`."""
    digest = hashlib.blake2b(" ".join(map(str, what)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


class TorchvisionTransform:
    """A joint transform of torchvision.transforms.v2: the augmentation of a `Stream`, or a dataset's `transform`.

    Image and labels go in as a `tv_tensors.Image` and a `tv_tensors.Mask`, and beside them the place of every pixel as a second
    mask, which moves as the first does: any transform that v2 has for masks can be replayed on cached logits. Pixels from outside
    the frame are ignored, whatever fills them.

    In a stream, what is drawn is a function of the stream's seed and position. As a dataset's `transform` the draws are from
    torch's global generator, and a resumed run does not repeat them.

    Args:
        transform: for instance a v2.Compose; it must not change the values of masks.
    """

    def __init__(self, transform: Callable):
        tv_tensors = need("torchvision.tv_tensors", "TorchvisionTransform", "train")
        self.transform, self.image, self.mask = transform, tv_tensors.Image, tv_tensors.Mask

    def __call__(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return self.move(image, labels)[:2]

    def apply(self, image: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Coordinates]:
        """Image and labels, transformed, and where their pixels came from."""
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(generator.get_state())
            return self.move(image, labels)

    def move(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Coordinates]:
        # A transform fills both maps of a mask with one number. Rows count down from -1 and columns up from 0, so that no number
        # is the place of a pixel.
        rows, columns = (torch.arange(size, dtype=torch.float32) for size in labels.shape)
        places = torch.stack([(-1 - rows)[:, None].expand(labels.shape), columns.expand(labels.shape)])
        image, labels, places = self.transform(self.image(image), self.mask(labels), self.mask(places))
        rows, columns = places.as_subclass(Tensor)
        inside = (rows < 0) & (columns >= 0)
        labels = torch.where(inside, labels.as_subclass(Tensor), 255)
        return image.as_subclass(Tensor), labels, Coordinates(-1 - rows, columns, inside)
