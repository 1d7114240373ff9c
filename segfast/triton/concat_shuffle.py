"""Concatenate and shuffle in Triton: one copy a tensor, straight to its shuffled place."""

import torch
from torch import Tensor

from segfast import _backend
from segfast.triton.channel_shuffle import move


def concat_shuffle(tensors: list[Tensor], groups: int) -> Tensor:
    from segfast.ops.concat_shuffle import concat_layout

    channels_last = concat_layout(tensors) == torch.channels_last
    n, _, h, w = tensors[0].shape
    channels = sum(t.shape[1] for t in tensors)
    y = tensors[0].new_empty((n, h, w, channels) if channels_last else (n, channels, h, w))
    first = 0
    for t in tensors:
        dense = (t.permute(0, 2, 3, 1) if channels_last else t).contiguous()
        move(dense, y, first, groups, channels_last, gather=False)
        first += t.shape[1]
    return y.permute(0, 3, 1, 2) if channels_last else y


def concat_shuffle_backward(grad: Tensor, channels: list[int], groups: int) -> list[Tensor]:
    channels_last = _backend.layout(grad) == torch.channels_last
    dense = (grad.permute(0, 2, 3, 1) if channels_last else grad).contiguous()
    n, _, h, w = grad.shape
    parts, first = [], 0
    for c in channels:
        part = grad.new_empty((n, h, w, c) if channels_last else (n, c, h, w))
        move(part, dense, first, groups, channels_last, gather=True)
        parts.append(part.permute(0, 3, 1, 2) if channels_last else part)
        first += c
    return parts
