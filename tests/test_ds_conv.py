"""The module DSConv: what its Sequential computes, fused where that can be seen to be the same."""

from __future__ import annotations

import copy
import io
import pickle
from functools import partial

import pytest
import torch
from harness import error, judge, reference_only, scale
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.utils.flop_counter import FlopCounterMode

import segfast
from segfast import _backend
from segfast.nn import DSConv

compiled = pytest.mark.skipif(_backend._C is None or _backend.requested == "reference", reason="no kernels: the reference serves")


class Plain(nn.Module):
    def __init__(self, c, k, stride=1):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(c, c, 3, stride, 1, groups=c, bias=False), nn.BatchNorm2d(c), nn.ReLU(True),
            nn.Conv2d(c, k, 1, bias=False), nn.BatchNorm2d(k), nn.ReLU(True),
        )  # fmt: skip


def kernel_runs(function) -> bool:
    calls = lambda: sum(n for op, n in _backend._C.kernel_calls().items() if op.startswith("ds_conv"))  # noqa: E731
    before = calls()
    function()
    return calls() > before


def step(function, module, x):
    x = x.clone().requires_grad_()
    module.zero_grad()
    y = function(x)
    generator = torch.Generator().manual_seed(1)
    y.backward(torch.randn(y.shape, generator=generator).to(torch.bfloat16).to(y.dtype))
    grads = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    return [y.detach(), x.grad, *grads, *(b.clone().double() for b in module.buffers())]


def check(module: nn.Module, x: torch.Tensor) -> None:
    """Outputs, gradients and buffers of the module against its own Sequential: the error rule in the module's dtype."""
    parameters, buffers = dict(module.named_parameters()), dict(module.named_buffers())
    tensors = {name: t.detach() for name, t in (parameters | buffers).items()}

    def run(call, fused=False):
        x, state = call
        twin = copy.deepcopy(module).to(x.dtype)
        twin.load_state_dict(state)
        return step(twin if fused else twin.conv, twin, x)

    call = (x, tensors)
    actual = run(call, fused=True)
    grads = 1 + sum(p.requires_grad for p in parameters.values())
    names = ["outputs[0]", *(f"grads[{i}]" for i in range(grads)), *(f"buffers[{i}]" for i in range(len(buffers)))]
    judge(repr(module), names, actual, run, call, x.dtype)


def test_drop_in():
    torch.manual_seed(3)
    plain = Plain(6, 10, 2)
    after = torch.rand(1)
    torch.manual_seed(3)
    module = DSConv(6, 10, 2)
    assert torch.equal(after, torch.rand(1)), "another number of random draws"
    assert list(plain.state_dict()) == list(module.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), module.state_dict().values()))
    module.load_state_dict(plain.state_dict())
    with pytest.raises(TypeError, match="groups"):
        DSConv(4, 4, groups=2)
    with pytest.raises(ValueError, match=r"DSConv: want dw_act one of .*got 'gelu'"):
        DSConv(4, 4, dw_act="gelu")


@compiled
@pytest.mark.parametrize(
    "options",
    [
        {}, {"stride": 2}, {"kernel_size": 5, "bias": True}, {"dilation": 2, "padding": 0}, {"kernel_size": (3, 5)},
        {"dw_act": None}, {"dw_act": None, "act": None}, {"dw_act": "silu", "act": "hardswish"}, {"momentum": None},
        {"norm_layer": partial(nn.BatchNorm2d, affine=False)}, {"eps": 1e-2, "momentum": 0.3},
        {"norm_layer": partial(nn.BatchNorm2d, track_running_stats=False)}, {"norm_layer": nn.Identity, "bias": True},
        {"dtype": torch.float64}, {"dtype": torch.float16},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("mode", ("training", "eval", "frozen first", "frozen last"))
def test_fuses_and_agrees(options, mode):
    torch.manual_seed(5)
    module = DSConv(5, 7, **options).train(mode != "eval")
    if mode.startswith("frozen"):
        module.conv[1 if mode == "frozen first" else 4].eval()
    x = torch.randn(3, 5, 9, 8, dtype=options.get("dtype"))
    assert [type(module.conv[i]) for i in (0, 3)] == [nn.Conv2d] * 2
    assert kernel_runs(lambda: copy.deepcopy(module)(x))
    check(module, x)


@compiled
@pytest.mark.parametrize(
    "options",
    [
        {}, {"stride": 2}, {"kernel_size": 5}, {"kernel_size": 5, "stride": 2}, {"padding": 0}, {"padding": 3}, {"dilation": 3},
        {"dilation": 9}, {"stride": (1, 2)}, {"stride": 3}, {"kernel_size": (7, 3), "stride": 2}, {"dtype": torch.bfloat16},
        {"kernel_size": 5, "dilation": 2, "padding": 6, "dtype": torch.bfloat16},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("size", ((40, 35), (41, 70)), ids=str)
def test_maps_of_several_chunks(options, size, kernel_set):
    # reductions in chunks of rows, each with the rows of the gradient that it needs of its neighbour's
    torch.manual_seed(6)
    module = DSConv(19, 21, act="silu", dw_act="silu", **options).train()
    check(module, torch.randn(2, 19, *size, dtype=options.get("dtype")).contiguous(memory_format=torch.channels_last))


@compiled
@pytest.mark.parametrize("stride", (1, 2))
def test_maps_written_past_the_caches(stride, kernel_set):
    torch.manual_seed(7)
    module = DSConv(32, 16, stride, act="silu", dw_act="silu").train()
    x = torch.randn(2, 32, 130 * stride, 129 * stride).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        assert module.conv[:3](x).nbytes >= 1 << 22, "small enough to be kept"
    check(module, x)


def replace(index, make):
    def change(module):
        module.conv[index] = make()

    return change


UNFUSED = {
    "group norm": replace(1, lambda: nn.GroupNorm(2, 4)),
    "leaky": replace(2, lambda: nn.LeakyReLU(0.3)),
    "reflect": replace(0, lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4, padding_mode="reflect")),
    "not depthwise": replace(0, lambda: nn.Conv2d(4, 4, 3, padding=1, groups=2)),
    "same": replace(0, lambda: nn.Conv2d(4, 4, 3, padding="same", groups=4)),
    "forward hook": lambda module: module.conv[1].register_forward_hook(lambda _, x, y: 2 * y),
    "pre-hook": lambda module: module.conv[3].register_forward_pre_hook(lambda _, x: (x[0] + 1,)),
    "backward hook": lambda module: module.conv[1].register_full_backward_hook(lambda _, x, y: (x[0] * 2,)),
    "hook on the Sequential": lambda module: module.conv.register_forward_hook(lambda _, x, y: 3 * y),
    "pruned": lambda module: prune.l1_unstructured(module.conv[3], "weight", 0.5),
    "parametrised": lambda module: parametrize.register_parametrization(module.conv[0], "weight", nn.Softplus()),
    "forward replaced": lambda module: setattr(module.conv[5], "forward", torch.neg),
    "sync": lambda module: setattr(module, "conv", nn.SyncBatchNorm.convert_sync_batchnorm(module.conv).eval()),
}


@compiled
@pytest.mark.parametrize("name", UNFUSED)
def test_runs_its_layers_when_it_cannot_fuse(name):
    torch.manual_seed(0)
    module = DSConv(4, 6)
    x = torch.randn(2, 4, 6, 5)
    UNFUSED[name](module)
    assert not kernel_runs(lambda: module(x))
    assert torch.equal(module.eval()(x), module.conv(x))


@compiled
def test_global_hooks_and_the_way_back():
    module, x, seen = DSConv(4, 6).eval(), torch.randn(2, 4, 6, 5), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(type(m).__name__))
    assert not kernel_runs(lambda: module(x))
    assert seen[:2] == ["Conv2d", "BatchNorm2d"]
    handle.remove()
    assert kernel_runs(lambda: module(x))


def test_nothing_is_cached():
    module, x = DSConv(4, 6).eval(), torch.randn(2, 4, 6, 5)
    with torch.no_grad():
        module(x)
        module.conv[0].weight.data.mul_(3)
        module.conv[4].running_var.numpy()[:] = 0.25
        torch.testing.assert_close(module(x), module.conv(x), rtol=1e-5, atol=1e-5)
        module.conv[3].weight = nn.Parameter(torch.randn(6, 4, 1, 1))
        torch.testing.assert_close(module(x), module.conv(x), rtol=1e-5, atol=1e-5)


def test_copies():
    module, x = DSConv(4, 6).eval(), torch.randn(2, 4, 6, 5)
    stream = io.BytesIO()
    torch.save(module, stream)
    stream.seek(0)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(stream, weights_only=False)):
        assert torch.equal(twin(x), module(x))


@pytest.mark.parametrize("training", (True, False))
def test_autocast_and_half(training):
    module, x = DSConv(8, 6).train(training), torch.randn(2, 8, 9, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        a, b = copy.deepcopy(module)(x), copy.deepcopy(module).conv(x)
    exact = copy.deepcopy(module).double().conv(x.double())
    assert a.dtype == b.dtype
    assert error(a, exact) <= 2 * error(b, exact) + 4 * torch.finfo(torch.bfloat16).eps * scale(exact)
    half = copy.deepcopy(module).half()
    assert half(x.half()).dtype == torch.float16


@pytest.mark.parametrize("training", (True, False))
def test_compile(training):
    torch._dynamo.reset()
    module, x = DSConv(4, 6).train(training), torch.randn(2, 4, 6, 5)
    twin = copy.deepcopy(module)
    function = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for a, b in zip(step(function, twin, x), step(module, module, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", (True, False))
def test_export_is_plain_aten(training):
    module, x = DSConv(4, 6).train(training), torch.randn(2, 4, 6, 5)
    program = torch.export.export(module, (x,))
    targets = {n.target for n in program.graph.nodes if n.op == "call_function"}
    assert all(t.namespace == "aten" for t in targets if isinstance(t, torch._ops.OpOverload))
    if not training:
        torch.testing.assert_close(program.module()(x), module(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ("ds_conv", "fast_scnn"))
def test_onnx(name):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = (DSConv(3, 6) if name == "ds_conv" else segfast.create_model("fast_scnn", 5, width=0.25)).eval()
    x = torch.randn(1, 3, 64, 64)
    stream = io.BytesIO()
    torch.onnx.export(model, (x,), dynamo=True, verbose=False).save(stream)
    session = runtime.InferenceSession(stream.getvalue())
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), model(x).detach(), rtol=1e-3, atol=1e-4)


def test_transforms():
    module = DSConv(3, 4).double().eval()
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    parameters = dict(module.named_parameters())
    loss = lambda p: torch.func.functional_call(module, p, (x,)).square().sum()  # noqa: E731
    grads = torch.func.grad(loss)(parameters)
    module(x).square().sum().backward()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-9, atol=1e-9)
    batch = torch.func.vmap(lambda image: module(image[None])[0])(x)
    torch.testing.assert_close(batch, module(x), rtol=1e-9, atol=1e-9)


def test_flops():
    module, x = DSConv(4, 6, 2).eval(), torch.randn(2, 4, 6, 8)
    with FlopCounterMode(display=False) as counter:
        module(x)
    assert counter.get_total_flops() == 2 * 2 * 3 * 4 * (9 * 4 + 4 * 6)


@pytest.mark.parametrize("training", (True, False))
def test_fast_scnn_fused_and_not(training):
    torch.manual_seed(0)
    model = segfast.create_model("fast_scnn", 4, width=0.25).double().train(training)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    twin, x = copy.deepcopy(model), torch.randn(2, 3, 64, 96, dtype=torch.float64)
    fused = step(model, model, x)
    with reference_only():
        plain = step(twin, twin, x)
    for a, b in zip(fused, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


@compiled
def test_saves_at_most_60_percent_of_eagers_bytes():
    """For the backward, the block's input not counted; storages that two saved tensors share count once."""
    module, x = DSConv(32, 32), torch.randn(2, 32, 24, 32).contiguous(memory_format=torch.channels_last).requires_grad_()

    def saved(function):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            function(x)
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
        storages.pop(x.untyped_storage().data_ptr())
        return sum(storages.values())

    assert 0 < saved(module) <= 0.6 * saved(module.conv)
