"""Predictions for images, folders of images and videos."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from segfast.data.images import colour, read_image
from segfast.data.pairs import IMAGES, files, read
from segfast.engine import checkpoint
from segfast.engine.assess import label_png
from segfast.engine.panels import legend, overlay, png

ENDINGS = "", "_colour", "_overlay"
CAMERA = re.compile(r"camera:(\d+)")
VIDEOS = (".mp4", ".avi", ".mkv", ".mov", ".webm", ".m4v")


def predict(
    model: Callable[[Tensor], Tensor],
    source: Path,
    folder: Path,
    classes: Sequence[str],
    palette,
    opacity: float = 0.5,
    progress: Callable[[int, int], None] = lambda *_: None,
    beside: bool = False,
    frames: int | None = None,
) -> list[Path]:
    """Predict one image, every image of a folder, a video, or what a camera sees.

    Args:
        model: images in [0, 1] (N, 3, H, W) to logits or probabilities of their size, or to the classes (N, H, W) themselves.
        source: an image, a folder, a video, or "camera:0", the first webcam, which goes on until Ctrl-C or for `frames`.
        folder: gets, for an image, <stem>.png (the class a byte), <stem>_colour.png and <stem>_overlay.png; for a video
            <stem>_overlay.mp4; and legend.png.
        classes, palette: names and RGB triples.
        opacity: of the overlay, 0 to 1.
        progress: called with the images or frames done and their number (0: not known).
        beside: overlays have the image itself at their left.
        frames: of a video or a camera, at most.

    Returns:
        The paths written.

    Raises:
        FileNotFoundError: no such source, or a folder without images.
        ValueError: a file that cannot be read; the message names it.
        ImportError: a video, and neither PyAV nor OpenCV; a camera, and no OpenCV.
    """
    camera = CAMERA.fullmatch(str(source))
    if camera:
        images = []
    elif source.is_dir():
        images = sorted(files(source))
        if not images:
            raise FileNotFoundError(f"predict: want images ({', '.join(IMAGES)}) in {source}, got none")
    elif source.is_file():
        images = [source]
    else:
        raise FileNotFoundError(f"predict: want an image, a folder, a video or camera:0, got no {source}")
    stems = Counter(path.stem for path in images)
    names = {path: path.stem if stems[path.stem] == 1 else path.name for path in images}  # a.jpg beside a.png
    targets = {(folder / f"{name}{ending}.png").resolve() for name in ("legend", *names.values()) for ending in ENDINGS}
    lost = [path for path in images if path.resolve() in targets]
    if lost:
        raise ValueError(f"predict: want another folder for the results, in {folder} they would replace {lost[0]}")

    def picture(image: Tensor, labels: Tensor) -> Tensor:
        mixed = overlay(image, labels, palette, opacity)
        return torch.cat([overlay(image, labels, palette, 0.0), mixed], 1) if beside else mixed

    written = [checkpoint.write(folder / "legend.png", legend(classes, palette))]
    if camera or (source.suffix.lower() in VIDEOS and not source.is_dir()):
        target = folder / f"{f'camera{camera[1]}' if camera else source.stem}_overlay.mp4"
        return [*written, video(model, source, target, picture, progress, frames)]
    for done, path in enumerate(images, 1):
        image = read(read_image, path)
        labels = classify(model, image)
        pictures = label_png(labels), png(colour(labels, palette)), png(picture(image, labels))
        for ending, content in zip(ENDINGS, pictures):
            written.append(checkpoint.write(folder / f"{names[path]}{ending}.png", content))
        progress(done, len(images))
    return written


@torch.no_grad()
def classify(model: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
    result = model(image[None])[0]
    return (result.argmax(0) if result.dim() == 3 else result).cpu().long()  # uint8 would index a palette as a mask


def video(model, source: Path, target: Path, picture, progress, most: int | None) -> Path:
    camera = CAMERA.fullmatch(str(source))
    frames, rate, total = open_with_opencv(int(camera[1])) if camera else open_video(source)
    total = min(total, most) if total and most else most or total
    temporary = target.with_name(f".{target.name}")
    writer = None
    # Ctrl-C is how a camera is told to stop: what it has seen is kept.
    stops = contextlib.suppress(KeyboardInterrupt) if camera else contextlib.nullcontext()
    try:
        with stops, closing(frames):
            for done, frame in enumerate(itertools.islice(frames, most), 1):
                image = torch.from_numpy(frame).permute(2, 0, 1).float() / 255
                shown = picture(image, classify(model, image)).numpy()
                shown = shown[: shown.shape[0] // 2 * 2, : shown.shape[1] // 2 * 2]  # encoders want even sides
                writer = writer or VideoWriter(temporary, rate, shown.shape[:2])
                writer.write(shown)
                progress(done, max(total, done) if total else 0)
        if writer is None:
            raise ValueError(f"cannot read {source}: no frame in it")
        writer.close()
        writer = None
        temporary.replace(target)
    finally:
        if writer:
            writer.close()
        temporary.unlink(missing_ok=True)
    return target


def open_video(path: Path) -> tuple[Iterator[np.ndarray], float, int]:
    """(frames as (H, W, 3) uint8 RGB, frames a second, their number or 0)."""
    try:
        import av
    except ImportError:
        return open_with_opencv(path)
    try:
        container = av.open(str(path))
        stream = container.streams.video[0]
    except (av.error.FFmpegError, IndexError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error

    def frames():
        with closing(container):
            try:
                for frame in container.decode(stream):
                    yield frame.to_ndarray(format="rgb24")
            except av.error.FFmpegError as error:
                raise ValueError(f"cannot read {path}: {error}") from error

    return frames(), float(stream.average_rate or 25), stream.frames


def open_with_opencv(path: Path | int) -> tuple[Iterator[np.ndarray], float, int]:
    """As `open_video`; of a number, the camera's frames."""
    source, package, install = f"the video {path}", "PyAV or OpenCV", "'segfast[video]'"
    if isinstance(path, int):
        source, package, install = f"camera:{path}", "OpenCV", "opencv-python"
    try:
        import cv2
    except ImportError as error:
        raise ImportError(f"predict: want {package} for {source}: pip install {install}") from error
    capture = cv2.VideoCapture(path if isinstance(path, int) else str(path))
    if not capture.isOpened():
        raise ValueError(f"cannot read {source.removeprefix('the video ')}: OpenCV opens no video there")

    def frames():
        try:
            while True:
                good, frame = capture.read()
                if not good:
                    return
                yield np.ascontiguousarray(frame[..., ::-1])
        finally:
            capture.release()

    return frames(), capture.get(cv2.CAP_PROP_FPS) or 25.0, max(0, int(capture.get(cv2.CAP_PROP_FRAME_COUNT)))


class VideoWriter:
    """An mp4 file, frame by frame, by PyAV or OpenCV."""

    def __init__(self, path: Path, rate: float, size: tuple[int, int]):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.container = self.writer = None
        try:
            import av
        except ImportError:
            import cv2

            self.writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), rate, (size[1], size[0]))
            return
        from fractions import Fraction

        self.container = av.open(str(path), "w", format="mp4")
        self.stream = self.container.add_stream("mpeg4", rate=Fraction(rate).limit_denominator(1001))
        self.stream.height, self.stream.width, self.stream.pix_fmt = *size, "yuv420p"
        self.frame = av.VideoFrame

    def write(self, picture: np.ndarray) -> None:
        if self.writer is not None:
            self.writer.write(np.ascontiguousarray(picture[..., ::-1]))
        else:
            frame = self.frame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            self.container.mux(self.stream.encode(frame))

    def close(self) -> None:
        if self.writer is not None:
            self.writer.release()
        elif self.container is not None:
            self.container.mux(self.stream.encode(None))
            self.container.close()
