"""Fast-SCNN: two branches that share their first layers (Poudel, Liwicki and Cipolla, arXiv:1902.04502, table 1)."""

from __future__ import annotations

from torch import Tensor, nn

from segfast.models._base import Output, SegmentationModel
from segfast.models._keys import SEPARABLE_KEYS, rename
from segfast.models._official import Weights, register_importer, told
from segfast.models._registry import Published, register_model
from segfast.nn import ConvBNAct, DSConv, PyramidPooling, resize
from segfast.nn.folding import add


class LinearBottleneck(nn.Module):
    """Expand, depthwise, project, with a residual where shapes allow (MobileNetV2, arXiv:1801.04381, fig. 4d)."""

    def __init__(self, in_channels: int, out_channels: int, expansion: int = 6, stride: int = 1):
        super().__init__()
        hidden = in_channels * expansion
        self.use_shortcut = stride == 1 and in_channels == out_channels
        self.expand = ConvBNAct(in_channels, hidden, 1)
        self.separable = DSConv(hidden, out_channels, stride, act=None)

    def forward(self, x: Tensor) -> Tensor:
        y = self.separable(self.expand(x))
        return add(x, y) if self.use_shortcut else y


class LearningToDownsample(nn.Module):
    def __init__(self, channels: tuple[int, int, int]):
        super().__init__()
        self.conv = ConvBNAct(3, channels[0], 3, 2, padding=0)
        self.dsconv1 = DSConv(channels[0], channels[1], 2)
        self.dsconv2 = DSConv(channels[1], channels[2], 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.dsconv2(self.dsconv1(self.conv(x)))


class GlobalFeatureExtractor(nn.Module):
    def __init__(self, in_channels: int, channels: tuple[int, int, int], out_channels: int):
        super().__init__()
        widths = (in_channels, *channels)
        stages = [
            nn.Sequential(
                LinearBottleneck(widths[i], widths[i + 1], stride=stride),
                *(LinearBottleneck(widths[i + 1], widths[i + 1]) for _ in range(2)),
            )
            for i, stride in enumerate((2, 2, 1))
        ]
        self.bottleneck1, self.bottleneck2, self.bottleneck3 = stages
        self.ppm = PyramidPooling(channels[2], channels[2] // 4, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.ppm(self.bottleneck3(self.bottleneck2(self.bottleneck1(x))))


class FeatureFusion(nn.Module):
    """The low resolution, made larger, through a depthwise and a pointwise convolution, plus the high one through a pointwise."""

    def __init__(self, high_channels: int, low_channels: int, out_channels: int):
        super().__init__()
        self.low = DSConv(low_channels, out_channels, act=None)
        self.low.conv[3] = nn.Conv2d(low_channels, out_channels, 1)
        self.high = ConvBNAct(high_channels, out_channels, 1, bias=True, act=None)

    def forward(self, high: Tensor, low: Tensor) -> Tensor:
        return add(self.high(high), self.low(resize(low, high.shape[2:], align_corners=True)), relu=True)


class Classifier(nn.Module):
    def __init__(self, channels: int, num_classes: int):
        super().__init__()
        self.dsconv1 = DSConv(channels, channels)
        self.dsconv2 = DSConv(channels, channels)
        self.conv = nn.Sequential(nn.Dropout(0.1), nn.Conv2d(channels, num_classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.dsconv2(self.dsconv1(x)))


class AuxHead(nn.Module):
    def __init__(self, in_channels: int, channels: int, num_classes: int):
        super().__init__()
        self.conv = ConvBNAct(in_channels, channels, 3)
        self.classifier = nn.Sequential(nn.Dropout(0.1), nn.Conv2d(channels, num_classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.conv(x))


class FastSCNN(SegmentationModel):
    """Fast-SCNN.

    Args:
        num_classes: classes of the logits.
        width: factor on every channel count; 1.0 is the published network.
        aux: adds a head behind the first three convolutions (at stride 8).
        aux_channels: of that head's 3 x 3 convolution.
    """

    name = "fast_scnn"
    align_corners = True
    min_size = 3

    def __init__(self, num_classes: int = 19, width: float = 1.0, aux: bool = False, aux_channels: int = 32):
        super().__init__()
        self.num_classes = num_classes
        if not width > 0:
            raise ValueError(f"fast_scnn: want width > 0, got {width}")
        c32, c48, c64, c96, c128 = (max(8, 8 * round(c * width / 8)) for c in (32, 48, 64, 96, 128))
        self.learning_to_downsample = LearningToDownsample((c32, c48, c64))
        self.global_feature_extractor = GlobalFeatureExtractor(c64, (c64, c96, c128), c128)
        self.feature_fusion = FeatureFusion(c64, c128, c128)
        self.classifier = Classifier(c128, num_classes)
        self.aux = AuxHead(c64, aux_channels, num_classes) if aux else None

    def outputs(self, images: Tensor) -> Output:
        high = self.learning_to_downsample(images)
        low = self.global_feature_extractor(high)
        fused = self.feature_fusion(high, low)
        aux = () if self.aux is None else (self.aux(high),)
        return Output(self.classifier(fused), aux, {"stage1": high, "stage2": low, "pre_logits": fused})


TRAMAC_KEYS = (
    (r"^learning_to_downsample\.conv\.conv\.", "learning_to_downsample.conv."),
    (r"\.block\.0\.conv\.", ".expand."),
    (r"\.block\.1\.conv\.", ".separable.conv."),
    (r"\.block\.([23])\.", lambda match: f".separable.conv.{int(match[1]) + 1}."),
    (r"\.ppm\.conv([1-4])\.conv\.", lambda match: f".ppm.branches.{int(match[1]) - 1}."),
    (r"\.ppm\.out\.conv\.", ".ppm.project."),
    (r"^feature_fusion\.dwconv\.conv\.", "feature_fusion.low.conv."),
    (r"^feature_fusion\.conv_lower_res\.([01])\.", lambda match: f"feature_fusion.low.conv.{int(match[1]) + 3}."),
    (r"^feature_fusion\.conv_higher_res\.", "feature_fusion.high."),
    (r"^auxlayer\.4\.", "aux.classifier.1."),
    (r"^auxlayer\.", "aux.conv."),
    (
        r"(\.expand|\.branches\.\d|\.project|\.high|^aux\.conv|^learning_to_downsample\.conv)\.([01])\.",
        lambda match: f"{match[1]}.{('conv', 'bn')[int(match[2])]}.",
    ),
)
PYTORCHCV_KEYS = (
    (r"^stem\.conv1\.", "learning_to_downsample.conv."),
    (r"^stem\.conv([23])\.", lambda match: f"learning_to_downsample.dsconv{int(match[1]) - 1}."),
    (
        r"^features\.features\.stage(\d)\.unit(\d)\.",
        lambda match: f"global_feature_extractor.bottleneck{match[1]}.{int(match[2]) - 1}.",
    ),
    (r"^pool\.branches\.branch([2-5])\.conv\.", lambda match: f"global_feature_extractor.ppm.branches.{int(match[1]) - 2}."),
    (r"^pool\.conv\.", "global_feature_extractor.ppm.project."),
    (r"^fusion\.low_(dw|pw)_conv\.", r"feature_fusion.low.\1_conv."),
    (r"^fusion\.high_conv\.", "feature_fusion.high."),
    (r"^head\.conv([12])\.", r"classifier.dsconv\1."),
    (r"^head\.conv3\.", "classifier.conv.1."),
    (r"^aux_head\.conv1\.", "aux.conv."),
    (r"^aux_head\.conv2\.", "aux.classifier.1."),
    (r"(bottleneck\d\.\d\.)conv1\.", r"\1expand."),
    (r"(bottleneck\d\.\d\.)conv2\.", r"\1separable.dw_conv."),
    (r"(bottleneck\d\.\d\.)conv3\.", r"\1separable.pw_conv."),
    *SEPARABLE_KEYS,
)


@register_importer("fast_scnn")
def import_fast_scnn(name: str, weights: Weights):
    pytorchcv = any(key.startswith("stem.") for key in weights)
    classifier, aux = ("head.conv3", "aux_head.conv1.conv") if pytorchcv else ("classifier.conv.1", "auxlayer.0")
    options = {"aux": True, "aux_channels": weights[f"{aux}.weight"].shape[0]} if f"{aux}.weight" in weights else {}
    model = told(FastSCNN(weights[f"{classifier}.weight"].shape[0], **options), **options)
    return model, {key: rename(key, PYTORCHCV_KEYS if pytorchcv else TRAMAC_KEYS) for key in weights}


@register_model(
    paper="Poudel, Liwicki, Cipolla: Fast-SCNN: Fast Semantic Segmentation Network, arXiv:1902.04502",
    parameters=1_138_051,
    macs=6_708_323_168,
    published=Published(
        parameters="1.11 M",
        miou="68.0 test, 68.6 val (Cityscapes)",
        speed="123.5 fps, 1024x2048, Titan Xp",
        source="arXiv:1902.04502, tables 3 and 4",
    ),
    official="Tramac/Fast-SCNN-pytorch (a port; the authors released no code)",
    licence="Apache-2.0",
)
def fast_scnn(num_classes: int = 19, **options) -> FastSCNN:
    """Fast-SCNN; `width` scales every channel count, `aux` adds its auxiliary head."""
    return FastSCNN(num_classes, **options)
