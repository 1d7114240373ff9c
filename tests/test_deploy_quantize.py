"""int8 networks: close to float, whole in their files, and clear about what they cannot take."""

import copy
import json
import types
from collections import Counter

import pytest
import torch
from conftest import count, some
from torch import nn
from typer.testing import CliRunner

import segfast
from segfast import _backend, deploy
from segfast.cli import app
from segfast.data import SyntheticStreets
from segfast.engine import checkpoint, cross_entropy, train
from segfast.engine.run import load_network
from segfast.models import Output, SegmentationModel

pytest.importorskip("torchao")
from segfast.deploy import artefact, int8

SIZE = (64, 96)
NETWORK = {"model": "fast_scnn", "num_classes": 6, "options": {"width": 0.25}}


@pytest.fixture(scope="module")
def streets():
    torch.manual_seed(0)
    data = SyntheticStreets(8, SIZE)
    model = segfast.create_model("fast_scnn", 6, width=0.25)
    pairs = [data[i] for i in range(len(data))]
    batch = model.preprocessing(torch.stack([x for x, _ in pairs]) * 255), torch.stack([y for _, y in pairs])

    def loss(model, images, labels):
        return {"labels": cross_entropy(model.forward_features(images).logits, labels, align_corners=True)}

    train(model, [batch], loss, torch.optim.AdamW(model.parameters(), 5e-3), 30)
    return model.eval(), batch


@pytest.fixture(scope="module")
def quantized(streets):
    model, (images, _) = streets
    return deploy.quantize(model, list(images), observer="min-max", network=NETWORK)


def agreement(run, model, images) -> float:
    with torch.no_grad():
        return float((run(images).argmax(1) == model(images).argmax(1)).float().mean())


def accuracy(images, labels):
    def score(run) -> float:
        with torch.no_grad():
            return float((run(images).argmax(1) == labels)[labels != 255].float().mean())

    return score


def test_classes_of_the_streets():
    assert len(SyntheticStreets.classes) == 6


def test_static(streets, quantized):
    model, (images, _) = streets
    targets = [str(node.target) for node in quantized.graph.graph.nodes]
    convolutions = sum("conv" in target for target in targets if target.startswith("aten"))
    assert sum("dequantize_per_channel" in target for target in targets) == convolutions == len(int8.layers(model))
    assert not any("batch_norm" in target for target in targets)
    assert agreement(quantized, model, images) > 0.97
    with torch.no_grad():
        assert not torch.equal(quantized(images), model(images))
    with pytest.raises(ValueError, match="want images"):
        quantized(images[..., :-1])


def networks(ci: int) -> list[str]:
    """Some networks of the zoo, others with every commit; all under full effort."""
    names = segfast.list_models()
    return ["linknet", *some(names, ci)]


@pytest.mark.parametrize("name", sorted(set(networks(1))))
def test_networks_run_on_the_int8_kernels(name):
    """LinkNet's blocks call one ReLU twice, which torchao's quantiser takes for one call."""
    torch.manual_seed(0)
    model = segfast.create_model(name, 19).eval()
    images = list(torch.randn(8, 3, 96, 128))
    quantized = deploy.quantize(model, images, observer="min-max")
    whole, x = int8.Classes(quantized, True), images[0][None]
    optimized = segfast.optimize(whole, x, class_dtype=torch.uint8)
    assert optimized.explain().reason == ""
    with torch.no_grad():
        classes, want = optimized(x), whole(x)
    assert classes.dtype == torch.uint8
    logits = segfast.optimize(quantized, x)
    assert logits.explain().reason == ""
    assert logits(x).shape == (1, 19, *x.shape[2:])
    with torch.no_grad(), int8.rounded(model, int8.ranges(model, images)):
        assert model(x).isfinite().all()
    same = float((classes == want).float().mean())
    assert same > 0.9, "the least rounding, through a hundred layers, turns a class where random weights nearly tie"
    if _backend.has_compiled("packed_int8", "CPU"):
        assert sum(line.operation == "segfast::packed_int8" for line in optimized.explain().lines) >= 5


@pytest.mark.parametrize("observer", ["mse", "percentile"][: count(1, 2)])
def test_observers(streets, observer):
    model, (images, _) = streets
    assert agreement(deploy.quantize(model, list(images[:8]), observer=observer), model, images) > 0.95


def test_percentile_of_a_histogram():
    histogram = torch.zeros(1000)
    histogram[100:900] = 1e6
    histogram[999] = 1.0
    low, high = int8.shares(histogram, torch.tensor(0.0), torch.tensor(10.0))
    assert 0.99 < low < 1.01
    assert 8.99 < high < 9.01


def test_layers_stay_in_float(streets):
    model, (images, _) = streets
    kept = deploy.quantize(model, list(images), observer="min-max", keep=list(int8.layers(model)))
    assert not any("quantize" in str(node.target) for node in kept.graph.graph.nodes)
    with torch.no_grad():
        torch.testing.assert_close(kept(images), model(images), rtol=1e-4, atol=1e-4)


def test_sensitivity_finds_the_broken_layer(streets):
    """A classifier whose input has one enormous channel that nothing reads: in 256 steps the others are all zero."""
    model, (images, labels) = streets
    broken = copy.deepcopy(model)
    layer = "classifier.conv.1"
    with torch.no_grad():
        broken.classifier.conv[1].weight[:, 0] = 0
        norm = broken.classifier.dsconv2.conv[4]
        norm.bias[0] = 1e5
    costs = deploy.sensitivity(broken, list(images[:8]), accuracy(images, labels))
    assert next(iter(costs)) == layer
    assert costs[layer] > 5
    assert set(costs) == set(int8.layers(broken))


def test_budget_keeps_the_costliest_layers(streets, monkeypatch):
    """With costs that are known: layers stay in float, the costliest first, until the budget holds."""
    model, (images, _) = streets
    costs = {name: 1.0 + (name == "classifier.conv.1") for name in int8.layers(model)}
    monkeypatch.setattr(int8, "sensitivity", lambda *_, **__: dict(sorted(costs.items(), key=lambda item: -item[1])))

    class Kept(list):
        about: dict = {}

    monkeypatch.setattr(int8, "static", lambda model, images, observer, kept, network, dynamic: Kept(kept))

    def score(run) -> float:
        return 0.9 if run is model else 0.9 - sum(cost for name, cost in costs.items() if name not in run) / 100

    said, total = [], sum(costs.values())
    assert int8.quantize(model, list(images), score=score, max_drop=total + 0.01) == []
    assert int8.quantize(model, list(images), score=score, max_drop=total - 1.99, say=said.append) == ["classifier.conv.1"]
    assert sum(": +" in line for line in said) == len(costs), "every layer's cost is told"
    kept = int8.quantize(model, list(images), score=score, max_drop=total - 4.5)
    assert len(kept) == 4
    with pytest.raises(ValueError, match="larger max_drop"):
        int8.quantize(model, list(images), score=lambda run: float(run is model), max_drop=0.5)


def test_files(streets, quantized, tmp_path):
    model, (images, _) = streets
    path = deploy.save_quantized(quantized, tmp_path / "a.safetensors", miou=0.5)
    again = deploy.load_quantized(path)
    with torch.no_grad():
        assert torch.equal(again(images[:2]), quantized(images[:2]))
    assert again.about["miou"] == 0.5
    tensors, _ = checkpoint.load(path)
    assert sum(x.dtype == torch.int8 for x in tensors.values()) == len(int8.layers(model))
    with pytest.raises(ValueError, match=r"int8 weights and their scales.*load_quantized"):
        checkpoint.load_weights(model, path)
    with pytest.raises(ValueError, match=r"int8 weights and their scales"):
        load_network(path)
    tensors, about = checkpoint.load(path)
    for change in ({"activations": about["activations"][1:]}, {"float_layers": 3}, {"size": [1]}, {"preprocessing": {"x": 1}}):
        other = checkpoint.save(tmp_path / "other.safetensors", tensors, about | change)
        with pytest.raises(ValueError, match=r"other\.safetensors (does not fit|says of its preprocessing)"):
            deploy.load_quantized(other)
    checkpoint.save(tmp_path / "float.safetensors", model.state_dict(), {"network": NETWORK})
    with pytest.raises(ValueError, match="holds no int8"):
        deploy.load_quantized(tmp_path / "float.safetensors")


def test_size_of_the_published_network(tmp_path):
    model = segfast.create_model("fast_scnn", 11).eval()
    plain = checkpoint.save(tmp_path / "float.safetensors", model.state_dict(), {})
    small = int8.save_weights_only(model, tmp_path / "int8.safetensors", {"model": "fast_scnn", "num_classes": 11})
    assert plain.stat().st_size > 3.5 * small.stat().st_size
    back = deploy.load_weights_only(small)
    assert back.state_dict().keys() == model.state_dict().keys()
    assert len(int8.folded(model)[1]) == sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    for name, module in int8.layers(int8.folded(model)[0]).items():
        weight, rounded = module.weight, back.get_submodule(name).weight
        step = int8.channel_scale(weight, int8.weight_axis(module))
        assert ((weight - rounded).abs() <= 0.51 * step).all()
    images = torch.randn(2, 3, *SIZE)
    with torch.no_grad():
        torch.testing.assert_close(back(images), int8.weights_only(model)(images), rtol=1e-4, atol=1e-4)
    tensors, about = checkpoint.load(small)
    for change in (lambda t: t.pop("classifier.conv.1.weight"), lambda t: t.update(extra=torch.zeros(1))):
        changed = dict(tensors)
        change(changed)
        path = checkpoint.save(tmp_path / "changed.safetensors", changed, about)
        with pytest.raises(ValueError, match=r"changed\.safetensors does not fit"):
            deploy.load_weights_only(path)
    with pytest.raises(ValueError, match="int8 weights and their scales"):
        checkpoint.load_weights(model, small)


def test_a_convolution_that_two_read_is_not_folded():
    class Twice(segfast.models.SegmentationModel):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def outputs(self, images):
            y = self.conv(images)
            return segfast.models.Output(self.norm(y) + y, (), {})

    model = Twice().eval()
    with torch.no_grad():
        model.norm.running_var.fill_(4)
    smaller, norms = int8.folded(model)
    assert norms == []
    assert torch.equal(smaller.conv.weight, model.conv.weight)


def test_onnx(streets, quantized, tmp_path):
    pytest.importorskip("onnxscript")
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    model, (images, _) = streets
    done = deploy.quantize_onnx(quantized, tmp_path / "a.onnx")
    assert done.refused == ()
    assert done.operators["QuantizeLinear"] > 20
    proto = onnx.load(tmp_path / "a.onnx")
    weights = sum(x.data_type == onnx.TensorProto.INT8 and len(x.dims) == 4 for x in proto.graph.initializer)
    assert weights == len(int8.layers(model))
    whole = {x.name for x in proto.graph.initializer if x.data_type == onnx.TensorProto.INT8}
    readers = Counter(name for node in proto.graph.node for name in node.input if name in whole)
    assert set(readers.values()) == {1}  # what ONNX Runtime wants for sums that are not saturated without VNNI
    classes = deploy.load(tmp_path / "a.onnx").run(images[:1])
    with torch.no_grad():
        assert (classes == quantized(images[:1]).argmax(1)).float().mean() > 0.99


def test_onnx_that_turns_pixels(streets, quantized, tmp_path, monkeypatch):
    """A file that gives other classes is refused, unless as many turn when the image hardly changes."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")

    class Turned(int8.Session):
        def __call__(self, images):
            classes = super().__call__(images).clone()
            classes[:, : classes.shape[1] // 16] += 1
            return classes

    monkeypatch.setattr(int8, "Session", Turned)
    with pytest.raises(ValueError, match=r"want at least 99.00% of the pixels .* got 9\d.\d+%; nothing was written"):
        deploy.quantize_onnx(quantized, tmp_path / "a.onnx")
    assert not (tmp_path / "a.onnx").exists()
    monkeypatch.setattr(int8, "NUDGE", -2.0)  # the image's negative
    assert deploy.quantize_onnx(quantized, tmp_path / "a.onnx").agreement < 0.95


class Shared(SegmentationModel):
    """A convolution that runs at two resolutions, as those of an image pyramid do."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.scores = torch.nn.Conv2d(8, 3, 1)
        self.num_classes = 3

    def outputs(self, images):
        half = torch.relu(self.conv(images[:, :, ::2, ::2]))
        both = torch.relu(self.conv(images)) + half.repeat_interleave(2, 2).repeat_interleave(2, 3)
        return Output(self.scores(both), (), {"pre_logits": both})


HAS_VNNI = _backend._C is not None and _backend._C.cpu_features()["avx512vnni"]


@pytest.mark.parametrize("vnni", [False, *[True] * HAS_VNNI])
def test_layers_that_share_weights_run_on_every_processor(vnni, tmp_path, monkeypatch):
    """Without dot products of bytes ONNX Runtime is asked to rewrite the weights, which it cannot where layers share them."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    features = types.SimpleNamespace(cpu_features=lambda: {"avx512vnni": vnni})
    torch.manual_seed(0)
    model = Shared().eval()
    quantized = deploy.quantize(model, list(torch.randn(8, 3, *SIZE)), observer="min-max")
    content = deploy.quantize_onnx(quantized, tmp_path / "a.onnx").path.read_bytes()
    monkeypatch.setattr(artefact, "_backend", types.SimpleNamespace(_C=features))
    x = torch.randn(1, 3, *SIZE)
    with torch.no_grad():
        same = artefact.Session(content, "test")(x) == quantized(x).argmax(1)
    assert same.float().mean() > 0.99


@pytest.mark.parametrize("name", ["fast_scnn", *networks(0)][: count(1, 1 + len(segfast.list_models()))])
def test_free_size(name, tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    network = {"model": name, "num_classes": 3, "options": {"width": 0.25} if name == "fast_scnn" else {}}
    model = segfast.create_model(name, 3, **network["options"])
    with torch.no_grad():
        model(torch.randn(2, 3, *SIZE))
    model.eval()
    images = list(torch.randn(8, 3, *SIZE))
    quantized = deploy.quantize(model, images, observer="min-max", dynamic=True, network=network)
    again = deploy.load_quantized(deploy.save_quantized(quantized, tmp_path / "a.safetensors"))
    deploy.quantize_onnx(quantized, tmp_path / "a.onnx")
    artefact = deploy.load(tmp_path / "a.onnx")
    assert artefact.about["size"] is None
    for x in (torch.randn(2, 3, 129, 200), torch.randn(1, 3, 33, 50)):
        with torch.no_grad():
            want = quantized(x)
            assert torch.equal(again(x), want)
            nudged = quantized(x * (1 + int8.NUDGE)).argmax(1) != want.argmax(1)
        turned = artefact.run(x) != want.argmax(1)
        first, second = want.topk(2, 1).values.unbind(1)
        clear = first - second > want.std() / 5  # of random weights and noise rounding turns the others
        for pixels, share in ((clear, 0.01), (clear | True, 0.1)):  # through a hundred layers (PSPNet) as much as a nudge does
            assert turned[pixels].float().mean() < max(share, 2 * nudged[pixels].float().mean())


def test_free_size_is_compared_with_the_network(streets, monkeypatch):
    model, _ = streets
    monkeypatch.setattr(int8.export, "TOLERANCE", 0.0)
    with pytest.raises(ValueError, match=r"quantize: fast_scnn gives other numbers.*dynamic=False"):
        int8.prepare(model, SIZE, "min-max", (), True)


def test_aware_learns(streets):
    """From a network whose weights were disturbed, training towards the float one brings it back, rounded all the while."""
    model, (images, labels) = streets
    limits = int8.ranges(model, images[:1])
    before = {name: module.weight.clone() for name, module in int8.layers(model).items()}
    steps = []
    made = deploy.quantize_aware(
        model, list(images), [(images, labels)], 4, observer="min-max", progress=lambda step, values: steps.append(values)
    )
    assert len(steps) == 4
    assert len(steps[0]) == 3  # the sum, the labels' loss and the distillation's
    assert all(torch.equal(before[name], module.weight) for name, module in int8.layers(model).items())
    assert agreement(made, model, images) > 0.9
    with int8.rounded(model, limits), torch.no_grad():
        rounded = model(images)
        weight = model.classifier.conv[1].weight
        assert all(len(channel.unique()) <= 256 for channel in weight)
    with torch.no_grad():
        assert not torch.equal(rounded, model(images))
    assert type(model.classifier.conv[1]) is nn.Conv2d


def test_bad_input(streets, monkeypatch):
    model, (images, _) = streets
    with pytest.raises(ValueError, match="at least 8 calibration images"):
        deploy.quantize(model, list(images[:3]))
    with pytest.raises(ValueError, match=r"of one size.*crop or resize"):
        deploy.quantize(model, [*images[:8], images[0][:, :32]])
    with pytest.raises(ValueError, match="observer among"):
        deploy.quantize(model, list(images), observer="max")
    with pytest.raises(ValueError, match="want layers of"):
        deploy.quantize(model, list(images), keep=["classifier.conv"])
    with pytest.raises(ValueError, match="want a score"):
        deploy.quantize(model, list(images), max_drop=1.0)
    with pytest.raises(ValueError, match=r"finite activations.*'learning_to_downsample\.conv\.conv'"):
        deploy.quantize(model, [*images[:8], torch.full_like(images[0], float("nan"))])
    norm = model.classifier.dsconv1.conv[1]
    monkeypatch.setitem(norm._buffers, "running_var", torch.full_like(norm.running_var, float("nan")))
    with pytest.raises(ValueError, match=r"'classifier\.dsconv1\.conv\.3'.*weights before it"):
        deploy.quantize(model, list(images))
    with pytest.raises(RuntimeError, match="evaluation mode"):
        deploy.quantize(segfast.create_model("fast_scnn"), list(images))


def call(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "220", "NO_COLOR": "1", "TERM": "dumb"})


@pytest.mark.parametrize("mode", ["bf16", "weights", "static", *["aware", "fp16"][: count(0, 2)]])
def test_command(streets, tmp_path, mode):
    model, _ = streets
    about = {**NETWORK, "classes": list(SyntheticStreets.classes), "palette": [list(p) for p in SyntheticStreets.palette]}
    run = tmp_path / "run"
    checkpoint.save(run / "best.safetensors", model.state_dict(), {"network": about})
    (run / "config.yaml").write_text(f"images: 8\nval_images: 2\nsize: {json.dumps(SIZE)}\n")
    out = tmp_path / "out.safetensors"
    few = ["--images", 8, "--runs", 0, "--steps", 2, "--batch", 2, "--report", tmp_path / "report.json"]
    few += {"static": ["--size", 48, 64, "--sensitivity"], "aware": []}.get(mode, ["--size", 48, 64])
    few += ["--observer", "min-max"] if mode in ("static", "aware") else []
    result = call("quantize", run, out, "--mode", mode, *few)
    assert result.exit_code == 0, result.output
    costs = json.loads((tmp_path / "report.json").read_text())["sensitivity"]
    assert set(costs) == (set(int8.layers(model)) if mode == "static" else set())
    about = checkpoint.load(out)[1]
    assert {"network", "preprocessing", "segfast", "torch", "miou", "made"} <= set(about)
    assert about["network"]["palette"] == [list(p) for p in SyntheticStreets.palette]
    assert "float" in result.output
    assert "bf16" in result.output
    assert ("int8" in result.output) == (mode in ("weights", "static", "aware"))
    assert out.is_file()
    if mode in ("bf16", "fp16"):
        half, _ = load_network(out)
        for name, x in half.state_dict().items():
            torch.testing.assert_close(x, model.state_dict()[name], rtol=1e-2, atol=1e-3)
    if mode in ("bf16", "weights"):
        refused = call("quantize", run, out, "--mode", mode, "--max-drop", 1, "--root", "nowhere")
        assert "want mode static with --max-drop" in refused.output
        assert "any size as it is" in call("quantize", run, out, "--mode", mode, "--dynamic").output
    assert call("quantize", run, out, "--mode", "dynamic").exit_code == 2
    assert "linear layers" in call("quantize", run, out, "--mode", "dynamic").output


def test_command_refuses_other_classes(tmp_path):
    model = segfast.create_model("fast_scnn", 3, width=0.25)
    path = checkpoint.save(tmp_path / "a.safetensors", model.state_dict(), {"network": {**NETWORK, "num_classes": 3}})
    result = call("quantize", path, tmp_path / "b.safetensors")
    assert result.exit_code == 2
    assert "want the dataset's 6 classes, got 3" in result.output
