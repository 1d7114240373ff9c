"""ds_conv: the block's inference and its training step, at the shapes of a network for 512 x 1024 images."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from measure import figure, require_close, require_right
from torch import Tensor, nn

from segfast.engine.race import make_onnxruntime, make_openvino
from segfast.nn import DSConv

INFERENCE = [(32, 48, 256, 512, 2), (48, 64, 128, 256, 2), (64, 64, 128, 256, 1), (128, 128, 64, 128, 1), (384, 64, 64, 128, 1)]
TRAINING = [(4, 64, 64, 64, 128, 1), (4, 32, 48, 128, 256, 2), (4, 48, 64, 64, 128, 2), (4, 128, 128, 32, 64, 1),
            (4, 384, 64, 32, 64, 1)]  # fmt: skip


def name(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape[:-1])) + f"s{shape[-1]}"


def block(channels: int, out: int, stride: int) -> DSConv:
    torch.manual_seed(0)
    module = DSConv(channels, out, stride)
    for bn in (module.conv[1], module.conv[4]):  # folding must have something to fold
        nn.init.uniform_(bn.weight, 0.5, 1.5)
        nn.init.uniform_(bn.bias, -0.5, 0.5)
        bn.running_mean.uniform_(-0.1, 0.1)
        bn.running_var.uniform_(0.5, 1.5)
    return module.to(memory_format=torch.channels_last)


def no_grad(module, x: Tensor):
    return torch.no_grad()(lambda: module(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", INFERENCE, ids=name)
def test_ds_conv_inference(benchmark, shape, dtype, tmp_path):
    channels, out, h, w, stride = shape
    module = block(channels, out, stride).eval()
    x = torch.randn(1, channels, h, w).to(dtype)
    last = x.contiguous(memory_format=torch.channels_last)
    module.to(dtype)
    ours, plain = no_grad(module, last), no_grad(module.conv, last)
    require_right(ours(), plain(), no_grad(copy.deepcopy(module.conv).double(), last.double())())
    nchw = copy.deepcopy(module.conv).to(memory_format=torch.contiguous_format)
    peers = {"eager": no_grad(nchw, x), "eager, channels_last": plain}
    if dtype == torch.float32:
        peers |= inductor(module.conv, last) | runtimes(module.conv, x, tmp_path)
    for label, peer in peers.items():
        require_close(label, peer(), plain())
    figure(benchmark, ours, peers)


def inductor(conv: nn.Module, x: Tensor) -> dict:
    torch._dynamo.reset()
    call = no_grad(torch.compile(copy.deepcopy(conv)), x)
    with torch._inductor.config.patch(freezing=True):
        call()
    return {"Inductor, frozen, channels_last": call}


def runtimes(module: nn.Module, x: Tensor, folder: Path) -> dict:
    """ONNX Runtime and OpenVINO, where they are installed."""
    makers = {"ONNX Runtime": make_onnxruntime, "OpenVINO": make_openvino}
    calls = {label: make(module, x, torch.float32, folder) for label, make in makers.items()}
    return {label: call for label, call in calls.items() if not isinstance(call, str)}


def step(module: nn.Module, x: Tensor, upstream: Tensor):
    def run() -> list[Tensor]:
        leaves = [x.detach().requires_grad_(), *module.parameters()]
        y = module(leaves[0])
        return [y.detach(), *torch.autograd.grad(y, leaves, upstream)]

    return run


def saved_bytes(module: nn.Module, x: Tensor) -> int:
    # every storage once; the input and the parameters live anyway
    x = x.detach().requires_grad_()
    known = {t.untyped_storage().data_ptr() for t in (x, *module.parameters(), *module.buffers())}
    seen: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            seen[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = module(x)
    del y
    return sum(seen.values())


@pytest.mark.parametrize("shape", TRAINING, ids=name)
def test_ds_conv_training(benchmark, shape):
    n, channels, out, h, w, stride = shape
    module = block(channels, out, stride).train()
    x = torch.randn(n, channels, h, w)
    last = x.contiguous(memory_format=torch.channels_last)
    conv = copy.deepcopy(module.conv)
    exact = copy.deepcopy(conv).double()
    with torch.no_grad():
        upstream = torch.randn_like(copy.deepcopy(conv)(last))
    ours, plain = step(module, last, upstream), step(conv, last, upstream)
    require_right(ours(), plain(), step(exact, last.double(), upstream.double())())
    nchw = copy.deepcopy(conv).to(memory_format=torch.contiguous_format)
    torch._dynamo.reset()
    peers = {
        "eager": step(nchw, x, upstream.contiguous()),
        "eager, channels_last": plain,
        "torch.compile": step(torch.compile(copy.deepcopy(conv)), last, upstream),
    }
    bytes_ours, bytes_eager = saved_bytes(module, last), saved_bytes(conv, last)
    figure(benchmark, ours, peers, {"eager, channels_last": ["eager, channels_last"], "best peer": list(peers)})
    benchmark.extra_info.update(saved_bytes={"segfast": bytes_ours, "eager": bytes_eager})
