"""What this installation is made of, and what it lacks."""

from __future__ import annotations

import importlib.util
import os
import platform

import torch

from segfast import _backend
from segfast._version import __version__

EXTRAS = {
    "timm": "train", "torchvision": "train", "accelerate": "train", "tensorboard": "train", "matplotlib": "train",
    "av": "video", "onnx": "deploy", "onnxruntime": "deploy", "torchao": "deploy",
}  # fmt: skip
DEVICES = ("cpu", "cuda")


def environment() -> dict[str, str]:
    """Versions, processor, kernels and threads, by name."""
    facts = {
        "segfast": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "threads": str(torch.get_num_threads()),
        "SEGFAST_BACKEND": _backend.requested,
    }
    if _backend._C is None:
        facts["kernels"] = "none compiled: every operation runs on its PyTorch reference"
    else:
        facts["build"] = ", ".join(f"{name} {value or 'none'}" for name, value in _backend._C.build_info().items())
        features = _backend._C.cpu_features()
        facts["processor has"] = " ".join(name for name, value in features.items() if value is True)
        facts["kernel set"] = f"{features['kernel_set']} (of {', '.join(features['kernel_sets'])})"
    facts["GPU"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none visible"
    return facts


def processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


def backend_table() -> list[tuple[str, str, str]]:
    """(op, device, backend) for every operation and device: "c++", "cuda", "triton" or "reference"."""
    return [(op, device, owners.get(device, "reference")) for op, owners in _backend.table.items() for device in DEVICES]


def missing() -> list[tuple[str, str]]:
    """(what is missing, how to get it)."""
    hints = []
    if _backend._C is None:
        hints.append(
            ("the compiled kernels", "install a C++20 compiler (g++ or clang++), then: pip install --force-reinstall --no-deps .")
        )
    elif not any(owner == "c++" for owners in _backend.table.values() for owner in owners.values()):
        hints.append(("kernels in use", f"SEGFAST_BACKEND={os.environ.get('SEGFAST_BACKEND')} turns them off: unset it"))
    if not torch.cuda.is_available():
        hints.append(("a GPU that torch sees", "a CUDA build of torch, see https://pytorch.org/get-started"))
    elif not any("cuda" in owners for owners in _backend.table.values()):
        hints.append(
            (
                "GPU kernels",
                "with the CUDA toolkit installed: FORCE_CUDA=1 pip install --no-build-isolation --force-reinstall --no-deps .",
            )
        )
    for extra in dict.fromkeys(EXTRAS.values()):
        absent = [name for name, of in EXTRAS.items() if of == extra and importlib.util.find_spec(name) is None]
        if absent:
            hints.append((", ".join(absent), f"pip install 'segfast[{extra}]'"))
    return hints
