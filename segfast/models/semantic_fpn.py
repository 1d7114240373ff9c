"""Semantic FPN: the semantic branch of Panoptic FPN (Kirillov, Girshick, He and Dollár, arXiv:1901.02446, section 3)."""

from __future__ import annotations

import re

from torch import Tensor, nn

from segfast.backbones import create_backbone
from segfast.models._base import Output, SegmentationModel
from segfast.models._official import Weights, register_importer, told
from segfast.models._registry import Published, register_model
from segfast.nn import ConvBNAct, resize
from segfast.nn.folding import add


class FeaturePyramid(nn.Module):
    """A map a level with the same channels, each with what the coarser levels know added (arXiv:1612.03144, section 3).

    Args:
        channels: of the encoder's maps, from fine to coarse.
        out_channels: of every result.
    """

    def __init__(self, channels: tuple[int, ...], out_channels: int = 256):
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(c, out_channels, 1) for c in channels)
        self.smooth = nn.ModuleList(nn.Conv2d(out_channels, out_channels, 3, padding=1) for _ in channels)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        laterals = [lateral(x) for lateral, x in zip(self.lateral, maps)]
        sums = [laterals[-1]]
        for lateral in reversed(laterals[:-1]):
            sums.append(add(resize(sums[-1], lateral.shape[2:], mode="nearest"), lateral))
        return [smooth(x) for smooth, x in zip(self.smooth, reversed(sums))]


class Climb(nn.Sequential):
    """Convolutions, the map doubled after each: what brings a coarse level up to the finest (fig. 3). None double at 0 doublings.

    Args:
        in_channels: of the input.
        out_channels: of the result.
        doublings: how many convolutions double the map.
    """

    def __init__(self, in_channels: int, out_channels: int, doublings: int):
        super().__init__(*(ConvBNAct(out_channels if k else in_channels, out_channels) for k in range(max(1, doublings))))
        self.doublings = doublings

    def forward(self, x: Tensor) -> Tensor:
        for convolution in self:
            x = convolution(x)
            if self.doublings:
                x = resize(x, (2 * x.shape[2], 2 * x.shape[3]))
        return x


class SemanticFPN(SegmentationModel):
    """An encoder, a feature pyramid of 256 channels, and the sum of all levels at the finest level's size; logits at its stride.

    Args:
        num_classes: classes of the logits.
        backbone: any of `segfast.list_backbones()`. The maps of PoolFormer and EfficientFormer are normalised (GroupNorm with one
            group), as their authors do.
        pyramid_channels, head_channels: of the pyramid and of what the classifier reads; the defaults are the paper's.
        **options: of the encoder.
    """

    name = "semantic_fpn"

    def __init__(
        self,
        num_classes: int = 19,
        backbone: str = "resnet50",
        *,
        pyramid_channels: int = 256,
        head_channels: int = 128,
        **options,
    ):
        super().__init__()
        self.num_classes = num_classes
        self.backbone = create_backbone(backbone, **options)
        channels, strides = self.backbone.channels, self.backbone.strides
        normalised = backbone.startswith(("poolformer_", "efficientformer_"))
        self.norms = nn.ModuleList(nn.GroupNorm(1, c) if normalised else nn.Identity() for c in channels)
        self.neck = FeaturePyramid(channels, pyramid_channels)
        doublings = [(stride // strides[0]).bit_length() - 1 for stride in strides]
        self.heads = nn.ModuleList(Climb(pyramid_channels, head_channels, n) for n in doublings)
        self.dropout = nn.Dropout2d(0.1)
        self.classifier = nn.Conv2d(head_channels, num_classes, 1)

    def outputs(self, images: Tensor) -> Output:
        stages = [norm(stage) for norm, stage in zip(self.norms, self.backbone(images))]
        first, *coarser = (head(level) for head, level in zip(self.heads, self.neck(stages)))
        for level in coarser:
            first = add(resize(level, first.shape[2:]), first)
        fused = self.dropout(first)
        features = {f"stage{i + 1}": stage for i, stage in enumerate(stages)}
        return Output(self.classifier(fused), (), {**features, "pre_logits": fused})


@register_model(
    paper="Kirillov, Girshick, He, Dollár: Panoptic Feature Pyramid Networks, arXiv:1901.02446",
    parameters=28_478_675,
    macs=88_034_246_656,
    size=(512, 1024),
    published=Published(
        miou="74.52 val (Cityscapes, ResNet-50); 37.2 to 42.7 (ADE20K, PoolFormer-S12 to M48)",
        speed="13.54 fps, 1024x2048, V100 (ResNet-50)",
        source="mmsegmentation, configs/sem_fpn (ResNet-50 with three convolutions for a stem); sail-sg/poolformer (ADE20K)",
    ),
    official="sail-sg/poolformer",
    licence="Apache-2.0",
)
def semantic_fpn(num_classes: int = 19, backbone: str = "resnet50", **options) -> SemanticFPN:
    """Semantic FPN on ResNet-50; `backbone="poolformer_s12"` gives that of the PoolFormer paper."""
    return SemanticFPN(num_classes, backbone, **options)


# Width of the first stage and depth of the third
POOLFORMERS = {(64, 6): "s12", (64, 12): "s24", (64, 18): "s36", (96, 18): "m36", (96, 24): "m48"}


@register_importer("semantic_fpn")
def import_semantic_fpn(name: str, weights: Weights) -> tuple[nn.Module, dict[str, str]]:
    """Checkpoints of sail-sg/poolformer, in mmsegmentation's names."""
    width = weights["backbone.patch_embed.proj.weight"].shape[0]
    depth = len({key.split(".")[3] for key in weights if key.startswith("backbone.network.4.")})
    if (width, depth) not in POOLFORMERS:
        raise ValueError(
            f"load_official: want a PoolFormer's weights, got {width} channels and {depth} blocks in the third stage"
        )
    backbone = f"poolformer_{POOLFORMERS[width, depth]}"
    model = told(SemanticFPN(weights["decode_head.conv_seg.weight"].shape[0], backbone), backbone)
    return model, {key: our_key(key) for key in weights}


def our_key(key: str) -> str:
    """The name here of a tensor in mmsegmentation's names."""
    if match := re.match(r"backbone\.network\.(\d)\.(.*)", key):
        place, rest = int(match[1]), match[2]
        if place % 2:
            return f"backbone.body.stages.{(place + 1) // 2}.downsample.{rest.replace('proj.', 'conv.')}"
        return f"backbone.body.stages.{place // 2}.blocks." + re.sub(r"layer_scale_(\d)", r"layer_scale\1.scale", rest)
    if match := re.match(r"backbone\.norm(\d)\.", key):
        return f"norms.{int(match[1]) // 2}.{key[match.end() :]}"
    if match := re.match(r"decode_head\.scale_heads\.(\d)\.(\d)\.", key):
        # the resizing between the convolutions is a module there
        return f"heads.{match[1]}.{int(match[2]) // 2}.{key[match.end() :]}"
    for pattern, replacement in (
        (r"^backbone\.patch_embed\.proj\.", "backbone.body.stem.conv."),
        (r"^neck\.lateral_convs\.(\d)\.conv\.", r"neck.lateral.\1."),
        (r"^neck\.fpn_convs\.(\d)\.conv\.", r"neck.smooth.\1."),
        (r"^decode_head\.conv_seg\.", "classifier."),
    ):
        key = re.sub(pattern, replacement, key)
    return key
