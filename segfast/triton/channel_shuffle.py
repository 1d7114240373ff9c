"""Channel shuffle in Triton: bits are moved, so the width of an element is all that matters."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from segfast import _backend

CONFIGS = {"planes": {"BLOCK": 1024, "num_warps": 4}, "rows": {"BLOCK_ROWS": 16, "BLOCK_CHANNELS": 64, "num_warps": 4}}
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}


# Channel `first + c` of the concatenation lies at ((first + c) % per_group) * groups + (first + c) // per_group once shuffled.
# `part` holds channels [first, first + part_channels) of the concatenation, `whole` all of them, shuffled. A plane is the
# `units` words of one channel of one image.
@triton.jit
def planes(part, whole, part_channels, first, groups, per_group, units, tiles, GATHER: tl.constexpr, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    plane = program // tiles
    image = plane // part_channels
    c = plane - image * part_channels
    channel = first + c
    to = (channel % per_group) * groups + channel // per_group
    unit = (program - plane * tiles) * BLOCK + tl.arange(0, BLOCK)
    inside = unit < units
    in_part = part + plane * units + unit
    in_whole = whole + (image * groups * per_group + to) * units + unit
    if GATHER:
        tl.store(in_part, tl.load(in_whole, mask=inside), mask=inside)
    else:
        tl.store(in_whole, tl.load(in_part, mask=inside), mask=inside)


# Channels last: rows of part_channels * WORDS words. A program moves a tile of rows x words.
@triton.jit
def rows(
    part, whole, row_count, part_channels, first, groups, per_group,
    GATHER: tl.constexpr, WORDS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(part_channels * WORDS, BLOCK_CHANNELS)
    program = tl.program_id(0).to(tl.int64)
    row_block = program // blocks
    row = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    word = (program - row_block * blocks) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    channel = first + word // WORDS
    to = ((channel % per_group) * groups + channel // per_group) * WORDS + word % WORDS
    inside = (row < row_count)[:, None] & (word < part_channels * WORDS)[None, :]
    in_part = part + row[:, None] * (part_channels * WORDS) + word[None, :]
    in_whole = whole + row[:, None] * (per_group * groups * WORDS) + to[None, :]
    if GATHER:
        tl.store(in_part, tl.load(in_whole, mask=inside), mask=inside)
    else:
        tl.store(in_whole, tl.load(in_part, mask=inside), mask=inside)


def move(part: Tensor, whole: Tensor, first: int, groups: int, channels_last: bool, gather: bool) -> None:
    """Between channels [first, ...) of a concatenation, dense (N, C_i, H, W) or (N, H, W, C_i), and the shuffled whole."""
    if part.numel() == 0:
        return
    words = 2 if part.element_size() == 16 else 1
    part_words, whole_words = (torch.view_as_real(x) if words == 2 else x for x in (part, whole))
    part_words, whole_words = (x.view(_WORDS[part.element_size()]) for x in (part_words, whole_words))
    channel = 3 if channels_last else 1
    part_channels, channels = part.shape[channel], whole.shape[channel]
    with torch.cuda.device_of(part):
        if channels_last:
            row_count, config = part.numel() // part_channels, CONFIGS["rows"]
            grid = triton.cdiv(row_count, config["BLOCK_ROWS"]) * triton.cdiv(part_channels * words, config["BLOCK_CHANNELS"])
            sizes = row_count, part_channels, first, groups, channels // groups
            rows[(grid,)](part_words, whole_words, *sizes, GATHER=gather, WORDS=words, **config)
        else:
            units = part.shape[2] * part.shape[3] * words
            tiles = triton.cdiv(units, CONFIGS["planes"]["BLOCK"])
            sizes = part_channels, first, groups, channels // groups, units, tiles
            grid = part.shape[0] * part_channels * tiles
            planes[(grid,)](part_words, whole_words, *sizes, GATHER=gather, **CONFIGS["planes"])


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    channels_last = _backend.layout(x) == torch.channels_last
    dense = (x.permute(0, 2, 3, 1) if channels_last else x).contiguous()
    y = torch.empty_like(dense)
    move(dense, y, 0, groups, channels_last, gather=False)
    return y.permute(0, 3, 1, 2) if channels_last else y
