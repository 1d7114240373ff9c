"""Depthwise-separable convolution: depthwise, BatchNorm, activation, pointwise, BatchNorm, activation, as one operation."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import conv_backward_flop, conv_flop_count, register_flop_formula

from segfast import _backend

ACTIVATIONS = {None: 0, "relu": 1, "relu6": 2, "silu": 3, "hardswish": 4}
_APPLY = {"relu": F.relu, "relu6": F.relu6, "silu": F.silu, "hardswish": F.hardswish}
_NAMES = ("weight", "bias", "norm's running_mean", "norm's running_var", "norm's weight", "norm's bias")
MAX_TAPS = 64  # the kernels' limit; a larger depthwise kernel runs on the reference


class BatchNorm(NamedTuple):
    """The tensors of one `nn.BatchNorm2d`, each (C,) or None, float32 or the dtype of x.

    Without running statistics the batch's own are used. `momentum` is the factor of this call (`nn.BatchNorm2d` works it out
    from `num_batches_tracked` when its momentum is None).
    """

    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-5
    momentum: float = 0.1


_NONE, _PLAIN = BatchNorm(), (Tensor, torch.nn.Parameter)


def ds_conv_reference(
    x: Tensor,
    dw_weight: Tensor,
    pw_weight: Tensor,
    *,
    dw_bias: Tensor | None = None,
    pw_bias: Tensor | None = None,
    dw_bn: BatchNorm | None = None,
    pw_bn: BatchNorm | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | None = None,
    dilation: int | tuple[int, int] = 1,
    dw_act: str | None = "relu",
    act: str | None = "relu",
    training: bool | tuple[bool, bool] = False,
) -> Tensor:
    stride, dilation, training = _pair(stride), _pair(dilation), _pair(training)
    padding = _same(dw_weight, dilation) if padding is None else _pair(padding)
    x, dw_weight, pw_weight, dw_bias, pw_bias = _backend.autocast(x, dw_weight, pw_weight, dw_bias, pw_bias)
    memory_format = _backend.layout(x)

    def half(x, weight, bias, bn, activation, batch, **options):
        x = F.conv2d(x, weight, bias, **options)
        if bn is not None:
            x = F.batch_norm(x, *bn[:4], training=batch or bn.running_mean is None, momentum=bn.momentum, eps=bn.eps)
        return x if activation is None else _APPLY[activation](x)

    geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": x.shape[1]}
    x = half(x, dw_weight, dw_bias, dw_bn, dw_act, training[0], **geometry)
    x = half(x, pw_weight, pw_bias, pw_bn, act, training[1])
    return x.contiguous(memory_format=memory_format)


_NORM = "Tensor? {0}_mean, Tensor? {0}_var, Tensor? {0}_gamma, Tensor? {0}_beta, float {0}_eps"
_GEOMETRY = "SymInt[] stride, SymInt[] padding, SymInt[] dilation, int dw_act, int act"
_FORWARD = (
    f"(Tensor x, Tensor dw_weight, Tensor? dw_bias, {_NORM.format('dw')}, "
    f"Tensor pw_weight, Tensor? pw_bias, {_NORM.format('pw')}, {_GEOMETRY})"
)
torch.library.define("segfast::ds_conv", f"{_FORWARD} -> Tensor")
torch.library.define(
    "segfast::ds_conv_train",
    f"{_FORWARD} -> (Tensor y, Tensor u, Tensor z, Tensor dw_mean, Tensor dw_var, Tensor pw_mean, Tensor pw_var)",
)
torch.library.define(
    "segfast::ds_conv_backward",
    "(Tensor grad, Tensor x, Tensor u, Tensor z, "
    "Tensor dw_weight, Tensor dw_mean, Tensor dw_var, Tensor? dw_gamma, Tensor? dw_beta, float dw_eps, bool dw_batch, "
    "Tensor pw_weight, Tensor pw_mean, Tensor pw_var, Tensor? pw_gamma, Tensor? pw_beta, float pw_eps, bool pw_batch, "
    f"{_GEOMETRY}, bool need_input) -> (Tensor grad_x, Tensor grad_dw_weight, Tensor grad_dw_bias, Tensor grad_dw_gamma, "
    "Tensor grad_dw_beta, Tensor grad_pw_weight, Tensor grad_pw_bias, Tensor grad_pw_gamma, Tensor grad_pw_beta)",
)
_backend.register("ds_conv", "ds_conv_train", "ds_conv_backward")

# The first half of the block alone, contiguous, on CUDA: act(scale * dw(x) + shift), and dw(x) + bias with its batch statistics.
_DEPTHWISE = "SymInt[] stride, SymInt[] padding, SymInt[] dilation"
torch.library.define(
    "segfast::depthwise", f"(Tensor x, Tensor dw_weight, Tensor scale, Tensor shift, {_DEPTHWISE}, int act) -> Tensor"
)
torch.library.define(
    "segfast::depthwise_train",
    f"(Tensor x, Tensor dw_weight, Tensor? bias, {_DEPTHWISE}) -> (Tensor u, Tensor mean, Tensor var)",
)


def _output_size(x, dw_weight, stride, padding, dilation) -> tuple:
    return tuple((x[2 + i] + 2 * padding[i] - dilation[i] * (dw_weight[2 + i] - 1) - 1) // stride[i] + 1 for i in range(2))


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@torch.library.register_fake("segfast::ds_conv")
def _(x, dw_weight, *args):
    pw_weight, stride, padding, dilation = args[6], *args[13:16]
    size = (x.shape[0], pw_weight.shape[0], *_output_size(x.shape, dw_weight.shape, stride, padding, dilation))
    return x.new_empty(size).contiguous(memory_format=_backend.layout(x))


@torch.library.register_fake("segfast::ds_conv_train")
def _(x, dw_weight, *args):
    pw_weight, stride, padding, dilation = args[6], *args[13:16]
    n, c, k = x.shape[0], x.shape[1], pw_weight.shape[0]
    size = _output_size(x.shape, dw_weight.shape, stride, padding, dilation)
    y = x.new_empty((n, k, *size)).contiguous(memory_format=_backend.layout(x))
    u = x.new_empty((n, c, *size)).contiguous(memory_format=torch.channels_last)
    z = x.new_empty((n, k, *size)).contiguous(memory_format=torch.channels_last)
    statistics = (x.new_empty(m, dtype=_statistics_dtype(x)) for m in (c, c, k, k))
    return y, u, z, *statistics


@torch.library.register_fake("segfast::ds_conv_backward")
def _(grad, x, u, z, dw_weight, *args):
    pw_weight, need_input = args[6], args[-1]
    c, k, dtype = x.shape[1], pw_weight.shape[0], _statistics_dtype(x)
    grad_x = x.new_empty((x.shape[0] if need_input else 0, *x.shape[1:]))
    grad_x = grad_x.contiguous(memory_format=_backend.layout(x) if need_input else torch.channels_last)
    grad_dw, grad_pw = dw_weight.new_empty(dw_weight.shape), pw_weight.new_empty(pw_weight.shape)
    return (
        *(grad_x, grad_dw, x.new_empty(c), x.new_empty(c, dtype=dtype), x.new_empty(c, dtype=dtype)),
        *(grad_pw, x.new_empty(k), x.new_empty(k, dtype=dtype), x.new_empty(k, dtype=dtype)),
    )


@torch.library.register_fake("segfast::depthwise")
def _(x, dw_weight, scale, shift, stride, padding, dilation, act):
    return x.new_empty((*x.shape[:2], *_output_size(x.shape, dw_weight.shape, stride, padding, dilation)))


@torch.library.register_fake("segfast::depthwise_train")
def _(x, dw_weight, bias, stride, padding, dilation):
    u = x.new_empty((*x.shape[:2], *_output_size(x.shape, dw_weight.shape, stride, padding, dilation)))
    mean, var = (x.new_empty(x.shape[1], dtype=_statistics_dtype(x)) for _ in range(2))
    return u, mean, var


@register_flop_formula([torch.ops.segfast.depthwise, torch.ops.segfast.depthwise_train])
def _(x, dw_weight, *args, out_shape=None, **kwargs) -> int:
    return conv_flop_count(x, dw_weight, out_shape if isinstance(out_shape[0], int) else out_shape[0])


def _flops(x, dw_weight, pw_weight, y) -> int:
    u = (*x[:1], dw_weight[0], *y[2:])
    return conv_flop_count(x, dw_weight, u) + conv_flop_count(u, pw_weight, y)


@register_flop_formula(torch.ops.segfast.ds_conv)
def _(x, dw_weight, *args, out_shape=None, **kwargs) -> int:
    return _flops(x, dw_weight, args[6], out_shape)


@register_flop_formula(torch.ops.segfast.ds_conv_train)
def _(x, dw_weight, *args, out_shape=None, **kwargs) -> int:
    return _flops(x, dw_weight, args[6], out_shape[0])


@register_flop_formula(torch.ops.segfast.ds_conv_backward)
def _(grad, x, u, z, dw_weight, *args, out_shape=None, **kwargs) -> int:
    pw_weight, need_input = args[6], args[-1]
    shared = (
        None,
        None,
        None,
        None,
        False,
        None,
        None,
    )  # bias sizes, stride, padding, dilation, transposed, output padding, groups
    pw = conv_backward_flop(grad, u, pw_weight, *shared, (True, True, False), out_val=(u, pw_weight, None))
    dw = conv_backward_flop(u, x, dw_weight, *shared, (need_input, True, False), out_val=(x, dw_weight, None))
    return pw + dw


class DsConv(torch.autograd.Function):
    """Keeps the two convolutions' outputs and recomputes the rest: half of what eager keeps."""

    @staticmethod
    def forward(ctx, x, dw_weight, dw_bias, dw_gamma, dw_beta, pw_weight, pw_bias, pw_gamma, pw_beta, dw_norm, pw_norm, options):
        (dw_mean, dw_var, dw_eps), (pw_mean, pw_var, pw_eps) = dw_norm, pw_norm
        y, u, z, *statistics = torch.ops.segfast.ds_conv_train.default(
            *(x, dw_weight, dw_bias, dw_mean, dw_var, dw_gamma, dw_beta, dw_eps),
            *(pw_weight, pw_bias, pw_mean, pw_var, pw_gamma, pw_beta, pw_eps, *options),
        )
        ctx.save_for_backward(x, u, z, dw_weight, pw_weight, dw_gamma, dw_beta, pw_gamma, pw_beta, *statistics)
        ctx.biases = dw_bias is not None, pw_bias is not None
        ctx.norms = (dw_eps, dw_mean is None), (pw_eps, pw_mean is None)
        ctx.options = options
        ctx.mark_non_differentiable(*statistics)
        return y, *statistics

    @staticmethod
    def backward(ctx, grad, *_):
        x, u, z, dw_weight, pw_weight, dw_gamma, dw_beta, pw_gamma, pw_beta, *statistics = ctx.saved_tensors
        kernel = torch.ops.segfast.ds_conv_backward.default
        first = (grad, x, u, z, dw_weight, *statistics[:2], dw_gamma, dw_beta, *ctx.norms[0])
        second = (pw_weight, *statistics[2:], pw_gamma, pw_beta, *ctx.norms[1], *ctx.options, ctx.needs_input_grad[0])
        grad_x, dw, dw_bias, g1, b1, pw, pw_bias, g2, b2 = _backend.once("ds_conv", kernel, *first, *second)
        grads = [grad_x, dw, dw_bias, g1, b1, pw, pw_bias, g2, b2]
        likes = [x, dw_weight, x, dw_gamma, dw_beta, pw_weight, x, pw_gamma, pw_beta]
        wanted = ctx.needs_input_grad[:9]
        cast = [
            (g if g.dtype == like.dtype else g.to(like.dtype)) if need else None for g, like, need in zip(grads, likes, wanted)
        ]
        return *cast, None, None, None


def ds_conv(
    x: Tensor,
    dw_weight: Tensor,
    pw_weight: Tensor,
    *,
    dw_bias: Tensor | None = None,
    pw_bias: Tensor | None = None,
    dw_bn: BatchNorm | None = None,
    pw_bn: BatchNorm | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | None = None,
    dilation: int | tuple[int, int] = 1,
    dw_act: str | None = "relu",
    act: str | None = "relu",
    training: bool | tuple[bool, bool] = False,
) -> Tensor:
    """Depthwise-separable convolution with both BatchNorms and both activations, in one operation.

    u = dw(x) + dw_bias;  v = dw_act(bn(u));  z = pw(v) + pw_bias;  y = act(bn(z))

    (MobileNet, Howard et al., arXiv:1704.04861, fig. 3; the block of Fast-SCNN, arXiv:1902.04502.) For inference the
    BatchNorms are folded and the depthwise result never leaves the cache. For training u and z are kept for the backward
    and v is recomputed.

    Args:
        x: (N, C, H, W), float; channels_last is native, other layouts are copied.
        dw_weight: (C, 1, kh, kw).
        pw_weight: (K, C, 1, 1).
        dw_bias: (C,) or None.
        pw_bias: (K,) or None.
        dw_bn: the first BatchNorm, or None for none.
        pw_bn: the second BatchNorm, or None for none.
        stride: of the depthwise convolution, >= 1.
        padding: zeros on each side, >= 0; None: dilation * (k - 1) // 2.
        dilation: of the depthwise convolution, >= 1.
        dw_act: between the convolutions: "relu", "relu6", "silu", "hardswish" or None.
        act: at the end; the same choices.
        training: normalise with the batch's statistics and update the running ones in place, as `F.batch_norm` does; a pair
            sets the two BatchNorms apart. False with gradients is the frozen BatchNorm.

    Returns:
        (N, K, H', W'), the dtype of x (autocast's under autocast); channels_last if x is, else contiguous.

    Raises:
        ValueError: shapes, sizes or options that do not fit, one value a channel when training.
        TypeError: dtypes that do not fit.
    """
    args = (x, dw_weight, pw_weight, dw_bias, pw_bias, dw_bn, pw_bn, stride, padding, dilation, dw_act, act, training)
    quiet = not torch.is_grad_enabled() and type(x) in _PLAIN and _backend.has_kernel("ds_conv", x)
    y = infer(*args) if quiet else None
    return run(*args) if y is None else y


def run(x, dw_weight, pw_weight, dw_bias, pw_bias, dw_bn, pw_bn, stride, padding, dilation, dw_act, act, training) -> Tensor:
    """`ds_conv` with its arguments in this order."""
    stride, dilation, training = _pair(stride), _pair(dilation), _pair(training)
    padding = _same(dw_weight, dilation) if padding is None else _pair(padding)
    _check(x, dw_weight, pw_weight, dw_bias, pw_bias, dw_bn, pw_bn, stride, padding, dilation, dw_act, act, training)
    tensors = [t for t in (x, dw_weight, pw_weight, dw_bias, pw_bias, *(dw_bn or ())[:4], *(pw_bn or ())[:4]) if t is not None]
    if not _backend.has_kernel("ds_conv", *tensors) or dw_weight.shape[2] * dw_weight.shape[3] > MAX_TAPS:
        return ds_conv_reference(
            *(x, dw_weight, pw_weight), dw_bias=dw_bias, pw_bias=pw_bias, dw_bn=dw_bn, pw_bn=pw_bn, stride=stride,
            padding=padding, dilation=dilation, dw_act=dw_act, act=act, training=training,
        )  # fmt: skip
    x, dw_weight, pw_weight, dw_bias, pw_bias = _backend.autocast(x, dw_weight, pw_weight, dw_bias, pw_bias)
    options = (stride, padding, dilation, ACTIVATIONS[dw_act], ACTIVATIONS[act])
    batch = [bn is not None and (train or bn.running_mean is None) for bn, train in zip((dw_bn, pw_bn), training)]
    gradients = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if not gradients and not any(batch):
        one, two = (bn or BatchNorm() for bn in (dw_bn, pw_bn))
        return torch.ops.segfast.ds_conv.default(x, dw_weight, dw_bias, *one[:5], pw_weight, pw_bias, *two[:5], *options)

    norms = []
    for bn, use_batch, channels in zip((dw_bn, pw_bn), batch, (x.shape[1], pw_weight.shape[0])):
        if bn is None:
            norms.append((x.new_zeros(channels), x.new_ones(channels), 0.0))
        else:
            norms.append((None, None, bn.eps) if use_batch else (bn.running_mean, bn.running_var, bn.eps))
    one, two = (bn or BatchNorm() for bn in (dw_bn, pw_bn))
    y, *statistics = DsConv.apply(
        x, dw_weight, dw_bias, one.weight, one.bias, pw_weight, pw_bias, two.weight, two.bias, *norms, options
    )
    count = y.shape[0] * y.shape[2] * y.shape[3]
    halves = zip((dw_bn, pw_bn), (statistics[:2], statistics[2:]), batch, training)
    tracked = [(bn, own) for bn, own, use, train in halves if use and train and bn.running_mean is not None]
    if tracked and count:  # of no values they are left alone, as F.batch_norm does
        _update_running(tracked, count)
    return y


@torch.no_grad()
def _update_running(tracked: list[tuple[BatchNorm, list[Tensor]]], count: int) -> None:
    """Moves running statistics towards a batch's means and biased variances, all of them together."""
    running = [t for bn, _ in tracked for t in bn[:2]]
    batch = torch._foreach_mul([t for _, own in tracked for t in own], [1.0, count / (count - 1)] * len(tracked))
    batch = [b if b.dtype == r.dtype else b.to(r.dtype) for b, r in zip(batch, running)]
    torch._foreach_lerp_(running, batch, [bn.momentum for bn, _ in tracked for _ in range(2)])


def infer(
    x, dw_weight, pw_weight, dw_bias, pw_bias, dw_bn, pw_bn, stride, padding, dilation, dw_act, act, training
) -> Tensor | None:
    """The block on the CPU without gradients, where nothing has to be looked at first; else None.

    A block of a small network lasts a few tenths of a millisecond, and looking takes one of them. What does not fit the kernel
    refuses too, and then the caller looks. The caller knows that there is a kernel for x.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or training not in (False, (False, False)):
        return None
    one, two = dw_bn or _NONE, pw_bn or _NONE
    tensors = [t for t in (x, dw_weight, pw_weight, dw_bias, pw_bias, *one[:4], *two[:4]) if t is not None]
    plain = (
        type(stride) is type(padding) is type(dilation) is tuple
        and (one is _NONE or (one.running_mean is not None and one.running_var is not None))
        and (two is _NONE or (two.running_mean is not None and two.running_var is not None))
        and all([type(t) in _PLAIN and t.is_cpu for t in tensors])
    )
    if not plain or torch.is_autocast_enabled("cpu"):
        return None
    try:
        return torch.ops.segfast.ds_conv.default(
            *(x, dw_weight, dw_bias, *one[:5], pw_weight, pw_bias, *two[:5]),
            *(stride, padding, dilation, ACTIVATIONS[dw_act], ACTIVATIONS[act]),
        )
    except (RuntimeError, TypeError, KeyError):
        return None


def _pair(value) -> tuple:
    return (value, value) if isinstance(value, (int, bool)) or not hasattr(value, "__len__") else tuple(value)


def _same(dw_weight: Tensor, dilation: tuple[int, int]) -> tuple[int, int]:
    return tuple(d * (k - 1) // 2 for d, k in zip(dilation, dw_weight.shape[2:]))


def _check(x, dw_weight, pw_weight, dw_bias, pw_bias, dw_bn, pw_bn, stride, padding, dilation, dw_act, act, training) -> None:
    device, dtype, xs, dws, pws = x.device, x.dtype, x.shape, dw_weight.shape, pw_weight.shape  # each attribute costs 0.1 us
    if len(xs) != 4 or len(dws) != 4 or dws[0] != xs[1] or dws[1] != 1:
        raise ValueError(f"ds_conv: want x (N, C, H, W) and dw_weight (C, 1, kh, kw), got {tuple(xs)} and {tuple(dws)}")
    if len(pws) != 4 or pws[1] != xs[1] or pws[2] != 1 or pws[3] != 1:
        raise ValueError(f"ds_conv: want pw_weight (K, C, 1, 1) with C = {xs[1]}, got {tuple(pws)}")
    if not dtype.is_floating_point:
        raise TypeError(f"ds_conv: want a float dtype, got {dtype}")
    for name, value, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if len(value) != 2 or any([not isinstance(v, (int, torch.SymInt)) or v < least for v in value]):
            raise ValueError(f"ds_conv: want {name} >= {least}, an int or a pair, got {value}")
    for name, value in (("dw_act", dw_act), ("act", act)):
        if value not in ACTIVATIONS:
            raise ValueError(f"ds_conv: want {name} one of {', '.join(map(repr, ACTIVATIONS))}, got {value!r}")
    size = _output_size(xs, dws, stride, padding, dilation)
    if xs[2] + 2 * padding[0] <= dilation[0] * (dws[2] - 1) or size[1] < 1:
        raise ValueError(
            f"ds_conv: want a kernel no larger than the padded input, got x {tuple(xs)}, dw_weight {tuple(dws)}, {padding=}"
        )
    mixed = torch.is_autocast_enabled(device.type)
    wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    for prefix, weight, bias, bn, batch in (
        ("dw", dw_weight, dw_bias, dw_bn, training[0]),
        ("pw", pw_weight, pw_bias, pw_bn, training[1]),
    ):
        channels = weight.shape[0]
        vector = (channels,)
        for k, t in enumerate((weight, bias) if bn is None else (weight, bias, *bn[:4])):
            if t is None:
                continue
            name = _NAMES[k]
            if k and t.shape != vector:
                raise ValueError(f"ds_conv: want {prefix} {name} ({channels},), got {tuple(t.shape)}")
            if t.device != device:
                raise ValueError(f"ds_conv: want one device, got x on {device} and {prefix} {name} on {t.device}")
            if t.dtype != dtype and not mixed and not (k > 1 and t.dtype == wide):
                raise TypeError(f"ds_conv: want {prefix} {name} in {dtype}, got {t.dtype}")
        if bn is None:
            continue
        if (bn.running_mean is None) != (bn.running_var is None):
            raise ValueError(f"ds_conv: want both running statistics of {prefix}_bn or neither, got one")
        if (batch or bn.running_mean is None) and xs[0] * size[0] * size[1] == 1:
            raise ValueError(f"ds_conv: want more than one value a channel when training, got an output of 1x{channels}x1x1")
