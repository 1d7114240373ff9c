"""The CUDA kernels and their launchers, compiled for the host (simt/simt.h), as the kernels of the CPU ops: what holds for every
op holds for them, in every order of threads and for several block shapes. And the tools that say so: sanitizers, mutants."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import mutate
import pytest
import simt_build
import torch
from conftest import EFFORT, count, seed_of_commit
from descriptors import build as build_sample
from descriptors import draw
from drawing import each_drawn
from harness import CPU, DTYPES, check_rule, copy, error, evaluate, inputs_of, reference_only, relaid, same_bits, scale
from simt_host import OPS, RAW, SCHEDULES, Kernels, depthwise_inputs, roofline
from simt_host import kernels as kernels_of_the_host
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from segfast import _backend, ops, testing
from segfast.ops.ds_conv import _APPLY, ACTIVATIONS

pytestmark = [
    pytest.mark.skipif(
        sys.platform != "linux" or not shutil.which(simt_build.COMPILER) or _backend.requested == "reference",
        reason="the host build needs Linux and a C++ compiler",
    ),
    pytest.mark.xdist_group("simt"),  # one worker: one build of the library
]
# Threads a block and blocks a grid: few blocks make every thread go round the grid.
SHAPES = [(order, threads, blocks) for order in SCHEDULES for threads, blocks in ((64, 2), (256, 1 << 16))]
every_op = pytest.mark.parametrize("op", OPS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}-{s[1]}x{s[2]}")


def inputs(op: str) -> list[int] | None:
    """The inputs to take gradients for: for a teacher's the op takes its reference."""
    return [0] if op == "pixelwise_kl" else None


@pytest.fixture(scope="session")
def library() -> Kernels:
    return kernels_of_the_host()


@pytest.fixture
def kernels(library):
    library.configure()
    with library.own_every_op():
        yield library


@every_dtype
@every_op
def test_rule(op, dtype, kernels):
    for sample in testing.SAMPLES[op](dtype, CPU):
        check_rule(op, sample, inputs(op))
        if any(x.numel() for x in tree_leaves(sample.args) if isinstance(x, Tensor)):
            assert kernels.take_counts()[0], f"{op} {sample}: no kernel was launched"


@every_shape
@every_op
def test_rule_in_every_order_and_block_shape(op, shape, kernels):
    kernels.configure(*shape)
    for sample in testing.SAMPLES[op](torch.float32, CPU):
        check_rule(op, sample, inputs(op))


@every_op
def test_rule_on_descriptors(op, kernels):
    """Shapes, dtypes, layouts and options drawn by hypothesis, and with them the order and the block shape."""

    def check(integer, choice):
        kernels.configure(*choice(SHAPES))
        check_rule(op, build_sample(op, draw(op, integer, choice)), inputs(op))

    each_drawn(count(40, 300), check)


@every_op
@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_gradcheck(op, layout, kernels):
    for sample in list(testing.SAMPLES[op](torch.float64, CPU))[:: count(3, 1)]:
        sample = relaid(sample, layout)
        leaves, spec = tree_flatten((sample.args, sample.kwargs))
        positions = inputs_of((sample.args, sample.kwargs))[:1]

        def g(x, leaves=leaves, spec=spec, positions=positions):
            args, kwargs = tree_unflatten([x if i in positions else leaf for i, leaf in enumerate(leaves)], spec)
            return getattr(ops, op)(*args, **kwargs)

        x = copy(leaves[positions[0]]).requires_grad_()
        assert torch.autograd.gradcheck(g, [x], fast_mode=x.numel() > 200)


@every_op
def test_the_bits_do_not_depend_on_the_order(op, kernels):
    for sample in testing.SAMPLES[op](torch.float32, CPU):
        results = []
        for order in SCHEDULES:
            kernels.configure(order)
            results.append(evaluate(getattr(ops, op), sample, [0]))
        for result in results[1:]:
            assert all(same_bits(a, b) for a, b in zip(result.all(), results[0].all(), strict=True)), f"{op} {sample}"


@every_dtype
@every_op
def test_memory_is_written_before_it_is_read(op, dtype, kernels):
    for sample in testing.SAMPLES[op](dtype, CPU):
        expected = evaluate(getattr(ops, op), sample, [0])
        torch.use_deterministic_algorithms(True, warn_only=True)
        actual = evaluate(getattr(ops, op), sample, [0])
        torch.use_deterministic_algorithms(False)
        assert all(same_bits(a, e) for a, e in zip(actual.all(), expected.all(), strict=True)), f"{op} {sample}"


@pytest.mark.parametrize("dtype", (torch.uint8, torch.int16, torch.bool, torch.int64, torch.complex128), ids=str)
@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_shuffles_of_any_dtype(dtype, layout, kernels):
    for size, groups in (((2, 16, 4, 4), 2), ((1, 48, 3, 5), 3), ((2, 32, 1, 1), 16), ((2, 32, 5, 3), 2)):
        x = testing.tensor(*size, dtype=torch.float64, device=CPU, layout=layout).mul(50).abs().to(dtype)
        expected = ops.channel_shuffle.__globals__["channel_shuffle_reference"](x, groups)
        assert torch.equal(ops.channel_shuffle(x, groups), expected)
        parts = list(x.split(size[1] // 2, 1))
        assert torch.equal(ops.concat_shuffle(parts, groups), expected)


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
def test_misaligned_views_and_many_parts(layout, kernels):
    """Storage that starts in the middle of 16 bytes; more parts than one launch takes."""
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    for offset in (1, 2, 3):
        flat = torch.randn(2 * 16 * 6 * 4 + offset)[offset:]
        size = (2, 6, 4, 16) if layout == "channels_last" else (2, 16, 6, 4)
        x = flat.view(size)
        x = x.permute(0, 3, 1, 2) if layout == "channels_last" else x
        assert x.data_ptr() % 16
        for groups in (2, 4, 8):
            with reference_only():
                expected = ops.channel_shuffle(x, groups)
            assert torch.equal(ops.channel_shuffle(x, groups), expected)
    for number in (31, 32, 33, 70):
        widths = [i % 3 for i in range(number - 1)] + [6]
        groups = next(g for g in (2, 3, 5, 1) if sum(widths) % g == 0)
        parts = [torch.randn(2, c, 3, 2).contiguous(memory_format=memory_format) for c in widths]
        check_rule("concat_shuffle", testing.Sample(f"{number} parts", (parts, groups)))


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("classes", (1, 8, 20, 21, 32, 33, 150, 160, 161, 256, 640, 641, 1000, 1024, 1025, 2100))
def test_pixelwise_kl_of_any_number_of_classes(classes, layout, kernels):
    kernels.configure(threads=64)
    for dtype in (torch.float32, torch.float16, torch.float64):
        pair = [3 * testing.tensor(1, classes, 3, 3, dtype=dtype, device=CPU, layout=layout, seed=i) for i in (0, 1)]
        mask = torch.tensor([[[True, True, False]] * 3])
        check_rule("pixelwise_kl", testing.Sample(f"{classes}", tuple(pair), {"mask": mask, "temperature": 0.7}), [0])


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("classes", (3, 30, 1500))
@pytest.mark.parametrize("values", ([float("nan")], [float("inf")], [float("-inf")], [1e4, -1e4], [-1e30]))
def test_pixelwise_kl_of_extreme_logits(values, classes, layout, kernels):
    """NaN and infinities come out where the reference's do; a lone -inf in the student only."""
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    student, teacher = (testing.tensor(1, classes, 2, 3, dtype=torch.float32, device=CPU, seed=i) for i in (0, 1))
    for k, value in enumerate(values):
        student[0, (k + 1) % classes, 0, k] = value
        student[0, -1, 1, k] = value
        teacher[0, 0, 1, 2 - k] = value
    pair = [x.contiguous(memory_format=memory_format) for x in (student, teacher)]
    sample = testing.Sample("", tuple(pair), {"reduction": "none"})
    actual = evaluate(ops.pixelwise_kl, sample, [0])
    with reference_only():
        expected = evaluate(ops.pixelwise_kl, sample, [0])
    for a, e in zip(actual.all(), expected.all(), strict=True):
        assert torch.equal(a.isnan(), e.isnan())
        assert torch.equal(a.isinf(), e.isinf())
        finite = e.isfinite()
        assert torch.allclose(a[finite], e[finite], rtol=1e-4, atol=1e-5)


def shifted(x: Tensor, by: int = 1) -> Tensor:
    """The same values and strides, in storage that begins `by` elements past an aligned address."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
    flat = x.new_empty(extent + by)[by:]
    assert flat.data_ptr() % 16
    return flat.as_strided(x.shape, x.stride()).copy_(x)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=("float32", "float16"))
@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
def test_misaligned_logits_and_planes(layout, dtype, kernels):
    pair = [shifted(testing.tensor(2, 21, 5, 7, dtype=dtype, device=CPU, layout=layout, seed=i), i + 1) for i in (0, 1)]
    check_rule("pixelwise_kl", testing.Sample("misaligned", tuple(pair)), [0])
    x, weight, scale_, shift, *options = depthwise_inputs(DEPTHWISE[0], dtype)
    expected = torch.ops.segfast.depthwise(x, weight, scale_, shift, *options, 1)
    assert same_bits(torch.ops.segfast.depthwise(shifted(x), shifted(weight), scale_, shift, *options, 1), expected)


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
def test_nothing_to_do(layout, kernels):
    """Tensors without elements: the reference's answer, and no grid of no blocks, which the host build refuses."""
    for size in ((0, 6, 3, 2), (2, 6, 0, 2), (2, 6, 3, 0)):
        x = testing.tensor(*size, dtype=torch.float32, device=CPU, layout=layout)
        check_rule("channel_shuffle", testing.Sample(str(size), (x, 3)))
        check_rule("concat_shuffle", testing.Sample(str(size), ([x, x + 1], 2)))
        for reduction in ("none", "sum", "mean", "batchmean"):
            check_rule("pixelwise_kl", testing.Sample(f"{size} {reduction}", (x, x + 1), {"reduction": reduction}), [0])
    x = testing.tensor(2, 4, 3, 2, dtype=torch.float32, device=CPU, layout=layout)
    check_rule("concat_shuffle", testing.Sample("an empty part", ([x, x[:, :0], x], 2)))


def test_what_the_kernels_do_not_take_is_refused(kernels):
    """Of mixed devices and other dtypes: by the public functions before a kernel runs, and by the raw ops."""
    x, meta = torch.zeros(1, 4, 3, 3), torch.zeros(1, 4, 3, 3, device="meta")
    weight, vector, geometry = torch.zeros(4, 1, 3, 3), torch.zeros(4), ((1, 1), (1, 1), (1, 1))
    kernels.take_counts()
    for call in (
        lambda: ops.concat_shuffle([x, meta], 2),
        lambda: ops.pixelwise_kl(x, meta),
        lambda: ops.pixelwise_kl(x, x, mask=torch.ones(1, 3, 3, dtype=torch.bool, device="meta")),
        lambda: ops.pairwise_loss(x, meta),
        lambda: ops.ds_conv(x, weight.to("meta"), torch.zeros(2, 4, 1, 1)),
        lambda: ops.ds_conv(x, weight, torch.zeros(2, 4, 1, 1), dw_bias=vector.to("meta")),
    ):
        with pytest.raises(ValueError, match=r"want .*device"):
            call()
    for dtype in (torch.int32, torch.complex64, torch.float8_e4m3fn):
        odd = x.to(dtype)
        for call in (
            lambda odd=odd: ops.pixelwise_kl(odd, odd),
            lambda odd=odd: ops.pairwise_loss(odd, odd),
            lambda odd=odd: ops.pairwise_cosine(odd),
        ):
            with pytest.raises(TypeError, match="want "):
                call()
        for call in (
            lambda odd=odd: torch.ops.segfast.pixelwise_kl(odd, odd, None, 1.0, 1, True),
            lambda odd=odd: torch.ops.segfast.depthwise(odd, odd.new_zeros(4, 1, 3, 3), vector, vector, *geometry, 1),
            lambda odd=odd: torch.ops.segfast.depthwise_train(odd, odd.new_zeros(4, 1, 3, 3), None, *geometry),
        ):
            with pytest.raises(RuntimeError, match="want float32"):
                call()
    with pytest.raises(RuntimeError, match="both logits or neither"):
        torch.ops.segfast.pixelwise_kl(x.double(), x, None, 1.0, 1, True)
    with pytest.raises(RuntimeError, match="at most 64 taps"):
        torch.ops.segfast.depthwise(torch.zeros(1, 4, 12, 12), torch.zeros(4, 1, 9, 9), vector, vector, *geometry, 1)
    assert kernels.take_counts()[0] == 0


def depthwise_reference(x, weight, scale, shift, stride, padding, dilation, act):
    y = torch.nn.functional.conv2d(x, weight, None, stride, padding, dilation, x.shape[1])
    wide = torch.promote_types(y.dtype, torch.float32)
    y = y.to(wide) * scale.to(wide).view(1, -1, 1, 1) + shift.to(wide).view(1, -1, 1, 1)
    name = next(k for k, v in ACTIVATIONS.items() if v == act)
    return (y if name is None else _APPLY[name](y)).to(x.dtype)


# size, kernel, stride, padding, dilation: plane smaller than a tile and larger, odd, 1x1, a kernel that reaches past the tile
DEPTHWISE = (
    ((2, 3, 17, 70), (3, 3), (1, 1), (1, 1), (1, 1)),
    ((1, 2, 41, 33), (3, 3), (2, 2), (1, 1), (1, 1)),
    ((2, 1, 9, 140), (3, 3), (2, 2), (0, 2), (1, 1)),
    ((1, 3, 1, 1), (3, 3), (1, 1), (1, 1), (1, 1)),
    ((1, 2, 40, 35), (5, 5), (1, 1), (2, 2), (1, 1)),
    ((1, 2, 19, 23), (5, 3), (2, 1), (1, 0), (1, 2)),
    ((2, 2, 12, 31), (3, 3), (1, 1), (4, 4), (4, 4)),
    ((1, 1, 70, 75), (3, 3), (1, 1), (36, 36), (36, 36)),
    ((3, 2, 8, 8), (1, 1), (1, 1), (0, 0), (1, 1)),
    ((1, 1, 33, 21), (8, 8), (3, 3), (3, 3), (1, 1)),
)


@every_dtype
@pytest.mark.parametrize("case", DEPTHWISE, ids=str)
def test_depthwise(case, dtype, kernels):
    arguments = depthwise_inputs(case, dtype)
    for act, (order, threads, _) in zip(ACTIVATIONS.values(), SHAPES):
        kernels.configure(order, threads)
        actual = torch.ops.segfast.depthwise(*arguments, act)
        exact = depthwise_reference(*(x.double() if isinstance(x, Tensor) else x for x in arguments), act)
        rough = depthwise_reference(*arguments, act)
        assert (actual.dtype, actual.shape) == (dtype, exact.shape)
        assert error(actual, exact) <= 2 * error(rough, exact) + 4 * torch.finfo(dtype).eps * scale(exact)


@every_dtype
@pytest.mark.parametrize("case", [c for c in DEPTHWISE if c[0][2] > 1], ids=str)
def test_depthwise_statistics(case, dtype, kernels):
    x, weight, _, bias, *options = depthwise_inputs(case, dtype)
    x = x + 10  # a mean far from zero: sums of squares would cancel
    results = []
    for order, threads in (("forward", 256), ("shuffled", 64), ("reverse", 256)):
        kernels.configure(order, threads)
        u, mean, var = torch.ops.segfast.depthwise_train(x, weight, bias, *options)
        results.append((u, mean, var))
        exact = torch.nn.functional.conv2d(x.double(), weight.double(), bias.double(), *options, x.shape[1])
        rough = torch.nn.functional.conv2d(x, weight, bias.to(dtype), *options, x.shape[1])
        eps = torch.finfo(dtype).eps
        assert error(u, exact) <= 2 * error(rough, exact) + 4 * eps * scale(exact)
        stored = u.double()
        wide = torch.finfo(mean.dtype).eps
        assert error(mean, stored.mean((0, 2, 3))) <= 4 * wide * scale(stored)
        expected = stored.var((0, 2, 3), unbiased=False)
        assert error(var, expected) <= 8 * wide * (scale(expected) + scale(stored) * scale(expected) ** 0.5)
    assert all(same_bits(a, b) for a, b in zip(results[0], results[2]))
    unbiased = torch.ops.segfast.depthwise_train(x, weight, None, *options)
    assert error(unbiased[1] + bias, results[0][1]) <= 64 * torch.finfo(dtype).eps * scale(exact)


def test_depthwise_of_empty_batches(kernels):
    x, weight, scale_, shift, *options = depthwise_inputs(DEPTHWISE[0], torch.float32)
    assert torch.ops.segfast.depthwise(x[:0], weight, scale_, shift, *options, 1).shape == (0, 3, 17, 70)
    with pytest.raises(RuntimeError, match="depthwise_train"):
        torch.ops.segfast.depthwise_train(x[:0], weight, None, *options)


def test_fakes_of_depthwise(kernels):
    for case in DEPTHWISE[:6]:
        x, weight, scale_, shift, *options = depthwise_inputs(case, torch.float32)
        for name, args in (
            ("depthwise", (x, weight, scale_, shift, *options, 1)),
            ("depthwise_train", (x, weight, shift, *options)),
        ):
            with torch._subclasses.FakeTensorMode() as mode:
                fakes = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args]
                described = tree_leaves(
                    torch._library.simple_registry.singleton.find(f"segfast::{name}").fake_impl.kernel(*fakes)
                )
            made = tree_leaves(getattr(torch.ops.segfast, name)(*args))
            for m, d in zip(made, described, strict=True):
                assert (m.shape, m.dtype, m.stride()) == (d.shape, d.dtype, d.stride())


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=("float32", "float16"))
@pytest.mark.parametrize("op", RAW)
def test_bytes_are_within_a_tenth_of_the_roofline(op, dtype, layout, kernels):
    calls = list(roofline(op, dtype, layout))
    if not calls:
        pytest.skip("contiguous only")
    for name, call, ideal in calls:
        kernels.take_counts()
        call()
        _, loaded, stored = kernels.take_counts()
        ratio = (loaded + stored) / ideal
        assert 1 <= ratio <= 1.1, f"{op} {name}: {loaded} bytes loaded and {stored} stored are {ratio:.3f} of the ideal {ideal}"


# What a host build lacks or a sanitizer's run needs: (compiler flags, environment)
SANITIZERS = {
    "address,undefined": ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1", "-g1"),
    "thread": ("-fsanitize=thread", "-DSEGFAST_SIMT_THREADS", "-O1", "-g1"),
}


@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.parametrize("kernel", simt_build.DRIVERS)
def test_drivers_under_sanitizers(kernel, sanitizer, tmp_path):
    """The same checks with every access watched; under ThreadSanitizer a CUDA thread is a thread, and a lost barrier a race."""
    if EFFORT == "ci" and sanitizer == "thread":
        pytest.skip("half a minute: SEGFAST_EFFORT=full; the lost barrier below is looked for in every run")
    if EFFORT == "ci" and kernel != list(simt_build.DRIVERS)[seed_of_commit() % len(simt_build.DRIVERS)]:
        pytest.skip("another was drawn by the commit: SEGFAST_EFFORT=full")
    flags = SANITIZERS[sanitizer]
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() {}")
    if subprocess.run([simt_build.COMPILER, *flags, str(probe), "-o", str(tmp_path / "probe")], check=False).returncode:
        pytest.skip(f"no {sanitizer} sanitizer here")
    program = simt_build.driver(kernel, simt_build.cache() / f"{kernel}-{sanitizer.split(',')[0]}", flags)
    environment = os.environ | {"ASAN_OPTIONS": "detect_stack_use_after_return=0", "TSAN_OPTIONS": "halt_on_error=1"}
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


def test_a_lost_barrier_is_a_race(tmp_path):
    """ThreadSanitizer sees it, on the line of the access: the check above can fail."""
    text = (simt_build.CUDA / "launch.cuh").read_text()
    assert text.count("__syncthreads();") == 1
    headers = mutate.headers(tmp_path / "headers", "launch.cuh", text.replace("__syncthreads();", ";"))
    try:
        program = simt_build.driver("pixelwise_kl", tmp_path / "driver", SANITIZERS["thread"], headers)
    except RuntimeError:
        pytest.skip("no thread sanitizer here")
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode
    assert "data race" in done.stderr or "the loss" in done.stderr


def test_mutants_are_killed():
    """A dozen, drawn by the commit, most of which must die; all of them, but for those in equivalent.txt, under full effort."""
    files = sorted(path.name for path in simt_build.CUDA.glob("*.cuh"))
    if EFFORT == "full":
        mutants = mutate.run(files, jobs=2)
    else:
        mutants = mutate.run([files[seed_of_commit() % len(files)]], jobs=2, draw=6, seed=seed_of_commit())
    survivors = [m.key() for m in mutants if m.killed_by is None]
    unknown = [key for key in survivors if key not in mutate.equivalents()]
    if EFFORT == "full":
        assert not unknown, "\n".join(unknown)
        assert len(survivors) <= 0.05 * len(mutants)
    assert len(unknown) <= len(mutants) // 4, "\n".join(unknown)
