"""Sample inputs of every op, used by tests and benchmarks alike.

A new op adds one generator below, decorated with `@samples`; the tests find it, and fail while an op has none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from segfast.ops import BatchNorm


@dataclass(frozen=True)
class Sample:
    """One call of a public function: `ops.<op>(*args, **kwargs)`. Float tensors among the arguments are its inputs."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return self.name


SAMPLES: dict[str, Callable[[torch.dtype, torch.device], Iterator[Sample]]] = {}
LARGE: dict[
    str, Callable[[torch.dtype, torch.device], Iterator[Sample]]
] = {}  # sizes that run in parallel, for timing and determinism


def samples(function: Callable[[torch.dtype, torch.device], Iterator[Sample]]):
    """Registers a generator named after its op."""
    SAMPLES[function.__name__] = function
    return function


def tensor(*size: int, dtype: torch.dtype, device: torch.device, layout: str = "contiguous", seed: int = 0) -> Tensor:
    """Standard normal, in one of LAYOUTS: transposed swaps H and W in memory, strided takes every second column."""
    generator = torch.Generator().manual_seed(seed)
    if layout == "strided":
        wide = torch.randn(*size[:-1], 2 * size[-1], generator=generator, dtype=torch.float64)
        return wide.to(device=device, dtype=dtype)[..., ::2]
    x = torch.randn(*size, generator=generator, dtype=torch.float64).to(device=device, dtype=dtype)
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    return x


NEIGHBOURS = 8  # how many points the reference's error is looked for at, where one is not enough


def neighbour(tree: Any, k: int, dtype: torch.dtype) -> Any:
    """The k-th neighbour: every element of a float tensor moved by -1, 0 or 1 eps(dtype) of itself; the 0-th is the tree."""
    generator = torch.Generator().manual_seed(k)

    def one(x):
        if k == 0 or not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        steps = torch.randint(-1, 2, x.shape, generator=generator).double().to(x.device)
        return (x.detach().double() * (1 + torch.finfo(dtype).eps * steps)).to(x.dtype)

    return tree_map(one, tree)


LAYOUTS = ("contiguous", "channels_last", "transposed", "strided")


@samples
def channel_shuffle(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for layout in LAYOUTS:
        yield Sample(f"2x12x5x7-g3-{layout}", (tensor(2, 12, 5, 7, dtype=dtype, device=device, layout=layout), 3))
    for size, groups in (((1, 58, 3, 3), 2), ((2, 7, 4, 5), 7), ((2, 8, 4, 5), 1), ((0, 4, 3, 3), 2), ((3, 6, 1, 1), 2)):
        yield Sample(f"{'x'.join(map(str, size))}-g{groups}", (tensor(*size, dtype=dtype, device=device), groups))


@samples
def pairwise_loss(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    def maps(size, teacher_channels, teacher_size=None, layout="contiguous"):
        n, _, h, w = size
        teacher = (n, teacher_channels, *(teacher_size or (h, w)))
        return tuple(tensor(*s, dtype=dtype, device=device, layout=layout, seed=i) for i, s in enumerate((size, teacher)))

    for layout in LAYOUTS:
        yield Sample(f"2x5x7x6-t9-{layout}", maps((2, 5, 7, 6), 9, layout=layout), {"node_size": 1})
    yield Sample("2x3x9x7-t3-pool2", maps((2, 3, 9, 7), 3))
    yield Sample("1x6x5x8-t4-max3x2", maps((1, 6, 5, 8), 4), {"node_size": (3, 2), "pool": "max"})
    yield Sample("2x17x4x3-t20-few-nodes", maps((2, 17, 4, 3), 20), {"node_size": 1})
    yield Sample("2x4x6x5-t7-grid", maps((2, 4, 6, 5), 7, (9, 4)), {"grid": (3, 4)})
    yield Sample("1x1x6x6-one-channel", maps((1, 1, 6, 6), 1), {"node_size": 1})


@samples
def pairwise_cosine(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for layout in LAYOUTS:
        yield Sample(f"2x5x4x3-{layout}", (tensor(2, 5, 4, 3, dtype=dtype, device=device, layout=layout),))
    yield Sample("1x9x7x5-pool2", (tensor(1, 9, 7, 5, dtype=dtype, device=device),), {"node_size": 2})
    yield Sample("2x3x6x5-max-grid", (tensor(2, 3, 6, 5, dtype=dtype, device=device),), {"pool": "max", "grid": (2, 3)})
    yield Sample("0x3x2x2-empty", (tensor(0, 3, 2, 2, dtype=dtype, device=device),))
    yield Sample("2x3x1x1", (tensor(2, 3, 1, 1, dtype=dtype, device=device),))


@samples
def pixelwise_kl(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    def logits(*size, layout="contiguous"):
        return tuple(3 * tensor(*size, dtype=dtype, device=device, layout=layout, seed=i) for i in (0, 1))

    target = torch.tensor([[[0, 1, 255, 2, 255], [255, 1, 1, 0, 7], [2, 255, 255, 0, 1]]], device=device)
    for layout in LAYOUTS:
        yield Sample(f"2x7x5x9-{layout}", logits(2, 7, 5, 9, layout=layout))
    yield Sample("2x19x9x23-T4", logits(2, 19, 9, 23), {"temperature": 4.0})
    yield Sample("2x19x9x23-T0.7-channels_last", logits(2, 19, 9, 23, layout="channels_last"), {"temperature": 0.7})
    yield Sample("1x4x3x5-target", logits(1, 4, 3, 5), {"target": target})
    yield Sample("1x4x3x5-target-mask-sum", logits(1, 4, 3, 5), {"target": target, "mask": target < 2, "reduction": "sum"})
    yield Sample("1x4x3x5-none", logits(1, 4, 3, 5), {"target": target, "reduction": "none", "temperature": 2})
    yield Sample("2x2x3x3-batchmean", logits(2, 2, 3, 3), {"reduction": "batchmean"})
    yield Sample("1x70x6x3", logits(1, 70, 6, 3))
    yield Sample("1x5x3x5-all-ignored", logits(1, 5, 3, 5), {"mask": torch.zeros_like(target, dtype=torch.bool)})
    yield Sample("0x3x2x2-sum", logits(0, 3, 2, 2), {"reduction": "sum"})
    yield Sample("2x3x1x1", logits(2, 3, 1, 1))


@samples
def upsample_argmax(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    def sample(name, size, to, layout="contiguous", **kwargs):
        return Sample(name, (3 * tensor(*size, dtype=dtype, device=device, layout=layout), to), kwargs)

    for layout in LAYOUTS:
        yield sample(f"2x7x5x9-13x22-{layout}", (2, 7, 5, 9), (13, 22), layout)
    yield sample("1x19x6x5-x8-probability", (1, 19, 6, 5), (48, 40), return_probability=True)
    yield sample("1x19x4x5-x8-channels_last", (1, 19, 4, 5), (32, 40), "channels_last", dtype=torch.int64)
    yield sample("2x3x4x3-corners", (2, 3, 4, 3), (9, 9), align_corners=True, return_probability=True)
    yield sample("1x5x17x19-down", (1, 5, 17, 19), (6, 4), dtype=torch.int32)
    yield sample("1x40x1x7-one-row", (1, 40, 1, 7), (5, 30))
    yield sample("1x2x5x1-one-column-corners", (1, 2, 5, 1), (20, 3), align_corners=True)
    yield sample("2x1x3x3-one-class", (2, 1, 3, 3), 7)
    yield sample("1x300x3x3-int32", (1, 300, 3, 3), (3, 6), dtype=torch.int32)
    yield sample("0x3x2x2", (0, 3, 2, 2), (4, 4))


@samples
def upsample_cross_entropy(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    def sample(name, size, to, layout="contiguous", ignored=0.2, weighted=False, labels=torch.int64, **kwargs):
        generator = torch.Generator().manual_seed(1)
        target = torch.randint(0, size[1], (size[0], *to), generator=generator)
        target[torch.rand(target.shape, generator=generator) < ignored] = kwargs.get("ignore_index", 255)
        if weighted:
            values = 0.5 + torch.rand(size[1], generator=generator, dtype=torch.float64)
            kwargs["weight"] = values.to(device=device, dtype=dtype)
        logits = 2 * tensor(*size, dtype=dtype, device=device, layout=layout)
        return Sample(name, (logits, target.to(device=device, dtype=labels)), kwargs)

    for layout in LAYOUTS:
        yield sample(f"2x7x5x9-13x22-{layout}", (2, 7, 5, 9), (13, 22), layout)
    yield sample("1x19x2x3-x8", (1, 19, 2, 3), (16, 24), labels=torch.uint8)
    yield sample("1x19x4x5-x8-smooth-weight", (1, 19, 4, 5), (32, 40), "channels_last", weighted=True, label_smoothing=0.1)
    yield sample("2x4x4x3-corners-sum", (2, 4, 4, 3), (9, 9), align_corners=True, reduction="sum", ignore_index=-100)
    yield sample("2x4x4x3-none-weight", (2, 4, 4, 3), (9, 10), reduction="none", weighted=True, label_smoothing=0.2)
    yield sample("1x5x9x10-down", (1, 5, 9, 10), (4, 3), labels=torch.int32)
    yield sample("2x6x5x7-ohem", (2, 6, 5, 7), (17, 20), ohem_threshold=0.3)
    yield sample("2x6x5x7-ohem-least", (2, 6, 5, 7), (17, 20), ohem_threshold=0.01, ohem_min_kept=90, weighted=True)
    yield sample("1x6x5x7-ohem-none", (1, 6, 5, 7), (11, 9), ohem_threshold=0.1, ohem_min_kept=20, reduction="none")
    yield sample("1x3x1x4-one-row", (1, 3, 1, 4), (3, 9))
    yield sample("1x40x4x1-one-column", (1, 40, 4, 1), (9, 3), align_corners=True)
    yield sample("1x5x3x3-all-ignored", (1, 5, 3, 3), (7, 7), ignored=2)
    yield sample("0x3x2x2", (0, 3, 2, 2), (4, 4))
    yield sample("2x1x2x2-one-class", (2, 1, 2, 2), (3, 3))


@samples
def upsample_pixelwise_kl(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    def sample(name, size, teacher_size, to, layout="contiguous", ignored=None, mask=False, **kwargs):
        generator = torch.Generator().manual_seed(1)
        sizes = (size, (*size[:2], *teacher_size))
        student, teacher = (3 * tensor(*s, dtype=dtype, device=device, layout=layout, seed=seed) for seed, s in enumerate(sizes))
        pixels = (size[0], *to) if isinstance(to, tuple) else (size[0], to, to)
        if ignored is not None:
            target = torch.where(torch.rand(pixels, generator=generator) < ignored, 255, 3)
            kwargs["target"] = target.to(device)
        if mask:
            kwargs["mask"] = (torch.rand(pixels, generator=generator) < 0.7).to(device)
        return Sample(name, (student, teacher, to), kwargs)

    for layout in LAYOUTS:
        yield sample(f"2x7x5x9-3x4-13x22-{layout}", (2, 7, 5, 9), (3, 4), (13, 22), layout)
    yield sample("1x19x2x3-x8-x4-T4", (1, 19, 2, 3), (4, 6), (16, 24), temperature=4.0)
    yield sample("1x19x3x5-x4-x1-channels_last", (1, 19, 3, 5), (12, 20), (12, 20), "channels_last", temperature=0.7)
    yield sample("2x4x4x3-corners-target", (2, 4, 4, 3), (5, 5), (9, 9), ignored=0.3, align_corners=True)
    yield sample("2x4x4x3-none", (2, 4, 4, 3), (2, 2), (9, 10), ignored=0.3, mask=True, reduction="none", temperature=2)
    yield sample("1x5x9x10-down-sum", (1, 5, 9, 10), (12, 7), (4, 3), mask=True, reduction="sum")
    yield sample("2x40x1x4-one-row-batchmean", (2, 40, 1, 4), (3, 1), 6, reduction="batchmean")
    yield sample("1x5x3x3-all-ignored", (1, 5, 3, 3), (2, 2), (7, 7), ignored=2)
    yield sample("0x3x2x2-sum", (0, 3, 2, 2), (1, 1), (4, 4), reduction="sum")


@samples
def overhaul_loss(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    def maps(*size, layout="contiguous", teacher_layout=None):
        layouts = (layout, teacher_layout or layout)
        student, teacher = (tensor(*size, dtype=dtype, device=device, layout=kind, seed=i) for i, kind in zip((0, 1), layouts))
        return student, teacher, -tensor(size[1], dtype=dtype, device=device, seed=2).abs()

    def mask(*size):
        return (tensor(*size, dtype=torch.float32, device=device, seed=3) < 0.5).contiguous()

    for layout in LAYOUTS:
        yield Sample(f"2x7x5x9-{layout}", maps(2, 7, 5, 9, layout=layout))
        yield Sample(f"2x19x3x5-mask-{layout}", maps(2, 19, 3, 5, layout=layout), {"mask": mask(2, 3, 5)})
    yield Sample("1x9x4x6-mixed-layouts", maps(1, 9, 4, 6, teacher_layout="channels_last"), {"reduction": "sum"})
    yield Sample("3x6x5x4-batchmean", maps(3, 6, 5, 4), {"reduction": "batchmean", "mask": mask(3, 5, 4)})
    yield Sample("1x3x67x65", maps(1, 3, 67, 65))
    yield Sample("1x5x3x5-all-ignored", maps(1, 5, 3, 5), {"mask": torch.zeros(1, 3, 5, dtype=torch.bool, device=device)})
    yield Sample("0x3x2x2-sum", maps(0, 3, 2, 2), {"reduction": "sum"})
    yield Sample("2x3x1x1", maps(2, 3, 1, 1))


@samples
def concat_shuffle(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    def parts(size, channels, layout="contiguous"):
        n, h, w = size
        return [tensor(n, c, h, w, dtype=dtype, device=device, layout=layout, seed=i) for i, c in enumerate(channels)]

    for layout in LAYOUTS:
        yield Sample(f"20+20-{layout}", (parts((2, 5, 7), (20, 20), layout), 2))
    yield Sample("58+58-channels_last", (parts((1, 3, 3), (58, 58), "channels_last"),))
    yield Sample("mixed-layouts", ([*parts((2, 4, 3), (6,), "channels_last"), *parts((2, 4, 3), (6,), "strided")],))
    yield Sample("5+4+3-g3", (tuple(parts((2, 3, 5), (5, 4, 3), "channels_last")), 3))
    yield Sample("one-g4", (parts((2, 3, 5), (8,)), 4))
    yield Sample("1+0+3", (parts((1, 2, 2), (1, 0, 3)), 2))
    yield Sample("empty-batch", (parts((0, 3, 3), (2, 2)),))
    yield Sample("1x1", (parts((3, 1, 1), (3, 3)),))


def large_samples(function: Callable[[torch.dtype, torch.device], Iterator[Sample]]):
    """Registers a generator named `<op>_large`."""
    LARGE[function.__name__.removesuffix("_large")] = function
    return function


@large_samples
def channel_shuffle_large(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for layout in ("contiguous", "channels_last"):
        for size, groups in (((4, 116, 64, 128), 2), ((4, 240, 32, 64), 3)):
            x = tensor(*size, dtype=dtype, device=device, layout=layout)
            yield Sample(f"{'x'.join(map(str, size))}-g{groups}-{layout}", (x, groups))


@large_samples
def concat_shuffle_large(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for layout in ("contiguous", "channels_last"):
        for c, h, w in ((58, 64, 128), (116, 32, 64), (232, 16, 32)):
            pair = [tensor(4, c, h, w, dtype=dtype, device=device, layout=layout, seed=i) for i in (0, 1)]
            yield Sample(f"4x({c}+{c})x{h}x{w}-{layout}", (pair,))


@large_samples
def pixelwise_kl_large(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for layout in ("contiguous", "channels_last"):
        for size in ((2, 19, 128, 256), (2, 150, 64, 64)):
            pair = tuple(3 * tensor(*size, dtype=dtype, device=device, layout=layout, seed=i) for i in (0, 1))
            yield Sample(f"{'x'.join(map(str, size))}-{layout}", pair)


@large_samples
def upsample_argmax_large(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for layout in ("contiguous", "channels_last"):
        logits = 3 * tensor(2, 19, 32, 64, dtype=dtype, device=device, layout=layout)
        yield Sample(f"2x19x32x64-x8-{layout}", (logits, (256, 512)), {"return_probability": layout == "channels_last"})


@large_samples
def upsample_cross_entropy_large(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for layout in ("contiguous", "channels_last"):
        logits = 2 * tensor(2, 19, 32, 64, dtype=dtype, device=device, layout=layout)
        target = torch.randint(0, 20, (2, 250, 500), generator=torch.Generator().manual_seed(1))
        options = {"ignore_index": 19, "ohem_threshold": 0.2, "ohem_min_kept": 50000} if layout == "contiguous" else {}
        yield Sample(
            f"2x19x32x64-{layout}", (logits, torch.where(target < 19, target, 19 if options else 255).to(device)), options
        )


@large_samples
def upsample_pixelwise_kl_large(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for layout in ("contiguous", "channels_last"):
        student, teacher = (
            3 * tensor(2, 19, *size, dtype=dtype, device=device, layout=layout, seed=seed)
            for seed, size in enumerate(((32, 64), (64, 128)))
        )
        yield Sample(f"2x19x32x64-{layout}", (student, teacher, (250, 500)))


@large_samples
def overhaul_loss_large(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for layout in ("contiguous", "channels_last"):
        for size in ((2, 64, 64, 128), (3, 130, 33, 31)):
            maps = tuple(tensor(*size, dtype=dtype, device=device, layout=layout, seed=i) for i in (0, 1))
            margin = -tensor(size[1], dtype=dtype, device=device, seed=2).abs()
            yield Sample(f"{'x'.join(map(str, size))}-{layout}", (*maps, margin))


def ds_conv_sample(
    name: str, size: tuple[int, int, int, int], out_channels: int, *, dtype: torch.dtype, device: torch.device, kernel=3,
    layout="contiguous", bias=False, norm: tuple[str, str] = ("all", "all"), seed=0, **kwargs,
) -> Sample:  # fmt: skip
    # norm, of each half: "all", "no affine", "no running" or "none". Half precision has float32 statistics, as under autocast.
    c = size[1]
    kh, kw = (kernel, kernel) if isinstance(kernel, int) else kernel

    def vector(number: int, low: float, high: float, seed: int, dtype: torch.dtype = dtype) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return (low + (high - low) * torch.rand(number, generator=generator, dtype=torch.float64)).to(device=device, dtype=dtype)

    def batch_norm(number: int, kind: str, seed: int) -> BatchNorm | None:
        if kind == "none":
            return None
        wide = dtype if dtype == torch.float64 else torch.float32
        spreads = ((-0.5, 0.5), (0.5, 2), (0.5, 1.5), (-0.5, 0.5))
        mean, var, weight, beta = (vector(number, *spread, seed + i, wide) for i, spread in enumerate(spreads))
        if kind == "no affine":
            return BatchNorm(mean, var)
        return BatchNorm(None, None, weight, beta) if kind == "no running" else BatchNorm(mean, var, weight, beta, 1e-3, 0.2)

    x = tensor(*size, dtype=dtype, device=device, layout=layout, seed=seed)
    dw_weight = tensor(c, 1, kh, kw, dtype=dtype, device=device, seed=seed + 1) / (kh * kw) ** 0.5
    pw_weight = tensor(out_channels, c, 1, 1, dtype=dtype, device=device, seed=seed + 2) / c**0.5
    if bias:
        kwargs |= {"dw_bias": vector(c, -0.5, 0.5, 3), "pw_bias": vector(out_channels, -0.5, 0.5, 4)}
    kwargs |= {"dw_bn": batch_norm(c, norm[0], 10), "pw_bn": batch_norm(out_channels, norm[1], 20)}
    return Sample(name, (x, dw_weight, pw_weight), kwargs)


@samples
def ds_conv(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    def sample(name, size, out_channels, **kwargs):
        return ds_conv_sample(name, size, out_channels, dtype=dtype, device=device, **kwargs)

    for layout in LAYOUTS:
        yield sample(f"2x5x6x7-o9-{layout}", (2, 5, 6, 7), 9, layout=layout)
        yield sample(f"2x5x6x7-o9-train-{layout}", (2, 5, 6, 7), 9, layout=layout, training=True)
    for activation, other in (("relu", None), ("relu6", "relu"), ("silu", "relu6"), ("hardswish", "silu"), (None, "hardswish")):
        options = {"dw_act": activation, "act": other, "bias": True}
        yield sample(f"1x17x5x4-o20-{activation}-{other}", (1, 17, 5, 4), 20, **options)
        yield sample(f"2x6x5x4-o7-{activation}-{other}-train", (2, 6, 5, 4), 7, training=True, **options)
    for training in (False, True):
        mode = "-train" if training else ""
        yield sample(f"2x18x9x7-o33-k5-s2{mode}", (2, 18, 9, 7), 33, kernel=5, stride=2, training=training)
        yield sample(f"2x4x8x9-o5-k3-d2-p0{mode}", (2, 4, 8, 9), 5, dilation=2, padding=0, training=training)
        yield sample(f"2x16x5x5-o16-k1{mode}", (2, 16, 5, 5), 16, kernel=1, training=training)
        yield sample(f"2x3x4x5-o2-p2-s2{mode}", (2, 3, 4, 5), 2, padding=2, stride=2, bias=True, training=training)
        yield sample(f"2x6x6x7-o4-k3x5-s2x1{mode}", (2, 6, 6, 7), 4, kernel=(3, 5), stride=(2, 1), training=training)
        yield sample(f"2x8x4x4-o6-no-norm{mode}", (2, 8, 4, 4), 6, norm=("none", "none"), bias=True, training=training)
        yield sample(f"2x8x4x4-o6-first-norm{mode}", (2, 8, 4, 4), 6, norm=("all", "none"), training=training)
        yield sample(f"2x8x4x4-o6-last-norm{mode}", (2, 8, 4, 4), 6, norm=("none", "all"), training=training)
        yield sample(f"2x8x4x4-o6-no-affine{mode}", (2, 8, 4, 4), 6, norm=("no affine", "no affine"), training=training)
        yield sample(f"2x8x4x4-o6-no-running{mode}", (2, 8, 4, 4), 6, norm=("no running", "no running"), training=training)
    yield sample("2x7x5x6-o8-mixed", (2, 7, 5, 6), 8, training=(True, False), bias=True)
    yield sample("2x7x5x6-o8-mixed-back", (2, 7, 5, 6), 8, training=(False, True), bias=True)
    yield sample("1x1x5x5-o1", (1, 1, 5, 5), 1)
    yield sample("3x4x1x1-o5", (3, 4, 1, 1), 5)
    # Of two or three values a channel a BatchNorm makes nearly the same numbers whatever they are, and their gradients are
    # differences of rounding errors; of eight it does not.
    yield sample("8x4x1x1-o5-train", (8, 4, 1, 1), 5, training=True, dw_act=None, act=None)
    yield sample("0x4x3x3-o5", (0, 4, 3, 3), 5)


@large_samples
def ds_conv_large(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for layout in ("contiguous", "channels_last"):
        for size, out_channels, stride in (((2, 64, 64, 128), 64, 1), ((1, 96, 65, 127), 130, 2)):
            for training in (False, True):
                name = f"{'x'.join(map(str, size))}-o{out_channels}-s{stride}-{layout}{'-train' if training else ''}"
                options = {"layout": layout, "stride": stride, "training": training}
                yield ds_conv_sample(name, size, out_channels, dtype=dtype, device=device, **options)
