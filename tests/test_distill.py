"""Distillation methods: each term against its formula written out, where its gradient goes, taps, masks, state, refusals."""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import EFFORT, count
from harness import judge, reference_only, same_bits
from torch import Tensor, nn

from segfast import distill, ops
from segfast.distill._method import valid_pixels
from segfast.distill._taps import Probe, Taps
from segfast.distill.overhaul import mean_negative
from segfast.models import create_model, list_models
from segfast.models._base import Output, SegmentationModel

CLASSES = 5
ALONE = ("pixel-wise", "pair-wise", "holistic", "overhaul", "adaptation", "kd", "channel-wise")


def block(in_channels, out_channels, stride, inplace=True):
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU(inplace)
    )


class Residual(nn.Module):
    """A residual block as ResNets have it: the activation works in place, after the sum."""

    def __init__(self, in_channels, out_channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.bn1(self.conv1(x))
        y += self.shortcut(x)
        return self.act(y)


class Tiny(SegmentationModel):
    """Two stages of any widths and strides, an auxiliary head on the first."""

    name = "tiny"
    min_size = 8

    def __init__(self, widths=(6, 8), strides=(2, 2), residual=False, classes=CLASSES):
        super().__init__()
        make = Residual if residual else block
        self.stage1, self.stage2 = make(3, widths[0], strides[0]), make(widths[0], widths[1], strides[1])
        self.fuse = nn.Sequential(nn.Conv2d(widths[1], widths[1], 1), nn.BatchNorm2d(widths[1]))
        self.classifier = nn.Conv2d(widths[1], classes, 1)
        self.aux = nn.Conv2d(widths[0], classes, 1)
        for m in self.modules():
            if isinstance(m, nn.BatchNorm2d):
                nn.init.uniform_(m.weight, 0.5, 1.5)
                nn.init.uniform_(m.bias, -0.5, 0.5)

    def outputs(self, images):
        one = self.stage1(images)
        two = self.stage2(one)
        fused = F.relu(self.fuse(two))
        return Output(self.classifier(fused), (self.aux(one),), {"stage1": one, "stage2": two, "pre_logits": fused})


class Foreign(nn.Module):
    """Somebody else's network: a dictionary, no features."""

    def __init__(self):
        super().__init__()
        self.body, self.head = block(3, 7, 4), nn.Conv2d(7, CLASSES, 1)

    def forward(self, images):
        logits = self.head(self.body(images))
        return {"out": F.interpolate(logits, images.shape[2:], mode="bilinear")}


def networks(seed=0, **teacher):
    torch.manual_seed(seed)
    return Tiny(), Tiny(**{"widths": (9, 12), "strides": (2, 1), **teacher})


def batch(n=2, size=(24, 32), seed=0, ignored=True):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 3, *size, generator=generator)
    target = torch.randint(0, CLASSES, (n, *size), generator=generator)
    if ignored:
        target[:, : size[0] // 3, : size[1] // 2] = 255
    return images, target


def method_of(name, student, teacher, images=None, **options):
    """A method ready to be called: its auto-encoder, if it has one, has seen the images."""
    if "adaptation" in name:
        options["adaptation"] = {"steps": 3, "lr": 0.01, **options.get("adaptation", {})}
    method = distill.create_method(name, student, teacher, **options)
    method.prepare([(batch()[0] if images is None else images,)])
    return method


def close(actual, expected, rtol=1e-5):
    torch.testing.assert_close(torch.as_tensor(actual).double(), torch.as_tensor(expected).double(), rtol=rtol, atol=1e-8)


def written_valid(target, size, ignore_index=255):
    """The label of a cell's middle pixel, cell by cell."""
    n, height, width = target.shape
    valid = torch.zeros(n, *size, dtype=torch.bool)
    for y in range(size[0]):
        for x in range(size[1]):
            row, column = int((y + 0.5) * height / size[0]), int((x + 0.5) * width / size[1])
            valid[:, y, x] = target[:, row, column] != ignore_index
    return valid


def outputs(student, teacher, images):
    """What the networks give in the states that a method runs them in, without the student's statistics changing."""
    frozen = copy.deepcopy(student)
    return frozen.forward_features(images), teacher.eval().forward_features(images)


def test_the_middle_pixel_says_whether_a_cell_counts():
    _, target = batch()
    for size in ((24, 32), (12, 16), (6, 11), (3, 5)):
        assert torch.equal(valid_pixels(target, size, 255), written_valid(target, size))
    assert valid_pixels(None, (2, 2), 255) is None


def test_labels_and_auxiliary():
    student, teacher = networks()
    images, target = batch()
    out, _ = outputs(student, teacher, images)
    loss, terms = distill.create_method("kd", student, teacher, kd={"weight": 0.0})(images, target)
    for key, logits, weight in (("labels", out.logits, 1), ("auxiliary", out.aux[0], 0.4)):
        large = F.interpolate(logits, target.shape[1:], mode="bilinear", align_corners=False)
        close(terms[key], weight * F.cross_entropy(large, target, ignore_index=255))
    close(loss, sum(terms.values()))
    assert "labels" not in distill.create_method("kd", student, teacher, task=None)(images, target)[1]
    own = lambda network, output, labels: {"own": output.logits.square().mean()}  # noqa: E731
    assert set(distill.create_method("kd", student, teacher, task=own)(images, target)[1]) == {"own", "kd"}


@pytest.mark.parametrize("name, weight, temperature", [("pixel-wise", 10, 1.0), ("kd", 1, 4.0)])
def test_pixel_wise_and_kd(name, weight, temperature):
    student, teacher = networks(strides=(1, 1))
    images, target = batch()
    s, t = outputs(student, teacher, images)
    t_logits = F.avg_pool2d(t.logits, 4)  # the teacher's stride is 1, the student's 4
    valid = written_valid(target, s.logits.shape[2:])
    log_s, log_t = ((x / temperature).log_softmax(1) for x in (s.logits, t_logits))
    kl = (log_t.exp() * (log_t - log_s)).sum(1)[valid].mean()
    _, terms = distill.create_method(name, student, teacher)(images, target)
    close(terms[name], weight * temperature**2 * kl)


def test_class_weights_of_pixel_wise():
    student, teacher = networks(strides=(1, 1))
    images, target = batch()
    factors = [0.5 + c for c in range(CLASSES)]
    s, t = outputs(student, teacher, images)
    t_logits = F.avg_pool2d(t.logits, 4)
    valid = written_valid(target, s.logits.shape[2:])
    log_s, log_t = s.logits.log_softmax(1), t_logits.log_softmax(1)
    weight = sum(f * p for f, p in zip(factors, log_t.exp().unbind(1)))[valid]
    expected = ((log_t.exp() * (log_t - log_s)).sum(1)[valid] * weight).sum() / weight.sum()
    method = distill.create_method("pixel-wise", student, teacher, pixel_wise={"class_weights": factors})
    close(method(images, target)[1]["pixel-wise"], 10 * expected)
    assert method(images, torch.full_like(target, 255))[1]["pixel-wise"] == 0
    assert not method.state_dict()["parts"]
    for wrong, preset, said in (
        ([1.0] * (CLASSES - 1), "paper", f"want {CLASSES} class_weights, got {CLASSES - 1}"),
        ([0.0] * CLASSES, "paper", "want class_weights > 0 and finite"),
        (factors, "official", 'with preset="paper" alone'),
    ):
        options = {"pixel_wise": {"class_weights": wrong}}
        with pytest.raises(ValueError, match=said):
            distill.create_method("pixel-wise", student, teacher, preset=preset, **options)(images, target)


def test_channel_wise():
    student, teacher = networks()
    images, target = batch()
    s, t = outputs(student, teacher, images)
    t_logits = F.avg_pool2d(t.logits, 2)
    valid = written_valid(target, s.logits.shape[2:])
    total = 0.0
    for n in range(2):
        for c in range(CLASSES):
            p_s, p_t = (x[n, c][valid[n]].div(4).softmax(0) for x in (s.logits, t_logits))
            total += 16 * (p_t * (p_t / p_s).log()).sum()
    _, terms = distill.create_method("channel-wise", student, teacher)(images, target)
    close(terms["channel-wise"], 3 * total / (2 * CLASSES))
    ignored = torch.full_like(target, 255)
    assert distill.create_method("channel-wise", student, teacher)(images, ignored)[1]["channel-wise"] == 0


def test_pair_wise_leaves_out_nodes_without_a_label():
    student, teacher = networks()
    images, target = batch()
    s, t = outputs(student, teacher, images)
    s, t = s.features["pre_logits"], F.avg_pool2d(t.features["pre_logits"], 2)
    valid = written_valid(target, s.shape[2:])
    total, pairs = 0.0, 0
    for n in range(2):
        vectors = []
        for x in (s, t):
            masked = torch.where(valid[n], x[n], 0)
            pooled = F.avg_pool2d(masked[None], 2)[0]  # 6 x 8 locations: whole windows
            kept = F.max_pool2d(valid[n][None, None].float(), 2)[0, 0] > 0
            vectors.append(F.normalize(pooled[:, kept], dim=0))
        difference = vectors[0].T @ vectors[0] - vectors[1].T @ vectors[1]
        total, pairs = total + difference.square().sum(), pairs + difference.numel()
    _, terms = distill.create_method("pair-wise", student, teacher)(images, target)
    close(terms["pair-wise"], 10 * total / pairs)


def test_holistic():
    student, teacher = networks()
    images, target = batch()
    s, t = outputs(student, teacher, images)
    valid = written_valid(target, s.logits.shape[2:]).unsqueeze(1)
    fake, real = (torch.where(valid, x, 0) for x in (s.logits, F.avg_pool2d(t.logits, 2)))
    method = distill.create_method("holistic", student, teacher, holistic={"channels": 4})
    critic = copy.deepcopy(method.terms["holistic"].critic)
    _, terms = method(images, target)
    close(terms["holistic"], -0.1 * critic(fake, images).mean())

    # The step of the critic, on the same batch, by SGD with the released code's options.
    torch.manual_seed(5)
    told = method.extra_step()
    torch.manual_seed(5)
    critic.requires_grad_(True)
    optimizer = torch.optim.SGD(critic.parameters(), lr=4e-4, momentum=0.9, weight_decay=1e-4)
    distance = critic(fake.detach(), images).mean() - critic(real.detach(), images).mean()
    mix = torch.rand(2).view(-1, 1, 1, 1)
    x = (mix * real + (1 - mix) * fake).detach().requires_grad_()
    (slope,) = torch.autograd.grad(critic(x, images).sum(), x, create_graph=True)
    penalty = 10 * (slope.flatten(1).norm(dim=1) - 1).square().mean()
    (distance + penalty).backward()
    optimizer.step()
    close(told["critic"], distance.detach())
    close(told["gradient penalty"], penalty.detach())
    for (key, p), q in zip(method.terms["holistic"].critic.named_parameters(), critic.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6, msg=key)
    assert method.extra_step() == {}, "a second step on the same batch"


def test_overhaul():
    student, teacher = networks()
    images, target = batch()
    method = distill.create_method("overhaul", student, teacher)
    term = method.terms["overhaul"]
    assert term.student_taps == ["stage1.2", "stage2.2", "fuse.1"]
    assert term.teacher_taps == ["stage2.2", "stage2.2", "fuse.1"]  # both its stages have stride 2: the deeper one is taken

    def before_activations(network):
        network, x, maps = copy.deepcopy(network).train(), images, {}  # no dropout: training is BatchNorm on the batch
        for stage in ("stage1", "stage2", "fuse"):
            layers = getattr(network, stage)
            maps[stage] = layers[1](layers[0](x))
            x = maps[stage].relu()
        return maps

    total = 0.0
    of_student, of_teacher = before_activations(student), before_activations(teacher)
    for i, (stage, other) in enumerate({"stage1": "stage2", "stage2": "stage2", "fuse": "fuse"}.items()):
        before_s, before_t, layers_t = of_student[stage], of_teacher[other], getattr(teacher, other)
        mapped = term.regressors[i](before_s)
        mapped = F.interpolate(mapped, before_t.shape[2:], mode="bilinear", align_corners=False)
        clamped = torch.maximum(before_t, distill.margins(layers_t[1]).float().view(1, -1, 1, 1))
        counts = written_valid(target, before_t.shape[2:]).unsqueeze(1) & ~((mapped <= clamped) & (clamped <= 0))
        total += ((mapped - clamped).square() * counts).sum() / (
            written_valid(target, before_t.shape[2:]).sum() * clamped.shape[1]
        )
    _, terms = method(images, target)
    close(terms["overhaul"], 5 * total)


def test_overhaul_official_scaling():
    student, teacher = networks(strides=(2, 2))
    images, target = batch()
    taps = [("stage1.1", "stage1.1"), ("stage2.1", "stage2.1")]
    method = distill.create_method("overhaul", student, teacher, preset="official", overhaul={"taps": [("stage1.2",) * 2] * 6})
    assert method.terms["overhaul"].dividers == (8, 4, 2, 1, 1, 16)
    method.close()
    # BatchNorm before an activation in place: only the activation's input is still the map.
    taps = [("stage1.2", "stage1.2"), ("stage2.2", "stage2.2")]
    method = distill.create_method("overhaul", student, teacher, preset="official", overhaul={"taps": taps})
    total = 0.0
    s, t = copy.deepcopy(student), copy.deepcopy(teacher).train()
    s_map, t_map = images, images
    for i, stage in enumerate(("stage1", "stage2")):
        before_s, before_t = (getattr(m, stage)[:2](x) for m, x in ((s, s_map), (t, t_map)))
        mapped = method.terms["overhaul"].regressors[i](before_s)
        clamped = torch.maximum(before_t, distill.margins(getattr(t, stage)[1]).float().view(1, -1, 1, 1))
        # The released code's mask, which is the formula's complement.
        total += ((mapped - clamped).square() * ((mapped > clamped) | (clamped > 0))).sum() / 2 ** (1 - i)
        s_map, t_map = before_s.relu(), before_t.relu()
    _, terms = method(images, target)
    close(terms["overhaul"], 1e-5 * total / len(images))


def test_adaptation():
    student, teacher = networks()
    images, target = batch()
    method = method_of("adaptation", student, teacher, images)
    term = method.terms["adaptation"]
    assert term.autoencoder.strides == (2, 1, 1)  # from the teacher's stride 2 to the student's 4
    s, t = outputs(student, teacher, images)
    code = t.features["pre_logits"]
    for layers in term.autoencoder.encoders:
        code = layers(code)
    adapted = copy.deepcopy(term.adapter)(s.features["pre_logits"])
    assert adapted.shape == code.shape
    valid = written_valid(target, code.shape[2:])
    a, e = (torch.where(valid.unsqueeze(1), x, 0) for x in (adapted, code))
    adapt = torch.stack([(a[n] / a[n].norm() - e[n] / e[n].norm()).abs().mean() for n in range(2)]).mean()
    total, pairs = 0.0, 0
    for n in range(2):
        u, v = (F.normalize(x[n][:, valid[n]], dim=0) for x in (adapted, code))
        total, pairs = total + (u.T @ u - v.T @ v).square().sum(), pairs + valid[n].sum() ** 2
    _, terms = method(images, target)
    close(terms["adapt"], 50 * adapt)
    close(terms["affinity"], total / pairs)


def test_margins_against_sampling():
    """E[x | x < 0] of a million samples a channel, within four standard errors."""
    norm = nn.BatchNorm2d(7)
    norm.weight.data = torch.tensor([1.0, -0.5, 2.0, 0.1, 1.0, 0.3, 1.0])
    norm.bias.data = torch.tensor([0.0, 0.3, -1.0, -0.4, 2.0, 0.5, 3.5])
    m = distill.margins(norm)
    generator = torch.Generator().manual_seed(0)
    for c in range(7):
        x = norm.weight[c].item() * torch.randn(1_000_000, generator=generator, dtype=torch.float64) + norm.bias[c].item()
        below = x[x < 0]
        if c == 6:
            assert len(below) < 1000
            assert m[c] == -3
        else:
            assert abs(below.mean() - m[c]) < 4 * below.std() / math.sqrt(len(below)), c
    assert (m < 0).all()
    close(distill.margins(nn.BatchNorm2d(2, affine=False)), torch.full((2,), -math.sqrt(2 / math.pi)))
    norm.weight.data[:2], norm.bias.data[:2] = 0, torch.tensor([-0.4, 0.4])
    assert distill.margins(norm)[:2].tolist() == pytest.approx([-0.4, 0.0])


def randn(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def critic():
    torch.manual_seed(0)
    network = distill.Critic(3, 2).double()
    for attention in network.attentions:
        nn.init.constant_(attention.gamma, 0.5)
    network(randn(1, 3, 9, 9), randn(1, 3, 9, 9))  # singular vectors that are some
    return network.eval()


@pytest.mark.parametrize("size", [(1, 1), (7, 9), (33, 20)])
def test_critic_gradcheck(critic, size):
    scores, images = randn(2, 3, *size).requires_grad_(), randn(2, 3, 2 * size[0], 2 * size[1], seed=1).requires_grad_()
    assert critic(scores, images).shape == (2,)
    assert torch.autograd.gradcheck(critic, (scores, images), fast_mode=True)
    alone = torch.cat([critic(scores[i : i + 1], images[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(critic(scores, images), alone)  # the other images of a batch do not matter


def test_gradient_penalty_gradcheck(critic):
    """The gradient of the penalty in the critic's parameters: the second derivative of the critic."""
    real, fake, images, mix = randn(2, 3, 9, 8), randn(2, 3, 9, 8, seed=1), randn(2, 3, 18, 16, seed=2), torch.tensor([0.3, 0.8])
    names, values = zip(*critic.named_parameters())

    def penalty(*parameters):
        call = lambda x, y: torch.func.functional_call(critic, dict(zip(names, parameters)), (x, y))  # noqa: E731
        return distill.gradient_penalty(call, real, fake, images, mix=mix.double())

    assert torch.autograd.gradcheck(penalty, [v.detach().clone().requires_grad_() for v in values], fast_mode=True)
    flat = distill.gradient_penalty(lambda x, _: (x * 0).sum((1, 2, 3)), real, fake)
    assert flat.item() == pytest.approx(1, abs=1e-5)
    slope = torch.ones((), dtype=torch.float64, requires_grad=True)
    distill.gradient_penalty(lambda x, _: (slope * x * 0).sum((1, 2, 3)), real, fake).backward()
    assert slope.grad.isfinite()


HEAD = {"classifier.weight", "classifier.bias"}
AUX = {"aux.weight", "aux.bias"}


@pytest.mark.parametrize("name", ALONE)
def test_the_gradient_reaches_what_it_should(name):
    student, teacher = networks()
    images, target = batch()
    flags = {key: p.requires_grad for key, p in teacher.named_parameters()}
    method = method_of(name, student, teacher, images, task=None)
    before = {key: p.clone() for key, p in method.terms.named_parameters()}
    loss, _ = method(images, target)
    loss.backward()
    everything = {key for key, _ in student.named_parameters()}
    reached = {key for key, p in student.named_parameters() if p.grad is not None}
    assert reached == everything - AUX - (HEAD if name in ("pair-wise", "overhaul", "adaptation") else set())
    # A bias before a BatchNorm or a softmax over locations moves nothing, but by rounding.
    still = {key for key, p in student.named_parameters() if key in reached and not p.grad.any()}
    assert not still, still
    assert all(p.grad is None for p in teacher.parameters())
    assert flags == {key: p.requires_grad for key, p in teacher.named_parameters()}
    own = {key.split(".")[1] for key, _ in method.named_parameters()}
    assert own == {"overhaul": {"regressors"}, "adaptation": {"adapter"}}.get(name, set())
    for key, p in method.terms.named_parameters():
        assert (p.grad is not None) == (key.split(".")[1] in own), key
        if p.grad is not None:
            assert p.grad.any() or key.endswith("bias"), key

    gradients = [p.grad.clone() for p in student.parameters() if p.grad is not None]
    method.extra_step()
    after = [p.grad for p in student.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(gradients, after, strict=True)), "the critic's step reached the student"
    moved = {key.split(".")[1] for key, p in method.terms.named_parameters() if not torch.equal(p, before[key])}
    assert moved == ({"critic"} if name == "holistic" else set())
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("name", ["structured+overhaul", "overhaul+adaptation+kd+channel-wise"])
def test_the_teacher_stays_as_it_was(name):
    student, teacher = networks()
    teacher.train()
    images, target = batch()
    teacher.forward_features(images)
    kept = {key: x.clone() for key, x in teacher.state_dict().items()}
    method = method_of(name, student, teacher, images)
    for _ in range(2):
        method(images, target)[0].backward()
        method.extra_step()
    assert not any(m.training for m in teacher.modules())
    assert all(m.track_running_stats for m in teacher.modules() if isinstance(m, nn.BatchNorm2d))
    for key, x in teacher.state_dict().items():
        assert torch.equal(x, kept[key]), key
    method.close()
    for network in (student, teacher):
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
    with pytest.raises(ValueError, match="tap"):
        method(images, target)


def test_overhaul_takes_the_batchs_statistics_and_the_others_the_running_ones():
    student, teacher = networks()
    images, target = batch()
    for layer in (m for m in teacher.modules() if isinstance(m, nn.BatchNorm2d)):
        layer.running_mean += 3
    together = distill.create_method("kd+overhaul", student, teacher, task=None)
    regressors = copy.deepcopy(together.terms["overhaul"].regressors)
    _, terms = together(images, target)
    together.close()
    _, kd = distill.create_method("kd", student, teacher, task=None)(images, target)
    close(terms["kd"], kd["kd"])
    running = distill.create_method("overhaul", student, teacher, task=None, overhaul={"teacher_bn": "running"})
    running.terms["overhaul"].regressors = regressors
    assert abs(running(images, target)[1]["overhaul"] / terms["overhaul"] - 1) > 0.05
    with pytest.raises(ValueError, match="teacher_bn"):
        distill.create_method("overhaul", student, teacher, overhaul={"teacher_bn": "train"})


@pytest.mark.parametrize("network", ["plain", "residual", "fast_scnn"])
def test_taps_are_before_the_activations(network):
    torch.manual_seed(0)
    if network == "fast_scnn":
        model = create_model("fast_scnn", num_classes=CLASSES, width=0.25)
    else:
        model = Tiny(residual=network == "residual")
    model.train()
    state = {key: x.clone() for key, x in model.state_dict().items()}
    found = distill.find_taps(model)
    assert model.training
    assert all(torch.equal(x, state[key]) for key, x in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert [tap.stage for tap in found] == ["stage1", "stage2", "pre_logits"]
    model.eval()
    images = batch(size=(64, 64))[0]
    taps = Taps(model, [tap.path for tap in found])
    out = model.forward_features(images)
    maps = taps.take(out)
    taps.close()
    for tap in found:
        assert (maps[tap.path] < 0).any()
        if (network, tap.stage) != ("fast_scnn", "pre_logits"):  # a sum that no module makes: its last BatchNorm's output
            assert torch.equal(maps[tap.path].relu(), out.features[tap.stage]), tap
        assert tap.channels == out.features[tap.stage].shape[1]
        assert tap.stride == 64 / out.features[tap.stage].shape[2]
        assert isinstance(model.get_submodule(tap.norm), nn.BatchNorm2d)
    if network == "residual":
        assert [tap.norm for tap in found[:2]] == ["stage1.bn1", "stage2.bn1"]  # not the shortcuts', which run later


@pytest.mark.parametrize("name", list_models() if EFFORT == "full" else list_models()[::4])
def test_taps_of_every_network(name):
    """Every stage has one, with a BatchNorm of its channels or none; the teacher's run, which may work in place, gives them."""
    torch.manual_seed(0)
    model = create_model(name, num_classes=CLASSES).eval()
    found = distill.find_taps(model)
    taps = Taps(model, [tap.path for tap in found])
    with torch.no_grad():
        out = model.forward_features(torch.randn(1, 3, 128, 128))
    maps = taps.take(out)
    taps.close()
    assert {tap.stage for tap in found} <= set(out.features)
    assert found[-1].stage == "pre_logits"
    for tap in found:
        assert maps[tap.path].shape == out.features[tap.stage].shape
        assert tap.norm is None or model.get_submodule(tap.norm).num_features == tap.channels
        if tap.path not in out.features and isinstance(model.get_submodule(tap.path), nn.ReLU):
            assert torch.equal(maps[tap.path].relu(), out.features[tap.stage]), tap


def test_taps_of_other_shapes():
    class Linear(Tiny):
        """A stage that ends in a sum, as inverted residuals do, one without a BatchNorm, and taps that the network states."""

        def outputs(self, images):
            one = self.stage1(images)
            two = self.fuse(self.stage2(one))
            return Output(self.classifier(two), (), {"stage1": one, "stage2": two, "pre_logits": torch.cat((two, two), 1)})

    model = Linear()
    found = distill.find_taps(model)
    assert found[1].path == "fuse.1"
    assert found[2] == ("pre_logits", "pre_logits", None, 16, 4)
    model.taps = {"stage1": "stage1.0", "pre_logits": "fuse"}
    found = distill.find_taps(model)
    assert [tap.path for tap in found] == ["stage1.0", "fuse.1", "fuse"]
    assert found[0].norm is None
    assert found[2].norm == "fuse.1"

    class Twice(Tiny):
        """A stage that runs at two scales: the last run is not what the features hold."""

        def outputs(self, images):
            out = super().outputs(images)
            self.stage1(images[..., ::2, ::2])
            return out

    twice = distill.find_taps(Twice())
    assert [(tap.path, tap.norm) for tap in twice[:2]] == [("stage1", "stage1.1"), ("stage2.2", "stage2.1")]
    images, target = batch()
    changed = distill.create_method("overhaul", Tiny(residual=True), model, overhaul={"taps": [("stage1.bn1", "fuse")]})
    with pytest.raises(ValueError, match="changes in place"):
        changed(images, target)
    changed.close()
    del model.taps
    _, terms = distill.create_method("overhaul", Tiny(), model)(images, target)  # margins of a map without a BatchNorm
    assert math.isfinite(terms["overhaul"])
    with pytest.raises(ValueError, match="gives features, or taps"):
        distill.find_taps(Foreign())
    with pytest.raises(ValueError, match="got 'nowhere'"):
        Probe(model).tap("nowhere")


@pytest.mark.parametrize("name", ALONE)
def test_any_two_networks(name):
    """Strides and channels that differ in both directions, a size that no stride divides, a network from elsewhere."""
    images, target = batch(size=(27, 35))
    for widths, strides in (((4, 20), (1, 2)), ((16, 5), (4, 2))):
        student, teacher = networks(widths=widths, strides=strides)
        method = method_of(name, student, teacher, images)
        loss, terms = method(images, target)
        loss.backward()
        assert all(map(math.isfinite, {**terms, **method.extra_step()}.values()))
    options = {}
    if name in ("pair-wise", "adaptation"):
        options = {name.replace("-", "_"): {"taps": ("pre_logits", "body")}}
    elif name == "overhaul":
        options = {"overhaul": {"taps": [("stage2.2", "body.2")]}}
    for student, teacher in ((Tiny(), Foreign()), (Foreign(), Tiny())):
        if isinstance(student, Foreign):
            options = {
                key: {"taps": [(t, s) for s, t in value["taps"]] if key == "overhaul" else value["taps"][::-1]}
                for key, value in options.items()
            }
        loss, terms = method_of(name, student, teacher, images, **options)(images, target)
        loss.backward()
        assert all(map(math.isfinite, terms.values()))


def test_fast_scnn_of_two_widths():
    torch.manual_seed(0)
    student, teacher = (create_model("fast_scnn", num_classes=CLASSES, width=w) for w in (0.25, 0.5))
    images, target = batch(size=(64, 64))
    with method_of("structured+overhaul+adaptation+kd+channel-wise", student, teacher, images) as method:
        loss, terms = method(images, target)
        loss.backward()
        assert len(terms) == 9
        assert all(math.isfinite(value) and type(value) is float for value in terms.values())
        assert loss.item() == pytest.approx(sum(terms.values()), rel=1e-5)
        assert all(p.grad is not None for p in student.parameters())
        _, tensors = method(images, target, floats=False)
        assert all(isinstance(x, Tensor) and not x.requires_grad for x in tensors.values())


def without_ignored(outputs, target, value):
    """The same outputs with a value at every cell whose middle pixel is ignored."""
    put = lambda x: torch.where(valid_pixels(target, x.shape[2:], 255).unsqueeze(1), x, value)  # noqa: E731
    return Output(put(outputs.logits), (), {key: put(x) for key, x in outputs.features.items()})


@pytest.mark.parametrize("name", [name for name in ALONE if name not in ("overhaul", "adaptation")])
def test_ignored_pixels_say_nothing(name):
    """Whatever networks of one stride hold there; test_overhaul_loss.py has the same for overhaul."""
    student, teacher = networks(strides=(2, 2))
    images, target = batch()
    s, t = outputs(student, teacher, images)
    method = distill.create_method(name, student, teacher, task=None)
    state, losses = copy.deepcopy(method.state_dict()), []
    for value in (0.0, 100.0):
        method.load_state_dict(state)  # the critic's singular vectors move with every look
        student_out = Output(*(x.detach() if isinstance(x, Tensor) else x for x in without_ignored(s, target, value)))
        student_out.logits.requires_grad_()
        loss, _ = method(images, target, student_out=student_out, teacher_out=without_ignored(t, target, -value))
        losses.append(loss.item())
        if loss.requires_grad and name != "pair-wise":
            (grad,) = torch.autograd.grad(loss, student_out.logits)
            ignored = ~valid_pixels(target, grad.shape[2:], 255).unsqueeze(1).expand_as(grad)
            assert not grad[ignored].any()
    assert losses[0] == losses[1]
    assert math.isfinite(method(images, torch.full_like(target, 255))[0].item())


@pytest.mark.parametrize("name", ALONE)
def test_the_batch_size_does_not_matter(name):
    """A batch and the same batch twice: the loss and the student's gradient agree."""
    student, teacher = networks()
    images, target = batch()
    method = method_of(name, student, teacher, images)
    results = []
    for factor in (1, 2):
        student.zero_grad()
        loss, _ = method(images.repeat(factor, 1, 1, 1), target.repeat(factor, 1, 1))
        loss.backward()
        results.append((loss.detach(), [p.grad.clone() for p in student.parameters()]))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-6)
    for (key, _), a, b in zip(student.named_parameters(), results[0][1], results[1][1]):
        if "conv1.bias" not in key and "fuse.0.bias" not in key:
            assert (a - b).abs().max() <= 1e-3 * a.abs().max() + 1e-6, key


@pytest.mark.parametrize("name", ALONE)
def test_autocast(name):
    """bfloat16 is within a few per cent of float32; logits of a size that float16 has not, gradients are finite."""
    student, teacher = networks()
    images, target = batch()
    method = method_of(name, student, teacher, images)
    state, statistics = copy.deepcopy(method.state_dict()), copy.deepcopy(student.state_dict())
    _, expected = method(images, target)
    for dtype in (torch.bfloat16, torch.float16):
        method.load_state_dict(state)
        student.load_state_dict(statistics)
        with torch.autocast("cpu", dtype=dtype):
            loss, terms = method(images, target)
        assert loss.dtype == torch.float32
        loss.backward()
        assert all(p.grad.isfinite().all() for p in student.parameters())
        with torch.autocast("cpu", dtype=dtype):
            assert all(map(math.isfinite, method.extra_step().values()))
        for key, value in terms.items():
            assert value == pytest.approx(expected[key], rel=0.1, abs=2e-3), (key, dtype)
    if "overhaul" not in name and "adaptation" not in name:
        s, t = outputs(student, teacher, images)
        huge = Output(s.logits * 1e6, (), s.features)
        loss, _ = method(images, target, student_out=huge, teacher_out=t)
        assert loss.isfinite()


@pytest.mark.parametrize("name", ALONE)
def test_outputs_that_are_already_there(name):
    """Given or computed, cached in float16 or not: the same loss, and a teacher that does not run where it need not."""
    student, teacher = networks()
    images, target = batch()
    method = method_of(name, student, teacher, images)
    expected, _ = method(images, target)
    runs = []
    handle = teacher.classifier.register_forward_hook(lambda *_: runs.append(1))
    with torch.no_grad():
        student.eval()
        student.forward_features(images[:1])  # a validation in between leaves nothing behind
        student.train()
    student_out = student.forward_features(images)
    with torch.no_grad():
        teacher_out = teacher.forward_features(images)
    runs.clear()
    loss, _ = method(images, target, student_out=student_out, teacher_out=teacher_out)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert len(runs) == (1 if name == "overhaul" else 0)
    handle.remove()
    half = Output(teacher_out.logits.half(), (), {key: x.half() for key, x in teacher_out.features.items()})
    loss, _ = method(images, target, student_out=student.forward_features(images), teacher_out=half)
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=1e-3)
    if name == "overhaul":
        with pytest.raises(ValueError, match="tap"):
            method(images, target, student_out=student_out)


def test_compiled_student():
    """Taps trace into one graph, and come off it."""
    student, teacher = networks()
    images, target = batch()
    method = distill.create_method("overhaul+pair-wise", student, teacher)
    state = copy.deepcopy(student.state_dict())
    expected, _ = method(images, target)
    expected.backward()
    gradients = [p.grad.clone() for p in student.parameters()]
    student.load_state_dict(state)
    student.zero_grad()
    torch._dynamo.reset()
    forward = torch.compile(student.forward_features, fullgraph=True, backend="aot_eager")
    loss, _ = method(images, target, student_out=forward(images))
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for p, gradient in zip(student.parameters(), gradients):
        assert (p.grad - gradient).abs().max() <= 1e-4 * gradient.abs().max() + 1e-6
    method.close()
    student.load_state_dict(state)
    again = torch.compile(student.forward_features, fullgraph=True, backend="aot_eager")(images)
    assert same_bits(again.logits.detach().isfinite(), torch.ones_like(again.logits, dtype=torch.bool))


def test_state_dict(tmp_path):
    """Saved and loaded into a method made in the same way, it goes on as if nothing had been: the critic's momentum too."""
    images, target = batch()
    name, options = "holistic+overhaul+adaptation", {"holistic": {"channels": 4, "lr": 0.1}}
    student, teacher = networks()
    method = method_of(name, student, teacher, images, **options)
    for _ in range(2):
        method(images, target)
        method.extra_step()
    torch.save({"method": method.state_dict(), "student": student.state_dict()}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)

    def go_on(method):
        torch.manual_seed(3)
        seen = []
        for _ in range(2):
            loss, terms = method(images, target)
            seen += [loss.item(), *terms.values(), *method.extra_step().values()]
        return seen

    expected = go_on(method)
    other, _ = networks()
    fresh = distill.create_method(name, other, teacher, **options)
    other.load_state_dict(saved["student"])
    fresh.load_state_dict(saved["method"])
    fresh.prepare([], None)  # trained already: the loader is not touched
    assert go_on(fresh) == expected


def test_autoencoder():
    _, teacher = networks()
    images, target = batch(size=(25, 30))
    seen = []
    coder = distill.train_autoencoder(
        teacher, [(images, target)], steps=count(30, 60), lr=0.05, alpha=0.1, progress=lambda step, terms: seen.append(terms)
    )
    assert seen[-1]["reconstruction"] < 0.5 * seen[0]["reconstruction"]
    assert not any(p.requires_grad for p in coder.parameters())
    x = teacher.eval().forward_features(images).features["pre_logits"]
    for strides in ((1, 1, 1), (2, 1, 1), (2, 2, 2)):
        code, decoded = distill.AutoEncoder(12, 5, strides)(x)
        assert decoded.shape == x.shape
        assert code.shape[2] == math.ceil(x.shape[2] / math.prod(strides))
    alone = distill.AutoEncoder(12, 5).eval()
    assert torch.equal(alone.encode(x), alone(x)[0])
    whole = distill.create_method("adaptation", Tiny(), teacher, adaptation={"autoencoder": coder})
    assert whole(images, target)[0].isfinite()
    with pytest.raises(ValueError, match="got none"):
        distill.train_autoencoder(teacher, [])
    with pytest.raises(FloatingPointError, match="lower lr"):
        distill.train_autoencoder(teacher, [(images,)], steps=30, lr=1e30)
    with pytest.raises(RuntimeError, match="prepare"):
        distill.create_method("adaptation", Tiny(), teacher)(images, target)


def test_refusals():
    student, teacher = networks()
    make = lambda name="kd", **options: distill.create_method(name, student, teacher, **options)  # noqa: E731
    for call, said in (
        (lambda: make("magic"), "got 'magic'"),
        (lambda: make("kd+"), "got ''"),
        (lambda: make(preset="mine"), "preset"),
        (lambda: make(task="regression"), "task"),
        (lambda: make(overhaul={}), "options for kd"),
        (lambda: make(kd={"tau": 1}), "got tau"),
        (lambda: make(kd={"temperature": 0})(*batch()), "temperature"),
        (lambda: make("channel-wise", channel_wise={"temperature": -1}), "temperature"),
        (lambda: make("holistic", holistic={"optimizer": "lbfgs"}), "optimizer"),
        (lambda: make("overhaul", overhaul={"taps": [("stage9", "stage1")]}), "stage9"),
        (lambda: make("pair-wise", pair_wise={"taps": ("stage1", "nowhere")})(*batch()), "nowhere"),
        (lambda: distill.Critic(3, norm="layer"), "norm"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            call()
    assert set(ALONE) | {"structured"} == set(distill.list_methods())
    assert list(make("structured+overhaul+pixel-wise").terms) == ["pixel-wise", "pair-wise", "holistic", "overhaul"]


def test_with_a_process_group(tmp_path):
    """Parts are broadcast and gradients averaged; of one process to itself, so nothing changes."""
    student, teacher = networks()
    images, target = batch()
    torch.manual_seed(1)
    alone = distill.create_method("overhaul+holistic", student, teacher)
    alone.close()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        torch.manual_seed(1)
        method = distill.create_method("overhaul+holistic", student, teacher)
        assert all(torch.equal(p, q) for p, q in zip(method.terms.parameters(), alone.terms.parameters()))
        method(images, target)[0].backward()
        gradients = [p.grad.clone() for p in method.parameters()]
        method.average_gradients()
        assert gradients
        assert all(torch.equal(p.grad, g) for p, g in zip(method.parameters(), gradients))
        method.extra_step()
    finally:
        torch.distributed.destroy_process_group()


def test_against_torchdistill():
    losses = pytest.importorskip("torchdistill.losses.mid_level")
    student, teacher = networks()
    images, _ = batch()
    method = method_of("adaptation", student, teacher, images)
    term = method.terms["adaptation"]
    s, t = outputs(student, teacher, images)
    maps = {
        "feature_adapter": {"output": copy.deepcopy(term.adapter)(s.features["pre_logits"])},
        "paraphraser": {"output": term.autoencoder.encode(t.features["pre_logits"])},
    }
    _, terms = method(images)
    close(terms["adapt"], 50 * losses.KTALoss()(maps, maps).detach())


def test_against_mmrazor():
    losses = pytest.importorskip("mmrazor.models.losses")
    student, teacher = randn(2, 5, 6, 7), randn(2, 5, 6, 7, seed=1)
    close(distill.ChannelWiseLoss(3.0)(student, teacher), losses.ChannelWiseDivergence(tau=3.0)(student, teacher))
    margin = torch.full((5,), -0.4, dtype=torch.float64)
    own = ops.overhaul_loss(student, teacher, margin, reduction="batchmean")
    close(own, losses.OFDLoss(mul_factor=1.0)(student, teacher.clamp(min=-0.4)))


# Target 13 of the convergence of distillation: fused against eager, from the same start on the same batches.


def course(fused, steps, seed, dtype, layout=torch.contiguous_format, nudge=0.0):
    torch.manual_seed(seed)
    teacher = create_model("fast_scnn", num_classes=CLASSES, width=0.25)
    student = create_model("fast_scnn", num_classes=CLASSES, width=0.25)
    student.to(memory_format=layout), teacher.to(memory_format=layout)
    with torch.no_grad():
        for p in student.parameters():
            p.mul_(1 + nudge)
    losses = []
    method = distill.create_method("pixel-wise+pair-wise+channel-wise+overhaul", student, teacher)
    optimizer = torch.optim.SGD([*student.parameters(), *method.parameters()], lr=0.02, momentum=0.9)
    context = reference_only() if not fused else torch.enable_grad()
    with context:
        for step in range(steps):
            torch.manual_seed(step)  # dropout
            images, target = batch(4, (32, 48), seed=seed * 100 + step % 8)
            images = images + F.one_hot(target.clamp(max=CLASSES - 1), CLASSES)[..., :3].permute(0, 3, 1, 2)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss, terms = method(images.contiguous(memory_format=layout), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(sum(terms.values()))
    return losses


@pytest.mark.drawn(1 / 2)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
def test_one_step(dtype):
    """The loss and every gradient of one step from the same state are within the error rule of the ops."""
    images, target = batch(2, (64, 96))
    name = "pixel-wise+pair-wise+channel-wise+overhaul"

    def pair():
        torch.manual_seed(0)
        return [create_model("fast_scnn", num_classes=CLASSES, width=width) for width in (0.25, 0.4)]

    names = [key for key, _ in pair()[0].named_parameters()]

    def run(call):
        images, *values = call
        student, teacher = (network.to(images.dtype) for network in pair())
        method = distill.create_method(name, student, teacher)
        method.terms.to(images.dtype)
        with torch.no_grad():
            for p, value in zip(student.parameters(), values, strict=True):
                p.copy_(value)
        wide = images.dtype == torch.float64
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16 and not wide):
            loss, _ = method(images, target)
        loss.backward()
        return [loss.detach(), *(p.grad for p in student.parameters())]

    call = (images, *(p.detach() for p in pair()[0].parameters()))
    actual = run(call)
    with reference_only():
        judge("a step", ["outputs[0]", *(f"grads {key}" for key in names)], actual, run, call, torch.float32)


@pytest.mark.drawn(1 / 2)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
def test_convergence(dtype):
    """The mean loss of the last quarter is as near to eager's as twice the gap between eager runs that differ in rounding.

    Those are channels_last and weights some roundings off: five in bfloat16, whose runs differ by up to 8 % among themselves.
    Such gaps may be small by luck, so 1 % is allowed in any case.
    """
    if dtype == torch.bfloat16 and EFFORT != "full":
        pytest.skip("float32 in ci: SEGFAST_EFFORT=full")
    steps = count(40, 200)
    tail = steps // 4
    for seed in range(count(1, 3)):
        end = lambda *how, **options: sum(course(*how, steps, seed, dtype, **options)[-tail:]) / tail  # noqa: B023, E731
        start, eager = course(False, 1, seed, dtype)[0], end(False)
        nudges = (1,) if dtype == torch.float32 else (1, 2, 3, 5)
        gaps = [end(False, layout=torch.channels_last), *(end(False, nudge=k * torch.finfo(torch.float32).eps) for k in nudges)]
        assert eager < 0.7 * start, "nothing was learned"
        allowed = max(0.01 * eager, 2 * max(abs(gap - eager) for gap in gaps))
        assert abs(end(True) - eager) <= allowed, f"seed {seed}: {end(True)} fused, {eager} eager, {gaps} eager otherwise"


def test_the_documented_use():
    """The loop in docs/distillation.md, run as it stands."""
    text = (Path(__file__).parents[1] / "docs" / "distillation.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    torch.manual_seed(0)
    student, teacher = networks()
    loader = [batch(seed=seed) for seed in range(2)]
    before = [p.clone() for p in student.parameters()]
    space = {"student": student, "teacher": teacher, "loader": loader, "torch": torch}
    exec(compile(blocks[0], "docs/distillation.md", "exec"), space)
    assert any(not torch.equal(p, q) for p, q in zip(student.parameters(), before))
    assert space["loss"].isfinite()
    assert not any(m._forward_hooks for m in student.modules())


def test_outputs_of_a_teacher_that_require_gradients_give_it_none():
    torch.manual_seed(0)
    student, teacher = (create_model("fast_scnn", 3, width=0.25) for _ in range(2))
    images, target = torch.randn(2, 3, 64, 64), torch.randint(0, 3, (2, 64, 64))
    method = distill.create_method("kd+structured", student, teacher)
    loss, _ = method(images, target, teacher_out=teacher.eval().forward_features(images))
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert any(p.grad is not None for p in student.parameters())


def test_margins_of_a_batch_leave_ignored_positions_out():
    x, mask = torch.randn(2, 3, 4, 5), torch.rand(2, 4, 5) < 0.5
    changed = torch.where(mask[:, None], x, -100.0)
    torch.testing.assert_close(mean_negative(changed, mask), mean_negative(x, mask))
    flat = x.transpose(0, 1)[:, mask]
    expected = torch.stack([row[row < 0].mean() for row in flat])
    torch.testing.assert_close(mean_negative(x, mask), expected)
