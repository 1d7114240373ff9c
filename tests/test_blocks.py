"""The blocks of segfast.nn: sizes, values against plain PyTorch, exports."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from segfast import _backend, testing
from segfast import nn as sf
from segfast.engine import bench
from segfast.nn import context
from segfast.nn.folding import JOINS, foldable


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


SIZES = [(1, 1), (2, 3), (7, 8), (9, 16), (224, 17)]


@pytest.mark.parametrize("factor", [2, 3, 4])
@pytest.mark.parametrize("mode", ["conv", "max", "avg"])
def test_downsample(mode, factor):
    for height, width in SIZES:
        x = torch.randn(1, 2, height, width)
        y = sf.Downsample(2, factor=factor, mode=mode)(x)
        assert y.shape == (1, 2, -(-height // factor), -(-width // factor))
        if height >= factor and width >= factor:
            z = sf.Downsample(2, factor=factor, mode=mode, odd="floor")(x)
            assert z.shape == (1, 2, height // factor, width // factor)
            if mode != "conv":
                assert torch.equal(z, y[:, :, : height // factor, : width // factor])
        if mode == "max":
            assert y.max() == x.max()
    last = torch.arange(6.0).view(1, 1, 2, 3)
    assert sf.Downsample(1, mode="avg")(last)[0, 0, 0, 1] == 3.5  # the mean of 2 and 5, the column beyond not counted
    unit = sf.Downsample(2, 5, norm=True, act="relu")
    assert [type(m) for m in unit] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
    assert unit.sample.bias is None
    for wrong in ({"mode": "min"}, {"odd": "even"}, {"factor": 1}, {"mode": "max", "out_channels": 3}):
        with pytest.raises(ValueError, match="Downsample: want"):
            sf.Downsample(2, **wrong)


@pytest.mark.parametrize("mode", ["nearest", "bilinear", "transposed"])
def test_upsample(mode):
    for factor in (2, 4):
        for height, width in SIZES[:4]:
            x = torch.randn(1, 2, height, width)
            module = sf.Upsample(2, factor=factor, mode=mode)
            assert module(x).shape == (1, 2, factor * height, factor * width)
            down = sf.Downsample(2, factor=factor)(x)
            assert module(down, (height, width)).shape == x.shape
    for wrong in ({"mode": "cubic"}, {"factor": 1}, {"mode": "nearest", "out_channels": 3}):
        with pytest.raises(ValueError, match="Upsample: want"):
            sf.Upsample(2, **wrong)


def test_upsample_values():
    x = torch.randn(1, 2, 3, 5)
    for align_corners in (False, True):
        expected = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=align_corners)
        torch.testing.assert_close(sf.Upsample(2, align_corners=align_corners)(x), expected)
    for kernel, padding, extra in ((2, 0, 0), (3, 1, 1), (4, 1, 0), (5, 2, 1)):
        module = sf.Upsample(2, 3, mode="transposed", kernel_size=kernel, bias=True)
        expected = F.conv_transpose2d(x, module.conv.weight, module.conv.bias, 2, padding, extra)
        assert torch.equal(module(x), expected)
        assert torch.equal(module(x, (5, 9)), expected[:, :, :5, :9])
    with pytest.raises(ValueError, match="size of at most"):
        module(x, (7, 10))
    with pytest.raises(ValueError, match="kernel_size >= factor"):
        sf.Upsample(2, factor=3, mode="transposed", kernel_size=2)


def test_same_size_for_every_odd_kernel():
    x = torch.empty(1, 4, 33, 18, device="meta")
    for kernel, dilation, stride in itertools.product((1, 3, 5, 7, 9), (1, 2, 4), (1, 2, 3)):
        size = (1, 4, -(-33 // stride), -(-18 // stride))
        with torch.device("meta"):
            asymmetric = sf.AsymmetricConv(4, 4, kernel, stride, dilation, act=None)
            convolution = sf.ConvBNAct(4, 4, kernel, stride, dilation=dilation)
        for module in (asymmetric.vertical.conv, asymmetric.horizontal.conv, convolution.conv):
            assert module.padding == tuple(dilation * (k - 1) // 2 for k in module.kernel_size)
        assert asymmetric.horizontal.conv(asymmetric.vertical.conv(x)).shape == size
        assert convolution.conv(x).shape == size
    with pytest.raises(ValueError, match="odd kernel_size, got 4"):
        sf.AsymmetricConv(4, 4, 4)
    with pytest.raises(ValueError, match="groups that divide"):
        sf.ShuffledConv(10, 12, groups=3)


def test_convolutions_values():
    x = torch.randn(2, 6, 9, 11)
    unit = randomise(sf.ShuffledConv(6, 12, 3, 3)).eval()
    expected = unit.act(unit.bn(F.conv2d(x, unit.conv.weight, padding=1, groups=3)))
    assert torch.equal(unit(x), expected.view(2, 3, 4, 9, 11).transpose(1, 2).reshape(2, 12, 9, 11))
    # A separable kernel is one k x k convolution.
    pair = sf.AsymmetricConv(1, 1, 5, act=None).eval()
    kernel = pair.vertical.conv.weight * pair.horizontal.conv.weight
    one = torch.randn(1, 1, 9, 11)
    torch.testing.assert_close(pair(one), F.conv2d(one, kernel, padding=2) / (1 + 1e-5), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(8, 12), (9, 13), (1, 1)])
def test_zoomed_conv(size):
    x = torch.randn(2, 4, *size)
    half = tuple((s + 1) // 2 for s in size)
    for stride, repeats in ((1, 1), (2, 1), (1, 2)):
        unit = randomise(sf.ZoomedConv(4, 6, stride, repeats)).eval()
        y = F.interpolate(x, half, mode="bilinear", align_corners=True)
        for i, layer in enumerate(unit.convs):
            y = layer.bn(F.conv2d(y, layer.conv.weight, padding=1))
            y = y.relu() if i < repeats - 1 else y
        y = F.interpolate(y, size, mode="bilinear", align_corners=True) if stride == 1 else y
        assert torch.equal(unit(x), y.relu())
    with pytest.raises(ValueError, match="ZoomedConv: want"):
        sf.ZoomedConv(4, 4, 3)


def test_esp():
    x = torch.randn(2, 13, 9, 11)
    unit = randomise(sf.ESP(13, 13)).eval()
    reduced = F.conv2d(x, unit.reduce.weight)
    maps = [F.conv2d(reduced, b.weight, padding=2**i, dilation=2**i) for i, b in enumerate(unit.branches)]
    assert [m.shape[1] for m in maps] == [5, 2, 2, 2, 2]
    a, b, c, d, e = maps
    merged = torch.cat([a, b, b + c, b + c + d, b + c + d + e], 1)
    torch.testing.assert_close(unit(x), F.prelu(unit.bn(x + merged), unit.act.weight))
    assert sf.ESP(19, 64, 2)(torch.randn(1, 19, 9, 12)).shape == (1, 64, 5, 6)
    assert sf.ESP(8, 3)(torch.randn(1, 8, 4, 4)).shape == (1, 3, 4, 4)
    for wrong in ({"residual": True}, {"stride": 3}):
        with pytest.raises(ValueError, match="ESP: want stride"):
            sf.ESP(8, 16, **wrong)


def judged(unit: nn.Module, plain, x: torch.Tensor) -> None:
    """Against plain PyTorch in float64: at most twice the error of plain PyTorch in float32 plus 4 eps of the largest value.

    Plain PyTorch's error is its largest at x and at points within rounding of x: behind a BatchNorm that takes the batch's
    statistics one draw of it says little (tests/harness.py, `judge`).
    """
    exact_unit = copy.deepcopy(unit).double()
    with torch.no_grad():
        y = unit(x)
        errors = []
        for k in range(1 + testing.NEIGHBOURS):
            near = testing.neighbour(x, k, x.dtype)
            errors.append((plain(unit, near).double() - plain(exact_unit, near.double())).abs().max().item())
        exact = plain(exact_unit, x.double())
    assert y.shape == exact.shape
    error = (y.double() - exact).abs().max().item()
    assert error <= 2 * max(errors) + 4 * torch.finfo(torch.float32).eps * exact.abs().max().item()


def plain_inverted(unit, x):
    y = unit.expand(x) if hasattr(unit, "expand") else x
    y = unit.separable.conv(y)
    return x + y if unit.use_shortcut else y


def plain_v1(unit, x):
    y = unit.compress(x)
    n, c, h, w = y.shape
    shuffled = y.view(n, unit.groups, c // unit.groups, h, w).transpose(1, 2).reshape(n, c, h, w)
    y = torch.empty_like(y).copy_(shuffled)  # in its layout: PyTorch's BatchNorm is less exact in channels_last
    y = unit.expand(unit.depthwise(y))
    return F.relu(x + y) if unit.stride == 1 else F.relu(torch.cat([y, F.avg_pool2d(x, 3, 2, 1)], 1))


def plain_v2(unit, x):
    if unit.stride == 2:
        y = torch.cat([unit.shortcut.conv(x), unit.separable.conv(unit.expand(x))], 1)
    else:
        left, right = x.chunk(2, 1)
        y = torch.cat([left, unit.separable.conv(unit.expand(right))], 1)
    n, c, h, w = y.shape
    return y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("build", "channels", "plain"),
    [
        (lambda: sf.InvertedResidual(8, 8), 8, plain_inverted),
        (lambda: sf.InvertedResidual(8, 12, 2, 4, 5, act="relu"), 8, plain_inverted),
        (lambda: sf.InvertedResidual(8, 8, expansion=1), 8, plain_inverted),
        (lambda: sf.ShuffleV1Unit(24, 24, 3), 24, plain_v1),
        (lambda: sf.ShuffleV1Unit(12, 48, 2, 2, first_groups=1), 12, plain_v1),
        (lambda: sf.ShuffleV2Unit(24, 24), 24, plain_v2),
        (lambda: sf.ShuffleV2Unit(12, 24, 2), 12, plain_v2),
    ],
)
def test_fused_units(build, channels, plain, memory_format):
    unit = randomise(build())
    x = torch.randn(2, channels, 9, 13).contiguous(memory_format=memory_format)
    judged(unit.eval(), plain, x)
    other = build()
    other.load_state_dict(unit.state_dict())
    judged(unit.train(), plain, x)  # the batch's statistics
    plain(other.train(), x).square().mean().backward()
    unit.load_state_dict(other.state_dict())
    unit.zero_grad()
    unit(x).square().mean().backward()
    for (name, a), b in zip(unit.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4 * max(1.0, b.grad.abs().max().item()), msg=name)


def plain_esp(unit, x):
    maps = [branch(unit.reduce(x)) for branch in unit.branches]
    for i in range(2, len(maps)):
        maps[i] = maps[i - 1] + maps[i]
    y = torch.cat(maps, 1)
    return unit.act(unit.bn(x + y if unit.residual else y))


@pytest.mark.drawn(1 / 3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("act", ["prelu", "relu", None, "leaky_relu"])
@pytest.mark.parametrize(("shape", "options"), [((11, 24), {"stride": 2}), ((24, 24), {}), ((7, 8), {}), ((9, 9), {"rates": 1})])
def test_esp_joins_in_one_pass(shape, options, act, dtype):
    unit = randomise(sf.ESP(*shape, act=act, **options)).eval().to(dtype)
    x = torch.randn(2, shape[0], 9, 13, dtype=dtype).contiguous(memory_format=torch.channels_last)
    kernels = JOINS and dtype != torch.float64 and act != "leaky_relu"  # which the kernel does not know
    calls = lambda: _backend._C.kernel_calls()["concat_affine"] if JOINS else 0  # noqa: E731
    with torch.no_grad():
        before = calls()
        judged(unit, plain_esp, x)
        assert (calls() > before) == kernels
        before = calls()
        seen = []
        hook = unit.bn.register_forward_hook(lambda module, args, y: seen.append((args[0].clone(), y.clone())))
        unit(x)
        hook.remove()
        assert calls() == before
        assert len(seen) == 1  # who watches a layer gets to see it
    assert unit(x).grad_fn is not None
    assert calls() == before


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: sf.ESP(8, 8, rates=0), "ESP: want rates >= 1, got 0"),
        (lambda: sf.DSConv(4, 2.5), "DSConv: want out_channels >= 1, got 2.5"),
        (lambda: sf.ConvBNAct(4, 0), "ConvBNAct: want out_channels >= 1, got 0"),
        (lambda: sf.DSConv(0, 4), "DSConv: want dw_channels >= 1, got 0"),
        (lambda: sf.ESP(0, 8), "ESP: want in_channels >= 1, got 0"),
        (lambda: sf.PyramidPooling(3), "PyramidPooling: want branch_channels >= 1, got 0"),
        (lambda: sf.PyramidPooling(8, grids=(1, (2, 0))), "PyramidPooling: want columns of a grid >= 1, got 0"),
        (lambda: context.SpatialPyramidPooling(8, grids=()), "SpatialPyramidPooling: want number of grids >= 1, got 0"),
        (lambda: context.SpatialPyramidPooling(8, 2), "SpatialPyramidPooling: want level_channels >= 1, got 0"),
        (lambda: sf.BNActConv(4, 4, 2), "BNActConv: want an odd kernel_size, got 2"),
        (lambda: sf.ShuffledConv(4, 4, 2), "ShuffledConv: want an odd kernel_size, got 2"),
        (lambda: sf.AsymmetricConv(4, 4, 4), "AsymmetricConv: want an odd kernel_size, got 4"),
        (lambda: sf.InvertedResidual(4, 4, kernel_size=2), "InvertedResidual: want an odd kernel_size, got 2"),
        (lambda: sf.InvertedResidual(4, 4, expansion=0.1), r"InvertedResidual: want in_channels \* expansion >= 1, got 0"),
        (lambda: sf.ZoomedConv(4, 4, repeats=0), "ZoomedConv: want repeats >= 1, got 0"),
        (lambda: sf.ZoomedConv(4, 4, 3), "ZoomedConv: want stride 1 or 2, got 3"),
        (lambda: sf.FastAttention(4, 0), "FastAttention: want key_channels >= 1, got 0"),
        (lambda: sf.cost.convolution(6, 8, 9, groups=4), "convolution: want groups that divide the channels, got 6, 8, groups=4"),
    ],
)
def test_arguments_of_blocks(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("build", [lambda: sf.InvertedResidual(8, 8), lambda: sf.ShuffleV2Unit(8, 8), lambda: sf.ESP(8, 8)])
def test_traces_hold_only_aten(build, memory_format, grad):
    unit, x = randomise(build()).eval(), torch.randn(1, 8, 9, 9).contiguous(memory_format=memory_format)
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(unit, x, check_trace=False)
        torch.testing.assert_close(traced(x), unit(x), rtol=1e-4, atol=1e-4)
    assert "segfast::" not in str(traced.inlined_graph)


def test_grids_of_any_kind():
    x = torch.randn(1, 8, 9, 9)
    assert sf.PyramidPooling(8, grids=iter((1, 2))).eval()(x).shape == (1, 16, 9, 9)
    assert sf.PyramidPooling(8, grids=[torch.tensor([1, 2]).numpy()[1]]).eval()(x).shape == (1, 16, 9, 9)
    with pytest.raises(ValueError, match="want grids of one number or two"):
        sf.PyramidPooling(8, grids=[(1, 2, 3)])


def test_shuffle_unit_errors():
    with pytest.raises(ValueError, match="ShuffleV1Unit: want stride 2"):
        sf.ShuffleV1Unit(12, 24, 3)
    with pytest.raises(ValueError, match="ShuffleV2Unit: want even"):
        sf.ShuffleV2Unit(11, 11)


WIDE = {"kernel_size": (3, 5), "stride": (2, 1), "bias": True}
GROUPED = {"kernel_size": 5, "stride": 3, "groups": 4}
KINDS = [
    (lambda c, k: nn.Conv2d(c, k, 3, padding=1, bias=False), sf.cost.convolution, {}),
    (lambda c, k: nn.Conv2d(c, k, (3, 5), (2, 1), (1, 2)), sf.cost.convolution, WIDE),
    (lambda c, k: nn.Conv2d(c, k, 3, padding=4, dilation=4, bias=False), sf.cost.convolution, {}),
    (lambda c, k: nn.Conv2d(c, k, 5, 3, 2, groups=4, bias=False), sf.cost.convolution, GROUPED),
    (lambda c, k: nn.ConvTranspose2d(c, k, 4, 2, 1, bias=False), sf.cost.transposed, {}),
    (lambda c, k: sf.DSConv(c, k, 2, kernel_size=5), sf.cost.depthwise_separable, {"kernel_size": 5, "stride": 2}),
    (lambda c, k: sf.AsymmetricConv(c, k, 7, 2, 3), sf.cost.asymmetric, {"kernel_size": 7, "stride": 2}),
    (lambda c, k: sf.InvertedResidual(c, k, 2), sf.cost.inverted_residual, {"stride": 2}),
    (lambda c, k: sf.InvertedResidual(c, k, 1, 1), sf.cost.inverted_residual, {"expansion": 1}),
    (lambda c, k: sf.ESP(c, k), sf.cost.esp, {}),
    (lambda c, k: sf.ESP(c, k, 2), sf.cost.esp, {"stride": 2}),
    (lambda c, k: sf.Bottleneck(c, k), sf.cost.bottleneck, {}),
    (lambda c, k: sf.Bottleneck(c, k, 2), sf.cost.bottleneck, {"stride": 2}),
]


@pytest.mark.parametrize(("build", "function", "options"), KINDS)
def test_costs(build, function, options):
    for c, k, size in ((8, 12, (9, 14)), (16, 4, (7, 7)), (32, 8, (16, 5))):
        with torch.device("meta"):
            module = build(c, k).eval()
            y = module(torch.empty(1, c, *size))
            counted = macs(module, 1, c, *size)
        cost = function(c, k, size, **options)
        norms = sum(parameters(m) for m in module.modules() if isinstance(m, (nn.BatchNorm2d, nn.PReLU)))
        assert cost == (parameters(module) - norms, counted, tuple(y.shape[2:]))


def test_cost_table():
    table = sf.cost.table(64, 64, 56)
    assert table["convolution"] == (36_864, 36_864 * 56 * 56, (56, 56))
    assert table["dilated"] == table["convolution"]
    assert table["grouped"].macs * 4 == table["convolution"].macs
    assert table["depthwise-separable"].macs / table["convolution"].macs == pytest.approx(1 / 64 + 1 / 9)
    assert table["asymmetric"].parameters * 3 == table["convolution"].parameters * 2
    assert table["bottleneck"].parameters == 64 * 16 + 9 * 16 * 16 + 16 * 64
    assert sf.cost.table(64, 64, (28, 112)) == {n: c._replace(size=(28, 112)) for n, c in table.items()}


@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last))
@pytest.mark.parametrize("align_corners", (False, True))
def test_resize_without_gradients_is_interpolate(layout, align_corners):
    """On its own kernel (whose error tests/test_packed_maps.py judges), with the same strides, also where the result is large."""
    for channels, size in ((3, (33, 17)), (19, (256, 512)), (1, (1100, 1000)), (5, (4, 7))):
        x = torch.randn(2, channels, 9, 13).contiguous(memory_format=layout)
        with torch.no_grad():
            y = sf.resize(x, size, align_corners)
        expected = F.interpolate(x, size, mode="bilinear", align_corners=align_corners)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
        assert y.stride() == expected.stride()


class Labelled(torch.Tensor):
    """A subclass as users have them."""


class Resized(nn.Module):
    def forward(self, x):
        return sf.resize(x, (18, 20))


def calls_of_resize() -> int:
    return _backend._C.kernel_calls()["resize"]


def test_resize_takes_its_kernel_where_nothing_else_is_wanted():
    """With gradients, in other dtypes, in subclasses, in graphs and under transforms it is PyTorch's."""
    x = torch.randn(2, 3, 9, 13)
    resize = Resized()
    exact = F.interpolate(x, (18, 20), mode="bilinear")
    compiled = _backend._C is not None and _backend.requested == "auto"
    before = calls_of_resize() if compiled else 0
    with torch.no_grad():
        for y in (resize(x), resize(x.bfloat16())):
            off = 1e-6 if y.dtype == torch.float32 else 0.02
            torch.testing.assert_close(y.float(), exact, rtol=off, atol=off)
        if compiled:
            assert calls_of_resize() == before + 2
        assert torch.equal(resize(x.double()), F.interpolate(x.double(), (18, 20), mode="bilinear"))
        assert torch.equal(resize(x.as_subclass(Labelled)).as_subclass(torch.Tensor), exact)
        assert torch.equal(torch.func.vmap(resize)(x[None])[0], exact)
        assert torch.equal(sf.resize(x, (18, 20), mode="nearest"), F.interpolate(x, (18, 20)))
        traced = torch.jit.trace(resize, x, check_trace=False)
        exported = torch.export.export(resize, (x,))
        with bench.references():
            assert torch.equal(resize(x), exact)
    assert torch.equal(resize(x), exact)
    assert "segfast" not in str(traced.graph) + str(exported.graph)
    if compiled:
        assert calls_of_resize() == before + 2


@pytest.mark.parametrize("size", [(7,), (7, 8, 9), (True, 8), (0, 8)])
def test_resize_refuses_the_same_without_gradients(size):
    x = torch.randn(1, 3, 9, 13)
    with pytest.raises((ValueError, TypeError, RuntimeError)) as plain:
        sf.resize(x, size)
    with torch.no_grad(), pytest.raises(plain.type) as quick:
        sf.resize(x, size)
    assert str(quick.value) == str(plain.value)


def test_forward_derivatives_without_gradients():
    """no_grad does not end forward-mode AD."""
    x, direction = torch.randn(2, 1, 4, 9, 13).double()
    zoomed = randomise(sf.ZoomedConv(4, 6)).double().eval()
    for function in (lambda v: sf.resize(v, (18, 20)), zoomed):

        def derivative(dtype):
            with torch.autograd.forward_ad.dual_level():
                dual = torch.autograd.forward_ad.make_dual(x.to(dtype), direction.to(dtype))
                return torch.autograd.forward_ad.unpack_dual(function(dual)).tangent  # noqa: B023

        exact = derivative(torch.float64)
        zoomed.float()
        with torch.no_grad():
            torch.testing.assert_close(derivative(torch.float32).double(), exact, rtol=1e-4, atol=1e-4)
        zoomed.double()


def test_maps_of_the_kernels_in_traced_graphs():
    """Their fakes: sizes and strides are those of the kernels."""
    if _backend._C is None or _backend.requested != "auto":
        pytest.skip("no kernels")
    with torch.no_grad():
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(2, 4, 5, 6).contiguous(memory_format=layout)
            graph = make_fx(lambda v: sf.resize(v, (7, 8)), tracing_mode="real")(x)
            compiled = torch.compile(graph, fullgraph=True, backend="aot_eager")(x)
            assert torch.equal(compiled, graph(x))
            assert compiled.stride() == graph(x).stride()


def test_columns_of_an_exported_grid_are_those_of_the_rounding(monkeypatch):
    """Whole numbers alone, also halfway between two, where Python rounds to the even one."""
    cases = [(rows, h, w) for rows in (1, 2, 4, 8) for h in range(1, 40) for w in range(1, 80)]
    want = [context.in_proportion(*case) for case in cases]
    assert want == [max(1, round(w / h * rows)) for rows, h, w in cases]
    monkeypatch.setattr(context, "free", lambda *sizes: True)
    assert [context.in_proportion(*case) for case in cases] == want


class NormAndReLU(nn.BatchNorm2d):
    def forward(self, x):
        return torch.relu(super().forward(x))


@torch.no_grad()
def test_folding_takes_nothing_for_a_batch_norm_that_does_more():
    x = torch.randn(1, 3, 16, 16)
    block = sf.ConvBNAct(3, 8, norm_layer=NormAndReLU, act=None).eval()
    got = block(x)
    with torch.enable_grad():
        torch.testing.assert_close(got, block(x).detach())
    assert all(foldable(block.conv, norm(8).eval()) for norm in (nn.BatchNorm2d, sf.BatchNorm2d))
    block = sf.ConvBNAct(3, 8).eval()
    block.bn.running_mean.normal_()
    block.bn.bias = None
    got = block(x)
    with torch.enable_grad():
        torch.testing.assert_close(got, block(x).detach(), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("block", [sf.InvertedResidual(16, 16), sf.ShuffleV1Unit(16, 32, 2, 2), sf.ShuffleV2Unit(16, 16)])
def test_blocks_under_vmap(block):
    x = torch.randn(2, 3, 16, 8, 8)
    got = torch.func.vmap(block.eval())(x)
    torch.testing.assert_close(got, torch.stack([block(y) for y in x]), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("block", [sf.BasicBlock(8, 8), sf.ESP(16, 16), sf.BNActConv(8, 8)])
def test_hooks_of_parts_see_what_the_part_gave(block):
    same_as_hooked(block.eval(), torch.randn(2, 16 if type(block) is sf.ESP else 8, 9, 9))


def same_as_hooked(model, x) -> None:
    kept = []
    handles = [m.register_forward_hook(lambda m, i, o: kept.append((o, o.clone()))) for m in model.modules() if m is not model]
    with torch.no_grad():
        hooked = model(x)
        for handle in handles:
            handle.remove()
        torch.testing.assert_close(hooked, model(x), rtol=1e-4, atol=1e-4)
    assert kept
    assert all(torch.equal(o, copy) for o, copy in kept if isinstance(o, torch.Tensor))
