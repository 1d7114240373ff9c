"""Convolution, BatchNorm and activation as one convolution, for inference."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

import segfast.ops._packed  # noqa: F401  defines concat_affine
from segfast import _backend

IN_PLACE = {
    nn.Identity: lambda act, x: x,
    nn.ReLU: lambda act, x: F.relu_(x),
    nn.PReLU: lambda act, x: act(x),
    nn.LeakyReLU: lambda act, x: F.leaky_relu_(x, act.negative_slope),
}


JOINS = _backend.has_compiled("concat_affine", "CPU")
# What BatchNorms run that are a scale and a shift in evaluation.
SCALES = {nn.BatchNorm2d.forward}
_local = threading.local()


@contextlib.contextmanager
def plainly(module: nn.Module) -> Iterator[None]:
    """Within, nothing of `module` is overwritten if somebody sees what goes into one of its parts or comes out: asked once."""
    before = getattr(_local, "plain", None)
    _local.plain = bool(before) or any(watched(part) for part in module.modules())
    try:
        yield
    finally:
        _local.plain = before


def quick() -> bool:
    """Whether an intermediate result may be overwritten: no gradients, compiler (it fuses by itself) or trace, nobody watching.

    Hooks of a module are seen by `plainly` and `watched`.

    Nor a transform of torch.func, whose tensors do not tell their layout, nor forward-mode AD, which no_grad does not end.
    """
    return not (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or _has_any_global_hook()
        or getattr(_local, "plain", None)
        or _backend.is_transformed()
    )


def conv_bn_act(x: Tensor, conv: nn.Module, bn: nn.Module, act: nn.Module) -> Tensor:
    """act(bn(conv(x))).

    In evaluation without gradients the BatchNorm is folded into the convolution's weights, at every call (nothing is cached),
    and the activation works in place, where that is what the three layers compute and none has a hook.

    Args:
        x: (N, C, H, W).
        conv: an `nn.Conv2d` or, to run plainly, anything.
        bn: an `nn.BatchNorm2d` or anything.
        act: one of IN_PLACE or, to run plainly, anything.
    """
    in_place = IN_PLACE.get(type(act))
    if in_place is None or not quick() or any(watched(layer) for layer in (conv, bn, act)):
        return act(bn(conv(x)))
    # Folding moves the weights, normalising moves the output: the smaller goes.
    if type(conv) is not nn.Conv2d or conv.padding_mode != "zeros" or conv.weight.numel() > x.numel() or not foldable(conv, bn):
        y = bn(conv(x))
        return act(y) if y is x else in_place(act, y)
    weight, bias = fold(conv, bn)
    return in_place(act, F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups))


def activate(act: nn.Module, x: Tensor, by: nn.Module | None = None) -> Tensor:
    """act(x), in place without gradients: x must be a result of the caller's own, made by parts of `by`, none of them watched."""
    in_place = IN_PLACE.get(type(act))
    return act(x) if in_place is None or not quick() or watched(act) or any_watched(by) else in_place(act, x)


def watched(layer: nn.Module) -> bool:
    """Whether somebody sees what goes into the layer or comes out of it."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__)


def any_watched(module: nn.Module | None) -> bool:
    """Whether somebody sees what goes into a part of a module or comes out of it; within `plainly` that is known."""
    known = getattr(_local, "plain", None) is not None
    return module is not None and not known and any(watched(part) for part in module.modules())


def foldable(conv: nn.Module, bn: nn.Module) -> bool:
    """Whether the BatchNorm is a fixed scale and shift, and the weights are precise enough to take the scale."""
    return is_scale(bn) and conv.weight.dtype in (torch.float32, torch.float64)


def is_scale(bn: nn.Module) -> bool:
    """Whether the BatchNorm is a fixed scale and shift."""
    return (
        isinstance(bn, nn.BatchNorm2d)
        and type(bn).forward in SCALES  # a subclass may do more
        and not bn.training
        and bn.running_var is not None
        and bn.weight is not None
    )


def fold(conv: nn.Conv2d | nn.ConvTranspose2d, bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of the one convolution that computes bn(conv(x)) in evaluation."""
    scale = bn.weight * torch.rsqrt(bn.running_var + bn.eps)
    shift = -bn.running_mean if conv.bias is None else conv.bias - bn.running_mean
    # A transposed convolution has its outputs second, one group of them after the other; only ungrouped ones come here.
    shape = (1, -1, 1, 1) if isinstance(conv, nn.ConvTranspose2d) else (-1, 1, 1, 1)
    return conv.weight * scale.view(shape), shift * scale if bn.bias is None else torch.addcmul(bn.bias, shift, scale)


def joined(
    maps: Sequence[Tensor], bn: nn.Module, act: nn.Module, more: Tensor | None = None, by: nn.Module | None = None
) -> Tensor | None:
    """act(bn(cat(maps) + more)) in one pass without gradients, on channels_last maps on the CPU; None where that cannot be.

    Args:
        maps: (N, C_i, H, W).
        bn: a BatchNorm over sum C_i channels.
        act: an `nn.PReLU`, an `nn.ReLU` or an `nn.Identity`.
        more: (N, sum C_i, H, W).
        by: whose parts bn and act are, none of them watched; see `any_watched`.
    """
    tensors = (*maps, *(() if more is None else (more,)))
    first = maps[0]
    if not (
        JOINS
        and _backend.requested == "auto"
        and quick()
        and type(act) in (nn.PReLU, nn.ReLU, nn.Identity)
        and is_scale(bn)
        and first.dtype in (torch.float32, torch.bfloat16)
        and all(type(t) is Tensor and t.is_cpu and t.dtype == first.dtype for t in tensors)
        and all(t.shape[2:] == first.shape[2:] and t.dim() == 4 for t in tensors)
        and bn.num_features == sum(m.shape[1] for m in maps)
        and all(p.dtype in (torch.float32, first.dtype) for p in (bn.weight, bn.running_var))
        and (type(act) is not nn.PReLU or act.weight.dtype == first.dtype)
        and any(_backend.layout(t) == torch.channels_last for t in tensors)
        and not any_watched(by)
    ):
        return None
    scale = bn.weight.float() * torch.rsqrt(bn.running_var.float() + bn.eps)
    shift = -bn.running_mean.float() * scale
    if bn.bias is not None:
        shift = shift + bn.bias
    slope = act.weight.float().expand(len(scale)).contiguous() if type(act) is nn.PReLU else None
    return torch.ops.segfast.concat_affine(maps, more, scale, shift, slope, type(act) is nn.ReLU)


def add(x: Tensor, y: Tensor, relu: bool = False, by: nn.Module | None = None) -> Tensor:
    """x + y, then a ReLU if wanted. Without gradients the result lands in y, which must be a result of the caller's own.

    Args:
        x, y: of one shape.
        relu: whether a ReLU follows.
        by: made y, with parts of which none is watched; None: the caller's `plainly` has asked.
    """
    if quick() and not any_watched(by) and x.dtype == y.dtype and x is not y:
        y = y.add_(x)
        return y.relu_() if relu else y
    y = x + y
    return F.relu(y) if relu else y
