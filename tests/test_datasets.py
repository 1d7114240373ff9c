"""Datasets in their folder layouts, draws that move image, labels and cached logits together, and the check of a dataset."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import extra
from PIL import Image
from torch.utils.data import DataLoader

from segfast.data import (
    ADE20K,
    DATASETS,
    Augment,
    CamVid,
    Cityscapes,
    Geometry,
    ImageFolder,
    PascalVOC,
    Stream,
    SyntheticStreets,
    TorchvisionTransform,
    read_label_map,
)
from segfast.data.augment import generator
from segfast.data.check import check


def picture(path, labels=None, size=(8, 6)):
    path.parent.mkdir(parents=True, exist_ok=True)
    if labels is None:
        Image.new("RGB", size, (10, 20, 30)).save(path)
    else:
        Image.fromarray(np.resize(np.asarray(labels, np.uint8), size[::-1])).save(path)


def test_cityscapes(tmp_path):
    for city, frame in (("ulm", "ulm_000"), ("bonn", "bonn_001")):
        picture(tmp_path / "leftImg8bit" / "train" / city / f"{frame}_leftImg8bit.png")
        picture(tmp_path / "gtFine" / "train" / city / f"{frame}_gtFine_labelIds.png", [0, 7, 8, 33, 11, 29])
        picture(tmp_path / "gtFine" / "train" / city / f"{frame}_gtFine_color.png")
    data = Cityscapes(tmp_path)
    assert len(data) == 2
    assert "bonn" in data.describe(0)
    assert data[0][1][0].tolist() == [255, 0, 1, 18, 2, 255, 255, 0]
    assert len(data.classes) == len(data.palette) == 19
    assert sorted(data.own_label_map.values()) == list(range(19))
    with pytest.raises(FileNotFoundError, match="leftImg8bit"):
        Cityscapes(tmp_path, "val")


def test_ade20k(tmp_path):
    picture(tmp_path / "images" / "training" / "a.jpg")
    picture(tmp_path / "annotations" / "training" / "a.png", [0, 1, 150])
    data = ADE20K(tmp_path)
    assert data[0][1].unique().tolist() == [0, 149, 255]
    assert data.classes[0] == "1"
    rows = ["Idx\tRatio\tTrain\tVal\tName", *(f"{i}\t0.1\t1\t1\tthing {i}, other" for i in range(1, 151))]
    (tmp_path / "objectInfo150.txt").write_text("\n".join(rows))
    assert ADE20K(tmp_path).classes[149] == "thing 150"
    assert len(set(data.palette)) == 150
    picture(tmp_path / "annotations" / "training" / "a.png", [151])
    assert (ADE20K(tmp_path)[0][1] == 255).all()


def test_pascal_voc(tmp_path):
    for stem in ("a", "b", "c"):
        picture(tmp_path / "JPEGImages" / f"{stem}.jpg")
        picture(tmp_path / "SegmentationClass" / f"{stem}.png", [0, 20, 255])
    lists = tmp_path / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("c\na\n")
    data = PascalVOC(tmp_path)
    assert [path.stem for path in data.images] == ["c", "a"]
    assert data[0][1].unique().tolist() == [0, 20, 255]
    assert data.palette[15] == (192, 128, 128)  # person, in everybody's figures
    (tmp_path / "SegmentationClass" / "a.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.jpg"):
        PascalVOC(tmp_path)


@pytest.fixture
def plain(tmp_path):
    for split in ("train", "val"):
        for stem in ("a", "b"):
            picture(tmp_path / split / "images" / f"{stem}.jpg")
            picture(tmp_path / split / "masks" / f"{stem}.png", [0, 1, 2])
    (tmp_path / "classes.txt").write_text("road\nsky\n\ncar\n")
    return tmp_path


def test_folder(plain):
    data = ImageFolder(plain)
    assert data.classes == ("road", "sky", "car")
    assert len(data.palette) == 3
    assert data[1][1].unique().tolist() == [0, 1, 2]
    assert ImageFolder(plain, label_map={1: 0, 2: 1})[0][1].unique().tolist() == [0, 1, 255]
    assert ImageFolder(plain, ignore_index=1)[0][1].unique().tolist() == [0, 2, 255]
    with pytest.raises(ValueError, match="want a label map from"):
        ImageFolder(plain, label_map={1: 3})
    (plain / "classes.txt").unlink()
    assert ImageFolder(plain, num_classes=4).classes[3] == "class 3"
    with pytest.raises(ValueError, match="num_classes, got neither"):
        ImageFolder(plain)
    two = Image.fromarray(np.full((6, 8), 700, np.uint16))
    two.save(plain / "train" / "masks" / "a.png")
    with pytest.raises(ValueError, match=r"labels 0 to 3 or 255, got 700 in .*a\.png"):
        ImageFolder(plain, num_classes=4)[0]
    assert (ImageFolder(plain, num_classes=4, label_map={700: 2})[0][1] == 2).all()


def test_kept_in_memory(plain):
    once, data = ImageFolder(plain), ImageFolder(plain, keep=True)
    want = [once[i] for i in range(len(once))]
    first = [data[i] for i in range(len(data))]
    first[0][0].zero_()  # what is handed out is nobody else's
    for path in (*data.images, *data.labels):
        path.unlink()
    for (image, labels), (kept_image, kept_labels) in zip(want, [data[i] for i in range(len(data))], strict=True):
        assert torch.equal(image, kept_image)
        assert torch.equal(labels, kept_labels)
        assert labels.dtype == kept_labels.dtype


def test_damaged_files_are_named(plain):
    data = ImageFolder(plain)
    path = plain / "train" / "images" / "a.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ValueError, match=r"cannot read .*a\.jpg: .*truncated"):
        data[0]
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"cannot read .*a\.jpg"):
        data[0]
    (plain / "train" / "masks" / "b.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"b\.png"):
        data[1]


def test_label_map_texts(tmp_path):
    assert read_label_map("7:0,8:1") == {7: 0, 8: 1}
    (tmp_path / "m.json").write_text('{"3": 255}')
    assert read_label_map(str(tmp_path / "m.json")) == {3: 255}
    for text in ("7", "a:b", "1:2:3"):
        with pytest.raises(ValueError, match="label map: want"):
            read_label_map(text)


def test_check(plain):
    assert check(ImageFolder(plain, complete=False)).healthy
    picture(plain / "train" / "images" / "lonely.jpg")
    picture(plain / "train" / "masks" / "orphan.png", [0])
    picture(plain / "train" / "masks" / "a.png", [0, 7])
    picture(plain / "train" / "masks" / "b.png", [0, 1], size=(7, 6))
    seen = []
    health = check(ImageFolder(plain, complete=False), lambda *now: seen.append(now))
    assert not health.healthy
    text = "\n".join(health.problems)
    assert "no label map for" in text
    assert "lonely.jpg" in text
    assert "labels that are no class: 7 (24 pixels)" in text
    assert "differ in size" in text
    assert any("orphan.png" in note for note in health.notes)
    assert any("no pixel of the class 'car'" in note for note in health.notes)
    assert health.sizes == {(6, 8): 2}
    assert health.pixels == [24 + 21, 21, 0]
    assert seen == [(1, 2), (2, 2)]
    (plain / "train" / "images" / "a.jpg").write_bytes(b"nothing")
    assert any("a.jpg" in problem for problem in check(ImageFolder(plain, complete=False)).problems)


def test_check_of_camvid(data_root):
    camvid = CamVid(data_root / "camvid", "val")
    camvid.files = type(camvid.files)(camvid.files.pairs[:5])
    health = check(camvid)
    assert health.healthy
    assert sum(health.pixels) + health.ignored == 5 * 360 * 480


def coordinates(height, width):
    rows = torch.arange(height)[:, None].expand(height, width)
    columns = torch.arange(width).expand(height, width)
    return torch.stack([rows, columns, rows]).float(), rows * width + columns


@pytest.mark.parametrize("scale, flip", itertools.product([(1.0, 1.0), (0.5, 0.5), (2.0, 2.0)], [0.0, 1.0]))
def test_image_and_labels_move_together(scale, flip):
    image, labels = coordinates(40, 60)
    augment = Augment((16, 24), scale, flip)
    for seed in range(8):
        geometry = augment.draw((40, 60), torch.Generator().manual_seed(seed))
        moved, numbers = geometry.image(image), geometry.labels(labels)
        assert moved.shape == (3, 16, 24)
        inside = torch.zeros(16, 24, dtype=torch.bool)
        inside[2:-2, 2:-2] = True
        inside &= numbers != 255
        inside &= F.avg_pool2d((numbers == 255)[None].float(), 5, 1, 2)[0] == 0
        assert (moved[0] - numbers // 60)[inside].abs().max() <= 1
        assert (moved[1] - numbers % 60)[inside].abs().max() <= 1
        steps = moved[1].diff(dim=1)[inside[:, 1:]]
        assert (steps.sign() == (-1 if flip else 1)).all()
        if scale[0] == 1:
            assert torch.equal(moved[1].long()[inside], (numbers % 60)[inside])


def test_windows_cover_the_frame_and_no_more():
    augment = Augment((8, 8), (1.0, 1.0), 0.0)
    draws = [augment.draw((10, 12), torch.Generator().manual_seed(i)) for i in range(300)]
    assert {g.top for g in draws} == {0, 1, 2}
    assert {g.left for g in draws} == {0, 1, 2, 3, 4}
    image, labels = torch.ones(3, 10, 12), torch.zeros(10, 12, dtype=torch.int64)
    larger = Augment((20, 16), (1.0, 1.0), 0.0).draw((10, 12), torch.Generator().manual_seed(0))
    assert larger.image(image).sum() == 3 * 120
    assert (larger.labels(labels) == 0).sum() == 120
    assert (larger.labels(labels) == 255).sum() == 20 * 16 - 120


@pytest.mark.parametrize("align_corners", [False, True])
def test_cached_logits_are_seen_through_the_window(align_corners):
    torch.manual_seed(0)
    logits = F.interpolate(torch.randn(1, 3, 3, 4), (10, 15), mode="bicubic")[0]
    same = Geometry(0, 0, 40, 60, (40, 60), False).logits(logits, (40, 60), align_corners)
    torch.testing.assert_close(same, logits)
    full = F.interpolate(logits[None], (40, 60), mode="bilinear", align_corners=align_corners)[0]
    # Without scaling, a network without context would give the same logits for the crop at the crop's full size.
    one = Geometry(3, 5, 16, 24, (16, 24), False)
    at_full_size = one.logits(full, (40, 60), align_corners)
    torch.testing.assert_close(at_full_size, full[:, 3:19, 5:29])
    mirrored = Geometry(3, 5, 16, 24, (16, 24), True)
    torch.testing.assert_close(mirrored.logits(full, (40, 60), align_corners), full[:, 3:19, 5:29].flip(-1))
    torch.testing.assert_close(
        mirrored.logits(logits, (40, 60), align_corners), one.logits(logits, (40, 60), align_corners).flip(-1)
    )
    twice = Geometry(4, 6, 8, 12, (16, 24), False)
    seen = F.interpolate(full[None, :, 4:12, 6:18], (16, 24), mode="bilinear")[0]
    inner = (slice(None), slice(2, -2), slice(2, -2))
    torch.testing.assert_close(twice.logits(full, (40, 60), align_corners)[inner], seen[inner], rtol=1e-4, atol=1e-5)
    assert twice.logits(logits, (40, 60), align_corners).shape == (3, 4, 6)


def test_tint_stays_in_range_and_can_be_repeated():
    image = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    augment = Augment((8, 8), colour=0.5)
    tinted = [augment.tint(image.clone(), torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(tinted[0], tinted[1])
    assert not torch.equal(tinted[0], tinted[2])
    assert all(x.min() >= 0 and x.max() <= 1 for x in tinted)
    assert Augment((8, 8)).tint(image, torch.Generator()) is image
    for options in (
        {"crop": (0, 3)},
        {"crop": (3, 3), "scale": (2, 1)},
        {"crop": (3, 3), "flip": 2},
        {"crop": (3, 3), "colour": 1},
    ):
        with pytest.raises(ValueError, match="Augment: want"):
            Augment(**options)


def test_stream_is_a_function_of_its_position():
    streets = SyntheticStreets(5, (24, 32))
    stream = Stream(streets, Augment((16, 16), colour=0.2), seed=3)
    positions = [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    for workers in (0, 2):
        loaded = list(DataLoader(stream, batch_sampler=positions, num_workers=workers))
        for chosen, (images, labels) in zip(positions, loaded):
            for i, position in enumerate(chosen):
                image, label = Stream(streets, Augment((16, 16), colour=0.2), seed=3)[position]
                assert torch.equal(images[i], image)
                assert torch.equal(labels[i], label)
    assert sorted(stream.index(i) for i in range(5)) == sorted(stream.index(i) for i in range(5, 10)) == list(range(5))
    assert [stream.index(i) for i in range(20)] != [Stream(streets, None, seed=4).index(i) for i in range(20)]
    assert not torch.equal(stream[0][0], Stream(streets, Augment((16, 16), colour=0.2), seed=4)[0][0])
    image, labels = Stream(streets, None)[2]
    assert image.shape == (3, 24, 32)
    with_logits = Stream(streets, None, logits=lambda index, geometry, frame: torch.tensor([index, *frame]))
    assert with_logits[2][2].tolist() == [with_logits.index(2), 24, 32]
    with pytest.raises(ValueError, match="empty one"):
        Stream(SyntheticStreets(0), None)


def test_generators_depend_on_all_that_they_are_made_of():
    first = {tuple(torch.rand(2, generator=generator(*key)).tolist()) for key in (("a", 1), ("a", 2), ("b", 1), ("a", 1, 0))}
    assert len(first) == 4
    assert torch.equal(torch.rand(2, generator=generator("a", 1)), torch.rand(2, generator=generator("a", 1)))


def test_every_dataset_has_a_name():
    assert set(DATASETS) == {"camvid", "cityscapes", "ade20k", "voc", "folder", "synthetic"}


@pytest.fixture(scope="module")
def v2():
    extra("torchvision")
    from torchvision.transforms import v2

    return v2


def test_torchvision_transforms(plain, v2):
    joint = v2.Compose([v2.RandomHorizontalFlip(1.0), v2.RandomCrop((12, 12), pad_if_needed=True), v2.ColorJitter(0.2)])
    image, labels = coordinates(6, 8)
    moved, numbers = TorchvisionTransform(v2.RandomHorizontalFlip(1.0))(image, labels)
    assert torch.equal(moved, image.flip(-1))
    assert torch.equal(numbers, labels.flip(-1))
    assert type(moved) is type(numbers) is torch.Tensor
    image, labels = ImageFolder(plain, transform=TorchvisionTransform(joint))[0]
    assert image.shape == (3, 12, 12)
    assert (labels == 255).sum() == 144 - 48


def padded_crop(v2):
    from torchvision import tv_tensors

    fill = {tv_tensors.Image: 0, tv_tensors.Mask: 7}
    return v2.RandomCrop((48, 56), pad_if_needed=True, fill=fill)


# How many pixels of the frame a replayed pixel may be off: none where pixels are only moved. Masks are read at the nearest pixel,
# by torchvision's resize by 1 / s at the nearest above and to the left: at most (s + 1) / 2.
MOVES = {
    "mirror": (lambda v2: v2.RandomHorizontalFlip(1.0), 0),
    "upside down": (lambda v2: v2.RandomVerticalFlip(1.0), 0),
    "crop": (lambda v2: v2.RandomCrop((24, 32)), 0),
    "crop of more than the frame": (padded_crop, 0),
    "pad": (lambda v2: v2.Pad((3, 5), fill=9), 0),
    "reflected": (lambda v2: v2.Pad(4, padding_mode="reflect"), 0),
    "enlarged": (lambda v2: v2.Resize((80, 96)), 0.25),
    "shrunk": (lambda v2: v2.Resize((20, 24)), 0.75),
    "resized crop": (lambda v2: v2.RandomResizedCrop((32, 32), scale=(0.3, 1.0)), 1.25),
    "scale, crop, mirror, colour": (
        lambda v2: v2.Compose(
            [
                v2.ScaleJitter((40, 48), (0.9, 2.0)), v2.RandomCrop((32, 32)), v2.RandomHorizontalFlip(),
                v2.ColorJitter(0.3, 0.3),
            ]
        ),
        1.06,
    ),
    "rotated": (lambda v2: v2.RandomRotation(30, v2.InterpolationMode.BILINEAR, fill=2), 0.51),
    "sheared": (lambda v2: v2.RandomAffine(20, (0.1, 0.1), (0.8, 1.3), 10, v2.InterpolationMode.BILINEAR, fill=3), 0.51),
    "perspective": (lambda v2: v2.RandomPerspective(0.3, 1.0), 0.51),
    "elastic": (lambda v2: v2.ElasticTransform(30.0, 4.0), 0.51),
}  # fmt: skip


@pytest.mark.parametrize("name", MOVES)
def test_torchvision_transforms_are_replayed_on_logits(v2, name):
    """The transform run on logits that say where they are: the difference is the error in pixels of the frame."""
    from torchvision import tv_tensors

    make, bound = MOVES[name]
    transform = make(v2)
    colourless = v2.Compose([t for t in getattr(transform, "transforms", [transform]) if not isinstance(t, v2.ColorJitter)])
    image, numbers = coordinates(40, 48)
    places, labels = image[:2], numbers % 3
    for seed in range(4):
        draws = generator("test", seed)
        _, moved, geometry = TorchvisionTransform(transform).apply(torch.rand(3, 40, 48), labels, draws)
        inside = geometry.inside
        replayed = geometry.logits(places, (40, 48), False)
        with torch.random.fork_rng():
            torch.set_rng_state(draws.get_state())
            # The map of ones stays at 1 where nothing from outside the frame was mixed in.
            *direct, share = colourless(tv_tensors.Image(torch.cat([places, torch.ones(1, 40, 48)]))).as_subclass(torch.Tensor)
        whole = inside & ((share - 1).abs() < 1e-4)
        error = (replayed - torch.stack(direct)).abs()[:, whole].max()
        assert whole.sum() > 0.25 * inside.sum()
        assert error <= bound + 1e-3, error
        # What has no place in the frame has no label; the rest has that of its place.
        assert (moved[~inside] == 255).all()
        at = geometry.rows[inside].long() * 48 + geometry.columns[inside].long()
        assert torch.equal(moved[inside], labels.flatten()[at])
    padding = {"crop of more than the frame", "pad", "rotated", "sheared", "perspective", "elastic"}
    assert bool((~inside).any()) == (name in padding)


@pytest.mark.parametrize("align_corners", [False, True])
def test_torchvision_replay_at_the_logits_own_stride(v2, align_corners):
    torch.manual_seed(0)
    logits = F.interpolate(torch.randn(1, 3, 3, 4), (10, 15), mode="bicubic")[0]
    labels = torch.zeros(40, 60, dtype=torch.int64)
    for window in ((3, 5, 16, 24), (-4, -6, 48, 72)):
        for mirrored in (False, True):

            def transform(*maps, window=window, mirrored=mirrored):
                cut = [v2.functional.crop(x, *window) for x in maps]
                return [v2.functional.horizontal_flip(x) for x in cut] if mirrored else cut

            _, moved, geometry = TorchvisionTransform(transform).move(torch.zeros(3, 40, 60), labels)
            own = Geometry(*window, window[2:], mirrored)
            assert torch.equal(moved, own.labels(labels))
            expected = own.logits(logits, (40, 60), align_corners)
            got = geometry.logits(logits, (40, 60), align_corners)
            seen = F.interpolate(geometry.inside[None, None].float(), expected.shape[1:], mode="area")[0, 0] == 1
            assert seen.sum() >= 24
            torch.testing.assert_close(got[:, seen], expected[:, seen], rtol=1e-4, atol=1e-4)


def test_torchvision_draws_are_a_function_of_the_position(v2):
    streets = SyntheticStreets(3, (24, 32))
    crop = v2.Compose([v2.RandomCrop((16, 16)), v2.RandomHorizontalFlip()])

    def seen():
        stream = Stream(streets, TorchvisionTransform(crop), 1, lambda index, geometry, frame: geometry.columns)
        return DataLoader(stream, batch_sampler=[[0, 1, 2], [3, 4, 5]])

    torch.manual_seed(7)
    state, first = torch.get_rng_state(), list(seen())
    torch.manual_seed(8)
    for one, other in zip(first, seen()):
        assert all(torch.equal(a, b) for a, b in zip(one, other))
    assert len({tuple(columns[0].tolist()) for _, _, batch in first for columns in batch}) > 1
    torch.set_rng_state(state)
    stream = Stream(streets, TorchvisionTransform(crop), 1)
    stream[0]
    assert torch.equal(torch.get_rng_state(), state)  # the caller's own generator is left as it was
