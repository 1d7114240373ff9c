"""convert and unconvert: the same parameters, the same outputs, and the way back."""

import copy

import pytest
import torch
from conftest import extra
from torch import nn

from segfast.nn import DSConv, convert, unconvert


class _DSConv(nn.Module):
    def __init__(self, c, k):
        super().__init__()
        self.conv = nn.Sequential(*separable(c, k))

    def forward(self, x):
        return self.conv(x)


class ConvNormAct(nn.Sequential):
    pass


class Doubled(nn.Sequential):
    def forward(self, x):
        return super().forward(x) * 2


def separable(c, k, act=nn.ReLU):
    return [
        nn.Conv2d(c, c, 3, 1, 1, groups=c, bias=False), nn.BatchNorm2d(c), act(),
        nn.Conv2d(c, k, 1, bias=False), nn.BatchNorm2d(k), act(),
    ]  # fmt: skip


def nested():
    a, b = separable(8, 6, nn.ReLU6), separable(6, 8, nn.SiLU)
    return nn.Sequential(ConvNormAct(*a[:3]), *a[3:5], nn.Sequential(ConvNormAct(*b[:3]), ConvNormAct(*b[3:])))


NETWORKS = {
    "run": lambda: nn.Sequential(*separable(8, 5)),
    "middle": lambda: nn.Sequential(nn.Conv2d(8, 4, 1), nn.ReLU(), *separable(4, 6), *separable(6, 3), nn.Dropout(0.0)),
    "nested": nested,
    "port": lambda: nn.Sequential(_DSConv(8, 7), _DSConv(7, 2)),
}
EXPECTED = {"run": ["0"], "middle": ["2", "8"], "nested": ["0", "3"], "port": ["0", "1"]}


def step(model, x):
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    return y.detach(), [p.grad.clone() for p in model.parameters()], [b.clone() for b in model.buffers()]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("training", (True, False))
def test_same_numbers_and_back(name, training):
    torch.manual_seed(0)
    plain = NETWORKS[name]().double().train(training)
    model = copy.deepcopy(plain)
    children, parameters, keys = list(model.modules()), list(model.parameters()), list(model.state_dict())
    assert convert(model) == EXPECTED[name]
    assert convert(model) == []
    assert all(isinstance(model.get_submodule(n), DSConv) for n in EXPECTED[name])
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    x = torch.randn(2, 8, 7, 6, dtype=torch.float64)
    for a, b in zip(step(model, x), step(plain, x)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    model.train(not training)
    unconvert(model)
    assert [id(m) for m in model.modules()] == [id(m) for m in children]
    assert all(m.training is not training for m in model.modules())
    assert list(model.state_dict()) == keys
    plain.train(not training)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-9, atol=1e-9)


def test_the_keys_of_the_port_stay():
    model = NETWORKS["port"]()
    keys = list(model.state_dict())
    convert(model)
    assert list(model.state_dict()) == keys


def test_left_alone():
    hooked = nn.Sequential(*separable(4, 4))
    hooked[1].register_forward_hook(lambda *_: None)
    shared = separable(4, 4)
    norm = separable(4, 4)
    norm[1] = nn.GroupNorm(2, 4)
    for model in (hooked, nn.Sequential(*shared, *shared), nn.Sequential(*norm), Doubled(*separable(4, 4)), nn.ReLU()):
        modules = list(model.modules())
        assert convert(model) == []
        assert list(model.modules()) == modules


def test_a_copy_comes_back_too():
    model = NETWORKS["nested"]().eval()
    convert(model)
    twin = unconvert(copy.deepcopy(model))
    assert not any(isinstance(m, DSConv) for m in twin.modules())
    x = torch.randn(1, 8, 5, 5)
    torch.testing.assert_close(twin(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", (True, False))
def test_timm(training):
    timm = extra("timm")
    torch.manual_seed(0)
    plain = timm.create_model("mobilenetv2_100", num_classes=3).double().train(training)
    plain.drop_rate = 0.0
    model = copy.deepcopy(plain)
    children = list(model.modules())
    assert "blocks.0.0.conv_dw" in convert(model)
    assert {id(p) for p in model.parameters()} == {id(p) for m in children for p in m._parameters.values() if p is not None}
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-8, atol=1e-8)
    unconvert(model)
    assert [id(m) for m in model.modules()] == [id(m) for m in children]
    torch.testing.assert_close(model.eval()(x), plain.eval()(x), rtol=1e-8, atol=1e-8)


class Adds(nn.Module):
    """The seed's block by name and children, with a sum in its forward."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = run(channels, channels)

    def forward(self, x):
        return x + self.conv(x)


def run(inputs: int, outputs: int) -> nn.Sequential:
    depthwise = nn.Conv2d(inputs, inputs, 3, 1, 1, groups=inputs, bias=False)
    pointwise = nn.Conv2d(inputs, outputs, 1, bias=False)
    return nn.Sequential(depthwise, nn.BatchNorm2d(inputs), nn.ReLU(), pointwise, nn.BatchNorm2d(outputs), nn.ReLU())


def test_a_block_that_does_more_is_not_taken_whole():
    model, x = nn.Sequential(type("_DSConv", (Adds,), {})(4)).eval(), torch.randn(1, 4, 8, 8)
    want = model(x)
    assert convert(model) == ["0.conv.0"]
    torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-5)


def test_unconvert_keeps_what_changed_since():
    model = nn.Sequential(*run(4, 4), nn.Conv2d(4, 2, 1))
    layers = list(model)
    convert(model)
    model[1] = nn.Conv2d(4, 7, 1)
    model.append(nn.ReLU())
    nn.SyncBatchNorm.convert_sync_batchnorm(model)
    unconvert(model)
    assert [type(m) for m in model] == [
        nn.Conv2d, nn.SyncBatchNorm, nn.ReLU, nn.Conv2d, nn.SyncBatchNorm, nn.ReLU, nn.Conv2d, nn.ReLU,
    ]  # fmt: skip
    assert model[0] is layers[0]
    assert model[6].out_channels == 7
    assert model[1].weight is layers[1].weight
