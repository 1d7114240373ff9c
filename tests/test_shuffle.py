"""What is particular to channel_shuffle and concat_shuffle: every dtype, many groups, promotion, errors, modules."""

from __future__ import annotations

import pytest
import torch

from segfast import nn, ops
from segfast.ops.channel_shuffle import channel_shuffle_reference

CHANNELS_LAST = torch.channels_last
EVERY_WIDTH = (torch.bool, torch.uint8, torch.int16, torch.bfloat16, torch.int32, torch.float64, torch.complex128)


def counting(*size: int, dtype: torch.dtype, layout: torch.memory_format) -> torch.Tensor:
    number = torch.Size(size).numel()
    x = torch.arange(number).reshape(size) % 2 if dtype == torch.bool else torch.arange(number).reshape(size) % 127
    return x.to(dtype).contiguous(memory_format=layout)


@pytest.mark.parametrize("dtype", EVERY_WIDTH, ids=str)
@pytest.mark.parametrize("layout", (torch.contiguous_format, CHANNELS_LAST), ids=str)
def test_every_width_and_group_count(dtype, layout, kernel_set):
    for channels in (1, 2, 12, 30, 58, 64, 116, 240, 2050):
        x = counting(2, channels, 2, 3, dtype=dtype, layout=layout)
        for groups in range(1, channels + 1):
            if channels % groups == 0:
                expected = channel_shuffle_reference(x, groups)
                y = ops.channel_shuffle(x, groups)
                assert torch.equal(y, expected), (channels, groups)
                assert y.stride() == expected.stride()


@pytest.mark.parametrize("dtype", EVERY_WIDTH, ids=str)
@pytest.mark.parametrize("layout", (torch.contiguous_format, CHANNELS_LAST), ids=str)
def test_concat_of_many_shapes(dtype, layout, kernel_set):
    for channels in (
        (1, 1),
        (3, 3),
        (15, 15),
        (16, 16),
        (29, 29),
        (58, 58),
        (5, 7),
        (1, 2, 3),
        (4, 0, 8),
        (12,),
        (2, 2, 2, 2, 2, 2),
    ):
        tensors = [counting(2, c, 3, 5, dtype=dtype, layout=layout) for c in channels]
        for groups in range(1, sum(channels) + 1):
            if sum(channels) % groups == 0:
                expected = channel_shuffle_reference(torch.cat(tensors, 1), groups)
                assert torch.equal(ops.concat_shuffle(tensors, groups), expected), (channels, groups)


@pytest.mark.parametrize("layout", (torch.contiguous_format, CHANNELS_LAST), ids=str)
def test_outputs_that_are_streamed_past_the_cache(layout, kernel_set):
    tensors = [torch.randn(3, 61, 173, 171).contiguous(memory_format=layout).requires_grad_() for _ in range(2)]
    y = ops.concat_shuffle(tensors)
    expected = channel_shuffle_reference(torch.cat(tensors, 1), 2)
    assert torch.equal(y, expected)
    cotangent = torch.randn_like(y)
    for a, b in zip(torch.autograd.grad(y, tensors, cotangent), torch.autograd.grad(expected, tensors, cotangent)):
        assert torch.equal(a, b)


def test_concat_promotes_as_cat_does():
    tensors = [torch.ones(1, 2, 3, 3, dtype=torch.bfloat16, requires_grad=True), torch.ones(1, 2, 3, 3, requires_grad=True)]
    y = ops.concat_shuffle(tensors)
    assert y.dtype == torch.float32
    y.sum().backward()
    assert [t.grad.dtype for t in tensors] == [torch.bfloat16, torch.float32]


X = torch.zeros(2, 6, 3, 3)


@pytest.mark.parametrize(
    "error, call",
    (
        (ValueError, lambda: ops.channel_shuffle(X[0], 2)),
        (ValueError, lambda: ops.channel_shuffle(X, 4)),
        (ValueError, lambda: ops.channel_shuffle(X, 0)),
        (ValueError, lambda: ops.channel_shuffle(X, -2)),
        (TypeError, lambda: ops.concat_shuffle(X)),
        (TypeError, lambda: ops.concat_shuffle([X, None])),
        (ValueError, lambda: ops.concat_shuffle([])),
        (ValueError, lambda: ops.concat_shuffle([X, X[:1]])),
        (ValueError, lambda: ops.concat_shuffle([X, X[..., :2]])),
        (ValueError, lambda: ops.concat_shuffle([X, X[0]])),
        (ValueError, lambda: ops.concat_shuffle([X, X], 5)),
        (ValueError, lambda: ops.concat_shuffle([X, X], 0)),
        (ValueError, lambda: ops.concat_shuffle([X, X.to("meta")])),
    ),
)
def test_bad_input(error, call):
    with pytest.raises(error, match=r"^(channel|concat)_shuffle: want .*, got "):
        call()


def test_modules():
    x = torch.randn(2, 12, 3, 5)
    assert torch.equal(nn.ChannelShuffle(3)(x), torch.nn.ChannelShuffle(3)(x))
    assert torch.equal(nn.ConcatShuffle()([x, x]), torch.nn.ChannelShuffle(2)(torch.cat([x, x], 1)))
    assert repr(nn.ChannelShuffle(3)) == repr(torch.nn.ChannelShuffle(3)) == "ChannelShuffle(groups=3)"
    assert repr(nn.ConcatShuffle(4)) == "ConcatShuffle(groups=4)"
