"""Networks, one a file. A new one adds its import line here."""

from segfast.models._base import Output, Preprocessing, SegmentationModel
from segfast.models._official import load_official
from segfast.models._registry import NETWORKS, Network, create_model, list_models, register_model
from segfast.models.contextnet import ContextNet, contextnet, contextnet12, contextnet18
from segfast.models.deeplabv3plus import DeepLabV3Plus, deeplabv3plus
from segfast.models.espnet import ESPNet, ESPNetC, espnet, espnet_c
from segfast.models.fanet import FANet, fanet18, fanet34
from segfast.models.fast_scnn import FastSCNN, fast_scnn
from segfast.models.fasterseg import FasterSeg, fasterseg_student, fasterseg_teacher
from segfast.models.icnet import ICNet, icnet
from segfast.models.linknet import LinkNet, linknet
from segfast.models.pspnet import PSPNet, pspnet_r18, pspnet_r101
from segfast.models.semantic_fpn import SemanticFPN, semantic_fpn
from segfast.models.swiftnet import SwiftNet, swiftnet_rn18, swiftnet_rn34
from segfast.models.swiftnet_pyramid import SwiftNetPyramid, swiftnet_rn18_pyramid
from segfast.models.unet import UNet, unet

__all__ = [
    "NETWORKS",
    "ContextNet",
    "DeepLabV3Plus",
    "ESPNet",
    "ESPNetC",
    "FANet",
    "FastSCNN",
    "FasterSeg",
    "ICNet",
    "LinkNet",
    "Network",
    "Output",
    "PSPNet",
    "Preprocessing",
    "SegmentationModel",
    "SemanticFPN",
    "SwiftNet",
    "SwiftNetPyramid",
    "UNet",
    "contextnet",
    "contextnet12",
    "contextnet18",
    "create_model",
    "deeplabv3plus",
    "espnet",
    "espnet_c",
    "fanet18",
    "fanet34",
    "fast_scnn",
    "fasterseg_student",
    "fasterseg_teacher",
    "icnet",
    "linknet",
    "list_models",
    "load_official",
    "pspnet_r18",
    "pspnet_r101",
    "register_model",
    "semantic_fpn",
    "swiftnet_rn18",
    "swiftnet_rn18_pyramid",
    "swiftnet_rn34",
    "unet",
]
