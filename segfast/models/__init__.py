"""Networks, one a file. A new one adds its import line here."""

from segfast.models._base import Output, Preprocessing, SegmentationModel
from segfast.models._official import load_official
from segfast.models._registry import NETWORKS, Network, create_model, list_models, register_model
from segfast.models.fast_scnn import FastSCNN, fast_scnn
from segfast.models.fasterseg import FasterSeg, fasterseg_student, fasterseg_teacher

__all__ = [
    "NETWORKS",
    "FastSCNN",
    "FasterSeg",
    "Network",
    "Output",
    "Preprocessing",
    "SegmentationModel",
    "create_model",
    "fast_scnn",
    "fasterseg_student",
    "fasterseg_teacher",
    "list_models",
    "load_official",
    "register_model",
]
