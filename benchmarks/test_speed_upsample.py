"""The heads at image size against F.interpolate and the plain step after it: eager in both memory formats, and compiled."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from measure import figure, require_close, require_right
from test_speed_losses import log_softmaxes, step
from torch import Tensor

from segfast.ops import upsample_argmax, upsample_cross_entropy, upsample_pixelwise_kl

SIZE = (512, 1024)
CLASSES = [2, 3, 7, 19, 33, 64, 100, 256, 1000]


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size=size, mode="bilinear")


def argmax(benchmark, shape: tuple[int, ...], size: tuple[int, int], compiled: bool) -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(shape)
    dtype = torch.uint8 if shape[1] <= 256 else torch.int32

    def make(formula, memory_format):
        x = logits.contiguous(memory_format=memory_format)
        call = (lambda: upsample_argmax(x, size, dtype=dtype)) if formula is None else (lambda: formula(x))
        return torch.no_grad()(call)

    def formula(x: Tensor) -> Tensor:
        return resize(x, size).argmax(1)

    # of all but the few pixels where float32 cannot tell the two best apart
    exact = resize(logits.double(), size).topk(2, dim=1)
    apart = exact.values[:, 0] - exact.values[:, 1] > 1e-4
    for memory_format in (torch.contiguous_format, torch.channels_last):
        assert torch.equal(make(None, memory_format)()[apart].long(), exact.indices[:, 0][apart])
    ours, plain = make(None, torch.contiguous_format), make(formula, torch.contiguous_format)
    peers = {"eager": plain, "eager, channels_last": make(formula, torch.channels_last)}
    against = {"eager": list(peers)}
    if compiled:
        torch._dynamo.reset()
        peers["torch.compile"] = make(torch.compile(formula), torch.contiguous_format)
        peers["torch.compile, channels_last"] = make(torch.compile(formula), torch.channels_last)
        against["torch.compile"] = ["torch.compile", "torch.compile, channels_last"]
    figure(benchmark, ours, peers, against)


def test_upsample_argmax(benchmark):
    argmax(benchmark, (1, 19, 128, 256), (1024, 2048), compiled=True)


@pytest.mark.parametrize("classes", CLASSES)
def test_upsample_argmax_classes(benchmark, classes):
    argmax(benchmark, (1, classes, 16, 32), (128, 256), compiled=False)


def loss(benchmark, ours, formula, inputs: list[Tensor], compiled: bool) -> None:
    def formatted(memory_format):
        return [t.contiguous(memory_format=memory_format) if t.dim() == 4 else t for t in inputs]

    call, plain = step(ours, *inputs), step(formula, *inputs)
    exact = step(formula, *[t.double() if t.is_floating_point() else t for t in inputs])()
    require_right(call(), plain(), exact)
    peers = {"eager": plain, "eager, channels_last": step(formula, *formatted(torch.channels_last))}
    against = {"eager": list(peers)}
    if compiled:
        torch._dynamo.reset()
        peers["torch.compile"] = step(torch.compile(formula), *inputs)
        against["torch.compile"] = ["torch.compile"]
    for label, peer in peers.items():
        require_close(label, peer(), exact)
    del exact
    figure(benchmark, call, peers, against)


def cross_entropy(benchmark, shape: tuple[int, ...], size: tuple[int, int], compiled: bool) -> None:
    torch.manual_seed(0)
    target = torch.randint(0, shape[1], (shape[0], *size))
    target[torch.rand(target.shape) < 0.05] = -100
    loss(
        benchmark,
        lambda x, y: upsample_cross_entropy(x, y, ignore_index=-100),
        lambda x, y: F.cross_entropy(resize(x, size), y),
        [3 * torch.randn(shape), target],
        compiled,
    )


def test_upsample_cross_entropy(benchmark):
    cross_entropy(benchmark, (2, 19, 64, 128), SIZE, compiled=True)


@pytest.mark.parametrize("classes", CLASSES)
def test_upsample_cross_entropy_classes(benchmark, classes):
    cross_entropy(benchmark, (1, classes, 16, 32), (128, 256), compiled=False)


def pixelwise_kl(benchmark, shape: tuple[int, ...], teacher: tuple[int, int], size: tuple[int, int], compiled: bool) -> None:
    torch.manual_seed(0)
    loss(
        benchmark,
        lambda s, t: upsample_pixelwise_kl(s, t, size),
        lambda s, t: log_softmaxes(resize(s, size), resize(t, size)),
        [3 * torch.randn(shape), 3 * torch.randn(*shape[:2], *teacher)],
        compiled,
    )


def test_upsample_pixelwise_kl(benchmark):
    pixelwise_kl(benchmark, (2, 19, 64, 128), (128, 256), SIZE, compiled=True)


@pytest.mark.parametrize("classes", CLASSES)
def test_upsample_pixelwise_kl_classes(benchmark, classes):
    pixelwise_kl(benchmark, (1, classes, 16, 32), (32, 64), (128, 256), compiled=False)
