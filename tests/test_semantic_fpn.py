"""Semantic FPN, on ResNet here and on PoolFormer where timm is installed."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from conftest import extra
from official_weights import image, random_weights, repository
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
    torch.testing.assert_close(logits[0, :3, 3, ::8], torch.tensor(LOGITS), rtol=1e-4, atol=1e-4 * float(logits.abs().max()))
    torch.testing.assert_close(full, F.interpolate(logits, (67, 97), mode="bilinear", align_corners=False))


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


class Head(nn.Module):
    """What mmsegmentation's decode heads share, as far as FPNHead needs it."""

    def __init__(self, in_channels, channels, num_classes, input_transform, align_corners=False):
        super().__init__()
        self.in_channels, self.channels, self.align_corners = in_channels, channels, align_corners
        self.conv_cfg = self.act_cfg = None
        self.norm_cfg = {"type": "BN"}
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)

    def _transform_inputs(self, inputs):
        return inputs

    def cls_seg(self, x):
        return self.conv_seg(x)


class ConvModule(nn.Module):
    """mmcv's unit: an activation follows a norm in the head, and neither is in the neck."""

    def __init__(self, inputs, outputs, kernel_size, padding=0, conv_cfg=None, norm_cfg=None, act_cfg=None, inplace=False):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel_size, padding=padding, bias=norm_cfg is None)
        self.bn = None if norm_cfg is None else nn.BatchNorm2d(outputs)

    def forward(self, x):
        return self.conv(x) if self.bn is None else F.relu(self.bn(self.conv(x)))


class Upsample(nn.Module):
    def __init__(self, scale_factor, mode, align_corners):
        super().__init__()
        self.options = {"scale_factor": scale_factor, "mode": mode, "align_corners": align_corners}

    def forward(self, x):
        return F.interpolate(x, **self.options)


class Registry:
    def register_module(self):
        return lambda kind: kind


def run_file(path, package, monkeypatch, **stubs):
    """The names of an official file, whose imports of packages that are not here are stubbed."""
    for name, content in stubs.items():
        stub = types.ModuleType(name)
        stub.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, stub)
    module = types.ModuleType(f"{package}.official")
    module.__package__ = package
    exec(path.read_text(), module.__dict__)
    return module


def passed_on(function=None, **options):
    return function if function else passed_on


@pytest.fixture
def official(monkeypatch):
    """mmsegmentation's neck and head, for channels and classes."""
    folder = repository("mmsegmentation") / "mmseg" / "models"
    stubs = {
        "IPython": {"embed": None},
        "mmcv": {},
        "mmcv.cnn": {"ConvModule": ConvModule, "xavier_init": None},
        "mmcv.runner": {"BaseModule": nn.Module, "auto_fp16": lambda: passed_on},
        "mmseg": {"__path__": []},
        "mmseg.ops": {"resize": F.interpolate, "Upsample": Upsample},
        "mmseg.models": {"__path__": []},
        "mmseg.models.builder": {"NECKS": Registry(), "HEADS": Registry()},
        "mmseg.models.necks": {"__path__": []},
        "mmseg.models.decode_heads": {"__path__": []},
        "mmseg.models.decode_heads.decode_head": {"BaseDecodeHead": Head},
    }
    neck = run_file(folder / "necks" / "fpn.py", "mmseg.models.necks", monkeypatch, **stubs)
    head = run_file(folder / "decode_heads" / "fpn_head.py", "mmseg.models.decode_heads", monkeypatch)

    def build(channels, classes):
        modules = nn.Module()
        modules.neck = neck.FPN(list(channels), 256, 4)
        modules.decode_head = head.FPNHead([4, 8, 16, 32], in_channels=[256] * 4, channels=128, num_classes=classes)
        return modules.eval()

    return build


def equal(theirs, found):
    assert (theirs - found).abs().max() <= 1e-4 * theirs.abs().max()


def test_neck_and_head_equal_mmsegmentation(official):
    ours = segfast.create_model("semantic_fpn", 5, "resnet18").eval()
    weights = random_weights(shapes(ours))
    ours.load_state_dict(weights, strict=False)
    theirs = official(ours.backbone.channels, 5)
    theirs.load_state_dict({key: weights[our_key(key)] for key in shapes(theirs) if our_key(key) in weights}, strict=False)
    for size in ((67, 97), (64, 128)):
        x = image(*size)
        with torch.no_grad():
            equal(theirs.decode_head(theirs.neck(ours.backbone(x))), ours.forward_features(x).logits)


def test_poolformer_equals_the_official_network(official, monkeypatch):
    extra("timm")
    layers = {"DropPath": nn.Identity, "trunc_normal_": nn.init.trunc_normal_, "to_2tuple": lambda x: (x, x)}
    stubs = {name: layers for name in ("timm.models.layers", "timm.models.layers.helpers")}
    stubs["timm.models.registry"] = {"register_model": passed_on}
    stubs["timm.data"] = {"IMAGENET_DEFAULT_MEAN": None, "IMAGENET_DEFAULT_STD": None}
    path = repository("poolformer") / "models" / "poolformer.py"
    with monkeypatch.context() as patched:
        module = run_file(path, "", patched, **stubs)
    encoder = module.PoolFormer(
        [2, 2, 6, 2], [64, 128, 320, 512], mlp_ratios=[4] * 4, downsamples=[True] * 4, fork_feat=True
    ).eval()  # fmt: skip
    theirs = official((64, 128, 320, 512), 7)
    theirs.backbone = encoder
    weights = random_weights(shapes(theirs))
    theirs.load_state_dict(weights, strict=False)
    ours = segfast.load_official("semantic_fpn", weights, num_classes=7)
    for size in ((96, 160), (75, 101)):
        x = image(*size)
        with torch.no_grad():
            logits = theirs.decode_head(theirs.neck(theirs.backbone(x)))
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
