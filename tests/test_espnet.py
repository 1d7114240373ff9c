"""The Cityscapes weights that ESPNet's authors released, on street frames of another camera."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import segfast
from segfast.data import CamVid

SKY, ROAD = 0, 3  # of CamVid; the networks' classes are those of Cityscapes
CITYSCAPES = {ROAD: 0, SKY: 10}


@pytest.mark.parametrize(("q", "road", "sky"), [(8, 0.90, 0.90), (3, 0.62, 0.86)])
def test_released_weights(data_root, q, road, sky):
    """The shares of CamVid's road and sky pixels that are found are those of the official code, to 0.02."""
    model = segfast.load_official("espnet", data_root / "weights" / f"espnet_p_2_q_{q}.pth")
    assert (model.num_classes, model.variant, len(model.encoder.stage2), len(model.encoder.stage3)) == (20, "test", 2, q)
    frames = CamVid(data_root / "camvid", "val")
    hits, pixels = dict.fromkeys(CITYSCAPES, 0), dict.fromkeys(CITYSCAPES, 0)
    for i in range(0, len(frames), 12):
        image, labels = frames[i]
        images = F.interpolate(model.preprocessing(255 * image[None]), (512, 1024), mode="bilinear", align_corners=False)
        with torch.no_grad():
            classes = model(images).argmax(1, keepdim=True).float()
        classes = F.interpolate(classes, labels.shape, mode="nearest-exact")[0, 0]
        for theirs, ours in CITYSCAPES.items():
            mask = labels == theirs
            hits[theirs] += int((classes[mask] == ours).sum())
            pixels[theirs] += int(mask.sum())
    shares = {name: hits[name] / pixels[name] for name in pixels}
    assert abs(shares[ROAD] - road) <= 0.02
    assert abs(shares[SKY] - sky) <= 0.02


def test_released_encoder(data_root):
    model = segfast.load_official("espnet_c", data_root / "weights" / "espnet_c_p_2_q_8.pth", num_classes=20)
    image = CamVid(data_root / "camvid", "val")[0][0]
    classes = model.predict((255 * image).to(torch.uint8))
    labels = CamVid(data_root / "camvid", "val")[0][1]
    assert (classes[labels == ROAD] == CITYSCAPES[ROAD]).float().mean() > 0.5


@torch.no_grad()
def test_what_takes_the_place_of_a_norm_runs():
    """A part that the user has put there, or a longer one, is not passed over by the joined form."""
    network = segfast.create_model("espnet_c", 5).eval()
    x = torch.randn(1, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    network.encoder.norm1.append(nn.Threshold(1e9, 7.0))
    assert (network.forward_features(x).features["stage1"] == 7).all()
    network.encoder.norm1 = nn.Identity()
    network(x)
