"""The CUDA build, and the CUDA sources as nvcc leaves them. Nothing here needs a GPU."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import gpu_resources
import pytest
import torch
from conftest import EFFORT
from harness import DTYPES, OPS, check_rule

from segfast import testing

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(gpu_resources.toolkit() is None, reason="no CUDA toolkit here")
@pytest.mark.skipif(EFFORT == "ci", reason="minutes: SEGFAST_EFFORT=full")
def test_a_forced_cuda_build_loads_without_a_gpu(tmp_path):
    """FORCE_CUDA=1 with nvcc alone: the module links, loads on a CPU-only torch too, and registers the kernels."""
    source, target = tmp_path / "source", tmp_path / "target"
    ignore = shutil.ignore_patterns("build", "*.so", "*.egg-info", ".git", "tests", "docs")
    shutil.copytree(ROOT, source, ignore=ignore)
    environment = {**os.environ, "FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST", "8.0")}
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--target", str(target), "."]
    done = subprocess.run(install, cwd=source, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:] + done.stdout[-4000:]
    code = """
import torch, segfast
from segfast import _backend
assert _backend._C.build_info()["cuda"], "built without CUDA"
for op in ("channel_shuffle", "concat_shuffle", "pixelwise_kl"):
    assert _backend.table[op] == {"cpu": "c++", "cuda": "cuda"}, (op, _backend.table[op])
assert _backend.has_compiled("depthwise") and _backend.has_compiled("depthwise_train")
x = torch.arange(12.0).reshape(1, 12, 1, 1)
assert segfast.ops.channel_shuffle(x, 3).flatten()[:3].tolist() == [0, 4, 8]
print(segfast.__file__)
"""
    path = {**os.environ, "PYTHONPATH": str(target), "SEGFAST_BACKEND": "auto"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert str(target) in done.stdout


@pytest.mark.parametrize("header", sorted((ROOT / "csrc" / "cuda").glob("*.cuh")), ids=lambda path: path.name)
def test_kernels_are_free_of_torch(header):
    included = re.findall(r'#include\s*[<"]([^>"]+)', header.read_text())
    assert not [name for name in included if "torch" in name or name in ("stream.h", "../common.h")]


@pytest.mark.parametrize("header", sorted((ROOT / "csrc" / "cuda").glob("*.cuh")), ids=lambda path: path.name)
def test_kernels_keep_to_the_dialect(header):
    """What the host cannot check, no kernel uses: raw shared memory, partial masks, inline PTX, wmma, unchecked pointers."""
    if header.name == "launch.cuh":
        return
    code = "\n".join(line.split("//")[0] for line in header.read_text().splitlines())
    for word in ("__shared__", "asm", "wmma", "__syncwarp", "__activemask", "__ldg", "volatile", "atomicAdd", "reinterpret_cast"):
        assert not re.search(rf"\b{word}\b", code), word
    assert not re.search(r"__shfl\w*\((?!kFullMask)", code)


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_rule_on_a_gpu(op, dtype):
    for sample in testing.SAMPLES[op](dtype, torch.device("cuda")):
        check_rule(op, sample, [0] if op.endswith("pixelwise_kl") else None)
