"""Maps to other sizes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import segfast.ops._packed  # noqa: F401  defines the op
from segfast import _backend
from segfast.nn.folding import quick

HAS_KERNEL = _backend.has_compiled("resize", "CPU")
DTYPES = (torch.float32, torch.bfloat16)


def free(*sizes) -> bool:
    """Whether any of the numbers is a free one of a graph that is being exported: a comparison would fix its answer."""
    exporting = torch.compiler.is_exporting() and not _backend.is_capturing()
    return exporting and any(isinstance(size, torch.SymInt) for size in sizes)


def same_size(size, other) -> bool:
    """Whether two sizes are equal; of free sizes of an exported graph, whether they are equal at every size of the images."""
    if free(*size, *other):
        from torch.fx.experimental.symbolic_shapes import statically_known_true  # brings sympy

        return all(statically_known_true(a == b) for a, b in zip(size, other))
    return tuple(size) == tuple(other)


def resize(x: Tensor, size, align_corners: bool = False, mode: str = "bilinear") -> Tensor:
    """(N, C, H, W) to (N, C, *size); the same tensor where that is its size already.

    Args:
        x: float.
        size: (H', W').
        align_corners: whether the corner pixels' centres are the corners of the scale (True) or the images' edges are
            (False); bilinear only. It is part of a network: the other choice costs accuracy.
        mode: "bilinear" or "nearest".
    """
    if same_size(x.shape[2:], size):
        return x
    if mode == "bilinear" and HAS_KERNEL and quick() and plain(x, size, align_corners):
        return torch.ops.segfast.resize(x, tuple(size), align_corners, _backend.layout(x) is torch.channels_last)
    return F.interpolate(x, tuple(size), mode=mode, align_corners=align_corners if mode == "bilinear" else None)


def plain(x: Tensor, size, align_corners) -> bool:
    """Whether all is as the kernel takes it; PyTorch says what is wrong with the rest."""
    return (
        _backend.requested == "auto"
        and type(x) is Tensor
        and x.is_cpu
        and x.layout is torch.strided
        and x.dtype in DTYPES
        and x.dim() == 4
        and x.shape[1] > 0
        and type(align_corners) is bool
        and len(size) == 2
        and all(type(s) is int and s > 0 for s in size)
    )


def laid_out(x: Tensor, like: Tensor) -> Tensor:
    """x, without gradients in the layout of `like`: what was a pooled map of 1 x 1, whose layout is both, turns contiguous."""
    return x.contiguous(memory_format=_backend.layout(like)) if quick() else x
