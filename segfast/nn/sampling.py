"""Modules for maps of other sizes, and pooling to a grid that exports."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segfast import _backend
from segfast.nn.convolution import Activation, activation, pair
from segfast.nn.resize import resize, same_size


def adaptive_avg_pool2d(x: Tensor, grid: int | tuple[int, int]) -> Tensor:
    """`F.adaptive_avg_pool2d`, exact at every size also in exported graphs, where ONNX takes only sizes that the grid divides.

    y[i, j] = mean of x[floor(i H / g) : ceil((i + 1) H / g), floor(j W / g') : ceil((j + 1) W / g')]

    While exporting, the means are two products with matrices of averaging weights (built from the sizes, also symbolic ones).

    Args:
        x: (N, C, H, W), float.
        grid: (g, g') or one number for both; may be larger than the map.
    """
    rows, columns = pair(grid)
    exporting = torch.compiler.is_exporting() and not _backend.is_capturing()
    if not (exporting or torch.onnx.is_in_onnx_export()):
        return F.adaptive_avg_pool2d(x, (rows, columns))
    if same_size((rows, columns), (1, 1)):
        return x.mean((2, 3), keepdim=True)
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    y = _averaging(x.shape[2], rows, wide) @ (wide @ _averaging(x.shape[3], columns, wide).t())
    return y.to(x.dtype)


def _averaging(size: int, cells: int, like: Tensor) -> Tensor:
    # (cells, size): row i holds 1 / length over its cell's pixels
    cell = torch.arange(cells, device=like.device)[:, None]
    pixel = torch.arange(size, device=like.device)[None]
    # floor(i size / cells) <= pixel < ceil((i + 1) size / cells), without a division, which ONNX writes with Mod
    inside = ((pixel + 1) * cells > cell * size) & (pixel * cells < (cell + 1) * size)
    inside = inside.to(like.dtype)
    return inside / inside.sum(1, keepdim=True)


class Downsample(nn.Sequential):
    """A map to 1 / factor of its size, rounded up or down for odd sizes, by a strided convolution or by pooling.

    Children: `sample` (convolution or pooling), and with BatchNorm or activation `bn` and `act`.

    Args:
        in_channels: of the input.
        out_channels: of a convolution; None: in_channels. Pooling keeps the channels.
        factor: 2 or more.
        mode: "conv", "max" or "avg". A mean counts the pixels inside the map alone.
        odd: "ceil": size / factor rounded up (a kernel of 2 factor - 1, padded by factor - 1, as in ResNet; for pooling a
            last window that reaches over the edge); "floor": rounded down (a kernel of `factor`, the rest is cut off).
        norm: whether a BatchNorm follows the convolution.
        act: after that; see `segfast.nn.activation`.

    Raises:
        ValueError: an unknown mode or rule, or other channels of a pooling.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        factor: int = 2,
        mode: str = "conv",
        odd: str = "ceil",
        norm: bool = False,
        act: Activation = None,
    ):
        super().__init__()
        out_channels = out_channels or in_channels
        if mode not in ("conv", "max", "avg") or odd not in ("ceil", "floor") or factor < 2:
            raise ValueError(
                f"Downsample: want mode conv, max or avg, odd ceil or floor, factor >= 2, got {mode!r}, {odd!r} and {factor}"
            )
        if mode != "conv" and out_channels != in_channels:
            raise ValueError(f"Downsample: want equal channels with mode {mode!r}, got {in_channels} and {out_channels}")
        if mode == "conv":
            kernel, padding = (2 * factor - 1, factor - 1) if odd == "ceil" else (factor, 0)
            self.sample = nn.Conv2d(in_channels, out_channels, kernel, factor, padding, bias=not norm)
        elif mode == "max":
            self.sample = nn.MaxPool2d(factor, ceil_mode=odd == "ceil")
        else:
            self.sample = nn.AvgPool2d(factor, ceil_mode=odd == "ceil", count_include_pad=False)
        if norm:
            self.bn = nn.BatchNorm2d(out_channels)
        if act is not None:
            self.act = activation(act, out_channels)


class Upsample(nn.Module):
    """A map to `factor` times its size, or to a given one: what a Downsample of an odd size came from.

    Args:
        in_channels: of the input.
        out_channels: of a transposed convolution; None: in_channels. The others keep the channels.
        factor: 2 or more.
        mode: "nearest", "bilinear" or "transposed".
        align_corners: of "bilinear".
        kernel_size: of "transposed"; None: 2 factor, which gives no checkerboard. At least `factor`.
        bias: of "transposed".

    Raises:
        ValueError: an unknown mode, other channels of a resizing, or a kernel smaller than the factor.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        factor: int = 2,
        mode: str = "bilinear",
        align_corners: bool = False,
        kernel_size: int | None = None,
        bias: bool = False,
    ):
        super().__init__()
        out_channels = out_channels or in_channels
        if mode not in ("nearest", "bilinear", "transposed") or factor < 2:
            raise ValueError(f"Upsample: want mode nearest, bilinear or transposed, factor >= 2, got {mode!r} and {factor}")
        if mode != "transposed" and out_channels != in_channels:
            raise ValueError(f"Upsample: want equal channels with mode {mode!r}, got {in_channels} and {out_channels}")
        self.factor, self.mode, self.align_corners = factor, mode, align_corners
        if mode == "transposed":
            kernel = 2 * factor if kernel_size is None else kernel_size
            if kernel < factor:
                raise ValueError(f"Upsample: want kernel_size >= factor, got {kernel} and {factor}")
            padding = (kernel - factor + 1) // 2  # (size - 1) factor - 2 padding + kernel + output padding = factor size
            extra = factor + 2 * padding - kernel
            self.conv = nn.ConvTranspose2d(in_channels, out_channels, kernel, factor, padding, extra, bias=bias)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """(N, C, H, W) to (N, C', factor H, factor W), or to `size`: of a transposed convolution what is over is cut off.

        The other modes return x itself where that is its size.

        Raises:
            ValueError: `size` is larger than the transposed convolution's result.
        """
        height, width = (self.factor * s for s in x.shape[2:])
        if self.mode != "transposed":
            return resize(x, (height, width) if size is None else size, self.align_corners, self.mode)
        if size is None:
            return self.conv(x)
        if size[0] > height or size[1] > width:
            raise ValueError(f"Upsample: want a size of at most {(height, width)}, got {tuple(size)}")
        return self.conv(x)[:, :, : size[0], : size[1]]

    def extra_repr(self) -> str:
        return f"factor={self.factor}, mode={self.mode!r}, align_corners={self.align_corners}"
