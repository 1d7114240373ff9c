"""ContextNet: a deep branch at low resolution, a shallow one at full (Poudel, Bonde, Liwicki and Zach, arXiv:1805.04554)."""

from __future__ import annotations

from torch import Tensor, nn

from segfast.models._base import Output, SegmentationModel
from segfast.models._keys import SEPARABLE_KEYS, rename
from segfast.models._official import Weights, register_importer, told
from segfast.models._registry import Published, register_model
from segfast.models.fast_scnn import AuxHead, Classifier, FeatureFusion, LinearBottleneck
from segfast.nn import ConvBNAct, DSConv, resize

# The deep branch (table 1): expansion, channels, units, stride.
STAGES = ((1, 32, 1, 1), (6, 32, 1, 1), (6, 48, 3, 2), (6, 64, 3, 2), (6, 96, 2, 1), (6, 128, 2, 1))


class Detail(nn.Module):
    """The shallow branch, to stride 8."""

    def __init__(self):
        super().__init__()
        self.conv = ConvBNAct(3, 32, 3, 2, padding=0)
        self.dsconv1 = DSConv(32, 64, 2)
        self.dsconv2 = DSConv(64, 128, 2)
        self.dsconv3 = DSConv(128, 128)

    def forward(self, x: Tensor) -> Tensor:
        return self.dsconv3(self.dsconv2(self.dsconv1(self.conv(x))))


class Context(nn.Module):
    """The deep branch, to stride 8 of the image that it gets."""

    def __init__(self):
        super().__init__()
        self.conv = ConvBNAct(3, 32, 3, 2, padding=0)
        stages, channels = [], 32
        for expansion, width, units, stride in STAGES:
            stages.append(
                nn.Sequential(
                    LinearBottleneck(channels, width, expansion, stride),
                    *(LinearBottleneck(width, width, expansion) for _ in range(units - 1)),
                )
            )
            channels = width
        self.stages = nn.Sequential(*stages)

    def forward(self, x: Tensor) -> Tensor:
        return self.stages(self.conv(x))


class ContextNet(SegmentationModel):
    """ContextNet.

    Args:
        num_classes: classes of the logits.
        factor: by which the deep branch's image is smaller: 2, 4 or 8.
        aux: adds a head behind the shallow branch (at stride 8).
    """

    name = "contextnet"
    align_corners = True

    def __init__(self, num_classes: int = 19, factor: int = 4, aux: bool = False):
        super().__init__()
        if factor not in (2, 4, 8):
            raise ValueError(f"contextnet: want factor 2, 4 or 8, got {factor!r}")
        self.num_classes, self.factor = num_classes, factor
        self.detail = Detail()
        self.context = Context()
        self.fusion = FeatureFusion(128, 128, 128)
        self.classifier = Classifier(128, num_classes)
        self.aux = AuxHead(128, 32, num_classes) if aux else None

    def outputs(self, images: Tensor) -> Output:
        high = self.detail(images)
        small = (images.shape[2] // self.factor, images.shape[3] // self.factor)
        low = self.context(resize(images, small, align_corners=True))
        fused = self.fusion(high, low)
        aux = () if self.aux is None else (self.aux(high),)
        return Output(self.classifier(fused), aux, {"stage1": high, "stage2": low, "pre_logits": fused})


PYTORCHCV_KEYS = (
    (r"^features_high\.conv1\.", "detail.conv."),
    (r"^features_high\.conv([234])\.", lambda match: f"detail.dsconv{int(match[1]) - 1}."),
    (r"^features_low\.features\.init_block\.", "context.conv."),
    (
        r"^features_low\.features\.stage(\d)\.unit(\d)\.block\.",
        lambda match: f"context.stages.{int(match[1]) - 1}.{int(match[2]) - 1}.",
    ),
    (r"^(context\.stages\.\d\.\d)\.0\.", r"\1.expand."),
    (r"^(context\.stages\.\d\.\d)\.1\.", r"\1.separable.dw_conv."),
    (r"^(context\.stages\.\d\.\d)\.2\.", r"\1.separable.pw_conv."),
    (r"^fusion\.(dw|pw)_conv_low\.", r"fusion.low.\1_conv."),
    (r"^fusion\.conv_high\.", "fusion.high."),
    (r"^head\.conv([12])\.", r"classifier.dsconv\1."),
    (r"^head\.conv3\.", "classifier.conv.1."),
    (r"^aux_head\.conv1\.", "aux.conv."),
    (r"^aux_head\.conv2\.", "aux.classifier.1."),
    *SEPARABLE_KEYS,
)


@register_importer("contextnet", "contextnet12", "contextnet18")
def import_contextnet(name: str, weights: Weights):
    num_classes = weights["head.conv3.weight"].shape[0]
    options = {"aux": "aux_head.conv2.weight" in weights}
    model = told(create(name, num_classes, **options), **options)
    return model, {key: rename(key, PYTORCHCV_KEYS) for key in weights}


def create(name: str, num_classes: int, **options) -> ContextNet:
    return ContextNet(num_classes, factor={"contextnet": 4, "contextnet12": 2, "contextnet18": 8}[name], **options)


COMMON = {
    "paper": "Poudel, Bonde, Liwicki, Zach: ContextNet: Exploring Context and Detail for Semantic Segmentation, arXiv:1805.04554",
    "parameters": 876_563,
    "official": "osmr/pytorchcv (a port; the authors released no code)",
    "licence": "MIT",
}


@register_model(
    macs=6_735_281_824,
    published=Published(
        parameters="0.85 M",
        miou="66.1 test, 65.9 val (Cityscapes)",
        speed="18.3 fps (41.9 pipelined), 1024x2048, Titan X",
        source="arXiv:1805.04554",
    ),
    **COMMON,
)
def contextnet(num_classes: int = 19, **options) -> ContextNet:
    """ContextNet (cn14): the deep branch at a quarter of the resolution; `aux` adds its auxiliary head."""
    return create("contextnet", num_classes, **options)


@register_model(macs=15_078_416_032, **COMMON)
def contextnet12(num_classes: int = 19, **options) -> ContextNet:
    """ContextNet cn12: the deep branch at half the resolution."""
    return create("contextnet12", num_classes, **options)


@register_model(macs=4_651_740_832, **COMMON)
def contextnet18(num_classes: int = 19, **options) -> ContextNet:
    """ContextNet cn18: the deep branch at an eighth of the resolution."""
    return create("contextnet18", num_classes, **options)
