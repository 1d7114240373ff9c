"""Draws docs/block.svg: the memory traffic of a depthwise-separable block, eager and fused.

The counts are the rooflines of the block at stride 1 with equal channels, in units of one feature map:
eager with BatchNorm A + 6 B + 5 D = 12, folded A + 4 B + 3 D = 8, fused activations A + 2 B + D = 4, segfast A + D = 2.
"""

from pathlib import Path

ROWS = [
    ("eager PyTorch, BatchNorm kept", 12, "#9aa5b1"),
    ("BatchNorm folded", 8, "#9aa5b1"),
    ("activations fused as well", 4, "#9aa5b1"),
    ("segfast.ops.ds_conv", 2, "#0b7285"),
]
LEFT, UNIT, ROW = 250, 36, 42


def bar(i: int, label: str, count: int, colour: str) -> str:
    y = 92 + i * ROW
    maps = "".join(f'<rect x="{LEFT + k * UNIT}" y="{y}" width="{UNIT - 4}" height="26" rx="3" fill="{colour}"/>' for k in range(count))
    return (
        f'<text x="{LEFT - 12}" y="{y + 18}" text-anchor="end">{label}</text>{maps}'
        f'<text x="{LEFT + count * UNIT + 6}" y="{y + 18}" font-weight="bold">{count}</text>'
    )


def picture() -> str:
    rows = "\n".join(bar(i, *row) for i, row in enumerate(ROWS))
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 740 290" font-family="Helvetica, Arial, sans-serif" font-size="14" fill="#1f2933">
<rect width="740" height="290" fill="#ffffff"/>
<text x="24" y="34" font-size="18" font-weight="bold">What a depthwise-separable block moves through memory</text>
<text x="24" y="58" fill="#52606d">depthwise k x k, BatchNorm, ReLU, pointwise 1 x 1, BatchNorm, ReLU: feature maps read and written at inference</text>
{rows}
<text x="24" y="276" font-size="12" fill="#52606d">Stride 1, as many channels out as in. Counted, not timed: times are in the table below.</text>
</svg>
"""


if __name__ == "__main__":
    Path(__file__).with_name("block.svg").write_text(picture())
