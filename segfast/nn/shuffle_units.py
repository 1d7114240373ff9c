"""The units of ShuffleNet, on the fused shuffles."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segfast import _backend, ops
from segfast.nn.convolution import ConvBNAct
from segfast.nn.ds_conv import DSConv
from segfast.ops.channel_shuffle import channel_shuffle_reference


class ShuffleV1Unit(nn.Module):
    """Grouped 1 x 1, shuffle, depthwise 3 x 3, grouped 1 x 1; summed with the input, or at stride 2 put before its average.

    (ShuffleNet, Zhang et al., arXiv:1707.01083, fig. 2b and c; a quarter of the output's channels in the middle.)

    Args:
        in_channels: of the input; at stride 1 those of the output too.
        out_channels: of the output.
        groups: of both 1 x 1 convolutions; divides out_channels / 4.
        stride: 1 or 2.
        first_groups: of the first 1 x 1 convolution; None: `groups`. The network's first unit has 1.
    """

    def __init__(self, in_channels: int, out_channels: int, groups: int, stride: int = 1, first_groups: int | None = None):
        super().__init__()
        if stride not in (1, 2) or (stride == 1 and in_channels != out_channels):
            raise ValueError(
                f"ShuffleV1Unit: want stride 2, or stride 1 and equal channels, got {stride}, {in_channels} and {out_channels}"
            )
        middle = out_channels // 4
        branch = out_channels - (in_channels if stride == 2 else 0)
        self.groups, self.stride = groups, stride
        self.compress = ConvBNAct(in_channels, middle, 1, groups=first_groups or groups)
        self.depthwise = ConvBNAct(middle, middle, 3, stride, groups=middle, act=None)
        self.expand = ConvBNAct(middle, branch, 1, groups=groups, act=None)

    def forward(self, x: Tensor) -> Tensor:
        y = self.compress(x)
        # On other layouts eager's copy is as fast as the kernel: benchmarks/units.json.
        fused = _backend.layout(y) == torch.channels_last
        y = (ops.channel_shuffle if fused else channel_shuffle_reference)(y, self.groups)
        y = self.expand(self.depthwise(y))
        if self.stride == 1:
            return F.relu(x + y)
        return F.relu(torch.cat([y, F.avg_pool2d(x, 3, 2, 1)], 1))


class ShuffleV2Unit(nn.Module):
    """Half of the channels pass by, the other half go 1 x 1, depthwise 3 x 3, 1 x 1; then both are shuffled together.

    At stride 2 all channels go both ways. The depthwise and the last 1 x 1 convolution are one DSConv, concatenation and
    shuffle one copy. (ShuffleNet v2, Ma et al., arXiv:1807.11164, fig. 3c and d.)

    Args:
        in_channels: of the input; at stride 1 those of the output too, even.
        out_channels: of the output, even.
        stride: 1 or 2.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1):
        super().__init__()
        if stride not in (1, 2) or out_channels % 2 or (stride == 1 and in_channels != out_channels):
            raise ValueError(
                "ShuffleV2Unit: want even out_channels and stride 2, or stride 1 and equal channels, "
                f"got {stride}, {in_channels} and {out_channels}"
            )
        half = out_channels // 2
        self.stride = stride
        if stride == 2:
            self.shortcut = DSConv(in_channels, half, 2, dw_act=None)
        self.expand = ConvBNAct(in_channels if stride == 2 else half, half, 1)
        self.separable = DSConv(half, half, stride, dw_act=None)

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 2:
            return ops.concat_shuffle([self.shortcut(x), self.separable(self.expand(x))], 2)
        passing, x = x.chunk(2, 1)
        return ops.concat_shuffle([passing, self.separable(self.expand(x))], 2)
