"""Random scale, crop, flip and colour, drawn from a generator of one's own, so that a draw can be repeated and replayed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset


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
        axes = []
        for start, length, size, cells, pixels in zip(
            (self.top, self.left), (self.height, self.width), self.size, logits.shape[1:], frame
        ):
            count = max(1, round(size * cells / pixels))
            if align_corners:
                at = torch.linspace(0, size - 1, count)
            else:
                at = (torch.arange(count) + 0.5) * (size / count) - 0.5
            at = start + (at + 0.5) * (length / size) - 0.5  # the pixel of the frame
            axes.append(2 * at / max(pixels - 1, 1) - 1 if align_corners else (2 * at + 1) / pixels - 1)
        rows, columns = axes
        columns = columns.flip(0) if self.mirrored else columns
        grid = torch.stack([columns.expand(len(rows), -1), rows[:, None].expand(-1, len(columns))], -1)
        return F.grid_sample(logits[None].float(), grid[None], padding_mode="border", align_corners=align_corners)[0]

    def window(self, x: Tensor, fill: float) -> Tensor:
        height, width = x.shape[-2:]
        outside = (-self.left, self.left + self.width - width, -self.top, self.top + self.height - height)
        outside = tuple(max(0, v) for v in outside)
        cut = x[..., max(0, self.top) : self.top + self.height, max(0, self.left) : self.left + self.width]
        return F.pad(cut, outside, value=fill) if any(outside) else cut


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
        augment: None: items as they are.
        seed: of the order and the draws.
        logits: called with (index, geometry, the frame's (H, W)) for a third entry of the items, see `segfast.engine.teacher`.
    """

    def __init__(
        self,
        dataset: Dataset,
        augment: Augment | None,
        seed: int = 0,
        logits: Callable[[int, Geometry, tuple[int, int]], Tensor] | None = None,
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
            draws = generator("augment", self.seed, position)
            geometry = self.augment.draw(frame, draws)
            image, labels = self.augment.tint(geometry.image(image), draws), geometry.labels(labels)
        item = image.contiguous(), labels.contiguous()
        return (*item, self.logits(index, geometry, frame)) if self.logits else item


def generator(*what: str | int) -> torch.Generator:
    """A generator that depends on nothing but `what`."""
    digest = hashlib.blake2b(" ".join(map(str, what)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


class TorchvisionTransform:
    """A joint transform of torchvision.transforms.v2 as a dataset's `transform`.

    The image goes in as a `tv_tensors.Image`, the labels as a `tv_tensors.Mask`, in one call, so that both move together. Fill
    masks with 255, as in v2.RandomCrop(size, pad_if_needed=True, fill={tv_tensors.Image: 0, tv_tensors.Mask: 255}). The draws
    are from torch's global generator: they are not part of what a resumed run repeats.

    Args:
        transform: for instance a v2.Compose.
    """

    def __init__(self, transform: Callable):
        try:
            from torchvision import tv_tensors
        except ImportError as error:
            raise ImportError("TorchvisionTransform: want torchvision: pip install 'segfast[train]'") from error
        self.transform, self.image, self.mask = transform, tv_tensors.Image, tv_tensors.Mask

    def __call__(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        image, labels = self.transform(self.image(image), self.mask(labels))
        return torch.Tensor(image.as_subclass(Tensor)), labels.as_subclass(Tensor)
