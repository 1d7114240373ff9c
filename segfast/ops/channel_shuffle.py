"""Channel shuffle: the copy that lets grouped convolutions see each other's channels."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from segfast import _backend


def channel_shuffle_reference(x: Tensor, groups: int) -> Tensor:
    n, c, h, w = x.shape
    y = x.reshape(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)
    y = y.contiguous(memory_format=_backend.layout(x))
    return y.clone() if groups in (1, c) else y  # those shuffles move nothing; an op never returns its input


torch.library.define("segfast::channel_shuffle", "(Tensor x, SymInt groups) -> Tensor")
_backend.register("channel_shuffle")


@torch.library.register_fake("segfast::channel_shuffle")
def _(x, groups):
    return torch.empty_like(x, memory_format=_backend.layout(x))


@register_flop_formula(torch.ops.segfast.channel_shuffle)
def _(*args, **kwargs) -> int:
    return 0


class ChannelShuffle(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, groups):
        ctx.inverse = x.shape[1] // groups  # shuffling with C // groups undoes shuffling with groups
        return torch.ops.segfast.channel_shuffle.default(x, groups)

    @staticmethod
    def backward(ctx, grad):
        return channel_shuffle(grad, ctx.inverse) if ctx.inverse else grad, None


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """Interleave the channels of `groups` groups, so that the next grouped convolution mixes them.

    y[n, i * groups + g] = x[n, g * (C / groups) + i]        (ShuffleNet, arXiv:1707.01083, fig. 1c)

    Args:
        x: (N, C, H, W), any dtype, any strides. The result has its shape and dtype.
        groups: divides C.

    Returns:
        (N, C, H, W); channels_last if x is, else contiguous.

    Raises:
        TypeError: x is no tensor, or groups no int.
        ValueError: x is not 4-d, or groups does not divide C.
    """
    _backend.check_tensors("channel_shuffle", x=x)
    _backend.check_whole("channel_shuffle", "groups", groups)
    if x.dim() != 4 or groups < 1 or x.shape[1] % groups:
        raise ValueError(
            f"channel_shuffle: want (N, C, H, W) and groups >= 1 that divides C, got {tuple(x.shape)} and groups={groups}"
        )
    if not _backend.has_kernel("channel_shuffle", x):
        return channel_shuffle_reference(x, groups)
    return ChannelShuffle.apply(x, groups)
