"""What weights must be before a network takes them: all of them are looked at first, so that none is half loaded."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


def misfit(network: nn.Module, tensors: Mapping[str, Tensor]) -> str:
    """What keeps `tensors` from being the network's state_dict, in words; "" if nothing does."""
    own = network.state_dict()
    missing = [k for k in own if k not in tensors and not k.endswith(".num_batches_tracked")]  # which older files lack
    surplus = [k for k in tensors if k not in own]
    other = [k for k in own if k in tensors and own[k].shape != getattr(tensors[k], "shape", None)]
    if not (missing or surplus or other):
        return ""
    return (
        f"{len(missing)} missing {missing[:3]}, {len(surplus)} surplus {surplus[:3]}, {len(other)} of another shape {other[:3]}"
    )
