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
GREY = "#52606d"


def text(x: int, y: int, words: str, **style: str) -> str:
    attributes = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in style.items())
    return f'<text x="{x}" y="{y}"{attributes}>{words}</text>'


def bar(i: int, label: str, count: int, colour: str) -> list[str]:
    y = 92 + i * ROW
    maps = [f'<rect x="{LEFT + k * UNIT}" y="{y}" width="{UNIT - 4}" height="26" rx="3" fill="{colour}"/>' for k in range(count)]
    end = text(LEFT + count * UNIT + 6, y + 18, str(count), font_weight="bold")
    return [text(LEFT - 12, y + 18, label, text_anchor="end"), *maps, end]


def picture() -> str:
    style = 'font-family="Helvetica, Arial, sans-serif" font-size="14" fill="#1f2933"'
    about = "depthwise k x k, BatchNorm, ReLU, pointwise 1 x 1, BatchNorm, ReLU: feature maps read and written at inference"
    foot = "Stride 1, as many channels out as in. Counted, not timed: times are in the table below."
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 290" {style}>',
        '<rect width="800" height="290" fill="#ffffff"/>',
        text(24, 34, "What a depthwise-separable block moves through memory", font_size="18", font_weight="bold"),
        text(24, 58, about, fill=GREY),
        *(line for i, row in enumerate(ROWS) for line in bar(i, *row)),
        text(24, 276, foot, fill=GREY, font_size="12"),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("block.svg").write_text(picture())
