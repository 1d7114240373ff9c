"""Datasets and joint transforms. Items are (image (3, H, W) float32 in [0, 1], labels (H, W) int64, 255 ignored)."""

from segfast.data import transforms
from segfast.data.augment import Augment, Coordinates, Geometry, Stream, TorchvisionTransform
from segfast.data.camvid import CamVid
from segfast.data.pairs import ADE20K, Cityscapes, ImageFolder, ImagePairs, Listing, PascalVOC, read_label_map
from segfast.data.streets import SyntheticStreets

DATASETS = {
    "camvid": CamVid, "cityscapes": Cityscapes, "ade20k": ADE20K, "voc": PascalVOC, "folder": ImageFolder,
    "synthetic": SyntheticStreets,
}  # fmt: skip

__all__ = [
    "ADE20K",
    "DATASETS",
    "Augment",
    "CamVid",
    "Cityscapes",
    "Coordinates",
    "Geometry",
    "ImageFolder",
    "ImagePairs",
    "Listing",
    "PascalVOC",
    "Stream",
    "SyntheticStreets",
    "TorchvisionTransform",
    "read_label_map",
    "transforms",
]
