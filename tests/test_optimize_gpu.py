"""segfast.optimize's plan for a GPU, without one: the steps that it chooses there run on CPU tensors, and a stand-in of CUDA
graphs records their operations and runs them again, on the tensors of the capture alone, as a replay does."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
from test_optimize import Made, conv, in_threads, randomised
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import segfast
from segfast import _backend
from segfast.nn import DSConv, InvertedResidual, ShuffleV2Unit
from segfast.optimize import _module, _replay


class Recorder(TorchDispatchMode):
    """Operations with the tensors that they read and gave; none may hand a value to Python, which would await the device."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result


class Graph:
    def __init__(self):
        self.recorder = Recorder()

    def replay(self):
        with torch.no_grad():
            for function, args, kwargs, result in self.recorder.calls:
                again = function(*args, **kwargs)
                tree_map(lambda old, new: old.copy_(new) if isinstance(old, torch.Tensor) else old, result, again)


@pytest.fixture
def gpu(monkeypatch):
    """Everything on "the GPU", which is the CPU; a list of the waits between streams."""
    order = []
    side = SimpleNamespace(wait_stream=lambda other: order.append("stream"))
    stream = SimpleNamespace(wait_stream=lambda other: order.append("stream"), wait_event=lambda event: order.append("event"))
    now = [stream]  # as PyTorch's, the stream stays another's where a capture fails

    @contextlib.contextmanager
    def capture(graph, stream, capture_error_mode):
        assert stream is side
        now[0] = side
        with graph.recorder:
            yield
        now[0] = before

    before = stream
    nothing = lambda *args, **kwargs: contextlib.nullcontext()  # noqa: E731
    monkeypatch.setattr(torch.cuda, "device", nothing)
    monkeypatch.setattr(torch.cuda, "stream", nothing)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "set_stream", lambda other: now.__setitem__(0, other))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: "capturing" in order)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: order.append("wait"))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    done = SimpleNamespace(record=lambda: order.append("record"), synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", lambda: done)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(_module, "place", lambda values: "cuda")
    owners = {} if _backend._C is None else {"cpu": "c++", "cuda": "triton"}  # on CPU tensors Triton's ops are the CPU's kernels
    for op in ("ds_conv", "channel_shuffle", "concat_shuffle", "upsample_argmax"):
        monkeypatch.setitem(_backend.table, op, owners)
    return order


class Segmenter(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(conv(3, 8, 3, bias=False, stride=2), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(DSConv(8, 16, 2), InvertedResidual(16, 16), ShuffleV2Unit(16, 16), nn.MaxPool2d(3, 1, 1))
        self.head = nn.Conv2d(16, 5, 1)

    def forward(self, x):
        y = self.head(self.body(self.stem(x)))
        return nn.functional.interpolate(y, x.shape[2:], mode="bilinear", align_corners=False).argmax(1)


def test_steps_of_a_gpu_and_their_replay(gpu):
    torch.manual_seed(0)
    model = randomised(Segmenter())
    optimized = segfast.optimize(model, class_dtype=torch.uint8)
    images = [torch.randn(2, 3, 33, 47) for _ in range(3)]
    results = [optimized(x) for x in images]
    assert gpu[:3] == ["stream", "stream", "record"]  # warm and capture, then calls one after the other
    assert gpu[3:] == ["event", "record"] * 3
    with torch.no_grad():
        for x, y in zip(images, results, strict=True):  # the first result is not overwritten by the later replays
            assert y.dtype == torch.uint8
            assert (y == model(x)).float().mean() > 0.995
    explanation = optimized.explain()
    assert explanation.note == "one CUDA graph"
    assert "steps (one CUDA graph)" in str(explanation)
    hows = {how for line in explanation.lines for how in line.how.split(", ")}
    if _backend._C is not None:
        assert {"segfast::ds_conv", "segfast::concat_shuffle", "segfast::upsample_argmax"} <= hows
    assert not any("oneDNN" in how or "packed" in how or "max_pool" in how or "resize" in how for how in hows)
    assert optimized.profile(images[0], runs=1)
    assert gpu[-1] == "wait"


def test_the_class_map_of_logits_awaits_nothing(gpu):
    """On the CPU this asks whether any value is infinite."""
    model = Made(lambda self, x: self.a(x).argmax(1), a=conv(3, 4)).eval()
    optimized, x = segfast.optimize(model), torch.randn(1, 3, 9, 9)
    assert torch.equal(optimized(x), model(x))
    assert optimized.explain().note == "one CUDA graph"


def test_what_waits_for_the_device_is_not_replayed(gpu):
    model = Made(lambda self, x: (self.a(x) > 0).long() * 300, a=conv(3, 4)).eval()
    optimized, x = segfast.optimize(model, class_dtype=torch.int32), torch.randn(1, 3, 9, 9)
    for _ in range(2):  # narrowing asks for the largest value
        assert torch.equal(optimized(x), model(x).int())
    assert optimized.explain().note.startswith("not one CUDA graph: aten._local_scalar_dense.default needs values")
    assert "record" not in gpu  # found out before the capture, which PyTorch would not recover from
    small = segfast.optimize(model, class_dtype=torch.uint8)
    with pytest.raises(ValueError, match="want a class_dtype that holds results from 0 to 300"):
        small(x + 10)


def test_a_capture_that_fails_leaves_the_callers_stream(gpu, monkeypatch):
    monkeypatch.setattr(_replay, "NothingWaits", contextlib.nullcontext)
    model = Made(lambda self, x: (self.a(x) > 0).long(), a=conv(3, 4)).eval()
    optimized, x, stream = segfast.optimize(model, class_dtype=torch.int32), torch.randn(1, 3, 9, 9), torch.cuda.current_stream()
    assert torch.equal(optimized(x), model(x).int())
    assert optimized.explain().note == "not one CUDA graph: operation not permitted when stream is capturing"
    assert torch.cuda.current_stream() is stream


def test_inside_a_capture_of_the_callers(gpu):
    model = randomised(Made(lambda self, x: self.a(x), a=conv(3, 4)))
    optimized, x = segfast.optimize(model), torch.randn(1, 3, 9, 9)
    optimized(x)
    gpu.append("capturing")
    calls = len(gpu)
    torch.testing.assert_close(optimized(x), model(x), rtol=1e-5, atol=1e-5)
    assert len(gpu) == calls  # no replay inside
    assert optimized.explain(torch.randn(1, 3, 12, 9)).note == "not one CUDA graph: the caller is capturing"


def test_several_results_modes_and_threads(gpu):
    model = randomised(Made(lambda self, x: {"a": self.a(x), "b": [x, self.a(x)], "c": 3}, a=conv(3, 4)))
    optimized = segfast.optimize(model)
    first = torch.randn(1, 3, 9, 9)
    with torch.inference_mode():
        optimized(first)  # what the capture keeps must serve outside of inference mode too
    x = torch.randn(1, 3, 9, 9)
    result = optimized(x)
    result["b"][0].zero_()  # is the caller's own
    assert result["c"] == 3
    expected = model(x)
    torch.testing.assert_close(result["a"], expected["a"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(optimized(x)["b"][0], x)

    def call(seed):
        x = torch.randn(1, 3, 9, 9, generator=torch.Generator().manual_seed(seed))
        for _ in range(20):
            assert torch.allclose(optimized(x)["a"], model(x)["a"], atol=1e-5)

    in_threads(call, 4)


def test_bounded_where_each_size_holds_its_maps(gpu):
    optimized = segfast.optimize(Made(lambda self, x: self.a(x), a=conv(3, 4)).eval())
    for n in range(1, 13):
        optimized(torch.randn(1, 3, 8 + n, 9))
    assert len(optimized._programs) == _module.MAX_REPLAYS


def test_on_several_devices_runs_as_it_was():
    x = torch.randn(1, 3, 9, 9)
    with pytest.raises(_module.NotCaptured, match="on cpu and meta: want all of it on the CPU or on one GPU"):
        _module.place([x, x.to("meta"), 3])
    with pytest.raises(_module.NotCaptured, match="on meta"):
        _module.place([x.to("meta")])
    assert _module.place([x, 3]) == "cpu"
    assert _module.place([]) == "cpu"
