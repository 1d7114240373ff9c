"""A network is tested by being registered."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import segfast
from segfast.models import NETWORKS, register_model


@pytest.fixture(params=segfast.list_models())
def network(request):
    torch.manual_seed(0)
    return NETWORKS[request.param]


def test_declared_counts(network):
    model = segfast.create_model(network.name).eval()
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == network.parameters
    with torch.device("meta"):
        model = segfast.create_model(network.name).eval()
        images = torch.empty(1, 3, *network.size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    assert counter.get_total_flops() == 2 * network.macs
    assert "arXiv" in network.paper


@pytest.mark.parametrize("size", [(64, 96), (65, 97), (33, 50), (32, 32)])
def test_any_size(network, size):
    model = segfast.create_model(network.name, 5).eval()
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        logits = model(images)
        output = model.forward_features(images)
        full = F.interpolate(output.logits, size, mode="bilinear", align_corners=model.align_corners)
        assert torch.equal(logits, full)
        assert "pre_logits" in output.features
        assert output.aux == ()
    assert logits.shape == (2, 5, *size)
    assert logits.isfinite().all()


def test_every_parameter_gets_a_gradient(network):
    model = segfast.create_model(network.name, 4)
    model(torch.randn(2, 3, 64, 64)).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_images_do_not_see_each_other(network):
    model = segfast.create_model(network.name, 4).eval()
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(model(images)[1:], model(images[1:]), rtol=1e-4, atol=1e-5)


def test_state_dict_comes_back(network):
    first, second = (segfast.create_model(network.name, 4).eval() for _ in range(2))
    second.load_state_dict(first.state_dict())
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(first(images), second(images))


def test_fast_scnn_is_the_published_one():
    model = segfast.create_model("fast_scnn")
    keys = model.state_dict()
    for key, shape in {
        "learning_to_downsample.conv.conv.0.weight": (32, 3, 3, 3),
        "learning_to_downsample.dsconv1.conv.0.weight": (32, 1, 3, 3),
        "learning_to_downsample.dsconv2.conv.3.weight": (64, 48, 1, 1),
        "global_feature_extractor.bottleneck1.0.block.0.conv.0.weight": (384, 64, 1, 1),
        "global_feature_extractor.bottleneck3.2.block.2.weight": (128, 768, 1, 1),
        "global_feature_extractor.ppm.conv4.conv.0.weight": (32, 128, 1, 1),
        "global_feature_extractor.ppm.out.conv.0.weight": (128, 256, 1, 1),
        "feature_fusion.dwconv.conv.0.weight": (128, 1, 3, 3),
        "feature_fusion.conv_lower_res.0.weight": (128, 128, 1, 1),
        "feature_fusion.conv_higher_res.0.weight": (128, 64, 1, 1),
        "classifier.dsconv2.conv.4.weight": (128,),
        "classifier.conv.1.weight": (19, 128, 1, 1),
    }.items():
        assert tuple(keys[key].shape) == shape, key
    assert model.forward_features(torch.randn(2, 3, 64, 128)).features["pre_logits"].shape == (2, 128, 8, 16)


def test_width():
    narrow = segfast.create_model("fast_scnn", 6, width=0.25)
    assert sum(p.numel() for p in narrow.parameters()) < 1_138_051 / 8
    assert narrow.forward_features(torch.randn(2, 3, 32, 32)).features["pre_logits"].shape == (2, 32, 4, 4)


def test_errors():
    with pytest.raises(ValueError, match=r"create_model: did you mean fast_scnn.*got 'fastscnn'"):
        segfast.create_model("fastscnn")
    with pytest.raises(ValueError, match="num_classes >= 1, got 0"):
        segfast.create_model("fast_scnn", 0)
    with pytest.raises(TypeError, match="depth"):
        segfast.create_model("fast_scnn", depth=3)
    with pytest.raises(ValueError, match="width > 0, got 0"):
        segfast.create_model("fast_scnn", width=0)
    with pytest.raises(TypeError, match="floating-point"):
        segfast.create_model("fast_scnn")(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    for shape in ((3, 8, 8), (1, 4, 8, 8), (1, 3, 2, 8)):
        with pytest.raises(ValueError, match=r"fast_scnn: want \(N, 3, H, W\)"):
            segfast.create_model("fast_scnn")(torch.zeros(shape))
    with pytest.raises(ValueError, match="'fast_scnn' twice"):
        register_model(paper="", parameters=0, macs=0)(NETWORKS["fast_scnn"].build)


def test_predict(network):
    model = segfast.create_model(network.name, 5)
    image = np.random.default_rng(0).integers(0, 256, (45, 70, 3), dtype=np.uint8)
    with pytest.raises(RuntimeError, match="evaluation mode"):
        model.predict(image)
    model.eval()
    classes = model.predict(image)
    assert classes.shape == (45, 70)
    assert classes.dtype == np.uint8
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    assert np.array_equal(model.predict(Image.fromarray(image)), classes)
    assert np.array_equal(model.predict(tensor).numpy(), classes)
    assert np.array_equal(model.predict(tensor[None]).numpy()[0], classes)
    for wrong in (image[..., 0], image.astype(np.float32), tensor.float()):
        with pytest.raises(ValueError, match="predict: want"):
            model.predict(wrong)
