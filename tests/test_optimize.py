"""segfast.optimize: networks of this package and of others fused, against eager; sizes, threads, memory, copies, refusals."""

from __future__ import annotations

import copy
import gc
import io
import json
import math
import re
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import count, extra, some
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._pytree import tree_leaves

import segfast
from segfast import _backend, ops
from segfast.nn import ConvBNAct, DSConv, InvertedResidual, ShuffleV1Unit, ShuffleV2Unit
from segfast.optimize import _memory

GOLDEN = Path(__file__).with_name("optimize.json")
EPS = {torch.float32: 1.2e-7, torch.bfloat16: 7.8e-3}


@pytest.fixture(autouse=True)
def one_thread(restore):
    """Networks of this size are no work for two threads, which in a busy test run wait for each other at every layer."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def small_maps_have_places():
    """The maps here are smaller than those that a place is worth it for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_memory, "LEAST", 1)
        yield


def randomised(model: nn.Module) -> nn.Module:
    """In evaluation mode, with statistics that folding must get right."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                module.weight.data.uniform_(0.5, 1.5)
                module.bias.data.normal_(0, 0.2)
    return model.eval()


def rms(x, y) -> float:
    return float((x.double() - y.double()).square().mean().sqrt()) if x.numel() else 0.0


def maps(value) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


@torch.no_grad()
def check(model: nn.Module, images: torch.Tensor, optimized=None, dtype=torch.float32):
    """At most twice the RMS error of eager PyTorch in the same dtype, and a rounding of the result. Eager's own differs up to
    twofold between the two layouts that a network may run in, for the same sums in another order: the larger counts."""
    optimized = optimized or segfast.optimize(model, dtype=dtype)
    actual = optimized(images)
    exact = maps(copy.deepcopy(model).double()(images.double()))
    twin = copy.deepcopy(model).to(dtype)
    eager = maps(twin(images.to(dtype)))
    relaid = maps(twin.to(memory_format=torch.channels_last)(images.to(dtype).contiguous(memory_format=torch.channels_last)))
    assert len(maps(actual)) == len(exact)
    for a, x, e, r in zip(maps(actual), exact, eager, relaid, strict=True):
        assert (a.shape, a.dtype) == (e.shape, e.dtype)
        assert not a.requires_grad
        if not a.is_floating_point():
            assert float((a != x).double().mean()) <= 2 * max(float((b != x).double().mean()) for b in (e, r)) + 0.01
            continue
        allowed = 2 * max(rms(e, x), rms(r, x)) + 0.5 * EPS[dtype] * rms(x, torch.zeros_like(x))
        assert rms(a, x) <= allowed, f"off by {rms(a, x):.3g}, allowed {allowed:.3g}"
    return optimized


class Small(nn.Module):
    """A block of every kind."""

    def __init__(self, width: int = 16, classes: int = 5):
        super().__init__()
        self.stem = ConvBNAct(3, width, 3, 2)
        self.separable = DSConv(width, width)
        self.inverted = InvertedResidual(width, width)
        self.units = nn.Sequential(ShuffleV1Unit(width, width, 2), ShuffleV2Unit(width, width))
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x):
        y = self.head(self.units(self.inverted(self.separable(self.stem(x)))))
        return F.interpolate(y, x.shape[2:], mode="bilinear")


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return randomised(Small())


def zoo(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomised(segfast.create_model(name, 5))


def timm_features(name: str):
    return lambda: extra("timm").create_model(name, features_only=True)


def smp(name: str):
    def build():
        extra("timm")
        return getattr(extra("segmentation_models_pytorch"), name)("mobilenet_v2", encoder_weights=None, classes=5)

    return build


def lraspp():
    extra("torchvision")
    from torchvision.models.segmentation import lraspp_mobilenet_v3_large

    return lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=5)


OTHERS = {
    "timm mobilenetv2_100": timm_features("mobilenetv2_100"),
    "timm efficientnet_lite0": timm_features("efficientnet_lite0"),
    "timm mobilenetv3_large_100": timm_features("mobilenetv3_large_100"),
    "smp Unet mobilenet_v2": smp("Unet"),
    "smp DeepLabV3Plus mobilenet_v2": smp("DeepLabV3Plus"),
    "torchvision lraspp_mobilenet_v3_large": lraspp,
}


def golden(name: str, optimized) -> None:
    expected = json.loads(GOLDEN.read_text())
    assert optimized.explain().reason == ""
    if _memory.place_next is None:  # what joins what hangs on the kernels that are there
        return
    assert optimized.explain().counts() == expected[name], "if the change is meant, write it into tests/optimize.json"


@pytest.mark.parametrize("name", some(segfast.list_models(), 5))
def test_zoo(name):
    golden(name, check(zoo(name), torch.randn(1, 3, 64, 96)))


@pytest.mark.drawn(1 / 3)
@pytest.mark.parametrize("name", OTHERS)
def test_networks_of_others(name):
    torch.manual_seed(0)
    model = randomised(OTHERS[name]())
    golden(name, check(model, torch.randn(1, 3, 96, 128)))


@pytest.mark.parametrize("name", some(segfast.list_models(), 3))
def test_zoo_in_bfloat16(name):
    check(zoo(name), torch.randn(1, 3, 64, 96), dtype=torch.bfloat16)


def test_bfloat16(small):
    check(small, torch.randn(2, 3, 33, 50), dtype=torch.bfloat16)


class Classes(nn.Module):
    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x).argmax(1)


def test_a_depthwise_kernel_too_large_for_ours():
    torch.manual_seed(0)
    model = randomised(nn.Sequential(ConvBNAct(3, 8, 3), nn.Conv2d(8, 8, 9, padding=4, groups=8), nn.ReLU(), ConvBNAct(8, 16, 1)))
    optimized = check(model, torch.randn(1, 3, 24, 30))
    assert "separable" not in str(optimized.explain())


def test_explanation(small):
    optimized = segfast.optimize(Classes(small).eval(), torch.randn(1, 3, 32, 48))
    explanation = optimized.explain()
    assert explanation.counts() == {
        "aten": 3, "channel_shuffle": 1, "concat_shuffle": 1, "conv": 1, "conv+bn+add+relu": 1, "conv+bn+relu": 1,
        "conv+bn+relu+ds_conv": 1, "depthwise+bn": 1, "inverted_residual": 2, "upsample_argmax": 1,
    }  # fmt: skip
    alone = [line for line in explanation.lines if line.kind == "aten"]
    assert all(line.reason for line in alone)
    fused = next(line for line in explanation.lines if line.kind == "inverted_residual")
    assert fused.scope.startswith("network.inverted")
    assert "upsample_argmax" in str(explanation)
    with pytest.raises(RuntimeError, match="want a call or an example"):
        segfast.optimize(small).explain()


@pytest.mark.parametrize("dtype", [None, torch.uint8, torch.int32])
def test_class_map(small, dtype):
    images = torch.randn(2, 3, 33, 50)
    optimized = segfast.optimize(Classes(small).eval(), class_dtype=dtype)
    classes = optimized(images)
    assert classes.dtype == (dtype or torch.int64)
    with torch.no_grad():
        logits = small(images)
    assert (
        torch.equal(classes.long(), logits.argmax(1))
        or rms(logits.gather(1, classes.long()[:, None]), logits.amax(1, keepdim=True)) < 1e-5
    )
    kept = segfast.optimize(lambda_module(lambda x: (y := small(x).argmax(1), F.one_hot(y, 5))), class_dtype=dtype)
    both = kept(images)
    assert [y.dtype for y in both] == [dtype or torch.int64] * 2


def lambda_module(function) -> nn.Module:
    class Lambda(nn.Module):
        def forward(self, x):
            return function(x)

    return Lambda().eval()


def test_ops_of_the_head_are_found():
    """A network that calls upsample_argmax itself: exported it is its reference, which is recognised again."""
    layers = nn.Conv2d(3, 5, 3, 4, 1)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = layers

        def forward(self, x):
            return ops.upsample_argmax(self.layers(x), x.shape[2:])

    images = torch.randn(1, 3, 32, 32)
    optimized = segfast.optimize(Model().eval())
    assert torch.equal(optimized(images), Model().eval()(images))
    assert optimized.explain().counts()["upsample_argmax"] == 1


def test_sizes():
    """The first size by itself, further ones by a graph of all sizes; each of them right."""
    model = randomised(nn.Sequential(ConvBNAct(3, 8, 3, 2), DSConv(8, 8), InvertedResidual(8, 8), ShuffleV2Unit(8, 8)))
    optimized = segfast.optimize(model)
    for size in [(1, 3, 32, 48), (1, 3, 33, 50), (1, 3, 64, 31), (5, 3, 32, 48), (2, 3, 40, 40), (0, 3, 32, 48), (1, 3, 1, 1)]:
        check(model, torch.randn(size), optimized)
        assert optimized.explain().reason == ""
    assert len(optimized._captures) < 7


def test_one_graph_and_its_weights_serve_further_sizes():
    optimized = segfast.optimize(randomised(nn.Sequential(DSConv(3, 8), nn.Upsample(scale_factor=2, mode="bilinear"))))
    packed = []
    for height in (32, 40, 48, 56):
        optimized(torch.randn(1, 3, height, 64))
        packed.append(len(optimized._weights.packed))
    assert len(optimized._captures) == 2
    assert packed[0] in (1, 2), "the block's weights, or those of its two halves"
    assert packed == packed[:1] * 4


def test_branches_on_sizes_are_guarded():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x):
            return self.a(x) if x.shape[3] % 2 else self.b(x) * (x.shape[2] // 3)

    model = Model().eval()
    optimized = segfast.optimize(model)
    for size in [(8, 8), (10, 8), (8, 9), (12, 11), (9, 20), (13, 13), (8, 8), (21, 21)]:
        images = torch.randn(1, 3, *size)
        with torch.no_grad():
            torch.testing.assert_close(optimized(images), model(images), rtol=1e-5, atol=1e-5)


def test_layouts_and_modes(small):
    images = torch.randn(2, 3, 32, 48)
    optimized = segfast.optimize(small)
    expected = optimized(images)
    for relaid in (
        images.contiguous(memory_format=torch.channels_last),
        images.transpose(2, 3).contiguous().transpose(2, 3),
        images.repeat_interleave(2, dim=3)[..., ::2],
        images.clone().requires_grad_(),
    ):
        torch.testing.assert_close(optimized(relaid), expected, rtol=1e-5, atol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(optimized(images), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(optimized(x=images), expected, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert optimized(images).dtype == torch.float32  # its dtype is its own


def test_input_and_weights_are_left_alone(small):
    images = torch.randn(1, 3, 32, 48)
    before, state = images.clone(), {name: value.clone() for name, value in small.state_dict().items()}
    optimized = segfast.optimize(small)
    first = optimized(images)
    assert torch.equal(optimized(images), first)
    assert torch.equal(images, before)
    assert all(torch.equal(value, state[name]) for name, value in small.state_dict().items())


def test_in_place_code_is_kept_right():
    """Overwriting is the graph's own business: the input, residuals and views are what they were."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x):
            y = self.conv(x)
            z = F.relu(y, inplace=True)
            z += x
            half = z[:, :2]
            half.mul_(2)
            return z, y, torch.cat([half, z[:, 2:]], 1), x.relu_() if False else x * 2

    torch.manual_seed(0)
    model, images = Model().eval(), torch.randn(2, 4, 6, 5)
    optimized = segfast.optimize(model)
    with torch.no_grad():
        for a, e in zip(optimized(images), model(images), strict=True):
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)
    assert optimized.explain().reason == ""


def test_structures():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x, scale: float = 1.0, *, more=None):
            y = self.conv(x) * scale
            return {"out": y, "all": [y + 1, (more if more is not None else x) - 1], "number": 3, "none": None}

    model, images = Model().eval(), torch.randn(1, 3, 8, 8)
    optimized = segfast.optimize(model)
    for args, kwargs in (((images,), {}), ((images, 2.0), {}), ((images,), {"more": images[:, :1]})):
        with torch.no_grad():
            expected, actual = model(*args, **kwargs), optimized(*args, **kwargs)
        assert list(actual) == list(expected)
        assert (actual["number"], actual["none"]) == (3, None)
        for a, e in zip(maps(actual), maps(expected), strict=True):
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        y = self.conv(x)
        if y.sum() > 0:
            return y
        return -y


def test_what_cannot_be_captured_runs_as_it_was():
    model, images = Branching().eval(), torch.randn(1, 3, 8, 8)
    for dtype in (torch.float32, torch.bfloat16):
        optimized = segfast.optimize(model, images, dtype=dtype)
        with torch.no_grad():
            assert torch.equal(optimized(images), copy.deepcopy(model).to(dtype)(images.to(dtype)))
        reason = str(optimized.explain())
        assert "runs as it was" in reason
        assert "if y.sum() > 0:" in reason
        assert "test_optimize.py" in reason


def test_counting_networks_run_as_they_were():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return x * self.calls

    model, images = Model().eval(), torch.ones(1, 3, 2, 2)
    optimized = segfast.optimize(model)
    assert [float(optimized(images).mean()) for _ in range(3)] == [1, 2, 3]
    assert "calls" in optimized.explain().reason


class Checked(nn.Module):
    def __init__(self, layers: nn.Module):
        super().__init__()
        self.layers = layers

    def forward(self, x):
        if min(x.shape[2:]) < 16:
            raise ValueError(f"want at least 16 pixels a side, got {tuple(x.shape)}")
        return self.layers(x)


def test_raises_where_eager_does():
    model = Checked(nn.Sequential(ConvBNAct(3, 4, 5, padding=0), nn.Conv2d(4, 4, 16), nn.Flatten(2))).eval()
    optimized = segfast.optimize(model, torch.randn(1, 3, 20, 20))
    for size in [
        (1, 3, 8, 20),
        (1, 3, 17, 17),
        (1, 4, 20, 20),
        (3, 20, 20),
        (1, 3, 20, 21),
        (1, 3, 15, 21),
        (1, 3, 18, 21),
        (1, 4, 20, 22),
    ]:
        images = torch.randn(size)
        try:
            with torch.no_grad():
                expected = model(images)
        except (ValueError, RuntimeError, IndexError) as refusal:
            with pytest.raises(type(refusal), match=re.escape(str(refusal))):
                optimized(images)
        else:
            torch.testing.assert_close(optimized(images), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="type"):
        optimized(torch.zeros(1, 3, 20, 20).double())
    assert len(optimized._captures) == 2


def test_refusals(small):
    with pytest.raises(TypeError, match=r"want an nn.Module, got OrderedDict"):
        segfast.optimize(small.state_dict())
    for wrong in ("512x1024", (1, 3, 64, 64), [], {}):
        with pytest.raises(TypeError, match=re.escape(f"tuple of inputs as the example, got {wrong!r}, without a tensor")):
            segfast.optimize(small, wrong)
    training = copy.deepcopy(small)
    training.inverted.train()
    with pytest.raises(ValueError, match=r"evaluation mode .*, got inverted.* in training mode"):
        segfast.optimize(training)
    with torch.device("meta"):
        empty = Small().eval()
    with pytest.raises(ValueError, match=r"want a network with its weights loaded, got stem.conv.weight without data"):
        segfast.optimize(empty)
    with pytest.raises(ValueError, match="without data"):
        segfast.optimize(nn.LazyConv2d(4, 3).eval())
    with pytest.raises(ValueError, match="want dtype"):
        segfast.optimize(small, dtype=torch.float16)
    with pytest.raises(ValueError, match="want class_dtype"):
        segfast.optimize(small, class_dtype=torch.int16)
    optimized = segfast.optimize(small)
    with pytest.raises(RuntimeError, match="want evaluation mode"):
        optimized.train()
    assert optimized.eval() is optimized
    many = nn.Sequential(nn.Conv2d(3, 300, 1), lambda_module(lambda x: x.argmax(1))).eval()
    with pytest.raises(ValueError, match="300 classes"):
        segfast.optimize(many, class_dtype=torch.uint8)(torch.randn(1, 3, 4, 4))


def test_copies(small):
    images = torch.randn(1, 3, 32, 48)
    optimized = segfast.optimize(Classes(small).eval(), images, class_dtype=torch.uint8)
    expected = optimized(images)
    file = io.BytesIO()
    torch.save(optimized, file)
    file.seek(0)
    for other in (copy.deepcopy(optimized), torch.load(file, weights_only=False)):
        assert torch.equal(other(images), expected)
        assert other.model is not optimized.model


def test_new_weights_are_packed_anew(small):
    images = torch.randn(1, 3, 32, 48)
    model = copy.deepcopy(small)
    optimized = segfast.optimize(model, images)
    other = randomised(Small())
    optimized.load_state_dict({f"model.{name}": value for name, value in other.state_dict().items()})
    check(other, images, optimized)
    with torch.no_grad():
        model.head.weight.zero_()
    optimized.repack()
    check(model, images, optimized)
    assert optimized.double()(images.double()).dtype == torch.float32


def test_export_holds_only_aten(small):
    images = torch.randn(1, 3, 32, 48)
    optimized = segfast.optimize(Classes(small).eval(), images)
    program = torch.export.export(optimized, (images,))
    assert {
        node.target.namespace for node in program.graph.nodes if node.op == "call_function" and hasattr(node.target, "namespace")
    } == {"aten"}
    assert torch.equal(program.module()(images), Classes(small)(images))


def in_threads(work, count: int) -> None:
    """work(i) for i in range(count), each in a thread of its own; whatever one of them raises fails the test."""
    failures = []

    def kept(i: int) -> None:
        try:
            work(i)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=kept, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]


def test_threads_share_one():
    """Called for the first time by four threads at a time, with sizes of their own."""
    model = randomised(nn.Sequential(ConvBNAct(3, 8), DSConv(8, 8), InvertedResidual(8, 8)))
    optimized = segfast.optimize(model)
    inputs = [torch.randn(1, 3, 16 + 2 * (i % 2), 24) for i in range(4)]
    with torch.no_grad():
        expected = [model(x) for x in inputs]

    def work(i: int) -> None:
        for _ in range(50):
            torch.testing.assert_close(optimized(inputs[i]), expected[i], rtol=1e-4, atol=1e-4)

    in_threads(work, 4)
    assert len(optimized._programs) == 2


class Loose(nn.Module):
    """Results that are maps, views of maps and maps that others are made of; a view that is read when its map no longer is."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (randomised(ConvBNAct(c, 32, 1)) for c in (3, 32, 32, 32))

    def forward(self, x):
        a = self.a(x)
        held = a.flatten(1)
        b = self.b(a)
        c = self.c(b)
        d = self.d(c) + c
        return {"map": b, "view": d.permute(0, 2, 3, 1)[:, 1:], "whole": d.view(-1), "held": held * 2}


def test_results_are_the_callers():
    """What a call gave does not change with the next one, and lies in no block."""
    torch.manual_seed(0)
    model = Loose().eval()
    optimized, images = segfast.optimize(model), [torch.randn(1, 3, 12, 16) for _ in range(3)]
    with torch.no_grad():
        expected = [model(x) for x in images]
    got = [optimized(x) for x in images]
    for have, want in zip(got, expected):
        for name in want:
            torch.testing.assert_close(have[name], want[name], rtol=1e-5, atol=1e-5)


def places(optimized) -> list[tuple[str, int, int, int, int]]:
    """(name, first byte, last byte, step that makes it, last step that reads it) of each map in the block."""
    program = next(reversed(optimized._programs.values()))
    plan = _memory.Plan(SimpleNamespace(outputs=[program.steps[-1][0].output]), program.steps)
    spans = []
    for op, (offset, size) in plan.places.items():
        if op in [step for step, *_ in program.steps]:  # a map inside a step
            continue
        born = next(n for n, (step, *_) in enumerate(program.steps) if step.output is op)
        read = max((n for n, (*_, inputs) in enumerate(program.steps) if op in inputs), default=born)
        spans.append((op.name, offset, offset + size, born, read))
    return spans


@pytest.mark.skipif(_memory.place_next is None, reason="needs the compiled kernels")
def test_maps_share_a_block(monkeypatch):
    """No two that are needed at a time overlap, the block is smaller than their sum, and the bits are those of maps apart."""
    torch.manual_seed(0)
    model, images = randomised(segfast.create_model("fast_scnn", 5, width=0.5)), torch.randn(1, 3, 64, 96)
    optimized = segfast.optimize(model, images)
    spans = places(optimized)
    assert len(spans) > 10
    for i, (_, start, end, born, read) in enumerate(spans):
        for _, other_start, other_end, other_born, other_read in spans[:i]:
            apart = end <= other_start or other_end <= start or read < other_born or other_read < born
            assert apart or ((start, end) == (other_start, other_end) and (read == other_born or other_read == born))
    assert 2 * max(end for _, _, end, *_ in spans) < sum(end - start for _, start, end, *_ in spans)
    monkeypatch.setattr(_memory, "LEAST", 1 << 40)
    apart = segfast.optimize(model, images)
    assert places(apart) == []
    assert torch.equal(apart(images), optimized(images))


class Residual(nn.Module):
    """x + conv(conv(x)), a BatchNorm and ReLU of that, and once more what nothing else may overwrite."""

    def __init__(self, channels: int, kernel_size: int):
        super().__init__()
        self.first = ConvBNAct(3, channels, 3)
        self.inner = ConvBNAct(channels, channels, kernel_size)
        self.outer = nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2)
        self.norm = nn.BatchNorm2d(channels)
        self.last = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        x = self.first(x)
        y = F.relu(self.norm(self.outer(self.inner(x)) + x))
        return self.last(y) + F.relu(self.outer(y) + y)


@pytest.mark.skipif(_memory.place_next is None, reason="needs the compiled kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("size", [(16, 24), (13, 27)])
def test_maps_are_written_over(kernel_set, kernel_size, size, dtype, monkeypatch):
    """A sum lies where the map lay that was added, if nobody reads that again; the bits are those of maps apart."""
    if kernel_set == "avx512" and dtype == torch.bfloat16:  # the kernels that this dtype takes where there are such
        _backend._C.set_kernel_set(_backend._C.cpu_features()["kernel_sets"][-1])
    torch.manual_seed(0)
    model, images = randomised(Residual(34, kernel_size)), torch.randn(2, 3, *size)
    optimized = segfast.optimize(model, images, dtype=dtype)
    program = next(iter(optimized._programs.values()))
    plan = _memory.Plan(SimpleNamespace(outputs=[program.steps[-1][0].output]), program.steps)
    over = [(step.output, _memory.written_over(step, how)) for step, how, *_ in program.steps]
    over = [(new, old) for new, old in over if old in plan.places]
    if dtype == torch.float32 or (kernel_size == 1 and kernel_set == "avx512"):  # others of bfloat16 may be oneDNN's
        assert any(plan.places[new] == plan.places[old] for new, old in over)
    monkeypatch.setattr(_memory, "LEAST", 1 << 40)
    apart = segfast.optimize(model, images, dtype=dtype)
    assert torch.equal(apart(images), optimized(images))
    check(model, images, optimized, dtype)


@pytest.mark.skipif(_memory.place_next is None, reason="needs the compiled kernels")
def test_a_failed_call_leaves_no_place():
    """What comes after in the thread allocates for itself, and the block is there for the next call."""
    model = randomised(nn.Sequential(ConvBNAct(3, 32, 1), ConvBNAct(32, 32, 1), nn.Conv2d(32, 2, 1)))
    images = torch.randn(1, 3, 16, 16)
    optimized = segfast.optimize(model, images)
    assert len(places(optimized)) == 2
    want = optimized(images)
    program = next(iter(optimized._programs.values()))
    namespace, blocks = program.run.__globals__, len(_memory._free)

    def fails(*_):
        raise RuntimeError("no")

    second, namespace["f1"] = namespace["f1"], fails
    with pytest.raises(RuntimeError, match="no"):
        optimized(images)
    namespace["f1"] = second
    assert len(_memory._free) == blocks
    block = _memory._free[-1]
    y = ops.channel_shuffle(torch.randn(1, 32, 16, 16), 2)  # as many bytes as the map that was not made
    assert not block.data_ptr() <= y.data_ptr() < block.data_ptr() + block.numel()
    assert torch.equal(optimized(images), want)


def resident() -> int:
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_a_thousand_calls_need_no_more_memory():
    model = randomised(nn.Sequential(ConvBNAct(3, 16, stride=2), InvertedResidual(16, 16), nn.Conv2d(16, 4, 1)))
    optimized, images = segfast.optimize(model), torch.randn(1, 3, 64, 64)
    for _ in range(100):
        optimized(images)
    gc.collect()
    before = resident()
    for _ in range(1000):
        optimized(images)
    gc.collect()
    assert resident() - before < 4 << 20  # one map of the middle layer kept a call would be 400 MB


def test_the_cache_is_bounded():
    optimized = segfast.optimize(nn.Conv2d(3, 4, 1).eval())
    for width in range(2, 60):
        optimized(torch.randn(1, 3, 4, width))
    assert len(optimized._programs) <= 32
    assert len(optimized._captures) <= 8


class Drawn(nn.Module):
    """A row of layers; a map is resized, split, joined and summed in between."""

    def __init__(self, kinds: list[tuple], channels: int):
        super().__init__()
        self.kinds = kinds
        c, h = channels, channels // 2
        made = {
            "conv": lambda k, s: nn.Conv2d(c, c, k, s, k // 2),
            "same": lambda k, s: nn.Conv2d(c, c, k, padding="same", bias=False),
            "grouped": lambda k, s: nn.Conv2d(c, c, k, 1, k // 2, groups=2),
            "depthwise": lambda k, s: nn.Conv2d(c, c, k, s, k // 2, groups=c, bias=False),
            "pointwise": lambda k, s: nn.Conv2d(c, c, 1, bias=k == 3),
            "transposed": lambda k, s: nn.ConvTranspose2d(c, c, k, s, k // 2, s - 1, groups=s),
            "half": lambda k, s: nn.Conv2d(h, h, 1),
            "bn": lambda k, s: nn.BatchNorm2d(c, affine=k == 3),
            "group_norm": lambda k, s: nn.GroupNorm(2, c),
            "prelu": lambda k, s: nn.PReLU(c),
        }
        self.layers = nn.ModuleList(made[kind](k, s) if kind in made else nn.Identity() for kind, k, s in kinds)

    def forward(self, x):
        kept = x
        for (kind, k, s), layer in zip(self.kinds, self.layers):
            if kind in ACTS:
                x = ACTS[kind](x)
            elif kind == "keep":
                kept = x
            elif kind == "add":
                x = x + kept if x.shape == kept.shape else x
            elif kind == "add_":
                x = torch.mul(x, 1.5)
                x += kept if x.shape == kept.shape else x
            elif kind == "gate":
                x = x * x.mean((2, 3), keepdim=True).sigmoid()
            elif kind == "pool":
                x = F.max_pool2d(x, k, s, k // 2)
            elif kind == "grid":
                x = x + F.interpolate(F.adaptive_avg_pool2d(x, s), x.shape[2:], mode="bilinear", align_corners=k == 3)
            elif kind == "resize":
                x = F.interpolate(x, scale_factor=s, mode="bilinear" if k == 3 else "nearest")
            elif kind == "half":
                a, b = x.chunk(2, 1)
                x = ops.concat_shuffle([a, layer(b)], 2)
            elif kind == "shuffle":
                x = ops.channel_shuffle(x, 2)
            elif kind == "flip":
                x = x.flip(3)
            else:
                x = layer(x)
        return x, kept


ACTS = {
    "relu": F.relu, "relu_": lambda x: F.relu(x * 1.0, inplace=True), "relu6": F.relu6, "silu": F.silu, "elu": F.elu,
    "hardswish": F.hardswish, "leaky": lambda x: F.leaky_relu(x, 0.2), "gelu": F.gelu, "sigmoid": torch.sigmoid,
    "leaky_relu": F.leaky_relu, "clamp": lambda x: x.clamp(-1, 2),
}  # fmt: skip
KINDS = [
    "conv", "same", "grouped", "depthwise", "depthwise", "pointwise", "pointwise", "transposed", "half", "bn", "bn", "bn",
    "group_norm", "prelu", "keep", "add", "add", "add_", "gate", "pool", "grid", "resize", "shuffle", "flip", *ACTS,
]  # fmt: skip


@settings(max_examples=count(30, 500), deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
@given(
    kinds=st.lists(st.tuples(st.sampled_from(KINDS), st.sampled_from([1, 3]), st.sampled_from([1, 2])), min_size=1, max_size=14),
    channels=st.sampled_from([2, 6, 16]),
    size=st.tuples(st.integers(1, 3), st.integers(4, 12), st.integers(4, 12)),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16]),
)
def test_random_networks(kinds, channels, size, seed, dtype):
    torch.manual_seed(seed)
    model = randomised(Drawn(kinds, channels))
    optimized = check(model, torch.randn(size[0], channels, *size[1:]), dtype=dtype)
    assert optimized.explain().reason == ""


@pytest.mark.parametrize("first", sorted({*KINDS}))
def test_neighbours(first):
    """Layers that follow one another: a kernel may take both."""
    kinds = some(sorted({*KINDS}), 3, sorted({*KINDS}).index(first))
    for index, second in enumerate(kinds):
        torch.manual_seed(index)
        for channels, size, stride in [(20, 3, 1), (6, 3, 2)]:
            model = randomised(Drawn([(first, size, stride), (second, size, stride)], channels))
            check(model, torch.randn(1, channels, 7, 9))


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Upsample(scale_factor=2), nn.ConvTranspose2d(20, 20, 3, padding=1)],
        [nn.ConvTranspose2d(8, 8, 3, 2, 1), nn.MaxPool2d(2)],
        [nn.ConvTranspose2d(8, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 4, 1)],
    ],
    ids=["upsample", "max_pool", "separable"],
)
def test_a_transposed_convolution_is_not_taken_for_a_plain_one(layers):
    torch.manual_seed(0)
    check(
        randomised(nn.Sequential(*layers)),
        torch.randn(1, layers[0].in_channels if hasattr(layers[0], "in_channels") else 20, 9, 12),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_transposed_convolutions_that_onednn_refuses(dtype):
    """Their output_padding is as large as the stride, which a dilation allows."""
    torch.manual_seed(0)
    for options in ({}, {"groups": 2}):
        layer = nn.ConvTranspose2d(4, 4, 2, 1, dilation=2, output_padding=1, **options)
        check(nn.Sequential(layer, nn.GELU()).eval(), torch.randn(1, 4, 5, 5), dtype=dtype)
        check(nn.Sequential(layer).eval(), torch.randn(1, 4, 5, 5), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("act", ["relu", "relu6", "silu", "hardswish", "gelu", "sigmoid", "leaky_relu", "clamp"])
def test_nan_and_infinities_are_kept(act, dtype):
    """Whoever runs the convolution: dense, grouped, depthwise, transposed, with a sum or without."""
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(12, 12, 3, 2, 1), nn.Conv2d(12, 12, 1), nn.Conv2d(12, 12, 3, padding=1, groups=3),
        nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.ConvTranspose2d(12, 12, 3, 2, 1),
        nn.ConvTranspose2d(12, 12, 3, 2, 1, groups=2),
    ]  # fmt: skip

    class One(nn.Module):
        def __init__(self, layer, add):
            super().__init__()
            self.layer, self.add = layer, add

        def forward(self, x, more):
            y = self.layer(x)
            return ACTS[act](y + more if self.add else y)

    x = torch.randn(1, 12, 13, 16)
    x[0, 3, 4, 4] = math.nan
    if act != "gelu":  # PyTorch's own of an infinity hangs on the layout
        x[0, 5, 9, 1], x[0, 7, 1, 12] = math.inf, -math.inf
    for layer in layers:
        for add in (False, True):
            model = One(layer, add).eval()
            more = torch.zeros_like(layer(x)).detach()
            with torch.no_grad():
                want = copy.deepcopy(model).to(dtype)(x.to(dtype), more.to(dtype))
                got = segfast.optimize(model, dtype=dtype)(x, more)
            assert torch.equal(got.isnan(), want.isnan()), layer
            assert torch.equal(got.isinf(), want.isinf()), layer


@pytest.mark.skipif(_memory.place_next is None, reason="no kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_convolution_and_the_classes_of_its_result(dtype):
    torch.manual_seed(0)

    class Classes(nn.Module):
        def __init__(self, twice):
            super().__init__()
            self.last, self.twice = nn.ConvTranspose2d(6, 5, 2, 2), twice

        def forward(self, x):
            y = self.last(x)
            return (y.argmax(1), y) if self.twice else y.argmax(1)

    for twice, kind in ((False, "conv_transpose+argmax"), (True, "conv_transpose")):
        optimized = check(Classes(twice).eval(), torch.randn(2, 6, 9, 13), dtype=dtype)
        assert kind in optimized.explain().counts()
        small = segfast.optimize(Classes(twice).eval(), dtype=dtype, class_dtype=torch.uint8)
        classes = maps(small(torch.randn(1, 6, 5, 4)))[0]
        assert classes.dtype == torch.uint8
        assert classes.shape == (1, 10, 8)


@pytest.mark.skipif(_memory.place_next is None, reason="no kernels")
@pytest.mark.parametrize(
    ("channels", "between", "twice", "kind"),
    [
        (3, 32, False, "conv+bn+relu+ds_conv"),
        (3, 24, False, "ds_conv"),  # no whole vectors between
        (20, 32, False, "ds_conv"),  # many inputs
        (3, 32, True, "ds_conv"),  # read twice
    ],
)
def test_a_first_convolution_and_the_block_behind_it(channels, between, twice, kind):
    torch.manual_seed(0)

    class Start(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.block = ConvBNAct(channels, between, 3, 2), DSConv(between, 20, 2)

        def forward(self, x):
            y = self.first(x)
            return (self.block(y), y) if twice else self.block(y)

    model = randomised(Start())
    optimized = check(model, torch.randn(2, channels, 23, 31))
    check(model, torch.randn(1, channels, 40, 17), optimized)
    assert kind in optimized.explain().counts()
    check(model, torch.randn(2, channels, 23, 31), dtype=torch.bfloat16)


@pytest.mark.skipif(_memory.place_next is None, reason="no kernels")
@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, "resize+conv"),
        ({"bn": True}, "resize+conv+bn"),
        ({"factor": 1.25}, "conv"),  # hardly fewer pixels
        ({"outputs": 24}, "conv"),  # more channels to interpolate
        ({"act": True}, "conv+relu"),
        ({"twice": True}, "conv"),
    ],
)
def test_interpolation_and_a_convolution_change_places(options, kind):
    options = {"factor": 2, "outputs": 5, "bn": False, "act": False, "twice": False} | options
    torch.manual_seed(0)

    class Enlarged(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = ConvBNAct(3, 12), nn.Conv2d(12, options["outputs"], 1)
            self.norm = nn.BatchNorm2d(options["outputs"]) if options["bn"] else nn.Identity()

        def forward(self, x):
            y = F.interpolate(self.first(x), scale_factor=options["factor"], mode="bilinear")
            z = self.norm(self.last(y))
            z = z.relu() if options["act"] else z
            return (z, y) if options["twice"] else F.max_pool2d(z, 2)

    model = randomised(Enlarged())
    for dtype in (torch.float32, torch.bfloat16):
        optimized = check(model, torch.randn(2, 3, 12, 20), dtype=dtype)
        check(model, torch.randn(1, 3, 24, 8), optimized, dtype)
        assert kind in optimized.explain().counts()
    plan, steps = planned(segfast.optimize(model, torch.randn(2, 3, 12, 20)))
    inside = [step for step in plan.places if step in steps]
    assert bool(inside) == kind.startswith("resize")  # the map between the two has a place
    for step in inside:
        (start, length), (other, size) = plan.places[step], plan.places[step.output]
        assert length == 2 * 5 * 12 * 20 * 4
        assert start + length <= other or other + size <= start


def planned(optimized):
    program = next(iter(optimized._programs.values()))
    steps = [step for step, *_ in program.steps]
    return _memory.Plan(SimpleNamespace(outputs=[steps[-1].output]), program.steps), steps


@pytest.mark.skipif(_memory.place_next is None, reason="no kernels")
@pytest.mark.parametrize("size", [(96, 128), (24, 32)])
def test_maps_lie_where_a_large_result_will(size):
    """Logits of the image's size hold the earlier maps until they are written; the block is then the caller's alone."""
    torch.manual_seed(0)

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(ConvBNAct(3, 16, 3, 2), ConvBNAct(16, 16), conv(16, 5))

        def forward(self, x):
            return F.interpolate(self.body(x), size, mode="bilinear")

    model, images = randomised(Logits()), torch.randn(2, 3, 24, 32)
    optimized = check(model, images)
    program = next(iter(optimized._programs.values()))
    plan = _memory.Plan(SimpleNamespace(outputs=[program.steps[-1][0].output]), program.steps)
    assert plan.handed_out == (size == (96, 128))
    first = optimized(images)
    kept = first.clone()
    second = optimized(images * 2)
    assert torch.equal(first, kept)
    assert not torch.equal(first, second)
    assert not first._is_view()
    assert first.is_contiguous()
    assert first.untyped_storage().nbytes() <= first.nbytes * 9 / 8
    first.add_(1)
    assert torch.equal(optimized(images), kept)


def test_the_larger_branch_runs_first():
    """What it leaves is small, and the other's result does not wait beside its maps."""
    torch.manual_seed(0)

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.small = nn.Sequential(nn.Conv2d(3, 32, 4, 4), nn.ReLU(), conv(32, 32), nn.ReLU())
            self.large = nn.Sequential(conv(3, 24), nn.ReLU(), nn.Conv2d(24, 32, 4, 4))

        def forward(self, x):
            small = self.small(x)
            return small + torch.tanh(small) * self.large(x)

    model = randomised(Branches())
    optimized = check(model, torch.randn(1, 3, 32, 48))
    kinds = [step.output.shape for step, *_ in next(iter(optimized._programs.values())).steps]
    assert kinds.index((1, 24, 32, 48)) == 0
    noisy = nn.Sequential(model, Noise()).eval()
    kinds = [
        step.output.shape for step, *_ in next(iter(segfast.optimize(noisy, torch.randn(1, 3, 32, 48))._programs.values())).steps
    ]
    assert kinds.index((1, 24, 32, 48)) > 0


class Noise(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.5, True)


def test_group_norm_is_as_exact_as_on_contiguous_maps():
    """PyTorch's of a channels_last map loses the digits that mean and deviation have not in common."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.GroupNorm(8, 32), nn.ReLU(), nn.Conv2d(32, 5, 1)).eval()
    with torch.no_grad():
        model[0].bias.fill_(20.0)
        images = torch.randn(2, 3, 24, 31)
        exact = copy.deepcopy(model).double()(images.double())
        assert rms(segfast.optimize(model)(images), exact) <= 2 * rms(model(images), exact)


class Made(nn.Module):
    """A network of a function of itself and its inputs, and of parts."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if type(part) is torch.Tensor:
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *args):
        return self.function(self, *args)


def conv(inputs: int, outputs: int, size: int = 3, **options) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **options)


def same_twice(model: nn.Module, *inputs) -> None:
    """The optimised network gives eager's results, at the first call and the second, on one thread and two."""
    model.eval()
    optimized = segfast.optimize(model)
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        with torch.no_grad():
            want, got = maps(model(*inputs)), maps(optimized(*inputs))
        for w, g in zip(want, got, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "view",
    [
        lambda t: F.interpolate(t, size=t.shape[2:], mode="bilinear"),
        lambda t: t.flatten(2).transpose(1, 2).transpose(1, 2).reshape(t.shape),
        lambda t: t.permute(0, 2, 3, 1).permute(0, 3, 1, 2),
        lambda t: t.chunk(1, 1)[0],
        lambda t: t.expand(t.shape),
    ],
)
@pytest.mark.parametrize("size", [1, 3])
def test_a_map_that_a_view_reads_is_not_written_over(view, size):
    torch.manual_seed(0)

    def forward(self, x):
        skip = F.relu(self.a(x))
        return self.z(self.b(view(skip)) + skip)

    same_twice(Made(forward, a=conv(3, 64), b=conv(64, 64, size), z=conv(64, 8, 1)), torch.randn(2, 3, 14, 18))


@pytest.mark.parametrize("view", ["ravel", "mH", "adjoint", "swapdims", "moveaxis", "unfold", "reshape_as"])
@pytest.mark.parametrize("before", [False, True])
def test_in_place_through_any_view(view, before):
    def viewed(a):
        options = {"swapdims": (1, 2), "moveaxis": (1, 3), "unfold": (2, 2, 2), "reshape_as": (a,)}
        return a.mH if view == "mH" else getattr(a, view)(*options.get(view, ()))

    def forward(self, x):
        a = self.a(x)
        if before:
            b = viewed(a)
            a.relu_()
            return b * 1.0
        viewed(a).mul_(2.0)
        return a * 1.0

    same_twice(Made(forward, a=conv(8, 8)), torch.randn(2, 8, 12, 16))


def test_weights_of_one_name_that_differ():
    """Weights made from the size; one convolution's weights under two BatchNorms, or with other groups."""
    model = Made(lambda self, x: F.conv2d(x, torch.tensor([[[[float(x.shape[-1])]]]])))
    optimized = segfast.optimize(model.eval())
    assert [float(optimized(torch.ones(1, 1, 3, width)).max()) for width in (4, 5, 6)] == [4, 5, 6]
    w, g = nn.Parameter(torch.randn(8, 8, 1, 1)), nn.Parameter(torch.rand(8))
    norm = lambda self, x, **more: F.batch_norm(F.conv2d(x, self.w), self.m, self.v, **more)  # noqa: E731
    parts = {"w": w, "m": torch.randn(8), "v": torch.rand(8)}
    x = torch.randn(2, 8, 12, 16)
    same_twice(Made(lambda self, x: norm(self, x, eps=1e-5) + norm(self, x, eps=1.0), **parts), x)
    same_twice(Made(lambda self, x: norm(self, x, weight=self.g) - norm(self, x, bias=self.g), g=g, **parts), x)
    w = nn.Parameter(torch.randn(8, 4, 3, 3))
    up = lambda self, x, groups: F.conv_transpose2d(x, self.w, groups=groups, padding=1)[:, :4]  # noqa: E731
    same_twice(Made(lambda self, x: up(self, x, 1) + up(self, x, 2), w=w), x)


def test_nothing_of_the_callers_or_the_networks_is_handed_out_or_changed():
    x = torch.randn(2, 3, 5, 6)
    model = Made(
        lambda self, x: (x.clone(), torch.zeros(2), self.b.clone(), F.relu(x * 2), F.relu(x * 2).clone()), b=torch.ones(3)
    )
    optimized = segfast.optimize(model.eval())
    for _ in range(2):
        got = optimized(x)
        want = model(x)
        for g, w in zip(got, want):
            assert torch.equal(g, w)
            g.add_(5)
        assert len({g.data_ptr() for g in (*got, x, model.b)}) == len(got) + 2
    for dtype in (torch.float64, torch.float16, torch.int64):
        y = (3 * torch.randn(1, 3, 4, 4)).to(dtype)
        before = y.clone()
        segfast.optimize(Made(lambda self, x: F.relu(torch.cat([x], 1))).eval())(y)
        assert torch.equal(y, before)


def test_dropout_that_is_meant_drops():
    x = torch.ones(2, 3, 16, 16)
    assert not segfast.optimize(Made(lambda self, x: F.dropout(x, 1.0, training=True)).eval())(x).any()
    dropped = segfast.optimize(Made(lambda self, x: F.dropout(x, 0.5)).eval())(x) == 0
    assert 0.3 < dropped.float().mean() < 0.7


def test_argmax_of_infinities():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 9, 11)
    x[torch.rand(x.shape) < 0.3] = -float("inf")
    x[torch.rand(x.shape) < 0.1] = float("inf")
    x[0, 1, 4, 4] = float("nan")
    assert torch.equal(segfast.optimize(Made(lambda self, x: x.argmax(1)).eval())(x), x.argmax(1))
    assert torch.equal(segfast.optimize(Made(lambda self, x: (9 * x).int().argmax(1)).eval())(x), (9 * x).int().argmax(1))


@pytest.mark.parametrize(
    "function", [lambda self, x: x.argmax(1, keepdim=True), lambda self, x: x.max(1)[1], lambda self, x: x.topk(1, 1)[1]]
)
def test_class_dtype_that_is_too_small(function):
    x = torch.zeros(1, 300, 4, 4)
    x[:, 288, 1] = 1
    optimized = segfast.optimize(Made(function).eval(), class_dtype=torch.uint8)
    with pytest.raises(ValueError, match="class_dtype"):
        optimized(x)
    assert optimized(x[:, :200]).dtype == torch.uint8


def test_weights_that_a_parent_loads():
    model = randomised(nn.Sequential(conv(3, 8), nn.ReLU()))
    optimized, x = segfast.optimize(model), torch.randn(1, 3, 9, 9)
    optimized(x)
    parent = nn.Sequential(optimized)
    parent.load_state_dict({name: value + 1 for name, value in parent.state_dict().items()})
    torch.testing.assert_close(parent(x), model(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="nobody"):
        optimized.load_state_dict({name: value + 1 for name, value in optimized.state_dict().items()} | {"nobody": x})
    torch.testing.assert_close(optimized(x), model(x), rtol=1e-4, atol=1e-4)


def test_what_runs_as_it_is():
    """Maps of three or five axes, networks that cannot be copied, arguments that tell nothing, empty clamps, views as bytes."""
    x = torch.randn(2, 8, 12, 16)
    same_twice(Made(lambda self, x: F.max_pool2d(x, 2)), x[0])
    for y in (x[0], x[..., None]):
        same_twice(Made(lambda self, y: F.channel_shuffle(y, 2)), y)
    same_twice(Made(lambda self, x: self.a(x).clamp(1, -1), a=conv(8, 8)), x)
    same_twice(Made(lambda self, x: self.a(x).contiguous().view(torch.uint8).float(), a=conv(8, 8)), x)
    locked = Made(lambda self, x: self.a(x), a=conv(8, 8))
    locked.lock = threading.Lock()
    same_twice(locked, x)
    same_twice(nn.Sequential(nn.utils.weight_norm(conv(8, 8))), x)
    optimized = segfast.optimize(Made(lambda self, x, more: x * sum(more)).eval())
    assert torch.equal(optimized(x, {1, 2}), 3 * x)
    optimized = segfast.optimize(Made(lambda self, x, sign: x * math.copysign(1.0, sign)).eval())
    assert torch.equal(optimized(x, 0.0), x)
    assert torch.equal(optimized(x, -0.0), -x)
    assert segfast.optimize(Made(lambda self: torch.ones(2)).eval(), ()).explain() is not None


class Decoder(nn.Module):
    """What DeepLabV3+ ends in: an enlarged map beside another, a separable block, the class scores."""

    def __init__(self, first=True, align_corners=True, act=None, scores=5, factor=4, twice=False):
        super().__init__()
        self.first, self.align_corners, self.factor, self.twice = first, align_corners, factor, twice
        self.low, self.high = conv(3, 12), conv(3, 20, stride=factor)
        separable = [nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.BatchNorm2d(32), act or nn.Identity(), nn.Conv2d(32, 48, 1)]
        self.block = nn.Sequential(*separable, nn.BatchNorm2d(48), nn.ReLU())
        self.scores = nn.Conv2d(48, scores, 1)

    def forward(self, x):
        low, high = self.low(x).relu(), self.high(x).relu()
        high = F.interpolate(high, low.shape[2:], mode="bilinear", align_corners=self.align_corners)
        y = self.block(torch.cat([high, low] if self.first else [low, high], 1))
        return (self.scores(y), y) if self.twice else self.scores(y)


@pytest.mark.drawn(1 / 2)
@pytest.mark.skipif(_memory.place_next is None, reason="no kernels")
@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, "resize+cat+ds_conv+conv"),
        ({"first": False}, "resize+cat+ds_conv+conv"),
        ({"align_corners": False, "factor": 5}, "resize+cat+ds_conv+conv"),
        ({"scores": 70}, "resize+cat+ds_conv"),
        ({"twice": True}, "resize+cat+ds_conv"),
        ({"act": nn.ReLU()}, "ds_conv+conv"),  # between the two convolutions
        ({"factor": 2}, "ds_conv+conv"),  # nine products of a quarter of the pixels
        ({"factor": 2, "twice": True}, "ds_conv"),
    ],
)
def test_chains(options, kind):
    torch.manual_seed(0)
    model = randomised(Decoder(**options))
    optimized = check(model, torch.randn(2, 3, 24, 40))
    check(model, torch.randn(1, 3, 45, 61), optimized)  # packed for another size
    kinds = optimized.explain().counts()
    assert kinds.get(kind) == 1, kinds
    assert sum("ds_conv" in k for k in kinds) == 1
    check(model, torch.randn(2, 3, 24, 40), dtype=torch.bfloat16)


def test_meta_tensors_run_as_they_were():
    model = nn.Sequential(conv(3, 4), nn.ReLU()).eval()
    assert segfast.optimize(model)(torch.randn(1, 3, 8, 8, device="meta")).shape == (1, 4, 8, 8)


@torch.no_grad()
@pytest.mark.parametrize(("inputs", "size"), [(1024, 1), (1536, 1), (2048, 1), (4096, 1), (768, 3), (1024, 3), (2048, 3)])
def test_deep_sums_are_as_exact_as_eagers(inputs, size):
    torch.manual_seed(0)
    model = nn.Sequential(conv(inputs, 64, size, bias=False)).eval()
    x = torch.rand(1, inputs, 8, 9)
    exact = copy.deepcopy(model).double()(x.double())
    eager = max(rms(model(y), exact) for y in (x, x.contiguous(memory_format=torch.channels_last)))
    assert rms(segfast.optimize(model)(x), exact) <= 2 * eager
