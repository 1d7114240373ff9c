"""SwiftNet: what the importer takes from a checkpoint, and shapes. Outputs against the official: test_official.py."""

import json

import official_cases as official
import pytest
import torch

import segfast

NAMES = ("swiftnet_rn18", "swiftnet_rn18_pyramid")


def weights(name):
    made = official.seeded(json.loads((official.STORED / f"{name}.json").read_text())["shapes"])
    made["backbone.img_mean"] = torch.tensor([10.0, 20.0, 30.0]).view(1, 3, 1, 1)
    made["backbone.img_std"] = torch.tensor([2.0, 4.0, 8.0]).view(1, 3, 1, 1)
    return made


@pytest.mark.parametrize("name", NAMES)
def test_constants_become_the_preprocessing(name):
    made = weights(name)
    model = segfast.load_official(name, made)
    assert model.preprocessing == segfast.models.Preprocessing((10.0, 20.0, 30.0), (2.0, 4.0, 8.0), 1.0)
    assert segfast.create_model(name).preprocessing.mean == (73.15, 82.90, 72.3)  # that of others is left alone
    pixels = torch.tensor([12, 12, 46], dtype=torch.uint8).view(1, 3, 1, 1)
    assert model.preprocessing(pixels).flatten().tolist() == [1.0, -2.0, 2.0]
    scaled = segfast.load_official(name, {**made, "backbone.img_scale": torch.full((1, 1, 1, 1), 2.0)})
    assert scaled.preprocessing(pixels).flatten().tolist() == [-2.0, -3.5, -0.875]
    assert "backbone.img_mean" in made  # the caller's dictionary stays


@pytest.mark.parametrize("name", NAMES)
def test_wrong_weights(name):
    made = weights(name)
    with pytest.raises(ValueError, match="one img_scale"):
        segfast.load_official(name, {**made, "backbone.img_scale": torch.tensor([1.0, 2.0, 3.0])})
    with pytest.raises(ValueError, match=r"'backbone\.img_std' is missing"):
        segfast.load_official(name, {key: value for key, value in made.items() if key != "backbone.img_std"})
    with pytest.raises(ValueError, match="want 7 classes, got weights of 19"):
        segfast.load_official(name, made, num_classes=7)
    with pytest.raises(ValueError, match=r"left over: border_logits\.conv\.weight"):
        segfast.load_official(name, {**made, "border_logits.conv.weight": torch.zeros(2, 128, 1, 1)})
    for other in {"swiftnet_rn34", *NAMES} - {name}:
        with pytest.raises(ValueError, match=f"not the weights of '{other}'"):
            segfast.load_official(other, made)


def test_skips_stand_at_their_strides():
    model = segfast.create_model("swiftnet_rn18").eval()
    with torch.no_grad():
        features = model.forward_features(torch.randn(1, 3, 97, 161)).features
    assert {name: tuple(x.shape[1:]) for name, x in features.items()} == {
        "stage1": (64, 25, 41),
        "stage2": (128, 13, 21),
        "stage3": (256, 7, 11),
        "stage4": (512, 4, 6),
        "context": (128, 4, 6),
        "pre_logits": (128, 25, 41),
    }
    assert (features["stage4"] >= 0).all()  # after the ReLU, as in the official code


def test_pyramid_levels():
    model = segfast.create_model("swiftnet_rn18_pyramid").eval()
    images = torch.randn(1, 3, 97, 161)
    with torch.no_grad():
        features = model.forward_features(images).features
        assert features["stage1"].shape == (1, 64, 25, 41)
        assert features["level3_stage4"].shape == (1, 512, 1, 2)
        assert features["stage4"].min() < 0  # before the ReLU
        # every level has its own BatchNorms: changing the third level's leaves the others' maps
        for module in model.encoder.modules():
            if isinstance(module, torch.nn.ModuleList) and isinstance(module[0], torch.nn.BatchNorm2d):
                module[2].bias.fill_(1.0)
        changed = model.forward_features(images).features
    for name, x in features.items():
        assert torch.equal(x, changed[name]) == (name != "pre_logits" and not name.startswith("level3")), name


def test_depth():
    for depth in (50, 17):
        with pytest.raises(ValueError, match=f"swiftnet: want depth 18 or 34, got {depth}"):
            segfast.models.SwiftNet(19, depth)
