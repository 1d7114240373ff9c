"""SwiftNet, single scale: a ResNet, spatial pyramid pooling and a narrow ladder of skips (Orsic et al., arXiv:1903.08469)."""

from __future__ import annotations

from torch import Tensor, nn

from segfast.backbones import ResNet
from segfast.models._base import Output, Preprocessing, SegmentationModel
from segfast.models._official import Weights, register_importer
from segfast.models._registry import Published, register_model
from segfast.nn import BatchNorm2d, BNActConv, SpatialPyramidPooling, resize
from segfast.nn.folding import add

WIDTH = 128
# of images in 0 to 255, as in the authors' configurations
CITYSCAPES = Preprocessing((73.15, 82.90, 72.3), (47.67, 48.49, 47.73), 1.0)


class Upsample(nn.Module):
    """The coarser map resized onto the skip's, added and blended."""

    def __init__(self, skip_channels: int):
        super().__init__()
        self.bottleneck = BNActConv(skip_channels, WIDTH, 1)
        self.blend_conv = BNActConv(WIDTH, WIDTH, 3)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        skip = self.bottleneck(skip)
        return self.blend_conv(add(resize(x, skip.shape[2:]), skip))


class SwiftNet(SegmentationModel):
    """SwiftNet, single scale.

    Args:
        num_classes: classes of the logits.
        depth: of the ResNet, 18 or 34.
    """

    name = "swiftnet"
    preprocessing = CITYSCAPES

    def __init__(self, num_classes: int = 19, depth: int = 18):
        super().__init__()
        if depth not in (18, 34):
            raise ValueError(f"swiftnet: want depth 18 or 34, got {depth}")
        self.num_classes = num_classes
        self.encoder = ResNet(depth, norm_layer=BatchNorm2d)
        self.spp = SpatialPyramidPooling(512, momentum=0.005)
        self.upsample = nn.ModuleList(Upsample(channels) for channels in (256, 128, 64))
        self.logits = BNActConv(WIDTH, num_classes, 1, bias=True)
        initialise(self)

    def outputs(self, images: Tensor) -> Output:
        # The paper takes its skips before the last ReLU of each stage. The authors' ReLU works in place there, so that their
        # weights have learned skips, and a pyramid pooling, that read the map after it.
        stages = self.encoder(images)
        context = x = self.spp(stages[3])
        for skip, up in zip(stages[2::-1], self.upsample):
            x = up(x, skip)
        features = {f"stage{i + 1}": stage for i, stage in enumerate(stages)}
        return Output(self.logits(x), (), features | {"context": context, "pre_logits": x})


def initialise(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


PAPER = (
    "Orsic, Kreso, Bevandic, Segvic: In Defense of Pre-trained ImageNet Architectures for Real-time Semantic Segmentation of "
    "Road-driving Images, arXiv:1903.08469"
)
OFFICIAL = "orsic/swiftnet"
LICENCE = "GPL-3.0"


@register_model(
    paper=PAPER,
    parameters=11_797_071,
    macs=103_566_133_248,
    published=Published(
        parameters="11.8 M",
        macs="104.0 G at 1024x2048",
        miou="75.4 val, 75.5 test (Cityscapes)",
        speed="39.9 fps, 1024x2048, GTX 1080 Ti",
        source="arXiv:1903.08469; parameters and MACs as FC-HarDNet's README quotes them, val as later ports do",
    ),
    official=OFFICIAL,
    licence=LICENCE,
)
def swiftnet_rn18(num_classes: int = 19, **options) -> SwiftNet:
    """SwiftNetRN-18, single scale."""
    return SwiftNet(num_classes, 18, **options)


@register_model(
    paper=PAPER, parameters=21_905_231, macs=180_875_544_576, official=f"{OFFICIAL} (the code; no weights)", licence=LICENCE
)
def swiftnet_rn34(num_classes: int = 19, **options) -> SwiftNet:
    """SwiftNetRN-34, single scale: the authors' code builds it, their paper does not print it."""
    return SwiftNet(num_classes, 34, **options)


def pop_preprocessing(weights: Weights) -> Preprocessing:
    """The constants that the authors' network keeps in its buffers, taken out of `weights`."""
    mean, std = (tuple(weights.pop(f"backbone.img_{name}").flatten().tolist()) for name in ("mean", "std"))
    scale = weights.pop("backbone.img_scale", None)
    divisors = {1.0} if scale is None else set(scale.flatten().tolist())
    if len(mean) != 3 or len(std) != 3 or len(divisors) != 1:
        raise ValueError(f"load_official: want img_mean and img_std of 3 and one img_scale, got {mean}, {std} and {divisors}")
    return Preprocessing(mean, std, divisors.pop())


@register_importer("swiftnet_rn18", "swiftnet_rn34")
def import_swiftnet(name: str, weights: Weights) -> tuple[nn.Module, dict[str, str]]:
    """The authors' checkpoints of their single-scale ResNet; `img_mean` and `img_std` become the model's preprocessing."""
    model = SwiftNet(weights["logits.conv.bias"].shape[0], int(name.removeprefix("swiftnet_rn")))
    model.preprocessing = pop_preprocessing(weights)
    return model, {key: our_key(key) for key in weights}


def our_key(key: str) -> str:
    """The name here of a tensor of the authors' repository."""
    key = key.removeprefix("backbone.")
    if key.startswith(("conv1.", "bn1.", "layer")):
        return f"encoder.{key}"
    return key.replace("spp.spp.", "spp.", 1)
