"""U-Net: encoder maps put beside the decoder's (Ronneberger, Fischer and Brox, MICCAI 2015, arXiv:1505.04597)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from segfast.backbones import create_backbone
from segfast.models._base import Output, SegmentationModel
from segfast.models._registry import Published, register_model
from segfast.models.espnet import crop
from segfast.nn import ConvBNAct


def double(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(ConvBNAct(in_channels, out_channels), ConvBNAct(out_channels, out_channels))


class Contracting(nn.Module):
    """The paper's left side: two convolutions a stage, maximum over 2 x 2 in between (an odd last row or column counts)."""

    def __init__(self, channels: tuple[int, ...]):
        super().__init__()
        self.channels, self.strides = channels, tuple(2**i for i in range(len(channels)))
        self.stages = nn.ModuleList(double(*pair) for pair in zip((3, *channels), channels))
        self.pool = nn.MaxPool2d(2, ceil_mode=True)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for stage in self.stages:
            maps.append(stage(self.pool(maps[-1]) if maps else x))
        return maps


class Expanding(nn.Module):
    """Transposed convolution, the skip connection put beside it, two convolutions."""

    def __init__(self, in_channels: int, skip_channels: int, stride: int):
        super().__init__()
        self.up = nn.ConvTranspose2d(in_channels, skip_channels, stride, stride)
        self.convs = double(2 * skip_channels, skip_channels)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = crop(self.up(x), skip)
        return self.convs(torch.cat((skip, x), 1))


class UNet(SegmentationModel):
    """U-Net with padded convolutions, so that any size works, and BatchNorm; logits at the stride of the encoder's first map.

    Args:
        num_classes: classes of the logits.
        width: channels of the first stage, doubled at each of the four others; 64 in the paper. Not with a backbone.
        backbone: the encoder, one of `segfast.list_backbones()`; None: the paper's.
    """

    name = "unet"

    def __init__(self, num_classes: int = 19, width: int = 64, backbone: str | None = None):
        super().__init__()
        if isinstance(width, bool) or not isinstance(width, int) or width < 1:
            raise ValueError(f"unet: want width >= 1, got {width!r}")
        self.num_classes = num_classes
        if backbone is not None and width != 64:
            raise ValueError(f"unet: want no width with a backbone, got {width}")
        self.encoder = Contracting(tuple(width << i for i in range(5))) if backbone is None else create_backbone(backbone)
        channels, strides = self.encoder.channels, self.encoder.strides
        self.decoders = nn.ModuleList(
            Expanding(channels[i + 1], channels[i], strides[i + 1] // strides[i]) for i in range(len(channels) - 1)
        )
        self.classifier = nn.Conv2d(channels[0], num_classes, 1)

    def outputs(self, images: Tensor) -> Output:
        maps = self.encoder(images)
        features = {f"stage{i}": x for i, x in enumerate(maps, 1)}
        x = maps.pop()
        for decoder, skip in zip(reversed(self.decoders), reversed(maps)):
            x = decoder(x, skip)
        features["pre_logits"] = x
        return Output(self.classifier(x), (), features)


@register_model(
    paper="Ronneberger, Fischer, Brox: U-Net: Convolutional Networks for Biomedical Image Segmentation, arXiv:1505.04597",
    parameters=31_038_803,
    macs=385_943_076_864,
    size=(512, 1024),
    published=Published(source="arXiv:1505.04597 prints no count; its convolutions are not padded and have no BatchNorm"),
)
def unet(num_classes: int = 19, **options) -> UNet:
    """U-Net; `width` is that of its first stage, `backbone` another encoder."""
    return UNet(num_classes, **options)
