"""FANet: a ResNet at half the usual resolution and attention that is linear in the pixels (Hu et al., arXiv:2007.03815)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from segfast.models._base import Output, SegmentationModel
from segfast.models._official import Weights, register_importer, told
from segfast.models._registry import Published, register_model
from segfast.nn import BatchNorm2d, ConvBNAct, FastAttention, resize
from segfast.nn.folding import activate, add, conv_bn_act
from segfast.nn.residual import NOTHING, conv, shortcut

DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}


class BasicBlock(nn.Module):
    """ResNet's unit with a leaky ReLU between its convolutions."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = conv(in_channels, out_channels, 3, stride), BatchNorm2d(out_channels)
        self.conv2, self.bn2 = conv(out_channels, out_channels, 3), BatchNorm2d(out_channels)
        self.inner, self.relu = nn.LeakyReLU(), nn.ReLU()
        self.downsample = shortcut(in_channels, out_channels, stride, BatchNorm2d)

    def forward(self, x: Tensor) -> Tensor:
        y = conv_bn_act(x, self.conv1, self.bn1, self.inner)
        y = conv_bn_act(y, self.conv2, self.bn2, NOTHING)
        x = x if self.downsample is None else conv_bn_act(x, *self.downsample, NOTHING)
        return activate(self.relu, add(x, y))


class Encoder(nn.Module):
    """ResNet whose first stage has stride 2 as well, so that its maps are at 1/8, 1/16, 1/32 and 1/64."""

    def __init__(self, depth: int):
        super().__init__()
        self.conv1, self.bn1, self.act = conv(3, 64, 7, 2), nn.BatchNorm2d(64), nn.LeakyReLU()
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        in_channels = 64
        for i, blocks in enumerate(DEPTHS[depth]):
            width = 64 * 2**i
            units = [BasicBlock(in_channels, width, 2), *(BasicBlock(width, width, 1) for _ in range(blocks - 1))]
            self.add_module(f"layer{i + 1}", nn.Sequential(*units))
            in_channels = width

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.maxpool(conv_bn_act(x, self.conv1, self.bn1, self.act))
        maps = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            maps.append(x)
        return maps


class Fusion(nn.Module):
    """Attention over a stage's map, plus what comes up from the coarser stage; gives the map for the finer one and its own."""

    def __init__(self, channels: int):
        super().__init__()
        self.attention = FastAttention(channels, 32, value_act="leaky_relu", act="leaky_relu", norm_layer=BatchNorm2d)
        # the padding is the authors': a border that only BatchNorm sees, which the resizing then draws inwards
        self.up = ConvBNAct(channels, channels // 2, 1, padding=1, act="leaky_relu")
        self.smooth = ConvBNAct(channels, 128, act="leaky_relu", norm_layer=BatchNorm2d)

    def forward(self, x: Tensor, coarser: Tensor | None = None) -> Tensor:
        y = self.attention(x)
        return y if coarser is None else add(resize(coarser, y.shape[2:], align_corners=True), y)


class Head(nn.Sequential):
    def __init__(self, in_channels: int, channels: int, num_classes: int):
        super().__init__()
        self.conv = ConvBNAct(in_channels, channels, act="leaky_relu", norm_layer=BatchNorm2d)
        self.classifier = nn.Conv2d(channels, num_classes, 1, bias=False)


class FANet(SegmentationModel):
    """FANet.

    Args:
        num_classes: classes of the logits.
        depth: of the ResNet, 18 or 34.
        aux: heads on the maps of the two coarsest stages, whose logits `forward_features` gives for the training loss.
    """

    name = "fanet"
    align_corners = True

    def __init__(self, num_classes: int = 19, depth: int = 18, aux: bool = False):
        super().__init__()
        if depth not in DEPTHS:
            raise ValueError(f"fanet: want depth {' or '.join(map(str, DEPTHS))}, got {depth}")
        self.num_classes = num_classes
        # the authors built both convolutions for all four stages
        self.idle = ("fusion8.up.", "fusion16.smooth.") if aux else ("fusion8.up.", "fusion16.smooth.", "fusion64.smooth.")
        self.encoder = Encoder(depth)
        self.fusion64, self.fusion32, self.fusion16, self.fusion8 = (Fusion(channels) for channels in (512, 256, 128, 64))
        self.head = Head(256, 256, num_classes)
        self.aux = nn.ModuleList([Head(128, 64, num_classes), Head(128, 64, num_classes)] if aux else [])

    def outputs(self, images: Tensor) -> Output:
        stages = self.encoder(images)
        y64 = self.fusion64(stages[3])
        y32 = self.fusion32(stages[2], self.fusion64.up(y64))
        y16 = self.fusion16(stages[1], self.fusion32.up(y32))
        y8 = self.fusion8(stages[0], self.fusion16.up(y16))
        context, fine = self.fusion32.smooth(y32), self.fusion8.smooth(y8)
        fused = torch.cat([resize(context, fine.shape[2:], align_corners=True), fine], 1)
        aux = (self.aux[0](self.fusion64.smooth(y64)), self.aux[1](context)) if len(self.aux) else ()
        features = {f"stage{i + 1}": stage for i, stage in enumerate(stages)}
        return Output(self.head(fused), aux, features | {"pre_logits": fused})


PAPER = (
    "Hu, Perazzi, Heilbron, Wang, Lin, Saenko, Sclaroff: Real-time Semantic Segmentation with Fast Attention, arXiv:2007.03815"
)
OFFICIAL = "feinanshan/FANet"


@register_model(
    paper=PAPER,
    parameters=13_820_032,
    macs=47_091_187_712,
    published=Published(
        miou="74.4 test (Cityscapes)",
        speed="72 fps, 1024x2048, Titan X",
        source="arXiv:2007.03815, abstract; the speed leaves out BatchNorm and the last resizing",
    ),
    official=OFFICIAL,
    licence="MIT",
)
def fanet18(num_classes: int = 19, **options) -> FANet:
    """FANet on ResNet-18; `aux` adds the training heads."""
    return FANet(num_classes, 18, **options)


@register_model(
    paper=PAPER,
    parameters=23_928_192,
    macs=66_418_540_544,
    published=Published(
        miou="75.5 test (Cityscapes)",
        speed="58 fps, 1024x2048, Titan X",
        source="arXiv:2007.03815, abstract; the speed leaves out BatchNorm and the last resizing",
    ),
    official=OFFICIAL,
    licence="MIT",
)
def fanet34(num_classes: int = 19, **options) -> FANet:
    """FANet on ResNet-34; `aux` adds the training heads."""
    return FANet(num_classes, 34, **options)


# The repository names stages by what their strides would be without the encoder's extra reduction, and its training code
# (ffm, clslayer_8 and two more heads) differs in names from its speed test (fam, clslayer).
MODULES = {
    "resnet.": "encoder.",
    "ffm_": "fam_",
    "fam_32.": "fusion64.",
    "fam_16.": "fusion32.",
    "fam_8.": "fusion16.",
    "fam_4.": "fusion8.",
    "w_qs.": "attention.query.",
    "w_ks.": "attention.key.",
    "w_vs.": "attention.value.",
    "latlayer3.": "attention.project.",
    "clslayer_32.": "aux.0.",
    "clslayer_16.": "aux.1.",
    "clslayer_8.": "head.",
    "clslayer.": "head.",
    "conv_out.": "classifier.",
}


@register_importer("fanet18", "fanet34")
def import_fanet(name: str, weights: Weights) -> tuple[nn.Module, dict[str, str]]:
    """The checkpoints of the authors' training code, which hold auxiliary heads, and those of their speed test, which do not."""
    head = "clslayer_8" if "clslayer_8.conv_out.weight" in weights else "clslayer"
    classes = weights[f"{head}.conv_out.weight"].shape[0]
    aux = any(key.startswith("clslayer_32.") for key in weights)
    model = told(FANet(classes, int(name.removeprefix("fanet")), aux), aux=aux)
    return model, {key: our_key(key) for key in weights}


def our_key(key: str) -> str:
    """The name here of a tensor of the authors' repository."""
    for old, new in MODULES.items():
        key = key.replace(old, new, 1)
    return key
