"""Residual units: around a sum, and around a concatenation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from segfast.nn.folding import activate, add, conv_bn_act

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
        return add(x if self.downsample is None else self.downsample(x), y)

    def forward(self, x: Tensor) -> Tensor:
        return activate(self.relu, self.pre_activation(x))


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
