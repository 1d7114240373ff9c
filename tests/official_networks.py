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


class InPlaceABN(nn.BatchNorm2d):
    """What the CUDA extension of irfanICMLL/structure_knowledge_distillation computes while evaluating."""

    def __init__(self, channels, activation="leaky_relu", affine=True):
        super().__init__(channels, affine=affine)
        self.activation = activation

    def forward(self, x):
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight.abs() + self.eps, self.bias, eps=self.eps)
        return F.leaky_relu(y, 0.01) if self.activation == "leaky_relu" else y


def pspnet(depth: int) -> nn.Module:
    """irfanICMLL/structure_knowledge_distillation: (logits at stride 8, auxiliary logits, what the classifier reads, ...)."""
    folder = found("structure_knowledge_distillation/networks/pspnet_combine.py").parents[1]
    stubs = {"libs": {"InPlaceABN": InPlaceABN, "InPlaceABNSync": InPlaceABN}, "networks": {"__path__": [f"{folder}/networks"]}}
    with imports(folder, stubs) as load:
        module = load("networks.pspnet_combine")
    block, depths = {18: (module.BasicBlock, [2, 2, 2, 2]), 101: (module.Bottleneck, [3, 4, 23, 3])}[depth]
    return module.Res_pspnet(block, depths, 19)


class Head(nn.Module):
    """What mmsegmentation's decode heads share, as far as FPNHead needs it."""

    def __init__(self, in_channels, channels, num_classes, input_transform, align_corners=False):
        super().__init__()
        self.in_channels, self.channels, self.align_corners = in_channels, channels, align_corners
        self.conv_cfg = self.act_cfg = None
        self.norm_cfg = {"type": "BN"}
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)

    def _transform_inputs(self, inputs):
        return inputs

    def cls_seg(self, x):
        return self.conv_seg(x)


class ConvModule(nn.Module):
    """mmcv's unit: an activation follows a norm in the head, and neither is in the neck."""

    def __init__(self, inputs, outputs, kernel_size, padding=0, conv_cfg=None, norm_cfg=None, act_cfg=None, inplace=False):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel_size, padding=padding, bias=norm_cfg is None)
        self.bn = None if norm_cfg is None else nn.BatchNorm2d(outputs)

    def forward(self, x):
        return self.conv(x) if self.bn is None else F.relu_(self.bn(self.conv(x)))


class Upsample(nn.Module):
    def __init__(self, scale_factor, mode, align_corners):
        super().__init__()
        self.options = {"scale_factor": scale_factor, "mode": mode, "align_corners": align_corners}

    def forward(self, x):
        return F.interpolate(x, **self.options)


class BaseModule(nn.Module):
    """mmcv's, whose configuration of the initialisation nobody reads here."""

    def __init__(self, init_cfg=None):
        super().__init__()


class Registry:
    def register_module(self):
        return lambda kind: kind


def passed_on(function=None, **options):
    return function if function else passed_on


def fpn(channels: tuple[int, ...], classes: int) -> nn.Module:
    """The neck and the head of a release 0 of open-mmlab/mmsegmentation, for an encoder of these channels."""
    folder = found("mmsegmentation/mmseg/models/necks/fpn.py").parents[3]
    models = folder / "mmseg" / "models"
    stubs = {
        "IPython": {"embed": None},
        "mmcv": {},
        "mmcv.cnn": {"ConvModule": ConvModule, "xavier_init": None},
        "mmcv.runner": {"BaseModule": BaseModule, "auto_fp16": lambda: passed_on},
        "mmseg": {"__path__": []},
        "mmseg.ops": {"resize": F.interpolate, "Upsample": Upsample},
        "mmseg.models": {"__path__": []},
        "mmseg.models.builder": {"NECKS": Registry(), "HEADS": Registry()},
        "mmseg.models.necks": {"__path__": [f"{models}/necks"]},
        "mmseg.models.decode_heads": {"__path__": [f"{models}/decode_heads"]},
        "mmseg.models.decode_heads.decode_head": {"BaseDecodeHead": Head},
    }
    with imports(folder, stubs) as load:
        neck = load("mmseg.models.necks.fpn").FPN
        head = load("mmseg.models.decode_heads.fpn_head").FPNHead
    network = nn.Module()
    network.neck = neck(list(channels), 256, 4)
    network.decode_head = head([4, 8, 16, 32], in_channels=[256] * 4, channels=128, num_classes=classes)
    return network


def poolformer_fpn(classes: int) -> nn.Module:
    """sail-sg/poolformer's PoolFormer-S12 with mmsegmentation's neck and head; logits at stride 4."""
    folder = found("poolformer/models/poolformer.py").parents[1]
    layers = {"DropPath": nn.Identity, "trunc_normal_": nn.init.trunc_normal_, "to_2tuple": lambda x: (x, x)}
    stubs = {
        "models": {"__path__": [f"{folder}/models"]},
        "timm.models.layers": layers,
        "timm.models.layers.helpers": layers,
        "timm.models.registry": {"register_model": passed_on},
        "timm.data": {"IMAGENET_DEFAULT_MEAN": None, "IMAGENET_DEFAULT_STD": None},
    }
    channels = (64, 128, 320, 512)
    with imports(folder, stubs) as load, contextlib.redirect_stdout(None):
        kind = load("models.poolformer").PoolFormer
    network = fpn(channels, classes)
    network.backbone = kind([2, 2, 6, 2], list(channels), mlp_ratios=[4] * 4, downsamples=[True] * 4, fork_feat=True)
    network.forward = lambda x: network.decode_head(network.neck(network.backbone(x)))
    return network


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
