"""Maps to other sizes: resizing, and pooling to a grid that exports."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from segfast.nn.convolution import pair


def resize(x: Tensor, size, align_corners: bool = False, mode: str = "bilinear") -> Tensor:
    """(N, C, H, W) to (N, C, *size); the same tensor where that is its size already.

    Args:
        x: float.
        size: (H', W').
        align_corners: whether the corner pixels' centres are the corners of the scale (True) or the images' edges are
            (False); bilinear only. It is part of a network: the other choice costs accuracy.
        mode: "bilinear" or "nearest".
    """
    if tuple(x.shape[2:]) == tuple(size):
        return x
    return F.interpolate(x, tuple(size), mode=mode, align_corners=align_corners if mode == "bilinear" else None)


def adaptive_avg_pool2d(x: Tensor, grid: int | tuple[int, int]) -> Tensor:
    """`F.adaptive_avg_pool2d`, exact at every size also in exported graphs, where ONNX takes only sizes that the grid divides.

    y[i, j] = mean of x[floor(i H / g) : ceil((i + 1) H / g), floor(j W / g') : ceil((j + 1) W / g')]

    While exporting, the means are two products with matrices of averaging weights (built from the sizes, also symbolic ones).

    Args:
        x: (N, C, H, W), float.
        grid: (g, g') or one number for both; may be larger than the map.
    """
    rows, columns = pair(grid)
    if not (torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export()):
        return F.adaptive_avg_pool2d(x, (rows, columns))
    if rows == columns == 1:
        return x.mean((2, 3), keepdim=True)
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    y = _averaging(x.shape[2], rows, wide) @ (wide @ _averaging(x.shape[3], columns, wide).t())
    return y.to(x.dtype)


def _averaging(size: int, cells: int, like: Tensor) -> Tensor:
    # (cells, size): row i holds 1 / length over its cell's pixels
    cell = torch.arange(cells, device=like.device)[:, None]
    pixel = torch.arange(size, device=like.device)[None]
    inside = (pixel >= (cell * size) // cells) & (pixel < ((cell + 1) * size + cells - 1) // cells)
    inside = inside.to(like.dtype)
    return inside / inside.sum(1, keepdim=True)
