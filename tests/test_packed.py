"""The private ops over packed weights, against compositions of F.conv2d by the error rule."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import EFFORT
from harness import judge

from segfast import _backend

pytestmark = pytest.mark.skipif(
    _backend._C is None or _backend.requested == "reference", reason="no kernels: nothing is packed without them"
)
if _backend._C is not None:
    from segfast.ops._packed import Int8Conv, int8_block, int8_block_reference, int8_conv_reference
    from segfast.optimize._int8 import lower_int8
    from segfast.optimize._memory import place_next

ACTS = [lambda x: x, F.relu, F.relu6, F.silu, F.hardswish, F.leaky_relu]
SETS = _backend._C.cpu_features()["kernel_sets"] if _backend._C is not None else []
OPS = torch.ops.segfast

# n, channels, expanded channels, channels out, h, w, kernel, stride, padding, dilation
SHAPES = [
    (1, 16, 48, 24, 13, 17, 3, 1, 1, 1),
    (2, 3, 7, 5, 9, 31, 3, 2, 1, 1),
    (1, 24, 144, 33, 15, 40, 5, 2, 2, 1),
    (2, 8, 20, 19, 11, 12, 5, 1, 2, 1),
    (1, 17, 40, 65, 14, 19, 3, 1, 2, 2),
    (1, 4, 18, 1, 6, 5, 1, 1, 0, 1),
    (1, 5, 33, 16, 10, 9, 3, 3, 0, 1),
    (1, 64, 384, 64, 6, 130, 3, 2, 1, 1),
    (1, 6, 9, 10, 3, 2, 3, 1, 3, 1),
    (2, 12, 16, 12, 9, 40, 3, 1, 9, 9),
    (0, 6, 9, 10, 5, 5, 3, 1, 1, 1),
]


@pytest.fixture(params=SETS)
def kernel_set(request):
    _backend._C.set_kernel_set(request.param)
    yield request.param
    _backend._C.set_kernel_set("auto")


def last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def weight(k: int, c: int, size: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Values that bfloat16 has too."""
    w, b = torch.randn(k, c, size, size) / (c * size * size) ** 0.5, torch.randn(k)
    return w.bfloat16().float(), b.bfloat16().float()


def conv(x, w, b, act=0, add=None, **options):
    y = F.conv2d(x, w, b, **options)
    return last(ACTS[act](y if add is None else y + add))


DTYPES = [torch.float32, torch.bfloat16]


def check(title: str, kernel, reference, x, weights, added: bool) -> None:
    """One call within the error rule, and its bits the same on one and on two threads."""
    torch.manual_seed(1)
    add = last(torch.randn_like(reference((x, None, *weights)))) if added else None
    call = (x, add, *weights)
    y = kernel(x, add)
    judge(title, ["outputs[0]"], [y], lambda call: [reference(call)], call, x.dtype)
    threads = torch.get_num_threads()
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            assert torch.equal(kernel(x, add), y)
    finally:
        torch.set_num_threads(threads)
    if added and y.numel():  # segfast.optimize may put the result where the summand lies
        place_next(add.data_ptr(), add.numel() * add.element_size())
        try:
            over = kernel(x, add)
        finally:
            place_next(0, 0)
        assert over.data_ptr() == add.data_ptr()
        assert torch.equal(over, y)


@pytest.mark.drawn(1 / 2)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["dense", "depthwise", "pointwise", "grouped", "separable", "inverted"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_conv2d(kernel_set, dtype, kind, shape):
    n, c, e, k, h, w, size, stride, padding, dilation = shape
    torch.manual_seed(0)
    index = SHAPES.index(shape)
    acts = [(index + i) % 6 for i in (0, 1, 2)]
    added = index % 2 == 0
    pair = lambda v: [v, v]  # noqa: E731
    geometry = {"stride": stride, "padding": padding, "dilation": dilation}
    pairs = [pair(stride), pair(padding), pair(dilation)]
    x = last(torch.randn(n, c, h, w)).to(dtype)
    if kind == "dense":
        weights = weight(k, c, size)
        packed = OPS.pack_conv(*weights, 1, dtype)
        kernel = lambda x, add: OPS.packed_conv(x, packed, *pairs, acts[0], add)  # noqa: E731
        reference = lambda call: conv(call[0], call[2], call[3], acts[0], call[1], **geometry)  # noqa: E731
    elif kind == "pointwise":
        weights = weight(k, c)
        packed = OPS.pack_conv(*weights, 1, dtype)
        kernel = lambda x, add: OPS.packed_conv(x, packed, [1, 1], [0, 0], [1, 1], acts[0], add)  # noqa: E731
        reference = lambda call: conv(call[0], call[2], call[3], acts[0], call[1])  # noqa: E731
    elif kind == "grouped":
        groups = 2 + index % 3
        weights = weight(k * groups, 2 * c)
        x = last(torch.randn(n, 2 * c * groups, h, w)).to(dtype)
        packed = OPS.pack_conv(*weights, groups, dtype)
        kernel = lambda x, add: OPS.packed_conv(x, packed, [1, 1], [0, 0], [1, 1], acts[0], add)  # noqa: E731
        reference = lambda call: conv(call[0], call[2], call[3], acts[0], call[1], groups=groups)  # noqa: E731
    elif kind == "depthwise":
        weights = weight(c, 1, size)
        packed = OPS.pack_conv(*weights, c, dtype)
        kernel = lambda x, add: OPS.packed_conv(x, packed, *pairs, acts[0], add)  # noqa: E731
        reference = lambda call: conv(call[0], call[2], call[3], acts[0], call[1], groups=c, **geometry)  # noqa: E731
    elif kind == "separable":
        weights = (*weight(c, 1, size), *weight(k, c))
        packed = OPS.pack_ds_conv(*weights, dtype)
        kernel = lambda x, add: OPS.packed_ds_conv(x, packed, *pairs, acts[1], acts[0], add)  # noqa: E731

        def reference(call):
            x, add, dw, dw_b, pw, pw_b = call
            return conv(conv(x, dw, dw_b, acts[1], groups=c, **geometry), pw, pw_b, acts[0], add)

    else:
        weights = (*weight(e, c), *weight(e, 1, size), *weight(k, e))
        packed = OPS.pack_inverted_residual(*weights, dtype)
        kernel = lambda x, add: OPS.packed_inverted_residual(x, packed, *pairs, acts[2], acts[1], acts[0], add)  # noqa: E731

        def reference(call):
            x, add, ex, ex_b, dw, dw_b, pw, pw_b = call
            x = conv(conv(x, ex, ex_b, acts[2]), dw, dw_b, acts[1], groups=e, **geometry)
            return conv(x, pw, pw_b, acts[0], add)

    check(f"{kind} {shape} {dtype}", kernel, reference, x, [w.to(dtype) for w in weights], added)


CHAINS = [
    # n, channels of the enlarged map and of the other, out, scores, small map, map, kernel, padding, align_corners
    (1, 32, 16, 48, 19, (5, 7), (20, 28), 3, 1, True),
    (2, 20, 7, 16, 3, (4, 6), (19, 30), 3, 1, False),
    (1, 8, 12, 32, 65, (1, 1), (6, 200), 3, 2, False),
    (1, 8, 5, 16, 4, (3, 4), (15, 21), 5, 0, True),
    (2, 8, 5, 16, 1, (2, 9), (2, 9), 1, 0, True),
    (0, 8, 5, 16, 1, (2, 9), (2, 9), 3, 1, True),
]


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("shape", CHAINS, ids=str)
def test_chain_with_an_enlarged_map(kernel_set, shape, behind):
    """resize, cat, depthwise, pointwise and one more: the first part as a product for each tap on the small map."""
    n, c0, c1, k, scores, small, size, kernel_size, padding, align_corners = shape
    torch.manual_seed(0)
    below, x = last(torch.randn(n, c0, *small)), last(torch.randn(n, c1, *size))
    (dw, dw_b), (pw, pw_b), (sc, sc_b) = weight(c0 + c1, 1, kernel_size), weight(k, c0 + c1), weight(scores, k)
    taps = torch.einsum("kc,ct->tkc", pw[:, :c0, 0, 0].double(), dw[:c0, 0].flatten(1).double()).flatten(0, 1)
    products = OPS.pack_conv(taps[:, :, None, None].float(), torch.zeros(len(taps)), 1)
    packed = OPS.pack_ds_conv(
        dw[c0:], dw_b[c0:], pw[:, c0:], (pw_b.double() + pw[:, :c0, 0, 0].double() @ dw_b[:c0].double()).float()
    )
    final = OPS.pack_conv(sc, sc_b, 1) if behind else None
    ones, zeros = [1, 1], [0, 0]

    def kernel(x, add):
        z = OPS.packed_conv(below, products, ones, zeros, ones, 0)
        return OPS.packed_ds_conv_chain(x, packed, ones, [padding] * 2, ones, 0, 1, z, align_corners, final, 5 if behind else 0)

    def reference(call):
        x, _, below, dw, dw_b, pw, pw_b, sc, sc_b = call
        whole = torch.cat([F.interpolate(below, size, mode="bilinear", align_corners=align_corners), x], 1)
        y = conv(conv(whole, dw, dw_b, groups=c0 + c1, padding=padding), pw, pw_b, 1)
        return conv(y, sc, sc_b, 5) if behind else y

    if n == 0:  # the small map's products have no numbers; the kernel is not asked
        assert OPS.packed_ds_conv_chain(x, packed, ones, [1, 1], ones, 0, 1, None, True, final, 0).shape[0] == 0
        return
    check(f"chain {shape}", kernel, reference, x, [below, dw, dw_b, pw, pw_b, sc, sc_b], False)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chain_with_scores(kernel_set, dtype, shape):
    n, c, e, k, h, w, size, stride, padding, dilation = shape
    e += e % 2
    torch.manual_seed(0)
    acts = [(SHAPES.index(shape) + i) % 6 for i in (0, 1, 2)]
    x = last(torch.randn(n, c, h, w)).to(dtype)
    weights = (*weight(c, 1, size), *weight(e, c), *weight(k, e))
    packed, final = OPS.pack_ds_conv(*weights[:4], dtype), OPS.pack_conv(*weights[4:], 1, dtype)
    pairs = [[stride] * 2, [padding] * 2, [dilation] * 2]
    kernel = lambda x, add: OPS.packed_ds_conv_chain(x, packed, *pairs, *acts[:2], None, False, final, acts[2])  # noqa: E731

    def reference(call):
        x, _, dw, dw_b, pw, pw_b, sc, sc_b = call
        y = conv(x, dw, dw_b, acts[0], groups=c, stride=stride, padding=padding, dilation=dilation)
        return conv(conv(y, pw, pw_b, acts[1]), sc, sc_b, acts[2])

    check(f"scores {shape} {dtype}", kernel, reference, x, [w.to(dtype) for w in weights], False)


# (n, c, k, h, w, padding, dilation): padded channels, odd maps, less than a tile, taps all outside, tiles of several blocks
WINOGRAD_SHAPES = [
    (1, 16, 16, 8, 8, 1, 1), (2, 5, 33, 7, 9, 1, 1), (1, 25, 40, 17, 30, 4, 4), (1, 64, 20, 3, 5, 0, 1), (3, 8, 48, 1, 1, 1, 1),
    (1, 3, 17, 23, 40, 2, 2), (1, 130, 16, 6, 40, 1, 1), (1, 7, 1, 5, 6, 3, 2), (1, 4, 8, 4, 4, 16, 16), (0, 4, 8, 4, 4, 1, 1),
]  # fmt: skip


@pytest.mark.parametrize("shape", WINOGRAD_SHAPES, ids=str)
def test_winograd_against_conv2d(kernel_set, shape):
    n, c, k, h, w, padding, dilation = shape
    torch.manual_seed(0)
    index = WINOGRAD_SHAPES.index(shape)
    act, added = index % 6, index % 2 == 0
    weights = weight(k, c, 3)
    packed = OPS.pack_winograd(*weights, 1)
    pairs = [[1, 1], [padding, padding], [dilation, dilation]]
    kernel = lambda x, add: OPS.packed_winograd(x, packed, *pairs, act, add)  # noqa: E731
    reference = lambda call: conv(call[0], call[2], call[3], act, call[1], padding=padding, dilation=dilation)  # noqa: E731
    x = last(torch.randn(n, c, h, w))
    check(f"winograd {shape}", kernel, reference, x, list(weights), added)


@pytest.mark.parametrize(
    "first, behind, factors", [(16, 0, (2, 2)), (5, 20, (2, 1)), (33, 7, (1, 1)), (24, 24, (3, 2)), (1, 3, (1, 4))]
)
def test_winograd_of_pieces(first, behind, factors, kernel_set):
    """The bits of the same call on the map that the pieces make."""
    torch.manual_seed(0)
    for h, w, padding, dilation in [(3, 5, 1, 1), (4, 9, 2, 2), (1, 6, 1, 1)]:
        x = last(torch.randn(2, first, h, w))
        whole = x.repeat_interleave(factors[0], 2).repeat_interleave(factors[1], 3)
        more = torch.randn(2, behind, *whole.shape[2:]) if behind else None
        whole = whole if more is None else torch.cat([whole, more], 1)
        packed = OPS.pack_winograd(*weight(18, first + behind, 3), 1)
        geometry = [1, 1], [padding, padding], [dilation, dilation], 1
        want = OPS.packed_winograd(last(whole), packed, *geometry)
        assert torch.equal(OPS.packed_winograd(x, packed, *geometry, None, more, factors), want)
        add = last(torch.randn_like(want))
        same = OPS.packed_winograd(x, packed, *geometry, add, more, factors)
        assert torch.equal(same, OPS.packed_winograd(last(whole), packed, *geometry, add))


def test_winograd_is_as_exact_as_the_direct_form(kernel_set):
    """Over many channels the root mean square of its errors stays below twice that of the direct kernel."""
    torch.manual_seed(0)
    w, b = weight(32, 96, 3)
    x = last(torch.randn(2, 96, 24, 24))
    exact = torch.nn.functional.conv2d(x.double(), w.double(), b.double(), padding=1)
    ones = [1, 1]
    error = lambda y: float((y.double() - exact).square().mean().sqrt())  # noqa: E731
    fast = OPS.packed_winograd(x, OPS.pack_winograd(w, b, 1), ones, ones, ones, 0)
    direct = OPS.packed_conv(x, OPS.pack_conv(w, b, 1), ones, ones, ones, 0)
    assert 0 < error(fast) <= 2 * error(direct)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_packed_under_one_kernel_set_run_under_another(dtype):
    torch.manual_seed(0)
    w, b = weight(40, 24, 3)
    x = last(torch.randn(1, 24, 9, 21)).to(dtype)
    low = [t.to(dtype) for t in (w, b)]
    try:
        for packing in SETS:
            _backend._C.set_kernel_set(packing)
            packed = OPS.pack_conv(w, b, 1, dtype)
            for running in SETS:
                _backend._C.set_kernel_set(running)
                y = OPS.packed_conv(x, packed, [1, 1], [1, 1], [1, 1], 1)
                judge(f"{packing} {running}", ["outputs[0]"], [y], lambda c: [conv(*c, act=1, padding=1)], (x, *low), x.dtype)
    finally:
        _backend._C.set_kernel_set("auto")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_stays(kernel_set, dtype):
    packed = OPS.pack_conv(*weight(16, 16), 1, dtype)
    x = last(torch.full((1, 16, 2, 2), float("nan"))).to(dtype)
    for act in range(5):
        assert OPS.packed_conv(x, packed, [1, 1], [0, 0], [1, 1], act).isnan().all()


def test_odd_channels_take_nothing_from_the_next_pixel(kernel_set):
    """A word of two bfloat16 must not reach past a pixel's last channel: zero times what lies there may be NaN."""
    x = last(torch.randn(1, 3, 6, 40)).bfloat16()
    x[:, :, :, 20] = float("nan")
    ones, zeros = [1, 1], [0, 0]
    whole = torch.arange(40) != 20
    dense = OPS.packed_conv(x, OPS.pack_conv(*weight(8, 3), 1, x.dtype), ones, zeros, ones, 0)
    separable = OPS.packed_ds_conv(x, OPS.pack_ds_conv(*weight(3, 1), *weight(8, 3), x.dtype), ones, zeros, ones, 0, 0)
    packed = OPS.pack_inverted_residual(*weight(5, 3), *weight(5, 1), *weight(8, 5), x.dtype)
    inverted = OPS.packed_inverted_residual(x, packed, ones, zeros, ones, 0, 0, 0)
    for y in (dense, separable, inverted):
        assert torch.equal(y.isnan().any(1)[0, 0], ~whole)


def test_wrong_arguments_raise():
    packed = OPS.pack_conv(*weight(8, 4, 3), 1)
    wide = OPS.pack_winograd(*weight(8, 8, 3), 1)
    block, products = OPS.pack_ds_conv(*weight(4, 1, 3), *weight(16, 4)), torch.randn(1, 144, 2, 2)
    x = last(torch.randn(1, 4, 5, 5))
    ones, zeros = [1, 1], [0, 0]
    assert OPS.packed_conv(x, packed, ones, zeros, ones, 0).shape == (1, 8, 3, 3)
    wrong = [
        ("channels", lambda: OPS.packed_conv(x[:, :3], packed, ones, zeros, ones, 0)),
        ("dtype of x", lambda: OPS.packed_conv(x.bfloat16(), packed, ones, zeros, ones, 0)),
        ("float32 or bfloat16", lambda: OPS.pack_conv(*weight(8, 4, 3), 1, torch.float16)),
        ("float32", lambda: OPS.packed_conv(x.double(), packed, ones, zeros, ones, 0)),
        ("pairs", lambda: OPS.packed_conv(x, packed, [0, 1], zeros, ones, 0)),
        ("pairs", lambda: OPS.packed_conv(x, packed, [1], zeros, ones, 0)),
        ("activation", lambda: OPS.packed_conv(x, packed, ones, zeros, ones, 6)),
        ("fits", lambda: OPS.packed_conv(x, packed, ones, zeros, [3, 3], 0)),
        ("add", lambda: OPS.packed_conv(x, packed, ones, zeros, ones, 0, x)),
        ("pack function", lambda: OPS.packed_conv(x, packed[:-1], ones, zeros, ones, 0)),
        ("pack function", lambda: OPS.packed_conv(x, torch.zeros_like(packed), ones, zeros, ones, 0)),
        ("pack_ds_conv", lambda: OPS.packed_ds_conv(x, packed, ones, zeros, ones, 0, 0)),
        ("pack_ds_conv", lambda: OPS.packed_ds_conv_chain(x, packed, ones, zeros, ones, 0, 0, None, True, None, 0)),
        ("want last", lambda: OPS.packed_ds_conv_chain(x, block, ones, zeros, ones, 0, 0, None, True, packed, 0)),
        ("want low", lambda: OPS.packed_ds_conv_chain(x, block, ones, zeros, ones, 0, 0, x, True, None, 0)),
        ("want low", lambda: OPS.packed_ds_conv_chain(x, block, [2, 2], zeros, ones, 0, 0, products, True, None, 0)),
        ("pack_inverted_residual", lambda: OPS.packed_inverted_residual(x, packed, ones, zeros, ones, 0, 0, 0)),
        ("pack_winograd", lambda: OPS.packed_winograd(x, packed, ones, zeros, ones, 0)),
        ("stride 1", lambda: OPS.packed_winograd(x, OPS.pack_winograd(*weight(8, 4, 3), 1), [2, 2], zeros, ones, 0)),
        ("more", lambda: OPS.packed_winograd(x, wide, ones, zeros, ones, 0, None, x[:, :, 1:])),
        ("channels", lambda: OPS.packed_winograd(x, wide, ones, zeros, ones, 0, None, x[:, 1:])),
        ("factors", lambda: OPS.packed_winograd(x, wide, ones, zeros, ones, 0, None, x, [0, 1])),
        ("more of the size", lambda: OPS.packed_winograd(x, wide, ones, zeros, ones, 0, None, x, [2, 2])),
        ("3, 3", lambda: OPS.pack_winograd(*weight(8, 4, 5), 1)),
        ("3, 3", lambda: OPS.pack_winograd(*weight(8, 4, 3), 1, torch.bfloat16)),
        ("bias", lambda: OPS.pack_conv(torch.randn(8, 4, 3, 3), torch.randn(4), 1)),
        ("groups", lambda: OPS.pack_conv(torch.randn(8, 1, 3, 3), torch.randn(8), 2)),
        ("taps", lambda: OPS.pack_conv(torch.randn(8, 4, 9, 9), torch.randn(8), 1)),
        ("fit", lambda: OPS.pack_ds_conv(*weight(4, 1, 3), *weight(8, 5))),
    ]
    for message, call in wrong:
        with pytest.raises(RuntimeError, match=message):
            call()


def int8_conv(k: int, c: int, size: int, act: int, zero: int, extreme: bool = False) -> Int8Conv:
    """Random weights and a bias, and a scale of the result that spreads it over the 256 values."""
    if extreme:
        weight = torch.tensor([-128, 127], dtype=torch.int8)[torch.randint(0, 2, (k, c, size, size))]
    else:
        weight = torch.randint(-128, 128, (k, c, size, size), dtype=torch.int8)
    scale = torch.rand(k) * 0.02 + 0.001
    out = 0.02 * 0.01 * 100 * 50 * (c * size * size) ** 0.5 / 64
    return Int8Conv(weight, scale, torch.randn(k), act, out, zero)


def int8_maps(kind: str, shape: tuple, extreme: bool = False):
    """(channels of x, groups, convolutions) of a kind of block."""
    _, c, e, k, _, _, size = shape[:7]
    zeros = [0, 64, 128, 7]
    act = (0, 1, 2)
    if kind == "dense":
        return c, 1, [int8_conv(k, c, size, 0, 100, extreme)]
    if kind == "pointwise":
        return c, 1, [int8_conv(k, c, 1, 1, 3, extreme)]
    if kind == "depthwise":
        return c, c, [int8_conv(c, 1, size, 2, zeros[c % 4], extreme)]
    if kind == "separable":
        return c, c, [int8_conv(c, 1, size, act[c % 3], 40, extreme), int8_conv(k, c, 1, act[k % 3], 90, extreme)]
    convs = [int8_conv(e, c, 1, act[e % 3], 11, extreme), int8_conv(e, 1, size, 2, 0, extreme)]
    return c, e, [*convs, int8_conv(k, e, 1, 0, 128, extreme)]


def same_on_threads(run, *args) -> torch.Tensor:
    before = _backend._C.kernel_calls()["packed_int8"]
    y = run(*args)
    assert _backend._C.kernel_calls()["packed_int8"] == before + 1, "the kernel answered, not the reference"
    for number in (1, 2):
        torch.set_num_threads(number)
        assert torch.equal(run(*args), y)
    return y


@pytest.mark.drawn(1 / 2)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["dense", "depthwise", "pointwise", "separable", "inverted"])
def test_int8_has_the_bits_of_its_reference(kernel_set, kind, shape):
    torch.manual_seed(0)
    n, _, _, _, h, w, _, stride, padding, dilation = shape
    geometry = ((1, 1), (0, 0), (1, 1)) if kind == "pointwise" else tuple((v, v) for v in (stride, padding, dilation))
    zeros = ((0, False), (255, True), (131, False))
    for x_zero, extreme in zeros if h * w < 500 or EFFORT == "full" else zeros[1:2]:
        c, groups, convs = int8_maps(kind, shape, extreme)
        run = int8_block(0.02, x_zero, convs, stride=geometry[0], padding=geometry[1], dilation=geometry[2], groups=groups)
        x = last(torch.randint(0, 256, (n, c, h, w), dtype=torch.uint8))
        want = int8_block_reference(x, 0.02, x_zero, convs, *geometry, groups)
        assert torch.equal(same_on_threads(run, x), want)
        add = last(torch.randint(0, 256, want.shape, dtype=torch.uint8))
        want = int8_block_reference(x, 0.02, x_zero, convs, *geometry, groups, add, 0.05, 77)
        assert torch.equal(same_on_threads(run, x, add, 0.05, 77), want)
        if n and not extreme:
            assert len(want.unique()) > 8, "the results say something"


def test_int8_of_every_value_with_extreme_weights(kernel_set):
    """All 256 activations by the weights of the largest sums, for every zero point of a coarse grid and every activation."""
    x = last(torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 8, 16, 16))
    weights = torch.tensor([-128, -127, -1, 0, 1, 126, 127], dtype=torch.int8)
    for zero in (0, 1, 127, 128, 254, 255):
        for act in (0, 1, 2):
            for out_scale in (1e-3, 0.02, 3.0):
                column = weights.view(-1, 1, 1, 1).expand(7, 8, 1, 1)
                plain = Int8Conv(column, torch.full((7,), 0.01), torch.zeros(7), act, out_scale, 255 - zero)
                want = int8_conv_reference(x, 0.05, zero, plain)
                assert torch.equal(int8_block(0.05, zero, [plain])(x), want)
                depthwise = Int8Conv(
                    weights[torch.arange(8) % 7].view(8, 1, 1, 1).expand(8, 1, 3, 3).contiguous(),
                    torch.full((8,), 0.01), torch.zeros(8), act, out_scale, 255 - zero,
                )  # fmt: skip
                want = int8_conv_reference(x, 0.05, zero, depthwise, padding=(1, 1), groups=8)
                assert torch.equal(int8_block(0.05, zero, [depthwise], padding=(1, 1), groups=8)(x), want)


def test_int8_sums_do_not_saturate(kernel_set):
    """Sums of two products of bytes go beyond 16 bits, and of 2,048 to 2^26."""
    for weight in (-128, 127):
        conv = Int8Conv(torch.full((5, 2048, 1, 1), weight, dtype=torch.int8), torch.ones(5), torch.zeros(5), 0, 1e6, 128)
        x = last(torch.full((1, 2048, 2, 3), 255, dtype=torch.uint8))
        y = int8_block(1.0, 0, [conv])(x)
        assert torch.equal(y, torch.full_like(y, 128 + round(255 * 2048 * weight / 1e6)))


def test_int8_halves_go_to_the_even_integer(kernel_set):
    conv = Int8Conv(torch.ones(1, 1, 1, 1, dtype=torch.int8), torch.ones(1), torch.zeros(1), 0, 2.0, 0)
    x = last(torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16))
    want = [(q // 2) + (q % 4 == 3) for q in range(256)]
    assert int8_block(1.0, 0, [conv])(x).flatten().tolist() == want


def test_int8_is_within_a_step_of_the_real_block():
    """Quantised maps between the convolutions and all: the error against real arithmetic is that of rounding each map once."""
    torch.manual_seed(0)
    conv = int8_conv(24, 16, 1, 1, 0)
    x = last(torch.randint(0, 256, (1, 16, 9, 9), dtype=torch.uint8))
    real = F.conv2d((x.double() - 128) * 0.02, conv.weight.double() * conv.scale.double().view(-1, 1, 1, 1), conv.bias.double())
    y = int8_block(0.02, 128, [conv])(x).double() * conv.out_scale
    assert (y - real.clamp(0, 255 * conv.out_scale)).abs().max() <= conv.out_scale


def test_int8_wrong_arguments_raise():
    conv = int8_conv(8, 4, 3, 1, 0)
    x = last(torch.randint(0, 256, (1, 4, 5, 5), dtype=torch.uint8))
    run = int8_block(0.1, 0, [conv])
    assert run(x).shape == (1, 8, 3, 3)
    wrong = [
        ("uint8", lambda: run(x.float())),
        ("channels", lambda: run(x[:, :3])),
        ("add", lambda: run(x, x)),
        ("zero point", lambda: run(x, run(x), 0.1, 256)),
        ("zero points", lambda: int8_block(0.1, -1, [conv])),
        ("scales", lambda: int8_block(0.0, 0, [conv])),
        ("activation", lambda: int8_block(0.1, 0, [replace(conv, act=3)])),
        ("int8", lambda: int8_block(0.1, 0, [replace(conv, weight=conv.weight.float())])),
        ("scales > 0", lambda: int8_block(0.1, 0, [replace(conv, scale=-conv.scale)])),
        ("finite", lambda: int8_block(0.1, 0, [replace(conv, bias=conv.bias / 0)])),
        ("bias", lambda: int8_block(0.1, 0, [replace(conv, bias=conv.bias[:4])])),
        ("32768", lambda: int8_block(0.1, 0, [int8_conv(1, 32769, 1, 0, 0)])),
        ("groups", lambda: int8_block(0.1, 0, [conv], groups=2)),
        ("1 x 1", lambda: int8_block(0.1, 0, [int8_conv(4, 1, 3, 0, 0), conv], groups=4)),
        ("one to three", lambda: int8_block(0.1, 0, [])),
        ("fits", lambda: int8_block(0.1, 0, [conv], dilation=(3, 3))(x)),
        ("pack_int8", lambda: OPS.packed_int8(x, x.flatten(), [4, 1, 1], [1, 1], [0, 0], [1, 1])),
    ]
    for message, call in wrong:
        with pytest.raises(RuntimeError, match=message):
            call()


class Blocks(torch.nn.Module):
    """A stem, a separable block, an inverted residual with its sum, and a convolution that stays in float."""

    def __init__(self):
        super().__init__()

        def unit(c, k, size=1, stride=1, groups=1, act=torch.nn.ReLU):
            conv = torch.nn.Conv2d(c, k, size, stride, size // 2, groups=groups, bias=False)
            return torch.nn.Sequential(conv, torch.nn.BatchNorm2d(k), act())

        self.stem = unit(3, 12, 3, 2)
        self.separable = torch.nn.Sequential(unit(12, 12, 3, 2, groups=12), torch.nn.Dropout(), unit(12, 20))
        expand = [unit(20, 60), unit(60, 60, 3, groups=60)]
        self.inverted = torch.nn.Sequential(*expand, unit(60, 20, act=torch.nn.Identity))
        self.last = torch.nn.Conv2d(20, 5, 1)

    def forward(self, x):
        x = self.separable(self.stem(x))
        return self.last(F.relu(x + self.inverted(x)))


def test_a_quantised_graph_runs_on_the_int8_kernels():
    pt2e = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e")
    x86 = pytest.importorskip("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    torch.manual_seed(0)
    model, images = Blocks(), torch.randn(2, 3, 40, 56)
    with torch.no_grad():
        model(images)
    exported = torch.export.export(model.eval(), (images,)).module()
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    with torch.no_grad():
        prepared = pt2e.prepare_pt2e(exported, quantizer)
        prepared(images)
        quantized = pt2e.convert_pt2e(prepared)
        lowered = lower_int8(quantized)
        before = _backend._C.kernel_calls()["packed_int8"]
        got, want, real = lowered(images), quantized(images), model(images)
    assert lowered.int8_calls == [1, 2, 3]
    assert _backend._C.kernel_calls()["packed_int8"] == before + 3
    assert [str(n.target) for n in lowered.graph.nodes if "conv2d" in str(n.target)] == ["aten.conv2d.default"], "the last alone"
    error = (want - real).pow(2).mean().sqrt()
    assert 0 < error < 0.1 * real.std()
    assert (got - want).pow(2).mean().sqrt() < 0.2 * error, "a step here and there, of all that quantising costs"
