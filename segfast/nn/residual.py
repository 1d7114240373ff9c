"""Residual units: around a sum, and around a concatenation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from segfast.nn.convolution import Activation, ConvBNAct, activation, require
from segfast.nn.ds_conv import DSConv
from segfast.nn.folding import activate, add, conv_bn_act, joined

NormLayer = Callable[[int], nn.Module]
NOTHING = nn.Identity()


def conv(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, dilation: int = 1, groups: int = 1) -> nn.Conv2d:
    """A convolution without bias that keeps the size at stride 1."""
    padding = dilation * (kernel_size - 1) // 2
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias=False)


class ResidualUnit(nn.Module):
    """What ResNet's units share: y = relu(branch(x) + shortcut(x)), the shortcut a 1 x 1 convolution where shapes change.

    `pre_activation(x)` is the sum before the ReLU, which SwiftNet's skip connections and overhaul distillation read. The
    parameters have torchvision's names.
    """

    expansion = 1
    downsample: nn.Module | None

    def branch(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def pre_activation(self, x: Tensor) -> Tensor:
        y = self.branch(x)
        return add(x if self.downsample is None else self.downsample(x), y, by=self)

    def forward(self, x: Tensor) -> Tensor:
        return activate(self.relu, self.pre_activation(x), self)


def shortcut(in_channels: int, out_channels: int, stride: int, norm_layer: NormLayer) -> nn.Module | None:
    """Nothing where shapes are kept, else a strided 1 x 1 convolution and a BatchNorm (ResNet's option B)."""
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(conv(in_channels, out_channels, 1, stride), norm_layer(out_channels))


class BasicBlock(ResidualUnit):
    """Two 3 x 3 convolutions (ResNet, He et al., arXiv:1512.03385, fig. 5 left).

    Args:
        in_channels: of the input.
        channels: of both convolutions and the output.
        stride: of the first convolution.
        dilation: of the second convolution.
        first_dilation: of the first; None: `dilation`.
        norm_layer: called with the channel count.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int = 1,
        dilation: int = 1,
        first_dilation: int | None = None,
        norm_layer: NormLayer = nn.BatchNorm2d,
    ):
        super().__init__()
        self.conv1 = conv(in_channels, channels, 3, stride, first_dilation or dilation)
        self.bn1 = norm_layer(channels)
        self.relu = nn.ReLU()
        self.conv2 = conv(channels, channels, 3, 1, dilation)
        self.bn2 = norm_layer(channels)
        self.downsample = shortcut(in_channels, channels, stride, norm_layer)

    def branch(self, x: Tensor) -> Tensor:
        x = conv_bn_act(x, self.conv1, self.bn1, self.relu)
        return conv_bn_act(x, self.conv2, self.bn2, NOTHING)


class Bottleneck(ResidualUnit):
    """1 x 1 to fewer channels, 3 x 3, 1 x 1 to four times as many (ResNet, arXiv:1512.03385, fig. 5 right).

    The stride is that of the 3 x 3 convolution, as in torchvision ("ResNet v1.5").

    Args:
        in_channels: of the input.
        channels: of the 3 x 3 convolution; the output has `expansion` (4) times as many.
        stride: of the 3 x 3 convolution.
        dilation: of the 3 x 3 convolution.
        first_dilation: takes the place of `dilation`, if given.
        norm_layer: called with the channel count.
    """

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int = 1,
        dilation: int = 1,
        first_dilation: int | None = None,
        norm_layer: NormLayer = nn.BatchNorm2d,
    ):
        super().__init__()
        out_channels = channels * self.expansion
        self.conv1 = conv(in_channels, channels, 1)
        self.bn1 = norm_layer(channels)
        self.conv2 = conv(channels, channels, 3, stride, first_dilation or dilation)
        self.bn2 = norm_layer(channels)
        self.conv3 = conv(channels, out_channels, 1)
        self.bn3 = norm_layer(out_channels)
        self.relu = nn.ReLU()
        self.downsample = shortcut(in_channels, out_channels, stride, norm_layer)

    def branch(self, x: Tensor) -> Tensor:
        x = conv_bn_act(x, self.conv1, self.bn1, self.relu)
        x = conv_bn_act(x, self.conv2, self.bn2, self.relu)
        return conv_bn_act(x, self.conv3, self.bn3, NOTHING)


class InvertedResidual(nn.Module):
    """1 x 1 to more channels, depthwise, linear 1 x 1 to fewer; summed with the input where shapes allow.

    (MobileNetV2, Sandler et al., arXiv:1801.04381, fig. 4d.) The depthwise and the last convolution are one DSConv.
    Children: `expand` (missing at expansion 1) and `separable`.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        stride: of the depthwise convolution.
        expansion: channels in the middle over in_channels.
        kernel_size: of the depthwise convolution, odd.
        dilation: of the depthwise convolution.
        act: after the first two convolutions: "relu", "relu6", "silu", "hardswish" or None.

    Raises:
        ValueError: an even kernel, no channels, no stride, an unknown activation.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        expansion: float = 6,
        kernel_size: int = 3,
        dilation: int = 1,
        act: str | None = "relu6",
    ):
        super().__init__()
        middle = round(in_channels * expansion)
        counts = {"in_channels": in_channels, "out_channels": out_channels, "stride": stride, "in_channels * expansion": middle}
        require("InvertedResidual", kernel_size=kernel_size, **counts)
        self.use_shortcut = stride == 1 and in_channels == out_channels
        if middle != in_channels:
            self.expand = ConvBNAct(in_channels, middle, 1, act=act)
        options = {"kernel_size": kernel_size, "dilation": dilation, "dw_act": act, "act": None}
        self.separable = DSConv(middle, out_channels, stride, **options)

    def forward(self, x: Tensor) -> Tensor:
        y = self.separable(self.expand(x) if hasattr(self, "expand") else x)
        return x + y if self.use_shortcut else y


class ESP(nn.Module):
    """Reduce to a part of the channels, convolve it at several dilations, merge (ESPNet, arXiv:1803.06815, fig. 1 and 2).

    Hierarchical feature fusion: from the third dilation on each map is added to the one before, which takes the gridding out
    of large dilations; all are concatenated, the input is added, and BatchNorm and activation follow. Rate i has dilation 2^i;
    the first has the channels that the division leaves over. Children: `reduce`, `branches`, `bn`, `act`.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        stride: of `reduce`: 1 (a 1 x 1 convolution) or 2 (3 x 3).
        residual: whether the input is added; None: where its shape allows.
        rates: number of dilations; fewer where there are fewer output channels.
        act: see `segfast.nn.activation`.
        eps: of the BatchNorm.

    Raises:
        ValueError: a residual that does not fit, another stride, no channels or no rates.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        residual: bool | None = None,
        rates: int = 5,
        act: Activation = "prelu",
        eps: float = 1e-3,
    ):
        super().__init__()
        require("ESP", in_channels=in_channels, out_channels=out_channels, rates=rates)
        fits = stride == 1 and in_channels == out_channels
        if stride not in (1, 2) or (residual and not fits):
            raise ValueError(
                "ESP: want stride 1 or 2, and a residual with stride 1 and equal channels alone, "
                f"got {stride=}, {residual=}, {in_channels} and {out_channels} channels"
            )
        self.residual = fits if residual is None else residual
        rates = min(rates, out_channels)
        width = out_channels // rates
        widths = [out_channels - (rates - 1) * width, *(width for _ in range(rates - 1))]
        self.reduce = conv(in_channels, width, 3 if stride == 2 else 1, stride)
        self.branches = nn.ModuleList(conv(width, channels, 3, 1, 1 << i) for i, channels in enumerate(widths))
        self.bn = nn.BatchNorm2d(out_channels, eps=eps)
        self.act = activation(act, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        reduced = self.reduce(x)
        maps = [branch(reduced) for branch in self.branches]
        for i in range(2, len(maps)):
            maps[i] = add(maps[i - 1], maps[i], by=self)
        more = x if self.residual else None
        y = joined(maps, self.bn, self.act, more, by=self)
        if y is not None:
            return y
        y = torch.cat(maps, 1)
        return self.act(self.bn(add(x, y, by=self) if self.residual else y))


class Residual(nn.Module):
    """x + layers(x).

    Args:
        layers: keep the shape.
    """

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class SkipConcat(nn.Module):
    """cat(x, layers(x)) along channels (U-Net, arXiv:1505.04597; DenseNet).

    Args:
        layers: keep N, H and W.
    """

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.layers(x)], 1)
