"""Encoders that give a feature pyramid."""

from segfast.backbones._registry import create_backbone, list_backbones
from segfast.backbones.efficientformer import EfficientFormer, EfficientFormerV2
from segfast.backbones.resnet import ResNet
from segfast.backbones.shufflenet import ShuffleNetV1, ShuffleNetV2

__all__ = [
    "EfficientFormer",
    "EfficientFormerV2",
    "ResNet",
    "ShuffleNetV1",
    "ShuffleNetV2",
    "create_backbone",
    "list_backbones",
]
