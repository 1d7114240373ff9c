"""Times all candidates of one figure in one process, in turns: what else the machine does falls on all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from segfast import _backend
from segfast.engine.environment import processor
from segfast.engine.kernels import distance, most

CALLS = 5  # timed calls a turn
SETTLE = 0.02  # seconds; the thread pools of other libraries spin for a while after a call
SECONDS = 3.0  # a figure's timing, about
ROUNDS = (3, 25)

Candidate = Callable[[], object]


def machine() -> dict[str, str]:
    """What a ratio depends on besides the code: the key of a baseline."""
    kernels = _backend._C.cpu_features()["kernel_set"] if _backend._C is not None else "reference"
    return {
        "processor": processor(),
        "kernel set": kernels if _backend.requested == "auto" else _backend.requested,
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__.split("+")[0],
    }


def tensors(result: object) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def require_right(ours: object, plain: object, exact: object) -> None:
    """Refuse to time a wrong result: the tests' rule, against the same dtype's eager result and the exact one."""
    for index, values in enumerate(zip(tensors(ours), tensors(plain), tensors(exact), strict=True)):
        result, rough, truth = (value.detach() for value in values)
        error = most([result], [truth], [distance(rough, truth)])
        if not error <= 1:
            raise AssertionError(f"result {index} is wrong by {error:.3g} times what is allowed: not measured")


def require_close(name: str, peer: object, plain: object) -> None:
    """A peer that computes something else is no peer. Loose: its arithmetic is its own."""
    for a, b in zip(tensors(peer), tensors(plain), strict=True):
        a, b = a.detach().double(), b.detach().double()
        allowed = (0.05 if tensors(plain)[0].dtype == torch.bfloat16 else 1e-2) * float(b.abs().max()) + 1e-12
        if not float((a - b).abs().max()) <= allowed:
            raise AssertionError(f"{name} computes something else: not measured")


def figure(benchmark, ours: Candidate, peers: Mapping[str, Candidate], against: Mapping[str, list[str]] | None = None) -> None:
    """Time `ours` and the peers in rounds; leave medians and ratios in `benchmark.extra_info`.

    Args:
        benchmark: the fixture; its own statistics are those of `ours`.
        ours: runs the operation.
        peers: by name, the same work done by others.
        against: by label, the peers whose fastest one is compared with; None: all of them, as "best peer".
    """
    taken: dict[str, list[float]] = {name: [] for name in ("segfast", *peers)}
    candidates = {"segfast": ours, **peers}
    once = 0.0
    for call in candidates.values():
        call()
        start = time.perf_counter()
        call()
        once += (2 + CALLS) * (time.perf_counter() - start) + SETTLE
    rounds = max(ROUNDS[0], min(ROUNDS[1], round(SECONDS / once)))
    calls = 0

    def settle(call: Candidate) -> None:
        time.sleep(SETTLE)
        call()
        call()

    def turn_of_the_others() -> None:
        nonlocal calls
        if calls % CALLS == 0:
            for name, call in peers.items():
                settle(call)
                for _ in range(CALLS):
                    start = time.perf_counter()
                    call()
                    taken[name].append(1000 * (time.perf_counter() - start))
            settle(ours)
        calls += 1

    def timed() -> None:
        start = time.perf_counter()
        ours()
        taken["segfast"].append(1000 * (time.perf_counter() - start))

    benchmark.pedantic(timed, setup=turn_of_the_others, rounds=rounds * CALLS, iterations=1)
    medians = {name: statistics.median(times) for name, times in taken.items() if times}
    labels = {"best peer": list(peers)} if against is None else against
    ratios = {
        label: min(medians[name] for name in names if name in medians) / medians["segfast"]
        for label, names in labels.items()
        if any(name in medians for name in names)
    }
    benchmark.extra_info.update(machine=machine(), milliseconds=medians, ratios=ratios)
