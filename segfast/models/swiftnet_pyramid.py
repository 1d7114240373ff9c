"""SwiftNet, pyramidal: one ResNet over three sizes of the image, fused level by level (Orsic and Segvic, 2020)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from segfast.models._base import Output, SegmentationModel
from segfast.models._official import Weights, register_importer
from segfast.models._registry import Published, register_model
from segfast.models.swiftnet import CITYSCAPES, LICENCE, OFFICIAL, WIDTH, initialise, pop_preprocessing
from segfast.nn import BatchNorm2d, BNActConv, resize
from segfast.nn.folding import activate, add, conv_bn_act
from segfast.nn.residual import NOTHING, conv, shortcut

LEVELS = 3


def norms(channels: int) -> nn.ModuleList:
    """A BatchNorm for each level of the pyramid: the levels share the convolutions, not the statistics."""
    return nn.ModuleList(BatchNorm2d(channels) for _ in range(LEVELS))


class BasicBlock(nn.Module):
    """ResNet's unit (arXiv:1512.03385, fig. 5 left) with BatchNorms by level; gives the map before its last ReLU."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = conv(in_channels, out_channels, 3, stride), norms(out_channels)
        self.conv2, self.bn2 = conv(out_channels, out_channels, 3), norms(out_channels)
        self.relu = nn.ReLU()
        self.downsample = shortcut(in_channels, out_channels, stride, BatchNorm2d)

    def forward(self, x: Tensor, level: int) -> Tensor:
        y = conv_bn_act(x, self.conv1, self.bn1[level], self.relu)
        y = conv_bn_act(y, self.conv2, self.bn2[level], NOTHING)
        return add(x if self.downsample is None else conv_bn_act(x, *self.downsample, NOTHING), y)


class Encoder(nn.Module):
    """ResNet-18 with BatchNorms by level; gives its stages' maps before their last ReLU."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.relu = conv(3, 64, 7, 2), norms(64), nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        in_channels = 64
        for i, width in enumerate((64, 128, 256, 512)):
            units = [BasicBlock(in_channels, width, 2 if i else 1), BasicBlock(width, width, 1)]
            self.add_module(f"layer{i + 1}", nn.ModuleList(units))
            in_channels = width

    def forward(self, x: Tensor, level: int) -> list[Tensor]:
        x = self.maxpool(conv_bn_act(x, self.conv1, self.bn1[level], self.relu))
        maps = []
        for first, second in (self.layer1, self.layer2, self.layer3, self.layer4):
            before = second(activate(self.relu, first(x, level)), level)
            maps.append(before)
            x = self.relu(before)
        return maps


class Blend(nn.Module):
    def __init__(self):
        super().__init__()
        self.blend_conv = BNActConv(WIDTH, WIDTH, 3)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.blend_conv(add(resize(x, skip.shape[2:]), skip))


class SwiftNetPyramid(SegmentationModel):
    """SwiftNet with pyramidal fusion: images at 1, 1/2 and 1/4 size through one encoder, without pyramid pooling.

    Args:
        num_classes: classes of the logits.
    """

    name = "swiftnet_pyramid"
    preprocessing = CITYSCAPES

    def __init__(self, num_classes: int = 19):
        super().__init__()
        self.num_classes = num_classes
        self.encoder = Encoder()
        self.bottlenecks = nn.ModuleList(nn.Conv2d(channels, WIDTH, 1, bias=False) for channels in (64, 128, 256, 512))
        self.blends = nn.ModuleList(Blend() for _ in range(2 + LEVELS))
        self.logits = BNActConv(WIDTH, num_classes, 1, bias=True)
        initialise(self)

    def outputs(self, images: Tensor) -> Output:
        height, width = images.shape[2:]
        # skips[i]: the sum over the levels of what they see at 1 / 2^(i + 2) of the image
        skips: list[Tensor | None] = [None] * (3 + LEVELS)
        features = {}
        for level in range(LEVELS):
            image = images
            if level:
                # rounded up, as the encoder's strides round, so that the levels' maps agree at every size
                size = [(side + 2**level - 1) // 2**level for side in (height, width)]
                image = F.interpolate(images, size, mode="bicubic", align_corners=False)
            for i, (stage, bottleneck) in enumerate(zip(self.encoder(image, level), self.bottlenecks)):
                skip = bottleneck(stage)
                seen = skips[i + level]
                skips[i + level] = skip if seen is None else add(seen, skip)
                features[f"stage{i + 1}" if not level else f"level{level + 1}_stage{i + 1}"] = stage
        x = skips[-1]
        for skip, blend in zip(skips[-2::-1], self.blends):
            x = blend(x, skip)
        return Output(self.logits(x), (), features | {"pre_logits": x})


@register_model(
    paper=(
        "Orsic, Segvic: Efficient Semantic Segmentation with Pyramidal Fusion, Pattern Recognition 110, 2021; the pyramid "
        "is that of arXiv:1903.08469"
    ),
    parameters=12_056_275,
    macs=128_192_610_304,
    published=Published(source="the papers print figures of other configurations than the authors' repository"),
    official=OFFICIAL,
    licence=LICENCE,
)
def swiftnet_rn18_pyramid(num_classes: int = 19, **options) -> SwiftNetPyramid:
    """SwiftNetRN-18 over a pyramid of three levels, as configured in the authors' repository."""
    return SwiftNetPyramid(num_classes, **options)


@register_importer("swiftnet_rn18_pyramid")
def import_swiftnet_pyramid(name: str, weights: Weights) -> tuple[nn.Module, dict[str, str]]:
    """The authors' checkpoints of their pyramid; `img_mean` and `img_std` become the model's preprocessing."""
    model = SwiftNetPyramid(weights["logits.conv.bias"].shape[0])
    model.preprocessing = pop_preprocessing(weights)
    return model, {key: our_key(key) for key in weights}


def our_key(key: str) -> str:
    """The name here of a tensor of the authors' repository."""
    key = key.removeprefix("backbone.")
    if key.startswith(("conv1.", "bn1.", "layer")):
        return f"encoder.{key}"
    if key.startswith("upsample_bottlenecks."):
        _, index, rest = key.split(".")
        return f"bottlenecks.{3 - int(index)}.{rest}"  # theirs run from the coarsest stage
    return key.replace("upsample_blends.", "blends.", 1)
