"""Encoders: counts, weights, sizes, and the networks that they are copies of."""

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import count, extra
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import segfast
from segfast.backbones import EfficientFormer, EfficientFormerV2, ResNet, ShuffleNetV1, ShuffleNetV2, _registry
from segfast.backbones.efficientformer import Attention, Attention2d, AttentionDownsample, attention_bias

CLASSIFIERS = {  # parameters with 1,000 classes, MACs at 224 x 224
    "mobilenetv1": (4_231_976, 568.7e6),
    "mobilenetv2": (3_504_872, 300.8e6),
    "mobilenetv2_140": (6_108_776, 582.2e6),
    "efficientnet_b0": (5_288_548, 386e6),
    "efficientnet_b1": (7_794_184, None),
    "efficientnet_b2": (9_109_994, None),
    "efficientnet_b3": (12_233_232, None),
    "efficientnet_b4": (19_341_616, None),
    "efficientnet_b5": (30_389_784, None),
    "efficientnet_b6": (43_040_704, None),
    "efficientnet_b7": (66_347_960, None),
    "poolformer_s12": (11_915_176, 1.812e9),
    "poolformer_s24": (21_388_968, None),
    "poolformer_s36": (30_862_760, None),
    "poolformer_m36": (56_172_520, None),
    "poolformer_m48": (73_473_448, None),
    "efficientformer_l1": (12_289_928, 1.291e9),
    "efficientformer_l3": (31_406_000, None),
    "efficientformer_l7": (82_229_328, None),
    "efficientformerv2_s0": (3_600_256, 0.396e9),
    "efficientformerv2_s1": (6_185_560, None),
    "efficientformerv2_s2": (12_710_112, None),
    "efficientformerv2_l": (26_322_288, None),
}
RESNETS = {18: 11_689_512, 34: 21_797_672, 50: 25_557_032, 101: 44_549_160, 152: 60_192_808}
SHUFFLENETS = [
    (ShuffleNetV1, {"groups": 1}, 1_531_936, 143e6),
    (ShuffleNetV1, {"groups": 2}, 1_733_848, 141e6),
    (ShuffleNetV1, {"groups": 3}, 1_865_728, 137.5e6),
    (ShuffleNetV1, {"groups": 4}, 1_968_344, 134e6),
    (ShuffleNetV1, {"groups": 8}, 2_434_768, 138e6),
    (ShuffleNetV1, {"groups": 3, "width": 0.5}, 718_324, 38e6),
    (ShuffleNetV1, {"groups": 3, "width": 0.25}, 305_902, None),
    (ShuffleNetV2, {"width": 0.5}, 1_366_792, 40.5e6),
    (ShuffleNetV2, {"width": 1.0}, 2_278_604, 144.9e6),
    (ShuffleNetV2, {"width": 1.5}, 3_503_624, 295.8e6),
    (ShuffleNetV2, {"width": 2.0}, 7_393_996, 583.3e6),
]
FAMILIES = ["mobilenetv2_035", "efficientnet_lite0", "poolformer_s12", "efficientformer_l1", "efficientformerv2_s0"]
OURS = sorted(_registry.OWN)
SMALL = [
    "shufflenetv2_x0_5",
    "efficientformerv2_s0",
    "shufflenetv1_g4",
    "mobilenetv2_035",
    "poolformer_s12",
    "efficientformer_l1",
]


def parameters(module) -> int:
    return sum(p.numel() for p in module.parameters())


def macs(function, *shape: int) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function(torch.empty(shape, device="meta"))
    return counter.get_total_flops() // 2


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights and BatchNorm statistics, the same for the same names and shapes in the same order."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if name.endswith("running_var"):
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
            elif tensor.is_floating_point():
                fan = max(1, tensor[0].numel()) if tensor.dim() > 1 else 4
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * math.sqrt(2 / fan) + (tensor.dim() == 1) * 0.5)
    module.eval()  # which gives None for timm's attention
    return module


def allocate(build) -> nn.Module:
    """Without the initialisation, which takes longer than the test."""
    with torch.device("meta"):
        module = build()
    return module.to_empty(device="cpu")


@pytest.mark.drawn(1 / 2)
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_counts_of_timms(name):
    extra("timm")
    number, expected = CLASSIFIERS[name]
    with torch.device("meta"):
        network = _registry.classifier(name).eval()
    assert parameters(network) == number
    if expected is not None:
        assert macs(network, 1, 3, 224, 224) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("depth", RESNETS)
def test_counts_of_resnets(depth):
    with torch.device("meta"):
        backbone = segfast.create_backbone(f"resnet{depth}").eval()
    assert parameters(backbone) + 1000 * (backbone.channels[-1] + 1) == RESNETS[depth]
    assert backbone.channels == tuple(c * (1 if depth < 50 else 4) for c in (64, 128, 256, 512))
    expected = {18: 1.814e9, 34: 3.664e9, 50: 4.089e9, 101: 7.801e9, 152: 11.514e9}[depth]
    assert macs(backbone, 1, 3, 224, 224) == pytest.approx(expected, rel=0.001)


@pytest.mark.parametrize(("kind", "options", "number", "expected"), SHUFFLENETS)
def test_counts_of_shufflenets(kind, options, number, expected):
    with torch.device("meta"):
        network = kind(**options, num_classes=1000).eval()
    assert parameters(network) == number
    if expected is not None:
        assert macs(network.classify, 1, 3, 224, 224) == pytest.approx(expected, rel=0.02)


@pytest.mark.drawn(1 / 2)
@pytest.mark.parametrize("name", [*OURS, *FAMILIES, "mobilenetv1"])
def test_pyramid(name):
    if name in _registry.TIMM:
        extra("timm")
    with torch.device("meta"):
        backbone = segfast.create_backbone(name).eval()
        for height, width in ((65, 97), (32, 33))[: count(1, 2)]:
            maps = backbone(torch.empty(2, 3, height, width))
            assert backbone.strides == (4, 8, 16, 32)
            for y, channels, stride in zip(maps, backbone.channels, backbone.strides, strict=True):
                if name.startswith("poolformer"):
                    rows, columns = (-(-((s + 1) // 4) // (stride // 4)) for s in (height, width))
                else:
                    rows, columns = -(-height // stride), -(-width // stride)
                assert y.shape == (2, channels, rows, columns)


@pytest.mark.parametrize("name", ["resnet18", "shufflenetv1_g2", "shufflenetv2_x0_5", "mobilenetv2_035", "efficientnet_b0"])
def test_stem_map(name):
    if name in _registry.TIMM:
        extra("timm")
    with torch.device("meta"):
        backbone = segfast.create_backbone(name, stem=True).eval()
        maps = backbone(torch.empty(1, 3, 35, 64))
    assert backbone.strides == (2, 4, 8, 16, 32)
    assert [tuple(y.shape[1:]) for y in maps[:2]] == [(backbone.channels[0], 18, 32), (backbone.channels[1], 9, 16)]


@pytest.mark.parametrize("name", SMALL[: count(3, 6)])
def test_every_parameter_gets_a_gradient(name):
    if name in _registry.TIMM:
        extra("timm")
    backbone = segfast.create_backbone(name)
    sum(y.square().mean() for y in backbone(torch.randn(2, 3, 32, 64))).backward()
    for key, parameter in backbone.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key


@pytest.mark.parametrize("name", ["efficientformerv2_s0", "shufflenetv2_x0_5", "efficientformer_l1"][: count(1, 3)])
def test_compiles_and_exports(name):
    if name in _registry.TIMM:
        extra("timm")
    backbone = segfast.create_backbone(name).eval()
    x = torch.randn(1, 3, 33, 64)
    with torch.no_grad():
        expected = backbone(x)
        builds = (
            lambda: torch.compile(backbone, fullgraph=True, backend="eager"),
            lambda: torch.export.export(backbone, (x,)).module(),
        )
        for build in builds[: count(1, 2)]:
            for a, b in zip(build()(x), expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


@pytest.mark.parametrize("depth", [50, 18][: count(1, 2)])
def test_resnet_is_torchvisions(depth):
    torchvision = extra("torchvision")
    theirs = randomise(allocate(getattr(torchvision.models, f"resnet{depth}")))
    ours = allocate(lambda: ResNet(depth, stem=True)).eval()
    ours.load_weights(theirs.state_dict())
    x = torch.randn(1, 3, 33, 49)
    with torch.no_grad():
        y = theirs.relu(theirs.bn1(theirs.conv1(x)))
        expected = [y]
        y = theirs.maxpool(y)
        for stage in (theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4):
            y = stage(y)
            expected.append(y)
        for a, b in zip(ours(x), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))
    if depth == 50:  # torchvision's dilation, which has no BasicBlock
        dilated = allocate(lambda: ResNet(50, output_stride=8, dilate_first=False)).eval()
        dilated.load_weights(theirs.state_dict())
        atrous = torchvision.models.resnet50
        again = allocate(lambda: atrous(replace_stride_with_dilation=[False, True, True])).eval()
        again.load_state_dict(theirs.state_dict())
        with torch.no_grad():
            y = again.maxpool(again.relu(again.bn1(again.conv1(x))))
            expected = again.layer4(again.layer3(again.layer2(again.layer1(y))))
            torch.testing.assert_close(dilated(x)[-1], expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_resnet_options():
    backbone = ResNet(18, deep_stem=True, output_stride=8, ceil_mode=True).eval()
    assert backbone.strides == (4, 8, 8, 8)
    assert {n: tuple(backbone.get_parameter(f"{n}.weight").shape) for n in ("conv1", "conv3", "layer1.0.downsample.0")} == {
        "conv1": (64, 3, 3, 3), "conv3": (128, 64, 3, 3), "layer1.0.downsample.0": (64, 128, 1, 1),
    }  # fmt: skip
    assert [unit.conv1.dilation for unit in (*backbone.layer3, *backbone.layer4)] == [(2, 2), (2, 2), (4, 4), (4, 4)]
    x = torch.randn(1, 3, 72, 70)
    with torch.no_grad():
        outputs, before = backbone.forward_both(x)
        for a, b, c in zip(backbone(x), outputs, before, strict=True):
            assert torch.equal(a, b)
            assert torch.equal(b, c.relu())
            assert c.min() < 0
    assert outputs[-1].shape == (1, 512, 10, 9)  # ceil_mode: 36 x 35 after the stem, 19 x 18 after the pooling
    for wrong in ({"depth": 20}, {"depth": 18, "output_stride": 4}):
        with pytest.raises(ValueError, match="ResNet: want"):
            ResNet(**wrong)


@pytest.mark.parametrize("name", ["shufflenet_g3_w1", "shufflenet_g8_w1", "shufflenet_g3_wd2"])
def test_shufflenet_v1_is_pytorchcvs(name):
    models = extra("pytorchcv.models.shufflenet")
    theirs = randomise(getattr(models, name)(), 1)
    groups, half = int(name[12]), name.endswith("wd2")
    ours = ShuffleNetV1(groups, 0.5 if half else 1.0, num_classes=1000).eval()
    ours.load_weights(theirs.state_dict())
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(x)
        torch.testing.assert_close(ours.classify(x), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
        headless = ShuffleNetV1(groups, 0.5 if half else 1.0).eval()
        headless.load_weights(theirs.state_dict())
        assert torch.equal(headless(x)[-1], ours(x)[-1])


def test_shufflenet_v1_stored():
    # What pytorchcv's shufflenet_g3_w1 gave with these weights: the order of its tensors is that of ours.
    network = randomise(ShuffleNetV1(3, num_classes=1000), 1)
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        scores = network.classify(x)[0]
    expected = torch.tensor([311.075684, -252.838287, -782.599426, -196.90596, 365.952271])
    torch.testing.assert_close(scores[::200], expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


@pytest.mark.parametrize("width", [0.5, 1.0][: count(1, 2)])
def test_shufflenet_v2_is_torchvisions(width):
    models = extra("torchvision.models")
    theirs = randomise(allocate(getattr(models, f"shufflenet_v2_x{width}".replace(".", "_"))))
    ours = ShuffleNetV2(width, num_classes=1000).eval()
    ours.load_weights(theirs.state_dict())
    x = torch.randn(2, 3, 65, 97)
    with torch.no_grad():
        expected = theirs(x)
        torch.testing.assert_close(ours.classify(x), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    ShuffleNetV2(width).load_weights(theirs.state_dict())
    old = {key: value for key, value in theirs.state_dict().items() if "num_batches" not in key}
    ShuffleNetV2(width).load_weights(old)  # of before PyTorch 0.4.1
    with pytest.raises(RuntimeError, match="these are not its weights"):
        ShuffleNetV2(width).load_weights({**old, "conv1.0.weight": [1]})
    other = ShuffleNetV2(2.0)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"ShuffleNetV2: these are not its weights: 0 missing .* of another shape"):
        other.load_weights(theirs.state_dict())
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())


@pytest.mark.parametrize("name", ["efficientformer_l1", "efficientformerv2_s0"])
def test_efficientformer_is_timms_at_its_size(name):
    extra("timm")
    theirs = randomise(_registry.classifier(name))
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        expected = theirs.forward_intermediates(x, intermediates_only=True)
        ours = (EfficientFormerV2 if "v2" in name else EfficientFormer)(theirs)
        for a, b in zip(ours(x), expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("size", [(7, 7), (5, 9), (16, 3), (1, 4)])
def test_efficientformers_attentions(size):
    """timm's own layers, built for another size and given the resized table, are the oracle there."""
    v1, v2 = extra("timm.models.efficientformer"), extra("timm.models.efficientformer_v2")
    height, width = size

    def pair(kind, trained, size, **options):
        first, second = (randomise(kind(resolution=r, **options)) for r in (trained, size))
        table = first.attention_biases.detach()
        rows, columns = first.resolution if hasattr(first, "resolution") else trained
        grid = table.view(1, -1, rows, columns)
        h, w = second.resolution if hasattr(second, "resolution") else size
        resized = F.interpolate(grid, (h, w), mode="bilinear", align_corners=True).flatten(2)[0]
        state = {k: v for k, v in first.state_dict().items() if "attention_bias" not in k}
        second.load_state_dict({**state, "attention_biases": resized}, strict=False)
        return first, second

    with torch.no_grad():
        first, second = pair(v1.Attention, (7, 7), size, dim=16, key_dim=4, num_heads=2)
        x = torch.randn(2, height * width, 16)
        torch.testing.assert_close(Attention(first, (7, 7))(x, size), second(x), rtol=1e-4, atol=1e-5)
        x = torch.randn(2, 16, height, width)
        first, second = pair(v2.Attention2d, (7, 7), size, dim=16, key_dim=4, num_heads=2)
        torch.testing.assert_close(Attention2d(first)(x), second(x), rtol=1e-4, atol=1e-5)
        first, second = pair(v2.Attention2dDownsample, (14, 14), size, dim=16, key_dim=4, num_heads=2, out_dim=8)
        torch.testing.assert_close(AttentionDownsample(first)(x), second(x), rtol=1e-4, atol=1e-5)
        first, second = pair(v2.Attention2d, (14, 14), size, dim=16, key_dim=4, num_heads=2, stride=2)
        even = torch.randn(2, 16, 2 * height, 2 * width)
        first, second = pair(v2.Attention2d, (14, 14), (2 * height, 2 * width), dim=16, key_dim=4, num_heads=2, stride=2)
        torch.testing.assert_close(Attention2d(first)(even), second(even), rtol=1e-4, atol=1e-5)
        assert Attention2d(first)(x).shape == x.shape


def test_attention_bias():
    table = torch.randn(3, 7 * 5)
    square = attention_bias(table, (7, 5), (7, 5))
    assert square[1, 0 * 5 + 1, 2 * 5 + 4] == table[1, 2 * 5 + 3]
    assert square[1, 6 * 5 + 4, 5 * 5 + 0] == table[1, 1 * 5 + 4]
    large = attention_bias(table, (7, 5), (13, 31))
    assert torch.equal(large.diagonal(dim1=1, dim2=2), table[:, :1].expand(3, 13 * 31))
    torch.testing.assert_close(large[:, 0, -1], table[:, -1])
    assert large.min() >= table.min()
    assert large.max() <= table.max()
    # A table that is linear in the offsets stays linear: |dy| = 1 of 12 is half of |dy| = 1 of 6.
    linear = (torch.arange(7.0)[:, None] + 10 * torch.arange(5.0)).view(1, -1)
    torch.testing.assert_close(attention_bias(linear, (7, 5), (13, 9))[0, 0, 3 * 9 + 2], torch.tensor(1.5 + 10.0))
    assert attention_bias(table, (7, 5), (5, 4), 2).shape == (3, 3 * 2, 5 * 4)


def test_efficientformer_v2_at_512x1024():
    extra("timm")
    with torch.device("meta"):
        backbone = segfast.create_backbone("efficientformerv2_s0").eval()
        maps = backbone(torch.empty(1, 3, 512, 1024))
    assert [tuple(y.shape[1:]) for y in maps] == [(32, 128, 256), (48, 64, 128), (96, 32, 64), (176, 16, 32)]
    assert macs(backbone, 1, 3, 512, 1024) == pytest.approx(6.07e9, rel=0.01)


def test_weights_from_a_file(tmp_path):
    timm = extra("timm")
    theirs = randomise(timm.create_model("mobilenetv2_035", num_classes=7))
    torch.save({"state_dict": theirs.state_dict()}, tmp_path / "weights.pth")
    from safetensors.torch import save_file

    save_file(theirs.state_dict(), tmp_path / "weights.safetensors")
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = theirs.forward_intermediates(x, indices=[1, 2, 3, 4], intermediates_only=True)
        for name in ("weights.pth", "weights.safetensors"):
            maps = segfast.create_backbone("mobilenetv2", width=0.35, weights=tmp_path / name).eval()(x)
            assert all(torch.equal(a, b) for a, b in zip(maps, expected, strict=True))
    with pytest.raises(RuntimeError, match="not those of mobilenetv2_050"):
        segfast.create_backbone("mobilenetv2_050", weights=tmp_path / "weights.pth")
    with pytest.raises(RuntimeError, match="ResNet: these are not its weights: 96 missing"):
        segfast.create_backbone("resnet18", weights=tmp_path / "weights.pth")


def test_files_that_are_no_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match="want a file of weights"):
        segfast.create_backbone("resnet18", weights=tmp_path / "none.pth")
    torch.save({"a": object}, tmp_path / "pickle.pth")
    (tmp_path / "broken.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    for name in ("pickle.pth", "broken.safetensors"):
        with pytest.raises(RuntimeError, match="cannot read weights"):
            segfast.create_backbone("resnet18", weights=tmp_path / name)
    torch.save({"epoch": 3}, tmp_path / "no_tensors.pth")
    with pytest.raises(RuntimeError, match="want a state_dict of tensors"):
        segfast.create_backbone("resnet18", weights=tmp_path / "no_tensors.pth")


def test_names_and_errors(monkeypatch):
    assert segfast.list_backbones("poolformer*") == [f"poolformer_{s}" for s in ("m36", "m48", "s12", "s24", "s36")]
    assert len(segfast.list_backbones()) == 46
    with pytest.raises(ValueError, match=r"create_backbone: did you mean resnet18.*got 'resnet_18'"):
        segfast.create_backbone("resnet_18")
    with pytest.raises(ValueError, match="pretrained or weights, got both"):
        segfast.create_backbone("resnet18", pretrained=True, weights="a.pth")
    with pytest.raises(RuntimeError, match="pass weights=PATH"):
        segfast.create_backbone("shufflenetv1_g3", pretrained=True)
    for wrong in ({"groups": 5}, {"groups": 3, "width": 0.3}):
        with pytest.raises(ValueError, match="ShuffleNetV1: want"):
            ShuffleNetV1(**wrong)
    with pytest.raises(ValueError, match=r"ShuffleNetV2: want width one of 0.5"):
        ShuffleNetV2(0.7)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"mobilenetv1: want timm: pip install 'segfast\[train\]'"):
        segfast.create_backbone("mobilenetv1")


def test_options_of_timms(monkeypatch):
    timm = extra("timm")
    with pytest.raises(ValueError, match=r"width for mobilenetv2 alone.*got 0.6"):
        segfast.create_backbone("mobilenetv2", width=0.6)
    with pytest.raises(ValueError, match="no map of stride 2"):
        segfast.create_backbone("efficientformerv2_s0", stem=True)
    with pytest.raises(ValueError, match="no map of stride 2"):
        segfast.create_backbone("poolformer_s12", stem=True)

    def offline(*args, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(RuntimeError, match=r"timm could not get pretrained.*no route to host.*pass weights=PATH"):
        segfast.create_backbone("mobilenetv1", pretrained=True)
