"""Fast-SCNN: two branches that share their first layers (Poudel, Liwicki and Cipolla, arXiv:1902.04502, table 1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segfast.models._base import Output, SegmentationModel
from segfast.models._registry import Published, register_model
from segfast.nn import DSConv


class ConvBNReLU(nn.Module):
    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1, groups: int = 1, padding: int = 0
    ):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class LinearBottleneck(nn.Module):
    """Expand, depthwise, project, with a residual where shapes allow (MobileNetV2, arXiv:1801.04381, fig. 4d)."""

    def __init__(self, in_channels: int, out_channels: int, expansion: int = 6, stride: int = 1):
        super().__init__()
        hidden = in_channels * expansion
        self.use_shortcut = stride == 1 and in_channels == out_channels
        self.block = nn.Sequential(
            ConvBNReLU(in_channels, hidden, 1),
            ConvBNReLU(hidden, hidden, 3, stride, groups=hidden, padding=1),
            nn.Conv2d(hidden, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x)
        return x + y if self.use_shortcut else y


class PyramidPooling(nn.Module):
    """Averages over 1, 4, 9 and 36 cells put beside the map itself (PSPNet, arXiv:1612.01105, section 3.2)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv1, self.conv2, self.conv3, self.conv4 = (ConvBNReLU(in_channels, in_channels // 4, 1) for _ in range(4))
        self.out = ConvBNReLU(2 * in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        for cells, conv in ((1, self.conv1), (2, self.conv2), (3, self.conv3), (6, self.conv4)):
            maps.append(resize(conv(F.adaptive_avg_pool2d(x, cells)), x.shape[2:]))
        return self.out(torch.cat(maps, 1))


class LearningToDownsample(nn.Module):
    def __init__(self, channels: tuple[int, int, int]):
        super().__init__()
        self.conv = ConvBNReLU(3, channels[0], 3, 2)
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
        self.ppm = PyramidPooling(channels[2], out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.ppm(self.bottleneck3(self.bottleneck2(self.bottleneck1(x))))


class FeatureFusion(nn.Module):
    def __init__(self, high_channels: int, low_channels: int, out_channels: int):
        super().__init__()
        self.dwconv = ConvBNReLU(low_channels, out_channels, 3, groups=low_channels, padding=1)
        self.conv_lower_res = nn.Sequential(nn.Conv2d(out_channels, out_channels, 1), nn.BatchNorm2d(out_channels))
        self.conv_higher_res = nn.Sequential(nn.Conv2d(high_channels, out_channels, 1), nn.BatchNorm2d(out_channels))

    def forward(self, high: Tensor, low: Tensor) -> Tensor:
        low = self.conv_lower_res(self.dwconv(resize(low, high.shape[2:])))
        return F.relu(self.conv_higher_res(high) + low)


class Classifier(nn.Module):
    def __init__(self, channels: int, num_classes: int):
        super().__init__()
        self.dsconv1 = DSConv(channels, channels)
        self.dsconv2 = DSConv(channels, channels)
        self.conv = nn.Sequential(nn.Dropout(0.1), nn.Conv2d(channels, num_classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.dsconv2(self.dsconv1(x)))


class FastSCNN(SegmentationModel):
    """Fast-SCNN. The names of the parameters are those of the usual PyTorch port, whose checkpoints load unchanged.

    Args:
        num_classes: classes of the logits.
        width: factor on every channel count; 1.0 is the published network.
    """

    name = "fast_scnn"
    align_corners = True
    min_size = 3

    def __init__(self, num_classes: int = 19, width: float = 1.0):
        super().__init__()
        self.num_classes = num_classes
        if not width > 0:
            raise ValueError(f"fast_scnn: want width > 0, got {width}")
        c32, c48, c64, c96, c128 = (max(8, 8 * round(c * width / 8)) for c in (32, 48, 64, 96, 128))
        self.learning_to_downsample = LearningToDownsample((c32, c48, c64))
        self.global_feature_extractor = GlobalFeatureExtractor(c64, (c64, c96, c128), c128)
        self.feature_fusion = FeatureFusion(c64, c128, c128)
        self.classifier = Classifier(c128, num_classes)

    def outputs(self, images: Tensor) -> Output:
        high = self.learning_to_downsample(images)
        low = self.global_feature_extractor(high)
        fused = self.feature_fusion(high, low)
        return Output(self.classifier(fused), (), {"stage1": high, "stage2": low, "pre_logits": fused})


def resize(x: Tensor, size) -> Tensor:
    return F.interpolate(x, size, mode="bilinear", align_corners=True)


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
    """Fast-SCNN; `width` scales every channel count."""
    return FastSCNN(num_classes, **options)
