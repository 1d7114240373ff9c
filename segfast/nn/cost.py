"""What each kind of convolution costs: parameters and multiply-accumulates, from its numbers alone.

BatchNorms and activations are not counted, biases among the parameters only. `table` puts all kinds beside each other.
"""

from __future__ import annotations

from typing import NamedTuple

from segfast.nn.convolution import pair


class Cost(NamedTuple):
    """Of one or more layers in a row: parameters, multiply-accumulates of one image, and the size of the result."""

    parameters: int
    macs: int
    size: tuple[int, int]


def chain(*costs: Cost) -> Cost:
    """The cost of layers one after the other; the size is the last one's."""
    return Cost(sum(c.parameters for c in costs), sum(c.macs for c in costs), costs[-1].size)


def convolution(
    in_channels: int,
    out_channels: int,
    size: int | tuple[int, int],
    kernel_size: int | tuple[int, int] = 3,
    stride: int | tuple[int, int] = 1,
    groups: int = 1,
    bias: bool = False,
) -> Cost:
    """k k' C K / g parameters, as many MACs at each of ceil(H / s) ceil(W / s') places. Dilation changes neither.

    Args:
        in_channels: C.
        out_channels: K.
        size: (H, W) of the input, one number for a square.
        kernel_size: odd, padded to keep the size at stride 1.
        stride: s.
        groups: g; C for a depthwise convolution.
        bias: K parameters more.

    Raises:
        ValueError: groups that do not divide both channel counts.
    """
    if groups < 1 or in_channels % groups or out_channels % groups:
        raise ValueError(f"convolution: want groups that divide the channels, got {in_channels}, {out_channels}, {groups=}")
    (rows, columns), (height, width) = pair(kernel_size), pair(size)
    out = tuple(-(-extent // step) for extent, step in zip((height, width), pair(stride)))
    weights = rows * columns * (in_channels // groups) * out_channels
    return Cost(weights + (out_channels if bias else 0), weights * out[0] * out[1], out)


def transposed(
    in_channels: int, out_channels: int, size: int | tuple[int, int], kernel_size: int = 4, stride: int = 2, bias: bool = False
) -> Cost:
    """k^2 C K parameters, as many MACs at each of the H W places of the input; the result has s H rows and s W columns."""
    height, width = pair(size)
    weights = kernel_size * kernel_size * in_channels * out_channels
    return Cost(weights + (out_channels if bias else 0), weights * height * width, (stride * height, stride * width))


def depthwise_separable(
    in_channels: int, out_channels: int, size: int | tuple[int, int], kernel_size: int = 3, stride: int = 1
) -> Cost:
    """k^2 C + C K: against a convolution 1 / K + 1 / k^2 (MobileNet, arXiv:1704.04861, section 3.1)."""
    dw = convolution(in_channels, in_channels, size, kernel_size, stride, in_channels)
    return chain(dw, convolution(in_channels, out_channels, dw.size, 1))


def asymmetric(in_channels: int, out_channels: int, size: int | tuple[int, int], kernel_size: int = 3, stride: int = 1) -> Cost:
    """k (C K + K^2): against a convolution of equal channels 2 / k."""
    vertical = convolution(in_channels, out_channels, size, (kernel_size, 1), (stride, 1))
    return chain(vertical, convolution(out_channels, out_channels, vertical.size, (1, kernel_size), (1, stride)))


def bottleneck(in_channels: int, channels: int, size: int | tuple[int, int], stride: int = 1) -> Cost:
    """C P + 9 P^2 + 4 P^2, and 4 C P for a shortcut where the shape changes (ResNet, arXiv:1512.03385, fig. 5)."""
    out_channels = 4 * channels
    reduce = convolution(in_channels, channels, size, 1)
    middle = convolution(channels, channels, size, 3, stride)
    cost = chain(reduce, middle, convolution(channels, out_channels, middle.size, 1))
    if stride == 1 and in_channels == out_channels:
        return cost
    return chain(cost, convolution(in_channels, out_channels, size, 1, stride))


def inverted_residual(
    in_channels: int, out_channels: int, size: int | tuple[int, int], stride: int = 1, expansion: float = 6, kernel_size: int = 3
) -> Cost:
    """t C^2 + k^2 t C + t C K (MobileNetV2, arXiv:1801.04381, section 3.3)."""
    middle = round(in_channels * expansion)
    rest = depthwise_separable(middle, out_channels, size, kernel_size, stride)
    return rest if middle == in_channels else chain(convolution(in_channels, middle, size, 1), rest)


def esp(in_channels: int, out_channels: int, size: int | tuple[int, int], stride: int = 1, rates: int = 5) -> Cost:
    """C K / r + 9 K^2 / r, where r divides K (ESPNet, arXiv:1803.06815, section 3.1)."""
    rates = min(rates, out_channels)
    width = out_channels // rates
    reduce = convolution(in_channels, width, size, 3 if stride == 2 else 1, stride)
    return chain(reduce, convolution(width, out_channels, reduce.size, 3))


def table(
    in_channels: int, out_channels: int, size: int | tuple[int, int], kernel_size: int = 3, groups: int = 4
) -> dict[str, Cost]:
    """The kinds of convolution that map C to K channels, by name, in the order of their use."""
    arguments = (in_channels, out_channels, size)
    return {
        "convolution": convolution(*arguments, kernel_size),
        "pointwise": convolution(*arguments, 1),
        "dilated": convolution(*arguments, kernel_size),
        "grouped": convolution(*arguments, kernel_size, groups=groups),
        "depthwise-separable": depthwise_separable(*arguments, kernel_size),
        "asymmetric": asymmetric(*arguments, kernel_size),
        "bottleneck": bottleneck(in_channels, out_channels // 4, size),
        "inverted residual": inverted_residual(*arguments, kernel_size=kernel_size),
        "ESP": esp(*arguments),
    }
