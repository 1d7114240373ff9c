"""The depthwise-separable block of Fast-SCNN and MobileNet as a module that fuses whenever it can."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from segfast import _backend, ops
from segfast.nn.convolution import pair, require, same_padding
from segfast.ops.ds_conv import infer, run

ACTIVATIONS = {nn.Identity: None, nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SiLU: "silu", nn.Hardswish: "hardswish"}
_MODULES = {name: kind for kind, name in ACTIVATIONS.items()}


class DSConv(nn.Module):
    """Depthwise k x k, BatchNorm, activation, pointwise 1 x 1, BatchNorm, activation; see `segfast.ops.ds_conv`.

    The layers are an ordinary `nn.Sequential` named `conv`, with the convolutions at 0 and 3, the BatchNorms at 1 and 4 and
    the activations (or `nn.Identity`) at 2 and 5. At every call it is looked at afresh: if the six are what the operation
    can do, it reads their tensors and runs fused; if one was replaced, has a hook, is pruned or parametrised, the Sequential
    runs. Nothing is cached, so weights and layers may change in any way between calls.

    Args:
        dw_channels: channels of the input and of the depthwise convolution.
        out_channels: channels of the output.
        stride: of the depthwise convolution, an int or a pair.
        kernel_size: of the depthwise convolution, an int or a pair.
        padding: zeros on each side, an int or a pair; None: dilation * (kernel_size - 1) // 2.
        dilation: of the depthwise convolution, an int or a pair.
        bias: whether the convolutions have one.
        dw_act: between the convolutions: "relu", "relu6", "silu", "hardswish" or None.
        act: at the end; the same choices.
        norm_layer: called with the number of channels, and with eps, momentum, device and dtype where they differ from the
            defaults. Only an `nn.BatchNorm2d` or an `nn.Identity` fuses.
        eps: of the BatchNorms.
        momentum: of the BatchNorms; None: the cumulative average.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: an activation that is none of the choices, no channels.
    """

    def __init__(
        self,
        dw_channels: int,
        out_channels: int,
        stride: int | tuple[int, int] = 1,
        *,
        kernel_size: int | tuple[int, int] = 3,
        padding: int | tuple[int, int] | None = None,
        dilation: int | tuple[int, int] = 1,
        bias: bool = False,
        dw_act: str | None = "relu",
        act: str | None = "relu",
        norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        device=None,
        dtype=None,
    ):
        super().__init__()
        require("DSConv", dw_channels=dw_channels, out_channels=out_channels)
        for name, value in (("dw_act", dw_act), ("act", act)):
            if value not in _MODULES:
                raise ValueError(f"DSConv: want {name} one of {', '.join(map(repr, _MODULES))}, got {value!r}")
        kernel_size, stride, dilation = (tuple(map(int, pair(v))) for v in (kernel_size, stride, dilation))
        padding = same_padding(kernel_size, dilation) if padding is None else tuple(map(int, pair(padding)))
        where = {"device": device, "dtype": dtype}
        options = {"eps": (eps, 1e-5), "momentum": (momentum, 0.1), "device": (device, None), "dtype": (dtype, None)}
        norm = {name: value for name, (value, default) in options.items() if value != default}
        # Not in place: the same numbers and the same memory kept, but backward hooks on the BatchNorms work.
        self.conv = nn.Sequential(
            nn.Conv2d(dw_channels, dw_channels, kernel_size, stride, padding, dilation, dw_channels, bias, **where),
            norm_layer(dw_channels, **norm),
            _MODULES[dw_act](),
            nn.Conv2d(dw_channels, out_channels, 1, bias=bias, **where),
            norm_layer(out_channels, **norm),
            _MODULES[act](),
        )

    def forward(self, x: Tensor) -> Tensor:
        if not (isinstance(x, Tensor) and _backend.has_kernel("ds_conv", x) and fuses(self.conv)):
            return self.conv(x)
        dw, dw_bn, dw_act, pw, pw_bn, act = self.conv._modules.values()
        one, two = dw._parameters, pw._parameters  # where the attributes come from, which ask a module's __getattr__ each
        args = (
            *(x, one["weight"], two["weight"], one["bias"], two["bias"], batch_norm(dw_bn), batch_norm(pw_bn)),
            *(dw.stride, dw.padding, dw.dilation, ACTIVATIONS[type(dw_act)], ACTIVATIONS[type(act)]),
            (dw_bn.training, pw_bn.training),
        )
        y = infer(*args)
        if y is None:
            y = run(*args)
        for bn in (dw_bn, pw_bn):
            if bn.training and type(bn) is nn.BatchNorm2d and bn.track_running_stats and bn.num_batches_tracked is not None:
                bn.num_batches_tracked.add_(1)
        return y


def fuses(conv: nn.Module) -> bool:
    """Whether a Sequential is the six layers of the operation, in their plain form and with nobody watching in between."""
    if type(conv) is not nn.Sequential or len(conv._modules) != 6 or _has_any_global_hook():
        return False
    for module in (conv, *conv._modules.values()):
        if (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or "forward" in module.__dict__  # how accelerate and others wrap a module
        ):
            return False
    dw, dw_bn, dw_act, pw, pw_bn, act = conv._modules.values()
    # Exact types: a parametrised layer is a subclass, and so is whatever computes something else.
    return (
        type(dw) is nn.Conv2d
        and type(pw) is nn.Conv2d
        and type(dw_bn) in (nn.BatchNorm2d, nn.Identity)
        and type(pw_bn) in (nn.BatchNorm2d, nn.Identity)
        and type(dw_act) in ACTIVATIONS
        and type(act) in ACTIVATIONS
        and dw.groups == dw.in_channels == dw.out_channels
        and dw.padding_mode == "zeros"
        and not isinstance(dw.padding, str)
        and pw.kernel_size == pw.stride == (1, 1)
        and pw.padding == (0, 0)
        and pw.groups == 1
    )


def batch_norm(bn: nn.Module) -> ops.BatchNorm | None:
    """What `nn.BatchNorm2d.forward` would hand to `F.batch_norm`; None for `nn.Identity`."""
    if type(bn) is nn.Identity:
        return None
    update = bn.training and bn.track_running_stats
    momentum = bn.momentum
    if momentum is None:
        momentum = 1 / (float(bn.num_batches_tracked) + 1) if update and bn.num_batches_tracked is not None else 0.0
    if bn.training and not update:
        return ops.BatchNorm(None, None, bn.weight, bn.bias, bn.eps, momentum)
    parameters, buffers = bn._parameters, bn._buffers
    return ops.BatchNorm(
        buffers["running_mean"], buffers["running_var"], parameters["weight"], parameters["bias"], bn.eps, momentum
    )
