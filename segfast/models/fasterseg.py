"""FasterSeg: a searched network of two branches that share their first cells (Chen et al., arXiv:1912.10917)."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from segfast.models._base import Output, SegmentationModel
from segfast.models._official import Weights, register_importer, told
from segfast.models._registry import Published, register_model
from segfast.nn import BatchNorm2d, ConvBNAct, resize
from segfast.nn.folding import activate, conv_bn_act
from segfast.nn.residual import NOTHING, conv


class Branch(NamedTuple):
    """One path through the search space, cell by cell.

    cells: the operator of each cell: "c" one 3x3 convolution, "C" two, "z" one zoomed convolution, "Z" two.
    scales: the stride of the map that each cell reads, as log2(stride / 8).
    widths: channels that each cell writes, in units of the stride of the map it writes; the last is the head's.
    """

    cells: str
    scales: str
    widths: tuple[int, ...]


class Architecture(NamedTuple):
    """stem: the width of stem and heads, in the units of `Branch.widths`; branches: to 1/32 and to 1/16; shared: first cells."""

    stem: int
    branches: tuple[Branch, Branch]
    shared: int


# Decoded from the architecture parameters that the authors released (arch_0 and arch_1): per cell the operator of the largest
# alpha, per layer the width of the largest ratio, and the two places of downsampling with the largest product of betas.
ARCHITECTURES = {
    "teacher": Architecture(
        stem=12,
        branches=(
            Branch("zZZZZZZzZZZZZZCC", "0000001111111122", (12,) * 16),
            Branch("zZZZZCZzZZZZZZZZ", "0000011111111111", (12,) * 16),
        ),
        shared=4,
    ),
    "student": Architecture(
        stem=8,
        branches=(
            Branch("CCZzZZZZZZ", "0000111122", (4, 4, 4, 8, 4, 4, 4, 4, 4, 8)),
            Branch("CCZZCCZZZ", "000000111", (4, 4, 4, 4, 4, 4, 4, 12, 8)),
        ),
        shared=3,
    ),
}

unit = partial(ConvBNAct, norm_layer=BatchNorm2d)


class Cell(nn.Module):
    """One or two 3x3 convolutions; zoomed ones see the map at half its size (arXiv:1912.10917, zoomed convolution)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, convs: int = 2, zoomed: bool = False):
        super().__init__()
        self.convs = convs
        self.zoomed = zoomed
        self.stride = stride
        self.conv1, self.bn1 = conv(in_channels, out_channels, 3, 1 if zoomed else stride), BatchNorm2d(out_channels)
        if convs == 2:
            self.conv2, self.bn2 = conv(out_channels, out_channels, 3), BatchNorm2d(out_channels)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[2:]
        if self.zoomed:
            x = resize(x, (max(1, size[0] // 2), max(1, size[1] // 2)), align_corners=True)
        grows = self.zoomed and self.stride == 1
        last = NOTHING if grows else self.relu
        if self.convs == 2:
            x = conv_bn_act(x, self.conv1, self.bn1, self.relu)
            x = conv_bn_act(x, self.conv2, self.bn2, last)
        else:
            x = conv_bn_act(x, self.conv1, self.bn1, last)
        return activate(self.relu, resize(x, size, align_corners=True)) if grows else x


class FeatureFusion(nn.Module):
    """A 1x1 convolution over both branches. Its attention stands in the released weights, but their forward leaves it out."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = unit(channels, channels, 1)
        self.attention = nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), nn.Conv2d(channels, channels, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Head(nn.Sequential):
    def __init__(self, in_channels: int, num_classes: int):
        super().__init__()
        hidden = in_channels if in_channels <= 256 else in_channels // 2
        self.conv = unit(in_channels, hidden)
        self.classifier = nn.Conv2d(hidden, num_classes, 1)


def strides_written(branch: Branch) -> list[int]:
    """The stride of the map that each cell of the branch writes."""
    return [8 * 2 ** int(scale) for scale in branch.scales[1:] + branch.scales[-1]]


def build_cells(branch: Branch, in_channels: int) -> list[Cell]:
    cells = []
    stride = 8
    for kind, written, width in zip(branch.cells, strides_written(branch), branch.widths):
        out_channels = written * width
        cells.append(Cell(in_channels, out_channels, written // stride, 2 if kind in "CZ" else 1, kind in "zZ"))
        in_channels, stride = out_channels, written
    return cells


class FasterSeg(SegmentationModel):
    """FasterSeg with the student's or the teacher's architecture.

    Args:
        num_classes: classes of the logits.
        architecture: "student" or "teacher".
        aux: heads on the maps at 1/16 and 1/32, whose logits `forward_features` gives for the training loss.
    """

    name = "fasterseg"
    align_corners = True
    idle = ("fusion.attention.",)

    def __init__(self, num_classes: int = 19, architecture: str = "student", aux: bool = False):
        super().__init__()
        if architecture not in ARCHITECTURES:
            raise ValueError(f"fasterseg: want architecture {' or '.join(sorted(ARCHITECTURES))}, got {architecture!r}")
        self.num_classes = num_classes
        stem, branches, shared = ARCHITECTURES[architecture]
        c8, c16, c32 = 8 * stem, 16 * stem, 32 * stem
        self.stem = nn.Sequential(unit(3, 4 * stem, 3, 2), Cell(4 * stem, c8, 2), Cell(c8, c8, 2))
        deep, shallow = (build_cells(branch, c8) for branch in branches)
        self.written = tuple(strides_written(branch) for branch in branches)
        self.shared = nn.ModuleList(deep[:shared])
        self.deep = nn.ModuleList(deep[shared:])
        self.shallow = nn.ModuleList(shallow[shared:])
        # channels of a branch's map at each stride: those of the last cell that writes there
        (deep8, deep16, _), (shallow8, _) = (
            {stride: stride * width for stride, width in zip(written, branch.widths)}.values()
            for written, branch in zip(self.written, branches)
        )
        self.lateral = nn.ModuleList([unit(c32, c16, 1), unit(c16, c8, 1)])
        self.refine = nn.ModuleList([unit(c16 + deep16, c16), unit(c8 + deep8, c8)])
        self.shallow_lateral = unit(c16, c8, 1)
        self.shallow_refine = unit(c8 + shallow8, c8)
        self.fusion = FeatureFusion(2 * c8)
        self.head = Head(2 * c8, num_classes)
        self.aux = nn.ModuleList([Head(c16 + deep16, num_classes), Head(c32, num_classes)] if aux else [])

    def outputs(self, images: Tensor) -> Output:
        x = self.stem(images)
        for cell in self.shared:
            x = cell(x)
        deep, shallow = {8: x}, {8: x}
        for cells, written, maps in ((self.deep, self.written[0], deep), (self.shallow, self.written[1], shallow)):
            y = x
            for cell, stride in zip(cells, written[len(self.shared) :]):
                y = maps[stride] = cell(y)
        y = deep[32]
        for stride, lateral, refine in zip((16, 8), self.lateral, self.refine):
            y = refine(torch.cat([resize(lateral(y), deep[stride].shape[2:], align_corners=True), deep[stride]], 1))
        z = resize(self.shallow_lateral(shallow[16]), shallow[8].shape[2:], align_corners=True)
        z = self.shallow_refine(torch.cat([z, shallow[8]], 1))
        fused = self.fusion(torch.cat([y, z], 1))
        aux = ()
        if len(self.aux):
            # odd sizes: a zoomed cell rounds its half down, a plain one up, so the branches may differ by one at 1/16
            middle = resize(shallow[16], deep[16].shape[2:], align_corners=True)
            aux = (self.aux[0](torch.cat([deep[16], middle], 1)), self.aux[1](deep[32]))
        features = {
            "stage1": deep[8],
            "stage2": deep[16],
            "stage3": deep[32],
            "shallow_stage1": shallow[8],
            "shallow_stage2": shallow[16],
            "pre_logits": fused,
        }
        return Output(self.head(fused), aux, features)


PAPER = "Chen, Gong, Liu, Zhang, Li, Wang: FasterSeg: Searching for Faster Real-time Semantic Segmentation, arXiv:1912.10917"
OFFICIAL = "VITA-Group/FasterSeg"


@register_model(
    paper=PAPER,
    parameters=3_454_643,
    macs=27_770_486_784,
    published=Published(
        parameters="4.4 M (with the training heads)",
        macs="28.2 G at 1024x2048",
        miou="73.1 val, 71.5 test (Cityscapes)",
        speed="163.9 fps, 1024x2048, GTX 1080 Ti, TensorRT 5.1.5",
        source="table 4 in the authors' repository; parameters and MACs as the paper is quoted",
    ),
    official=OFFICIAL,
    licence="MIT",
)
def fasterseg_student(num_classes: int = 19, **options) -> FasterSeg:
    """FasterSeg's student; `aux` adds the training heads."""
    return FasterSeg(num_classes, "student", **options)


@register_model(
    paper=PAPER,
    parameters=22_188_931,
    macs=107_778_932_736,
    published=Published(),
    official=OFFICIAL,
    licence="MIT",
)
def fasterseg_teacher(num_classes: int = 19, **options) -> FasterSeg:
    """FasterSeg's teacher; `aux` adds the training heads."""
    return FasterSeg(num_classes, "teacher", **options)


@register_importer("fasterseg_student", "fasterseg_teacher")
def import_fasterseg(name: str, weights: Weights) -> tuple[nn.Module, dict[str, str]]:
    """The weights0.pt and weights1.pt of the authors' repository; those with training heads give `aux=True`."""
    architecture = name.removeprefix("fasterseg_")
    shared = ARCHITECTURES[architecture].shared
    # the repository registers the cells that the branches share once for each
    for key in [key for key in weights if key.startswith("cells.")]:
        layer, _, rest = key.removeprefix("cells.").partition("-")
        if layer.isdecimal() and int(layer) < shared and rest.startswith("1."):
            first = weights[f"cells.{layer}-0.{rest[2:]}"]
            if not torch.equal(first, weights.pop(key)):
                raise ValueError(
                    f"load_official: these are not the weights of {name!r}, whose branches share their first {shared} cells: "
                    f"{key} differs"
                )
    aux = any(key.startswith("heads32.") for key in weights)
    model = told(FasterSeg(weights["heads8.conv_1x1.weight"].shape[0], architecture, aux), aux=aux)
    return model, {key: our_key(key, shared) for key in weights}


MODULES = {
    "stem.0.conv.0": "stem.0.conv",
    "stem.0.conv.1": "stem.0.bn",
    "arms32.": "lateral.",
    "refines32.": "refine.",
    "arms16.": "shallow_lateral.",
    "refines16.": "shallow_refine.",
    "ffm.conv_1x1.": "fusion.conv.",
    "ffm.channel_attention.1.conv.": "fusion.attention.0.",
    "ffm.channel_attention.2.conv.": "fusion.attention.1.",
    "heads8.": "head.",
    "heads16.": "aux.0.",
    "heads32.": "aux.1.",
    "conv_3x3.": "conv.",
    "conv_1x1.": "classifier.",
}


def our_key(key: str, shared: int) -> str:
    """The name here of a tensor of the authors' repository."""
    if key.startswith("cells."):
        place, _, rest = key.removeprefix("cells.").partition("._op._op.")
        layer, _, branch = place.partition("-")
        index = int(layer)
        module = "shared" if index < shared else ("deep", "shallow")[int(branch)]
        return f"{module}.{index if index < shared else index - shared}.{rest}"
    for old, new in MODULES.items():
        key = key.replace(old, new, 1)
    return key if key.startswith("stem.") else key.replace(".conv.0.", ".conv.").replace(".conv.1.", ".bn.")
