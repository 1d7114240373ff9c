"""ShuffleNet v1 and v2 on the fused shuffles."""

from __future__ import annotations

import re

from torch import Tensor, nn

from segfast._weights import misfit
from segfast.nn.convolution import ConvBNAct
from segfast.nn.shuffle_units import ShuffleV1Unit, ShuffleV2Unit

V1_CHANNELS = {1: 144, 2: 200, 3: 240, 4: 272, 8: 384}  # of the first stage; they double from stage to stage
V2_CHANNELS = {0.5: (48, 96, 192, 1024), 1.0: (116, 232, 464, 1024), 1.5: (176, 352, 704, 1024), 2.0: (244, 488, 976, 2048)}
DEPTHS = (4, 8, 4)


class _ShuffleNet(nn.Module):
    """Stem, pooling and three stages: maps of strides 4 (the stem's), 8, 16, 32, and 2 before the pooling with `stem`."""

    def _finish(self, stem_channels: int, stages: list[nn.Sequential], channels: tuple[int, ...], stem: bool) -> None:
        self.stem = ConvBNAct(3, stem_channels, 3, 2)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.stages = nn.ModuleList(stages)
        self.stem_map = stem
        self.channels = (stem_channels, stem_channels, *channels) if stem else (stem_channels, *channels)
        self.strides = (2, 4, 8, 16, 32) if stem else (4, 8, 16, 32)

    def forward(self, x: Tensor) -> list[Tensor]:
        """The maps of `strides`, from fine to coarse."""
        x = self.stem(x)
        maps = [x] if self.stem_map else []
        x = self.pool(x)
        maps.append(x)
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


class ShuffleNetV1(_ShuffleNet):
    """ShuffleNet (Zhang et al., arXiv:1707.01083, table 1).

    Args:
        groups: 1, 2, 3, 4 or 8.
        width: factor on every channel count, the stem's (24) too.
        num_classes: a classifier after the last stage, for `classify`; None: none.
        stem: whether the map before the pooling (stride 2) comes first in the pyramid.

    Raises:
        ValueError: other groups, or a width that leaves channels that the groups do not divide.
    """

    def __init__(self, groups: int = 3, width: float = 1.0, num_classes: int | None = None, stem: bool = False):
        super().__init__()
        if groups not in V1_CHANNELS:
            raise ValueError(f"ShuffleNetV1: want groups one of {', '.join(map(str, V1_CHANNELS))}, got {groups}")
        stem_channels, channels = int(24 * width), tuple(int(V1_CHANNELS[groups] * (1 << i) * width) for i in range(3))
        widths = (stem_channels, *channels)
        for before, after in zip(widths, channels):
            if after % 4 or (after // 4) % groups or (after - before) % groups or before < 1:
                raise ValueError(f"ShuffleNetV1: want a width that leaves channels that {groups} groups divide, got {width}")
        stages = [
            nn.Sequential(
                ShuffleV1Unit(widths[i], widths[i + 1], groups, 2, first_groups=1 if i == 0 else None),
                *(ShuffleV1Unit(widths[i + 1], widths[i + 1], groups) for _ in range(depth - 1)),
            )
            for i, depth in enumerate(DEPTHS)
        ]
        self._finish(stem_channels, stages, channels, stem)
        self.classifier = nn.Linear(channels[-1], num_classes) if num_classes else None

    def classify(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) to class scores (N, num_classes)."""
        return self.classifier(self.forward(x)[-1].mean((2, 3)))

    def load_weights(self, state: dict[str, Tensor]) -> None:
        """Load a `state_dict` of pytorchcv's `shufflenet_g*`; its classifier is left out where there is none here.

        Raises:
            RuntimeError: it is of another network; nothing is changed then.
        """
        rules = (
            (r"^features\.init_block\.", "stem."),
            (r"^features\.stage(\d)\.unit(\d+)\.", lambda m: f"stages.{int(m[1]) - 1}.{int(m[2]) - 1}."),
            (r"\.(compress|dw|expand)_(conv|bn)\d\.", lambda m: f".{'depthwise' if m[1] == 'dw' else m[1]}.{m[2]}."),
            (r"^output\.", "classifier."),
        )
        _load(self, state, rules, drop="classifier." if self.classifier is None else None)


class ShuffleNetV2(_ShuffleNet):
    """ShuffleNet v2 (Ma et al., arXiv:1807.11164, table 5).

    Args:
        width: 0.5, 1.0, 1.5 or 2.0.
        num_classes: the last 1 x 1 convolution and a classifier, for `classify`; None: none.
        stem: whether the map before the pooling (stride 2) comes first in the pyramid.

    Raises:
        ValueError: another width.
    """

    def __init__(self, width: float = 1.0, num_classes: int | None = None, stem: bool = False):
        super().__init__()
        if width not in V2_CHANNELS:
            raise ValueError(f"ShuffleNetV2: want width one of {', '.join(map(str, V2_CHANNELS))}, got {width}")
        *channels, last = V2_CHANNELS[width]
        widths = (24, *channels)
        stages = [
            nn.Sequential(
                ShuffleV2Unit(widths[i], widths[i + 1], 2),
                *(ShuffleV2Unit(widths[i + 1], widths[i + 1]) for _ in range(depth - 1)),
            )
            for i, depth in enumerate(DEPTHS)
        ]
        self._finish(24, stages, tuple(channels), stem)
        self.last = ConvBNAct(channels[-1], last, 1) if num_classes else None
        self.classifier = nn.Linear(last, num_classes) if num_classes else None

    def classify(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) to class scores (N, num_classes)."""
        return self.classifier(self.last(self.forward(x)[-1]).mean((2, 3)))

    def load_weights(self, state: dict[str, Tensor]) -> None:
        """Load a `state_dict` of torchvision's `shufflenet_v2_*`; its classifier is left out where there is none here.

        Raises:
            RuntimeError: it is of another network; nothing is changed then.
        """
        names = {"0": "conv", "1": "bn"}
        right = {"0": "expand.conv", "1": "expand.bn", **{str(3 + i): f"separable.conv.{j}" for i, j in enumerate((0, 1, 3, 4))}}
        left = {str(i): f"shortcut.conv.{j}" for i, j in enumerate((0, 1, 3, 4))}
        rules = (
            (r"^conv1\.(\d)", lambda m: f"stem.{names[m[1]]}"),
            (r"^conv5\.(\d)", lambda m: f"last.{names[m[1]]}"),
            (r"^stage(\d)\.", lambda m: f"stages.{int(m[1]) - 2}."),
            (r"\.branch1\.(\d)", lambda m: f".{left[m[1]]}"),
            (r"\.branch2\.(\d)", lambda m: f".{right[m[1]]}"),
            (r"^fc\.", "classifier."),
        )
        _load(self, state, rules, drop=("classifier.", "last.") if self.classifier is None else None)


def _load(module: nn.Module, state: dict[str, Tensor], rules, drop) -> None:
    renamed = {}
    for key, value in state.items():
        for pattern, to in rules:
            key = re.sub(pattern, to, key)
        if drop is None or not key.startswith(drop):
            renamed[key] = value
    if wrong := misfit(module, renamed):
        raise RuntimeError(f"{type(module).__name__}: these are not its weights: {wrong}")
    module.load_state_dict(renamed)
