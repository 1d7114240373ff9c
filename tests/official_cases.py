"""The official implementations of networks, and what is stored of them.

A case has a name, the network's name here, and a function that builds the official network. `python tests/official_cases.py`
writes tests/official/<case>.json for every case, or those named, whose official code is there: the names and shapes of its
parameters, and some of the logits that it computes with weights made from a seed. Code that is no package is looked for in
SEGFAST_OFFICIAL, a folder of clones that are named as on GitHub.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import caffe
import official_networks as networks
import pytest
import torch
from torch import Tensor, nn

STORED = Path(__file__).parent / "official"
SIZES = ((64, 96), (96, 160))
SAMPLES = 24


@dataclass(frozen=True)
class Case:
    name: str
    network: str
    build: Callable[[], nn.Module]
    sizes: tuple[tuple[int, int], ...] = SIZES
    resized: bool = True  # whether the official logits have the images' size
    attributes: dict = field(default_factory=dict)  # what the importer must have read off the tensors


def seeded(shapes: dict[str, list[int]], seed: int = 0) -> dict[str, Tensor]:
    """Weights that keep signals of size 1, and BatchNorm statistics that are not the initial ones."""
    generator, weights = torch.Generator().manual_seed(seed), {}
    for name, shape in shapes.items():
        x = torch.rand(shape, generator=generator)
        if name.endswith("running_var"):
            x = 0.5 + x
        elif len(shape) > 1:
            x = (2 * x - 1) * (3 / x[0].numel()) ** 0.5
        elif name.endswith(".weight"):  # of a BatchNorm or a PReLU
            x = 0.5 + 0.5 * x
        else:
            x = x - 0.5
        weights[name] = x
    return weights


def images(size: tuple[int, int]) -> Tensor:
    batch = 2 if size[0] < 512 else 1
    return 2 * torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(1)) - 1


def shapes(official: nn.Module) -> dict[str, list[int]]:
    return {name: list(x.shape) for name, x in official.state_dict().items() if not name.endswith("num_batches_tracked")}


def compute(case: Case, official: nn.Module, weights: dict[str, Tensor]) -> list[Tensor]:
    official.load_state_dict(weights, strict=False)
    official.eval()
    with torch.no_grad():
        outputs = [official(images(size)) for size in case.sizes]
    return [y[0] if isinstance(y, tuple) else y for y in outputs]


def sample(logits: Tensor) -> list[float]:
    flat = logits.contiguous().flatten()
    return [float(f"{x:.6g}") for x in flat[:: flat.numel() // SAMPLES + 1].tolist()]


def clone(path: str) -> Path:
    """The file at a path below SEGFAST_OFFICIAL; the test skips where it is not."""
    file = Path(os.environ.get("SEGFAST_OFFICIAL", "")) / path
    if not os.environ.get("SEGFAST_OFFICIAL") or not file.is_file():
        pytest.skip(f"no official code at SEGFAST_OFFICIAL/{path}")
    return file


def module(path: str):
    file = clone(path)
    spec = importlib.util.spec_from_file_location(path.replace("/", "_").removesuffix(".py").replace("-", "_"), file)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def pytorchcv(module: str):
    return pytest.importorskip(f"pytorchcv.models.{module}")


ICNET = "ICNet/evaluation/prototxt/icnet_cityscapes.prototxt"  # pooled and resized to sizes that fit 1025 x 2049 alone
CASES = (
    Case("espnet_train", "espnet", lambda: module("ESPNet/train/Model.py").ESPNet(20, 2, 3), attributes={"variant": "train"}),
    Case("espnet_test", "espnet", lambda: module("ESPNet/test/Model.py").ESPNet(20, 2, 3), attributes={"variant": "test"}),
    Case("espnet_c", "espnet_c", lambda: module("ESPNet/train/Model.py").ESPNet_Encoder(20, 2, 5), resized=False),
    Case("fast_scnn_tramac", "fast_scnn", lambda: module("Fast-SCNN-pytorch/models/fast_scnn.py").FastSCNN(19)),
    Case("fast_scnn_tramac_aux", "fast_scnn", lambda: module("Fast-SCNN-pytorch/models/fast_scnn.py").FastSCNN(19, aux=True)),
    Case("fast_scnn_pytorchcv", "fast_scnn", lambda: pytorchcv("fastscnn").fastscnn_cityscapes(fixed_size=False)),
    Case("contextnet", "contextnet", lambda: pytorchcv("contextnet").ctxnet_cityscapes(aux=True), ((96, 128), (128, 160))),
    Case("icnet", "icnet", lambda: caffe.Net(clone(ICNET).read_text()), ((1025, 2049),), attributes={"deploy": True}),
    Case("linknet", "linknet", lambda: pytorchcv("linknet").linknet_cityscapes()),
    Case("swiftnet_rn18", "swiftnet_rn18", lambda: networks.swiftnet("single_scale", 18)),
    Case("swiftnet_rn34", "swiftnet_rn34", lambda: networks.swiftnet("single_scale", 34)),
    Case("swiftnet_rn18_pyramid", "swiftnet_rn18_pyramid", lambda: networks.swiftnet("pyramid", 18)),
    Case("fanet18", "fanet18", lambda: networks.fanet(18)),
    Case("fanet18_aux", "fanet18", networks.fanet_trained),
    Case("fanet34", "fanet34", lambda: networks.fanet(34)),
    Case("fasterseg_student", "fasterseg_student", lambda: networks.fasterseg(1)),
    Case("fasterseg_student_aux", "fasterseg_student", lambda: networks.fasterseg(1, training_heads=True)),
    Case("fasterseg_teacher", "fasterseg_teacher", lambda: networks.fasterseg(0)),
)


def write(chosen: list[str]) -> None:
    STORED.mkdir(exist_ok=True)
    for case in CASES:
        if chosen and case.name not in chosen:
            continue
        try:
            official = case.build()
        except pytest.skip.Exception as reason:
            print(f"{case.name}: {reason}")
            continue
        names = shapes(official)
        logits = [sample(y) for y in compute(case, official, seeded(names))]
        text = json.dumps({"shapes": names, "logits": logits}, separators=(",", ":"))
        (STORED / f"{case.name}.json").write_text(text + "\n")
        print(f"{case.name}: {len(names)} tensors")


if __name__ == "__main__":
    write(sys.argv[1:])
