"""DeepLabV3+."""

import pytest
import torch
from conftest import extra
from official_weights import image, random_weights
from torch import nn

import segfast
from segfast.models.deeplabv3plus import AtrousPyramidPooling


@pytest.mark.parametrize("stride, dilations", [(16, (6, 12, 18)), (8, (12, 24, 36))])
def test_strides_and_dilations(stride, dilations):
    with torch.device("meta"):
        model = segfast.create_model("deeplabv3plus", output_stride=stride).eval()
        features = model.forward_features(torch.empty(1, 3, 97, 193)).features
    assert [branch.conv.dilation[0] for branch in model.aspp.branches] == [1, *dilations]
    height, width = -(-97 // stride), -(-193 // stride)
    assert tuple(features["aspp"].shape) == (1, 256, height, width)
    assert tuple(features["stage4"].shape) == (1, 2048, height, width)
    assert tuple(features["stage1"].shape) == (1, 256, 25, 49)
    assert tuple(features["pre_logits"].shape) == (1, 256, 25, 49)


def test_output_stride_is_dilation_in_the_place_of_striding():
    """At every second place, the encoder at stride 8 computes what it does at stride 16: the same function of the weights."""
    coarse, fine = (segfast.create_model("deeplabv3plus", 5, "resnet18", output_stride=s).eval() for s in (16, 8))
    weights = random_weights({key: tuple(value.shape) for key, value in coarse.state_dict().items()})
    coarse.load_state_dict(weights, strict=False)
    fine.load_state_dict(weights, strict=False)
    x = image(65, 97)
    with torch.no_grad():
        low, high = coarse.backbone(x)[3], fine.backbone(x)[3]
    torch.testing.assert_close(high[:, :, ::2, ::2], low, rtol=1e-3, atol=1e-4 * float(low.abs().max()))


def test_pyramid_pooling_is_torchvisions():
    deeplabv3 = pytest.importorskip("torchvision.models.segmentation.deeplabv3")
    theirs, ours = deeplabv3.ASPP(32, [6, 12, 18], 256).eval(), AtrousPyramidPooling(32).eval()
    weights = random_weights({key: tuple(value.shape) for key, value in theirs.state_dict().items()})
    theirs.load_state_dict(weights, strict=False)
    # both hold the pooled branch after the others and the projection last; ours has no dropout
    order = [(m, n) for m, n in zip(layers(theirs), layers(ours), strict=True)]
    for source, target in order:
        target.load_state_dict(source.state_dict())
    x = torch.randn(2, 32, 9, 13)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


def layers(module):
    return [layer for layer in module.modules() if isinstance(layer, (nn.Conv2d, nn.BatchNorm2d))]


def test_stored_slice():
    model = segfast.create_model("deeplabv3plus", 5, "resnet18").eval()
    model.load_state_dict(random_weights({key: tuple(value.shape) for key, value in model.state_dict().items()}), strict=False)
    with torch.no_grad():
        logits = model.forward_features(image(67, 97)).logits
    assert logits.shape == (1, 5, 17, 25)
    torch.testing.assert_close(logits[0, :3, 3, ::8], torch.tensor(LOGITS), rtol=1e-4, atol=1e-4 * float(logits.abs().max()))


LOGITS = [
    [147.257, 104.31944, 23.66719, 106.23895],
    [-83.37179, -53.47734, -40.45298, -26.45469],
    [-71.63893, -54.99977, -85.94572, -137.84477],
]


def test_errors():
    with pytest.raises(ValueError, match="want output_stride 8 or 16, got 32"):
        segfast.create_model("deeplabv3plus", output_stride=32)
    with pytest.raises(ValueError, match="resnet50"):
        segfast.create_model("deeplabv3plus", backbone="resnet51")
    with pytest.raises(ValueError, match="want an encoder that can dilate, got 'shufflenetv1_g3'"):
        segfast.create_model("deeplabv3plus", backbone="shufflenetv1_g3")


def test_a_light_encoder():
    extra("timm")
    model = segfast.create_model("deeplabv3plus", 3, "mobilenetv2").eval()
    with torch.no_grad():
        output = model.forward_features(image(97, 65))
    assert tuple(output.features["stage4"].shape[2:]) == (7, 5)
    assert tuple(output.logits.shape) == (1, 3, 25, 17)
