"""Channel shuffles: copies, alone and fused into a concatenation."""

from __future__ import annotations

import pytest
import torch
from measure import figure, require_right
from torch import Tensor

from segfast.ops import channel_shuffle, concat_shuffle
from segfast.ops.channel_shuffle import channel_shuffle_reference

FORMATS = pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])


def eager_concat(tensors: list[Tensor]) -> Tensor:
    return channel_shuffle_reference(torch.cat(tensors, 1), 2)


def backward(function, tensors: list[Tensor], upstream: Tensor):
    def run() -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in tensors]
        return list(torch.autograd.grad(function(leaves), leaves, upstream))

    return run


@FORMATS
@pytest.mark.parametrize("work", ["forward", "forward_backward"])
@pytest.mark.parametrize("op", ["concat_shuffle", "channel_shuffle"])
def test_shuffle(benchmark, op, work, memory_format):
    torch.manual_seed(0)
    tensors = [torch.randn(1, 116, 128, 128).contiguous(memory_format=memory_format) for _ in range(2)]
    if op == "channel_shuffle":
        tensors = tensors[:1]
        ours, plain = (lambda t: channel_shuffle(t[0], 2)), (lambda t: channel_shuffle_reference(t[0], 2))
    else:
        ours, plain = concat_shuffle, eager_concat
    torch._dynamo.reset()
    functions = [ours, plain, torch.compile(plain)]
    if work == "forward":
        runs = [lambda f=f: f(tensors) for f in functions]
    else:
        upstream = torch.randn_like(plain(tensors))
        runs = [backward(f, tensors, upstream) for f in functions]
    require_right(runs[0](), runs[1](), runs[1]())
    figure(
        benchmark, runs[0], {"eager": runs[1], "torch.compile": runs[2]}, {"eager": ["eager"], "torch.compile": ["torch.compile"]}
    )
