"""Encoders: counts, weights, sizes."""

import pytest
import torch

from segfast.backbones import ResNet


def parameters(module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("depth", "count"), [(18, 11_689_512), (34, 21_797_672), (50, 25_557_032), (101, 44_549_160), (152, 60_192_808)]
)
def test_resnet_counts(depth, count):
    with torch.device("meta"):
        backbone = ResNet(depth)
    assert parameters(backbone) + 1000 * (backbone.channels[-1] + 1) == count
    assert backbone.channels == tuple(c * (1 if depth < 50 else 4) for c in (64, 128, 256, 512))


@pytest.mark.parametrize("depth", [18, 50])
def test_resnet_is_torchvisions(depth):
    torchvision = pytest.importorskip("torchvision", reason="needs torchvision, of the extra `test`")
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, f"resnet{depth}")().eval()
    ours = ResNet(depth, stem=True).eval()
    ours.load_weights(theirs.state_dict())
    x = torch.randn(1, 3, 65, 97)
    with torch.no_grad():
        maps = ours(x)
        y = theirs.relu(theirs.bn1(theirs.conv1(x)))
        expected = [y]
        y = theirs.maxpool(y)
        for stage in (theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4):
            y = stage(y)
            expected.append(y)
    for a, b in zip(maps, expected, strict=True):
        assert torch.equal(a, b)
    dilated = ResNet(50, output_stride=8, dilate_first=False).eval()
    theirs = torchvision.models.resnet50(replace_stride_with_dilation=[False, True, True]).eval()
    dilated.load_weights(theirs.state_dict())
    with torch.no_grad():
        y = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x))))
        assert torch.equal(dilated(x)[-1], theirs.layer4(theirs.layer3(theirs.layer2(theirs.layer1(y)))))


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
