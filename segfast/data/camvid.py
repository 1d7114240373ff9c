"""CamVid at 360 x 480 in the SegNet split (Brostow, Fauqueur and Cipolla, Pattern Recognition Letters 2009)."""

from __future__ import annotations

from pathlib import Path

from segfast.data.pairs import ImagePairs, Listing, by_stem, files


class CamVid(ImagePairs):
    """Street frames with 11 classes; 11 (void) comes out as 255, which losses and metrics ignore.

    Args:
        root: folder that holds `<split>/` (images) and `<split>annot/` (label maps, a byte a pixel), paired by file stem.
        split: "train", "val" or "test".
        transform, label_map, ignore_index: as in `segfast.data.ImagePairs`, with its items and errors.
    """

    classes = ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist")
    palette = (
        (128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (0, 0, 192), (128, 128, 0),
        (192, 128, 128), (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192),
    )  # fmt: skip
    own_ignored = (11, 255)

    @classmethod
    def listing(cls, root: Path, split: str) -> Listing:
        images, labels = Path(root) / split, Path(root) / f"{split}annot"
        for wanted in (images, labels):
            if not wanted.is_dir():
                raise FileNotFoundError(f"CamVid: want the folders {split}/ and {split}annot/ in {root}, got no {wanted.name}/")
        return by_stem(files(images), files(labels, (".png",)))
