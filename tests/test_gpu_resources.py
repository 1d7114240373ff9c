"""benchmarks/gpu_resources.json says what the kernels take: a change of it is renewed on purpose, with the script beside it."""

import json
import sys

import gpu_resources
import pytest
from conftest import EFFORT, seed_of_commit

TABLE = json.loads(gpu_resources.TABLE.read_text())
PAIRS = [(source, architecture) for architecture in gpu_resources.ARCHITECTURES for source in gpu_resources.SOURCES]
DRAWN = [PAIRS[seed_of_commit() % len(PAIRS)]] if EFFORT == "ci" else PAIRS
HINT = "run python benchmarks/gpu_resources.py if that is meant"


@pytest.mark.parametrize("source, architecture", DRAWN)
def test_cuda_resources_are_as_recorded(source, architecture):
    if gpu_resources.toolkit() is None:
        pytest.skip("no CUDA toolkit here")
    if gpu_resources.nvcc_version() != TABLE["cuda"]["nvcc"]:
        pytest.skip(f"recorded with nvcc {TABLE['cuda']['nvcc']}")
    assert gpu_resources.compile_cuda(source, architecture) == TABLE["cuda"]["resources"][architecture][source], HINT


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
