"""Context modules: what a pixel learns of the rest of the image."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segfast import _backend
from segfast.nn.convolution import Activation, BatchNorm2d, ConvBNAct, pair, require
from segfast.nn.folding import activate, quick
from segfast.nn.resize import free, laid_out, resize
from segfast.nn.sampling import adaptive_avg_pool2d


class PyramidPooling(nn.Module):
    """Averages over grids of cells, each put back to the map's size and joined with the map.

    "concat": cat(x, resize(conv_g(pool_g(x))) for each grid g), then `project`    (PSPNet, arXiv:1612.01105, section 3.2)
    "sum": x + sum of resize(pool_g(x)), without weights                           (ICNet, arXiv:1704.08545)

    Children: `branches` (a ConvBNAct a grid) and `project`, which are missing where unused. Any size of the map and any grid;
    batch 1 trains (see `segfast.nn.BatchNorm2d`).

    Args:
        in_channels: of the input.
        branch_channels: of each branch's 1 x 1 convolution; None: in_channels // number of grids. Not for "sum".
        out_channels: of a convolution over the concatenation; None: the concatenation is the result. Not for "sum".
        grids: cells a side, an int or a pair each.
        mode: "concat" or "sum".
        align_corners: of the resizing.
        input_first: whether the input comes before or after the branches in the concatenation.
        kernel_size: of `project`.
        act: of the convolutions.

    Raises:
        ValueError: an unknown mode, no grid or an empty one, no channels, or channels given for "sum".
    """

    def __init__(
        self,
        in_channels: int,
        branch_channels: int | None = None,
        out_channels: int | None = None,
        grids: Sequence[int | tuple[int, int]] = (1, 2, 3, 6),
        mode: str = "concat",
        align_corners: bool = True,
        input_first: bool = True,
        kernel_size: int = 1,
        act: Activation = "relu",
    ):
        super().__init__()
        require("PyramidPooling", in_channels=in_channels)
        grids = tuple(grids)
        if mode not in ("concat", "sum") or not grids:
            raise ValueError(f"PyramidPooling: want mode concat or sum and at least one grid, got {mode!r} and {grids}")
        if mode == "sum" and (branch_channels is not None or out_channels is not None):
            raise ValueError("PyramidPooling: want no branch_channels and no out_channels with mode 'sum'")
        for grid in map(pair, grids):
            if len(grid) != 2:
                raise ValueError(f"PyramidPooling: want grids of one number or two, got {grid}")
            require("PyramidPooling", **{"rows of a grid": grid[0], "columns of a grid": grid[1]})
        self.grids, self.mode, self.align_corners, self.input_first = grids, mode, align_corners, input_first
        self.out_channels = in_channels
        if mode == "concat":
            width = in_channels // len(self.grids) if branch_channels is None else branch_channels
            require("PyramidPooling", branch_channels=width)
            self.branches = nn.ModuleList(ConvBNAct(in_channels, width, 1, act=act, norm_layer=BatchNorm2d) for _ in self.grids)
            self.out_channels = in_channels + width * len(self.grids)
        if out_channels is not None:
            self.project = ConvBNAct(self.out_channels, out_channels, kernel_size, act=act, norm_layer=BatchNorm2d)
            self.out_channels = out_channels

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[2:]
        if self.mode == "sum":
            y = x
            for grid in self.grids:
                y = y + resize(adaptive_avg_pool2d(x, grid), size, self.align_corners)
            return y
        pooled = [
            laid_out(resize(branch(adaptive_avg_pool2d(x, grid)), size, self.align_corners), x)
            for grid, branch in zip(self.grids, self.branches)
        ]
        y = torch.cat([x, *pooled] if self.input_first else [*pooled, x], 1)
        return self.project(y) if hasattr(self, "project") else y

    def extra_repr(self) -> str:
        return f"grids={self.grids}, mode={self.mode!r}, align_corners={self.align_corners}"


class BNActConv(nn.Sequential):
    """BatchNorm, ReLU, convolution: children `norm`, `relu` and `conv` (SwiftNet's unit, which reads pre-activations).

    Args:
        in_channels: of the input.
        out_channels: of the output.
        kernel_size: odd; the size is kept.
        momentum: of the BatchNorm.
        bias: whether the convolution has one.
        norm: whether there is a BatchNorm.

    Raises:
        ValueError: an even kernel, no channels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        momentum: float = 0.1,
        bias: bool = False,
        norm: bool = True,
    ):
        super().__init__()
        require("BNActConv", kernel_size=kernel_size, in_channels=in_channels, out_channels=out_channels)
        if norm:
            self.norm = BatchNorm2d(in_channels, momentum=momentum)
        self.relu = nn.ReLU()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if list(self._modules) != ["norm", "relu", "conv"]:
            return super().forward(x)
        y = self.norm(x)
        return self.conv(self.relu(y) if y is x else activate(self.relu, y, self))


class SpatialPyramidPooling(nn.Module):
    """SwiftNet's spatial pyramid pooling (Orsic et al., arXiv:1903.08469, section 3.2), in BatchNorm-ReLU-convolution order.

    Children, in the order of running: `spp_bn` (to `bottleneck` channels), `spp0`, `spp1`, ... (a level each), `spp_fuse`.
    Grids follow the map's aspect: g rows and max(1, round(g W / H)) columns.

    Args:
        in_channels: of the input, a pre-activation.
        bottleneck: channels after the first convolution.
        level_channels: of each level; None: bottleneck // number of grids.
        out_channels: of the result.
        grids: rows of each level.
        square: as many columns as rows, whatever the aspect.
        momentum: of the BatchNorms.

    Raises:
        ValueError: no grid, an empty one, or no channels.
    """

    def __init__(
        self,
        in_channels: int,
        bottleneck: int = 128,
        level_channels: int | None = None,
        out_channels: int = 128,
        grids: Sequence[int] = (8, 4, 2),
        square: bool = False,
        momentum: float = 0.1,
    ):
        super().__init__()
        self.grids, self.square = tuple(grids), square
        require("SpatialPyramidPooling", **{"number of grids": len(self.grids), "bottleneck": bottleneck})
        for rows in self.grids:
            require("SpatialPyramidPooling", **{"rows of a grid": rows})
        level = bottleneck // len(self.grids) if level_channels is None else level_channels
        require("SpatialPyramidPooling", level_channels=level)
        self.spp_bn = BNActConv(in_channels, bottleneck, 1, momentum)
        for i in range(len(self.grids)):
            self.add_module(f"spp{i}", BNActConv(bottleneck, level, 1, momentum))
        self.spp_fuse = BNActConv(bottleneck + level * len(self.grids), out_channels, 1, momentum)

    def forward(self, x: Tensor) -> Tensor:
        x = self.spp_bn(x)
        height, width = x.shape[2:]
        levels = [x]
        for i, rows in enumerate(self.grids):
            columns = rows if self.square else in_proportion(rows, height, width)
            level = getattr(self, f"spp{i}")(adaptive_avg_pool2d(x, (rows, columns)))
            levels.append(laid_out(resize(level, (height, width), align_corners=False), x))
        return self.spp_fuse(torch.cat(levels, 1))


def in_proportion(rows: int, height: int, width: int) -> int:
    """max(1, round(width / height * rows)); of free sizes of an exported graph the same in whole numbers, which ONNX has."""
    if not free(height, width):
        return max(1, round(width / height * rows))
    up = (2 * width * rows + height) // (2 * height)
    # This one differs from `up` halfway between two numbers: the even one is wanted.
    down = (2 * width * rows + height - 1) // (2 * height)
    return torch.sym_max(torch.sym_max(2 * (up // 2), down), 1)


def fast_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention without softmax, from the right: linear in the number of pixels, never a pixels x pixels matrix.

    y = q (k^T v), with q and k of length 1 at every pixel        (FANet, Hu et al., arXiv:2007.03815, eq. 4)

    Args:
        query, key: (N, C', H, W).
        value: (N, C, H, W).

    Returns:
        (N, C, H, W), not divided by the number of pixels, as in the official code.
    """
    n, channels, height, width = value.shape
    q = F.normalize(query.flatten(2), dim=1)  # (N, C', pixels)
    k = F.normalize(key.flatten(2), dim=1)
    context = value.flatten(2) @ k.transpose(1, 2)  # (N, C, C')
    if quick() and _backend.layout(value) is torch.channels_last:
        return (q.transpose(1, 2) @ context.transpose(1, 2)).view(n, height, width, channels).permute(0, 3, 1, 2)
    return (context @ q).view(n, channels, height, width)


class FastAttention(nn.Module):
    """FANet's fast attention with its convolutions: x + project(fast_attention(query(x), key(x), value(x))).

    Children `query`, `key`, `value` and `project` are 1 x 1 ConvBNAct; see `fast_attention`.

    Args:
        channels: of the input and the output.
        key_channels: of query and key.
        value_act: after the value's BatchNorm.
        act: after the projection's.
        norm_layer: of the four.

    Raises:
        ValueError: no channels.
    """

    def __init__(
        self,
        channels: int,
        key_channels: int = 32,
        value_act: Activation = None,
        act: Activation = None,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ):
        super().__init__()
        require("FastAttention", channels=channels, key_channels=key_channels)
        self.query = ConvBNAct(channels, key_channels, 1, act=None, norm_layer=norm_layer)
        self.key = ConvBNAct(channels, key_channels, 1, act=None, norm_layer=norm_layer)
        self.value = ConvBNAct(channels, channels, 1, act=value_act, norm_layer=norm_layer)
        self.project = ConvBNAct(channels, channels, 1, act=act, norm_layer=norm_layer)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(fast_attention(self.query(x), self.key(x), self.value(x)))
