"""What every test may lean on: the test data, the effort, and a process left as it was found."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import math
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from segfast import _backend

for name in ("SEGFAST_TEST_DATA", "SEGFAST_OFFICIAL"):
    if os.environ.get(name):  # the fixture `elsewhere` leaves the folder that a path may be relative to
        os.environ[name] = os.path.abspath(os.environ[name])
sys.path[:0] = [str(Path(__file__).parent / "simt"), str(Path(__file__).parents[1] / "benchmarks")]
# As many threads as there are processors, not as many for each worker: small regions of too many threads wait 100 times as long.
torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))
HAS_OPENVINO = importlib.util.find_spec("openvino") is not None
EFFORT = os.environ.get("SEGFAST_EFFORT", "ci")
if EFFORT not in ("ci", "full"):
    raise pytest.UsageError(f"SEGFAST_EFFORT: want ci or full, got {EFFORT!r}")


def count(ci: int, full: int) -> int:
    """How many examples, runs or descriptors this effort asks for."""
    return full if EFFORT == "full" else ci


def seed_of_commit() -> int:
    """A number from the commit's hash: what ci effort draws differs from commit to commit and not from run to run.

    SEGFAST_COMMIT says the hash where the tests do not lie in the repository.
    """
    return int(commit()[:8], 16)


def some(names: Sequence[str], ci: int, salt: int = 0) -> list[str]:
    """`ci` of the names by the commit's hash, others for another salt; under full effort all."""
    return random.Random(seed_of_commit() + salt).sample(names, count(min(ci, len(names)), len(names)))


@functools.lru_cache(1)
def commit() -> str:
    if told := os.environ.get("SEGFAST_COMMIT"):
        return told
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else "0"


def pytest_collection_modifyitems(config, items) -> None:
    """ci effort runs that share of the cases of a test marked `drawn(share)`, by the commit's hash; all if asked for by name."""
    if EFFORT == "full" or config.option.keyword or any("::" in asked for asked in config.args):
        return
    families: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("drawn"):
            families.setdefault(item.nodeid.partition("[")[0], []).append(item)
    left: set[pytest.Item] = set()
    for name, cases in families.items():
        (share,) = cases[0].get_closest_marker("drawn").args
        left.update(random.Random(f"{commit()} {name}").sample(cases, len(cases) - math.ceil(share * len(cases))))
    config.hook.pytest_deselected(items=[item for item in items if item in left])
    items[:] = [item for item in items if item not in left]


def extra(package: str):
    """timm, torchvision or another package that networks need and segfast does not; without it the test skips.

    PyPI's torchvision is built for CUDA. Beside a CPU build of PyTorch its own library does not load, and its import, timm's
    with it, stops at two operators that nobody declared. Its networks are Python and work, so the tests declare them.
    """
    try:
        importlib.import_module("torchvision")
    except ImportError:
        pass
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    try:
        return importlib.import_module(package)
    except ImportError as error:
        pytest.skip(f"needs {package} ({error})")


def kernel_sets() -> list[str]:
    """The kernel sets that this processor can run; "reference" where nothing is compiled or the reference was asked for.

    "avx512bf16" and "amx" differ from "avx512" in the packed kernels alone, whose tests add them.
    """
    if _backend._C is None or _backend.requested == "reference":
        return ["reference"]
    return [name for name in _backend._C.cpu_features()["kernel_sets"] if name not in ("avx512bf16", "amx")]


@pytest.fixture(autouse=True, scope="session")
def elsewhere(tmp_path_factory):
    """`python -c` looks into the current folder first, and in a checkout finds the package without its compiled module."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("elsewhere"))
    yield
    os.chdir(before)


@pytest.fixture(autouse=True)
def restore():
    """Thread count, kernel set, determinism and grad mode are process-wide: a test that changes one leaves no trace."""
    threads = torch.get_num_threads()
    chosen = _backend._C.cpu_features()["kernel_set"] if _backend._C is not None else None
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    if chosen is not None:
        _backend._C.set_kernel_set(chosen)


class SignalStack(ctypes.Structure):
    """stack_t of Linux."""

    _fields_ = [("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]


@pytest.fixture(autouse=sys.platform == "linux")
def signal_stack():
    """This thread's stack for signal handlers, put back.

    A network that OpenVINO 2026.4 compiled leaves its own there and frees it: the next signal that has a handler, such as that of
    a child's end, would stop the process.
    """
    if not HAS_OPENVINO:
        yield
        return
    libc, before, after = ctypes.CDLL(None), SignalStack(), SignalStack()
    libc.sigaltstack(None, ctypes.byref(before))
    yield
    libc.sigaltstack(None, ctypes.byref(after))
    if after.address != before.address:
        libc.sigaltstack(ctypes.byref(before), None)


@pytest.fixture(params=kernel_sets())
def kernel_set(request) -> str:
    """Runs the test once per kernel set of this machine."""
    if request.param != "reference":
        _backend._C.set_kernel_set(request.param)
    return request.param


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder with the test data: SEGFAST_TEST_DATA, else `../shared` beside the repository."""
    beside = Path(__file__).resolve().parents[1].parent / "shared"
    root = Path(os.environ.get("SEGFAST_TEST_DATA") or beside)
    if root.is_dir():
        return root
    message = f"no test data at {root}: set SEGFAST_TEST_DATA"
    if os.environ.get("SEGFAST_REQUIRE_DATA") == "1":
        pytest.fail(message)
    pytest.skip(message)
