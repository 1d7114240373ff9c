"""How fast the networks run here: counts, activation memory, and milliseconds of several ways of running, taken in turns."""

from __future__ import annotations

import contextlib
import json
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from segfast import _backend
from segfast.engine import checkpoint
from segfast.engine.environment import environment
from segfast.models import create_model

INCLUDED = (
    "one image, float32, from the normalised image to logits at its size; "
    "without decoding, preprocessing and argmax; inference mode, random weights"
)
# How each way of running is made: memory format, compiled, with this package's kernels
WAYS = {
    "eager": (torch.contiguous_format, False, False),
    "channels_last": (torch.channels_last, False, False),
    "compiled": (torch.channels_last, True, False),
    "segfast": (torch.channels_last, False, True),
}
WAYS_NOTE = (
    "eager, channels_last: every operation of this package on its PyTorch reference; compiled: the same in channels_last through "
    "torch.compile with freezing; segfast: this package's kernels in channels_last, not compiled"
)
SAME_MACHINE = ("torch", "processor", "threads")


@dataclass(frozen=True)
class Times:
    """Milliseconds of one way of running."""

    median: float
    p95: float
    runs: int


@dataclass(frozen=True)
class Measurement:
    """One network at one size. Activation bytes: the most that tensors made during a forward pass hold at a time."""

    name: str
    size: tuple[int, int]
    parameters: int
    macs: int
    activation_bytes: int
    activation_bytes_segfast: int
    milliseconds: dict[str, Times] = field(default_factory=dict)


@contextlib.contextmanager
def references() -> Iterator[None]:
    """Within, every operation runs on its PyTorch reference, as under SEGFAST_BACKEND=reference."""
    kept, requested = {op: dict(owners) for op, owners in _backend.table.items()}, _backend.requested
    _backend.requested = "reference"
    for owners in _backend.table.values():
        owners.clear()
    try:
        yield
    finally:
        _backend.requested = requested
        for op, owners in kept.items():
            _backend.table[op].update(owners)


class Memory(TorchDispatchMode):
    """Counts the bytes of storages that are made within and still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.now = self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.add(leaf.untyped_storage(), given)
        return result

    def add(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key = storage._cdata
        if key in self.alive or key in given:
            return
        self.alive[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self.remove, key)

    def remove(self, key: int) -> None:
        self.now -= self.alive.pop(key)


def activation_bytes(model: nn.Module, images: Tensor) -> int:
    """The most bytes that tensors made during a forward pass hold at a time; parameters and the images do not count.

    Model and images may be fake: nothing needs to be computed.
    """
    with Memory() as memory, torch.no_grad():
        model(images)
    return memory.most


def macs(model: nn.Module, images: Tensor) -> int:
    """Multiply-accumulates of convolutions and matrix products."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    return counter.get_total_flops() // 2


def counted(name: str, size: tuple[int, int]) -> Measurement:
    """A network's counts, on fake tensors: takes neither memory nor time."""
    with FakeTensorMode():
        model, images = create_model(name).eval(), torch.empty(1, 3, *size)
        fused = activation_bytes(model, images)
        with references():
            plain = activation_bytes(model, images)
            work = macs(model, images)
        return Measurement(name, size, sum(p.numel() for p in model.parameters()), work, plain, fused)


@dataclass
class Bench:
    """A network ready to be timed: every way has run once, so that what is compiled is compiled."""

    counts: Measurement
    runs: dict[str, Callable[[], float]]

    def measure(self, seconds: float = 5.0, least: int = 5, tick: Callable[[float], None] = lambda done: None) -> Measurement:
        """Time all ways in turns for about `seconds`, at least `least` runs each."""
        taken: dict[str, list[float]] = {way: [] for way in self.runs}
        start = time.perf_counter()
        while (rounds := len(next(iter(taken.values())))) < least or time.perf_counter() - start < seconds:
            for way, run in self.runs.items():
                taken[way].append(run())
            tick(min(1.0, (rounds + 1) / least, (time.perf_counter() - start) / seconds if seconds else 1.0))
        times = {way: summary(values) for way, values in taken.items()}
        return Measurement(**{**vars(self.counts), "milliseconds": times})


def summary(values: Sequence[float]) -> Times:
    """Median and 95th percentile of some milliseconds."""
    quantiles = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.5, 0.95], dtype=torch.float64))
    return Times(round(float(quantiles[0]), 3), round(float(quantiles[1]), 3), len(values))


def prepare(name: str, size: tuple[int, int], ways: Sequence[str] = tuple(WAYS)) -> Bench:
    """Build a network once for each way of running it, compile it, and run each once.

    Raises:
        ValueError: no such network or way, or a size that the network does not take.
    """
    wrong = [way for way in ways if way not in WAYS]
    if wrong or not ways:
        raise ValueError(f"bench: want ways of running among {', '.join(WAYS)}, got {', '.join(wrong) or 'none'}")
    torch.manual_seed(0)
    state = create_model(name).state_dict()
    images = torch.randn(1, 3, *size)
    runs = {}
    for way in ways:
        layout, compiled, fused = WAYS[way]
        model = create_model(name).eval()
        model.load_state_dict(state)
        model = model.to(memory_format=layout)
        if compiled:
            torch.compiler.reset()  # the networks share their forward, and one function is compiled for eight of them at most
            model = torch.compile(model, fullgraph=True, options={"freezing": True})
        runs[way] = timed(model, images.to(memory_format=layout), contextlib.nullcontext if fused else references)
        runs[way]()
    return Bench(counted(name, size), runs)


def timed(model: Callable[[Tensor], Tensor], images: Tensor, context: Callable) -> Callable[[], float]:
    def run() -> float:
        with context(), torch.inference_mode():
            start = time.perf_counter()
            model(images)
            return 1000 * (time.perf_counter() - start)

    return run


def read_size(text: str) -> tuple[int, int]:
    """ "512x1024" as (512, 1024).

    Raises:
        ValueError: anything else.
    """
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise ValueError(f"bench: want a size such as 512x1024 (height x width), got {text!r}")
    return int(height), int(width)


def write(path: Path, measurements: Sequence[Measurement]) -> None:
    """Put the measurements into a JSON file, in the place of those of the same networks and sizes; the others stay.

    Raises:
        ValueError: the file holds something else, or measurements of another processor, thread count or release of torch.
    """
    facts = environment()
    here = {name: facts[name] for name in SAME_MACHINE} | {"kernel set": facts.get("kernel set", "none")}
    rows = {}
    if path.exists():
        try:
            old = json.loads(path.read_text(encoding="utf-8"))
            there, rows = old["environment"], {(row["name"], *row["size"]): row for row in old["rows"]}
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"bench: {path} does not hold measurements") from error
        if there != here:
            raise ValueError(f"bench: {path} holds measurements of {there}, not of {here}: write to another file")
    rows.update({(m.name, *m.size): asdict(m) for m in measurements})
    ordered = [rows[key] for key in sorted(rows)]
    checkpoint.write(
        path, json.dumps({"included": INCLUDED, "ways": WAYS_NOTE, "environment": here, "rows": ordered}, indent=1) + "\n"
    )
