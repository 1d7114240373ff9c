"""ICNet: a pruned PSPNet at half and quarter resolution, a few layers at full (Zhao et al., ECCV 2018, arXiv:1704.08545)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segfast.models._base import Output, Preprocessing, SegmentationModel
from segfast.models._keys import rename
from segfast.models._official import Weights, register_importer, told
from segfast.models._registry import Published, register_model
from segfast.nn import BatchNorm2d, ConvBNAct, resize
from segfast.nn.folding import add, fold
from segfast.nn.resize import free

CELLS = (1, 2, 3, 6)


def unit(deploy: bool, in_channels: int, out_channels: int, kernel_size: int, **options) -> ConvBNAct:
    norm_layer = (lambda channels: nn.Identity()) if deploy else BatchNorm2d
    return ConvBNAct(in_channels, out_channels, kernel_size, bias=deploy, norm_layer=norm_layer, **options)


class Bottleneck(nn.Module):
    """ResNet's bottleneck, stride in the first convolution."""

    def __init__(self, deploy: bool, in_channels: int, out_channels: int, stride: int = 1, dilation: int = 1):
        super().__init__()
        width = out_channels // 4
        self.reduce = unit(deploy, in_channels, width, 1, stride=stride)
        self.conv = unit(deploy, width, width, 3, dilation=dilation)
        self.increase = unit(deploy, width, out_channels, 1, act=None)
        self.project = None
        if in_channels != out_channels:
            self.project = unit(deploy, in_channels, out_channels, 1, stride=stride, act=None)

    def forward(self, x: Tensor) -> Tensor:
        y = self.increase(self.conv(self.reduce(x)))
        return add(x if self.project is None else self.project(x), y, relu=True)


class CascadeFeatureFusion(nn.Module):
    """The lower resolution, doubled, through a dilated convolution, plus the higher through a 1 x 1 (section 3.3, fig. 3)."""

    def __init__(self, deploy: bool, low_channels: int, high_channels: int):
        super().__init__()
        self.low = unit(deploy, low_channels, 128, 3, dilation=2, act=None)
        self.high = unit(deploy, high_channels, 128, 1, act=None)

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        return add(self.high(high), self.low(low), relu=True)


def half(size) -> tuple[int, int]:
    return ((size[0] + 1) // 2, (size[1] + 1) // 2)


def pyramid_sum(x: Tensor) -> Tensor:
    """x plus its means over 1, 4, 9 and 36 overlapping cells, each resized to x.

    The published kernels and steps are those of a 33 x 65 map: cells 32 // n (64 // n) apart, each as long as it takes for the
    last one to end with the map. Other sizes keep these proportions.
    """
    y = x
    if free(*x.shape[2:]):
        for cells in CELLS:
            rows, columns = (blurring(n, cells, x) for n in x.shape[2:])
            y = y + rows @ (x @ columns.t())
        return y
    for cells in CELLS:
        steps = [max(1, (n - 1) * (32 // cells) // 32) for n in x.shape[2:]]
        kernel = [n - (min(cells, n) - 1) * step for n, step in zip(x.shape[2:], steps)]
        y = y + resize(F.avg_pool2d(x, kernel, steps), x.shape[2:], align_corners=True)
    return y


def blurring(size: int, cells: int, like: Tensor) -> Tensor:
    """(size, size): a line's means over its cells, resized to the line; for exported graphs, whose pooling has fixed kernels."""
    count = torch.sym_min(size, cells)
    step = torch.sym_max((size - 1) * (32 // cells) // 32, 1)
    kernel = size - (count - 1) * step
    pixel = torch.arange(size, device=like.device)
    first = torch.arange(cells, device=like.device)[:, None] * step
    means = ((pixel >= first) & (pixel < first + kernel)).to(like.dtype) / kernel
    position = pixel[:, None].to(like.dtype) * (count - 1) / torch.sym_max(size - 1, 1)
    between = (1 - (position - torch.arange(cells, device=like.device)).abs()).clamp(min=0)
    return between @ means


class ICNet(SegmentationModel):
    """ICNet, with the pruned widths that its authors released.

    Args:
        num_classes: classes of the logits.
        aux: adds the two classifiers of the cascade's label guidance (section 3.4), at strides 16 and 8; for training.
        deploy: biases in the place of the BatchNorms, as in the authors' released network; see `fold`.
    """

    name = "icnet"
    align_corners = True
    preprocessing = Preprocessing((103.939, 116.779, 123.68), (1.0, 1.0, 1.0), divisor=1.0, bgr=True)

    def __init__(self, num_classes: int = 19, aux: bool = False, deploy: bool = False):
        super().__init__()
        self.num_classes, self.deploy = num_classes, deploy
        self.stem = nn.Sequential(
            unit(deploy, 3, 32, 3, stride=2), unit(deploy, 32, 32, 3), unit(deploy, 32, 64, 3), nn.MaxPool2d(3, 2, 1)
        )
        self.stage2 = stage(deploy, 64, 128, 3)
        self.stage3 = stage(deploy, 128, 256, 4, stride=2)
        self.stage4 = stage(deploy, 256, 512, 6, dilation=2)
        self.stage5 = stage(deploy, 512, 1024, 3, dilation=4)
        self.compress = unit(deploy, 1024, 256, 1)
        self.detail = nn.Sequential(
            unit(deploy, 3, 32, 3, stride=2), unit(deploy, 32, 32, 3, stride=2), unit(deploy, 32, 64, 3, stride=2)
        )
        self.fusion4 = CascadeFeatureFusion(deploy, 256, 256)
        self.fusion2 = CascadeFeatureFusion(deploy, 128, 64)
        self.classifier = nn.Conv2d(128, num_classes, 1)
        self.aux = nn.ModuleList((nn.Conv2d(256, num_classes, 1), nn.Conv2d(128, num_classes, 1))) if aux else ()

    def outputs(self, images: Tensor) -> Output:
        x = self.stage2(self.stem(resize(images, half(images.shape[2:]), align_corners=True)))
        stage3 = self.stage3[0](x)
        x = self.stage3[1:](resize(stage3, half(stage3.shape[2:]), align_corners=True))
        stage5 = self.stage5(self.stage4(x))
        low = resize(self.compress(pyramid_sum(stage5)), stage3.shape[2:], align_corners=True)
        detail = self.detail(images)
        middle = resize(self.fusion4(low, stage3), detail.shape[2:], align_corners=True)
        fused = resize(self.fusion2(middle, detail), half(half(images.shape[2:])), align_corners=True)
        aux = tuple(head(x) for head, x in zip(self.aux, (low, middle)))
        features = {"stage3": stage3, "stage5": stage5, "detail": detail, "pre_logits": fused}
        return Output(self.classifier(fused), aux, features)

    @torch.no_grad()
    def fold(self) -> ICNet:
        """The same network in evaluation mode with every BatchNorm folded into its convolution; without auxiliary heads."""
        weight = self.classifier.weight
        folded = ICNet(self.num_classes, deploy=True).to(weight.device, weight.dtype)
        ours, theirs = dict(self.named_modules()), dict(folded.named_modules())
        for name, block in ours.items():
            if isinstance(block, ConvBNAct):
                conv = theirs[name].conv
                values = (block.conv.weight, block.conv.bias) if self.deploy else fold(block.conv, block.bn)
                for target, value in zip((conv.weight, conv.bias), values):
                    target.copy_(value)
        folded.classifier.load_state_dict(self.classifier.state_dict())
        return folded.eval()


def stage(deploy: bool, in_channels: int, out_channels: int, blocks: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    first = Bottleneck(deploy, in_channels, out_channels, stride, dilation)
    return nn.Sequential(first, *(Bottleneck(deploy, out_channels, out_channels, 1, dilation) for _ in range(blocks - 1)))


LAYERS = {"1x1_reduce": "reduce", "3x3": "conv", "1x1_increase": "increase", "1x1_proj": "project"}
CAFFE_KEYS = (
    (r"^conv1_([123])_3x3(_s2)?\.", lambda match: f"stem.{int(match[1]) - 1}.conv."),
    (
        r"^conv([2-5])_(\d)_(1x1_reduce|3x3|1x1_increase|1x1_proj)\.",
        lambda match: f"stage{match[1]}.{int(match[2]) - 1}.{LAYERS[match[3]]}.conv.",
    ),
    (r"^conv5_4_k1\.", "compress.conv."),
    (r"^conv([123])_sub1\.", lambda match: f"detail.{int(match[1]) - 1}.conv."),
    (r"^conv_sub([24])\.", r"fusion\1.low.conv."),
    (r"^conv3_1_sub2_proj\.", "fusion4.high.conv."),
    (r"^conv3_sub1_proj\.", "fusion2.high.conv."),
    (r"^conv6_cls\.", "classifier."),
)


@register_importer("icnet")
def import_icnet(name: str, weights: Weights):
    """The blobs of the authors' merged Caffe network, as `<layer>.weight` and `<layer>.bias`."""
    model = told(ICNet(weights["conv6_cls.weight"].shape[0], deploy=True), deploy=True)
    return model, {key: rename(key, CAFFE_KEYS) for key in weights}


@register_model(
    paper="Zhao, Qi, Shen, Shi, Jia: ICNet for Real-Time Semantic Segmentation on High-Resolution Images, arXiv:1704.08545",
    parameters=6_699_987,
    macs=29_811_584_064,  # the same to the unit as the convolutions of the authors' prototxt at this size
    size=(1025, 2049),
    published=Published(
        macs="none by the authors, the 64 convolutions of their prototxt are 29.81 G; quoted are 30.58 G, of a port "
        "(meetps/pytorch-semseg) that runs three blocks twice and has a stride elsewhere",
        miou="69.5 test, 67.7 val (Cityscapes)",
        speed="30.3 fps (33 ms), 1025x2049, Titan X",
        source="arXiv:1704.08545 and the authors' repository",
    ),
    official="hszhao/ICNet (Caffe)",
)
def icnet(num_classes: int = 19, **options) -> ICNet:
    """ICNet; `aux` adds its two auxiliary heads, `deploy` has biases in the place of BatchNorms."""
    return ICNet(num_classes, **options)
