"""Feature maps out of the middle of a network: taps by name, found by themselves where a network has the usual layers."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segfast.models._base import Output, SegmentationModel

ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.SiLU, nn.Hardswish, nn.GELU, nn.ELU)
BATCH_NORMS = nn.modules.batchnorm._BatchNorm


def run(network: nn.Module, images: Tensor) -> Output:
    """A network's `Output`; of one that is not from `segfast.models`, its logits (the first of a tuple, "out" of a dict)."""
    if isinstance(network, SegmentationModel):
        return network.forward_features(images)
    logits = network(images)
    if isinstance(logits, Output):
        return logits
    if isinstance(logits, Mapping):
        logits = logits["out"]
    if isinstance(logits, (tuple, list)):
        logits = logits[0]
    return Output(logits, (), {})


class Taps:
    """Forward hooks that keep the maps at module paths: an activation's input, any other module's output.

    The hooks lie on the modules themselves, so a fused block around one takes its ordinary path, and trace into compiled graphs.

    Args:
        network: gets the hooks.
        names: module paths, or keys of the `features` that the network gives, which need no hook. A path goes first.
        only_with_grad: keep nothing in runs without gradients (validation between training steps).
    """

    def __init__(self, network: nn.Module, names: Iterable[str], only_with_grad: bool = False):
        self.network, self.names, self.only_with_grad = network, list(names), only_with_grad
        self.maps: dict[str, Tensor] = {}
        self.versions: dict[str, int] = {}
        self.modules = {name: module_at(network, name) for name in self.names if has_module(network, name)}
        self.handles = [self.watch(name, module) for name, module in self.modules.items()]

    def watch(self, name: str, module: nn.Module):
        def keep(x):
            if torch.is_grad_enabled() or not self.only_with_grad:
                self.maps[name] = x
                if not torch.compiler.is_compiling():
                    self.versions[name] = x._version

        def before(module, args):
            if getattr(module, "inplace", False):
                # The activation overwrites its input: it gets a copy to do so.
                keep(args[0])
                return (args[0].clone(), *args[1:])
            keep(args[0])
            return None

        def after(module, args, output):
            # Without gradients a network may well add the next thing in place, as those of segfast.models do.
            keep(output if torch.is_grad_enabled() else output.clone())

        if isinstance(module, ACTIVATIONS):
            return module.register_forward_pre_hook(before)
        return module.register_forward_hook(after)

    def take(self, output: Output, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """The maps by tap of the latest run, whose `output` this is; they are forgotten here.

        Raises:
            ValueError: a tap caught nothing, or a map that the network has changed in place since.
        """
        network = getattr(self.network, "name", type(self.network).__name__)
        taken = {}
        for name in self.names if names is None else names:
            if name in self.maps:
                taken[name] = self.maps[name]
                if self.maps[name]._version != self.versions.get(name, self.maps[name]._version):
                    raise ValueError(
                        f"distill: want a tap of {network} whose map stays as it is, got {name!r}, which what follows changes in "
                        f"place: name the activation behind it"
                    )
            elif name in output.features:
                taken[name] = output.features[name]
            else:
                raise ValueError(f"distill: want a run of {network} that passes the tap {name!r}, got none since the last call")
        self.clear()
        return taken

    def clear(self) -> None:
        """Forget the maps."""
        self.maps.clear()
        self.versions.clear()

    def close(self) -> None:
        """Remove the hooks."""
        self.clear()
        for handle in self.handles:
            handle.remove()
        self.handles.clear()


def has_module(network: nn.Module, path: str) -> bool:
    try:
        return bool(path) and network.get_submodule(path) is not None
    except AttributeError:
        return False


def module_at(network: nn.Module, path: str) -> nn.Module:
    return network.get_submodule(path)


@contextlib.contextmanager
def batch_statistics(network: nn.Module, wanted: bool = True) -> Iterator[None]:
    """Within it every BatchNorm of the network takes the batch's statistics and leaves its running ones untouched."""
    layers = [m for m in network.modules() if isinstance(m, BATCH_NORMS)] if wanted else []
    kept = [(m, m.training, m.track_running_stats) for m in layers]
    try:
        for m in layers:
            # Training without tracking hands F.batch_norm no running statistics: nothing is there that could drift.
            m.training, m.track_running_stats = True, False
        yield
    finally:
        for m, training, track in kept:
            m.training, m.track_running_stats = training, track


class Tap(NamedTuple):
    """A place in a network where a map can be had; of a module that runs several times a named path takes the last.

    stage: the key of `Output.features` that it stands for, or its path.
    path: what `Taps` takes.
    norm: path of the BatchNorm whose output it is or ends in; None where there is none.
    channels: of the map.
    stride: the image's height over the map's.
    """

    stage: str
    path: str
    norm: str | None
    channels: int
    stride: float


class Record(NamedTuple):
    path: str
    module: nn.Module
    x: Tensor  # an activation's input, any other module's output
    version: int


class Probe:
    """One run of a network on noise, in evaluation mode, to see which maps its modules make.

    Args:
        network: left as it was found.
        size: height and width of the noise.
    """

    def __init__(self, network: nn.Module, size: tuple[int, int] = (128, 128)):
        self.network, self.size = network, size
        self.records: list[Record] = []
        handles = [self.watch(path, module) for path, module in network.named_modules() if path]
        modes = [(module, module.training) for module in network.modules()]
        weight = next(network.parameters())
        images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
        try:
            network.eval()
            with torch.enable_grad():  # without gradients networks may work in place
                output = run(network, images)
            features = {key: x.detach() for key, x in output.features.items()}
            self.output = Output(output.logits.detach(), (), features)
            self.records = [r for r in self.records if r.x._version == r.version]
        finally:
            for handle in handles:
                handle.remove()
            for module, training in modes:
                module.training = training

    def watch(self, path: str, module: nn.Module):
        def before(module, args):
            x = args[0].detach().clone()
            self.records.append(Record(path, module, x, x._version))

        def after(module, args, output):
            if isinstance(output, Tensor) and output.dim() == 4:
                x = output.detach()
                x = x.clone() if isinstance(module, BATCH_NORMS) else x  # what comes next may work in place
                self.records.append(Record(path, module, x, x._version))

        if isinstance(module, ACTIVATIONS):
            return module.register_forward_pre_hook(before)
        return module.register_forward_hook(after)

    def tap(self, path: str, stage: str | None = None) -> Tap:
        """The tap of a module path or key of the features.

        Raises:
            ValueError: the network gives no map there.
        """
        x, norm = None, None
        for i in reversed(range(len(self.records))):
            if self.records[i].path == path:
                x, norm = self.records[i].x, self.norm_before(i)
                break
        else:
            x = self.output.features.get(path)
        if x is None or x.dim() != 4:
            name = getattr(self.network, "name", type(self.network).__name__)
            keys = ", ".join(self.output.features) or "none"
            raise ValueError(f"distill: want a module path of {name} with a map, or one of its features ({keys}), got {path!r}")
        return Tap(stage or path, path, norm, x.shape[1], self.size[0] / x.shape[2])

    def at(self, index: int, stage: str) -> Tap:
        record = self.records[index]
        # Of a module that runs several times hooks keep the last map: the key of the features says which is meant.
        once = sum(r.path == record.path for r in self.records) == 1
        path = record.path if once else stage
        return Tap(stage, path, self.norm_before(index), record.x.shape[1], self.size[0] / record.x.shape[2])

    def norm_before(self, index: int) -> str | None:
        record = self.records[index]
        if isinstance(record.module, BATCH_NORMS):
            return record.path
        earlier = [r for r in self.records[:index] if isinstance(r.module, BATCH_NORMS) and r.x.shape == record.x.shape]
        same = [r for r in earlier if torch.equal(r.x, record.x)]
        # An activation may follow a sum, made by the module that it lies in: the last BatchNorm of the main branch lies beside
        # it, that of the shortcut, which may run later, in a module of its own.
        parent = record.path.rpartition(".")[0] if isinstance(record.module, ACTIVATIONS) else record.path
        inside = [r for r in earlier if r.path.startswith(f"{parent}.")]
        beside = [r for r in inside if r.path.rpartition(".")[0] == parent]
        for found in (same, beside, inside):
            if found:
                return found[-1].path
        return None

    def before_activation(self, stage: str) -> Tap:
        """The tap before the activation that made a map of the features: see `find_taps`."""
        x = self.output.features[stage]
        alike = [(i, r) for i, r in enumerate(self.records) if r.x.shape == x.shape]
        activations = [(i, r) for i, r in alike if isinstance(r.module, ACTIVATIONS)]
        norms = [(i, r) for i, r in alike if isinstance(r.module, BATCH_NORMS)]
        with torch.no_grad():
            for i, r in reversed(activations):
                if torch.equal(r.module(r.x.clone()), x):
                    return self.at(i, stage)
            for i, r in reversed(norms):
                candidates = (r.x, r.x.relu(), r.x.clamp(0, 6), F.silu(r.x), F.hardswish(r.x))
                if any(torch.equal(candidate, x) for candidate in candidates):
                    return self.at(i, stage)
        made = [(i, r) for i, r in alike if not isinstance(r.module, ACTIVATIONS) and torch.equal(r.x, x)]
        if made and x.min() < 0:
            return self.at(made[0][0], stage)
        until = made[0][0] if made else len(self.records)
        earlier = [i for i, _ in norms if i < until]
        if earlier and x.min() >= 0:
            return self.at(earlier[-1], stage)
        return self.tap(stage)


def find_taps(network: nn.Module, size: tuple[int, int] = (128, 128)) -> list[Tap]:
    """Where a network's stages end, before their activations: "stage1", "stage2", ... and "pre_logits" of its features.

    A run on noise shows which modules made each map. The tap is the input of the activation that made it; else the output of
    the last BatchNorm before it, where a function and no module is the activation; else, where the stage ends linearly, the
    map itself. A network that says better has an attribute `taps`: paths by stage.

    Args:
        network: a `SegmentationModel`, left as it was found.
        size: height and width of the noise, at least the network's smallest.

    Raises:
        ValueError: the network gives no features.
    """
    probe = Probe(network, size)
    stages = [key for key in probe.output.features if key == "pre_logits" or key.startswith("stage")]
    if not stages:
        name = getattr(network, "name", type(network).__name__)
        raise ValueError(f"distill: want a network that gives features, or taps by module path, got {name} without either")
    stated = getattr(network, "taps", {})
    return [probe.tap(stated[stage], stage) if stage in stated else probe.before_activation(stage) for stage in stages]


def pair_taps(student: list[Tap], teacher: list[Tap]) -> list[tuple[Tap, Tap]]:
    """Every tap of the student with the teacher's of the nearest stride, the deepest of equals; "pre_logits" with its like."""
    stages = [tap for tap in teacher if tap.stage != "pre_logits"]
    last = [tap for tap in teacher if tap.stage == "pre_logits"]
    pairs = []
    for tap in student:
        among = last if tap.stage == "pre_logits" and last else stages or last
        pairs.append((tap, min(reversed(among), key=lambda other: abs(math.log2(other.stride / tap.stride)))))
    return pairs
