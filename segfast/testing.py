"""Sample inputs of every op, used by tests and benchmarks alike.

A new op adds one generator below, decorated with `@samples`; the tests find it, and fail while an op has none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """One call of a public function: `ops.<op>(*args, **kwargs)`. Float tensors among the arguments are its inputs."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return self.name


SAMPLES: dict[str, Callable[[torch.dtype, torch.device], Iterator[Sample]]] = {}
LARGE: dict[
    str, Callable[[torch.dtype, torch.device], Iterator[Sample]]
] = {}  # sizes that run in parallel, for timing and determinism


def samples(function: Callable[[torch.dtype, torch.device], Iterator[Sample]]):
    """Registers a generator named after its op."""
    SAMPLES[function.__name__] = function
    return function


def tensor(*size: int, dtype: torch.dtype, device: torch.device, layout: str = "contiguous", seed: int = 0) -> Tensor:
    """Standard normal, in one of LAYOUTS: transposed swaps H and W in memory, strided takes every second column."""
    generator = torch.Generator().manual_seed(seed)
    if layout == "strided":
        wide = torch.randn(*size[:-1], 2 * size[-1], generator=generator, dtype=torch.float64)
        return wide.to(device=device, dtype=dtype)[..., ::2]
    x = torch.randn(*size, generator=generator, dtype=torch.float64).to(device=device, dtype=dtype)
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    return x


LAYOUTS = ("contiguous", "channels_last", "transposed", "strided")


@samples
def channel_shuffle(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for layout in LAYOUTS:
        yield Sample(f"2x12x5x7-g3-{layout}", (tensor(2, 12, 5, 7, dtype=dtype, device=device, layout=layout), 3))
    for size, groups in (((1, 58, 3, 3), 2), ((2, 7, 4, 5), 7), ((2, 8, 4, 5), 1), ((0, 4, 3, 3), 2), ((3, 6, 1, 1), 2)):
        yield Sample(f"{'x'.join(map(str, size))}-g{groups}", (tensor(*size, dtype=dtype, device=device), groups))
