"""The CUDA sources compile with nvcc, without spills. Nothing here needs a GPU."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = ["75", "80", "86", "89", "90", "100", "120"] if os.environ.get("SEGFAST_EFFORT") == "full" else ["80"]


def toolkit() -> Path:
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", nvcc and Path(os.path.realpath(nvcc)).parent.parent]
    for home in homes:
        if home and (Path(home) / "include" / "cuda_runtime.h").exists() and (Path(home) / "bin" / "nvcc").exists():
            return Path(home)
    pytest.skip("no CUDA toolkit here")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_compiles_without_spills(source, architecture, tmp_path):
    command = [
        str(toolkit() / "bin" / "nvcc"),
        *("-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xptxas", "-v"),
        f"-gencode=arch=compute_{architecture},code=sm_{architecture}",
        "-DTORCH_TARGET_VERSION=0x020a000000000000ull",
        *(f"-I{path}" for path in cpp_extension.include_paths("cpu")),
        *("-c", str(source), "-o", str(tmp_path / "kernel.o")),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert spills, "ptxas reports no kernel"
    assert set(spills) == {("0", "0")}, done.stderr


@pytest.mark.parametrize("header", sorted((ROOT / "csrc" / "cuda").glob("*.cuh")), ids=lambda path: path.name)
def test_kernels_are_free_of_torch(header):
    included = re.findall(r'#include\s*[<"]([^>"]+)', header.read_text())
    assert not [name for name in included if "torch" in name or name in ("stream.h", "../common.h")]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32, torch.float64, torch.complex128])
def test_channel_shuffle_on_a_gpu(dtype, memory_format):
    from segfast import ops
    from segfast.ops.channel_shuffle import channel_shuffle_reference

    for size, groups in (((2, 12, 5, 7), 3), ((2, 64, 16, 16), 4), ((1, 58, 3, 3), 2)):
        x = (torch.randn(size, device="cuda") * 50).abs().to(dtype).contiguous(memory_format=memory_format)
        assert torch.equal(ops.channel_shuffle(x, groups), channel_shuffle_reference(x, groups))
