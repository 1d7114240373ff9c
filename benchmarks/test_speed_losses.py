"""The distillation losses, forward and backward, against their formulas written out in eager PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from measure import figure, require_close, require_right
from torch import Tensor

from segfast.ops import pairwise_loss, pixelwise_kl
from segfast.ops.pairwise_loss import pairwise_loss_reference


def step(loss, student: Tensor, *rest, **options):
    def run() -> list[Tensor]:
        leaf = student.detach().requires_grad_()
        value = loss(leaf, *rest, **options)
        return [value.detach(), *torch.autograd.grad(value, leaf)]

    return run


def official_similarity(features: Tensor) -> Tensor:
    norm = features.square().sum(1, keepdim=True).sqrt() + 1e-8
    unit = (features / norm.detach()).flatten(2)
    return torch.einsum("icm,icn->imn", unit, unit)


def official_pairwise(student: Tensor, teacher: Tensor) -> Tensor:
    nodes = student.shape[-1] * student.shape[-2]
    return ((official_similarity(teacher) - official_similarity(student)).square() / nodes**2 / student.shape[0]).sum()


@pytest.mark.parametrize("teacher_channels", [128, 512])
def test_pairwise_loss(benchmark, teacher_channels):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 128, 64, 64), torch.randn(2, teacher_channels, 64, 64)
    options = {"node_size": 1, "detach_norm": True}
    ours, plain = step(pairwise_loss, student, teacher, **options), step(official_pairwise, student, teacher)
    exact = step(official_pairwise, student.double(), teacher.double())()
    require_right(ours(), plain(), exact)
    last = [t.contiguous(memory_format=torch.channels_last) for t in (student, teacher)]
    torch._dynamo.reset()
    peers = {
        "official": plain,
        "official, channels_last": step(official_pairwise, *last),
        "torch.compile": step(torch.compile(official_pairwise), student, teacher),
    }
    for label, peer in peers.items():
        require_close(label, peer(), exact)
    figure(benchmark, ours, peers, {"official": ["official", "official, channels_last"], "torch.compile": ["torch.compile"]})
    benchmark.extra_info["relative_error"] = near_the_teacher(teacher) if teacher_channels == 128 else {}


def near_the_teacher(teacher: Tensor) -> dict[str, float]:
    # where distillation converges to, and where a Gram form in float32 has nothing but rounding left
    teacher = teacher[:, :, :32, :32]
    rotation = torch.linalg.qr(torch.randn(128, 128, dtype=torch.float64))[0]
    errors = {}
    for scale in (1e-3, 1e-4):
        near = teacher.double() + scale * torch.randn(teacher.shape, dtype=torch.float64)
        for label, features in (("aligned", near), ("rotated", torch.einsum("cd,ndhw->nchw", rotation, near))):
            student = features.float()
            truth = float(pairwise_loss_reference(student.double(), teacher.double(), node_size=1))
            errors[f"{label}, noise {scale:g}"] = abs(float(pairwise_loss(student, teacher, node_size=1)) - truth) / truth
    return errors


def kl_div(student: Tensor, teacher: Tensor) -> Tensor:
    return F.kl_div(F.log_softmax(student, 1), F.softmax(teacher, 1), reduction="none").sum(1).mean()


def log_softmaxes(student: Tensor, teacher: Tensor) -> Tensor:
    s, t = student.log_softmax(1), teacher.log_softmax(1)
    return (t.exp() * (t - s)).sum(1).mean()


def pixelwise(benchmark, shape: tuple[int, ...], compiled: bool) -> None:
    torch.manual_seed(0)
    student, teacher = 3 * torch.randn(shape), 3 * torch.randn(shape)
    ours, plain = step(pixelwise_kl, student, teacher), step(log_softmaxes, student, teacher)
    exact = step(log_softmaxes, student.double(), teacher.double())()
    require_right(ours(), plain(), exact)
    last = [t.contiguous(memory_format=torch.channels_last) for t in (student, teacher)]
    peers = {}
    for label, formula in (("F.kl_div", kl_div), ("log_softmax", log_softmaxes)):
        peers[f"eager {label}"] = step(formula, student, teacher)
        peers[f"eager {label}, channels_last"] = step(formula, *last)
    against = {"eager": list(peers)}
    if compiled:
        torch._dynamo.reset()
        for label, formula in (("F.kl_div", kl_div), ("log_softmax", log_softmaxes)):
            peers[f"torch.compile {label}"] = step(torch.compile(formula), student, teacher)
        against["torch.compile"] = [label for label in peers if label.startswith("torch.compile")]
    for label, peer in peers.items():
        require_close(label, peer(), exact)
    del exact
    figure(benchmark, ours, peers, against)


@pytest.mark.parametrize("shape", [(2, 19, 512, 1024), (2, 150, 128, 128)], ids=lambda s: "x".join(map(str, s)))
def test_pixelwise_kl(benchmark, shape):
    pixelwise(benchmark, shape, compiled=True)


@pytest.mark.parametrize("classes", [2, 3, 7, 19, 33, 64, 100, 256, 1000])
def test_pixelwise_kl_classes(benchmark, classes):
    pixelwise(benchmark, (1, classes, 64, 64), compiled=False)
