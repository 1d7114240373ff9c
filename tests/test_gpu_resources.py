"""benchmarks/gpu_resources.json says what the kernels take: a change of it is renewed on purpose, with the script beside it."""

import importlib.util
import json
import sys
from importlib.metadata import version

import gpu_resources
import pytest
from conftest import EFFORT, seed_of_commit

TABLE = json.loads(gpu_resources.TABLE.read_text())
PAIRS = [(source, architecture) for architecture in gpu_resources.ARCHITECTURES for source in gpu_resources.SOURCES]
DRAWN = [PAIRS[seed_of_commit() % len(PAIRS)]] if EFFORT == "ci" else PAIRS
HINT = "run python benchmarks/gpu_resources.py if that is meant"


@pytest.mark.parametrize("source, architecture", DRAWN)
def test_compiles_without_spills_and_as_recorded(source, architecture):
    if gpu_resources.toolkit() is None:
        pytest.skip("no CUDA toolkit here")
    kernels = gpu_resources.compile_cuda(source, architecture)
    assert kernels, "ptxas reports no kernel"
    assert not {name: row for name, row in kernels.items() if row["spill_bytes"] or row["stack_bytes"]}
    if gpu_resources.nvcc_version() == TABLE["cuda"]["nvcc"]:
        assert kernels == TABLE["cuda"]["resources"][architecture][source], HINT


def test_every_cuda_kernel_and_architecture_is_recorded_without_spills():
    recorded = TABLE["cuda"]["resources"]
    assert set(recorded) == set(gpu_resources.ARCHITECTURES)
    for architecture, sources in recorded.items():
        assert set(sources) == set(gpu_resources.SOURCES), architecture
        for kernels in sources.values():
            for name, row in kernels.items():
                assert row["spill_bytes"] == row["stack_bytes"] == 0, f"{name} on sm_{architecture}"
                assert row["occupancy"] > 0, f"{name} does not fit on sm_{architecture}"


def test_the_copies_are_wide():
    """The kernels that are made to move 16 bytes at a time do so in the machine's own code."""
    for architecture, sources in TABLE["cuda"]["resources"].items():
        pairs = {name: row for name, row in sources["shuffle"].items() if "Bytes16" in name and "planes" in name}
        assert pairs
        for name, row in pairs.items():
            assert row["loads_of_16_bytes"] >= 1, f"{name} on sm_{architecture}"
            assert row["stores_of_16_bytes"] >= 1, f"{name} on sm_{architecture}"


def test_bytes_moved_are_as_recorded():
    assert all(1 <= row["ratio"] <= 1.1 for row in TABLE["cuda"]["bytes"].values())
    if sys.platform != "linux" or not gpu_resources.host_compiler():
        pytest.skip("the host build needs Linux and a C++ compiler")
    assert gpu_resources.bytes_moved() == TABLE["cuda"]["bytes"], HINT


def test_bytes_of_the_triton_kernels_are_as_recorded():
    recorded = TABLE["triton_bytes"]
    assert {name.split()[0] for name in recorded} == {
        *("ds_conv", "ds_conv_train", "ds_conv_backward", "pixelwise_kl", "channel_shuffle", "concat_shuffle")
    }
    for name, row in recorded.items():
        assert 0.99 <= row["ratio"] <= 1.1, name  # below 1: a masked pixel's gradient is zero whatever its logits are
    if importlib.util.find_spec("triton") is None or version("triton").split(".")[:2] != ["3", "8"]:
        pytest.skip("counted with Triton 3.8")
    select = "" if EFFORT == "full" else "^(ds_conv_backward .*s2|pixelwise_kl gradient 2x150.*float16|c.*float16)"
    actual = gpu_resources.count_triton_bytes(select)
    assert actual
    assert actual == {name: recorded[name] for name in actual}, HINT
