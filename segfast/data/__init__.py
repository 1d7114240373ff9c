"""Datasets and joint transforms. Items are (image (3, H, W) float32 in [0, 1], labels (H, W) int64, 255 ignored)."""

from segfast.data import transforms
from segfast.data.camvid import CamVid
from segfast.data.streets import SyntheticStreets

__all__ = ["CamVid", "SyntheticStreets", "transforms"]
