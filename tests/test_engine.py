import math

import pytest
import torch
from torch import nn

from segfast.engine import Distillation, class_iou, confusion_matrix, cross_entropy, evaluate, mean_iou, supervised, train
from segfast.models import Output, SegmentationModel


def test_confusion_matrix_by_hand():
    labels = torch.tensor([[0, 0, 1], [2, 255, 1]])
    prediction = torch.tensor([[0, 1, 1], [0, 2, 1]])
    matrix = confusion_matrix(prediction, labels, 4)
    assert matrix.tolist() == [[1, 1, 0, 0], [0, 2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    scores = class_iou(matrix).tolist()
    assert scores[:3] == pytest.approx([1 / 3, 2 / 3, 0])
    assert math.isnan(scores[3])
    assert mean_iou(matrix) == pytest.approx(1 / 3)
    assert math.isnan(mean_iou(torch.zeros(2, 2, dtype=torch.int64)))
    with pytest.raises(ValueError, match="one shape"):
        confusion_matrix(prediction[0], labels, 4)
    with pytest.raises(ValueError, match="classes 0 to 1, got 0 to 2"):
        confusion_matrix(prediction.clamp(max=1), labels, 2)


def test_evaluate_restores_the_mode():
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2))
    loader = [(torch.randn(2, 3, 4, 4), torch.randint(0, 2, (2, 4, 4))) for _ in range(2)]
    before = model[1].running_mean.clone()
    assert evaluate(model, loader, 2).sum() == 64
    assert model.training
    assert torch.equal(model[1].running_mean, before)
    assert (
        mean_iou(evaluate(lambda x: torch.stack([x[:, 0], -x[:, 0]], 1), [(x, (x[:, 0] < 0).long()) for x, _ in loader], 2)) == 1
    )


def test_cross_entropy_ignores():
    logits = torch.randn(1, 3, 2, 2, requires_grad=True)
    loss = cross_entropy(logits, torch.full((1, 2, 2), 255))
    loss.backward()
    assert loss == 0
    assert (logits.grad == 0).all()


class Tiny(SegmentationModel):
    min_size = 1

    def __init__(self, channels=4):
        super().__init__()
        self.body, self.classifier = nn.Conv2d(3, channels, 3, padding=1), nn.Conv2d(channels, 2, 1)

    def outputs(self, images):
        features = self.body(images).relu()
        return Output(self.classifier(features), (), {"pre_logits": features})


def batches(count=3):
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(2, 3, 6, 6, generator=generator) for _ in range(count)]
    return [(x, (x.sum(1) > 0).long()) for x in images]


def test_train_learns_and_repeats_the_loader():
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        model, seen = Tiny(), []
        optimizer = torch.optim.SGD(model.parameters(), 0.5)
        history = train(model, batches(), supervised, optimizer, 40, progress=lambda *now, seen=seen: seen.append(now))
        assert [done for done, _ in seen] == list(range(1, 41))
        assert [terms for _, terms in seen] == history
        assert history[-1]["loss"] < 0.5 * history[0]["loss"]
        assert optimizer.param_groups[0]["lr"] == 0
        runs.append(history)
    assert runs[0] == runs[1]


def test_train_schedule():
    model = Tiny()
    optimizer, rates = torch.optim.SGD(model.parameters(), 2.0), []
    train(
        model,
        batches(),
        supervised,
        optimizer,
        4,
        lambda done: 1 - done,
        lambda *_: rates.append(optimizer.param_groups[0]["lr"]),
    )
    assert rates == [1.5, 1.0, 0.5, 0.0]


def test_train_errors():
    model = Tiny()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match="a loader that gives batches"):
        train(model, [], supervised, optimizer, 1)
    with pytest.raises(FloatingPointError, match="after step 1"):
        train(model, [(torch.full((1, 3, 4, 4), math.nan), torch.zeros(1, 4, 4, dtype=torch.int64))], supervised, optimizer, 3)


def test_distillation_adds_weighted_terms_and_leaves_the_teacher_alone():
    teacher, student = Tiny(8), Tiny()
    loss = Distillation(teacher, lambda s, t: (s - t).square().mean(), lambda s, t: (s.mean() - t.mean()).square(), 3.0, 2.0)
    images, labels = batches(1)[0]
    terms = loss(student, images, labels)
    assert not teacher.training
    expected = 3 * (student(images) - teacher(images)).square().mean()
    torch.testing.assert_close(terms["pixel-wise"], expected)
    assert set(terms) == {"labels", "pixel-wise", "pair-wise"}
    sum(terms.values()).backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in student.parameters())
    assert set(Distillation(teacher, None, None)(student, images, labels)) == {"labels"}
