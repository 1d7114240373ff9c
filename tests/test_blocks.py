"""The blocks of segfast.nn: sizes, values against plain PyTorch, exports."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from segfast import nn as sf


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights and BatchNorm statistics: what the initial ones (0 and 1) would hide shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if name.endswith("running_var"):
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
            elif tensor.is_floating_point():
                fan = max(1, tensor[0].numel()) if tensor.dim() > 1 else 4
                tensor.copy_(torch.randn(tensor.shape, generator=generator) / math.sqrt(fan) + (tensor.dim() == 1) * 0.5)
    return module


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def macs(module: nn.Module, *shape: int) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(torch.empty(shape, device=next(module.parameters()).device))
    return counter.get_total_flops() // 2


class Function(nn.Module):
    """A function as a module, for the exporters."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def onnx_outputs(module: nn.Module, tmp_path, *args, dynamic=None):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path = str(tmp_path / "block.onnx")
    torch.onnx.export(module.eval(), args, path, dynamo=True, dynamic_shapes=dynamic, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    return lambda *args: torch.from_numpy(session.run(None, {n: a.numpy() for n, a in zip(names, args)})[0])


def test_conv_bn_act():
    x = torch.randn(2, 8, 9, 13)
    unit = sf.ConvBNAct(8, 12, (3, 5), 2, dilation=(2, 1), groups=4, act="prelu")
    plain = nn.Conv2d(8, 12, (3, 5), 2, (2, 2), (2, 1), groups=4, bias=False)
    plain.load_state_dict(unit.conv.state_dict())
    expected = F.prelu(F.batch_norm(plain(x), None, None, training=True), torch.full((12,), 0.25))
    torch.testing.assert_close(unit(x), expected)
    assert sf.ConvBNAct(8, 12, act=None)(x).min() < 0
    assert parameters(sf.ConvBNAct(8, 12, 1, act="prelu", bias=True)) == 8 * 12 + 12 + 24 + 12
    assert type(sf.ConvBNAct(8, 12, act=lambda channels: nn.PReLU(1)).act) is nn.PReLU
    assert sf.ConvBNAct(8, 8, norm_layer=sf.BatchNorm2d)(x).shape == x.shape
    with pytest.raises(ValueError, match=r"activation: want one of relu.*got 'rule'"):
        sf.ConvBNAct(8, 12, act="rule")


def test_batch_norm_of_one_value():
    bn, plain = sf.BatchNorm2d(3), nn.BatchNorm2d(3)
    randomise(bn)
    plain.load_state_dict(bn.state_dict())
    one, more = torch.randn(1, 3, 1, 1), torch.randn(2, 3, 1, 1)
    before = bn.running_mean.clone()
    assert torch.equal(bn(one), plain.eval()(one))
    assert torch.equal(bn.running_mean, before)
    plain.train()
    assert torch.equal(bn(more), plain(more))
    assert torch.equal(bn.running_var, plain.running_var)
    compiled = torch.compile(bn, fullgraph=True, backend="eager")
    for x in (one, more, torch.randn(1, 3, 2, 2)):
        torch.testing.assert_close(compiled(x), bn(x))


@pytest.mark.parametrize("grid", [1, 2, 6, (3, 4), (8, 15)])
@pytest.mark.parametrize("size", [(7, 9), (1, 1), (12, 30)])
def test_adaptive_pooling_exports(grid, size):
    x = torch.randn(2, 3, *size)
    expected = F.adaptive_avg_pool2d(x, grid)
    assert torch.equal(sf.adaptive_avg_pool2d(x, grid), expected)
    program = torch.export.export(Function(lambda x: sf.adaptive_avg_pool2d(x, grid)), (x,))
    torch.testing.assert_close(program.module()(x), expected)
    assert "adaptive_avg_pool2d" not in str(program.graph)


def test_pooling_through_onnx(tmp_path):
    module = randomise(sf.PyramidPooling(8, out_channels=6)).eval()
    spatial = {0: torch.export.Dim.STATIC, 1: torch.export.Dim.STATIC, 2: torch.export.Dim("h"), 3: torch.export.Dim("w")}
    run = onnx_outputs(module, tmp_path, torch.randn(1, 8, 7, 11), dynamic=(spatial,))
    for size in ((7, 11), (13, 5), (6, 12)):
        x = torch.randn(1, 8, *size)
        with torch.no_grad():
            torch.testing.assert_close(run(x), module(x), rtol=1e-4, atol=1e-5)


def test_pyramid_pooling():
    x = torch.randn(2, 8, 7, 9)
    module = randomise(sf.PyramidPooling(8, 3, None, (1, (2, 4)), align_corners=False, input_first=False)).eval()
    expected = []
    for branch, grid in zip(module.branches, (1, (2, 4))):
        expected.append(F.interpolate(branch(F.adaptive_avg_pool2d(x, grid)), (7, 9), mode="bilinear", align_corners=False))
    assert torch.equal(module(x), torch.cat([*expected, x], 1))
    assert module.out_channels == 14
    total = sf.PyramidPooling(8, mode="sum")
    assert not list(total.parameters())
    parts = [F.interpolate(F.adaptive_avg_pool2d(x, g), (7, 9), mode="bilinear", align_corners=True) for g in (1, 2, 3, 6)]
    torch.testing.assert_close(total(x), x + sum(parts))
    sf.PyramidPooling(8, out_channels=5).train()(x[:1]).sum().backward()
    sf.PyramidPooling(8, out_channels=5).train()(x[:1, :, :1, :1]).sum().backward()
    # PSPNet's on ResNet-18, with its 3 x 3 projection: by hand
    with torch.device("meta"):
        skd = sf.PyramidPooling(512, 128, 128, kernel_size=3, act="leaky_relu", input_first=False)
    assert parameters(skd) == 4 * (512 * 128 + 256) + 1024 * 128 * 9 + 256
    for wrong in ({"mode": "max"}, {"grids": ()}, {"mode": "sum", "out_channels": 4}):
        with pytest.raises(ValueError, match="PyramidPooling: want"):
            sf.PyramidPooling(8, **wrong)


def test_spatial_pyramid_pooling():
    with torch.device("meta"):
        assert parameters(sf.SpatialPyramidPooling(512)) == 116_476
    module = randomise(sf.SpatialPyramidPooling(16, 12, out_channels=5, grids=(4, 2))).eval()
    x = torch.randn(2, 16, 6, 15)
    y = module.spp_bn(x)
    levels = [y]
    for i, grid in enumerate(((4, 10), (2, 5))):
        level = getattr(module, f"spp{i}")(F.adaptive_avg_pool2d(y, grid))
        levels.append(F.interpolate(level, (6, 15), mode="bilinear", align_corners=False))
    assert torch.equal(module(x), module.spp_fuse(torch.cat(levels, 1)))
    module.train()(torch.randn(1, 16, 1, 1)).sum().backward()


def test_fast_attention():
    q, k, v = torch.randn(2, 4, 3, 5), torch.randn(2, 4, 3, 5), torch.randn(2, 6, 3, 5)
    unit = lambda t: t / t.norm(dim=1, keepdim=True)  # noqa: E731
    weights = torch.einsum("nchw,ncyx->nhwyx", unit(q), unit(k))
    torch.testing.assert_close(sf.fast_attention(q, k, v), torch.einsum("nhwyx,ncyx->nchw", weights, v))
    with torch.device("meta"):
        module = sf.FastAttention(64)
        small, large = macs(module, 1, 64, 32, 32), macs(module, 1, 64, 64, 64)
    assert large == 4 * small
    assert small == 32 * 32 * (64 * 32 * 2 + 64 * 64 * 2 + 2 * 64 * 32)
    zeros = torch.zeros(1, 64, 2, 2, requires_grad=True)
    sf.FastAttention(64).eval()(zeros).sum().backward()
    assert zeros.grad.isfinite().all()


def test_residuals():
    x = torch.randn(2, 8, 9, 9)
    for block, channels in ((sf.BasicBlock(8, 8), 8), (sf.Bottleneck(8, 2), 8), (sf.Bottleneck(8, 4, 2, 2), 16)):
        y = randomise(block).eval()(x)
        assert torch.equal(y, block.pre_activation(x).relu())
        assert y.shape == (2, channels, *(2 * [5] if channels == 16 else 2 * [9]))
    layer = nn.Conv2d(8, 8, 3, padding=1)
    assert torch.equal(sf.Residual(layer)(x), x + layer(x))
    assert torch.equal(sf.SkipConcat(layer)(x), torch.cat([x, layer(x)], 1))
