"""The end of every segmentation network: logits to image size and the best class, without logits of image size."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from segfast import _backend

DTYPES = (torch.uint8, torch.int32, torch.int64)


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def upsample(x: Tensor, size: tuple[int, int], align_corners: bool, dtype: torch.dtype) -> Tensor:
    return F.interpolate(x.to(dtype), size=size, mode="bilinear", align_corners=align_corners)


def upsample_argmax_reference(
    logits: Tensor,
    size: int | tuple[int, int],
    align_corners: bool = False,
    *,
    dtype: torch.dtype = torch.uint8,
    return_probability: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    x = upsample(logits.detach(), pair(size), align_corners, wide_dtype(logits))
    best = x.argmax(1, keepdim=True)
    classes = best.squeeze(1).to(dtype).contiguous()
    if not return_probability:
        return classes
    return classes, x.softmax(1).gather(1, best).squeeze(1).contiguous()


torch.library.define(
    "segfast::upsample_argmax",
    "(Tensor logits, SymInt[] size, bool align_corners, int bytes, bool probability) -> (Tensor classes, Tensor probability)",
)
_backend.register("upsample_argmax")


@torch.library.register_fake("segfast::upsample_argmax")
def _(logits, size, align_corners, bytes, probability):
    shape = logits.shape[0], size[0], size[1]
    dtype = next(dtype for dtype in DTYPES if dtype.itemsize == bytes)
    return (
        logits.new_empty(shape, dtype=dtype),
        logits.new_empty(shape if probability else (0,), dtype=wide_dtype(logits)),
    )


@register_flop_formula(torch.ops.segfast.upsample_argmax)
def _(*args, **kwargs) -> int:
    return 0  # no matrix product


def upsample_argmax(
    logits: Tensor,
    size: int | tuple[int, int],
    align_corners: bool = False,
    *,
    dtype: torch.dtype = torch.uint8,
    return_probability: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The best class of every pixel of logits interpolated bilinearly to `size`, without the interpolated logits.

    y[n, i, j] = argmax over c of F.interpolate(logits, size, mode="bilinear", align_corners=align_corners)[n, c, i, j]

    Where the two best classes differ by less than rounding, either may come out; of equal ones the first. Nothing here has a
    gradient.

    Args:
        logits: (N, C, H, W), float, any strides; float16 and bfloat16 are interpolated in float32.
        size: (H', W') of the result, larger or smaller than (H, W) by any ratio; an int for both.
        align_corners: as in `torch.nn.functional.interpolate`.
        dtype: torch.uint8, for up to 256 classes, torch.int32 or torch.int64. PyTorch takes a uint8 tensor that indexes another
            for a mask: `table[classes]` wants int64, or `classes.long()`.
        return_probability: also return the best class's probability, softmax over the classes.

    Returns:
        (N, H', W') class numbers; with return_probability a pair, the second (N, H', W') in (0, 1], float64 for float64 logits,
        else float32. A NaN among a pixel's logits is its maximum, as in torch.argmax, and its probability NaN.

    Raises:
        ValueError: not rank 4, no classes or pixels, a size below 1, another dtype, more classes than the dtype can number.
        TypeError: logits not of a real float dtype, align_corners not bool.
    """
    check_logits("upsample_argmax", "logits", logits)
    size = check_size("upsample_argmax", size, align_corners)
    if dtype not in DTYPES:
        raise ValueError(f"upsample_argmax: want dtype torch.uint8, torch.int32 or torch.int64, got {dtype}")
    if logits.shape[1] > torch.iinfo(dtype).max + 1:
        raise ValueError(
            f"upsample_argmax: want at most {torch.iinfo(dtype).max + 1} classes with dtype {dtype}, got {logits.shape[1]}"
        )
    if not _backend.has_kernel("upsample_argmax", logits):
        return upsample_argmax_reference(logits, size, align_corners, dtype=dtype, return_probability=return_probability)
    classes, probability = torch.ops.segfast.upsample_argmax.default(
        logits.detach(), size, align_corners, dtype.itemsize, return_probability
    )
    return (classes, probability) if return_probability else classes


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return tuple(size) if isinstance(size, tuple | list) else (size, size)


def check_size(op: str, size: int | tuple[int, int], align_corners: bool = False) -> tuple[int, int]:
    both = pair(size)
    if torch.jit.is_tracing():  # which makes tensors of sizes
        both = tuple(int(s) if isinstance(s, Tensor) else s for s in both)
    if len(both) != 2 or not all(_backend.is_whole(s) and s >= 1 for s in both):
        raise ValueError(f"{op}: want size (H, W), or one int for both, of at least 1, got {size}")
    check_aligned(op, align_corners)
    return both


def check_aligned(op: str, align_corners: bool) -> None:
    if align_corners not in (False, True, None):
        raise TypeError(f"{op}: want align_corners True or False, got {align_corners!r}")


def check_logits(op: str, name: str, x: Tensor) -> None:
    if x.dtype not in _backend.DTYPES:
        raise TypeError(f"{op}: want {name} of float32, float64, float16 or bfloat16, got {x.dtype}")
    if x.dim() != 4 or 0 in x.shape[1:]:
        raise ValueError(f"{op}: want {name} of shape (N, C, H, W) with C, H and W > 0, got {tuple(x.shape)}")
