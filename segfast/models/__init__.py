"""Networks, one a file. A new one adds its import line here."""

from segfast.models._base import Output, Preprocessing, SegmentationModel
from segfast.models._official import load_official
from segfast.models._registry import NETWORKS, Network, create_model, list_models, register_model
from segfast.models.fanet import FANet, fanet18, fanet34
from segfast.models.fast_scnn import FastSCNN, fast_scnn
from segfast.models.fasterseg import FasterSeg, fasterseg_student, fasterseg_teacher
from segfast.models.swiftnet import SwiftNet, swiftnet_rn18, swiftnet_rn34
from segfast.models.swiftnet_pyramid import SwiftNetPyramid, swiftnet_rn18_pyramid

__all__ = [
    "FANet",
    "NETWORKS",
    "FastSCNN",
    "FasterSeg",
    "Network",
    "Output",
    "Preprocessing",
    "SegmentationModel",
    "SwiftNet",
    "SwiftNetPyramid",
    "create_model",
    "fanet18",
    "fanet34",
    "fast_scnn",
    "fasterseg_student",
    "fasterseg_teacher",
    "list_models",
    "load_official",
    "register_model",
    "swiftnet_rn18",
    "swiftnet_rn18_pyramid",
    "swiftnet_rn34",
]
