"""The Triton kernels, without a GPU: interpreted against the references, and compiled ahead of time."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from conftest import EFFORT

pytest.importorskip("triton")

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


# Two pools of threads, PyTorch's and NumPy's, that spin on tiny arrays would take three times as long as one thread.
THREADS = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def triton_version() -> str:
    return ".".join(version("triton").split(".")[:2])


def test_interpreted():
    """tests/interpreted_triton.py, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", str(HERE / "interpreted_triton.py")],
        env={**os.environ, "TRITON_INTERPRET": "1", "SEGFAST_BACKEND": "triton", **THREADS},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def resources():
    spec = importlib.util.spec_from_file_location("gpu_resources_triton", ROOT / "benchmarks" / "gpu_resources_triton.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_holds_every_kernel():
    """Sizes of one too: Triton makes constants of arguments that are 1, which the interpreter does not."""
    module = resources()
    table = json.loads(module.TABLE.read_text())["triton"]
    assert set(table) == {name for name, *_ in module.launches()}
    for name, targets in table.items():
        assert set(targets) == {f"sm_{architecture}" for architecture in module.TARGETS}, name
        for target, used in targets.items():
            assert used["spill_bytes"] == 0, f"{name} on {target} spills"
            assert used["shared_bytes"] <= 99 * 1024, f"{name} on {target}: sm_120 has no more shared memory than 99 KB a block"
            product = re.search("inference|pointwise", name) and not re.search("float32-[0-9]|float64|ones", name)
            assert used["mma"] or not product, f"{name} on {target}: no tensor cores"


# What ci compiles: each kernel once, for one GPU. All of the table with full effort.
SUBSET = (
    "ds_conv.*-bfloat16-64-64|pixelwise_kl-float32-19-N|overhaul_loss-float32-N|pairwise_loss-float32|shuffle-float16"
    "|upsample.*-bfloat16-NCHW"
)


@pytest.mark.skipif(triton_version() != "3.8", reason="the table is of Triton 3.8")
def test_resources_are_as_in_the_table():
    """A change here is renewed on purpose: python benchmarks/gpu_resources_triton.py"""
    module = resources()
    table = json.loads(module.TABLE.read_text())["triton"]
    targets = module.TARGETS if EFFORT == "full" else (90,)
    actual = module.triton_table(targets, "" if EFFORT == "full" else SUBSET)
    assert actual
    for name, used in actual.items():
        assert used == {target: table[name][target] for target in used}, name


@pytest.mark.skipif(triton_version() != "3.8", reason="checked with Triton 3.8")
def test_compiles_for_amd():
    select = (
        ""
        if EFFORT == "full"
        else "ds_conv(_train)?-bfloat16-64-64|pixelwise_kl-float32-19-NCHW|overhaul_loss-float32-N|ones-pairwise_loss-tiled"
    )
    outcome = resources().compile_for_hip("gfx942", select)
    assert outcome
    assert set(outcome.values()) == {"compiles"}, outcome


def test_import_compiles_and_imports_no_kernel():
    code = "import sys, segfast; print(*(name for name in sys.modules if name.startswith('segfast.triton.')))"
    assert not subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def plans(*changes):
    base = {"n": 1, "c": 64, "k": 64, "h": 64, "w": 128, "oh": 64, "ow": 128, "taps": 9, "element_size": 2, "block_out": 64}
    code = (
        "import json, sys; from segfast.triton.ds_conv import plan;"
        "print(json.dumps([plan(**sizes) for sizes in json.loads(sys.argv[1])]))"
    )
    sizes = json.dumps([{**base, **change} for change in changes])
    return json.loads(subprocess.run([sys.executable, "-c", code, sizes], capture_output=True, text=True, check=True).stdout)


def test_the_cost_model_chooses_each_way_where_it_is_right():
    small = {}
    large = {"n": 8, "h": 256, "w": 512, "oh": 256, "ow": 512}  # bytes rule, and the fused kernel moves least
    wide = {"n": 8, "k": 2048, "taps": 25}  # 32 tiles of C_out would each make 25 taps again
    product = {"n": 64, "c": 4096, "k": 4096}  # cuBLAS multiplies better
    assert plans(small, large, wide, product) == ["fused", "fused", "two kernels", "convolutions"]
    contiguous, built = {"n": 4, "contiguous": True}, {"compiled": True}
    assert plans(contiguous, contiguous | built, large | contiguous | built, large | built) == [
        *("fused", "c++ depthwise", "c++ depthwise", "fused"),
    ]
