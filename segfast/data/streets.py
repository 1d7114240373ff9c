"""Street scenes drawn on the fly: something to train on with nothing to download."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor
from torch.utils.data import Dataset

ROAD, SKY, BUILDING, CAR, POLE, PERSON = range(6)


class SyntheticStreets(Dataset):
    """Procedural street scenes in perspective: road, sky, buildings, cars, poles, people, with texture, light and noise.

    Colours say little about the class (walls, cars, clothes and asphalt share them; light and tint differ from scene to scene),
    so that a network has to look at shapes and context. Scene `i` of a seed is the same on every machine and in every order.

    Args:
        length: number of scenes.
        size: (H, W) in pixels, at least 16 x 16.
        seed: scenes of different seeds are different; train and validation sets take two seeds.
        transform: called with (image, labels), see `segfast.data.transforms`.

    Items are (image (3, H, W) float32 in [0, 1], labels (H, W) int64); every pixel has a label.
    """

    classes = ("road", "sky", "building", "car", "pole", "person")
    palette = ((128, 64, 128), (70, 130, 180), (128, 90, 70), (0, 0, 142), (230, 200, 60), (220, 20, 60))

    def __init__(self, length: int, size: tuple[int, int] = (128, 256), seed: int = 0, transform: Callable | None = None):
        if length < 0 or min(size) < 16:
            raise ValueError(f"SyntheticStreets: want length >= 0 and a size of at least 16 x 16, got {length} and {tuple(size)}")
        self.length, self.size, self.seed, self.transform = length, tuple(size), seed, transform

    def __len__(self) -> int:
        return self.length

    def describe(self, index: int) -> str:
        """What error messages call an item."""
        return f"scene {index} of seed {self.seed}, {self.size[0]} x {self.size[1]}"

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not -self.length <= index < self.length:
            raise IndexError(f"SyntheticStreets: want an index below {self.length}, got {index}")
        scene = Scene(self.size, np.random.default_rng((self.seed, index % self.length)))
        image = torch.from_numpy(scene.photograph()).permute(2, 0, 1).contiguous()
        labels = torch.from_numpy(np.array(scene.labels)).long()
        return self.transform(image, labels) if self.transform else (image, labels)


class Scene:
    """One street, painted from far to near on a picture and a label map at once."""

    def __init__(self, size: tuple[int, int], rng: np.random.Generator):
        self.height, self.width = size
        self.rng = rng
        self.picture = Image.new("RGB", (self.width, self.height))
        self.labels = Image.new("L", (self.width, self.height))
        self.brushes = ImageDraw.Draw(self.picture), ImageDraw.Draw(self.labels)
        self.horizon = self.height * rng.uniform(0.35, 0.5)
        self.vanishing = self.width * rng.uniform(0.35, 0.65)
        self.half_road = self.width * rng.uniform(0.35, 0.7)  # at the bottom edge
        self.sky()
        self.road()
        for side in (-1, 1):
            self.row_of_buildings(side)
        things = [self.car] * rng.integers(2, 6) + [self.pole] * rng.integers(2, 6) + [self.person] * rng.integers(2, 7)
        depths = rng.uniform(0.12, 0.95, len(things)) ** 1.3
        for i in np.argsort(depths):
            things[i](max(depths[i], 0.12))

    def draw(self, shape: str, points, fill, label: int) -> None:
        points = [tuple(float(v) for v in p) for p in points]
        for brush, ink in zip(self.brushes, (tuple(int(v) for v in fill), label)):
            getattr(brush, shape)(points, fill=ink)

    def colour(self, low: int = 40, high: int = 215, grey: float = 0.6) -> np.ndarray:
        """A random colour, drawn towards its own grey."""
        colour = self.rng.uniform(low, high, 3)
        return colour * (1 - grey) + colour.mean() * grey

    def ground(self, depth: float) -> float:
        """The row where things stand: depth 0 is the horizon, 1 the bottom edge; sizes are proportional to it."""
        return self.horizon + depth * (self.height - self.horizon)

    def sky(self) -> None:
        top = self.colour(90, 235, grey=0.7) * (0.9, 0.98, 1.08)
        bottom = top + self.rng.uniform(-30, 40)
        rows = np.linspace(0, 1, self.height)[:, None]
        paint = np.clip(top * (1 - rows) + bottom * rows, 0, 255).astype(np.uint8)
        self.picture.paste(Image.fromarray(np.repeat(paint[:, None], self.width, 1)))
        self.labels.paste(SKY, (0, 0, self.width, self.height))
        for _ in range(self.rng.integers(0, 5)):
            x, y = self.rng.uniform(0, self.width), self.rng.uniform(0, self.horizon)
            w, h = self.width * self.rng.uniform(0.05, 0.2), self.height * self.rng.uniform(0.02, 0.06)
            self.draw("ellipse", [(x - w, y - h), (x + w, y + h)], np.clip(top + self.rng.uniform(-25, 45), 0, 255), SKY)

    def road(self) -> None:
        asphalt, pavement = self.colour(50, 170, grey=0.9), self.colour(70, 200, grey=0.8)
        self.draw("rectangle", [(0, self.horizon), (self.width, self.height)], pavement, ROAD)
        x, half = self.vanishing, self.half_road
        self.draw(
            "polygon",
            [(x - 1, self.horizon), (x + 1, self.horizon), (x + half, self.height), (x - half, self.height)],
            asphalt,
            ROAD,
        )
        for lane in self.rng.uniform(-0.6, 0.6, self.rng.integers(0, 4)):
            for near in np.arange(0.15, 1.0, 0.2):
                a, b, w = self.ground(near), self.ground(near + 0.1), 0.02 * half * near
                left, right = x + lane * half * near, x + lane * half * (near + 0.1)
                self.draw("polygon", [(left, a), (left + w, a), (right + w, b), (right, b)], asphalt + 60, ROAD)

    def row_of_buildings(self, side: int) -> None:
        near = self.rng.uniform(0.02, 0.1)
        edge = self.rng.uniform(1.15, 1.6)
        while near < 1.0:
            far, near = near, near * self.rng.uniform(1.25, 2.2)
            if self.rng.random() < 0.15:
                continue
            x0, x1 = (self.vanishing + side * edge * self.half_road * d for d in (far, near))
            y0, y1 = self.ground(far), self.ground(near)
            storeys = self.rng.uniform(0.5, 1.6)
            top0, top1 = (self.horizon - storeys * d * self.height for d in (far, near))
            wall = self.colour()
            self.draw("polygon", [(x0, y0), (x0, top0), (x1, top1), (x1, y1)], wall, BUILDING)
            glass = np.clip(wall + self.rng.choice([-1, 1]) * self.rng.uniform(20, 70), 0, 255)
            columns, rows = self.rng.integers(2, 6), self.rng.integers(2, 7)
            for u in (np.arange(columns) + 0.25) / columns:
                for v in (np.arange(rows) + 0.25) / rows:
                    corners = []
                    for du, dv in ((0, 0), (0, 1), (1, 1), (1, 0)):
                        s, t = u + du * 0.5 / columns, v + dv * 0.5 / rows
                        corners.append((x0 + s * (x1 - x0), (1 - t) * (top0 + s * (top1 - top0)) + t * (y0 + s * (y1 - y0))))
                    self.draw("polygon", corners, glass, BUILDING)

    def car(self, depth: float) -> None:
        x = self.vanishing + self.rng.uniform(-0.85, 0.85) * self.half_road * depth
        y, h = self.ground(depth), 0.30 * depth * self.height * self.rng.uniform(0.8, 1.2)
        w = h * self.rng.uniform(0.6, 1.2)
        paint = self.colour(25, 235, grey=self.rng.uniform(0.2, 1))
        self.draw("rectangle", [(x - w, y - 0.14 * h), (x + w, y + 0.04 * h)], paint * 0.25, CAR)
        for wheel in (-0.7, 0.7):
            r = 0.16 * h
            self.draw("ellipse", [(x + wheel * w - r, y - 1.4 * r), (x + wheel * w + r, y + 0.6 * r)], (25, 25, 28), CAR)
        self.draw("rectangle", [(x - w, y - 0.58 * h), (x + w, y - 0.12 * h)], paint, CAR)
        self.draw(
            "polygon",
            [(x - 0.8 * w, y - 0.56 * h), (x - 0.55 * w, y - h), (x + 0.55 * w, y - h), (x + 0.8 * w, y - 0.56 * h)],
            paint,
            CAR,
        )
        glass = self.colour(30, 200, grey=0.9)
        self.draw(
            "polygon",
            [
                (x - 0.65 * w, y - 0.6 * h),
                (x - 0.47 * w, y - 0.92 * h),
                (x + 0.47 * w, y - 0.92 * h),
                (x + 0.65 * w, y - 0.6 * h),
            ],
            glass,
            CAR,
        )
        for light in (-0.85, 0.85):
            self.draw(
                "rectangle",
                [(x + light * w - 0.08 * h, y - 0.5 * h), (x + light * w + 0.08 * h, y - 0.38 * h)],
                self.colour(150, 255, 0.2),
                CAR,
            )

    def pole(self, depth: float) -> None:
        x = self.vanishing + self.rng.choice([-1, 1]) * self.rng.uniform(0.9, 1.25) * self.half_road * depth
        y, h = self.ground(depth), depth * self.height * self.rng.uniform(0.7, 1.2)
        w = max(1.0, 0.02 * depth * self.height)
        paint = self.colour(30, 200, grey=0.9)
        self.draw("rectangle", [(x - w, y - h), (x + w, y)], paint, POLE)
        if self.rng.random() < 0.6:
            r = 2.5 * w
            self.draw("rectangle", [(x - r, y - h - r), (x + r, y - h + r)], self.colour(40, 240, grey=0.3), POLE)

    def person(self, depth: float) -> None:
        x = self.vanishing + self.rng.uniform(-1.3, 1.3) * self.half_road * depth
        y, h = self.ground(depth), 0.34 * depth * self.height * self.rng.uniform(0.8, 1.15)
        w = 0.14 * h
        coat, trousers, skin = self.colour(grey=0.4), self.colour(20, 150), np.array((200, 150, 120)) * self.rng.uniform(0.4, 1.1)
        for leg in (-0.55, 0.55):
            self.draw("rectangle", [(x + leg * w - 0.4 * w, y - 0.45 * h), (x + leg * w + 0.4 * w, y)], trousers, PERSON)
        self.draw("rectangle", [(x - w, y - 0.84 * h), (x + w, y - 0.42 * h)], coat, PERSON)
        self.draw("ellipse", [(x - 0.6 * w, y - h), (x + 0.6 * w, y - 0.82 * h)], np.clip(skin, 0, 255), PERSON)

    def photograph(self) -> np.ndarray:
        """The picture under this scene's light: texture, tint, a shadow, blur and sensor noise; (H, W, 3) float32 in [0, 1]."""
        rng = self.rng
        picture = self.picture.filter(ImageFilter.GaussianBlur(0.5)) if rng.random() < 0.5 else self.picture
        x = np.asarray(picture, np.float32) / 255
        for cells in (8, 32):
            grain = Image.fromarray(rng.standard_normal((cells, 2 * cells)).astype(np.float32))
            x = x * (1 + 0.07 * np.asarray(grain.resize((self.width, self.height), Image.Resampling.BILINEAR))[..., None])
        gain = rng.uniform(0.5, 1.15) * (1 + rng.uniform(-0.12, 0.12, 3))
        slope = rng.uniform(-0.2, 0.2)
        x = x * gain.astype(np.float32) * (1 + slope * np.linspace(-1, 1, self.width, dtype=np.float32)[None, :, None])
        x = x + rng.uniform(0, 0.12)  # haze
        x = x + rng.standard_normal(x.shape, dtype=np.float32) * np.float32(rng.uniform(0.015, 0.05))
        return np.clip(x, 0, 1).astype(np.float32)
