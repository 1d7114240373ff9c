"""The Triton kernels in Triton's interpreter, registered as CPU kernels, under the rules that hold for every op.

test_triton.py runs this file in a process of its own, with TRITON_INTERPRET=1 and SEGFAST_BACKEND=triton: the interpreter is
chosen when a kernel is defined. The interpreter has no bfloat16 arithmetic to trust, so float32, float16 and float64 run here.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil

import pytest
import simt_build
import simt_host
import torch
import triton
from conftest import count
from descriptors import DTYPES as NAMED
from descriptors import build, draw
from drawing import each_drawn
from harness import OPS, check_rule, evaluate, record, reference_only, relaid, same_bits, samples_of
from torch.utils._pytree import tree_map
from triton.runtime import interpreter

from segfast import _backend, ops, testing

SCHEMAS = {
    "channel_shuffle": ("channel_shuffle",),
    "concat_shuffle": ("concat_shuffle", "concat_shuffle_backward"),
    "pixelwise_kl": ("pixelwise_kl",),
    "overhaul_loss": ("overhaul_loss",),
    "pairwise_loss": ("pairwise_loss", "pairwise_loss_backward"),
    "pairwise_cosine": ("pairwise_cosine", "pairwise_cosine_backward"),
    "ds_conv": ("ds_conv", "ds_conv_train", "ds_conv_backward"),
    "upsample_argmax": ("upsample_argmax",),
    "upsample_cross_entropy": ("upsample_cross_entropy", "upsample_cross_entropy_backward"),
    "upsample_pixelwise_kl": ("upsample_pixelwise_kl", "upsample_pixelwise_kl_backward"),
}
# A teacher that wants a gradient gets its reference: only the student's comes from the kernel.
INPUTS = {"pixelwise_kl": [0], "overhaul_loss": [0], "upsample_pixelwise_kl": [0]}
assert triton.knobs.runtime.interpret
assert _backend.requested == "triton"
library = torch.library.Library("segfast", "IMPL")
calls = dict.fromkeys((schema for schemas in SCHEMAS.values() for schema in schemas), 0)
interpreter.interpreter_builder.options = interpreter.InterpreterOptions(debug=True)  # an int32 that overflows raises


def counted(schema, launcher):
    def launch(*args):
        calls[schema] += 1
        return launcher(*args)

    return launch


for _op, _schemas in SCHEMAS.items():
    _module = importlib.import_module(f"segfast.triton.{_op}")
    for _schema in _schemas:
        library.impl(_schema, counted(_schema, getattr(_module, _schema)), "CPU", allow_override=True)
    _backend.table[_op]["cpu"] = "triton"

pairwise_loss = importlib.import_module("segfast.triton.pairwise_loss")
ds_conv = importlib.import_module("segfast.triton.ds_conv")
for _op in ("upsample_cross_entropy", "upsample_pixelwise_kl"):  # fewer programs: each is a loop over pixels in Python
    importlib.import_module(f"segfast.triton.{_op}").CONFIGS["gather"]["BLOCK_CLASSES"] = 16
ds_conv.PARTS, ds_conv.TAP_PARTS, ds_conv.WEIGHT_PARTS = (
    3,
    3,
    2,
)  # several tiles a program, several programs, at sizes that an interpreter can do

DTYPES = (torch.float32, torch.float16, torch.float64)
TRITON_OPS = [op for op in OPS if op in SCHEMAS]
every_op = pytest.mark.parametrize("op", TRITON_OPS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def blocks(dtype):
    """ds_conv has no samples in segfast/testing.py: these go through its descriptors.

    None trains a 1x1 depthwise convolution, or one with a bias: BatchNorm undoes both, and their gradients are rounding errors.
    """
    name = next(name for name, kind in NAMED.items() if kind == dtype)
    base = {
        "size": [2, 19, 7, 5], "out_channels": 35, "kernel": 3, "stride": 1, "padding": None, "dilation": 1, "dw_act": "relu",
        "act": "relu", "dw_bn": True, "pw_bn": True, "bias": False, "training": False, "dtype": name, "layout": "channels_last",
        "seed": 1,
    }  # fmt: skip
    for change in (
        {},
        {"training": True},
        {"training": True, "stride": 2, "layout": "contiguous"},
        {"stride": 2, "kernel": 5, "dilation": 2, "padding": 2, "size": [1, 40, 11, 12], "act": "hardswish", "bias": True},
        {"out_channels": 130, "dw_act": "silu", "act": None, "dw_bn": False, "size": [1, 33, 5, 6], "kernel": 1},
        {"training": True, "out_channels": 130, "dw_act": "hardswish", "act": "silu", "size": [2, 33, 5, 6], "pw_bn": False},
        {"training": True, "dw_act": "relu6", "act": "relu6", "size": [3, 5, 10, 9], "layout": "strided"},
        {"training": True, "dw_act": "relu", "act": None, "size": [2, 4, 17, 15], "out_channels": 3, "stride": 2},
    ):
        yield build("ds_conv", {**base, **change})


EXTRA = {"ds_conv": blocks}


def some(op, dtype, most):
    samples = [*samples_of(op, dtype), *EXTRA.get(op, lambda dtype: [])(dtype)]
    return samples if most >= len(samples) else [samples[i * len(samples) // most] for i in range(most)]


@pytest.mark.drawn(1 / 2)
@every_op
@every_dtype
def test_rule(op, dtype):
    before = dict(calls)
    chosen = some(op, dtype, count(2 if dtype == torch.float32 else 1, 100))
    if op.startswith("upsample"):  # a loss a pixel has a backward of its own
        chosen += [sample for sample in samples_of(op, dtype) if sample.kwargs.get("reduction") == "none"][:1]
    for sample in chosen:
        check_rule(op, sample, INPUTS.get(op))
        check_rule(op, sample, [])
    for schema in SCHEMAS[op]:
        assert calls[schema] > before[schema], f"{schema}: its launcher never ran"


@pytest.mark.drawn(1 / 4)
@every_op
@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts(op, layout):
    for sample in some(op, torch.float32, count(1, 6)):
        check_rule(op, relaid(sample, layout), INPUTS.get(op))


@pytest.mark.drawn(1 / 2)
@every_op
def test_drawn(op):
    def check(integer, choice):
        descriptor = draw(op, integer, choice)
        if descriptor["dtype"] == "bfloat16":
            descriptor["dtype"] = "float16"
        if "to" in descriptor:
            descriptor["to"] = [min(size, 12) for size in descriptor["to"]]
        assert NAMED[descriptor["dtype"]] in DTYPES
        check_rule(op, build(op, descriptor), INPUTS.get(op))

    each_drawn(count(1 if op == "ds_conv" else 2, 300), check)


@pytest.mark.drawn(1 / 2)
@every_op
def test_reads_nothing_outside(op):
    """The interpreter loads out of bounds without a word: here every input lies in NaNs, and torch.empty is NaN too."""
    for sample in some(op, torch.float32, count(1, 100)):
        expected = evaluate(getattr(ops, op), sample, INPUTS.get(op))

        def padded(x):
            if not isinstance(x, torch.Tensor) or not x.is_floating_point() or x.numel() == 0:
                return x
            extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
            around = x.new_full((extent + 512,), float("nan"))
            return around[256 : 256 + extent].as_strided(x.shape, x.stride()).copy_(x)

        def inside(*args, **kwargs):
            args, kwargs = tree_map(padded, (args, kwargs))
            return getattr(ops, op)(*args, **kwargs)

        torch.use_deterministic_algorithms(True, warn_only=True)
        actual = evaluate(inside, sample, INPUTS.get(op))
        torch.use_deterministic_algorithms(False)
        for a, e in zip(actual.outputs + actual.grads, expected.outputs + expected.grads, strict=True):
            assert same_bits(a, e), f"{op} {sample}"


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=("float32", "float16"))
def test_pairwise_loss_without_fast_float64(dtype, monkeypatch):
    """The tiled direct form, for nodes more and fewer than channels, and for several chunks of the Gram form."""
    monkeypatch.setattr(pairwise_loss, "has_fast_float64", lambda device: False)
    for sample in some("pairwise_loss", dtype, count(1, 100)):
        check_rule("pairwise_loss", sample)
    x = testing.tensor(2, 70, 5, 9, dtype=dtype, device=torch.device("cpu"))
    y = testing.tensor(2, 35, 5, 9, dtype=dtype, device=torch.device("cpu"), seed=1)
    for detach in (False, True):
        check_rule("pairwise_loss", testing.Sample("tiles", (x, y), {"node_size": 1, "detach_norm": detach}), [0])


def test_pairwise_loss_in_chunks(monkeypatch):
    monkeypatch.setattr(pairwise_loss, "CHUNK", 1)
    x = testing.tensor(1, 3, 20, 15, dtype=torch.float32, device=torch.device("cpu"))
    y = testing.tensor(1, 4, 20, 15, dtype=torch.float32, device=torch.device("cpu"), seed=1)
    assert len(pairwise_loss.chunks(x.flatten(2), y.flatten(2))) == 2
    check_rule("pairwise_loss", testing.Sample("chunks", (x, y), {"node_size": 1}))


@pytest.mark.parametrize("student", ("aligned", "rotated", "permuted"))
def test_pairwise_loss_near_the_teacher(student):
    """Relative error 1e-5 where loss / ||G||^2 is 1e-9: the Gram form's products are float64."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(1, 8, 8, 8, generator=generator, dtype=torch.float64)
    near = teacher + 2e-5 * torch.randn(teacher.shape, generator=generator, dtype=torch.float64)
    if student == "rotated":
        rotation = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64)).Q
        near = torch.einsum("dc,nchw->ndhw", rotation, near)
    if student == "permuted":
        near = near[:, torch.randperm(8, generator=generator)]
    near, teacher = near.float(), teacher.float()
    with torch.no_grad():
        loss = ops.pairwise_loss(near, teacher, node_size=1)
        with reference_only():
            exact = ops.pairwise_loss(near.double(), teacher.double(), node_size=1)
    assert abs(loss.item() - exact.item()) <= 1e-5 * exact.item()


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
def test_pixelwise_kl_carries_infinities_as_eager_does(layout):
    student, teacher = (
        testing.tensor(1, 6, 4, 9, dtype=torch.float32, device=torch.device("cpu"), layout=layout, seed=i) for i in (0, 1)
    )
    for column, (value, both) in enumerate((v, b) for v in (float("inf"), -float("inf"), float("nan")) for b in (False, True)):
        for c in range(4):
            student[0, c, c, column] = value
            if both:
                teacher[0, c, c, column] = value
    teacher[0, 0, :, 6] = -float("inf")
    student[0, :, 0, 7] = -float("inf")
    for reduction in ("none", "sum"):
        check_rule("pixelwise_kl", testing.Sample("infinities", (student, teacher), {"reduction": reduction}), [0])


@pytest.mark.parametrize("how", ("fused", "two kernels", "convolutions"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=("float32", "float16"))
def test_ds_conv_every_plan(how, dtype, monkeypatch):
    monkeypatch.setattr(ds_conv, "plan", lambda *sizes, **layout: how)
    for sample in [sample for sample in blocks(dtype) if not sample.kwargs["training"]][: count(2, 100)]:
        check_rule("ds_conv", sample, [])


@pytest.mark.skipif(not shutil.which(simt_build.COMPILER), reason="the host build of the CUDA kernels needs a C++ compiler")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_ds_conv_with_its_depthwise_half_in_cuda(dtype, monkeypatch):
    """Contiguous blocks, inference and training, with the CUDA C++ kernels as compiled for the host."""
    kernels = simt_host.kernels()
    for name in ("depthwise", "depthwise_train"):
        monkeypatch.setattr(torch.ops.segfast, name, getattr(torch.ops.segfast_simt, name))
    monkeypatch.setattr(ds_conv, "HAS_DEPTHWISE", True)
    monkeypatch.setattr(ds_conv, "plan", lambda *sizes, contiguous, compiled: "c++ depthwise" if contiguous else "fused")
    for sample in list(blocks(dtype))[: count(3, 100)]:
        kernels.take_counts()
        check_rule("ds_conv", relaid(sample, "contiguous"), None if sample.kwargs["training"] else [])
        assert kernels.take_counts()[0], f"{sample}: no CUDA kernel ran"
        check_rule("ds_conv", relaid(sample, "channels_last"), [])
        assert not kernels.take_counts()[0], f"{sample}: the CUDA kernel is for contiguous tensors"


def test_a_label_outside_the_classes_is_named(capsys):
    x = testing.tensor(2, 5, 3, 4, dtype=torch.float32, device=torch.device("cpu"))
    target = torch.zeros(2, 9, 10, dtype=torch.int32)
    target[0, 0, 0] = 255
    ops.upsample_cross_entropy(x, target)
    assert capsys.readouterr().out == ""
    target[1, 6, 3], target[1, 8, 9] = -1, 77
    with pytest.raises(RuntimeError, match="labels from 0 to 4 or 255"):
        ops.upsample_cross_entropy(x, target)
    assert re.findall(r"\[(-?\d+)\]", capsys.readouterr().out) == ["-1", "1", "6", "3"]


@pytest.mark.drawn(1 / 3)
@every_op
def test_opcheck(op):
    for sample in some(op, torch.float32, count(1, 20)):
        for raw, args, kwargs in record(getattr(ops, op), sample, INPUTS.get(op)).calls:
            torch.library.opcheck(raw, args, kwargs, test_utils=("test_schema", "test_faketensor"))


def test_the_interpreter_catches_overflow():
    x = torch.zeros(8, dtype=torch.int32)

    @triton.jit
    def square(pointer):
        triton.language.store(pointer, triton.language.load(pointer) * triton.language.load(pointer))

    x[0] = 1 << 20
    with pytest.raises(interpreter.InterpreterError, match="overflow"):
        square[(1,)](x)
    assert os.environ["TRITON_INTERPRET"] == "1"
