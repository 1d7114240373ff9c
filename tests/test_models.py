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


@pytest.fixture(scope="module")
def built():
    """Networks of five classes, built once a module: in evaluation mode, to be left as they are."""
    models = {}

    def build(name: str):
        if name not in models:
            torch.manual_seed(0)
            models[name] = segfast.create_model(name, 5).eval()
        return models[name]

    return build


def logits_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_declared_counts(network):
    with torch.device("meta"):
        model = segfast.create_model(network.name).eval()
        images = torch.empty(1, 3, *network.size)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == network.parameters
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    assert counter.get_total_flops() == 2 * network.macs
    assert "arXiv" in network.paper


@pytest.mark.parametrize("size", [(64, 96), (65, 97), (33, 50), (32, 32)])
def test_any_size(network, built, size):
    model = built(network.name)
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        logits = model(images)
        output = model.forward_features(images)
        full = F.interpolate(output.logits, size, mode="bilinear", align_corners=model.align_corners)
        logits_close(logits, full)
        assert "pre_logits" in output.features
        assert output.aux == ()
    assert logits.shape == (2, 5, *size)
    assert logits.isfinite().all()


def test_every_parameter_gets_a_gradient(network):
    model = segfast.create_model(network.name, 4)
    model(torch.randn(2, 3, 64, 64)).square().mean().backward()
    for name, parameter in model.named_parameters():
        if name.startswith(model.idle):
            assert parameter.grad is None, name
            continue
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_one_image_trains(network):
    model = segfast.create_model(network.name, 2)
    model(torch.randn(1, 3, 96, 128)).square().mean().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if not name.startswith(model.idle))


def test_images_do_not_see_each_other(network, built):
    model = built(network.name)
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        logits_close(model(images)[1:], model(images[1:]))


def test_quick_and_plain_agree(network, built):
    """Without gradients BatchNorms are folded and results overwritten, with them not; images and features stay whole."""
    model = built(network.name)
    images = torch.randn(1, 3, 64, 96)
    before = images.clone()
    plain = model(images)
    with torch.no_grad():
        logits_close(model(images), plain.detach())
    with torch.inference_mode():
        logits_close(model(images), plain.detach())
    assert torch.equal(images, before)
    with torch.no_grad():
        features = model.forward_features(images).features
    for name, x in model.forward_features(images).features.items():
        logits_close(features[name], x.detach())


def test_state_dict_comes_back(network, built):
    first, second = built(network.name), segfast.create_model(network.name, 5).eval()
    second.load_state_dict(first.state_dict())
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(first(images), second(images))


def test_channels_last(network, built):
    model = built(network.name)
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        logits_close(model(images.contiguous(memory_format=torch.channels_last)), model(images))


def test_autocast(network, built):
    model = built(network.name)
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            half = model(images)
        full = model(images)
    assert half.isfinite().all()
    error = (half.float() - full).norm() / full.norm()
    assert error < 0.1


def test_compiles_as_one_graph(network, built):
    model = built(network.name)
    images = torch.randn(1, 3, 65, 97)
    with torch.no_grad():
        logits_close(torch.compile(model, fullgraph=True, backend="aot_eager")(images), model(images))


def test_exports(network, built):
    model = built(network.name)
    images = torch.randn(1, 3, 65, 97)
    program = torch.export.export(model, (images,))
    assert not any("segfast" in str(node.target) for node in program.graph.nodes)
    with torch.no_grad():
        logits_close(program.module()(images), model(images))


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
