"""Training, distillation and evaluation."""

from segfast.engine.config import Config
from segfast.engine.evaluate import (
    Inference,
    boundary_f_score,
    class_iou,
    confusion_matrix,
    evaluate,
    mean_iou,
    pixel_accuracy,
)
from segfast.engine.losses import LabelLoss
from segfast.engine.run import Stopped, fit, load_network
from segfast.engine.train import Average, Distillation, cross_entropy, poly, supervised, train

__all__ = [
    "Average",
    "Config",
    "Distillation",
    "Inference",
    "LabelLoss",
    "Stopped",
    "boundary_f_score",
    "class_iou",
    "confusion_matrix",
    "cross_entropy",
    "evaluate",
    "fit",
    "load_network",
    "mean_iou",
    "pixel_accuracy",
    "poly",
    "supervised",
    "train",
]
