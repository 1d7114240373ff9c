"""Convolution, BatchNorm, activation, and the convolutions that light networks are made of."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from segfast._backend import is_whole
from segfast.nn.channel_shuffle import ChannelShuffle
from segfast.nn.folding import SCALES, conv_bn_act
from segfast.nn.resize import resize

Activation = str | Callable[[int], nn.Module] | None

_ACTIVATIONS: dict[str, Callable[[int], nn.Module]] = {
    "relu": lambda channels: nn.ReLU(),
    "relu6": lambda channels: nn.ReLU6(),
    "leaky_relu": lambda channels: nn.LeakyReLU(),
    "prelu": lambda channels: nn.PReLU(channels),
    "silu": lambda channels: nn.SiLU(),
    "hardswish": lambda channels: nn.Hardswish(),
    "gelu": lambda channels: nn.GELU(),
}


def activation(act: Activation, channels: int) -> nn.Module:
    """A new activation of `channels` channels: by name, by a function of the channels, or nothing for None.

    Raises:
        ValueError: no such name.
    """
    if act is None:
        return nn.Identity()
    if callable(act):
        return act(channels)
    if act not in _ACTIVATIONS:
        raise ValueError(f"activation: want one of {', '.join(_ACTIVATIONS)}, None or a function of the channels, got {act!r}")
    return _ACTIVATIONS[act](channels)


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    """(value, value) of an int; a pair as it is."""
    return (value, value) if is_whole(value) else tuple(value)


def require(block: str, *, kernel_size: int | None = None, **counts: int) -> None:
    """What a block is made of: whole numbers of at least 1, and a kernel that can keep the size.

    Raises:
        ValueError: naming the block, what it wants and what it got.
    """
    for name, value in counts.items():
        if not is_whole(value) or value < 1:
            raise ValueError(f"{block}: want {name} >= 1, got {value!r}")
    if kernel_size is not None and not (is_whole(kernel_size) and kernel_size >= 1 and kernel_size % 2):
        raise ValueError(f"{block}: want an odd kernel_size, got {kernel_size!r}")


def same_padding(kernel_size: int | tuple[int, int], dilation: int | tuple[int, int] = 1) -> tuple[int, int]:
    """dilation * (k - 1) // 2: an odd kernel keeps the size at stride 1 and gives ceil(size / stride) at others."""
    return tuple(d * (k - 1) // 2 for k, d in zip(pair(kernel_size), pair(dilation)))


class BatchNorm2d(nn.BatchNorm2d):
    """BatchNorm that also trains on one value a channel (a pooled branch at batch 1), where it uses the running statistics.

    The variance of one value is 0: the batch's statistics would make every output `bias`, and PyTorch refuses. With the
    running statistics the branch still sees its input; they are not updated by such a batch.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.running_mean is not None and x.shape[0] * x.shape[2] * x.shape[3] == 1:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        return super().forward(x)


SCALES.add(BatchNorm2d.forward)


class ConvBNAct(nn.Sequential):
    """Convolution, BatchNorm, activation: children `conv`, `bn` and `act`.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        kernel_size: an int or a pair.
        stride: an int or a pair.
        padding: zeros on each side, an int or a pair; None: dilation * (kernel_size - 1) // 2, "same" for odd kernels.
        dilation: an int or a pair.
        groups: divides both channel counts.
        bias: whether the convolution has one.
        act: "relu", "relu6", "leaky_relu", "prelu" (a slope a channel), "silu", "hardswish", "gelu", None, or a function of
            the channel count that gives a module.
        norm_layer: called with the channel count; `segfast.nn.BatchNorm2d` where the map may be 1 x 1.

    Raises:
        ValueError: an unknown activation, no channels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 3,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | None = None,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = False,
        act: Activation = "relu",
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ):
        super().__init__()
        require("ConvBNAct", in_channels=in_channels, out_channels=out_channels)
        padding = same_padding(kernel_size, dilation) if padding is None else padding
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        self.bn = norm_layer(out_channels)
        self.act = activation(act, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        if len(self._modules) != 3:
            return super().forward(x)
        return conv_bn_act(x, *self._modules.values())


class ShuffledConv(nn.Sequential):
    """A grouped convolution, BatchNorm, activation, and a shuffle, so that the next grouped convolution sees all groups.

    (ShuffleNet, Zhang et al., arXiv:1707.01083, fig. 1c.) Children `conv`, `bn`, `act` and `shuffle`.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        kernel_size: odd; the size is kept at stride 1.
        groups: divides both channel counts.
        stride: of the convolution.
        dilation: of the convolution.
        act: see `segfast.nn.activation`.

    Raises:
        ValueError: groups that do not divide the channels, an even kernel, no channels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        groups: int = 2,
        stride: int = 1,
        dilation: int = 1,
        act: Activation = "relu",
    ):
        super().__init__()
        require("ShuffledConv", kernel_size=kernel_size, in_channels=in_channels, out_channels=out_channels)
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(f"ShuffledConv: want groups that divide the channels, got {in_channels}, {out_channels}, {groups=}")
        padding = same_padding(kernel_size, dilation)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        self.act = activation(act, out_channels)
        self.shuffle = ChannelShuffle(groups)


class AsymmetricConv(nn.Sequential):
    """k x 1, then 1 x k, in the place of k x k: BatchNorm and activation after each (ENet, arXiv:1606.02147; ERFNet).

    The size is that of a k x k convolution with the same padding for every odd k, stride and dilation: kept at stride 1.
    Children `vertical` and `horizontal`, a ConvBNAct each.

    Args:
        in_channels: of the input.
        out_channels: of both convolutions.
        kernel_size: odd.
        stride: the rows' in the first, the columns' in the second convolution.
        dilation: of both.
        act: see `segfast.nn.activation`.

    Raises:
        ValueError: an even kernel, no channels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        dilation: int = 1,
        act: Activation = "relu",
    ):
        super().__init__()
        require("AsymmetricConv", kernel_size=kernel_size, in_channels=in_channels, out_channels=out_channels)
        k, d = kernel_size, dilation
        self.vertical = ConvBNAct(in_channels, out_channels, (k, 1), (stride, 1), dilation=(d, 1), act=act)
        self.horizontal = ConvBNAct(out_channels, out_channels, (1, k), (1, stride), dilation=(1, d), act=act)


class ZoomedConv(nn.Module):
    """Convolutions at half the resolution: down bilinearly, one or two 3 x 3, and up again (FasterSeg, arXiv:1912.10917).

    A cell of the searched networks with a large receptive field at a quarter of the cost. At stride 2 the way up is left out.
    The last activation comes after the way up. Children `convs` (ConvBNAct, the last without activation) and `act`.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        stride: 1 or 2.
        repeats: of the convolution.
        dilation: of the convolutions.
        align_corners: of both resizings.
        act: see `segfast.nn.activation`.

    Raises:
        ValueError: another stride, no convolution, no channels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        repeats: int = 1,
        dilation: int = 1,
        align_corners: bool = True,
        act: Activation = "relu",
    ):
        super().__init__()
        require("ZoomedConv", in_channels=in_channels, out_channels=out_channels, repeats=repeats)
        if stride not in (1, 2):
            raise ValueError(f"ZoomedConv: want stride 1 or 2, got {stride!r}")
        self.stride, self.align_corners = stride, align_corners
        widths = [in_channels, *(out_channels for _ in range(repeats))]
        self.convs = nn.Sequential(
            *(
                ConvBNAct(widths[i], out_channels, 3, dilation=dilation, act=act if i < repeats - 1 else None)
                for i in range(repeats)
            )
        )
        self.act = activation(act, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        whole = tuple(x.shape[2:])
        half = tuple((s + 1) // 2 for s in whole)  # as a convolution of stride 2, for odd sizes too
        y = self.convs(resize(x, half, self.align_corners))
        if self.stride == 1:
            y = resize(y, whole, self.align_corners)
        return self.act(y)
