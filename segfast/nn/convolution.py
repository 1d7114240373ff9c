"""Convolution, BatchNorm, activation, and the convolutions that light networks are made of."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from segfast.nn.folding import conv_bn_act

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
    return (value, value) if isinstance(value, int) else tuple(value)


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
        ValueError: an unknown activation.
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
        padding = same_padding(kernel_size, dilation) if padding is None else padding
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        self.bn = norm_layer(out_channels)
        self.act = activation(act, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        if len(self._modules) != 3:
            return super().forward(x)
        return conv_bn_act(x, *self._modules.values())
