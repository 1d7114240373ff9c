"""EfficientFormer v1 and v2 with timm's layers and weights, at any input size.

timm's networks are fixed to one size: the attention's bias of a pair of tokens is looked up by their offset (|dy|, |dx|) in a
table as large as the map at 224 x 224. Here the table is resized to the map at hand: it is a function of two offsets, and is
interpolated bilinearly such that offset 0 stays offset 0 and the largest offset the largest. At the size of the table it is the
table itself, and every output equals timm's.

Odd sizes: a strided convolution gives ceil(size / 2). Where v2 attends at half the size and goes back by a factor of 2, an odd
map's last row or column is cut off after the resizing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def attention_bias(table: Tensor, trained: tuple[int, int], size: tuple[int, int], step: int = 1) -> Tensor:
    """The biases (heads, queries, keys) of a map of `size`, with a query at every `step`-th row and column.

    Args:
        table: (heads, R * R'), entry |dy| * R' + |dx| being that of two tokens so far apart.
        trained: (R, R').
        size: (H, W) of the map, 1 or more each.
        step: of the queries.
    """
    height, width = size
    heads = table.shape[0]
    grid = table.view(1, heads, *trained)
    if tuple(trained) != (height, width):
        grid = F.interpolate(grid, (height, width), mode="bilinear", align_corners=True)
    rows, columns = (torch.arange(n, device=table.device) for n in (height, width))
    dy = (rows[::step, None] - rows).abs()  # (H', H)
    dx = (columns[::step, None] - columns).abs()  # (W', W)
    biases = grid[0][:, dy[:, None, :, None], dx[None, :, None, :]]  # (heads, H', W', H, W)
    return biases.reshape(heads, dy.shape[0] * dx.shape[0], height * width)


class Attention(nn.Module):
    """v1's attention over tokens (N, H W, C), its parameters taken over from timm's."""

    def __init__(self, theirs: nn.Module, trained: tuple[int, int]):
        super().__init__()
        self.heads, self.key_dim, self.value_dim, self.scale = theirs.num_heads, theirs.key_dim, theirs.val_dim, theirs.scale
        self.trained = trained
        self.qkv, self.proj, self.attention_biases = theirs.qkv, theirs.proj, theirs.attention_biases

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        n, tokens, _ = x.shape
        split = (self.key_dim, self.key_dim, self.value_dim)
        q, k, v = self.qkv(x).reshape(n, tokens, self.heads, -1).permute(0, 2, 1, 3).split(split, 3)
        scores = (q @ k.transpose(2, 3)) * self.scale + attention_bias(self.attention_biases, self.trained, size)
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(n, tokens, -1))


class Attention2d(nn.Module):
    """v2's attention over a map, with talking heads and a local branch, where told at half the size."""

    def __init__(self, theirs: nn.Module):
        super().__init__()
        self.heads, self.scale, self.trained = theirs.num_heads, theirs.scale, tuple(theirs.resolution)
        self.stride_conv, self.upsample = theirs.stride_conv, theirs.upsample
        self.q, self.k, self.v, self.v_local = theirs.q, theirs.k, theirs.v, theirs.v_local
        self.talking_head1, self.talking_head2 = theirs.talking_head1, theirs.talking_head2
        self.act, self.proj, self.attention_biases = theirs.act, theirs.proj, theirs.attention_biases

    def forward(self, x: Tensor) -> Tensor:
        whole = x.shape[2:]
        if self.stride_conv is not None:
            x = self.stride_conv(x)
        n, _, height, width = x.shape
        q, k, v = self.q(x), self.k(x), self.v(x)
        local = self.v_local(v)
        q, k, v = (t.reshape(n, self.heads, -1, height * width) for t in (q, k, v))
        scores = (q.permute(0, 1, 3, 2) @ k) * self.scale + attention_bias(self.attention_biases, self.trained, (height, width))
        weights = self.talking_head2(self.talking_head1(scores).softmax(-1))
        x = (weights @ v.permute(0, 1, 3, 2)).transpose(2, 3).reshape(n, -1, height, width) + local
        if self.upsample is not None:
            x = self.upsample(x)[:, :, : whole[0], : whole[1]]
        return self.proj(self.act(x))


class AttentionDownsample(nn.Module):
    """v2's attention from every second row and column to all, which halves the map."""

    def __init__(self, theirs: nn.Module):
        super().__init__()
        self.heads, self.scale, self.trained = theirs.num_heads, theirs.scale, tuple(theirs.resolution)
        self.q, self.k, self.v, self.v_local = theirs.q, theirs.k, theirs.v, theirs.v_local
        self.act, self.proj, self.attention_biases = theirs.act, theirs.proj, theirs.attention_biases

    def forward(self, x: Tensor) -> Tensor:
        n, _, height, width = x.shape
        q, k, v = self.q(x), self.k(x), self.v(x)
        local = self.v_local(v)
        small = q.shape[2:]
        q, k, v = (t.reshape(n, self.heads, -1, t.shape[2] * t.shape[3]) for t in (q, k, v))
        biases = attention_bias(self.attention_biases, self.trained, (height, width), 2)
        weights = ((q.permute(0, 1, 3, 2) @ k) * self.scale + biases).softmax(-1)
        x = (weights @ v.permute(0, 1, 3, 2)).transpose(2, 3).reshape(n, -1, *small) + local
        return self.proj(self.act(x))


class EfficientFormer(nn.Module):
    """EfficientFormer L1, L3 or L7 (Li et al., arXiv:2206.01191): maps of strides 4, 8, 16, 32, without timm's last norm.

    Args:
        theirs: timm's network for 224 x 224, whose layers are taken over.
    """

    def __init__(self, theirs: nn.Module):
        super().__init__()
        self.stem, self.stages = theirs.stem, theirs.stages
        self.channels = tuple(info["num_chs"] for info in theirs.feature_info)
        self.strides = tuple(info["reduction"] for info in theirs.feature_info)
        for stage in self.stages:
            for block in stage.blocks:
                if hasattr(block, "norm1"):  # the others mix by pooling and keep the map
                    block.token_mixer = Attention(block.token_mixer, (7, 7))

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.stem(x)
        maps = []
        for stage in self.stages:
            x = stage.downsample(x)
            size = tuple(x.shape[2:])
            for block in stage.blocks:
                if not hasattr(block, "norm1"):
                    x = block(x)  # a map to a map, or to tokens
                    continue
                x = x + block.drop_path1(block.ls1(block.token_mixer(block.norm1(x), size)))
                x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
            maps.append(x if x.dim() == 4 else x.transpose(1, 2).reshape(x.shape[0], x.shape[2], *size))
        return maps


class EfficientFormerV2(nn.Module):
    """EfficientFormerV2 S0, S1, S2 or L (Li et al., arXiv:2212.08059): maps of strides 4, 8, 16, 32, without timm's last norm.

    Args:
        theirs: timm's network for 224 x 224, whose layers are taken over.
    """

    def __init__(self, theirs: nn.Module):
        super().__init__()
        self.stem, self.stages = theirs.stem, theirs.stages
        self.channels = tuple(info["num_chs"] for info in theirs.feature_info)
        self.strides = tuple(info["reduction"] for info in theirs.feature_info)
        for stage in self.stages:
            if getattr(stage.downsample, "attn", None) is not None:
                stage.downsample.attn = AttentionDownsample(stage.downsample.attn)
            for block in stage.blocks:
                if block.token_mixer is not None:
                    block.token_mixer = Attention2d(block.token_mixer)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.stem(x)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps
