"""Bad input of ds_conv: refused by name before a kernel runs, or as eager PyTorch does; NaN and infinity go where eager's go."""

from __future__ import annotations

import pytest
import torch
from harness import error, reference_only

from segfast import _backend, ops
from segfast.ops import BatchNorm


def arguments(c=4, k=6, size=(2, 4, 6, 5), kernel=3, dtype=torch.float32):
    return [torch.randn(s).to(dtype) for s in (size, (c, 1, kernel, kernel), (k, c, 1, 1))]


BAD = {
    "rank": (ValueError, lambda x, d, p: (x[0], d, p), {}),
    "channels": (ValueError, lambda x, d, p: (x[:, :3], d, p), {}),
    "not depthwise": (ValueError, lambda x, d, p: (x, d.expand(4, 2, 3, 3), p), {}),
    "pointwise 3x3": (ValueError, lambda x, d, p: (x, d, p.expand(6, 4, 3, 3)), {}),
    "integer": (TypeError, lambda x, d, p: (x.int(), d.int(), p.int()), {}),
    "complex": (TypeError, lambda x, d, p: (x.cfloat(), d, p), {}),
    "mixed dtypes": (TypeError, lambda x, d, p: (x, d.double(), p), {}),
    "devices": (ValueError, lambda x, d, p: (x, d.to("meta"), p), {}),
    "stride": (ValueError, lambda x, d, p: (x, d, p), {"stride": 0}),
    "padding": (ValueError, lambda x, d, p: (x, d, p), {"padding": -1}),
    "dilation": (ValueError, lambda x, d, p: (x, d, p), {"dilation": (1, 0)}),
    "activation": (ValueError, lambda x, d, p: (x, d, p), {"act": "gelu"}),
    "bias": (ValueError, lambda x, d, p: (x, d, p), {"pw_bias": torch.zeros(5)}),
    "norm": (ValueError, lambda x, d, p: (x, d, p), {"dw_bn": BatchNorm(torch.zeros(3), torch.ones(3))}),
    "half a norm": (ValueError, lambda x, d, p: (x, d, p), {"dw_bn": BatchNorm(torch.zeros(4))}),
    "kernel larger than the input": (ValueError, lambda x, d, p: (x[..., :2, :], d, p), {"padding": 0}),
    "one value": (ValueError, lambda x, d, p: (x[:1, :, :1, :1], d, p), {"dw_bn": BatchNorm(), "training": True}),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("gradients", [True, False])
def test_ds_conv_refuses(name, gradients):
    """Without gradients, and with pairs, the kernel looks first."""
    kind, change, options = BAD[name]
    if not gradients:
        options = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), **options}
        options = {k: (v, v) if type(v) is int else v for k, v in options.items()}
    before = _backend._C.kernel_calls() if _backend._C else None
    with torch.set_grad_enabled(gradients), pytest.raises(kind, match=r"ds_conv: want .*got "):
        ops.ds_conv(*change(*arguments()), **options)
    assert before is None or _backend._C.kernel_calls() == before


@pytest.mark.parametrize("value", (float("nan"), float("inf"), -float("inf")))
@pytest.mark.parametrize("act", ("relu", "relu6", "silu", "hardswish", None))
def test_ds_conv_nan_and_infinity(value, act, kernel_set):
    torch.manual_seed(0)
    x, dw, pw = arguments(dtype=torch.float64)
    x[0, 1, 2, 3] = value
    call = lambda: ops.ds_conv(x, dw, pw, dw_act=act, act=act)  # noqa: E731
    with reference_only():
        expected = call()
    assert error(call(), expected) < 1e-12


@pytest.mark.parametrize("training", (False, True))
@pytest.mark.parametrize("size, kernel", [((0, 4, 3, 3), 3), ((3, 4, 1, 1), 3), ((3, 4, 2, 2), 5)])
def test_ds_conv_degenerate(size, kernel, training, kernel_set):
    tensors = arguments(size=size, kernel=kernel, dtype=torch.float64)

    def call():
        norms = [BatchNorm(torch.zeros(c).double(), torch.ones(c).double()) for c in (4, 6)]
        try:
            return [ops.ds_conv(*tensors, dw_bn=norms[0], pw_bn=norms[1], training=training), *norms[0][:2], *norms[1][:2]]
        except (RuntimeError, ValueError) as refusal:
            return type(refusal)

    with reference_only():
        expected = call()
    actual = call()
    assert isinstance(actual, list) == isinstance(expected, list), (actual, expected)
    if isinstance(actual, list):
        for a, b in zip(actual, expected):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7, equal_nan=True)
