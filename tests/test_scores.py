"""Scores against their definitions, written out pixel by pixel."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import extra
from torch import nn

from segfast.engine import boundary_f_score, class_iou, evaluate, mean_iou, pixel_accuracy
from segfast.engine.evaluate import Inference


def written_out_boundary(prediction: np.ndarray, labels: np.ndarray, reach: int) -> float:
    height, width = labels.shape

    def line(x: np.ndarray, label: int) -> set[tuple[int, int]]:
        found = set()
        for i in range(height):
            for j in range(width):
                if x[i, j] != label or labels[i, j] == 255:
                    continue
                for near in ((i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)):
                    inside = 0 <= near[0] < height and 0 <= near[1] < width
                    if inside and labels[near] != 255 and x[near] != label:
                        found.add((i, j))
        return found

    def share(of: set, to: set) -> float:
        close = [any(max(abs(i - k), abs(j - m)) <= reach for k, m in to) for i, j in of]
        return sum(close) / len(close) if close else 0.0

    scores = []
    for label in sorted({int(v) for v in labels.flat} - {255}):
        predicted, true = line(prediction, label), line(labels, label)
        if not predicted and not true:
            continue
        precision, recall = share(predicted, true), share(true, predicted)
        scores.append(2 * precision * recall / (precision + recall) if precision + recall else 0.0)
    return sum(scores) / len(scores) if scores else math.nan


def halves(column: int, rows: int = 8, columns: int = 12) -> torch.Tensor:
    return (torch.arange(columns) >= column).long().expand(rows, columns).clone()


def test_boundary_f_score_by_hand():
    labels = halves(4)
    assert boundary_f_score(labels, labels, 2) == 1
    assert boundary_f_score(halves(5), labels, 2) == 1  # one pixel off is within the least tolerance
    assert boundary_f_score(halves(6), labels, 2) == 0
    assert boundary_f_score(halves(6), labels, 2, tolerance=2 / math.hypot(8, 12)) == 1
    # Two rows of eight are four columns off. Class 0: of 11 predicted pixels 7 are near, of 8 true ones all. Class 1: 7 and 7.
    bent = labels.clone()
    bent[6:] = halves(8)[6:]
    assert boundary_f_score(bent, labels, 2) == pytest.approx((7 / 9 + 14 / 19) / 2)
    # A class that is missed counts as 0, one that only the prediction has does not count.
    assert boundary_f_score(torch.zeros_like(labels), labels, 2) == 0
    stray = torch.where(halves(10) == 1, 2, labels)
    assert boundary_f_score(stray, labels, 3) == pytest.approx((1 + 2 / 3) / 2)
    assert math.isnan(boundary_f_score(torch.zeros_like(labels), torch.zeros_like(labels), 2))
    # Where the labels end, no outline begins: the edge to ignored pixels is none.
    ignored = torch.where(labels == 1, 255, 0)
    assert math.isnan(boundary_f_score(labels, ignored, 2))


@pytest.mark.parametrize("tolerance, reach", [(0.0075, 1), (0.1, 2), (0.3, 6)])
def test_boundary_f_score_written_out(tolerance, reach):
    draw = np.random.default_rng(reach)
    for _ in range(6):
        labels = np.kron(draw.integers(0, 3, (3, 4)), np.ones((4, 4), int))
        prediction = np.roll(labels, draw.integers(0, 4, 2), (0, 1))
        prediction[draw.random(labels.shape) < 0.03] = 2
        labels[draw.random(labels.shape) < 0.05] = 255
        got = boundary_f_score(torch.from_numpy(prediction), torch.from_numpy(labels), 3, tolerance=tolerance)
        assert got == pytest.approx(written_out_boundary(prediction, labels, reach))


class Blur(nn.Module):
    """Logits that see zeros beyond the border, so that a window's differ from the whole image's."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(4, 3, 5, 5, generator=generator)

    def forward(self, images):
        return F.conv2d(images, self.weight, padding=2)


@pytest.mark.parametrize(
    "size, window, overlap, tops, lefts",
    [
        ((11, 14), (5, 6), 1 / 3, (0, 3, 6), (0, 4, 8)),
        ((9, 10), (6, 4), 0.5, (0, 3), (0, 2, 4, 6)),
        ((4, 13), (6, 6), 0.0, (0,), (0, 4, 7)),
        ((6, 6), (6, 6), 1 / 3, (0,), (0,)),
    ],
)
@torch.no_grad()
def test_sliding_window_written_out(size, window, overlap, tops, lefts):
    model = Blur()
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))
    total, times = torch.zeros(2, 4, *size), torch.zeros(size)
    for top in tops:
        for left in lefts:
            logits = model(images[:, :, top : top + window[0], left : left + window[1]])
            for i in range(logits.shape[2]):
                for j in range(logits.shape[3]):
                    total[:, :, top + i, left + j] += logits[:, :, i, j]
                    times[top + i, left + j] += 1
    assert times.min() > 0
    inference = Inference(model, window=window, overlap=overlap)
    torch.testing.assert_close(inference.slide(images), total / times)
    torch.testing.assert_close(inference(images), (total / times).softmax(1))
    if len(tops) * len(lefts) > 1:
        assert (inference.slide(images) - model(images)).abs().max() > 0.1


@torch.no_grad()
def test_scales_and_mirror_written_out():
    model = Blur()
    images = torch.rand(1, 3, 12, 16, generator=torch.Generator().manual_seed(2))
    total = 0
    for size in ((12, 16), (6, 8)):
        scaled = F.interpolate(images, size, mode="bilinear", antialias=True)
        for logits in (model(scaled), model(scaled.flip(-1)).flip(-1)):
            total = total + F.interpolate(logits, (12, 16), mode="bilinear").softmax(1)
    torch.testing.assert_close(Inference(model, (1.0, 0.5), flip=True)(images), total / 4)


def scored(classes: int = 5):
    """Batches of logits and labels, some pixels ignored; the classes are spread unevenly over the images."""
    draw = np.random.default_rng(0)
    for i in range(4):
        labels = draw.integers(0, classes - i, (2, 9, 11))
        logits = draw.normal(size=(2, classes, 9, 11)) + 1.5 * (labels[:, None] == np.arange(classes)[:, None, None])
        labels[draw.random(labels.shape) < 0.1] = 255
        yield torch.from_numpy(logits), torch.from_numpy(labels)


def test_dataset_miou_written_out():
    classes, batches = 5, list(scored())
    both, either, right, counted, single = np.zeros(classes), np.zeros(classes), 0, 0, []
    for logits, labels in batches:
        for scores, truth in zip(logits.numpy(), labels.numpy()):
            predicted, valid = scores.argmax(0), truth != 255
            right, counted = right + (predicted == truth)[valid].sum(), counted + valid.sum()
            inside = [((predicted == c) & (truth == c) & valid).sum() for c in range(classes)]
            union = [(((predicted == c) | (truth == c)) & valid).sum() for c in range(classes)]
            both, either = both + inside, either + union
            single.append(np.mean([a / b for a, b in zip(inside, union) if b]))
    matrix = evaluate(lambda logits: logits, batches, classes)
    assert class_iou(matrix).tolist() == pytest.approx((both / either).tolist(), rel=1e-12)
    assert mean_iou(matrix) == pytest.approx(np.mean(both / either), rel=1e-12)
    assert pixel_accuracy(matrix) == pytest.approx(right / counted, rel=1e-12)
    assert abs(mean_iou(matrix) - np.mean(single)) > 0.01  # the mean of the images' scores is another number


def test_dataset_miou_of_torchmetrics():
    extra("torchvision")  # torchmetrics imports it
    from torchmetrics.classification import MulticlassConfusionMatrix, MulticlassJaccardIndex

    each, mean, counts = (
        MulticlassJaccardIndex(5, average="none", ignore_index=255),
        MulticlassJaccardIndex(5, average="macro", ignore_index=255),
        MulticlassConfusionMatrix(5, ignore_index=255),
    )
    for logits, labels in scored():
        for metric in (each, mean, counts):
            metric.update(logits.argmax(1), labels)
    matrix = evaluate(lambda logits: logits, scored(), 5)
    assert torch.equal(matrix, counts.compute())
    torch.testing.assert_close(class_iou(matrix).float(), each.compute())
    assert mean_iou(matrix) == pytest.approx(float(mean.compute()), abs=1e-6)
