"""A distillation method as one object: terms of a loss, each with its taps and trainable parts, summed with the task's own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from segfast import ops
from segfast.distill._taps import Taps, batch_statistics, run
from segfast.models._base import Output
from segfast.ops.pixelwise_kl import counted

Task = Callable[[nn.Module, Output, Tensor], dict[str, Tensor]]


class Batch(NamedTuple):
    """What a term computes its loss from.

    target: (N, H, W) labels, or None where nothing is known about ignored pixels.
    teacher: None where no term reads the teacher's outputs.
    student_maps, teacher_maps: what the term's taps caught, in their order.
    """

    images: Tensor
    target: Tensor | None
    student: Output
    teacher: Output | None
    student_maps: tuple[Tensor, ...]
    teacher_maps: tuple[Tensor, ...]


class Term(nn.Module):
    """One addend of a method's loss.

    A subclass gives `forward(batch)`, a dict of weighted scalar tensors by name. Parameters that require gradients are the
    caller's to optimise; what a term trains itself (the critic) it keeps frozen outside `extra_step`.

    student_taps, teacher_taps: keys of `Output.features` or module paths (see `segfast.distill.find_taps`).
    reads_teacher: whether `forward` reads `batch.teacher`.
    batch_statistics: whether the teacher's maps come from a run of their own, with BatchNorm on the batch's statistics.
    """

    student_taps: Sequence[str] = ()
    teacher_taps: Sequence[str] = ()
    reads_teacher = True
    batch_statistics = False

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        raise NotImplementedError

    def prepare(self, teacher: nn.Module, loader: Iterable, progress: Callable | None) -> None:
        """What is to be trained before the student (an auto-encoder); nothing here, and nothing where it is trained."""

    def extra_step(self) -> dict[str, Tensor]:
        """A step on the parameters that the term trains itself; nothing here."""
        return {}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """The optimisers of those, by name."""
        return {}


TERMS: dict[str, Callable[..., Term]] = {}
METHODS: dict[str, tuple[str, ...]] = {}  # a method's name: its terms


def register_term(name: str, *methods: str):
    """Register `build(student, teacher, preset, ignore_index, **options) -> Term` as a term and, alone, as a method of its name.

    `methods` are further methods that the term is a part of.
    """

    def register(build: Callable[..., Term]) -> Callable[..., Term]:
        TERMS[name] = build
        METHODS[name] = (name,)
        for method in methods:
            METHODS[method] = (*METHODS.get(method, ()), name)
        return build

    return register


def list_methods() -> list[str]:
    """The names that `create_method` takes, and that "+" joins."""
    return sorted(METHODS)


def cross_entropy_task(aux_weight: float = 0.4, ignore_index: int = 255) -> Task:
    """The default task: cross-entropy of the logits at the labels' size ("labels"), and of every auxiliary head ("auxiliary").

    Args:
        aux_weight: factor of the auxiliary heads' sum; 0.4 is what Structured Knowledge Distillation trains with.
        ignore_index: the label of an ignored pixel.
    """

    def task(student: nn.Module, output: Output, target: Tensor) -> dict[str, Tensor]:
        options = {"ignore_index": ignore_index, "align_corners": getattr(student, "align_corners", False)}
        terms = {"labels": ops.upsample_cross_entropy(output.logits, target, **options)}
        if output.aux and aux_weight:
            terms["auxiliary"] = aux_weight * sum(ops.upsample_cross_entropy(logits, target, **options) for logits in output.aux)
        return terms

    return task


class Method:
    """A method of distillation, made by `create_method`: the loss of a student that learns from a frozen teacher.

    The student's gradients come from `loss.backward()`; the teacher never gets one. Its own trainable parts (regressors,
    adapters) are `parameters()`, to be optimised along with the student's; they are on the student's device.

    Attributes:
        student, teacher: the networks. The teacher is in evaluation mode.
        terms: the terms by name, an `nn.ModuleDict`.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, terms: Mapping[str, Term], task: Task | None):
        self.student, self.teacher, self.task = student, teacher.eval(), task
        self.terms = nn.ModuleDict(terms)
        for term in self.terms.values():
            term.train()
        self.terms.to(next(student.parameters()).device)
        self.broadcast()
        of_student = {tap for term in terms.values() for tap in term.student_taps}
        of_teacher = {tap for term in terms.values() for tap in term.teacher_taps}
        self.student_taps = Taps(student, sorted(of_student), only_with_grad=True)
        self.teacher_taps = Taps(teacher, sorted(of_teacher))

    def __call__(
        self,
        images: Tensor,
        target: Tensor | None = None,
        *,
        student_out: Output | None = None,
        teacher_out: Output | None = None,
        floats: bool = True,
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss of one batch and its terms, which sum up to it.

        Args:
            images: (N, 3, H, W), as the networks take them.
            target: (N, H, W), integer labels; without them there is no task loss and no pixel is ignored.
            student_out: what `student.forward_features(images)` gave, with gradients, instead of a run of the student here. Where
                a term has taps in the student, this must have been its latest run.
            teacher_out: what the teacher's `forward_features(images)` gave now or earlier (a cache; any float dtype). A term
                whose taps in the teacher are module paths runs the teacher all the same.
            floats: read the terms' values, for which a GPU is waited for, once; without, they are detached tensors on the device.

        Raises:
            ValueError: a tap caught nothing, or sizes that do not fit.
        """
        self.teacher.eval()
        teacher_out = tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, teacher_out)
        if student_out is None:
            self.student_taps.clear()
            student_out = run(self.student, images)
        student_maps = self.student_taps.take(student_out)
        teacher_maps: dict[bool, dict[str, Tensor]] = {}
        with torch.no_grad():
            for statistics in (False, True):
                concerned = [term for term in self.terms.values() if term.batch_statistics == statistics]
                wanted = {tap for term in concerned for tap in term.teacher_taps}
                reads = not statistics and any(term.reads_teacher for term in self.terms.values())
                if not wanted and not reads:
                    continue
                caught = wanted & set(self.teacher_taps.modules)
                output = teacher_out
                if output is None or caught or (statistics and wanted):
                    self.teacher_taps.clear()
                    with batch_statistics(self.teacher, statistics):
                        output = run(self.teacher, images)
                teacher_maps[statistics] = self.teacher_taps.take(output, wanted)
                if teacher_out is None and not statistics:
                    teacher_out = output
        values: dict[str, Tensor] = {}
        if self.task is not None and target is not None:
            values |= self.task(self.student, student_out, target)
        for term in self.terms.values():
            maps = teacher_maps.get(term.batch_statistics, {})
            values |= term(
                Batch(
                    images,
                    target,
                    student_out,
                    teacher_out,
                    tuple(student_maps[tap] for tap in term.student_taps),
                    tuple(maps[tap] for tap in term.teacher_taps),
                )
            )
        return sum(values.values()), read(values, floats)

    def broadcast(self) -> None:
        """With several processes: the first one's parts to all of them."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for x in (*self.terms.parameters(), *self.terms.buffers()):
                torch.distributed.broadcast(x.data, 0)

    def prepare(self, loader: Iterable, progress: Callable[[int, dict[str, float]], None] | None = None) -> None:
        """What a method trains before the student: the auto-encoder of "adaptation". Does nothing where that is done already.

        Args:
            loader: gives batches whose first element is images.
            progress: called after every step with the steps done and the loss's terms.
        """
        for term in self.terms.values():
            term.prepare(self.teacher, loader, progress)
        self.teacher_taps.clear()
        self.broadcast()

    def extra_step(self, floats: bool = True) -> dict[str, float]:
        """The step on what a method trains itself (the critic of "holistic"), after the student's; its losses by name."""
        values: dict[str, Tensor] = {}
        for term in self.terms.values():
            values |= term.extra_step()
        return read(values, floats)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters to optimise along with the student's."""
        return ((name, p) for name, p in self.terms.named_parameters() if p.requires_grad)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters to optimise along with the student's."""
        return (p for _, p in self.named_parameters())

    def average_gradients(self) -> None:
        """With several processes: their mean gradient of `parameters()`, between the backward and the optimiser's step.

        `DistributedDataParallel` does that for the student, of whose forward these are no part.
        """
        average([p for p in self.parameters() if p.grad is not None])

    def state_dict(self) -> dict:
        """Parts and buffers ("parts"), and the states of the optimisers that the method steps itself ("optimizers")."""
        optimizers = {
            f"{name}.{key}": optimizer.state_dict()
            for name, term in self.terms.items()
            for key, optimizer in term.optimizers().items()
        }
        return {"parts": self.terms.state_dict(), "optimizers": optimizers}

    def load_state_dict(self, state: Mapping) -> None:
        """What `state_dict` gave, of a method made in the same way."""
        self.terms.load_state_dict(state["parts"])
        for name, term in self.terms.items():
            for key, optimizer in term.optimizers().items():
                optimizer.load_state_dict(state["optimizers"][f"{name}.{key}"])

    def close(self) -> None:
        """Remove the taps. The networks are as they were; the method cannot be called again where a term has taps."""
        self.student_taps.close()
        self.teacher_taps.close()

    def __enter__(self) -> Method:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Method({' + '.join(self.terms)})"


def read(values: Mapping[str, Tensor], floats: bool) -> dict[str, float]:
    detached = {name: value.detach() for name, value in values.items()}
    if not floats or not detached:
        return detached
    return dict(zip(detached, torch.stack([value.double() for value in detached.values()]).tolist()))


def average(parameters: Sequence[nn.Parameter]) -> None:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()) or not parameters:
        return
    flat = torch.cat([p.grad.flatten() for p in parameters])
    torch.distributed.all_reduce(flat)
    flat /= torch.distributed.get_world_size()
    for p, mean in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad.copy_(mean.view_as(p.grad))


def create_method(
    name: str,
    student: nn.Module,
    teacher: nn.Module,
    *,
    task: Task | str | None = "cross_entropy",
    aux_weight: float = 0.4,
    ignore_index: int = 255,
    preset: str = "paper",
    **options: Mapping,
) -> Method:
    """A distillation method by name.

    create_method("structured+overhaul", student, teacher, pixel_wise={"weight": 5.0}, overhaul={"taps": [("stage2", "stage4")]})

    Args:
        name: names of `list_methods()` joined by "+".
        student: trained by the caller. A `SegmentationModel`, or any module that maps images to logits, a tuple or dict of them
            (torchvision's "out"): that one has no `features`, so taps in it are module paths.
        teacher: the same; put into evaluation mode, gets no gradient.
        task: "cross_entropy" (see `cross_entropy_task`), a function (student, its `Output`, target) -> terms by name, or None.
        aux_weight: of "cross_entropy".
        ignore_index: the label of a pixel that is left out of every term.
        preset: "paper", or "official" for the scaling and details of the authors' released code, where that differs.
        options: of a term, under its name with "_" for "-"; see the docstrings of the terms.

    Raises:
        ValueError: an unknown name, preset or option, networks in which the taps of a term are not to be found.
    """
    if preset not in ("paper", "official"):
        raise ValueError(f'create_method: want preset "paper" or "official", got {preset!r}')
    names: list[str] = []
    for part in name.split("+"):
        if part not in METHODS:
            raise ValueError(f"create_method: want {', '.join(list_methods())}, or several joined by '+', got {part!r}")
        names += [term for term in METHODS[part] if term not in names]
    given = {key.replace("_", "-"): dict(value) for key, value in options.items()}
    for key, value in given.items():
        if key not in names:
            raise ValueError(f"create_method: want options for {', '.join(names)}, got some for {key!r}")
        known = set(inspect.signature(TERMS[key]).parameters) - {"student", "teacher", "preset", "ignore_index"}
        if unknown := set(value) - known:
            raise ValueError(
                f"create_method: want options {', '.join(sorted(known))} of {key!r}, got {', '.join(sorted(unknown))}"
            )
    if isinstance(task, str):
        if task != "cross_entropy":
            raise ValueError(f'create_method: want task "cross_entropy", a function or None, got {task!r}')
        task = cross_entropy_task(aux_weight, ignore_index)
    terms = {term: TERMS[term](student, teacher, preset, ignore_index, **given.get(term, {})) for term in names}
    return Method(student, teacher, terms, task)


def valid_pixels(target: Tensor | None, size: Sequence[int], ignore_index: int) -> Tensor | None:
    """(N, h, w), bool: the cells of a map of that size whose middle pixel has a label."""
    if target is None:
        return None
    if tuple(target.shape[1:]) != tuple(size):
        target = F.interpolate(target[:, None].float(), tuple(size), mode="nearest-exact")[:, 0]
    return counted(target, ignore_index)


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """A map at another size: averaged over cells where both sides shrink, else bilinear (align_corners=False)."""
    size = tuple(size)
    if tuple(x.shape[2:]) == size:
        return x
    if size[0] <= x.shape[2] and size[1] <= x.shape[3]:
        return F.adaptive_avg_pool2d(x, size)
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


def smaller(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both maps at the smaller height and width of the two."""
    size = min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3])
    return resize(a, size), resize(b, size)
