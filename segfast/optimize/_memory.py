"""Where a program's maps lie: one block of memory, in which a map takes the place of those that nobody will read again.

Kernels of this package put their results where `_C.place_next` says. What PyTorch's and oneDNN's operators give they allocate
themselves, and so do results that the caller may keep.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from segfast import _backend
from segfast.optimize._capture import Graph, Op
from segfast.optimize._nodes import FRESH
from segfast.optimize._patterns import Aten, Block, Concat, Convolution, Joined, Step

ALIGNMENT = 64
LEAST = 1 << 16  # bytes of a map that is worth a place
place_next = getattr(_backend._C, "place_next", None)
_free: list[Tensor] = []  # blocks that no call is using, of the whole process: one a thread that calls at the same time


def borrow(size: int) -> Tensor:
    """A block of at least so many bytes, for one call of a program."""
    try:
        block = _free.pop()
    except IndexError:
        block = None
    if block is None or block.numel() < size:
        del block
        block = allocate(size)
    return block


def allocate(size: int) -> Tensor:
    block = torch.empty(size, dtype=torch.uint8)
    _backend._C.advise_huge_pages(block.data_ptr(), size)
    return block


def give_back(block: Tensor | None) -> None:
    """After the call, whatever became of it. None: it is the caller's."""
    place_next(0, 0)
    if block is not None:
        _free.append(block)


def handed_out(block: Tensor, result: Tensor) -> Tensor:
    """A result that lies in the block, which from now on is the caller's through it."""
    offset = result.data_ptr() - block.data_ptr()
    if not 0 <= offset < block.numel():
        return result
    owner = torch.empty(0, dtype=result.dtype)
    return owner.set_(block.untyped_storage(), offset // result.element_size(), result.shape, result.stride())


def ordered(graph: Graph, steps: Sequence[Step]) -> list[Step]:
    """The steps as they are, or branch by branch, those first that need the most beside what they leave, if so at least a
    twentieth less is alive at the most (after Sethi and Ullman, doi:10.1145/321607.321620). Steps that draw random numbers keep
    their order."""
    if any(torch.Tag.nondeterministic_seeded in getattr(op.target, "tags", ()) for step in steps for op in step.covers):
        return [*steps]
    made = {step.output: step for step in steps}
    before = {step: [made[op] for op in dict.fromkeys(step.inputs) if op in made] for step in steps}
    all_before: dict[Step, set[Step]] = {}
    for step in steps:
        all_before[step] = {step}.union(*(all_before[other] for other in before[step]))
        # What another operand is made of comes before that in any case, as with every sum of a block and what it read.
        within = set().union(*(all_before[other] - {other} for other in before[step])) if len(before[step]) > 1 else ()
        before[step] = [other for other in before[step] if other not in within]
        if len(before[step]) > 1:
            alone = {other: [s for s in steps if s in all_before[other]] for other in before[step]}
            before[step].sort(key=lambda other: size(other.output) - most_alive(alone[other], {other.output}))
    found: dict[Step, None] = {}
    waiting = [*reversed(steps), *(made[op] for op in graph.outputs if isinstance(op, Op) and op in made)]
    while waiting:
        missing = [other for other in before[waiting[-1]] if other not in found]
        if missing and waiting[-1] not in found:
            waiting += reversed(missing)
        else:
            found[waiting.pop()] = None
    kept = {op for op in graph.outputs if isinstance(op, Op)}
    return min(([*steps], 1.0), ([*found], 1.05), key=lambda order: order[1] * most_alive(order[0], kept))[0]


def most_alive(steps: Sequence[Step], kept: set[Op]) -> int:
    """Bytes of results that wait for a reader, or are the caller's, at the most."""
    last = {op: number for number, step in enumerate(steps) for op in (*step.inputs, step.output)}
    ends: dict[int, list[Op]] = {}
    results = {step.output for step in steps}
    for op, number in last.items():
        if op in results - kept:
            ends.setdefault(number, []).append(op)
    alive = most = 0
    for number, step in enumerate(steps):
        alive += size(step.output)
        most = max(most, alive)
        alive -= sum(map(size, ends.get(number, ())))
    return most


class Plan:
    """Places of the maps of a program.

    Args:
        graph: its inputs and outputs are the caller's.
        steps: (step, how it runs, function, operands) in their order.
        device: elsewhere than on the CPU nothing has a place.

    Attributes:
        bytes: of the block; 0: nothing has a place.
        places: (offset, bytes) of each result that has one, and, by its step, of a map that is inside it.
        handed_out: the block is the caller's after the call. The program's only result lies in it, in the place of maps that
            nobody reads when it is written, and hardly anything lies beside it.
    """

    def __init__(self, graph: Graph, steps: Sequence[tuple[Step, str, object, list[Op]]], device: str = "cpu"):
        self.bytes, self.handed_out = 0, False
        self.places: dict[Op | Step, tuple[int, int]] = {}
        if _backend._C is None or device != "cpu":
            return
        # A step that may give its operand's memory, such as a view, hands it on: to its own readers, and out of the program.
        born = {step.output: number for number, (step, *_) in enumerate(steps)}
        outside = {op for op in graph.outputs if isinstance(op, Op)}
        last = dict(born)
        for number, (step, how, _, operands) in reversed([*enumerate(steps)]):
            handed_on = not fresh(step, how)
            for op in operands:
                last[op] = max(last.get(op, 0), last[step.output] if handed_on else number)
                if handed_on and step.output in outside:
                    outside.add(op)
        wanted = {step.output: size(step.output) for step, how, *_ in steps if own(step, how) and step.output not in outside}
        for number, (step, how, *_) in enumerate(steps):
            between = step.between * step.output.dtype.itemsize if own(step, how) else 0
            if between not in (0, size(step.output)):  # what a kernel asks for is told by its bytes
                wanted[step], born[step], last[step] = between, number, number
        over: dict[Op, Op] = {}  # results that are written over another map, and the first map in that place
        within: dict[Op, set[Op]] = {}  # the maps in whose memory a result may lie
        for number, (step, how, _, operands) in enumerate(steps):
            old = written_over(step, how)
            first = over.get(old, old)
            spans = [within.get(op, {op}) for op in operands]
            within[step.output] = {step.output} if fresh(step, how) else {step.output}.union(*spans)
            alone = old in operands and not any(
                within.get(old, {old}) & span for span, op in zip(spans, operands) if op is not old
            )
            if alone and first in wanted and step.output in wanted and last[old] == number and operands.count(old) == 1:
                over[step.output] = first
                last[first] = last[step.output]
                del wanted[step.output]
        self.places, self.bytes = arranged(wanted, born, last)
        for step, how, *_ in steps[-1:]:
            result = size(step.output)
            if outside != {step.output} or not own(step, how) or not self.bytes:
                break
            places, together = arranged(wanted | {step.output: result}, born, last)
            if together - result <= min(result // 8, self.bytes - 1):
                self.places, self.bytes, self.handed_out = places, together, True
        self.places |= {op: self.places[first] for op, first in over.items() if first in self.places}


def arranged(wanted: dict, born: dict, last: dict) -> tuple[dict[Op | Step, tuple[int, int]], int]:
    """(places, bytes of the block): the largest first, each at the lowest offset where nobody else lives at the same time."""
    places: dict[Op | Step, tuple[int, int]] = {}
    placed: list[Op | Step] = []  # by offset
    for op in sorted((op for op, n in wanted.items() if n >= LEAST), key=lambda op: (-wanted[op], born[op])):
        at = 0
        for other in placed:
            start, length = places[other]
            if last[other] < born[op] or last[op] < born[other]:
                continue
            if start - at >= wanted[op]:
                break
            at = max(at, -(-(start + length) // ALIGNMENT) * ALIGNMENT)
        places[op] = at, wanted[op]
        placed = sorted([*placed, op], key=places.get)
    return places, max((start + length for start, length in places.values()), default=0)


def own(step: Step, how: str) -> bool:
    """Whether a kernel of this package gives the result."""
    return how.startswith("segfast::") or step.output.kind.startswith("segfast::")


def fresh(step: Step, how: str) -> bool:
    """Whether the result never lies in the memory of an operand."""
    if own(step, how) or (how.startswith("oneDNN") and "into the map" not in how):
        return True
    return isinstance(step, Aten) and how == "ATen" and step.output.kind in FRESH


def written_over(step: Step, how: str) -> Op | None:
    """The operand, of the result's size, of which the kernel reads an element just before it writes that of the result."""
    conv = step.conv if isinstance(step, Joined) else step
    if isinstance(conv, Convolution) and conv.added and how in ("segfast::packed_conv", "segfast::packed_winograd"):
        return step.inputs[-1]
    blocks = ("segfast::packed_ds_conv", "segfast::packed_inverted_residual")
    if isinstance(step, Block) and step.parts[-1].added and how in blocks:
        return step.inputs[-1]
    if isinstance(step, Concat) and how == "segfast::concat_affine" and step.inputs[0].value == step.output.value:
        return step.inputs[0]
    return None


def size(op: Op) -> int:
    """Bytes of a result; 0 of what is no tensor."""
    return 0 if op.shape is None else op.dtype.itemsize * math.prod(op.shape)
