"""Concatenate and shuffle channels in one copy: the end of every ShuffleNet v2 block."""

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from segfast import _backend
from segfast.ops.channel_shuffle import channel_shuffle_reference


def concat_layout(tensors: Sequence[Tensor]) -> torch.memory_format:
    """channels_last if that is the layout of one of the tensors and fits all of them; anything else comes out contiguous."""
    fits = not _backend.is_transformed() and all(t.is_contiguous(memory_format=torch.channels_last) for t in tensors)
    if fits and any(not t.is_contiguous() for t in tensors):
        return torch.channels_last
    return torch.contiguous_format


def concat_shuffle_reference(tensors: Sequence[Tensor], groups: int = 2) -> Tensor:
    x = torch.cat(list(tensors), 1).contiguous(memory_format=concat_layout(tensors))
    return channel_shuffle_reference(x, groups).contiguous(memory_format=concat_layout(tensors))


torch.library.define("segfast::concat_shuffle", "(Tensor[] tensors, SymInt groups) -> Tensor")
torch.library.define("segfast::concat_shuffle_backward", "(Tensor grad, SymInt[] channels, SymInt groups) -> Tensor[]")
_backend.register("concat_shuffle", "concat_shuffle_backward")


@torch.library.register_fake("segfast::concat_shuffle")
def _(tensors, groups):
    n, _, h, w = tensors[0].shape
    channels = sum(t.shape[1] for t in tensors)
    return torch.empty_like(tensors[0].new_empty(n, channels, h, w), memory_format=concat_layout(tensors))


@torch.library.register_fake("segfast::concat_shuffle_backward")
def _(grad, channels, groups):
    n, _, h, w = grad.shape
    return [torch.empty_like(grad.new_empty(n, c, h, w), memory_format=_backend.layout(grad)) for c in channels]


@register_flop_formula([torch.ops.segfast.concat_shuffle, torch.ops.segfast.concat_shuffle_backward])
def _(*args, **kwargs) -> int:
    return 0


class ConcatShuffle(torch.autograd.Function):
    @staticmethod
    def forward(*args):  # with (ctx, groups, *tensors), Dynamo takes two tensors for a call without ctx: it counts parameters
        ctx, groups, *tensors = args
        ctx.groups, ctx.channels = groups, [t.shape[1] for t in tensors]
        return torch.ops.segfast.concat_shuffle.default(tensors, groups)

    @staticmethod
    def backward(ctx, grad):
        return None, *SplitShuffle.apply(grad, ctx.channels, ctx.groups)


class SplitShuffle(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grad, channels, groups):
        ctx.groups = groups
        return tuple(torch.ops.segfast.concat_shuffle_backward.default(grad, channels, groups))

    @staticmethod
    def backward(ctx, *grads):
        return ConcatShuffle.apply(ctx.groups, *grads), None, None


def concat_shuffle(tensors: Sequence[Tensor], groups: int = 2) -> Tensor:
    """Concatenate along channels and shuffle, in one copy instead of two.

    channel_shuffle(torch.cat(tensors, 1), groups)        (ShuffleNet v2, arXiv:1807.11164, fig. 3c, d)

    Args:
        tensors: at least one, (N, C_i, H, W), any dtype (promoted as torch.cat does), any strides.
        groups: divides the sum of the C_i.

    Returns:
        (N, sum C_i, H, W); channels_last if one of the tensors is and the others fit it, else contiguous.

    Raises:
        TypeError: tensors is a Tensor, or holds something else; groups is no int.
        ValueError: a tensor is not 4-d, N, H, W or devices differ, or groups does not divide the sum of the C_i.
    """
    if isinstance(tensors, Tensor) or not all(isinstance(t, Tensor) for t in tensors):
        raise TypeError(f"concat_shuffle: want a sequence of tensors, got {type(tensors).__name__}")
    shapes = [tuple(t.shape) for t in tensors]
    first = tensors[0] if shapes else None
    if first is None or any(len(s) != 4 or s[:1] + s[2:] != shapes[0][:1] + shapes[0][2:] for s in shapes):
        raise ValueError(f"concat_shuffle: want one or more (N, C_i, H, W) with equal N, H and W, got {shapes}")
    if any(t.device != first.device for t in tensors):
        raise ValueError(f"concat_shuffle: want tensors on one device, got {[str(t.device) for t in tensors]}")
    _backend.check_whole("concat_shuffle", "groups", groups)
    if groups < 1 or sum(s[1] for s in shapes) % groups:
        raise ValueError(
            f"concat_shuffle: want groups >= 1 that divides the sum of the channels, got {shapes} and groups={groups}"
        )
    if any(t.dtype != first.dtype for t in tensors):
        dtype = reduce(torch.promote_types, [t.dtype for t in tensors])
        tensors = [t.to(dtype) for t in tensors]
    if not _backend.has_kernel("concat_shuffle", *tensors):
        return concat_shuffle_reference(tensors, groups)
    return ConcatShuffle.apply(groups, *tensors)
