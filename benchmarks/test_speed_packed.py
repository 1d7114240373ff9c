"""The private operations over packed weights, at shapes of Fast-SCNN and MobileNetV2, against oneDNN on packed weights."""

from __future__ import annotations

import copy

import pytest
import torch
from measure import figure, require_close, require_right
from test_speed_ds_conv import no_grad, runtimes
from torch import Tensor, nn

from segfast.ops._packed import Int8Conv, int8_block

OPS = torch.ops.segfast
# in, out, h, w, kernel, stride
CONV = [
    (3, 32, 1024, 2048, 3, 2),
    (16, 96, 256, 512, 1, 1),
    (128, 128, 64, 128, 1, 1),
    (64, 64, 64, 128, 3, 1),
    (128, 19, 128, 256, 1, 1),
]
# in, out, h, w, stride
SEPARABLE = [(32, 48, 256, 512, 2), (48, 64, 128, 256, 2), (64, 64, 128, 256, 1), (128, 128, 64, 128, 1), (384, 64, 64, 128, 1)]
# in, expanded, out, h, w, stride
INVERTED = [(64, 384, 64, 128, 256, 2), (64, 384, 64, 64, 128, 1), (96, 576, 128, 32, 64, 1), (16, 96, 24, 256, 512, 2),
            (24, 144, 24, 128, 256, 1), (32, 192, 32, 64, 128, 1), (160, 960, 320, 16, 32, 1)]  # fmt: skip


def name(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def one_dnn(conv: nn.Conv2d, x: Tensor, relu: bool):
    """The convolution as frozen Inductor calls it: weights in oneDNN's own blocks, the activation in the same primitive."""
    geometry = list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups
    weight = torch._C._nn.mkldnn_reorder_conv2d_weight(conv.weight.detach().to_mkldnn(), *geometry, list(x.shape))
    call = torch.ops.mkldnn._convolution_pointwise
    return lambda x: call(x, weight, conv.bias, *geometry, "relu" if relu else "none", [], "")


def compare(benchmark, module: nn.Sequential, x: Tensor, ours, path) -> None:
    module = module.to(memory_format=torch.channels_last).eval()
    plain, steps, at = no_grad(module, x), [], x
    for layer, after in zip(module, [*list(module)[1:], None]):
        if isinstance(layer, nn.Conv2d):
            steps.append(one_dnn(layer, at, isinstance(after, nn.ReLU)))
            at = steps[-1](at)

    def packed_peer(x: Tensor) -> Tensor:
        for step in steps:
            x = step(x)
        return x

    ours = no_grad(ours, x)
    require_right(ours(), plain(), no_grad(copy.deepcopy(module).double(), x.double())())
    peers = {"oneDNN, packed weights": no_grad(packed_peer, x)} | runtimes(module, x.contiguous(), path)
    for label, peer in peers.items():
        require_close(label, peer(), plain())
    against = {"best peer": list(peers), "oneDNN, packed weights": ["oneDNN, packed weights"]}
    figure(benchmark, ours, peers, against)


def image(*size: int) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(1, *size).contiguous(memory_format=torch.channels_last)


def parameters(*layers: nn.Conv2d) -> list[Tensor]:
    return [p.detach() for layer in layers for p in (layer.weight, layer.bias)]


@pytest.mark.parametrize("shape", CONV, ids=name)
def test_packed_conv(benchmark, shape, tmp_path):
    c, k, h, w, size, stride = shape
    x, conv = image(c, h, w), nn.Conv2d(c, k, size, stride, size // 2)
    packed = OPS.pack_conv(*parameters(conv), 1)
    ours = lambda x: OPS.packed_conv(x, packed, [stride] * 2, [size // 2] * 2, [1, 1], 1)  # noqa: E731
    compare(benchmark, nn.Sequential(conv, nn.ReLU()), x, ours, tmp_path)


@pytest.mark.parametrize("shape", SEPARABLE, ids=name)
def test_packed_ds_conv(benchmark, shape, tmp_path):
    c, k, h, w, stride = shape
    x, dw, pw = image(c, h, w), nn.Conv2d(c, c, 3, stride, 1, groups=c), nn.Conv2d(c, k, 1)
    packed = OPS.pack_ds_conv(*parameters(dw, pw))
    ours = lambda x: OPS.packed_ds_conv(x, packed, [stride] * 2, [1, 1], [1, 1], 1, 1)  # noqa: E731
    compare(benchmark, nn.Sequential(dw, nn.ReLU(), pw, nn.ReLU()), x, ours, tmp_path)


@pytest.mark.parametrize("shape", INVERTED, ids=name)
def test_packed_inverted_residual(benchmark, shape, tmp_path):
    c, e, k, h, w, stride = shape
    x, expand, dw, project = image(c, h, w), nn.Conv2d(c, e, 1), nn.Conv2d(e, e, 3, stride, 1, groups=e), nn.Conv2d(e, k, 1)
    packed = OPS.pack_inverted_residual(*parameters(expand, dw, project))
    ours = lambda x: OPS.packed_inverted_residual(x, packed, [stride] * 2, [1, 1], [1, 1], 1, 1, 0)  # noqa: E731
    compare(benchmark, nn.Sequential(expand, nn.ReLU(), dw, nn.ReLU(), project), x, ours, tmp_path)


def low(benchmark, convs: list[nn.Conv2d], x: Tensor, stride: int, groups: int) -> None:
    """int8 and bfloat16 against the float32 kernel of the same block, all of them ours."""
    geometry = [stride] * 2, [1, 1], [1, 1]
    pack, run = [
        (OPS.pack_ds_conv, OPS.packed_ds_conv), (OPS.pack_inverted_residual, OPS.packed_inverted_residual)
    ][len(convs) - 2]  # fmt: skip
    peers = {}
    for dtype in (torch.float32, torch.bfloat16):
        packed, image = pack(*parameters(*convs), dtype), x.to(dtype)
        peers[str(dtype)] = lambda packed=packed, image=image: run(image, packed, *geometry, *[1] * len(convs))
    quantised = [
        Int8Conv(
            torch.randint(-128, 128, conv.weight.shape, dtype=torch.int8), torch.full((len(conv.weight),), 0.01),
            conv.bias.detach(), 1, 0.05, 0,
        )
        for conv in convs
    ]  # fmt: skip
    block = int8_block(0.02, 128, quantised, stride=(stride, stride), padding=(1, 1), groups=groups)
    quantised_image = torch.randint(0, 256, x.shape, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    figure(benchmark, lambda: block(quantised_image), peers, {"float32": ["torch.float32"], "bfloat16": ["torch.bfloat16"]})


@pytest.mark.parametrize("shape", SEPARABLE, ids=name)
def test_int8_ds_conv(benchmark, shape):
    c, k, h, w, stride = shape
    low(benchmark, [nn.Conv2d(c, c, 3, groups=c), nn.Conv2d(c, k, 1)], image(c, h, w), stride, c)


@pytest.mark.parametrize("shape", INVERTED, ids=name)
def test_int8_inverted_residual(benchmark, shape):
    c, e, k, h, w, stride = shape
    low(benchmark, [nn.Conv2d(c, e, 1), nn.Conv2d(e, e, 3, groups=e), nn.Conv2d(e, k, 1)], image(c, h, w), stride, e)
