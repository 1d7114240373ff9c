"""Encoders by name."""

from __future__ import annotations

import fnmatch
from pathlib import Path

import torch
from torch import Tensor, nn

from segfast._names import unknown
from segfast._packages import need
from segfast.backbones.efficientformer import EfficientFormer, EfficientFormerV2
from segfast.backbones.resnet import DEPTHS, ResNet
from segfast.backbones.shufflenet import V1_CHANNELS, V2_CHANNELS, ShuffleNetV1, ShuffleNetV2

MOBILENETV2_WIDTHS = (0.35, 0.5, 0.75, 1.0, 1.4)

# Name to (class, fixed arguments, torchvision's name of the weights or None)
OWN: dict[str, tuple[type[nn.Module], dict, str | None]] = {
    **{f"resnet{depth}": (ResNet, {"depth": depth}, f"resnet{depth}") for depth in DEPTHS},
    **{f"shufflenetv1_g{groups}": (ShuffleNetV1, {"groups": groups}, None) for groups in V1_CHANNELS},
    **{
        f"shufflenetv2_x{width}".replace(".", "_"): (ShuffleNetV2, {"width": width}, f"shufflenet_v2_x{width}".replace(".", "_"))
        for width in V2_CHANNELS
    },
}
# Name to timm's
TIMM: dict[str, str] = {
    "mobilenetv1": "mobilenetv1_100",
    "mobilenetv2": "mobilenetv2_100",
    **{name: name for name in (f"mobilenetv2_{round(100 * width):03d}" for width in MOBILENETV2_WIDTHS)},
    **{name: name for name in (f"efficientnet_b{i}" for i in range(8))},
    **{name: name for name in (f"efficientnet_lite{i}" for i in range(5))},
    **{f"poolformer_{size}": f"poolformer_{size}" for size in ("s12", "s24", "s36", "m36", "m48")},
    **{f"efficientformer_{size}": f"efficientformer_{size}" for size in ("l1", "l3", "l7")},
    **{f"efficientformerv2_{size}": f"efficientformerv2_{size}" for size in ("s0", "s1", "s2", "l")},
}


def list_backbones(pattern: str = "*") -> list[str]:
    """The names that `create_backbone` knows and that match the shell-style pattern, sorted."""
    return sorted(fnmatch.filter([*OWN, *TIMM], pattern))


def create_backbone(name: str, pretrained: bool = False, weights: str | Path | None = None, **options) -> nn.Module:
    """Build an encoder: images (N, 3, H, W) to a list of maps, from fine to coarse, of `.channels` at `.strides`.

    The maps are those of strides 4, 8, 16 and 32; `stem=True` puts that of stride 2 before them, for families that have one.
    The sides of a map are those of the image over its stride, rounded up; PoolFormer's first map has (H + 1) // 4 rows, and
    the others are those of the map before over 2, rounded up.

    Args:
        name: one of `list_backbones()`. All but ResNet and ShuffleNet are timm's and need timm (`pip install 'segfast[train]'`).
        pretrained: load ImageNet weights through timm or torchvision, which download them.
        weights: a local file of weights instead, .safetensors or a pickled `state_dict` (loaded with weights_only=True), with
            the names of timm (of torchvision for ShuffleNetV2, of pytorchcv for ShuffleNetV1); a classifier in it is left out.
        options: of `ResNet`, `ShuffleNetV1` (width), `ShuffleNetV2`; `width` for mobilenetv2; anything else goes to timm.

    Raises:
        ValueError: no such name (the nearest are suggested), an option that does not fit, pretrained and weights together.
        ImportError: timm or torchvision is needed and missing.
        RuntimeError: the weights are of another network, or cannot be downloaded.
        FileNotFoundError: there is no such file.
        TypeError: an option that the encoder does not have, or a name that is none.
    """
    if not isinstance(name, str):
        raise TypeError(f"create_backbone: want an encoder's name, got {name!r}")
    if name not in OWN and name not in TIMM:
        raise unknown("create_backbone", name, list_backbones())
    if pretrained and weights is not None:
        raise ValueError("create_backbone: want pretrained or weights, got both")
    state = None if weights is None else read_weights(weights)
    if name in OWN:
        kind, fixed, released = OWN[name]
        backbone = kind(**{**fixed, **options})
        if pretrained:
            state = _download(name, released)
        if state is not None:
            backbone.load_weights(state)
        return backbone
    return _from_timm(name, pretrained, state, options)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a pickled `state_dict`, alone or under "state_dict" or "model".

    Raises:
        FileNotFoundError: there is no such file.
        RuntimeError: it holds anything else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"create_backbone: want a file of weights, got {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise RuntimeError(f"create_backbone: cannot read weights from {path}: {error}") from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise RuntimeError(f"create_backbone: want a state_dict of tensors in {path}")
    return state


class Pyramid(nn.Module):
    """A network of timm as an encoder, without what comes after its last map.

    Args:
        body: timm's network.
        stem: whether the map of stride 2 comes first.
    """

    def __init__(self, body: nn.Module, stem: bool = False):
        super().__init__()
        info = list(body.feature_info)
        self.indices = [i for i, entry in enumerate(info) if entry["reduction"] >= (2 if stem else 4)]
        if stem and info[0]["reduction"] != 2:
            raise ValueError(f"create_backbone: want stem=False for {type(body).__name__}, which has no map of stride 2")
        self.channels = tuple(info[i]["num_chs"] for i in self.indices)
        self.strides = tuple(info[i]["reduction"] for i in self.indices)
        body.prune_intermediate_layers(self.indices, prune_norm=True, prune_head=True)
        self.body = body

    def forward(self, x: Tensor) -> list[Tensor]:
        """The maps of `strides`, from fine to coarse."""
        return self.body.forward_intermediates(x, indices=self.indices, intermediates_only=True)


def classifier(name: str, pretrained: bool = False, **options) -> nn.Module:
    """The whole network of timm behind a backbone, with its classifier of 1,000 classes."""
    timm = need("timm", f"create_backbone: {name}", "train")
    try:
        return timm.create_model(TIMM[name], pretrained=pretrained, **options)
    except Exception as error:
        if not pretrained:
            raise
        raise _offline(name, "timm", error) from error


def _from_timm(name: str, pretrained: bool, state: dict[str, Tensor] | None, options: dict) -> nn.Module:
    if "width" in options:
        width = options.pop("width")
        if name != "mobilenetv2" or width not in MOBILENETV2_WIDTHS:
            widths = ", ".join(map(str, MOBILENETV2_WIDTHS))
            raise ValueError(f"create_backbone: want width for mobilenetv2 alone, one of {widths}, got {width} for {name}")
        name = f"mobilenetv2_{round(100 * width):03d}"
    stem = options.pop("stem", False)
    body = classifier(name, pretrained, **options)
    if state is not None:
        _load(name, body, state)
    if not name.startswith("efficientformer"):
        return Pyramid(body, stem)
    if stem:
        raise ValueError(f"create_backbone: want stem=False for {name}, which has no map of stride 2")
    return (EfficientFormerV2 if name.startswith("efficientformerv2") else EfficientFormer)(body)


def _load(name: str, body: nn.Module, state: dict[str, Tensor]) -> None:
    # The classifier's own tensors may be of any class count, or missing; all else is loaded strictly.
    heads = body.default_cfg["classifier"]
    heads = tuple(f"{head}." for head in ([heads] if isinstance(heads, str) else heads))
    own = {key: value for key, value in body.state_dict().items() if key.startswith(heads)}
    given = {key: value for key, value in state.items() if not key.startswith(heads)}
    try:
        body.load_state_dict({**own, **given})
    except RuntimeError as error:
        raise RuntimeError(f"create_backbone: the weights are not those of {name}: {error}") from error


def _download(name: str, released: str | None) -> dict[str, Tensor]:
    if released is None:
        raise RuntimeError(f"create_backbone: nobody we know hosts weights of {name} as a plain file: pass weights=PATH")
    models = need("torchvision.models", f"create_backbone: {name}", "train")
    try:
        return models.get_model(released, weights="DEFAULT").state_dict()
    except Exception as error:
        raise _offline(name, "torchvision", error) from error


def _offline(name: str, package: str, error: Exception) -> RuntimeError:
    return RuntimeError(
        f"create_backbone: {package} could not get pretrained weights of {name} ({type(error).__name__}: {error}); "
        f"without a network, download them elsewhere and pass weights=PATH"
    )
