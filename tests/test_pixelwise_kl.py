"""pixelwise_kl and PixelWiseLoss: the formulas written out, masks, temperature, class counts, dtypes, memory, refusals."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from harness import DTYPES, check_rule, copy, reference_only

from segfast import _backend, distill, ops, testing

compiled = pytest.mark.skipif("cpu" not in _backend.table["pixelwise_kl"], reason="no compiled kernels")


def randn(*size, seed=0, dtype=torch.float64):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def written_out(student, teacher, temperature=1.0):
    """T^2 sum over c of p_T (log p_T - log p_S), pixel by pixel, with probabilities as plain ratios."""
    n, _, h, w = student.shape
    loss = torch.zeros(n, h, w, dtype=torch.float64)
    for i in range(n):
        for y in range(h):
            for x in range(w):
                s, t = (logits[i, :, y, x].exp() for logits in (student / temperature, teacher / temperature))
                p_s, p_t = s / s.sum(), t / t.sum()
                loss[i, y, x] = temperature**2 * sum(p * (p / q).log() for p, q in zip(p_t, p_s))
    return loss


def official(student, teacher):
    """The released CriterionPixelWise: cross-entropy with the teacher's softmax, / W / H, summed over images."""
    c, h, w = student.shape[1:]
    rows_s, rows_t = (x.permute(0, 2, 3, 1).reshape(-1, c) for x in (student, teacher))
    return (-F.softmax(rows_t, dim=1) * F.log_softmax(rows_s, dim=1)).sum() / w / h


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("temperature", [1.0, 4.0, 0.7])
def test_the_formula(temperature, layout, kernel_set):
    size = {"dtype": torch.float64, "device": torch.device("cpu"), "layout": layout}
    student, teacher = testing.tensor(2, 5, 3, 4, seed=0, **size), testing.tensor(2, 5, 3, 4, seed=1, **size)
    want = written_out(student, teacher, temperature)
    for reduction, value in {"none": want, "sum": want.sum(), "mean": want.mean(), "batchmean": want.sum() / 2}.items():
        close(ops.pixelwise_kl(student, teacher, temperature=temperature, reduction=reduction), value)


def test_the_gradient_scales_with_temperature(kernel_set):
    """d loss / d student = T (p_S - p_T) a pixel: that is what T^2 before the divergence is for."""
    student, teacher = randn(1, 6, 2, 3).requires_grad_(), randn(1, 6, 2, 3, seed=1)
    for temperature in (1.0, 4.0, 10.0):
        (grad,) = torch.autograd.grad(ops.pixelwise_kl(student, teacher, temperature=temperature, reduction="sum"), student)
        close(grad, temperature * ((student / temperature).softmax(1) - (teacher / temperature).softmax(1)).detach())


def test_the_released_formula():
    student, teacher = randn(3, 7, 4, 5).requires_grad_(), randn(3, 7, 4, 5, seed=1)
    actual, expected = distill.PixelWiseLoss(preset="official")(student, teacher), official(student, teacher)
    close(actual, expected)
    close(*(torch.autograd.grad(loss, student)[0] for loss in (actual, expected)))


def test_the_paper_preset_and_its_options():
    student, teacher = randn(2, 4, 3, 3), randn(2, 4, 3, 3, seed=1)
    close(distill.PixelWiseLoss()(student, teacher), written_out(student, teacher).mean())
    target = torch.tensor([7, 1, 2]).repeat(2, 3, 1)
    module = distill.PixelWiseLoss(temperature=2.0, ignore_index=7, reduction="sum")
    close(module(student, teacher, target), written_out(student, teacher, 2.0)[target != 7].sum())
    assert "temperature=2.0" in repr(module)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_only_the_pixels_that_count(reduction, kernel_set):
    """target holds any value, -2^31 and 2^31 too; ignored pixels get exactly nothing, even where their logits are NaN."""
    student, teacher = randn(1, 5, 2, 4), randn(1, 5, 2, 4, seed=1)
    target = torch.tensor([[[0, 255, 2**31, -(2**31)], [255, 1000, -1, 255]]])
    mask = torch.tensor([[[True, True, False, True], [True, True, True, False]]])
    valid = (target != 255) & mask
    want = written_out(student, teacher)
    student = student.masked_fill(~valid.unsqueeze(1), math.nan).requires_grad_()
    loss = ops.pixelwise_kl(student, teacher, target=target, mask=mask, reduction=reduction)
    close(loss, {"mean": want[valid].mean(), "sum": want[valid].sum(), "none": torch.where(valid, want, 0.0)}[reduction])
    (grad,) = torch.autograd.grad(loss.sum(), student)
    assert not grad.permute(0, 2, 3, 1)[~valid].any()
    assert grad.permute(0, 2, 3, 1)[valid].all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_pixels_ignored(dtype, reduction, kernel_set):
    student = randn(2, 3, 4, 5, dtype=dtype).requires_grad_()
    target = torch.full((2, 4, 5), 9)
    loss = ops.pixelwise_kl(student, randn(2, 3, 4, 5, seed=1, dtype=dtype), target=target, ignore_index=9, reduction=reduction)
    assert not loss.any()
    assert not torch.autograd.grad(loss.sum(), student)[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("classes", [1, 2, 19, 150, 1000])
def test_class_counts(classes, layout, dtype, kernel_set):
    options = {"dtype": dtype, "device": torch.device("cpu"), "layout": layout}
    pair = tuple(3 * testing.tensor(1, classes, 5, 7, seed=seed, **options) for seed in (0, 1))
    check_rule("pixelwise_kl", testing.Sample(f"{classes} classes", pair, {"temperature": 2.0}), [0])


def test_the_teacher_gets_its_gradient():
    student, teacher = randn(2, 4, 3, 3).requires_grad_(), randn(2, 4, 3, 3, seed=1).requires_grad_()
    actual = torch.autograd.grad(ops.pixelwise_kl(student, teacher), (student, teacher))
    log_s, log_t = student.log_softmax(1), teacher.log_softmax(1)
    expected = torch.autograd.grad((log_t.exp() * (log_t - log_s)).sum(1).mean(), (student, teacher))
    for a, e in zip(actual, expected):
        close(a, e)


@pytest.mark.parametrize("teacher_dtype", DTYPES)
@pytest.mark.parametrize("student_dtype", DTYPES)
def test_unequal_dtypes(student_dtype, teacher_dtype, kernel_set):
    """The result is the one of the wider call, in float32 or, where one side is float64, float64."""
    student, teacher = randn(1, 4, 5, 5, dtype=student_dtype).requires_grad_(), randn(1, 4, 5, 5, seed=1, dtype=teacher_dtype)
    loss = ops.pixelwise_kl(student, teacher)
    wide = torch.float64 if torch.float64 in (student_dtype, teacher_dtype) else torch.float32
    assert loss.dtype == wide
    exact = written_out(student.detach().double(), teacher.double()).mean().item()
    assert abs(loss.item() - exact) <= 16 * torch.finfo(wide).eps * exact
    (grad,) = torch.autograd.grad(loss, student)
    want = (student.detach().double().softmax(1) - teacher.double().softmax(1)) / 25
    assert grad.dtype == student_dtype
    assert (grad.double() - want).abs().max() <= 2 * torch.finfo(student_dtype).eps * want.abs().max()


@compiled
def test_the_second_derivative_is_refused():
    student = randn(1, 4, 3, 3).requires_grad_()
    (grad,) = torch.autograd.grad(ops.pixelwise_kl(student, randn(1, 4, 3, 3, seed=1)), student, create_graph=True)
    with pytest.raises(RuntimeError, match="pixelwise_kl: cannot be differentiated twice"):
        grad.sum().backward()


def test_the_backward_runs_again():
    """What is kept for the backward is the gradient itself: a first pass must not scale it for the second."""
    student = randn(1, 4, 3, 3).requires_grad_()
    loss = 3 * ops.pixelwise_kl(student, randn(1, 4, 3, 3, seed=1))
    first = torch.autograd.grad(loss, student, retain_graph=True)[0].clone()
    close(torch.autograd.grad(loss, student, retain_graph=True)[0], first)
    close(torch.autograd.grad(loss, student)[0], first)


def test_nan_and_infinity_propagate(kernel_set):
    for bad in (math.nan, math.inf, -math.inf):
        for which in (0, 1):
            pair = [randn(1, 3, 2, 2, dtype=torch.float32), randn(1, 3, 2, 2, seed=1, dtype=torch.float32)]
            pair[which][0, 1, 0, 1] = bad
            results = []
            for context in (False, True):
                student = copy(pair[0]).requires_grad_()
                if context:
                    with reference_only():
                        loss = ops.pixelwise_kl(student, pair[1], reduction="none")
                else:
                    loss = ops.pixelwise_kl(student, pair[1], reduction="none")
                results.append((loss.detach(), torch.autograd.grad(loss[0, 0, 0] + loss[0, 1].sum(), student)[0]))
            for a, e in zip(*results):
                torch.testing.assert_close(a, e, equal_nan=True)


@compiled
def test_one_gradient_tensor_is_kept():
    student, teacher = randn(2, 19, 16, 16, dtype=torch.float32).requires_grad_(), randn(2, 19, 16, 16, dtype=torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        ops.pixelwise_kl(student, teacher)
    assert sum(x.numel() for x in kept if x.data_ptr() != student.data_ptr()) <= student.numel() + 1


MEMORY = """
import torch
from segfast import ops

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

torch.set_num_threads(2)
ops.pixelwise_kl(torch.randn(1, 19, 64, 64, requires_grad=True), torch.randn(1, 19, 64, 64)).backward()
student, teacher = torch.randn(2, 19, 512, 1024, requires_grad=True), torch.randn(2, 19, 512, 1024)
before = peak()
ops.pixelwise_kl(student, teacher).backward()
print((peak() - before) * 1024 / (student.numel() * 4))
"""


@compiled
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_extra_memory_is_one_gradient_tensor():
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert 0.9 < float(done.stdout) < 1.15


BAD = {
    "rank": (((2, 3, 4), (2, 3, 4)), {}),
    "no classes": (((1, 0, 2, 2), (1, 0, 2, 2)), {}),
    "unequal classes": (((1, 3, 2, 2), (1, 4, 2, 2)), {}),
    "unequal batches": (((2, 3, 2, 2), (1, 3, 2, 2)), {}),
    "temperature 0": (((1, 3, 2, 2),) * 2, {"temperature": 0.0}),
    "temperature -1": (((1, 3, 2, 2),) * 2, {"temperature": -1.0}),
    "temperature nan": (((1, 3, 2, 2),) * 2, {"temperature": math.nan}),
    "temperature inf": (((1, 3, 2, 2),) * 2, {"temperature": math.inf}),
    "reduction": (((1, 3, 2, 2),) * 2, {"reduction": "max"}),
    "target's shape": (((1, 3, 2, 2),) * 2, {"target": torch.zeros(1, 1, 2, 2, dtype=torch.long)}),
    "mask's shape": (((1, 3, 2, 2),) * 2, {"mask": torch.ones(2, 2, 2, dtype=torch.bool)}),
    "mask's device": (((1, 3, 2, 2),) * 2, {"mask": torch.ones(1, 2, 2, dtype=torch.bool, device="meta")}),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_values(case):
    sizes, options = BAD[case]
    with pytest.raises(ValueError, match=r"^pixelwise_kl: want .*, got "):
        ops.pixelwise_kl(*(torch.zeros(size) for size in sizes), **options)


def test_bad_types_and_module_options():
    x = torch.zeros(1, 3, 2, 2)
    for dtype in (torch.int64, torch.complex64, torch.bool):
        for pair in ((x, x.to(dtype)), (x.to(dtype), x)):
            with pytest.raises(TypeError, match=r"^pixelwise_kl: want .*, got "):
                ops.pixelwise_kl(*pair)
    for options in ({"target": torch.zeros(1, 2, 2)}, {"mask": torch.ones(1, 2, 2, dtype=torch.int64)}):
        with pytest.raises(TypeError, match=r"^pixelwise_kl: want .*, got "):
            ops.pixelwise_kl(x, x, **options)
    for options in ({"preset": "mine"}, {"preset": "official", "temperature": 2.0}, {"temperature": 0}, {"reduction": "max"}):
        with pytest.raises(ValueError, match=r"PixelWiseLoss: want .*, got "):
            distill.PixelWiseLoss(**options)
