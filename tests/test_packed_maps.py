"""The private inference ops on maps (concat_affine, resize, max_pool and the like, packed_conv_transpose), by the error rule."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from harness import judge
from test_packed import ACTS, DTYPES, OPS, kernel_set, last  # noqa: F401  the fixture

from segfast import _backend

pytestmark = pytest.mark.skipif(
    _backend._C is None or _backend.requested == "reference", reason="no kernels: nothing is packed without them"
)


def same_on_two_threads(call):
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            results.append(call())
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*[torch.nan_to_num(y) for y in results])
    return results[0]


AFTER = ["", "relu", "prelu"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("after", AFTER)
@pytest.mark.parametrize(("added", "affine"), list(itertools.product([False, True], [False, True])))
def test_concat_affine(kernel_set, dtype, after, added, affine):  # noqa: F811
    torch.manual_seed(0)
    for channels, h, w in [((3, 16, 25), 7, 9), ((19,), 1, 1), ((32, 48), 20, 30), ((1, 1, 1), 5, 40)]:
        total = sum(channels)
        maps = [torch.randn(2, c, h, w).to(dtype) for c in channels]
        maps = [x if i == 0 else last(x) for i, x in enumerate(maps)]  # one of them planar
        more = last(torch.randn(2, total, h, w)).to(dtype) if added else None
        scale, shift, slope = torch.randn(3, total).bfloat16().float().unbind()
        kept = (scale, shift) if affine else (None, None)
        kept_slope = slope if after == "prelu" else None
        y = same_on_two_threads(lambda: OPS.concat_affine(maps, more, *kept, kept_slope, after == "relu"))  # noqa: B023
        assert y.is_contiguous(memory_format=torch.channels_last)

        def reference(call):
            *maps, more, scale, shift, slope = call
            x = torch.cat(maps, 1)
            x = x + more if added else x
            column = lambda v: v.to(x.dtype).view(1, -1, 1, 1)  # noqa: E731
            x = x * column(scale) + column(shift) if affine else x
            return [last(F.relu(x) if after == "relu" else F.prelu(x, slope.to(x.dtype)) if after == "prelu" else x)]

        judge(f"{channels} {after}", ["outputs[0]"], [y], reference, (*maps, more, scale, shift, slope), dtype)
    assert OPS.concat_affine([torch.randn(0, 3, 4, 4)], None, None, None, None, False).shape == (0, 3, 4, 4)


@pytest.mark.drawn(1 / 2)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("align_corners", [False, True])
def test_resize(kernel_set, dtype, channels_last, align_corners):  # noqa: F811
    torch.manual_seed(0)
    cases = [(19, 8, 12, (64, 96)), (3, 5, 7, (9, 30)), (33, 6, 1, (1, 5)), (16, 31, 20, (7, 3)), (5, 1, 1, (4, 4))]
    for c, h, w, size in [*cases, (3, 40, 70, (20, 35))]:
        for layout in (last, torch.Tensor.contiguous):
            x = layout(torch.randn(2, c, h, w)).to(dtype)
            y = same_on_two_threads(lambda: OPS.resize(x, size, align_corners, channels_last))  # noqa: B023
            to = last if channels_last else torch.Tensor.contiguous

            def reference(call):
                return [to(F.interpolate(call[0], size, mode="bilinear", align_corners=align_corners))]  # noqa: B023

            assert to(y) is y
            judge(f"{(c, h, w)} {size}", ["outputs[0]"], [y], reference, (x,), dtype)
    assert OPS.resize(torch.randn(0, 3, 4, 4), (8, 8), False, channels_last).shape == (0, 3, 8, 8)


@pytest.mark.parametrize("channels_last", [False, True])
def test_resize_keeps_what_is_not_finite(kernel_set, channels_last):  # noqa: F811
    x = last(torch.randn(1, 4, 6, 6))
    x[0, 1, 2, 3], x[0, 2, 4, 1] = float("nan"), float("inf")
    y, exact = OPS.resize(x, (24, 24), False, channels_last), F.interpolate(x, (24, 24), mode="bilinear")
    assert torch.equal(y.isfinite(), exact.isfinite())
    assert torch.equal(y.isposinf(), exact.isposinf())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeat_pixels(kernel_set, dtype):  # noqa: F811
    for shape, factors in [((2, 19, 5, 7), (2, 2)), ((1, 3, 4, 9), (1, 3)), ((1, 16, 3, 3), (4, 1)), ((0, 2, 3, 3), (2, 2))]:
        x = torch.randn(shape).to(dtype)
        size = [s * f for s, f in zip(shape[2:], factors)]
        y = same_on_two_threads(lambda: OPS.repeat_pixels(x, *factors))  # noqa: B023
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(y, x.repeat_interleave(factors[0], 2).repeat_interleave(factors[1], 3))
        assert not y.numel() or torch.equal(y, F.interpolate(x, size))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.float64], ids=str)
def test_argmax(kernel_set, dtype):  # noqa: F811
    """PyTorch's own: the first of equal ones, NaN before all, minus infinity alone the first."""
    torch.manual_seed(0)
    for shape in [(2, 19, 5, 7), (1, 1, 3, 4), (3, 2, 1, 1), (1, 33, 40, 61), (1, 256, 3, 9), (0, 3, 4, 4), (2, 8, 1, 16)]:
        x = torch.randn(shape).mul(3).round().to(dtype)  # many are equal
        for value, share in [(-math.inf, 0.2), (math.inf, 0.1), (math.nan, 0.05)]:
            x[torch.rand(shape) < share] = value
        if x.numel():
            x[0, :, 0, 0] = -math.inf
        for layout in (last, torch.Tensor.contiguous, lambda x: torch.stack([x, x], -1)[..., 0]):
            for size, integer in [(1, torch.uint8), (4, torch.int32), (8, torch.int64)]:
                classes = same_on_two_threads(lambda: OPS.argmax(layout(x), size))  # noqa: B023
                assert classes.dtype == integer
                assert torch.equal(classes.long(), x.argmax(1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_max_pool(kernel_set, dtype):  # noqa: F811
    """The bits of PyTorch's, NaN and infinities among them."""
    torch.manual_seed(0)
    cases = [  # shape, kernel, stride, padding, dilation, ceil_mode
        ((2, 19, 9, 13), (3, 3), (2, 2), (1, 1), (1, 1), False),
        ((1, 64, 8, 6), (2, 2), (2, 2), (0, 0), (1, 1), True),
        ((1, 33, 7, 5), (3, 2), (1, 2), (1, 0), (2, 1), True),
        ((1, 3, 5, 5), (5, 5), (5, 5), (2, 2), (1, 1), False),
        ((0, 4, 6, 6), (2, 2), (2, 2), (0, 0), (1, 1), False),
    ]
    for shape, *geometry, ceil_mode in cases:
        x = torch.randn(shape).to(dtype)
        if x.numel():
            x[0, 1, 2, 3], x[0, 0, 1, 1], x[0, 2] = float("nan"), float("inf"), float("-inf")
        want = F.max_pool2d(x, *geometry, ceil_mode)
        for layout in (last, torch.Tensor.contiguous):
            y = same_on_two_threads(lambda: OPS.max_pool(layout(x), want.shape[2:], *geometry))  # noqa: B023
            assert torch.equal(y.nan_to_num(7.0), want.nan_to_num(7.0))
            assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [(2, 3, 64, 37, 41, 7, 2, 3), (1, 3, 19, 9, 600, 3, 2, 1), (2, 4, 33, 8, 10, 3, 1, 1), (1, 1, 16, 7, 8, 5, 1, 0)],
    ids=str,
)
def test_packed_conv_pool(kernel_set, dtype, shape):  # noqa: F811
    """The bits of the convolution's kernel and then the pooling's, from image to image and band to band."""
    n, c, k, h, w, size, stride, padding = shape
    torch.manual_seed(0)
    weight, bias = (torch.randn(k, c, size, size) / (c * size**2) ** 0.5).bfloat16().float(), torch.randn(k)
    packed = OPS.pack_conv(weight, bias, 1, dtype)
    geometry = [stride, stride], [padding, padding], [1, 1]
    for pool in (((3, 3), (2, 2), (1, 1), (1, 1)), ((2, 2), (2, 2), (0, 0), (1, 1)), ((1, 2), (3, 1), (0, 1), (1, 1))):
        for layout, act in ((torch.Tensor.contiguous, 1), (last, 5)):
            x = layout(torch.randn(n, c, h, w)).to(dtype)
            want = OPS.packed_conv(x, packed, *geometry, act)
            out = F.max_pool2d(want, *pool).shape[2:]
            y = same_on_two_threads(lambda: OPS.packed_conv_pool(x, packed, *geometry, act, out, *pool))  # noqa: B023
            assert torch.equal(y, OPS.max_pool(want, out, *pool))
            assert y.is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match="packed_conv_pool: want two numbers"):
        OPS.packed_conv_pool(x, packed, *geometry, act, out, [1], *pool[1:])
    with pytest.raises(RuntimeError, match="packed_conv_pool: want windows that touch the map"):
        OPS.packed_conv_pool(x, packed, *geometry, act, [1000, 1], *pool)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(2, 6, 19, 5, 7, 2, 2), (1, 64, 8, 3, 40, 2, 2), (1, 4, 33, 2, 3, 3, 1), (1, 18, 1, 9, 4, 1, 4)], ids=str
)
def test_packed_conv_transpose(kernel_set, dtype, shape):  # noqa: F811
    n, c, k, h, w, kh, kw = shape
    torch.manual_seed(0)
    weight, bias = (torch.randn(c, k, kh, kw) / c**0.5).bfloat16().float(), torch.randn(k).bfloat16().float()
    packed = OPS.pack_conv_transpose(weight, bias, 1, dtype)
    x, more = last(torch.randn(n, c, h, w)).to(dtype), last(torch.randn(n, k, h * kh, w * kw)).to(dtype)
    for act, add in itertools.product(range(5), (None, more)):
        geometry = [kh, kw], [0, 0], [1, 1]
        y = same_on_two_threads(lambda: OPS.packed_conv_transpose(x, packed, *geometry, act, add))  # noqa: B023

        def reference(call):
            x, weight, bias = call
            y = F.conv_transpose2d(x, weight, bias, (kh, kw))
            return [last(ACTS[act](y if add is None else y + add.to(y.dtype)))]  # noqa: B023

        judge(f"{shape} {act}", ["outputs[0]"], [y], reference, (x, weight.to(dtype), bias.to(dtype)), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(2, 6, 19, 5, 7, 2, 2), (1, 64, 3, 3, 400, 2, 2), (1, 4, 33, 2, 3, 3, 1), (0, 4, 5, 2, 2, 2, 2)], ids=str
)
def test_packed_conv_transpose_argmax(kernel_set, dtype, shape):  # noqa: F811
    """The classes that PyTorch's argmax finds in the convolution's result, NaN among it."""
    n, c, k, h, w, kh, kw = shape
    torch.manual_seed(0)
    packed = OPS.pack_conv_transpose(torch.randn(c, k, kh, kw).round(), torch.randn(k).round(), 1, dtype)  # many are equal
    x = torch.randn(n, c, h, w).round().to(dtype)
    if n:
        x[0, 0, 0, 0] = math.nan
    call = packed, [kh, kw], [0, 0], [1, 1]
    for act, (size, integer) in itertools.product(range(6), [(1, torch.uint8), (4, torch.int32), (8, torch.int64)]):
        for layout in (torch.Tensor.contiguous, last):
            classes = same_on_two_threads(lambda: OPS.packed_conv_transpose_argmax(layout(x), *call, act, size))  # noqa: B023
            assert classes.dtype == integer
            assert torch.equal(classes.long(), OPS.packed_conv_transpose(x, *call, act).argmax(1))
    for wrong, said in [((0, 2), "want classes of 1, 4 or 8 bytes"), ((6, 1), "want an activation from 0 to 5")]:
        with pytest.raises(RuntimeError, match=f"packed_conv_transpose_argmax: {said}"):
            OPS.packed_conv_transpose_argmax(x, *call, *wrong)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",  # n, channels, out, h, w, kernel, stride, padding, output_padding, dilation
    [
        (2, 6, 19, 5, 7, (3, 3), (2, 2), (1, 1), (1, 1), (1, 1)),
        (1, 64, 32, 3, 230, (3, 3), (2, 2), (1, 1), (1, 1), (1, 1)),
        (1, 16, 33, 9, 12, (4, 4), (2, 2), (1, 1), (0, 0), (1, 1)),
        (2, 8, 5, 6, 4, (3, 5), (1, 3), (2, 0), (0, 2), (1, 1)),
        (1, 4, 20, 1, 1, (2, 2), (3, 3), (0, 0), (2, 1), (1, 1)),
        (1, 12, 3, 7, 5, (3, 2), (2, 1), (1, 2), (1, 0), (3, 4)),
        (1, 512, 17, 2, 3, (3, 3), (2, 2), (1, 1), (0, 0), (1, 1)),
        (0, 4, 5, 2, 2, (3, 3), (2, 2), (1, 1), (1, 1), (1, 1)),
    ],
    ids=str,
)
def test_packed_conv_transpose_overlap(kernel_set, dtype, shape):  # noqa: F811
    n, c, k, h, w, size, *geometry, more, dilation = shape
    torch.manual_seed(0)
    weight, bias = (torch.randn(c, k, *size) / c**0.5).bfloat16().float(), torch.randn(k).bfloat16().float()
    packed = OPS.pack_conv_transpose_overlap(weight, bias, 1, dtype)
    x = last(torch.randn(n, c, h, w)).to(dtype)
    for act in range(6):
        call = packed, *geometry, dilation, more, act
        y = same_on_two_threads(lambda: OPS.packed_conv_transpose_overlap(x, *call))  # noqa: B023
        assert torch.equal(y, OPS.packed_conv_transpose_overlap(x.contiguous(), *call))
        assert y.is_contiguous(memory_format=torch.channels_last)

        def reference(call):
            x, weight, bias = call
            return [last(ACTS[act](F.conv_transpose2d(x, weight, bias, *geometry, more, 1, dilation)))]  # noqa: B023

        judge(f"{shape} {act}", ["outputs[0]"], [y], reference, (x, weight.to(dtype), bias.to(dtype)), dtype)
    for wrong, said in [
        ((*geometry, dilation, (-1, 0), 0), "want two numbers of output_padding"),
        (((1, 1), (9, 9), (1, 1), (0, 0), 0), "want a map that leaves some"),
    ]:
        with pytest.raises(RuntimeError, match=f"packed_conv_transpose_overlap: {said}"):
            OPS.packed_conv_transpose_overlap(x, packed, *wrong)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",  # n, channels, between, out, h, w, kernel and stride of the first, of the second, its dilation
    [
        (2, 3, 32, 48, 37, 41, 3, 2, 3, 2, 1),
        (1, 3, 16, 5, 9, 600, 3, 1, 3, 1, 1),
        (2, 4, 48, 33, 12, 19, 3, 2, 5, 1, 1),
        (1, 1, 16, 8, 17, 11, 2, 1, 3, 1, 3),
        (3, 5, 64, 17, 5, 3, 1, 1, 3, 2, 1),
        (0, 3, 16, 4, 8, 8, 3, 2, 3, 1, 1),
    ],
    ids=str,
)
def test_packed_conv_ds_conv(kernel_set, dtype, shape):  # noqa: F811
    """The bits of the two kernels that it joins, from image to image and row to row."""
    n, c, between, k, h, w, size, stride, dw_size, dw_stride, dilation = shape
    torch.manual_seed(0)
    first = OPS.pack_conv(torch.randn(between, c, size, size) / (c * size**2) ** 0.5, torch.randn(between), 1, dtype)
    depthwise = torch.randn(between, 1, dw_size, dw_size) / dw_size, torch.randn(between)
    second = OPS.pack_ds_conv(*depthwise, torch.randn(k, between, 1, 1) / between**0.5, torch.randn(k), dtype)
    geometry = [stride, stride], [size // 2, size // 2], [1, 1]
    after = [dw_stride, dw_stride], [dilation * (dw_size // 2)] * 2, [dilation, dilation]
    for layout, acts in ((torch.Tensor.contiguous, (1, 1, 1)), (last, (4, 0, 3))):
        x = layout(torch.randn(n, c, h, w)).to(dtype)
        call = (x, first, *geometry, acts[0], second, *after, *acts[1:])
        y = same_on_two_threads(lambda: OPS.packed_conv_ds_conv(*call))  # noqa: B023
        want = OPS.packed_ds_conv(OPS.packed_conv(x, first, *geometry, acts[0]), second, *after, *acts[1:])
        assert torch.equal(y, want)
        assert y.is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match="packed_conv_ds_conv: want dense weights from pack_conv"):
        OPS.packed_conv_ds_conv(x, first, *geometry, 0, first, *after, 0, 0)
    with pytest.raises(RuntimeError, match="packed_conv_ds_conv: want an activation from 0 to 5"):
        OPS.packed_conv_ds_conv(x, first, *geometry, 0, second, *after, 0, 9)
    with pytest.raises(RuntimeError, match="packed_conv_ds_conv: want pairs"):
        OPS.packed_conv_ds_conv(x, first, *geometry, 0, second, [1], *after[1:], 0, 0)


def test_maps_to_uint8_and_back_have_pytorchs_bits(kernel_set):  # noqa: F811
    pytest.importorskip("torchao.quantization.pt2e")
    import torch.ao.quantization.fx._decomposed  # defines the operations

    quantize, dequantize = (getattr(torch.ops.quantized_decomposed, f"{name}quantize_per_tensor").default for name in ("", "de"))
    torch.manual_seed(0)
    for shape in [(2, 3, 5, 33), (1, 19, 4, 7), (1, 64, 8, 8), (1, 1, 1, 1), (0, 3, 2, 2)]:
        for scale, zero in [(0.02, 0), (1 / 3, 128), (1e-3, 255), (7.5, 9)]:
            x = torch.randn(shape) * 100 * scale
            x.view(-1)[::3] = torch.arange(len(x.view(-1)[::3])) * scale * 0.5  # halves
            for layout in (last, torch.Tensor.contiguous):
                q = same_on_two_threads(lambda: OPS.quantize_map(layout(x), scale, zero))  # noqa: B023
                assert torch.equal(q, quantize(x, scale, zero, 0, 255, torch.uint8))
                assert q.is_contiguous(memory_format=torch.channels_last)
                back = same_on_two_threads(lambda: OPS.dequantize_map(layout(q), scale, zero))  # noqa: B023
                assert torch.equal(back, dequantize(q, scale, zero, 0, 255, torch.uint8))
    for op, x in ((OPS.quantize_map, torch.randn(1, 3, 4, 5)), (OPS.dequantize_map, torch.zeros(1, 3, 4, 5, dtype=torch.uint8))):
        torch.library.opcheck(op.default, (x, 0.1, 3), test_utils=("test_schema", "test_faketensor"))
    with pytest.raises(RuntimeError, match="zero point"):
        OPS.quantize_map(torch.randn(1, 3, 4, 5), 0.1, 300)
    with pytest.raises(RuntimeError, match="float32 to quantize"):
        OPS.quantize_map(torch.randn(1, 3, 4, 5).double(), 0.1, 3)


def test_wrong_arguments_raise():
    x = torch.randn(1, 4, 5, 5)
    vector = torch.randn(4)
    packed = OPS.pack_conv_transpose(torch.randn(4, 3, 2, 2), torch.randn(3), 1)
    dense = OPS.pack_conv(torch.randn(3, 4, 2, 2), torch.randn(3), 1)
    odd = OPS.pack_conv_transpose(torch.randn(5, 3, 2, 2), torch.randn(3), 1, torch.bfloat16)
    pair, zeros, ones = [2, 2], [0, 0], [1, 1]
    wrong = [
        ("float32 or bfloat16", lambda: OPS.concat_affine([x.double()], None, None, None, None, False)),
        ("one size", lambda: OPS.concat_affine([x, x[:, :, :4]], None, None, None, None, False)),
        ("add", lambda: OPS.concat_affine([x, x], x, None, None, None, False)),
        ("neither", lambda: OPS.concat_affine([x], None, vector, None, None, False)),
        ("each channel", lambda: OPS.concat_affine([x, x], None, vector, vector, None, False)),
        ("float32 or bfloat16", lambda: OPS.resize(x.double(), (5, 5), False, True)),
        ("sizes", lambda: OPS.resize(x, (0, 5), False, True)),
        ("factors", lambda: OPS.repeat_pixels(x, 0, 1)),
        ("1, 4 or 8 bytes", lambda: OPS.argmax(x, 2)),
        ("some classes", lambda: OPS.argmax(x[:, :0], 1)),
        ("float16 or bfloat16", lambda: OPS.argmax(x.int(), 1)),
        ("float32 or bfloat16", lambda: OPS.max_pool(x.double(), pair, pair, pair, zeros, ones)),
        ("two numbers", lambda: OPS.max_pool(x, pair, [2], pair, zeros, ones)),
        ("stride of the kernel", lambda: OPS.packed_conv_transpose(x, packed, ones, zeros, ones, 0)),
        ("stride of the kernel", lambda: OPS.packed_conv_transpose(x, packed, pair, ones, ones, 0)),
        ("even", lambda: OPS.packed_conv_transpose(torch.randn(1, 5, 2, 2).bfloat16(), odd, pair, zeros, ones, 0)),
        ("pack_conv_transpose", lambda: OPS.packed_conv_transpose(x, dense, pair, zeros, ones, 0)),
        ("groups", lambda: OPS.pack_conv_transpose(torch.randn(4, 3, 2, 2), torch.randn(3), 2)),
        ("bias", lambda: OPS.pack_conv_transpose(torch.randn(4, 3, 2, 2), torch.randn(4), 1)),
    ]  # fmt: skip
    for message, call in wrong:
        with pytest.raises(RuntimeError, match=message):
            call()
