"""Training, distillation and evaluation."""

from segfast.engine.evaluate import class_iou, confusion_matrix, evaluate, mean_iou
from segfast.engine.train import Distillation, cross_entropy, supervised, train

__all__ = ["Distillation", "class_iou", "confusion_matrix", "cross_entropy", "evaluate", "mean_iou", "supervised", "train"]
