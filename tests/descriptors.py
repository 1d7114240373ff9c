"""Random calls of every op, as plain dictionaries that print, travel on a command line and give the same call again.

`DESCRIBE[op](integer, choice)` draws one: `integer(low, high)` is inclusive, `choice(sequence)` picks. test_hypothesis.py and
fuzz.py bring their own two functions. `build(op, descriptor)` makes the Sample. A new op adds a drawer and a builder here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from segfast import ops, testing

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
DESCRIBE: dict[str, Callable[..., dict[str, Any]]] = {}
BUILD: dict[str, Callable[..., testing.Sample]] = {}


def describes(function):
    DESCRIBE[function.__name__.removeprefix("describe_")] = function
    return function


def builds(function):
    BUILD[function.__name__.removeprefix("build_")] = function
    return function


def draw(op: str, integer, choice) -> dict[str, Any]:
    common = {"dtype": choice(list(DTYPES)), "layout": choice(testing.LAYOUTS), "seed": integer(0, 999)}
    return {**common, **DESCRIBE[op](integer, choice)}


def build(op: str, descriptor: dict[str, Any]) -> testing.Sample:
    sample = BUILD[op](**descriptor)
    return testing.Sample(str(descriptor), sample.args, sample.kwargs)


def make(*size: int, dtype: str, layout: str, seed: int) -> torch.Tensor:
    layout = layout if len(size) == 4 else "contiguous"
    return testing.tensor(*size, dtype=DTYPES[dtype], device=torch.device("cpu"), layout=layout, seed=seed)


@describes
def describe_channel_shuffle(integer, choice):
    groups = integer(1, 9)
    return {"size": [integer(0, 3), groups * integer(1, 40), integer(1, 9), integer(1, 9)], "groups": groups}


@builds
def build_channel_shuffle(size, groups, dtype, layout, seed):
    return testing.Sample("", (make(*size, dtype=dtype, layout=layout, seed=seed), groups))


@describes
def describe_concat_shuffle(integer, choice):
    equal = choice((True, False))
    channels = [integer(1, 70)] * 2 if equal else [integer(0, 40) for _ in range(integer(0, 3))] + [integer(1, 9)]
    divisors = [g for g in range(1, sum(channels) + 1) if sum(channels) % g == 0]
    other = choice((None, *testing.LAYOUTS))
    return {
        "size": [integer(0, 3), integer(1, 9), integer(1, 9)],
        "channels": channels,
        "groups": 2 if equal and choice((True, False)) else choice(divisors),
        "other_layout": other,
    }


@builds
def build_concat_shuffle(size, channels, groups, other_layout, dtype, layout, seed):
    n, h, w = size
    layouts = [layout] + [other_layout or layout] * len(channels)
    tensors = [make(n, c, h, w, dtype=dtype, layout=layouts[i], seed=seed + i) for i, c in enumerate(channels)]
    return testing.Sample("", (tensors, groups))


@describes
def describe_pixelwise_kl(integer, choice):
    return {
        "size": [integer(0, 2), integer(1, 40), integer(1, 11), integer(1, 11)],
        "temperature": choice((1.0, 4.0, 0.5)),
        "target": choice((None, "some ignored", "all ignored")),
        "mask": choice((False, True)),
        "reduction": choice(("mean", "sum", "batchmean", "none")),
        "teacher_layout": choice((None, "contiguous", "channels_last")),
    }


@builds
def build_pixelwise_kl(size, temperature, target, mask, reduction, teacher_layout, dtype, layout, seed):
    student = make(*size, dtype=dtype, layout=layout, seed=seed)
    teacher = make(*size, dtype=dtype, layout=teacher_layout or layout, seed=seed + 1)
    kwargs: dict[str, Any] = {"temperature": temperature, "reduction": reduction}
    generator = torch.Generator().manual_seed(seed)
    pixels = (size[0], *size[2:])
    if target:
        kwargs["target"] = torch.randint(0, 19, pixels, generator=generator)
        ignored = torch.rand(pixels, generator=generator) < (2.0 if target == "all ignored" else 0.3)
        kwargs["target"][ignored] = 255
    if mask:
        kwargs["mask"] = torch.rand(pixels, generator=generator) < 0.7
    return testing.Sample("", (student, teacher), kwargs)


def describe_upsampling(integer, choice, classes):
    return {
        "size": [integer(0, 2), integer(1, classes), integer(1, 9), integer(1, 11)],
        "to": [integer(1, 40), integer(1, 50)],
        "align_corners": choice((False, True)),
    }


@describes
def describe_upsample_argmax(integer, choice):
    return {
        **describe_upsampling(integer, choice, 70),
        "classes_dtype": choice(("uint8", "int32", "int64")),
        "return_probability": choice((False, True)),
    }


@builds
def build_upsample_argmax(size, to, align_corners, classes_dtype, return_probability, dtype, layout, seed):
    logits = 3 * make(*size, dtype=dtype, layout=layout, seed=seed)
    kwargs = {"dtype": getattr(torch, classes_dtype), "return_probability": return_probability}
    return testing.Sample("", (logits, tuple(to), align_corners), kwargs)


@describes
def describe_upsample_cross_entropy(integer, choice):
    return {
        **describe_upsampling(integer, choice, 40),
        "target": choice((None, "some ignored", "all ignored")),
        "labels": choice(("int64", "int32", "uint8", "int16")),
        "weight": choice((False, True)),
        "label_smoothing": choice((0.0, 0.0, 0.1, 1.0)),
        "ohem": choice((None, None, [0.3, 0], [0.05, 50])),
        "reduction": choice(("mean", "mean", "sum", "none")),
    }


@builds
def build_upsample_cross_entropy(
    size, to, align_corners, target, labels, weight, label_smoothing, ohem, reduction, dtype, layout, seed
):
    logits = 2 * make(*size, dtype=dtype, layout=layout, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(0, size[1], (size[0], *to), generator=generator)
    if target:
        classes[torch.rand(classes.shape, generator=generator) < (2.0 if target == "all ignored" else 0.3)] = 101
    kwargs = {"ignore_index": 101, "label_smoothing": label_smoothing, "reduction": reduction, "align_corners": align_corners}
    if weight:
        kwargs["weight"] = (0.5 + torch.rand(size[1], generator=generator, dtype=torch.float64)).to(DTYPES[dtype])
    if ohem:
        kwargs |= {"ohem_threshold": ohem[0], "ohem_min_kept": ohem[1]}
    return testing.Sample("", (logits, classes.to(getattr(torch, labels))), kwargs)


@describes
def describe_upsample_pixelwise_kl(integer, choice):
    return {
        **describe_upsampling(integer, choice, 40),
        "teacher_size": [integer(1, 12), integer(1, 12)],
        "temperature": choice((1.0, 4.0, 0.7)),
        "target": choice((None, "some ignored", "all ignored")),
        "mask": choice((False, True)),
        "reduction": choice(("mean", "sum", "batchmean", "none")),
        "teacher_layout": choice((None, "contiguous", "channels_last")),
    }


@describes
def describe_overhaul_loss(integer, choice):
    return {
        "size": [integer(0, 2), integer(1, 40), integer(1, 11), integer(1, 11)],
        "mask": choice((None, "some ignored", "all ignored")),
        "reduction": choice(("mean", "sum", "batchmean")),
        "teacher_layout": choice((None, "contiguous", "channels_last")),
        "rows": choice((1, 1, 1, 40)),
    }


@builds
def build_upsample_pixelwise_kl(
    size, to, align_corners, teacher_size, temperature, target, mask, reduction, teacher_layout, dtype, layout, seed
):
    teacher = make(*size[:2], *teacher_size, dtype=dtype, layout=teacher_layout or layout, seed=seed + 1)
    plain = {"temperature": temperature, "target": target, "mask": mask, "reduction": reduction, "teacher_layout": None}
    sample = build_pixelwise_kl(size=[*size[:2], *to], dtype="float32", layout="contiguous", seed=seed, **plain)
    student = make(*size, dtype=dtype, layout=layout, seed=seed)
    return testing.Sample("", (student, teacher, tuple(to)), {**sample.kwargs, "align_corners": align_corners})


@builds
def build_overhaul_loss(size, mask, reduction, teacher_layout, rows, dtype, layout, seed):
    n, c, h, w = size[0], size[1], rows * size[2], size[3]
    student = make(n, c, h, w, dtype=dtype, layout=layout, seed=seed)
    teacher = make(n, c, h, w, dtype=dtype, layout=teacher_layout or layout, seed=seed + 1)
    margin = -make(c, dtype=dtype, layout="contiguous", seed=seed + 2).abs()
    kwargs: dict[str, Any] = {"reduction": reduction}
    if mask:
        generator = torch.Generator().manual_seed(seed)
        kwargs["mask"] = torch.rand((n, h, w), generator=generator) < (0.0 if mask == "all ignored" else 0.7)
    return testing.Sample("", (student, teacher, margin), kwargs)


def describe_nodes(integer, choice):
    return {
        "node_size": choice((1, 2, 3, [2, 1], [3, 4])),
        "pool": choice(("avg", "max")),
        "grid": choice((None, None, [1, 1], [3, 2], [4, 4])),
    }


def nodes(node_size, pool, grid) -> dict[str, Any]:
    node_size = tuple(node_size) if isinstance(node_size, list) else node_size
    return {"node_size": node_size, "pool": pool, "grid": tuple(grid) if grid else None}


@describes
def describe_pairwise_loss(integer, choice):
    size = [integer(1, 2), integer(1, 24), integer(1, 12), integer(1, 12)]
    return {
        "size": size,
        "teacher_channels": choice((size[1], integer(1, 40))),
        "detach_norm": choice((False, True)),
        **describe_nodes(integer, choice),
    }


@builds
def build_pairwise_loss(size, teacher_channels, detach_norm, node_size, pool, grid, dtype, layout, seed):
    n, c, h, w = size
    student = make(n, c, h, w, dtype=dtype, layout=layout, seed=seed)
    teacher = make(n, teacher_channels, h, w, dtype=dtype, layout=layout, seed=seed + 1)
    return testing.Sample("", (student, teacher), {"detach_norm": detach_norm, **nodes(node_size, pool, grid)})


@describes
def describe_pairwise_cosine(integer, choice):
    # From two channels on: of one, every similarity is 1 or -1, and its gradient nothing but rounding over |x|.
    size = [integer(0, 2), integer(2, 24), integer(1, 10), integer(1, 10)]
    return {"size": size, **describe_nodes(integer, choice)}


@builds
def build_pairwise_cosine(size, node_size, pool, grid, dtype, layout, seed):
    return testing.Sample("", (make(*size, dtype=dtype, layout=layout, seed=seed),), nodes(node_size, pool, grid))


@describes
def describe_ds_conv(integer, choice):
    training = choice((False, True))
    # Training with a 1 x 1 depthwise convolution is not drawn: a scale between two BatchNorms, whose gradients are cancellation.
    kernel, dilation = choice((3, 3, 3, 5) if training else (1, 3, 3, 3, 5)), choice((1, 1, 2))
    padding = choice((None, 0, 1, 2))
    reach = dilation * (kernel - 1) + 1
    # Of two values a channel a BatchNorm makes +-1 whatever they are: their gradient is a difference of rounding errors. The
    # smallest training map here has an output of 2 x 2 from a batch of two.
    least = max(1, reach - 2 * (reach // 2 if padding is None else padding)) + (2 if training else 0)
    return {
        "size": [integer(2 if training else 1, 3), integer(1, 40), least + integer(0, 12), least + integer(0, 12)],
        "out_channels": integer(1, 70),
        "kernel": kernel,
        "stride": choice((1, 1, 2)),
        "padding": padding,
        "dilation": dilation,
        "dw_act": choice(("relu", "relu", None, "relu6", "silu", "hardswish")),
        "act": choice(("relu", "relu", None, "relu6", "silu", "hardswish")),
        "dw_bn": choice((True, False)),
        "pw_bn": choice((True, False)),
        "bias": choice((False, True)),
        "training": training,
    }


@builds
def build_ds_conv(
    size, out_channels, kernel, stride, padding, dilation, dw_act, act, dw_bn, pw_bn, bias, training, dtype, layout, seed
):
    channels = size[1]

    def vector(number, offset, spread, kind=dtype):
        values = make(number, dtype="float64", layout="contiguous", seed=seed + offset)
        return (spread[0] + (spread[1] - spread[0]) * torch.sigmoid(values)).to(DTYPES[kind])

    def batch_norm(number, offset):
        # Statistics and affine parameters of half-precision convolutions are float32, as in nn.BatchNorm2d under autocast.
        kind = dtype if dtype == "float64" else "float32"
        mean, var = vector(number, offset, (-1, 1), kind), vector(number, offset + 1, (0.5, 2), kind)
        return ops.BatchNorm(
            mean, var, vector(number, offset + 2, (0.5, 1.5), kind), vector(number, offset + 3, (-1, 1), kind), 1e-5, 0.1
        )

    x = make(*size, dtype=dtype, layout=layout, seed=seed)
    dw_weight = make(channels, 1, kernel, kernel, dtype=dtype, layout="contiguous", seed=seed + 1) / kernel
    pw_weight = make(out_channels, channels, 1, 1, dtype=dtype, layout="contiguous", seed=seed + 2) / channels**0.5
    kwargs = {"stride": stride, "padding": padding, "dilation": dilation, "dw_act": dw_act, "act": act, "training": training}
    if bias:
        kwargs |= {"dw_bias": vector(channels, 3, (-1, 1)), "pw_bias": vector(out_channels, 4, (-1, 1))}
    if dw_bn:
        kwargs["dw_bn"] = batch_norm(channels, 10)
    if pw_bn:
        kwargs["pw_bn"] = batch_norm(out_channels, 20)
    return testing.Sample("", (x, dw_weight, pw_weight), kwargs)
