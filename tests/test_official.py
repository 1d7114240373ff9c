"""Networks with official weights compute what the official code computes; checkpoints in its format load, or fail whole."""

import json

import official_cases as official
import pytest
import torch
from official_cases import CASES, STORED

import segfast


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual - expected).abs().max() / expected.abs().max())


def load(case, shapes):
    weights = official.seeded(shapes)
    model = segfast.load_official(case.network, weights)
    for name, value in case.attributes.items():
        assert getattr(model, name) == value
    return model, weights


def run(case, model, size):
    with torch.no_grad():
        images = official.images(size)
        return model(images) if case.resized else model.forward_features(images).logits


def test_nothing_is_loaded_by_half():
    shapes = json.loads((STORED / "espnet_test.json").read_text())["shapes"]
    weights = official.seeded(shapes)
    assert segfast.load_official("espnet", {f"module.{k}": v for k, v in weights.items()}).num_classes == 20
    with pytest.raises(ValueError, match="want 19 classes, got weights of 20"):
        segfast.load_official("espnet", weights, num_classes=19)
    for wrong, message in (
        ({**weights, "extra": torch.zeros(1)}, "left over: extra"),
        ({k: v for k, v in weights.items() if k != "br.weight"}, "missing: logits_bn.weight"),
        ({k: v for k, v in weights.items() if ".level3." not in k}, r"encoder\.level3\.0\.c1\.conv\.weight' is missing"),
        ({**weights, "conv.conv.weight": torch.zeros(20, 30, 3, 3)}, "want 16 or 19 channels of stage 1, got 10"),
        ({**weights, "br.bias": torch.zeros(3)}, r"of another shape: br.bias \(3,\) for \(20,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            segfast.load_official("espnet", wrong)
    for other in ("espnet_c", "linknet", "contextnet", "fast_scnn", "icnet"):
        with pytest.raises(ValueError, match=f"not the weights of '{other}'"):
            segfast.load_official(other, weights)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("encoder.classifier.conv.weight", torch.tensor(1.0)), ("conv.conv.weight", torch.zeros(20)), (5, torch.zeros(1)),
        ("br.weight", torch.zeros(20, device="meta")), ("br.weight", torch.zeros(20).to_sparse()),
        ("br.weight", torch.zeros(20, dtype=torch.complex64)), ("br.weight", torch.zeros(20, dtype=torch.int32)),
    ],
)  # fmt: skip
def test_tensors_that_are_no_weights(key, value):
    weights = official.seeded(json.loads((STORED / "espnet_test.json").read_text())["shapes"])
    with pytest.raises(ValueError, match=r"load_official: (want|these are not)"):
        segfast.load_official("espnet", {**weights, key: value})


@pytest.mark.drawn(1 / 3)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_was_loaded_is_saved_and_built_again(case, tmp_path):
    model, _ = load(case, json.loads((STORED / f"{case.name}.json").read_text())["shapes"])
    again = segfast.models.SegmentationModel.from_pretrained(model.save_pretrained(tmp_path))
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    assert again.preprocessing == model.preprocessing


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_stored_logits(case):
    stored = json.loads((STORED / f"{case.name}.json").read_text())
    model, _ = load(case, stored["shapes"])
    for size, expected in zip(case.sizes, stored["logits"], strict=True):
        actual = official.sample(run(case, model, size))
        assert relative(torch.tensor(actual), torch.tensor(expected)) < 1e-4


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_against_the_official_code(case):
    theirs = case.build()
    model, weights = load(case, official.shapes(theirs))
    for size, expected in zip(case.sizes, official.compute(case, theirs, weights), strict=True):
        assert relative(run(case, model, size), expected) < 1e-4
