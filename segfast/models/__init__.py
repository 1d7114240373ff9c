"""Networks, one a file. A new one adds its import line here."""

from segfast.models._base import Output, Preprocessing, SegmentationModel
from segfast.models._official import load_official
from segfast.models._registry import NETWORKS, Network, create_model, list_models, register_model
from segfast.models.fast_scnn import FastSCNN, fast_scnn
from segfast.models.pspnet import PSPNet, pspnet_r18, pspnet_r101

__all__ = [
    "NETWORKS",
    "FastSCNN",
    "Network",
    "Output",
    "PSPNet",
    "Preprocessing",
    "SegmentationModel",
    "create_model",
    "fast_scnn",
    "list_models",
    "load_official",
    "pspnet_r18",
    "pspnet_r101",
    "register_model",
]
