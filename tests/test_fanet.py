"""FANet: attention, strides, auxiliary heads, wrong weights. Outputs against the official: test_official.py."""

import json

import official_cases as official
import pytest
import torch
import torch.nn.functional as F

import segfast


def weights(case):
    return official.seeded(json.loads((official.STORED / f"{case}.json").read_text())["shapes"])


def test_fusion_is_attention_by_cosine():
    """The explicit pixels x pixels matrix, which the network never builds."""
    torch.manual_seed(0)
    fusion = segfast.create_model("fanet18").eval().fusion8
    x = torch.randn(2, 64, 3, 5)
    with torch.no_grad():
        attention = fusion.attention
        q, k, v = (layer(x).flatten(2).transpose(1, 2) for layer in (attention.query, attention.key, attention.value))
        similarity = F.cosine_similarity(q[:, :, None], k[:, None], dim=-1)
        attended = (similarity @ v).transpose(1, 2).reshape(x.shape)
        coarser = torch.randn(2, 64, 4, 4)
        expected = x + attention.project(attended) + F.interpolate(coarser, (3, 5), mode="bilinear", align_corners=True)
        torch.testing.assert_close(fusion(x, coarser), expected, rtol=1e-4, atol=1e-4)


def test_strides():
    model = segfast.create_model("fanet34").eval()
    with torch.no_grad():
        output = model.forward_features(torch.randn(1, 3, 128, 192))
    assert output.logits.shape == (1, 19, 16, 24)
    assert {name: tuple(x.shape[1:]) for name, x in output.features.items()} == {
        "stage1": (64, 16, 24),
        "stage2": (128, 8, 12),
        "stage3": (256, 4, 6),
        "stage4": (512, 2, 3),
        "pre_logits": (256, 16, 24),
    }


def test_auxiliary_heads():
    model = segfast.create_model("fanet18", 3, aux=True)
    output = model.forward_features(torch.randn(1, 3, 64, 96))
    assert [tuple(x.shape) for x in output.aux] == [(1, 3, 1, 2), (1, 3, 2, 3)]
    (output.logits.mean() + sum(x.mean() for x in output.aux)).backward()
    assert {name for name, p in model.named_parameters() if p.grad is None} == {
        name for name, _ in model.named_parameters() if name.startswith(model.idle)
    }
    assert model.idle == ("fusion8.up.", "fusion16.smooth.")


def test_checkpoints_of_the_training_code_have_auxiliary_heads():
    assert len(segfast.load_official("fanet18", weights("fanet18")).aux) == 0
    made = weights("fanet18_aux")
    model = segfast.load_official("fanet18", made)
    assert torch.equal(model.aux[0].classifier.weight, made["clslayer_32.conv_out.weight"])
    assert torch.equal(model.aux[1].classifier.weight, made["clslayer_16.conv_out.weight"])
    assert torch.equal(model.fusion64.up.conv.weight, made["ffm_32.up.conv.weight"])


def test_auxiliary_logits_are_the_official():
    case = next(case for case in official.CASES if case.name == "fanet18_aux")
    network = case.build()
    made = official.seeded(official.shapes(network))
    network.load_state_dict(made, strict=False)
    network.eval()
    network.training = True  # the auxiliary logits, but BatchNorms as in evaluation
    found = []
    network.loss_fn = lambda logits, labels: found.append(logits) or logits.sum()
    images = official.images((64, 96))
    model = segfast.load_official("fanet18", made)
    with torch.no_grad():
        network(images)
        output = model.forward_features(images)
    for expected, ours in zip(found, (output.logits, *output.aux), strict=True):
        ours = F.interpolate(ours, (64, 96), mode="bilinear", align_corners=True)
        assert (ours - expected).abs().max() < 1e-4 * expected.abs().max()


def test_wrong_weights():
    made = weights("fanet18")
    with pytest.raises(ValueError, match=r"not the weights of 'fanet34': missing: encoder\.layer1\.2"):
        segfast.load_official("fanet34", made)
    with pytest.raises(ValueError, match="want 11 classes, got weights of 19"):
        segfast.load_official("fanet18", made, num_classes=11)
    with pytest.raises(ValueError, match=r"missing: fusion8\.smooth\.bn\.bias"):
        segfast.load_official("fanet18", {key: value for key, value in made.items() if key != "fam_4.smooth.bn.bias"})
    with pytest.raises(ValueError, match="fanet: want depth 18 or 34, got 50"):
        segfast.models.FANet(19, 50)
