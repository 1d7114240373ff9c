"""Semantic FPN, on ResNet here and on PoolFormer where timm is installed."""

import official_networks
import pytest
import torch
import torch.nn.functional as F
from conftest import extra
from official_weights import image, random_weights
from torch import nn

import segfast
from segfast.models.semantic_fpn import our_key


def shapes(module):
    return {key: tuple(value.shape) for key, value in module.state_dict().items()}


def test_stored_slice():
    """Figures of mmsegmentation's neck and head on this encoder with these weights."""
    model = segfast.create_model("semantic_fpn", 5, "resnet18").eval()
    model.load_state_dict(random_weights(shapes(model)), strict=False)
    x = image(67, 97)
    with torch.no_grad():
        logits = model.forward_features(x).logits
        full = model(x)
    assert logits.shape == (1, 5, 17, 25)
    resized = F.interpolate(logits, (67, 97), mode="bilinear", align_corners=False)
    for found, expected in ((logits[0, :3, 3, ::8], torch.tensor(LOGITS)), (full, resized)):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(logits.abs().max()))


LOGITS = [
    [263.83807, 879.50238, 1471.64185, 702.64484],
    [120.99379, 673.77771, 487.80298, 0.61131],
    [563.47699, 1009.57788, 1434.30493, 1174.78577],
]


def test_levels():
    with torch.device("meta"):
        features = segfast.create_model("semantic_fpn").eval().forward_features(torch.empty(1, 3, 65, 130)).features
    assert {name: tuple(x.shape[1:]) for name, x in features.items()} == {
        "stage1": (256, 17, 33),
        "stage2": (512, 9, 17),
        "stage3": (1024, 5, 9),
        "stage4": (2048, 3, 5),
        "pre_logits": (128, 17, 33),
    }


def test_weights_of_another_network():
    with pytest.raises(ValueError, match=r"'backbone.patch_embed.proj.weight' is missing"):
        segfast.load_official("semantic_fpn", {"conv1.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"want a PoolFormer's weights, got 8 channels and 0 blocks"):
        segfast.load_official("semantic_fpn", {"backbone.patch_embed.proj.weight": torch.zeros(8, 3, 7, 7)})


def equal(theirs, found):
    assert (theirs - found).abs().max() <= 1e-4 * theirs.abs().max()


def test_neck_and_head_equal_mmsegmentation():
    ours = segfast.create_model("semantic_fpn", 5, "resnet18").eval()
    weights = random_weights(shapes(ours))
    ours.load_state_dict(weights, strict=False)
    theirs = official_networks.fpn(ours.backbone.channels, 5).eval()
    theirs.load_state_dict({key: weights[our_key(key)] for key in shapes(theirs) if our_key(key) in weights}, strict=False)
    for size in ((67, 97), (64, 128)):
        x = image(*size)
        with torch.no_grad():
            equal(theirs.decode_head(theirs.neck(ours.backbone(x))), ours.forward_features(x).logits)


def test_poolformer_equals_the_official_network():
    extra("timm")
    theirs = official_networks.poolformer_fpn(7).eval()
    weights = random_weights(shapes(theirs))
    theirs.load_state_dict(weights, strict=False)
    ours = segfast.load_official("semantic_fpn", weights, num_classes=7)
    for size in ((96, 160), (75, 101)):
        x = image(*size)
        with torch.no_grad():
            logits = theirs(x)
            equal(logits, ours.forward_features(x).logits)
            equal(F.interpolate(logits, size, mode="bilinear", align_corners=False), ours(x))


def test_poolformer_names_and_counts():
    extra("timm")
    with torch.device("meta"):
        model = segfast.create_model("semantic_fpn", 150, "poolformer_s12")
    assert sum(p.numel() for p in model.parameters()) == 15_669_846  # the paper prints 15.7 M


@pytest.mark.parametrize("backbone", ["poolformer_s12", "efficientformer_l1", "efficientformerv2_s0", "mobilenetv2"])
def test_other_encoders(backbone):
    extra("timm")
    model = segfast.create_model("semantic_fpn", 3, backbone).eval()
    assert any(isinstance(norm, nn.GroupNorm) for norm in model.norms) == ("former_" in backbone)
    with torch.no_grad():
        assert model(image(75, 101)).shape == (1, 3, 75, 101)
