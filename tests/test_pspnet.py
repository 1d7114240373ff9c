"""PSPNet: the pair of structured knowledge distillation."""

import functools

import official_networks
import pytest
import torch
import torch.nn.functional as F
from official_weights import image, random_weights

import segfast

NAMES = ("pspnet_r18", "pspnet_r101")


def official_shapes(classes: int) -> dict[str, tuple[int, ...]]:
    """What a checkpoint of the authors' student holds."""
    shapes = {}

    def norm(name, channels):
        shapes.update({f"{name}.{key}": (channels,) for key in ("weight", "bias", "running_mean", "running_var")})

    for i, (before, after) in enumerate(((3, 64), (64, 64), (64, 128)), 1):
        shapes[f"conv{i}.weight"] = (after, before, 3, 3)
        norm(f"bn{i}", after)
    before = 128
    for stage, channels in enumerate((64, 128, 256, 512), 1):
        for unit in (0, 1):
            for i in (1, 2):
                shapes[f"layer{stage}.{unit}.conv{i}.weight"] = (channels, before if i == 1 else channels, 3, 3)
                norm(f"layer{stage}.{unit}.bn{i}", channels)
            if unit == 0:
                shapes[f"layer{stage}.0.downsample.0.weight"] = (channels, before, 1, 1)
                norm(f"layer{stage}.0.downsample.1", channels)
            before = channels
    for i in range(4):
        shapes[f"pspmodule.stages.{i}.1.weight"] = (128, 512, 1, 1)
        norm(f"pspmodule.stages.{i}.2", 128)
    shapes["pspmodule.bottleneck.0.weight"] = (128, 1024, 3, 3)
    norm("pspmodule.bottleneck.1", 128)
    shapes.update({"head.weight": (classes, 128, 1, 1), "head.bias": (classes,)})
    shapes.update({"dsn.0.weight": (128, 256, 3, 3), "dsn.0.bias": (128,)})
    norm("dsn.1", 128)
    shapes.update({"dsn.3.weight": (classes, 128, 1, 1), "dsn.3.bias": (classes,)})
    return shapes


@pytest.mark.parametrize("name, parameters", zip(NAMES, (13_068_262, 70_437_350)))
def test_counts_with_auxiliary_head(name, parameters):
    with torch.device("meta"):
        model = segfast.create_model(name, aux=True)
    assert sum(p.numel() for p in model.parameters()) == parameters


@functools.cache
def student():
    return segfast.load_official("pspnet_r18", random_weights(official_shapes(7)))


def test_stored_slice():
    """Figures of the authors' network with these weights, its in-place BatchNorm written out for the CPU."""
    x = image(49, 65)
    with torch.no_grad():
        output = student().forward_features(x)
        full = student()(x)
    assert output.logits.shape == (1, 7, 7, 9)
    resized = F.interpolate(output.logits, (49, 65), mode="bilinear", align_corners=True)
    slices = ((output.logits[0, :3, 3, ::4], torch.tensor(LOGITS)), (output.aux[0][0, :3, 3, ::4], torch.tensor(AUX)))
    for found, expected in (*slices, (full, resized)):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(found.abs().max()))


LOGITS = [[87.089195, 98.520744, 14.21598], [27.275003, 34.562183, -16.085978], [-14.544991, 15.634484, -21.214718]]
AUX = [[-40.954853, -25.700493, 4.653846], [-16.971346, 4.411646, 1.311939], [4.162456, 63.733913, -26.351254]]


def test_strides_and_channels():
    with torch.device("meta"):
        model = segfast.create_model("pspnet_r101").eval()
        features = model.forward_features(torch.empty(1, 3, 129, 257)).features
    assert {name: tuple(x.shape[1:]) for name, x in features.items()} == {
        "stage1": (256, 33, 65),
        "stage2": (512, 17, 33),
        "stage3": (1024, 17, 33),
        "stage4": (2048, 17, 33),
        "pre_logits": (512, 17, 33),
    }


def test_one_image_trains():
    model = segfast.create_model("pspnet_r18", 4, aux=True)
    output = model.forward_features(torch.randn(1, 3, 32, 32))
    (output.logits.square().mean() + output.aux[0].square().mean()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_preprocessing_is_the_authors():
    pixels = torch.tensor([200.0, 100.0, 50.0]).view(1, 3, 1, 1)
    found = segfast.create_model("pspnet_r18").preprocessing(pixels).flatten().tolist()
    assert found == pytest.approx([50 - 104.00698793, 100 - 116.66876762, 200 - 122.67891434], abs=1e-4)


def test_weights_of_another_network():
    weights = random_weights(official_shapes(7))
    with pytest.raises(ValueError, match="want 19 classes, got weights of 7"):
        segfast.load_official("pspnet_r18", weights, num_classes=19)
    with pytest.raises(ValueError, match=r"left over: extra"):
        segfast.load_official("pspnet_r18", {**weights, "extra": torch.zeros(1)})
    weights.pop("head.bias")
    with pytest.raises(ValueError, match=r"missing: classifier.bias"):
        segfast.load_official("pspnet_r18", weights)


def test_negative_batch_norm_weights():
    """The authors' BatchNorm takes the weight's absolute value, plus its eps."""
    weights = random_weights(official_shapes(7))
    weights["bn1.weight"] = -weights["bn1.weight"]
    model = segfast.load_official("pspnet_r18", weights)
    assert torch.equal(model.backbone.bn1.weight, -weights["bn1.weight"] + 1e-5)
    assert (weights["bn1.weight"] < 0).all()  # the caller's dictionary stays


@pytest.mark.parametrize("name", NAMES)
def test_equals_the_official_network(name):
    official = official_networks.pspnet(int(name.removeprefix("pspnet_r"))).eval()
    weights = random_weights({key: value.shape for key, value in official.state_dict().items()})
    official.load_state_dict(weights, strict=False)
    ours = segfast.load_official(name, weights)
    for size in ((64, 96), (97, 161)):
        x = image(*size)
        with torch.no_grad():
            logits, aux, context, *_ = official(x)
            output = ours.forward_features(x)
            full = ours(x)
        resized = F.interpolate(logits, size, mode="bilinear", align_corners=True)
        for theirs, found in (
            (logits, output.logits),
            (aux, output.aux[0]),
            (context, output.features["pre_logits"]),
            (resized, full),
        ):
            assert (theirs - found).abs().max() <= 1e-4 * theirs.abs().max()
