"""LinkNet: encoder stages added to a light decoder's (Chaurasia and Culurciello, VCIP 2017, arXiv:1707.03718)."""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from segfast.backbones import ResNet, create_backbone
from segfast.models._base import Output, SegmentationModel
from segfast.models._keys import rename
from segfast.models._official import Weights, register_importer
from segfast.models._registry import Published, register_model
from segfast.models.espnet import crop
from segfast.nn import ConvBNAct
from segfast.nn.folding import activate, add, fold, foldable, quick, watched
from segfast.nn.resize import free


class DeconvBNReLU(nn.Module):
    """Transposed 3 x 3 convolution to a given size, which is stride * size or less than that by at most stride - 1."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, bias: bool = False):
        super().__init__()
        self.conv = nn.ConvTranspose2d(in_channels, out_channels, 3, stride, 1, bias=bias)
        self.bn = nn.BatchNorm2d(out_channels)
        self.act = nn.ReLU()

    def forward(self, x: Tensor, size) -> Tensor:
        conv, bn, act = self.conv, self.bn, self.act
        stride = conv.stride[0]
        if free(*size, *x.shape[2:]):
            # ONNX wants a number for what is added at the end: the most that there can be is, and the rest cut off
            full = F.conv_transpose2d(x, conv.weight, conv.bias, conv.stride, conv.padding, stride - 1)
            return act(bn(full[..., : size[0], : size[1]]))
        extra = [to - (n - 1) * stride - 1 for to, n in zip(size, x.shape[2:])]
        if not quick() or type(conv) is not nn.ConvTranspose2d or not foldable(conv, bn) or watched(conv) or watched(bn):
            return act(bn(conv(x, [n for n in size])))
        weight, bias = fold(conv, bn)
        return activate(act, F.conv_transpose2d(x, weight, bias, conv.stride, conv.padding, extra))


class Decoder(nn.Module):
    """1 x 1 to a quarter of the channels, transposed 3 x 3, 1 x 1 (fig. 3)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.reduce = ConvBNAct(in_channels, in_channels // 4, 1)
        self.up = DeconvBNReLU(in_channels // 4, in_channels // 4, stride)
        self.expand = ConvBNAct(in_channels // 4, out_channels, 1)

    def forward(self, x: Tensor, size) -> Tensor:
        return self.expand(self.up(self.reduce(x), size))


class LinkNet(SegmentationModel):
    """LinkNet; logits at the images' size.

    Args:
        num_classes: classes of the logits.
        backbone: the encoder, one of `segfast.list_backbones()`; None: ResNet-18, the paper's. The input of the first stage is
            added to the last decoder's output where it has the same 64 channels, as in ResNet.
    """

    name = "linknet"

    def __init__(self, num_classes: int = 19, backbone: str | None = None):
        super().__init__()
        self.num_classes = num_classes
        self.encoder = ResNet(18) if backbone is None else create_backbone(backbone)
        channels, strides = self.encoder.channels, self.encoder.strides
        widths = (64, *channels[:-1])
        steps = [1, *(stride // finer for finer, stride in pairwise(strides))]
        self.decoders = nn.ModuleList(Decoder(c, width, step) for c, width, step in zip(channels, widths, steps))
        self.up1 = DeconvBNReLU(64, 32, 2, bias=True)
        self.conv = ConvBNAct(32, 32, 3, bias=True)
        self.classifier = nn.ConvTranspose2d(32, num_classes, 2, 2)

    def outputs(self, images: Tensor) -> Output:
        if isinstance(self.encoder, ResNet):
            x = self.encoder.maxpool(self.encoder.forward_stem(images))
            maps = [x]
            for stage in (self.encoder.layer1, self.encoder.layer2, self.encoder.layer3, self.encoder.layer4):
                maps.append(stage(maps[-1]))
            first, *maps = maps
        else:
            first, maps = None, self.encoder(images)
        features = {f"stage{i}": x for i, x in enumerate(maps, 1)}
        x = maps[-1]
        for decoder, skip in zip(reversed(self.decoders[1:]), reversed(maps[:-1])):
            x = add(skip, decoder(x, skip.shape[2:]))
        x = self.decoders[0](x, x.shape[2:])
        x = x if first is None else add(first, x)
        half = [min((n + 1) // 2, 2 * m) for n, m in zip(images.shape[2:], x.shape[2:])]
        features["pre_logits"] = x = self.conv(self.up1(x, half))
        logits = crop(self.classifier(x), images)
        return Output(logits, (), features)


PYTORCHCV_KEYS = (
    (r"^stem\.conv\.conv\.", "encoder.conv1."),
    (r"^stem\.conv\.bn\.", "encoder.bn1."),
    (
        r"^hg\.down_seq\.down(\d)\.unit(\d)\.",
        lambda match: f"encoder.layer{match[1]}.{int(match[2]) - 1}.",
    ),
    (r"\.body\.conv(\d)\.conv\.", r".conv\1."),
    (r"\.body\.conv(\d)\.bn\.", r".bn\1."),
    (r"\.identity_conv\.conv\.", ".downsample.0."),
    (r"\.identity_conv\.bn\.", ".downsample.1."),
    (r"^hg\.up_seq\.up(\d)\.", lambda match: f"decoders.{4 - int(match[1])}."),
    (r"^(decoders\.\d)\.conv1\.", r"\1.reduce."),
    (r"^(decoders\.\d)\.conv2\.", r"\1.up."),
    (r"^(decoders\.\d)\.conv3\.", r"\1.expand."),
    (r"^head\.conv1\.", "up1."),
    (r"^head\.conv2\.", "conv."),
    (r"^head\.conv3\.", "classifier."),
)


@register_importer("linknet")
def import_linknet(name: str, weights: Weights):
    return LinkNet(weights["head.conv3.weight"].shape[1]), {key: rename(key, PYTORCHCV_KEYS) for key in weights}


@register_model(
    paper="Chaurasia, Culurciello: LinkNet: Exploiting Encoder Representations, arXiv:1707.03718",
    parameters=11_535_699,
    macs=87_006_642_176,
    published=Published(
        parameters="11.5 M",
        macs="21.2 GFLOPs, 360x640 (2 x MACs)",
        miou="76.4 val (Cityscapes), 69.1 (CamVid)",
        source="arXiv:1707.03718 and the authors' repository",
    ),
    official="osmr/pytorchcv (a port; e-lab/LinkNet is in Torch7, CC BY-NC)",
    licence="MIT",
)
def linknet(num_classes: int = 19, **options) -> LinkNet:
    """LinkNet; `backbone` is another encoder than ResNet-18."""
    return LinkNet(num_classes, **options)
