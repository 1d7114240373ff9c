"""FasterSeg: the searched architectures, training heads, wrong weights. Outputs against the official: test_official.py."""

import json

import official_cases as official
import pytest
import torch
import torch.nn.functional as F

import segfast
from segfast.models.fasterseg import ARCHITECTURES, Branch, Cell


def weights(case):
    return official.seeded(json.loads((official.STORED / f"{case}.json").read_text())["shapes"])


@pytest.mark.parametrize(("name", "plain", "trained"), [("student", 3_454_643, 4_385_689), ("teacher", 22_188_931, 23_524_137)])
def test_counts_with_and_without_training_heads(name, plain, trained):
    with torch.device("meta"):
        for aux, count in ((False, plain), (True, trained)):
            model = segfast.create_model(f"fasterseg_{name}", aux=aux)
            assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_branches_fit(name):
    stem, branches, shared = ARCHITECTURES[name]
    for branch, deepest in zip(branches, "21"):
        assert len(branch.cells) == len(branch.scales) == len(branch.widths)
        assert branch.scales[0] == "0"
        assert branch.scales[-1] == deepest
        assert "".join(sorted(branch.scales)) == branch.scales
        assert branch.widths[-1] == stem
    first, second = (Branch(b.cells[:shared], b.scales[: shared + 1], b.widths[:shared]) for b in branches)
    assert first == second


def test_zoomed_cell():
    """The map at half its size, floored; the last ReLU after the way back."""
    torch.manual_seed(0)
    x = torch.randn(2, 4, 9, 6)
    for convs in (1, 2):
        for stride in (1, 2):
            cell = Cell(4, 8, stride, convs, zoomed=True).eval()
            y = F.interpolate(x, (4, 3), mode="bilinear", align_corners=True)
            y = cell.bn1(cell.conv1(y))
            if convs == 2:
                y = cell.bn2(cell.conv2(y.relu()))
            if stride == 1:
                y = F.interpolate(y, (9, 6), mode="bilinear", align_corners=True)
            with torch.no_grad():
                torch.testing.assert_close(cell(x), y.relu(), rtol=1e-4, atol=1e-5)
    assert Cell(4, 8, 2, zoomed=True).eval()(x[:, :, :1, :1]).shape == (2, 8, 1, 1)


def test_strides():
    model = segfast.create_model("fasterseg_student").eval()
    with torch.no_grad():
        output = model.forward_features(torch.randn(1, 3, 128, 192))
    assert output.logits.shape == (1, 19, 16, 24)
    assert {name: tuple(x.shape[1:]) for name, x in output.features.items()} == {
        "stage1": (32, 16, 24),
        "stage2": (64, 8, 12),
        "stage3": (256, 4, 6),
        "shallow_stage1": (32, 16, 24),
        "shallow_stage2": (128, 8, 12),
        "pre_logits": (128, 16, 24),
    }


@pytest.mark.parametrize("size", [(64, 96), (75, 107)])
def test_training_heads(size):
    model = segfast.create_model("fasterseg_student", 3, aux=True)
    output = model.forward_features(torch.randn(1, 3, *size))
    deep16, deep32 = (output.features[name].shape[2:] for name in ("stage2", "stage3"))
    assert [x.shape for x in output.aux] == [(1, 3, *deep16), (1, 3, *deep32)]
    (output.logits.mean() + sum(x.mean() for x in output.aux)).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith(model.idle), name


def test_auxiliary_logits_are_the_official():
    case = next(case for case in official.CASES if case.name == "fasterseg_student_aux")
    network = case.build()
    made = official.seeded(official.shapes(network))
    network.load_state_dict(made, strict=False)
    network.eval()
    network.training = True  # the auxiliary logits, but BatchNorms as in evaluation
    images = official.images((64, 96))
    with torch.no_grad():
        expected = network(images)
        output = segfast.load_official("fasterseg_student", made).forward_features(images)
    for theirs, ours in zip(expected, (output.logits, *output.aux), strict=True):
        ours = F.interpolate(ours, (64, 96), mode="bilinear", align_corners=True)
        assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


def test_shared_cells_stand_twice_in_checkpoints():
    made = weights("fasterseg_student")
    copies = {key.replace("-0.", "-1."): made[key] for key in made if key.startswith(("cells.0-0.", "cells.1-0.", "cells.2-0."))}
    once, twice = (segfast.load_official("fasterseg_student", w) for w in (made, {**made, **copies}))
    assert all(torch.equal(a, b) for a, b in zip(once.parameters(), twice.parameters(), strict=True))
    key = "cells.1-1._op._op.conv2.weight"
    with pytest.raises(ValueError, match=f"share their first 3 cells: {key} differs"):
        segfast.load_official("fasterseg_student", {**made, **copies, key: copies[key] + 1})


def test_wrong_weights():
    made = weights("fasterseg_student")
    for other in ("fasterseg_teacher", "fanet18", "swiftnet_rn18"):
        with pytest.raises(ValueError, match=f"not the weights of '{other}'"):
            segfast.load_official(other, made)
    with pytest.raises(ValueError, match="want 2 classes, got weights of 19"):
        segfast.load_official("fasterseg_student", made, num_classes=2)
    with pytest.raises(ValueError, match=r"missing: lateral\.0\.conv\.weight"):
        segfast.load_official("fasterseg_student", {k: v for k, v in made.items() if k != "arms32.0.conv.0.weight"})
    with pytest.raises(ValueError, match="want architecture student or teacher, got 'tutor'"):
        segfast.models.FasterSeg(19, "tutor")
