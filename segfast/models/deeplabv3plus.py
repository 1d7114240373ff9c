"""DeepLabV3+: Chen, Zhu, Papandreou, Schroff and Adam, arXiv:1802.02611."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from segfast.backbones import create_backbone
from segfast.models._base import Output, SegmentationModel
from segfast.models._registry import Published, register_model
from segfast.nn import BatchNorm2d, ConvBNAct, adaptive_avg_pool2d, resize
from segfast.nn.resize import laid_out


class AtrousPyramidPooling(nn.Module):
    """A 1 x 1 convolution, dilated 3 x 3 convolutions and the image's mean, side by side (arXiv:1706.05587, section 3.3).

    Args:
        in_channels: of the input.
        out_channels: of every branch and of the result.
        dilations: of the 3 x 3 convolutions.
    """

    def __init__(self, in_channels: int, out_channels: int = 256, dilations: Sequence[int] = (6, 12, 18)):
        super().__init__()
        self.branches = nn.ModuleList(
            [
                ConvBNAct(in_channels, out_channels, 1, norm_layer=BatchNorm2d),
                *(ConvBNAct(in_channels, out_channels, 3, dilation=d, norm_layer=BatchNorm2d) for d in dilations),
            ]
        )
        self.pooled = ConvBNAct(in_channels, out_channels, 1, norm_layer=BatchNorm2d)
        self.project = ConvBNAct((2 + len(dilations)) * out_channels, out_channels, 1, norm_layer=BatchNorm2d)

    def forward(self, x: Tensor) -> Tensor:
        mean = laid_out(self.pooled(adaptive_avg_pool2d(x, 1)).expand(-1, -1, *x.shape[2:]), x)
        return self.project(torch.cat([*(branch(x) for branch in self.branches), mean], 1))


class DeepLabV3Plus(SegmentationModel):
    """Dilated encoder, atrous spatial pyramid pooling, and a decoder that joins it with the first stage; logits at stride 4.

    Args:
        num_classes: classes of the logits.
        backbone: any of `segfast.list_backbones()` that can dilate.
        output_stride: of the encoder: 16, or 8 with doubled dilations of the pyramid.
        **options: of the encoder.

    Raises:
        ValueError: another output stride, or an encoder that cannot dilate or has no map at stride 4.
    """

    name = "deeplabv3plus"
    align_corners = True  # as in the authors' code

    def __init__(self, num_classes: int = 19, backbone: str = "resnet50", output_stride: int = 16, **options):
        super().__init__()
        self.num_classes = num_classes
        if output_stride not in (8, 16):
            raise ValueError(f"deeplabv3plus: want output_stride 8 or 16, got {output_stride}")
        if backbone.startswith("resnet"):
            # dilation in the place of striding must leave the function of the weights as it was
            options.setdefault("dilate_first", False)
        try:
            self.backbone = create_backbone(backbone, output_stride=output_stride, **options)
        except TypeError as error:
            if "output_stride" not in str(error):
                raise TypeError(f"deeplabv3plus: {error}") from error
            raise ValueError(f"deeplabv3plus: want an encoder that can dilate, got {backbone!r}: {error}") from error
        strides = tuple(self.backbone.strides)
        if 4 not in strides or strides[-1] != output_stride:
            raise ValueError(
                f"deeplabv3plus: want an encoder with stages of strides 4 and {output_stride}, got {backbone!r} with {strides}"
            )
        self.low = strides.index(4)
        dilations = [d * 16 // output_stride for d in (6, 12, 18)]
        self.aspp = AtrousPyramidPooling(self.backbone.channels[-1], dilations=dilations)
        self.dropout = nn.Dropout(0.1)
        self.low_level = ConvBNAct(self.backbone.channels[self.low], 48, 1)
        self.decoder = nn.Sequential(ConvBNAct(256 + 48, 256), ConvBNAct(256, 256))
        self.classifier = nn.Conv2d(256, num_classes, 1)

    def outputs(self, images: Tensor) -> Output:
        stages = self.backbone(images)
        low = self.low_level(stages[self.low])
        context = self.dropout(self.aspp(stages[-1]))
        fused = self.decoder(torch.cat([resize(context, low.shape[2:], self.align_corners), low], 1))
        features = {f"stage{i + 1}": stage for i, stage in enumerate(stages)}
        return Output(self.classifier(fused), (), {**features, "aspp": context, "pre_logits": fused})


@register_model(
    paper="Chen, Zhu, Papandreou, Schroff, Adam: Encoder-Decoder with Atrous Separable Convolution, arXiv:1802.02611",
    parameters=40_351_667,
    macs=138_429_333_504,
    size=(512, 1024),
    published=Published(
        macs="418.64 B multiply-adds at 1024x2048 (Xception-65, output stride 16)",
        miou="78.79 val (Cityscapes, Xception-65, output stride 16)",
        source="the authors' model zoo, tensorflow/models research/deeplab; ResNet-50 is that of arXiv:1903.04688",
    ),
    official="tensorflow/models research/deeplab (no importer)",
    licence="Apache-2.0",
)
def deeplabv3plus(num_classes: int = 19, backbone: str = "resnet50", **options) -> DeepLabV3Plus:
    """DeepLabV3+ on ResNet-50 at output stride 16 (`output_stride=8` too), the teacher of knowledge adaptation."""
    return DeepLabV3Plus(num_classes, backbone, **options)
