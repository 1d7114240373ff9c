"""ESPNet and its encoder ESPNet-C (Mehta, Rastegari, Caspi, Shapiro and Hajishirzi, ECCV 2018, arXiv:1803.06815)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segfast.models._base import Output, Preprocessing, SegmentationModel
from segfast.models._keys import rename
from segfast.models._official import Weights, register_importer, told
from segfast.models._registry import Published, register_model
from segfast.nn import ESP, ConvBNAct
from segfast.nn.folding import joined

EPS = 1e-3  # of every BatchNorm
MEAN_BGR, STD_BGR = (72.3923111, 82.90893555, 73.15840149), (45.3192215, 46.15289307, 44.91483307)  # of Cityscapes, 0 to 255
VARIANTS = {"train": 19, "test": 16}  # channels that the decoder's last fusion takes from the first stage


class BNPReLU(nn.Sequential):
    def __init__(self, channels: int):
        super().__init__()
        self.bn = norm(channels)
        self.act = nn.PReLU(channels)


def norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=EPS)


def after(layers: nn.Module, *maps: Tensor) -> Tensor:
    """layers(cat(maps)), in one pass where the layers are a plain BNPReLU."""
    plain = type(layers) is BNPReLU and [*layers._modules] == ["bn", "act"]
    y = joined(maps, layers.bn, layers.act, by=layers) if plain else None
    if y is None:
        y = torch.cat(maps, 1)
        del maps  # not needed any more, and large
        y = layers(y)
    return y


class Encoder(nn.Module):
    """ESPNet-C (fig. 4c): the image, averaged down, goes in again at strides 2 and 4."""

    def __init__(self, num_classes: int, p: int, q: int):
        super().__init__()
        self.stem = ConvBNAct(3, 16, 3, 2, act="prelu", norm_layer=norm)
        self.norm1 = BNPReLU(16 + 3)
        self.down2 = ESP(16 + 3, 64, 2)
        self.stage2 = nn.Sequential(*(ESP(64, 64) for _ in range(p)))
        self.norm2 = BNPReLU(2 * 64 + 3)
        self.down3 = ESP(2 * 64 + 3, 128, 2)
        self.stage3 = nn.Sequential(*(ESP(128, 128) for _ in range(q)))
        self.norm3 = BNPReLU(2 * 128)
        self.classifier = nn.Conv2d(2 * 128, num_classes, 1, bias=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        half = F.avg_pool2d(images, 3, 2, 1)
        stem = self.stem(images)
        stage1 = after(self.norm1, stem, half)
        x = self.down2(stage1)
        stage2 = after(self.norm2, self.stage2(x), x, F.avg_pool2d(half, 3, 2, 1))
        x = self.down3(stage2)
        stage3 = after(self.norm3, x, self.stage3(x))
        return stem, stage1, stage2, stage3


class _ESPNet(SegmentationModel):
    preprocessing = Preprocessing(MEAN_BGR, tuple(255 * s for s in STD_BGR), divisor=1.0, bgr=True)

    def __init__(self, num_classes: int, p: int, q: int):
        super().__init__()
        for depth, value in (("p", p), ("q", q)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{self.name}: want {depth} >= 1, got {value!r}")
        self.num_classes = num_classes
        self.encoder = Encoder(num_classes, p, q)


class ESPNetC(_ESPNet):
    """ESPNet-C: logits at stride 8.

    Args:
        num_classes: classes of the logits.
        p: ESP modules at stride 4.
        q: ESP modules at stride 8.
    """

    name = "espnet_c"

    def __init__(self, num_classes: int = 19, p: int = 2, q: int = 8):
        super().__init__(num_classes, p, q)

    def outputs(self, images: Tensor) -> Output:
        _, stage1, stage2, stage3 = self.encoder(images)
        logits = self.encoder.classifier(stage3)
        return Output(logits, (), {"stage1": stage1, "stage2": stage2, "stage3": stage3, "pre_logits": stage3})


class ESPNet(_ESPNet):
    """ESPNet: the encoder's logits go up by transposed convolutions, joined by stages 2 and 1; logits at the images' size.

    Args:
        num_classes: classes of the logits.
        p: ESP modules at stride 4.
        q: ESP modules at stride 8.
        variant: what the last fusion takes of stage 1. "train": the stem's maps and the averaged image, as in the authors'
            training code; "test": the stem's maps alone, as in the authors' test code and their Cityscapes weights.
    """

    name = "espnet"

    def __init__(self, num_classes: int = 19, p: int = 2, q: int = 8, variant: str = "train"):
        super().__init__(num_classes, p, q)
        if variant not in VARIANTS:
            raise ValueError(f"espnet: want variant one of {', '.join(map(repr, VARIANTS))}, got {variant!r}")
        self.variant = variant
        self.logits_bn = norm(num_classes)
        self.up3 = nn.ConvTranspose2d(num_classes, num_classes, 2, 2, bias=False)
        self.project = nn.Conv2d(2 * 64 + 3, num_classes, 1, bias=False)
        self.combine_norm = BNPReLU(2 * num_classes)
        self.combine = ESP(2 * num_classes, num_classes, residual=False)
        self.up2 = nn.ConvTranspose2d(num_classes, num_classes, 2, 2, bias=False)
        self.up2_norm = BNPReLU(num_classes)
        self.fuse = ConvBNAct(VARIANTS[variant] + num_classes, num_classes, act="prelu", norm_layer=norm)
        self.classifier = nn.ConvTranspose2d(num_classes, num_classes, 2, 2, bias=False)

    def outputs(self, images: Tensor) -> Output:
        stem, stage1, stage2, stage3 = self.encoder(images)
        x = crop(self.up3(self.logits_bn(self.encoder.classifier(stage3))), stage2)
        x = self.combine(after(self.combine_norm, self.project(stage2), x))
        x = crop(self.up2_norm(self.up2(x)), stage1)
        fused = self.fuse(torch.cat((x, stage1 if self.variant == "train" else stem), 1))
        logits = crop(self.classifier(fused), images)
        return Output(logits, (), {"stage1": stage1, "stage2": stage2, "stage3": stage3, "pre_logits": fused})


def crop(x: Tensor, like: Tensor) -> Tensor:
    """What a doubled odd size has too much at the end is cut off."""
    return x[..., : like.shape[2], : like.shape[3]]


ESP_KEYS = (
    (r"\bc1\.conv\.", "reduce."),
    (r"\bd(1|2|4|8|16)\.conv\.", lambda match: f"branches.{int(match[1]).bit_length() - 1}."),
    (r"\bbn\.(bn|act)\.", r"\1."),
)
ENCODER_KEYS = (
    (r"^level1\.", "stem."),
    (r"^b([123])\.", r"norm\1."),
    (r"^level([23])_0\.", r"down\1."),
    (r"^level([23])\.", r"stage\1."),
    (r"^classifier\.conv\.", "classifier."),
    *ESP_KEYS,
)
DECODER_KEYS = (
    (r"^level3_C\.conv\.", "project."),
    (r"^br\.", "logits_bn."),
    (r"^conv\.", "fuse."),
    (r"^up_l3\.0\.", "up3."),
    (r"^combine_l2_l3\.0\.", "combine_norm."),
    (r"^combine_l2_l3\.1\.", "combine."),
    (r"^up_l2\.0\.", "up2."),
    (r"^up_l2\.1\.", "up2_norm."),
    *ESP_KEYS,
)


def depths(weights: Weights, prefix: str = "") -> dict[str, int]:
    found = {}
    for depth, level in (("p", f"{prefix}level2."), ("q", f"{prefix}level3.")):
        found[depth] = len({key.removeprefix(level).split(".")[0] for key in weights if key.startswith(level)})
        if not found[depth]:
            raise KeyError(f"{level}0.c1.conv.weight")
    return found


@register_importer("espnet_c")
def import_espnet_c(name: str, weights: Weights):
    options = depths(weights)
    model = told(ESPNetC(weights["classifier.conv.weight"].shape[0], **options), **options)
    return model, {key: f"encoder.{rename(key, ENCODER_KEYS)}" for key in weights}


@register_importer("espnet")
def import_espnet(name: str, weights: Weights):
    num_classes = weights["encoder.classifier.conv.weight"].shape[0]
    taken = weights["conv.conv.weight"].shape[1] - num_classes
    variant = next((variant for variant, channels in VARIANTS.items() if channels == taken), None)
    if variant is None:
        raise ValueError(f"load_official: these are not the weights of 'espnet': want 16 or 19 channels of stage 1, got {taken}")
    options = {**depths(weights, "encoder."), "variant": variant}
    model = told(ESPNet(num_classes, **options), **options)
    keys = {}
    for key in weights:
        inner = key.removeprefix("encoder.")
        keys[key] = rename(key, DECODER_KEYS) if inner == key else f"encoder.{rename(inner, ENCODER_KEYS)}"
    return model, keys


PAPER = "Mehta et al.: ESPNet: Efficient Spatial Pyramid of Dilated Convolutions for Semantic Segmentation, arXiv:1803.06815"
OFFICIAL = {"official": "sacmehta/ESPNet", "licence": "MIT"}


@register_model(
    paper=PAPER,
    parameters=363_462,
    macs=4_670_283_776,
    size=(512, 1024),
    published=Published(
        parameters="0.36 M",
        miou="60.3 test (Cityscapes)",
        speed="112 fps, 512x1024, Titan X",
        source="arXiv:1803.06815 and the authors' repository",
    ),
    **OFFICIAL,
)
def espnet(num_classes: int = 19, **options) -> ESPNet:
    """ESPNet; `p` and `q` are its depths, `variant` is "train" or "test"."""
    return ESPNet(num_classes, **options)


@register_model(paper=PAPER, parameters=349_193, macs=3_468_058_624, size=(512, 1024), **OFFICIAL)
def espnet_c(num_classes: int = 19, **options) -> ESPNetC:
    """ESPNet-C, the encoder alone; `p` and `q` are its depths."""
    return ESPNetC(num_classes, **options)
