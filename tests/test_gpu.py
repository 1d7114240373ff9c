"""On a GPU: every op under the rules that hold on the CPU, and inside a captured CUDA graph. Skipped without one."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from descriptors import build
from gpu import captured
from harness import DTYPES, OPS, as_dtype, check_rule, evaluate, relaid, same_bits
from torch.utils._pytree import tree_map

import segfast
from segfast import _backend, ops, testing

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")]
every_op = pytest.mark.parametrize("op", OPS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
# A teacher that wants a gradient gets its reference.
DIFFERENTIABLE = {"pixelwise_kl": [0], "overhaul_loss": [0], "upsample_pixelwise_kl": [0]}


def block(training: bool, dtype: torch.dtype, **changes) -> testing.Sample:
    descriptor = {
        "size": [2, 19, 33, 31], "out_channels": 35, "kernel": 3, "stride": 1, "padding": None, "dilation": 1, "dw_act": "relu",
        "act": "relu", "dw_bn": True, "pw_bn": True, "bias": False, "training": training, "dtype": "float32", "seed": 1,
        "layout": "channels_last",
    }  # fmt: skip
    sample = build("ds_conv", descriptor | changes)
    return sample if dtype == torch.float32 else as_dtype(sample, dtype)


def samples(op: str, dtype: torch.dtype) -> list[testing.Sample]:
    cpu = torch.device("cpu")
    found = list(testing.SAMPLES[op](dtype, cpu)) if op in testing.SAMPLES else []
    if op == "ds_conv":
        found += [block(training, dtype, stride=stride) for training in (False, True) for stride in (1, 2)]
        found += [block(training, dtype, size=[1, 129, 16, 16], out_channels=257) for training in (False, True)]
    move = lambda x: x.to("cuda") if isinstance(x, torch.Tensor) else x  # noqa: E731
    return [testing.Sample(s.name, tree_map(move, s.args), tree_map(move, s.kwargs)) for s in found]


@pytest.fixture(autouse=True)
def full_precision():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@every_op
def test_a_kernel_serves(op):
    assert "cuda" in _backend.table[op]


@every_op
@every_dtype
def test_rule(op, dtype):
    for sample in samples(op, dtype):
        check_rule(op, sample, DIFFERENTIABLE.get(op))
        check_rule(op, sample, [])


@every_op
@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts(op, layout):
    for sample in samples(op, torch.float32)[:3]:
        check_rule(op, relaid(sample, layout), DIFFERENTIABLE.get(op))


@every_op
def test_run_to_run(op):
    for sample in samples(op, torch.float32):
        expected = evaluate(getattr(ops, op), sample, [0])
        for _ in range(10):
            for a, e in zip(evaluate(getattr(ops, op), sample, [0]).all(), expected.all(), strict=True):
                assert same_bits(a, e), f"{op} {sample}"


@every_op
def test_without_a_synchronisation(op):
    for sample in samples(op, torch.float32)[:4]:
        getattr(ops, op)(*sample.args, **sample.kwargs)  # compiles the kernels
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            getattr(ops, op)(*sample.args, **sample.kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@every_op
def test_inside_a_cuda_graph(op):
    """Forward and backward, captured once and replayed on other values."""
    for sample in samples(op, torch.float32)[:4]:
        function = getattr(ops, op)
        fixed = [x for x in torch.utils._pytree.tree_leaves((sample.args, sample.kwargs)) if isinstance(x, torch.Tensor)]
        fixed = [x for x in fixed if x.is_floating_point() and x.numel() > 0]
        if not fixed or sample.kwargs.get("training"):
            continue  # running statistics change from call to call
        first = fixed[0].requires_grad_()

        def step(first=first, function=function, sample=sample):
            outputs = torch.utils._pytree.tree_leaves(function(*sample.args, **sample.kwargs))
            y = outputs[0]
            return (y, torch.autograd.grad(y.sum(), first)[0]) if y.requires_grad else (y,)

        graph, results = captured(step)
        with torch.no_grad():
            first.mul_(0.75).add_(0.25)
        graph.replay()
        torch.cuda.synchronize()
        for a, e in zip(results, step(), strict=True):
            assert same_bits(a.detach(), e.detach()), f"{op} {sample}"


def test_a_label_outside_the_classes_is_named():
    """In a process of its own: after a device assert a context is of no more use."""
    code = (
        "import torch; from segfast import ops; target = torch.zeros(2, 9, 10, dtype=torch.int64, device='cuda'); "
        "target[1, 6, 3] = 77; ops.upsample_cross_entropy(torch.randn(2, 5, 3, 4, device='cuda'), target).item()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    values = [int(line.split()[-1]) for line in done.stdout.splitlines() if "label, n, y, x: " in line]
    assert set(values) == {77, 1, 6, 3}


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["fast_scnn", "contextnet", "espnet", "swiftnet_rn18"])
def test_optimize(name, dtype):
    """Whole networks as one CUDA graph, at two sizes, against eager in float64."""
    torch.manual_seed(0)
    model = segfast.create_model(name).eval().cuda()
    optimized, twin = segfast.optimize(model, dtype=dtype), copy.deepcopy(model).to(dtype)
    exact = copy.deepcopy(model).double()
    for size in ((128, 192), (97, 131)):
        for _ in range(2):
            x = torch.randn(1, 3, *size, device="cuda")
            truth = exact(x.double())
            error = (optimized(x).double() - truth).square().mean().sqrt()
            assert error <= 2 * (twin(x.to(dtype)).double() - truth).square().mean().sqrt() + 1e-6 * truth.abs().max()
        assert optimized.explain().note == "one CUDA graph"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_on_another_device():
    x = torch.randn(1, 6, 5, 5, device="cuda:1")
    assert torch.equal(ops.channel_shuffle(x, 3), ops.channel_shuffle(x.cpu(), 3).to("cuda:1"))
