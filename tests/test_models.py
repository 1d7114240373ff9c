"""A network is tested by being registered."""

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import count, extra, seed_of_commit, some
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


@pytest.mark.drawn(1 / 3)
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


@pytest.mark.drawn(1 / 3)
def test_every_parameter_gets_a_gradient(network):
    model = segfast.create_model(network.name, 4)
    model(torch.randn(2, 3, 64, 64)).square().mean().backward()
    for name, parameter in model.named_parameters():
        if name.startswith(model.idle):
            assert parameter.grad is None, name
            continue
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.drawn(1 / 3)
def test_one_image_trains(network):
    model = segfast.create_model(network.name, 2)
    model(torch.randn(1, 3, 96, 128)).square().mean().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if not name.startswith(model.idle))


@pytest.mark.drawn(1 / 2)
def test_images_do_not_see_each_other(network, built):
    model = built(network.name)
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        logits_close(model(images)[1:], model(images[1:]))


@pytest.mark.drawn(1 / 2)
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


@pytest.mark.drawn(1 / 2)
def test_state_dict_comes_back(network, built):
    first, second = built(network.name), segfast.create_model(network.name, 5).eval()
    second.load_state_dict(first.state_dict())
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(first(images), second(images))


@pytest.mark.drawn(1 / 2)
def test_channels_last(network, built):
    model = built(network.name)
    images = torch.randn(1, 3, 128, 160)
    last = images.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        plain, logits, features = model(images), model(last), model.forward_features(last).features
    logits_close(logits, plain)
    assert plain.is_contiguous()
    assert logits.is_contiguous(memory_format=torch.channels_last)
    for name, x in features.items():
        assert x.is_contiguous(memory_format=torch.channels_last), name  # no step falls back to the weights' layout


def test_vmap():
    model = segfast.create_model("fast_scnn", 3).eval()
    images = torch.randn(2, 1, 3, 64, 96).transpose(3, 4)
    with torch.no_grad():
        logits_close(torch.func.vmap(model)(images).flatten(0, 1), model(images.flatten(0, 1)))


@pytest.mark.drawn(1 / 2)
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


@pytest.mark.parametrize("name", some(segfast.list_models(), 4))
def test_compiles_as_one_graph(built, name):
    model = built(name)
    images = torch.randn(1, 3, 65, 97)
    torch._dynamo.reset()  # all networks share `SegmentationModel.forward`, whose recompilations are limited
    with torch.no_grad():
        logits_close(torch.compile(model, fullgraph=True, backend="aot_eager")(images), model(images))


@pytest.mark.drawn(1 / 3)
def test_exports(network, built):
    model = built(network.name)
    images = torch.randn(1, 3, 65, 97)
    program = torch.export.export(model, (images,))
    assert not any("segfast" in str(node.target) for node in program.graph.nodes)
    with torch.no_grad():
        logits_close(program.module()(images), model(images))


@pytest.mark.parametrize("name", some(segfast.list_models(), 1))
def test_onnx(built, name, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, images = built(name), torch.randn(1, 3, 65, 97)
    torch.onnx.export(model, (images,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        logits_close(torch.from_numpy(logits), model(images))


@pytest.mark.parametrize(
    ("name", "options", "parameters"),
    [
        ("espnet", {"num_classes": 20}, 365_109),
        ("espnet", {"num_classes": 20, "q": 3}, 203_189),
        ("espnet", {"num_classes": 20, "q": 5}, 267_957),
        ("espnet", {"num_classes": 20, "q": 3, "variant": "test"}, 202_649),
        ("espnet", {"num_classes": 20, "q": 5, "variant": "test"}, 267_417),
        ("espnet", {"num_classes": 20, "q": 8, "variant": "test"}, 364_569),
        ("espnet_c", {"num_classes": 20, "q": 3}, 187_529),
        ("espnet_c", {"num_classes": 20, "q": 5}, 252_297),
        ("espnet_c", {"num_classes": 20}, 349_449),
        ("fast_scnn", {"aux": True}, 1_157_174),
        ("contextnet", {"aux": True}, 914_118),
        ("icnet", {"deploy": True}, 6_685_715),
    ],
)
def test_counts_of_variants(name, options, parameters):
    with torch.device("meta"):
        model = segfast.create_model(name, **options)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize(("name", "strides"), [("fast_scnn", [8]), ("contextnet", [8]), ("icnet", [16, 8])])
def test_auxiliary_heads(name, strides):
    model = segfast.create_model(name, 3, aux=True)
    output = model.forward_features(torch.randn(2, 3, 128, 128))
    assert [128 // x.shape[2] for x in output.aux] == strides
    assert all(x.shape[:2] == (2, 3) for x in output.aux)
    (output.logits.mean() + sum(x.mean() for x in output.aux)).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_icnet_differs_from_the_port_that_is_quoted_by_what_that_computes_more():
    # meetps/pytorch-semseg (7,742,649 parameters, 30.58 G at 1025 x 2049): the classifiers of the label guidance always, the
    # identity blocks of stage 3 once more for nobody, their stage's stride in the 3 x 3, four convolutions without a use.
    with torch.device("meta"):
        model = segfast.create_model("icnet", aux=True, deploy=True).eval()
        images, stage3, stage2 = torch.empty(1, 3, 1025, 2049), torch.empty(1, 256, 33, 65), torch.empty(1, 128, 129, 257)
    unused = 4 * (1024 * 256 + 256)
    assert sum(p.numel() for p in model.parameters()) + unused == 7_742_649
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
        model.stage3[1:](stage3)
        torch.nn.functional.conv2d(stage2, model.stage3[0].reduce.conv.weight)
    where_the_authors_stride = model.stage3[0].reduce.conv.weight.numel() * 65 * 129
    assert counter.get_total_flops() / 2 - where_the_authors_stride == 30_583_978_176


def test_icnet_folds():
    torch.manual_seed(0)
    model = segfast.create_model("icnet", 4)
    images = torch.randn(2, 3, 65, 97)
    model(images)
    model.eval()
    folded = model.fold()
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    with torch.no_grad():
        logits_close(folded(images), model(images))
        assert torch.equal(folded.fold()(images), folded(images))


@pytest.mark.parametrize(
    ("name", "stride", "channels"),
    [("fast_scnn", 8, 128), ("contextnet", 8, 128), ("espnet_c", 8, 256), ("linknet", 2, 32), ("unet", 1, 64), ("icnet", 4, 128)],
)
def test_strides(name, stride, channels):
    features = segfast.create_model(name).eval().forward_features(torch.randn(1, 3, 64, 128)).features
    assert features["pre_logits"].shape == (1, channels, 64 // stride, 128 // stride)


@pytest.mark.parametrize("name", ["linknet", "unet"])
@pytest.mark.parametrize("backbone", ["resnet18", "shufflenetv2_x0_5", "mobilenetv2_050", "poolformer_s12"])
def test_backbones(name, backbone):
    if not backbone.startswith(("resnet", "shufflenet")):
        extra("timm")
    model = segfast.create_model(name, 3, backbone=backbone).eval()
    images = torch.randn(1, 3, 65, 98)
    with torch.no_grad():
        logits = model(images)
    assert logits.shape == (1, 3, 65, 98)
    assert model.forward_features(images).features["stage4"].shape[1] == model.encoder.channels[-1]
    if (name, backbone) == ("linknet", "resnet18"):
        assert sum(p.numel() for p in segfast.create_model(name, backbone=backbone).parameters()) == NETWORKS[name].parameters
    with pytest.raises(ValueError, match="did you mean"):
        segfast.create_model(name, backbone=f"{backbone}0")


def test_width():
    narrow = segfast.create_model("fast_scnn", 6, width=0.25)
    assert sum(p.numel() for p in narrow.parameters()) < 1_138_051 / 8
    assert narrow.forward_features(torch.randn(2, 3, 32, 32)).features["pre_logits"].shape == (2, 32, 4, 4)


def test_errors():
    with pytest.raises(ValueError, match=r"create_model: did you mean fast_scnn.*got 'fastscnn'"):
        segfast.create_model("fastscnn")
    with pytest.raises(ValueError, match="num_classes >= 1, got 0"):
        segfast.create_model("fast_scnn", 0)
    for wrong in (None, 3, ["fast_scnn"]):
        with pytest.raises(TypeError, match="create_model: want a network's name"):
            segfast.create_model(wrong)
    assert segfast.create_model("fast_scnn", np.int64(7)).num_classes == 7
    with pytest.raises(TypeError, match="depth"):
        segfast.create_model("fast_scnn", depth=3)
    with pytest.raises(ValueError, match="width > 0, got 0"):
        segfast.create_model("fast_scnn", width=0)
    with pytest.raises(TypeError, match="floating-point"):
        segfast.create_model("fast_scnn")(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    for shape in ((3, 8, 8), (1, 4, 8, 8), (1, 3, 2, 8)):
        with pytest.raises(ValueError, match=r"fast_scnn: want \(N, 3, H, W\)"):
            segfast.create_model("fast_scnn")(torch.zeros(shape))
    for name, options, message in (
        ("espnet", {"p": 0}, "espnet: want p >= 1, got 0"),
        ("espnet_c", {"q": 2.5}, "espnet_c: want q >= 1, got 2.5"),
        ("espnet", {"variant": "other"}, "espnet: want variant one of 'train', 'test', got 'other'"),
        ("contextnet", {"factor": 3}, "got multiple values|want factor"),
        ("unet", {"width": 32, "backbone": "resnet18"}, "unet: want no width with a backbone, got 32"),
        ("espnet", {"backbone": "resnet18"}, "backbone"),
        ("unet", {"width": 0}, "unet: want width >= 1, got 0"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            segfast.create_model(name, **options)
    with pytest.raises(ValueError, match="'fast_scnn' twice"):
        register_model(paper="", parameters=0, macs=0)(NETWORKS["fast_scnn"].build)


@pytest.mark.drawn(1 / 3)
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


@pytest.mark.drawn(1 / 2)
@pytest.mark.parametrize("name", segfast.list_models())
def test_hooks_see_what_a_layer_gave(name):
    """One layer watched at a time, drawn by the commit: what its hook kept is not overwritten later."""
    torch.manual_seed(0)
    model = segfast.create_model(name, 3).eval()
    x = torch.randn(1, 3, 64, 64)
    layers = [layer for layer in model.modules() if layer is not model]
    draw = random.Random(seed_of_commit())
    with torch.no_grad():
        for layer in draw.sample(layers, min(count(3, 1000), len(layers))):
            kept = []
            keep = lambda layer, given, result, kept=kept: kept.append((result, copy.deepcopy(result)))  # noqa: E731
            handle = layer.register_forward_hook(keep)
            model(x)
            handle.remove()
            for result, before in kept:
                if isinstance(result, torch.Tensor):
                    assert torch.equal(result, before), layer
