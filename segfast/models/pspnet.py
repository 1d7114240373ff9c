"""PSPNet (Zhao et al., arXiv:1612.01105) as student and teacher of structured knowledge distillation (arXiv:1903.04197)."""

from __future__ import annotations

import re

from torch import Tensor, nn

from segfast.backbones import ResNet
from segfast.models._base import Output, Preprocessing, SegmentationModel
from segfast.models._official import Weights, register_importer, told
from segfast.models._registry import Published, register_model
from segfast.nn import BatchNorm2d, ConvBNAct, PyramidPooling


class PSPNet(SegmentationModel):
    """A dilated ResNet with three convolutions for a stem, then pyramid pooling; logits at stride 8.

    Args:
        num_classes: classes of the logits.
        depth: of the ResNet: 18, 34, 50, 101 or 152.
        aux: whether a second classifier reads the third stage while training.
    """

    name = "pspnet"
    align_corners = True
    preprocessing = Preprocessing(mean=(104.00698793, 116.66876762, 122.67891434), std=(1.0, 1.0, 1.0), divisor=1.0, bgr=True)

    def __init__(self, num_classes: int = 19, depth: int = 18, aux: bool = False):
        super().__init__()
        self.num_classes = num_classes
        self.backbone = ResNet(depth, deep_stem=True, output_stride=8, ceil_mode=True, norm_layer=BatchNorm2d)
        channels = self.backbone.channels
        width = channels[3] // 4
        self.psp = PyramidPooling(channels[3], width, width, input_first=False, kernel_size=3, act="leaky_relu")
        self.dropout = nn.Dropout2d(0.1)
        self.classifier = nn.Conv2d(width, num_classes, 1)
        self.aux = None
        if aux:
            self.aux = nn.Sequential(
                ConvBNAct(channels[2], channels[2] // 2, 3, bias=True, act="leaky_relu"),
                nn.Dropout2d(0.1),
                nn.Conv2d(channels[2] // 2, num_classes, 1),
            )

    def outputs(self, images: Tensor) -> Output:
        stages = self.backbone(images)
        context = self.dropout(self.psp(stages[3]))
        features = {f"stage{i + 1}": stage for i, stage in enumerate(stages)}
        aux = () if self.aux is None else (self.aux(stages[2]),)
        return Output(self.classifier(context), aux, {**features, "pre_logits": context})


PAPER = "Liu, Chen, Liu, Qin, Luo, Wang: Structured Knowledge Distillation for Semantic Segmentation, arXiv:1903.04197"
OFFICIAL = "irfanICMLL/structure_knowledge_distillation"
LICENCE = "BSD-2-Clause for academic use; the authors ask to be contacted for commercial use"


@register_model(
    paper=PAPER,
    parameters=12_770_515,
    macs=123_338_627_456,
    size=(512, 1024),
    published=Published(
        miou="69.10 val alone, 75.3 val and 73.05 test distilled (Cityscapes)",
        source="the authors' repository",
    ),
    official=OFFICIAL,
    licence=LICENCE,
)
def pspnet_r18(num_classes: int = 19, **options) -> PSPNet:
    """The student of structured knowledge distillation; `aux` adds its auxiliary head."""
    return PSPNet(num_classes, 18, **options)


@register_model(
    paper=PAPER,
    parameters=65_707_475,
    macs=535_285_184_000,
    size=(512, 1024),
    published=Published(source="the authors' repository prints no figures of the teacher"),
    official=OFFICIAL,
    licence=LICENCE,
)
def pspnet_r101(num_classes: int = 19, **options) -> PSPNet:
    """The teacher of structured knowledge distillation; `aux` adds its auxiliary head."""
    return PSPNet(num_classes, 101, **options)


KEYS = (
    (r"^pspmodule\.stages\.(\d)\.1\.", r"psp.branches.\1.conv."),
    (r"^pspmodule\.stages\.(\d)\.2\.", r"psp.branches.\1.bn."),
    (r"^pspmodule\.bottleneck\.0\.", "psp.project.conv."),
    (r"^pspmodule\.bottleneck\.1\.", "psp.project.bn."),
    (r"^head\.", "classifier."),
    (r"^dsn\.0\.", "aux.0.conv."),
    (r"^dsn\.1\.", "aux.0.bn."),
    (r"^dsn\.3\.", "aux.2."),
    (r"^((conv|bn)\d|layer\d)\.", r"backbone.\1."),
)


@register_importer("pspnet_r18", "pspnet_r101")
def import_pspnet(name: str, weights: Weights) -> tuple[nn.Module, dict[str, str]]:
    """Checkpoints of the authors' repository; those with the auxiliary head (`dsn.*`, all that were released) give `aux=True`."""
    aux = "dsn.0.weight" in weights
    model = told(PSPNet(weights["head.weight"].shape[0], int(name.removeprefix("pspnet_r")), aux=aux), aux=aux)
    keys = {}
    for key in weights:
        keys[key] = key
        for pattern, replacement in KEYS:
            keys[key] = re.sub(pattern, replacement, keys[key], count=1)
        if key.removesuffix("weight") + "running_var" in weights and key.endswith("weight"):
            # the authors' in-place BatchNorm multiplies by |weight| + eps: it has to undo itself in its backward
            weights[key] = weights[key].abs() + BatchNorm2d(1).eps
    return model, keys
