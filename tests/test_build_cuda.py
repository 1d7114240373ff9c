"""The CUDA sources compile with nvcc, without spills. Nothing here needs a GPU."""

import re
from pathlib import Path

import gpu_resources
import pytest
import torch
from conftest import EFFORT, seed_of_commit
from harness import DTYPES, OPS, check_rule

from segfast import testing

ROOT = Path(__file__).resolve().parent.parent
PAIRS = [(source, architecture) for architecture in gpu_resources.ARCHITECTURES for source in gpu_resources.SOURCES]
if EFFORT == "ci":
    PAIRS = [PAIRS[seed_of_commit() % len(PAIRS)]]
needs_nvcc = pytest.mark.skipif(gpu_resources.toolkit() is None, reason="no CUDA toolkit here")


@needs_nvcc
@pytest.mark.parametrize("source, architecture", PAIRS)
def test_compiles_without_spills(source, architecture):
    kernels = gpu_resources.compile_cuda(source, architecture)
    assert kernels, "ptxas reports no kernel"
    spilling = {name: row for name, row in kernels.items() if row["spill_bytes"] or row["stack_bytes"]}
    assert not spilling


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
