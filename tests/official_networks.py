"""The networks of official repositories that need more than one file, importable without what they never call."""

from __future__ import annotations

import codecs
import contextlib
import importlib
import sys
import types
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


@contextlib.contextmanager
def imports(folder: Path, stubs: dict[str, dict]):
    """Imports from a folder, with modules of these attributes in the place of some that it would import; undone afterwards."""
    before, path = dict(sys.modules), list(sys.path)
    sys.path.insert(0, str(folder))
    for name, attributes in stubs.items():
        stub = types.ModuleType(name)
        stub.__dict__.update(attributes)
        sys.modules[name] = stub
    try:
        yield importlib.import_module
    finally:
        sys.path[:] = path
        for name in set(sys.modules) - set(before):
            if name in stubs or str(getattr(sys.modules[name], "__file__", None)).startswith(str(folder)):
                del sys.modules[name]
        sys.modules.update({name: before[name] for name in stubs if name in before})


def found(path: str) -> Path:
    from official_cases import clone

    return clone(path)


def swiftnet(kind: str, depth: int, **options) -> nn.Module:
    """orsic/swiftnet as configured for Cityscapes; takes normalised images, which it is given as its constants want them."""
    folder = found(f"swiftnet/models/resnet/resnet_{kind}.py").parents[2]
    with imports(folder, {"evaluation": {}, "evaluation.evaluate": {"mt": None}}) as load, contextlib.redirect_stdout(None):
        backbone = getattr(load(f"models.resnet.resnet_{kind}"), f"resnet{depth}")(pretrained=False, **options)
        model = load("models.semseg").SemsegModel(backbone, 19)
    plain = model.forward

    def forward(x):
        raw = x * backbone.img_std + backbone.img_mean
        return plain(raw, None, x.shape[2:])[0]

    model.forward = forward
    return model


class ActivatedBatchNorm(nn.BatchNorm2d):
    """What feinanshan/FANet trains with; its speed test leaves out the normalisation."""

    def __init__(self, num_features, activation="none"):
        super().__init__(num_features)
        self.activation = activation

    def forward(self, x):
        x = super().forward(x)
        return F.leaky_relu(x) if self.activation == "leaky_relu" else x


def fanet(depth: int) -> nn.Module:
    """feinanshan/FANet as in its speed test, but normalised and resized to the images."""
    folder = found("FANet/Testing/models/fanet/fanet.py").parents[1]
    with imports(folder, {}) as load:
        load("fanet.resnet").model_zoo = types.SimpleNamespace(load_url=lambda url: {})
        model = load("fanet.fanet").FANet(backbone=f"resnet{depth}", norm_layer=ActivatedBatchNorm)
    plain = model.forward
    model.forward = lambda x: F.interpolate(plain(x), x.shape[2:], mode="bilinear", align_corners=True)
    return model


def fanet_trained() -> nn.Module:
    """feinanshan/FANet as its training code saves it, with two auxiliary heads."""
    folder = found("FANet/Train/ptsemseg/models/fanet/fanet.py").parents[3]
    with imports(folder, {"torchvision": {}, "torchvision.models": {}}) as load:
        load("ptsemseg.models.fanet.resnet").model_zoo = types.SimpleNamespace(load_url=lambda url: {})
        return load("ptsemseg.models.fanet.fanet").FANet(19, norm_layer=ActivatedBatchNorm)


def fasterseg(arch: int, training_heads: bool = False) -> nn.Module:
    """VITA-Group/FasterSeg from its released architecture parameters, by its own rules; cells that branches share named once."""
    folder = found("FasterSeg/train/model_seg.py").parent
    scalar = (np._core.multiarray.scalar, "numpy.core.multiarray.scalar")
    with torch.serialization.safe_globals([scalar, np.dtype, type(np.dtype("float64")), codecs.encode]):
        state = torch.load(folder / "fasterseg" / f"arch_{arch}.pt", map_location="cpu", weights_only=True)
    stubs = {
        "thop": {"profile": None},
        "easydict": {"EasyDict": types.SimpleNamespace},
        "utils": {},
        "utils.darts_utils": {"compute_latency_ms_tensorrt": None},
    }
    # its modules look for the repository's name in the working directory
    with contextlib.chdir(folder.parent), imports(folder, stubs) as load, contextlib.redirect_stdout(None):
        network = load("model_seg").Network_Multi_Path_Infer
    alphas, betas, ratios = ([state.get(f"{name}_{arch}_{i}") for i in range(3)] for name in ("alpha", "beta", "ratio"))
    stem = (1.0, 8 / 12)[arch]
    model = network(
        [x.detach() for x in alphas],
        [None, *(x.detach() for x in betas[1:])],
        [x.detach() for x in ratios],
        num_classes=19,
        layers=16,
        Fch=12,
        width_mult_list=[4 / 12, 6 / 12, 8 / 12, 10 / 12, 1.0],
        stem_head_width=(stem, stem),
        ignore_skip=arch == 0,
    )
    model.train(training_heads)
    score = {last: state[f"mIoU{last}"] * (state[f"latency{last}"] / 8.3) ** -0.07 for last in ("02", "12")}
    model.build_structure([2, 0] if score["02"] > score["12"] else [2, 1])
    once = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    plain = model.state_dict
    model.state_dict = lambda: {key: value for key, value in plain().items() if key in once}
    return model
