"""Every op under fork, in loader workers and on many threads; what the import brings along; more than 2^31 elements."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import EFFORT, count
from harness import OPS, evaluate, samples_of
from torch.utils.data import Dataset

from segfast import ops

full_only = pytest.mark.skipif(EFFORT != "full", reason="takes up to 8 GB: SEGFAST_EFFORT=full")


def run(code: str, *arguments: str, timeout: float = 100) -> str:
    """In a process of its own, on this very segfast. One that hangs is killed and fails the test."""
    path = [str(Path(__file__).resolve().parent), str(Path(ops.__file__).resolve().parents[2])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*path, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def digest(op: str) -> str:
    """The bits of an op's outputs and of the first input's gradient, over its first samples."""
    bits = hashlib.sha256()
    for sample in samples_of(op, torch.float32)[:3]:
        for x in evaluate(getattr(ops, op), sample, [0]).all():
            if x is not None:
                bits.update(x.reshape(-1).numpy().tobytes())
    return bits.hexdigest()


class Digests(Dataset):
    """Item i is the digest of op i, computed in the worker."""

    def __len__(self) -> int:
        return len(OPS)

    def __getitem__(self, i: int) -> str:
        return digest(OPS[i])


def test_import_brings_nothing_else():
    """Beside torch, numpy and the standard library, an import of segfast loads its own modules alone."""
    code = """
import sys, torch, numpy
before = set(sys.modules)
import segfast
names = {name.split(".")[0] for name in set(sys.modules) - before}
print(*sorted(names - {"segfast", "torch", "numpy"} - set(sys.stdlib_module_names)))
"""
    # What torch's own lazily loaded parts (the FLOP counter, the autograd helpers) import is theirs: sympy, mpmath and the like.
    lazy = "import sys, torch, torch._dynamo, torch.utils.flop_counter; print(*{name.split('.')[0] for name in sys.modules})"
    torchs_own = set(run(lazy).split())
    assert not set(run(code).split()) - torchs_own


def test_fork_right_after_import():
    if not hasattr(os, "fork"):
        pytest.skip("no fork here")
    code = """
import os, signal, torch
from harness import OPS
from test_reliability import digest
child = os.fork()
digests = [digest(op) for op in OPS]
if child == 0:
    os._exit(int.from_bytes(bytes.fromhex(digests[-1][:2])) // 2 if len(set(digests)) == len(OPS) else 255)
signal.alarm(80)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
assert status == int.from_bytes(bytes.fromhex(digests[-1][:2])) // 2, status
"""
    run(code)


@pytest.mark.drawn(1 / 2)
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_loader_workers(method):
    if method not in torch.multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} here")
    code = """
import sys
from torch.utils.data import DataLoader
from harness import OPS
from test_reliability import Digests, digest
if __name__ == "__main__":
    expected = [digest(op) for op in OPS]  # so that the parent did parallel work before it forks
    loader = DataLoader(Digests(), num_workers=2, batch_size=None, multiprocessing_context=sys.argv[1], timeout=80)
    assert list(loader) == expected
"""
    run(code, method)


def test_threads_give_equal_results():
    code = """
import sys
from concurrent.futures import ThreadPoolExecutor
from harness import OPS
from test_reliability import digest
expected = {op: digest(op) for op in OPS}

def calls(k):
    # Every thread starts with another op: they meet each other, and themselves, in every kernel.
    return all(digest(op) == expected[op] for i in range(int(sys.argv[1])) for op in [OPS[(k + i) % len(OPS)]])

with ThreadPoolExecutor(8) as pool:
    assert all(pool.map(calls, range(8)))
"""
    run(code, str(count(50, 1000)), timeout=count(100, 1000))


@full_only
@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last), ids=("contiguous", "channels_last"))
def test_concat_shuffle_of_more_than_2_to_the_31_elements(layout):
    parts = [torch.empty(1, 2, 32768, 16400, dtype=torch.int8, memory_format=layout) for _ in range(2)]
    for k, x in enumerate(parts):
        for c in range(2):
            x[0, c] = 2 * k + c
    y = ops.concat_shuffle(parts, 2)
    assert y.numel() > 2**31
    for c, source in enumerate((0, 2, 1, 3)):
        for at in ((0, 0), (16384, 8200), (-1, -1)):
            assert y[0, c][at] == source


@full_only
@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last), ids=("contiguous", "channels_last"))
def test_pixelwise_kl_of_more_than_2_to_the_31_elements(layout):
    """Forward alone: student and teacher are one tensor of 4.3 GB, so all is 0 but for a NaN behind element 2^31."""
    x = torch.zeros(1, 2, 32768, 32784, dtype=torch.bfloat16).to(memory_format=layout)
    assert x.numel() > 2**31
    with torch.no_grad():
        assert ops.pixelwise_kl(x, x, reduction="sum") == 0
        x[0, 1, -1, -1] = float("nan")
        assert ops.pixelwise_kl(x, x, reduction="sum").isnan()
        ignored = torch.ones(1, 32768, 32784, dtype=torch.bool)
        ignored[0, -1, -1] = False
        assert ops.pixelwise_kl(x, x, mask=ignored, reduction="sum") == 0


@full_only
@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last), ids=("contiguous", "channels_last"))
def test_overhaul_loss_of_more_than_2_to_the_31_elements(layout):
    """Forward alone, of one tensor as student and teacher: all is 0 but for what lies behind element 2^31."""
    x = torch.ones(1, 2, 32768, 32784, dtype=torch.bfloat16).to(memory_format=layout)
    assert x.numel() > 2**31
    margin = torch.tensor([-1.0, -1.0])
    with torch.no_grad():
        assert ops.overhaul_loss(x, x, margin, reduction="sum") == 0
        x[0, 1, -1, -1] = -3  # the margin makes -1 of the teacher's, which the student's -3 may stay below
        assert ops.overhaul_loss(x, x, margin, reduction="sum") == 0
        assert ops.overhaul_loss(x, x, torch.tensor([-1.0, 2.0]), reduction="sum") == (x.numel() // 2 - 1) + 25
