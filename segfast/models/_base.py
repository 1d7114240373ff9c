"""What every network has in common: one contract, checked once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from segfast import _backend, ops
from segfast.nn.folding import plainly, quick
from segfast.nn.resize import laid_out, resize


class Output(NamedTuple):
    """What `forward_features` gives.

    logits: (N, classes, h, w) at the network's own stride.
    aux: logits of the auxiliary heads, at theirs; empty without `aux=True`.
    features: intermediate maps by name, from the input on. "pre_logits" is the map that the classifier reads, "stage1",
        "stage2", ... are the encoder's stages; a network may name more.
    """

    logits: Tensor
    aux: tuple[Tensor, ...]
    features: dict[str, Tensor]


@dataclass(frozen=True)
class Preprocessing:
    """How the weights want their images: (image / divisor - mean) / std, channels in this order.

    divisor is 255 where mean and std speak of the range 0 to 1, and 1 where they speak of 0 to 255.
    """

    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    divisor: float = 255.0
    bgr: bool = False

    @classmethod
    def of(cls, about: Mapping) -> Preprocessing:
        """From what JSON keeps of one."""
        return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in about.items()})

    def __call__(self, images: Tensor) -> Tensor:
        """RGB images (N, 3, H, W), uint8 or float in 0 to 255, to what the network takes, float32 or the images' float dtype."""
        images = images if images.is_floating_point() else images.float()
        images = images.flip(1) if self.bgr else images
        mean, std = (images.new_tensor(values).view(1, 3, 1, 1) for values in (self.mean, self.std))
        return (images / self.divisor - mean) / std


def kernels_layout(images: Tensor) -> Tensor:
    """The images, for inference on this package's CPU kernels in channels_last, which is these kernels' own layout."""
    if not (
        quick()
        and images.dim() == 4
        and images.device.type == "cpu"
        and _backend.has_kernel("ds_conv", images)
        and not torch.jit.is_tracing()
    ):
        return images
    return images.contiguous(memory_format=torch.channels_last)


class SegmentationModel(nn.Module):
    """A network that maps images (N, 3, H, W) to logits (N, num_classes, H, W).

    A subclass gives `outputs(images)` and sets what differs from the attributes below.

    idle: beginnings of the names of parameters that official weights hold and their networks count, but that no output reads
        (DistributedDataParallel then wants `find_unused_parameters`).
    """

    name = "network"
    align_corners = False
    min_size = 32
    preprocessing = Preprocessing()
    idle: tuple[str, ...] = ()

    def outputs(self, images: Tensor) -> Output:
        """The network proper; `images` have been checked."""
        raise NotImplementedError

    def forward_features(self, images: Tensor) -> Output:
        """Logits at their own stride, auxiliary logits and named maps.

        Raises:
            TypeError: `images` are not floating-point.
            ValueError: `images` are not (N, 3, H, W), or smaller than the network's strides allow.
        """
        shape = tuple(images.shape)
        if len(shape) != 4 or shape[1] != 3 or min(shape[2:]) < self.min_size:
            raise ValueError(f"{self.name}: want (N, 3, H, W) with H and W at least {self.min_size}, got {shape}")
        if not images.is_floating_point():
            raise TypeError(f"{self.name}: want floating-point images (see `preprocessing`), got {images.dtype}")
        if not quick():
            return self.outputs(images)
        with plainly(self):
            return self.outputs(images)

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) to logits (N, num_classes, H, W), without gradients in the images' memory format."""
        logits = laid_out(self.forward_features(kernels_layout(images)).logits, images)
        return resize(logits, images.shape[2:], self.align_corners)

    def save_pretrained(self, folder: str | Path, *, network: dict | None = None, miou: float | None = None) -> Path:
        """Write model.safetensors, config.json and a model card, the layout of the Hugging Face hub, which can take the folder.

        Args:
            folder: made if need be.
            network: how `create_model` builds it: model, num_classes, backbone, options; and classes and palette, as a weights
                file of a run has them. None: as `create_model` made this one.
            miou: for the card.

        Raises:
            ValueError: `network` builds a network of other tensors.
        """
        from segfast.models import _hub

        return _hub.save_pretrained(self, folder, network=network, miou=miou)

    @staticmethod
    def from_pretrained(source: str | Path, revision: str | None = None) -> SegmentationModel:
        """The network, in evaluation mode, that `save_pretrained` wrote; of any class.

        Args:
            source: the folder, for which no network connection is needed; or a repository, for which huggingface_hub is.
            revision: of the repository.

        Raises:
            FileNotFoundError, ValueError: naming the folder and what is wrong in it.
            ImportError: no such folder, and no huggingface_hub.
        """
        from segfast.models import _hub

        return _hub.from_pretrained(source, revision)

    @torch.no_grad()
    def predict(self, image) -> np.ndarray | Tensor:
        """The class of every pixel, with the preprocessing that the weights want.

        Args:
            image: a PIL image; a uint8 array (H, W, 3), RGB; or a uint8 tensor (3, H, W) or (N, 3, H, W), RGB.

        Returns:
            A uint8 array (H, W), of a tensor a tensor (H, W) or (N, H, W) on its device; int64 with more than 256 classes.

        Raises:
            TypeError, ValueError: anything else, and what `forward_features` raises.
            RuntimeError: the network is in training mode.
        """
        if self.training:
            raise RuntimeError(f"{self.name}: want evaluation mode for predict: call .eval() first")
        if isinstance(image, Tensor):
            pixels = image
            if pixels.dtype != torch.uint8 or pixels.dim() not in (3, 4) or pixels.shape[-3] != 3:
                raise ValueError(
                    f"predict: want a uint8 tensor (3, H, W) or (N, 3, H, W), got {pixels.dtype} {tuple(pixels.shape)}"
                )
        else:
            array = np.asarray(image.convert("RGB") if hasattr(image, "convert") else image)
            if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
                raise ValueError(f"predict: want a PIL image or a uint8 array (H, W, 3), got {array.dtype} {array.shape}")
            pixels = torch.from_numpy(array.copy()).permute(2, 0, 1)
        weight = next(self.parameters())
        batch = self.preprocessing(pixels.reshape(-1, *pixels.shape[-3:]).to(weight.device)).to(weight.dtype)
        logits = self.forward_features(kernels_layout(batch)).logits
        dtype = torch.uint8 if logits.shape[1] <= 256 else torch.int64
        classes = ops.upsample_argmax(logits, batch.shape[2:], self.align_corners, dtype=dtype)
        classes = classes.reshape(*pixels.shape[:-3], *pixels.shape[-2:])
        return classes.to(image.device) if isinstance(image, Tensor) else classes.cpu().numpy()
