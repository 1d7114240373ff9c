import pytest
import torch
from PIL import Image

from segfast.data import CamVid, SyntheticStreets, transforms
from segfast.data.images import colour, read_labels
from segfast.engine import evaluate, mean_iou
from segfast.engine.baselines import ColourRegression, Majority


def test_streets_are_the_same_every_time():
    first, second = SyntheticStreets(4, (48, 96), seed=3), SyntheticStreets(9, (48, 96), seed=3)
    for i in (3, 0, 1):
        (image, labels), (again, labels_again) = first[i], second[i]
        assert torch.equal(image, again)
        assert torch.equal(labels, labels_again)
    assert not torch.equal(first[0][0], first[1][0])
    assert not torch.equal(first[0][0], SyntheticStreets(4, (48, 96), seed=4)[0][0])
    assert torch.equal(first[-1][0], first[3][0])


def test_streets_items():
    street = SyntheticStreets(3, (33, 57))
    image, labels = street[0]
    assert image.shape == (3, 33, 57)
    assert image.dtype == torch.float32
    assert 0 <= image.min() < image.max() <= 1
    assert labels.shape == (33, 57)
    assert labels.dtype == torch.int64
    assert len(list(street)) == len(street) == 3
    for index in (3, -4):
        with pytest.raises(IndexError):
            street[index]
    with pytest.raises(ValueError, match="at least 16 x 16"):
        SyntheticStreets(1, (8, 64))


def test_streets_cannot_be_guessed_from_colour():
    street = SyntheticStreets(48, (96, 192), seed=0)
    loader = [tuple(torch.stack(column) for column in zip(*street))]
    held_out = [tuple(torch.stack(column) for column in zip(*SyntheticStreets(24, (96, 192), seed=1)))]
    assert loader[0][1].unique().tolist() == list(range(6))
    assert mean_iou(evaluate(Majority(loader, 6), held_out, 6)) < 0.15
    for balanced in (False, True):
        assert mean_iou(evaluate(ColourRegression(loader, 6, balanced=balanced), held_out, 6)) < 0.3


def test_camvid(data_root):
    for split, length in (("train", 367), ("val", 101)):
        camvid = CamVid(data_root / "camvid", split)
        assert len(camvid) == length
        image, labels = camvid[0]
        assert image.shape == (3, 360, 480)
        assert set(labels.unique().tolist()) <= {*range(11), 255}
    assert len(camvid.classes) == len(camvid.palette) == 11


@pytest.fixture
def tiny(tmp_path):
    for folder in ("train", "trainannot"):
        (tmp_path / folder).mkdir()
    Image.new("RGB", (8, 6), (255, 0, 0)).save(tmp_path / "train" / "a.png")
    Image.new("L", (8, 6), 11).save(tmp_path / "trainannot" / "a.png")
    return tmp_path


def test_camvid_layout(tiny):
    image, labels = CamVid(tiny, "train")[0]
    assert image[:, 0, 0].tolist() == [1, 0, 0]
    assert (labels == 255).all()
    with pytest.raises(FileNotFoundError, match=r"got no val/"):
        CamVid(tiny, "val")
    Image.new("L", (8, 6), 12).save(tiny / "trainannot" / "a.png")
    with pytest.raises(ValueError, match="labels 0 to 10 or 11 or 255, got 12"):
        CamVid(tiny, "train")[0]
    Image.new("L", (6, 6), 0).save(tiny / "trainannot" / "a.png")
    with pytest.raises(ValueError, match="image's size"):
        CamVid(tiny, "train")[0]
    Image.new("RGB", (8, 6)).save(tiny / "trainannot" / "a.png")
    with pytest.raises(ValueError, match="one byte a pixel, got mode RGB"):
        read_labels(tiny / "trainannot" / "a.png")
    (tiny / "trainannot" / "a.png").unlink()
    with pytest.raises(FileNotFoundError, match="a label map for every image"):
        CamVid(tiny, "train")


def test_transforms_move_image_and_labels_together():
    labels = torch.arange(24).reshape(4, 6)
    image = labels.float().expand(3, 4, 6)
    flipped, flipped_labels = transforms.RandomFlip(1.0)(image, labels)
    assert torch.equal(flipped[0].long(), flipped_labels)
    assert torch.equal(flipped_labels[:, 0], labels[:, -1])
    assert transforms.RandomFlip(0.0)(image, labels)[0] is image
    for _ in range(5):
        cut, cut_labels = transforms.RandomCrop((3, 2))(image, labels)
        assert cut_labels.shape == (3, 2)
        assert torch.equal(cut[0].long(), cut_labels)
    padded, padded_labels = transforms.RandomCrop((5, 6))(image, labels)
    assert padded.shape == (3, 5, 6)
    assert (padded_labels[4] == 255).all()
    small, small_labels = transforms.Resize((2, 3))(image, labels)
    assert small.shape == (3, 2, 3)
    assert set(small_labels.flatten().tolist()) <= set(range(24))
    both = transforms.Compose(transforms.Resize((2, 3)), transforms.Normalize())
    assert torch.equal(both(image, labels)[0], (small - 0.5) / 0.5)


def test_colour():
    pixels = colour(torch.tensor([[0, 1, 255]]), ((1, 2, 3), (4, 5, 6)))
    assert pixels.tolist() == [[[1, 2, 3], [4, 5, 6], [0, 0, 0]]]
