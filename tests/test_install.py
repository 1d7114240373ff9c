"""What an installed package promises before the first operation: metadata, a light import, backends."""

import json
import os
import subprocess
import sys
from importlib import metadata

import pytest
import torch
from harness import OPS

import segfast
from segfast import _backend, ops

OPTIONAL = {
    *("timm", "torchvision", "torchmetrics", "accelerate", "tensorboard", "matplotlib", "yaml"),
    *("onnx", "onnxscript", "onnxruntime", "torchao", "pytest", "hypothesis"),
}


def run(code: str, timeout: float = 120, **environment: str) -> str:
    environment = {**os.environ, **environment}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def installed() -> metadata.Distribution:
    try:
        return metadata.distribution("segfast")
    except metadata.PackageNotFoundError:
        pytest.skip("run from a checkout that is not installed")


def test_metadata():
    package = installed()
    assert package.version == segfast.__version__
    assert package.metadata["License-Expression"] == "Apache-2.0"
    base = [line for line in package.requires or [] if "extra ==" not in line]
    assert sorted(line.split(">")[0].strip() for line in base) == ["numpy", "pillow", "rich", "safetensors", "torch", "typer"]
    assert {"test", "train", "deploy", "dev", "all"} <= set(package.metadata.get_all("Provides-Extra"))
    files = {str(file) for file in package.files or []}
    assert "segfast/py.typed" in files or any("__editable__" in file for file in files)


def test_import_loads_nothing_optional():
    added = run("import torch, sys; before = set(sys.modules); import segfast; print(*set(sys.modules) - before)")
    assert not OPTIONAL & set(added.split())


def test_import_starts_no_thread():
    code = (
        "import os, torch; a = len(os.listdir('/proc/self/task')); import segfast; print(len(os.listdir('/proc/self/task')) - a)"
    )
    if not os.path.isdir("/proc/self/task"):
        pytest.skip("no /proc")
    assert run(code).strip() == "0"


def test_import_adds_a_bounded_number_of_modules():
    code = "import torch, sys; before = set(sys.modules); import segfast; print(len(set(sys.modules) - before))"
    assert int(run(code)) < 400  # a light import by count: nothing is timed in a test


@pytest.mark.parametrize("requested", ["auto", "triton", "reference"])
def test_backend_values(requested):
    code = "import json, segfast; print(json.dumps(segfast._backend.table))"
    table = json.loads(run(code, SEGFAST_BACKEND=requested))
    assert set(table) >= set(OPS)
    if requested != "auto":
        assert not any("cpu" in owners for owners in table.values())
    if requested == "reference":
        assert not any(table.values())
    if requested == "auto" and _backend._C is not None:
        assert table["channel_shuffle"]["cpu"] == "c++"


def test_unknown_backend_is_refused():
    done = subprocess.run(
        [sys.executable, "-c", "import segfast"],
        capture_output=True,
        text=True,
        env={**os.environ, "SEGFAST_BACKEND": "fast"},
        check=False,
    )
    assert done.returncode != 0
    assert "SEGFAST_BACKEND: want one of auto, triton, reference, got 'fast'" in done.stderr


def test_reference_backend_runs_no_kernel():
    code = (
        "import torch, segfast; x = torch.randn(1, 4, 2, 2); segfast.ops.channel_shuffle(x, 2);"
        "C = segfast._backend._C; print(0 if C is None else C.kernel_calls()['channel_shuffle'])"
    )
    assert run(code, SEGFAST_BACKEND="reference").strip() == "0"


needs_module = pytest.mark.skipif(_backend._C is None, reason="built with SEGFAST_BUILD=none")


@needs_module
def test_build_info():
    info = _backend._C.build_info()
    assert set(info) == {"compiler", "cuda", "cuda_archs", "torch_built_with", "torch_target"}
    assert info["torch_target"] == "2.10"
    assert (info["cuda"] is None) == (info["cuda_archs"] == "")


@needs_module
def test_kernel_sets():
    features = _backend._C.cpu_features()
    sets = features["kernel_sets"]
    assert sets == ["portable", "avx2", "avx512", "avx512bf16", "amx"][: len(sets)]
    x = torch.randn(2, 12, 5, 7).contiguous(memory_format=torch.channels_last)
    want = ops.channel_shuffle(x, 3)
    try:
        for name in sets:
            _backend._C.set_kernel_set(name)
            assert _backend._C.cpu_features()["kernel_set"] == name
            assert torch.equal(ops.channel_shuffle(x, 3), want)
        for name in ["", "avx1024", "AVX2"]:
            with pytest.raises(ValueError, match="set_kernel_set: want"):
                _backend._C.set_kernel_set(name)
    finally:
        _backend._C.set_kernel_set("auto")
    assert _backend._C.cpu_features()["kernel_set"] == sets[-1]
