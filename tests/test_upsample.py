"""The heads at image size against F.interpolate and the plain losses, written out: ratios, ties, infinities, labels, memory."""

from __future__ import annotations

import math
import subprocess
import sys
from fractions import Fraction

import numpy
import pytest
import torch
import torch.nn.functional as F
from conftest import count
from drawing import each_drawn
from harness import check_rule

from segfast import _backend, distill, nn, ops, testing

compiled = pytest.mark.skipif("cpu" not in _backend.table["upsample_argmax"], reason="no compiled kernels")
CPU = torch.device("cpu")


def randn(*size, seed=0, dtype=torch.float64, layout="contiguous"):
    return 2 * testing.tensor(*size, dtype=dtype, device=CPU, layout=layout, seed=seed)


def labels(*size, classes, ignored=0.2, ignore_index=255, seed=0):
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, classes, size, generator=generator)
    return torch.where(torch.rand(size, generator=generator) < ignored, ignore_index, target)


def resize(x, size, align_corners=False):
    return F.interpolate(x, size=size, mode="bilinear", align_corners=align_corners)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12, equal_nan=True)


def sizes(integer, choice):
    """Logits and output of any ratio: larger, smaller, the same, one row or column."""
    h, w = integer(1, 9), integer(1, 9)
    to = choice(([integer(1, 40), integer(1, 40)], [8 * h, 8 * w], [h, 3 * w], [1, 1]))
    return (integer(1, 2), integer(1, 24), h, w), tuple(to), choice((False, True)), choice(testing.LAYOUTS)


def test_argmax_is_eagers(kernel_set):
    def check(integer, choice):
        size, to, align_corners, layout = sizes(integer, choice)
        x = randn(*size, seed=integer(0, 99), layout=layout)
        expected = resize(x, to, align_corners)
        classes, probability = ops.upsample_argmax(x, to, align_corners, return_probability=True)
        assert classes.dtype == torch.uint8
        assert torch.equal(classes.long(), expected.argmax(1))
        close(probability, expected.softmax(1).amax(1))

    each_drawn(count(25, 400), check)


def test_cross_entropy_is_eagers(kernel_set):
    def check(integer, choice):
        size, to, align_corners, layout = sizes(integer, choice)
        x = randn(*size, seed=integer(0, 99), layout=layout).requires_grad_()
        target = labels(size[0], *to, classes=size[1], seed=integer(0, 99))
        target[0, 0, 0] = 0  # a mean over no pixel at all is NaN in eager
        options = {"reduction": choice(("mean", "sum", "none")), "label_smoothing": choice((0.0, 0.2))}
        if choice((False, True)):
            options["weight"] = 0.1 + torch.rand(size[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        actual = ops.upsample_cross_entropy(x, target, align_corners=align_corners, **options)
        expected = F.cross_entropy(resize(x, to, align_corners), target, ignore_index=255, **options)
        close(actual, expected)
        upstream = randn(*expected.shape, seed=1) if expected.dim() else torch.tensor(1.5, dtype=torch.float64)
        close(*(torch.autograd.grad(y, x, upstream)[0] for y in (actual, expected)))

    each_drawn(count(25, 400), check)


def test_pixelwise_kl_is_eagers(kernel_set):
    def check(integer, choice):
        size, to, align_corners, layout = sizes(integer, choice)
        student = randn(*size, seed=integer(0, 99), layout=layout).requires_grad_()
        teacher = randn(*size[:2], integer(1, 12), integer(1, 12), seed=integer(100, 199), layout=choice(testing.LAYOUTS))
        temperature, reduction = choice((1.0, 3.0)), choice(("mean", "sum", "batchmean", "none"))
        target = labels(size[0], *to, classes=size[1], seed=integer(0, 99))
        options = {"temperature": temperature, "target": target, "reduction": reduction}
        actual = ops.upsample_pixelwise_kl(student, teacher, to, align_corners=align_corners, **options)
        log_s, log_t = ((resize(x, to, align_corners) / temperature).log_softmax(1) for x in (student, teacher))
        each = temperature**2 * (log_t.exp() * (log_t - log_s)).sum(1) * (target != 255)
        number = {"none": 1, "sum": 1, "batchmean": size[0], "mean": (target != 255).sum().clamp(min=1)}[reduction]
        expected = each if reduction == "none" else each.sum() / number
        close(actual, expected)
        upstream = randn(*expected.shape, seed=1) if expected.dim() else torch.tensor(1.5, dtype=torch.float64)
        close(*(torch.autograd.grad(y, student, upstream)[0] for y in (actual, expected)))

    each_drawn(count(25, 400), check)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("classes", [2, 3, 19, 150, 1000])
def test_class_counts(classes, layout, kernel_set):
    for dtype in (torch.float32, torch.bfloat16):
        x = randn(1, classes, 3, 5, dtype=dtype, layout=layout)
        integer = torch.uint8 if classes <= 256 else torch.int32
        check_rule("upsample_argmax", testing.Sample(f"{classes}", (x, (11, 18)), {"dtype": integer}), [])
        check_rule("upsample_cross_entropy", testing.Sample(f"{classes}", (x, labels(1, 11, 18, classes=classes))), [0])
        teacher = randn(1, classes, 6, 4, dtype=dtype, layout=layout, seed=1)
        check_rule("upsample_pixelwise_kl", testing.Sample(f"{classes}", (x, teacher, (11, 18))), [0])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_the_first_of_equal_classes(dtype, kernel_set):
    x = torch.zeros(1, 9, 3, 4)
    assert not ops.upsample_argmax(x, (24, 32), dtype=dtype).any()
    x[:, 4:7] = randn(1, 1, 3, 4, dtype=torch.float32).abs() + 1
    classes = ops.upsample_argmax(x, (24, 32), dtype=dtype)
    assert classes.dtype == dtype
    assert (classes == 4).all()
    x[:, 8] = math.inf
    assert (ops.upsample_argmax(x, (24, 32), dtype=dtype) == 8).all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("size", [(5, 6), (10, 12), (20, 3), (13, 17), (35, 7), (6, 40)])
def test_nan_and_infinity_go_where_eagers_go(size, layout, kernel_set):
    target = labels(2, *size, classes=4)
    for values in ([math.nan], [math.inf], [-math.inf], [math.inf, -math.inf], [3e38, -2e38], [math.nan, math.inf]):
        x = randn(2, 4, 5, 6, dtype=torch.float32, layout=layout)
        for k, value in enumerate(values):
            x[0, 1, 2, 3] = value
            x[1, k, 4, 5 - k] = x[1, 3, 0, k] = value
        full = resize(x, size)
        assert torch.equal(ops.upsample_argmax(x, size).long(), full.argmax(1)), values
        results = []
        for loss in (
            lambda x: ops.upsample_cross_entropy(x, target, reduction="none"),
            lambda x: F.cross_entropy(resize(x, size), target, ignore_index=255, reduction="none"),
        ):
            leaf = x.clone().requires_grad_()
            value = loss(leaf)
            results.append((value.detach(), torch.autograd.grad(value[0, 0].sum() + value[1].sum(), leaf)[0]))
        for a, e in zip(*results, strict=True):
            torch.testing.assert_close(a, e, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_that_is_infinite(dtype, kernel_set):
    """Where a pixel's share of a row is exactly 0, times infinity NaN, is a matter of rounding: of eager's."""
    for align_corners in (False, True):
        for n, m in [(9, 65), (10, 70), (16, 80), (5, 13), (7, 97), (12, 5)]:
            x = randn(1, 3, n, m, dtype=dtype)
            x[:, 1, n // 2] = x[:, 0, :, m - 1] = -math.inf
            for size in [(65, 70), (80, 13), (n, 2 * m)]:
                full = resize(x, size, align_corners)
                assert torch.equal(ops.upsample_argmax(x, size, align_corners).long(), full.argmax(1)), (n, m, size)


@pytest.mark.parametrize("dtype, index", [(torch.uint8, 256), (torch.uint8, -1), (torch.uint8, -100), (torch.int32, 2**32)])
def test_an_ignored_label_that_the_targets_dtype_lacks(dtype, index, kernel_set):
    x, teacher, target = randn(1, 3, 2, 2), randn(1, 3, 2, 2, seed=1), torch.zeros(1, 4, 4, dtype=dtype)
    for function in (
        lambda t: ops.upsample_pixelwise_kl(x, teacher, 4, target=t, ignore_index=index),
        lambda t: ops.pixelwise_kl(resize(x, (4, 4)), resize(teacher, (4, 4)), target=t, ignore_index=index),
        lambda t: ops.upsample_cross_entropy(x, t, ignore_index=index),
    ):
        close(function(target), function(target.long()))
        assert function(target) > 0.01


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("weight, smoothing", [((0.0, 0, 0), 0.1), ((1.0, -1, 0), 0.5), ((0, 1, 2), 1e-46)])
def test_weights_that_vanish(weight, smoothing, reduction, kernel_set):
    options = {"weight": torch.tensor(weight, dtype=torch.float64), "label_smoothing": smoothing, "reduction": reduction}
    x, target = randn(2, 3, 3, 4), labels(2, 7, 9, classes=3)
    for dtype in (torch.float32, torch.float64):
        options["weight"] = options["weight"].to(dtype)
        leaf, exact = x.to(dtype).requires_grad_(), x.double().requires_grad_()
        ops.upsample_cross_entropy(leaf, target, **options).sum().backward()
        with_double = options | {"weight": options["weight"].double()}
        F.cross_entropy(resize(exact, (7, 9)), target, ignore_index=255, **with_double).sum().backward()
        torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ohem", [{}, {"ohem_threshold": 0.5, "ohem_min_kept": 3}])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_pixel_counts(reduction, ohem, kernel_set):
    x = randn(2, 5, 3, 4).requires_grad_()
    loss = ops.upsample_cross_entropy(x, torch.full((2, 9, 10), 7), ignore_index=7, reduction=reduction, **ohem)
    assert not loss.any()
    assert not torch.autograd.grad(loss.sum(), x)[0].any()


def test_empty_batch(kernel_set):
    x, target = randn(0, 5, 3, 4).requires_grad_(), torch.zeros(0, 9, 10, dtype=torch.long)
    assert ops.upsample_argmax(x, (9, 10)).shape == (0, 9, 10)
    for reduction, value in (("mean", 0.0), ("sum", 0.0)):
        loss = ops.upsample_cross_entropy(x, target, reduction=reduction, ohem_threshold=0.5, ohem_min_kept=3)
        assert loss.item() == value
        assert torch.autograd.grad(loss, x)[0].shape == x.shape
    assert ops.upsample_pixelwise_kl(x, x.detach(), (9, 10)).isnan()  # as pixelwise_kl's


def hard(x, target, threshold, min_kept):
    """The pixels of the batch that count, from the sorted probabilities of their labels."""
    probability = x.softmax(1).gather(1, target.where(target != 255, 0).unsqueeze(1)).squeeze(1)
    valid = target != 255
    ranked = probability[valid].sort().values
    kept = valid & (probability < threshold)
    if kept.sum() < min_kept and len(ranked):
        kept = valid & (probability <= ranked[min(min_kept, len(ranked)) - 1])
    return kept


@pytest.mark.parametrize("threshold, min_kept", [(0.7, 0), (0.05, 0), (0.05, 100), (0.9, 50), (0.01, 10**6), (1e-9, 0), (1.0, 0)])
def test_hard_pixels(threshold, min_kept, kernel_set):
    x, target = randn(2, 6, 5, 7).requires_grad_(), labels(2, 19, 23, classes=6)
    weight = torch.rand(6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    full = resize(x, (19, 23))
    kept = hard(full.detach(), target, threshold, min_kept)
    each = F.cross_entropy(full, target, weight, ignore_index=255, reduction="none")[kept]
    for reduction, expected in {
        "sum": each.sum(),
        "mean": each.sum() / weight[target[kept]].sum() if kept.any() else 0 * x.sum(),
    }.items():
        options = {"ohem_threshold": threshold, "ohem_min_kept": min_kept, "reduction": reduction}
        actual = ops.upsample_cross_entropy(x, target, weight=weight, **options)
        close(actual, expected)
        close(*(torch.autograd.grad(y, x, retain_graph=True)[0] for y in (actual, expected)))
    none = ops.upsample_cross_entropy(x, target, weight=weight, **{**options, "reduction": "none"})
    close(none[kept], each)
    assert not none[~kept].any()
    upstream = randn(*none.shape, seed=3)
    close(torch.autograd.grad(none, x, upstream)[0], torch.autograd.grad(each, x, upstream[kept])[0])


def test_a_pixel_that_is_not_a_number_is_hard(kernel_set):
    x, target = randn(1, 3, 2, 2), torch.zeros(1, 4, 4, dtype=torch.long)
    x[0, 0] = 50
    assert ops.upsample_cross_entropy(x, target, ohem_threshold=0.5) == 0
    x[0, 1, 0, 0] = math.nan
    assert ops.upsample_cross_entropy(x, target, ohem_threshold=0.5).isnan()
    assert ops.upsample_cross_entropy(x, target, ohem_threshold=0.5, ohem_min_kept=1).isnan()


@compiled
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.int16])
def test_a_label_outside_the_classes(dtype, kernel_set):
    x, target = randn(2, 5, 3, 4), labels(2, 9, 10, classes=5).to(dtype)
    wrong = 5 if dtype == torch.uint8 else -1
    target[1, 6, 3], target[1, 8, 9] = wrong, 77
    for call in (x, x.clone().requires_grad_()):
        with pytest.raises(RuntimeError, match=rf"0 to 4 or 255, got {wrong} at \(n, y, x\) = \(1, 6, 3\)"):
            ops.upsample_cross_entropy(call, target)


def test_the_backward_runs_again_and_not_twice_over():
    x, target = randn(1, 4, 3, 3).requires_grad_(), labels(1, 9, 9, classes=4)
    for loss in (
        3 * ops.upsample_cross_entropy(x, target),
        3 * ops.upsample_pixelwise_kl(x, randn(1, 4, 2, 2, seed=1), 9),
        ops.upsample_cross_entropy(x, target, reduction="none").sum(),
    ):
        first = torch.autograd.grad(loss, x, retain_graph=True)[0].clone()
        close(torch.autograd.grad(loss, x, retain_graph=True)[0], first)
        if "cpu" in _backend.table["upsample_cross_entropy"]:
            (grad,) = torch.autograd.grad(loss, x, create_graph=True)
            with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
                grad.sum().backward()


@compiled
def test_what_is_kept_is_of_the_logits_size():
    x, target = randn(2, 19, 8, 8, dtype=torch.float32).requires_grad_(), labels(2, 64, 64, classes=19)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.upsample_cross_entropy(x, target, ohem_threshold=0.7)
        ops.upsample_pixelwise_kl(x, randn(2, 19, 16, 16, dtype=torch.float32, seed=1), 64)
    assert sum(t.numel() for t in kept) <= 2 * x.numel()


MEMORY = """
import torch
import torch.nn.functional as F
from segfast import ops

def kilobytes(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))

def extra(call):
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts again from what is held now
    before = kilobytes("VmRSS")
    call()
    return kilobytes("VmHWM") - before

torch.set_num_threads(2)
x, target = torch.randn(2, 19, 64, 128, requires_grad=True), torch.zeros(2, 512, 1024, dtype=torch.long)
teacher = torch.randn(2, 19, 64, 128)
resize = lambda x: F.interpolate(x, size=(512, 1024), mode="bilinear")
for ours, eager in (
    (lambda: ops.upsample_argmax(x, (512, 1024)), lambda: resize(x).argmax(1)),
    (lambda: ops.upsample_cross_entropy(x, target).backward(), lambda: F.cross_entropy(resize(x), target).backward()),
    (
        lambda: ops.upsample_pixelwise_kl(x, teacher, (512, 1024)).backward(),
        lambda: F.kl_div(resize(x).log_softmax(1), resize(teacher).softmax(1), reduction="batchmean").backward(),
    ),
):
    ours()
    print(extra(ours) / extra(eager))
"""


@compiled
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_extra_memory_is_a_tenth_of_eagers():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", MEMORY], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ratios = [float(line) for line in done.stdout.split()]
    assert len(ratios) == 3
    assert max(ratios) < 0.1, ratios


def test_modules():
    x, target = randn(2, 5, 3, 4), labels(2, 9, 10, classes=5, ignore_index=9)
    weight = torch.rand(5, dtype=torch.float64)
    options = {"ignore_index": 9, "label_smoothing": 0.1, "ohem_threshold": 0.6, "ohem_min_kept": 5, "align_corners": True}
    module = nn.UpsampleCrossEntropy(weight=weight, **options)
    close(module(x, target), ops.upsample_cross_entropy(x, target, weight=weight, **options))
    assert list(module.state_dict()) == ["weight"]
    assert "ohem_threshold=0.6" in repr(module)
    teacher = randn(2, 5, 6, 7, seed=1)
    pixel_wise = distill.PixelWiseLoss(temperature=2.0, size=(9, 10), ignore_index=9)
    expected = ops.upsample_pixelwise_kl(x, teacher, (9, 10), temperature=2.0, target=target, ignore_index=9)
    close(pixel_wise(x, teacher, target), expected)
    assert "size=(9, 10)" in repr(pixel_wise)
    full = (resize(v, (9, 10)) for v in (x, teacher))
    close(distill.PixelWiseLoss(preset="official", size=(9, 10))(x, teacher), distill.PixelWiseLoss(preset="official")(*full))


LOGITS = torch.zeros(2, 3, 4, 5)
TARGET = torch.zeros(2, 8, 8, dtype=torch.long)
BAD = {
    "argmax rank": (ValueError, ops.upsample_argmax, (LOGITS[0], (8, 8)), {}),
    "argmax no classes": (ValueError, ops.upsample_argmax, (LOGITS[:, :0], (8, 8)), {}),
    "argmax no pixels": (ValueError, ops.upsample_argmax, (LOGITS[..., :0], (8, 8)), {}),
    "argmax size 0": (ValueError, ops.upsample_argmax, (LOGITS, (0, 8)), {}),
    "argmax size of three": (ValueError, ops.upsample_argmax, (LOGITS, (1, 8, 8)), {}),
    "argmax size of floats": (ValueError, ops.upsample_argmax, (LOGITS, (8.0, 8)), {}),
    "argmax integer": (TypeError, ops.upsample_argmax, (LOGITS.int(), (8, 8)), {}),
    "argmax dtype": (ValueError, ops.upsample_argmax, (LOGITS, (8, 8)), {"dtype": torch.float32}),
    "argmax 257 classes": (ValueError, ops.upsample_argmax, (torch.zeros(1, 257, 2, 2), (8, 8)), {}),
    "cross-entropy rank": (ValueError, ops.upsample_cross_entropy, (LOGITS[0], TARGET), {}),
    "cross-entropy batch": (ValueError, ops.upsample_cross_entropy, (LOGITS, TARGET[:1]), {}),
    "cross-entropy target's rank": (ValueError, ops.upsample_cross_entropy, (LOGITS, TARGET[:, None]), {}),
    "cross-entropy no pixels": (ValueError, ops.upsample_cross_entropy, (LOGITS, TARGET[:, :0]), {}),
    "cross-entropy float target": (TypeError, ops.upsample_cross_entropy, (LOGITS, TARGET.float()), {}),
    "cross-entropy device": (ValueError, ops.upsample_cross_entropy, (LOGITS, TARGET.to("meta")), {}),
    "cross-entropy weight": (ValueError, ops.upsample_cross_entropy, (LOGITS, TARGET), {"weight": torch.ones(4)}),
    "cross-entropy int weight": (TypeError, ops.upsample_cross_entropy, (LOGITS, TARGET), {"weight": torch.ones(3).int()}),
    "cross-entropy smoothing": (ValueError, ops.upsample_cross_entropy, (LOGITS, TARGET), {"label_smoothing": 1.1}),
    "cross-entropy threshold": (ValueError, ops.upsample_cross_entropy, (LOGITS, TARGET), {"ohem_threshold": 0.0}),
    "cross-entropy nan": (ValueError, ops.upsample_cross_entropy, (LOGITS, TARGET), {"ohem_threshold": math.nan}),
    "cross-entropy min_kept": (ValueError, ops.upsample_cross_entropy, (LOGITS, TARGET), {"ohem_min_kept": 1}),
    "cross-entropy kept": (
        ValueError,
        ops.upsample_cross_entropy,
        (LOGITS, TARGET),
        {"ohem_threshold": 0.5, "ohem_min_kept": 2.5},
    ),
    "cross-entropy list": (TypeError, ops.upsample_cross_entropy, (LOGITS, TARGET), {"weight": [1.0, 1.0, 1.0]}),
    "cross-entropy ignored": (TypeError, ops.upsample_cross_entropy, (LOGITS, TARGET), {"ignore_index": 255.5}),
    "cross-entropy corners": (TypeError, ops.upsample_cross_entropy, (LOGITS, TARGET), {"align_corners": "no"}),
    "kl ignored": (TypeError, ops.upsample_pixelwise_kl, (LOGITS, LOGITS, 8), {"target": TARGET, "ignore_index": None}),
    "argmax corners": (TypeError, ops.upsample_argmax, (LOGITS, 8, "no"), {}),
    "argmax numpy float": (ValueError, ops.upsample_argmax, (LOGITS, numpy.float32(8.7)), {}),
    "argmax fraction": (ValueError, ops.upsample_argmax, (LOGITS, (Fraction(17, 2), 8)), {}),
    "argmax true": (ValueError, ops.upsample_argmax, (LOGITS, True), {}),
    "argmax array": (ValueError, ops.upsample_argmax, (LOGITS, numpy.array([8, 8])), {}),
    "argmax text": (ValueError, ops.upsample_argmax, (LOGITS, b"8"), {}),
    "cross-entropy reduction": (ValueError, ops.upsample_cross_entropy, (LOGITS, TARGET), {"reduction": "batchmean"}),
    "kl classes": (ValueError, ops.upsample_pixelwise_kl, (LOGITS, LOGITS[:, :2], 8), {}),
    "kl batch": (ValueError, ops.upsample_pixelwise_kl, (LOGITS, LOGITS[:1], 8), {}),
    "kl size": (ValueError, ops.upsample_pixelwise_kl, (LOGITS, LOGITS, 0), {}),
    "kl temperature": (ValueError, ops.upsample_pixelwise_kl, (LOGITS, LOGITS, 8), {"temperature": 0.0}),
    "kl target": (ValueError, ops.upsample_pixelwise_kl, (LOGITS, LOGITS, 8), {"target": TARGET[:, :4]}),
    "kl mask": (TypeError, ops.upsample_pixelwise_kl, (LOGITS, LOGITS, 8), {"mask": TARGET}),
    "kl reduction": (ValueError, ops.upsample_pixelwise_kl, (LOGITS, LOGITS, 8), {"reduction": "max"}),
    "module": (ValueError, nn.UpsampleCrossEntropy, (), {"label_smoothing": -1}),
    "module weight": (TypeError, nn.UpsampleCrossEntropy, (), {"weight": torch.ones(3).int()}),
    "module size": (ValueError, distill.PixelWiseLoss, (), {"size": (0, 3)}),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    kind, function, args, options = BAD[case]
    before = _backend._C.kernel_calls() if _backend._C else None
    with pytest.raises(kind, match=r"(upsample_\w+|UpsampleCrossEntropy|PixelWiseLoss): want .*, got "):
        function(*args, **options)
    assert before is None or _backend._C.kernel_calls() == before


def test_sizes_that_are_taken():
    want = ops.upsample_argmax(LOGITS, (8, 9))
    for size in (torch.Size([8, 9]), [8, 9], (numpy.int64(8), numpy.uint8(9))):
        assert torch.equal(ops.upsample_argmax(LOGITS, size), want)
    traced = torch.jit.trace(lambda x: ops.upsample_argmax(x, x.shape[2:]), (LOGITS,), check_trace=False)
    assert traced(LOGITS).shape == (2, 4, 5)
