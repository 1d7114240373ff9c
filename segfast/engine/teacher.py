"""A teacher's logits on disk: computed once on full frames, seen afterwards through each crop, scale and flip."""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from segfast.data import Geometry
from segfast.engine import checkpoint


class TeacherLogits:
    """The cache, a function of (index, geometry, frame) for `segfast.data.Stream`.

    One .npy file a frame, float16, at the teacher's own stride; teacher.json says whose logits of which files these are. A build
    that was stopped goes on where it was.

    Args:
        folder: made if need be.
        teacher: in evaluation mode.
        dataset: items (image, labels) without augmentation; `describe(index)` names them.
        prepare: images in [0, 1] to what the teacher takes.
        device: that the teacher is on.
        progress: called with the frames done and their number.

    Attributes:
        bytes: size on disk.
        seconds: that the teacher took for a frame, on average over the frames computed now; 0 where all were there.

    Raises:
        ValueError: the folder holds the logits of another teacher or dataset.
    """

    def __init__(
        self,
        folder: str | Path,
        teacher: nn.Module,
        dataset,
        prepare: Callable[[Tensor], Tensor],
        device: torch.device,
        progress: Callable[[int, int], None] = lambda *_: None,
    ):
        self.folder, self.align_corners = Path(folder), teacher.align_corners
        about = {"teacher": fingerprint(teacher), "frames": frames(dataset), "count": len(dataset)}
        manifest = self.folder / "teacher.json"
        if manifest.is_file():
            try:
                have = dict(json.loads(manifest.read_text()))
            except (ValueError, TypeError) as error:
                raise ValueError(f"cannot read {manifest}: {error}; want another folder for the cache") from error
            if have != about:
                which = ", ".join(name for name in about if have.get(name) != about[name])
                raise ValueError(f"{manifest} is of another run (it differs in: {which}): want another folder for the cache")
        else:
            checkpoint.write(manifest, json.dumps(about))
        self.bytes, self.seconds, computed = 0, 0.0, 0
        for index in range(len(dataset)):
            path = self.path(index)
            if not path.is_file():
                image, _ = dataset[index]
                began = time.perf_counter()
                with torch.no_grad():
                    logits = teacher.forward_features(prepare(image[None].to(device))).logits[0]
                self.seconds += time.perf_counter() - began
                computed += 1
                buffer = io.BytesIO()
                np.save(buffer, logits.clamp(-6e4, 6e4).half().cpu().numpy())
                checkpoint.write(path, buffer.getvalue())
            self.bytes += path.stat().st_size
            progress(index + 1, len(dataset))
        self.seconds /= max(1, computed)

    def path(self, index: int) -> Path:
        return self.folder / f"{index:06d}.npy"

    def __call__(self, index: int, geometry: Geometry, frame: tuple[int, int]) -> Tensor:
        path = self.path(index)
        try:
            logits = torch.from_numpy(np.load(path))
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"cannot read the teacher's logits {path}: {error}; delete the file and run again") from error
        return geometry.logits(logits, frame, self.align_corners)


def fingerprint(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, x in model.state_dict().items():
        digest.update(name.encode())
        digest.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def frames(dataset) -> str:
    """Of the images' names, and of their files' sizes and first bytes: another dataset may have the same names."""
    digest = hashlib.sha256()
    for i in range(len(dataset)):
        path = Path(dataset.describe(i))
        digest.update(path.name.encode())
        if path.is_file():
            digest.update(str(path.stat().st_size).encode())
            with open(path, "rb") as file:
                digest.update(file.read(1 << 16))
    return digest.hexdigest()
