"""Feature maps out of the middle of a network: taps by name, found by themselves where a network has the usual layers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping

import torch
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
        self.modules = {name: module_at(network, name) for name in self.names if has_module(network, name)}
        self.handles = [self.watch(name, module) for name, module in self.modules.items()]

    def watch(self, name: str, module: nn.Module):
        def keep(x):
            if torch.is_grad_enabled() or not self.only_with_grad:
                self.maps[name] = x

        def before(module, args):
            if getattr(module, "inplace", False):
                # The activation overwrites its input: it gets a copy to do so.
                keep(args[0])
                return (args[0].clone(), *args[1:])
            keep(args[0])
            return None

        def after(module, args, output):
            keep(output)

        if isinstance(module, ACTIVATIONS):
            return module.register_forward_pre_hook(before)
        return module.register_forward_hook(after)

    def take(self, output: Output, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """The maps by tap of the latest run, whose `output` this is; they are forgotten here."""
        taken = {}
        for name in self.names if names is None else names:
            if name in self.maps:
                taken[name] = self.maps[name]
            elif name in output.features:
                taken[name] = output.features[name]
            else:
                network = getattr(self.network, "name", type(self.network).__name__)
                raise ValueError(f"distill: want a run of {network} that passes the tap {name!r}, got none since the last call")
        self.maps.clear()
        return taken

    def clear(self) -> None:
        """Forget the maps."""
        self.maps.clear()

    def close(self) -> None:
        """Remove the hooks."""
        self.maps.clear()
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
