"""What holds for every op: found by name in segfast.ops, fed from segfast.testing, run on every kernel set of the machine."""

from __future__ import annotations

import pytest
import torch
from conftest import EFFORT, count, kernel_sets
from harness import (
    CPU,
    DTYPES,
    OPS,
    check_rule,
    copy,
    error,
    evaluate,
    inputs_of,
    judge,
    record,
    reference_of,
    reference_only,
    relaid,
    same_bits,
    samples_of,
    scale,
)
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.flop_counter import FlopCounterMode

from segfast import _backend, ops, testing

compiled = pytest.mark.skipif(_backend._C is None or _backend.requested == "reference", reason="no kernels: the reference serves")
every_op = pytest.mark.parametrize("op", OPS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
CASES = [pytest.param(op, sample.name, id=f"{op}-{sample.name}") for op in OPS for sample in samples_of(op, torch.float32)]
every_sample = pytest.mark.parametrize("op, name", CASES)


def sample_of(op: str, name: str, dtype: torch.dtype) -> testing.Sample:
    return next(s for s in testing.SAMPLES[op](dtype, CPU) if s.name == name)


def few(op: str, dtype: torch.dtype, most: int) -> list[testing.Sample]:
    """At most `most` samples, spread over the list; all of them with full effort."""
    all_samples = samples_of(op, dtype)
    if EFFORT == "full" or len(all_samples) <= most:
        return all_samples
    return [all_samples[i * len(all_samples) // most] for i in range(most)]


def closed(function, sample: testing.Sample):
    """(g, leaves): g takes the differentiable inputs alone, works on copies of the rest and returns the tensors."""
    leaves, spec = tree_flatten((sample.args, sample.kwargs))
    positions = inputs_of((sample.args, sample.kwargs))

    def g(*inputs):
        filled = [x.clone() if isinstance(x, Tensor) and i not in positions else x for i, x in enumerate(leaves)]
        for p, x in zip(positions, inputs):
            filled[p] = x
        args, kwargs = tree_unflatten(filled, spec)
        outputs = tuple(y for y in tree_leaves(function(*args, **kwargs)) if isinstance(y, Tensor))
        return outputs[0] if len(outputs) == 1 else outputs

    return g, [leaves[p] for p in positions]


@every_op
def test_coverage(op):
    assert reference_of(op) is not None, f"{op}: no {op}_reference beside the public function"
    names = [s.name for s in samples_of(op, torch.float32)]
    assert names, f"{op}: no samples in segfast/testing.py"
    assert len(set(names)) == len(names), f"{op}: two samples of one name"
    assert getattr(ops, op).__doc__, f"{op}: no docstring"
    for section in ("Args:", "Returns:", "Raises:"):
        assert section in getattr(ops, op).__doc__, f"{op}: no {section} in the docstring"
    for sample in samples_of(op, torch.float32):
        for raw, _, _ in record(getattr(ops, op), sample).calls:
            fake = torch._library.simple_registry.singleton.find(raw._schema.name).fake_impl
            assert fake.kernel is not None, f"{raw}: no register_fake"


def test_nothing_is_missing():
    assert set(testing.SAMPLES) <= set(ops.__all__), "samples of an op that segfast.ops does not export"
    assert OPS


@every_dtype
@every_sample
def test_rule(op, name, dtype, kernel_set):
    check_rule(op, sample_of(op, name, dtype))


@pytest.mark.drawn(1 / 2)
@every_sample
def test_gradient_on_a_subset(op, name, kernel_set):
    sample = sample_of(op, name, torch.float32)
    number = len(inputs_of((sample.args, sample.kwargs)))
    if number < 2:
        pytest.skip("one input only")
    for subset in [[k] for k in range(number)] + [list(range(1, number))]:
        check_rule(op, sample, subset)


@pytest.mark.drawn(1 / 2)
@every_op
@every_dtype
@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts(op, dtype, layout, kernel_set):
    for sample in few(op, dtype, 3):
        check_rule(op, relaid(sample, layout))


@pytest.mark.drawn(1 / 2)
@compiled
@every_op
@every_dtype
def test_the_kernel_runs(op, dtype, kernel_set):
    """Without a gradient and with one on the first input; a counter in _C says that the kernel answered."""
    for sample in samples_of(op, dtype):
        for backward in (False, True):
            before = _backend._C.kernel_calls()
            recorded = record(getattr(ops, op), sample, [0], backward).calls
            after = _backend._C.kernel_calls()
            assert recorded, f"{op} {sample}: the reference answered"
            for raw, _, _ in recorded:
                name = raw._schema.name.removeprefix("segfast::")
                grown = [k for k in after if after[k] > before.get(k, 0)]
                assert name in grown or name.removesuffix("_backward") in grown, f"{raw}: its counter stood still, {grown} grew"


@pytest.mark.drawn(1 / 4)
@compiled
@every_op
@every_dtype
@pytest.mark.parametrize("layout", ("contiguous", "channels_last", "strided"))
def test_opcheck(op, dtype, layout):
    """Every raw op that runs while the public function goes forward and backward, with the arguments it got."""
    seen = set()
    for sample in few(op, dtype, 3 if layout == "contiguous" else 1):
        calls = (
            record(getattr(ops, op), relaid(sample, layout)).calls + record(getattr(ops, op), relaid(sample, layout), [0]).calls
        )
        for raw, args, kwargs in calls:
            key = (raw, str([(x.shape, x.stride()) if isinstance(x, Tensor) else x for x in tree_leaves((args, kwargs))]))
            if key not in seen:
                seen.add(key)
                torch.library.opcheck(raw, args, kwargs)
    assert seen


@every_sample
def test_gradcheck(op, name, kernel_set):
    g, inputs = closed(getattr(ops, op), sample_of(op, name, torch.float64))
    inputs = [copy(x).requires_grad_() for x in inputs]
    if not any(y.requires_grad for y in tree_leaves(g(*inputs))):
        pytest.skip("has no gradient")
    assert torch.autograd.gradcheck(g, inputs, fast_mode=EFFORT == "ci" or sum(x.numel() for x in inputs) > 500)


@every_op
def test_second_derivative(op):
    """Right, or refused by a RuntimeError that says what cannot be done."""
    for sample in few(op, torch.float64, 4):
        g, inputs = closed(getattr(ops, op), sample)
        inputs = [copy(x).requires_grad_() for x in inputs]
        if not any(y.requires_grad for y in tree_leaves(g(*inputs))):
            pytest.skip("has no gradient")
        refusal = "twice"
        try:
            assert torch.autograd.gradgradcheck(g, inputs, fast_mode=True)
        except GradcheckError:
            raise
        except RuntimeError as raised:
            refusal = str(raised)
        assert "twice" in refusal or op in refusal, f"{op} {sample}: not a clear refusal: {refusal}"


def eps(x: Tensor) -> float:
    return torch.finfo(x.dtype).eps if x.is_floating_point() else 0.0


def compare_compiled(op: str, sample: testing.Sample, backend: str) -> None:
    torch._dynamo.reset()
    function = torch.compile(getattr(ops, op), fullgraph=True, backend=backend)
    for backward in (False, True):
        actual, expected = evaluate(function, sample, backward=backward), evaluate(getattr(ops, op), sample, backward=backward)
        for a, e in zip(actual.all(), expected.all(), strict=True):
            assert (a is None) == (e is None)
            if a is not None:
                assert a.dtype == e.dtype
                assert error(a, e) <= 8 * eps(a) * scale(e), f"{op} {sample} through {backend}"


@pytest.mark.drawn(1 / 2)
@every_op
def test_compile_fullgraph(op):
    for sample in few(op, torch.float32, 3):
        compare_compiled(op, sample, "aot_eager")


@pytest.mark.parametrize("op", OPS if EFFORT == "full" else OPS[:1])
def test_compile_inductor(op):
    compare_compiled(op, few(op, torch.float32, 2)[0], "inductor")


@pytest.mark.drawn(1 / 2)
@every_op
def test_compile_dynamic_shapes(op):
    torch._dynamo.reset()
    function = torch.compile(getattr(ops, op), fullgraph=True, backend="aot_eager", dynamic=True)
    sample = few(op, torch.float32, 1)[0]
    for a, e in zip(evaluate(function, sample).all(), evaluate(getattr(ops, op), sample).all(), strict=True):
        assert error(a, e) <= 8 * eps(a) * scale(e)


@every_op
def test_export_holds_only_aten(op):
    for sample in few(op, torch.float32, 3):
        g, inputs = closed(getattr(ops, op), sample)

        class Module(torch.nn.Module):
            def forward(self, *inputs, g=g):
                return g(*inputs)

        if any(x.numel() == 0 for x in inputs):
            continue  # torch.export specialises or refuses empty batches
        program = torch.export.export(Module(), tuple(copy(x) for x in inputs))
        targets = {n.target for n in program.graph.nodes if n.op == "call_function"}
        foreign = [t for t in targets if isinstance(t, torch._ops.OpOverload) and t.namespace != "aten"]
        assert not foreign, f"{op} {sample}: {foreign}"


@every_op
def test_flops_equal_the_references(op):
    for sample in few(op, torch.float32, 6):
        for backward in (False, True):
            with FlopCounterMode(display=False) as actual:
                evaluate(getattr(ops, op), sample, backward=backward)
            with reference_only(), FlopCounterMode(display=False) as expected:
                evaluate(getattr(ops, op), sample, backward=backward)
            assert actual.get_total_flops() == expected.get_total_flops(), f"{op} {sample}, backward {backward}"


def grad(g, inputs):
    total = lambda *xs: sum(y.square().sum() for y in tree_leaves(g(*xs)))  # noqa: E731
    return torch.func.grad(total, tuple(range(len(inputs))))(*inputs)


def vmap(g, inputs):
    return torch.func.vmap(g)(*[torch.stack([x, 2 * x]) for x in inputs])


def jvp(g, inputs):
    return torch.func.jvp(g, tuple(inputs), tuple(torch.ones_like(x) for x in inputs))


def forward_mode(g, inputs):
    with torch.autograd.forward_ad.dual_level():
        duals = [torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)) for x in inputs]
        return [tuple(torch.autograd.forward_ad.unpack_dual(y)) for y in tree_leaves(g(*duals))]


TRANSFORMS = {"grad": grad, "vmap": vmap, "jvp": jvp, "forward mode": forward_mode}


@compiled
@every_op
def test_transforms_fall_to_the_reference(op):
    """torch.func.grad, vmap and forward-mode AD: the reference's results, and no kernel runs."""
    for sample in few(op, torch.float64, 3):
        g, inputs = closed(getattr(ops, op), sample)
        for name, transform in TRANSFORMS.items():
            before = _backend._C.kernel_calls()
            try:
                with reference_only():
                    expected = transform(g, inputs)
            except (RuntimeError, NotImplementedError) as refusal:  # what eager PyTorch refuses is refused here too
                with pytest.raises(type(refusal)):
                    transform(g, inputs)
                continue
            actual = transform(g, inputs)
            assert _backend._C.kernel_calls() == before, f"{op} {sample}: a kernel ran under {name}"
            for a, e in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
                assert (a is None) == (e is None)  # a tangent
                same = a is None or torch.allclose(a, e, rtol=1e-12, atol=1e-14, equal_nan=True)
                assert same, f"{op} {sample} under {name}"


@every_op
def test_compiled_transforms(op):
    """torch.func.grad inside a compiled function: the numbers of the uncompiled one (a kernel would give silent zeros there)."""
    sample = next(iter(few(op, torch.float64, 1)))
    g, inputs = closed(getattr(ops, op), sample)
    try:
        expected = grad(g, inputs)
    except RuntimeError:  # nothing here has a gradient
        return
    actual = torch.compile(lambda *xs: grad(g, xs), fullgraph=True, backend="aot_eager")(*inputs)
    torch.compiler.reset()
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12, equal_nan=True)


@every_op
@every_dtype
def test_memory_is_written_before_it_is_read(op, dtype, kernel_set):
    """Deterministic mode fills torch.empty with NaN: an output or scratch element left unwritten shows."""
    for sample in samples_of(op, dtype):
        expected = evaluate(getattr(ops, op), sample)
        torch.use_deterministic_algorithms(True, warn_only=True)
        actual = evaluate(getattr(ops, op), sample)
        torch.use_deterministic_algorithms(False)
        for a, e in zip(actual.all(), expected.all(), strict=True):
            assert same_bits(a, e), f"{op} {sample}"


@pytest.mark.drawn(1 / 3)
@compiled
@every_op
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
def test_bitwise_determinism(op, dtype, kernel_set):
    """Run to run and for 1 or 2 threads, forward and backward, at sizes that do run in parallel."""
    if dtype == torch.bfloat16 and kernel_set != kernel_sets()[-1] and EFFORT == "ci":
        pytest.skip("bfloat16 on the best kernel set alone, unless under full effort")
    for sample in [*testing.LARGE[op](dtype, CPU)] if op in testing.LARGE else samples_of(op, dtype):
        expected = None
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for _ in range(count(1, 25)):
                # The first input's gradient: for the others an op may take its reference, whose promise is PyTorch's.
                result = evaluate(getattr(ops, op), sample, [0])
                expected = expected or result
                for a, e in zip(result.all(), expected.all(), strict=True):
                    assert same_bits(a, e), f"{op} {sample}: {threads} threads"


@every_op
def test_never_returns_its_input(op):
    for sample in samples_of(op, torch.float32):
        tensors = [x for x in tree_leaves((sample.args, sample.kwargs)) if isinstance(x, Tensor) and x.numel()]
        storages = {x.untyped_storage().data_ptr() for x in tensors}
        for context in (torch.no_grad(), reference_only()):
            with context:
                outputs = getattr(ops, op)(*sample.args, **sample.kwargs)
            for y in tree_leaves(outputs):
                assert not any(y is x for x in tensors), f"{op} {sample}"
                assert y.numel() == 0 or y.untyped_storage().data_ptr() not in storages, f"{op} {sample}"


@every_op
def test_autocast(op):
    """The reference's dtype under autocast, the rule with autocast's eps, gradients in the dtype of their inputs."""
    function = getattr(ops, op)
    for sample in samples_of(op, torch.float32):

        def run(call, name=sample.name):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return evaluate(function, testing.Sample(name, *call)).all()

        call = (sample.args, sample.kwargs)
        actual = run(call)
        names = [f"grads[{i}]" for i in range(len(actual))]  # every tensor inherits bfloat16's rounding
        with reference_only():
            judge(f"{op} {sample} under autocast", names, actual, run, call, torch.bfloat16)


@pytest.mark.skipif(EFFORT != "full", reason="takes 5 GB: SEGFAST_EFFORT=full")
@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last), ids=("contiguous", "channels_last"))
def test_more_than_2_to_the_31_elements(layout):
    x = torch.empty(1, 4, 32768, 16400, dtype=torch.int8, memory_format=layout)
    assert x.numel() > 2**31
    for c in range(4):
        x[0, c] = c
    x[0, :, -1, -1] += 10
    y = ops.channel_shuffle(x, 2)
    for c, source in enumerate((0, 2, 1, 3)):
        assert y[0, c, 0, 0] == source
        assert y[0, c, -1, -1] == source + 10
        assert y[0, c, 16384, 8200] == source
