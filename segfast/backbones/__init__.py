"""Encoders that give a feature pyramid."""

from segfast.backbones.resnet import ResNet

__all__ = ["ResNet"]
