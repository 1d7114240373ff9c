"""Time the units of light networks fused and in plain PyTorch, at the networks' own shapes: python benchmarks/units.py [--write]

Both run in one process, in turns, on the CPU, in eval mode, batch 1, channels_last and contiguous, with random weights. Each
round times both; the ratio is the median over rounds of plain / fused. A unit is refused if the two differ by more than the
tests allow. "default" says what the unit runs on that layout by itself: the fused form where a unit's rows together win at
least 1.1x, else plain PyTorch, which is then timed against itself. Without --write the rows are printed; with it they replace
benchmarks/units.json.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from measure import machine, require_right
from torch import Tensor, nn

from segfast import nn as sf

ROUNDS = 15
SECONDS = 0.6  # a row's timing, about


def shuffle(x: Tensor, groups: int) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


def plain_inverted(unit: sf.InvertedResidual, x: Tensor) -> Tensor:
    y = unit.separable.conv(unit.expand(x))
    return x + y if unit.use_shortcut else y


def plain_v1(unit: sf.ShuffleV1Unit, x: Tensor) -> Tensor:
    y = unit.expand(unit.depthwise(shuffle(unit.compress(x), unit.groups)))
    return F.relu(x + y) if unit.stride == 1 else F.relu(torch.cat([y, F.avg_pool2d(x, 3, 2, 1)], 1))


def plain_v2(unit: sf.ShuffleV2Unit, x: Tensor) -> Tensor:
    if unit.stride == 2:
        return shuffle(torch.cat([unit.shortcut.conv(x), unit.separable.conv(unit.expand(x))], 1), 2)
    left, right = x.chunk(2, 1)
    return shuffle(torch.cat([left, unit.separable.conv(unit.expand(right))], 1), 2)


def plain_esp(unit: sf.ESP, x: Tensor) -> Tensor:
    reduced = unit.reduce(x)
    maps = [branch(reduced) for branch in unit.branches]
    for i in range(2, len(maps)):
        maps[i] = maps[i - 1] + maps[i]
    y = torch.cat(maps, 1)
    return unit.act(unit.bn(x + y if unit.residual else y))


# unit, network, module, its plain form, shape of the input
ROWS: list[tuple[str, str, Callable[[], nn.Module], Callable, tuple[int, ...]]] = [
    ("depthwise-separable", "Fast-SCNN", lambda: sf.DSConv(48, 64, 2), lambda m, x: m.conv(x), (1, 48, 128, 256)),
    ("depthwise-separable", "Fast-SCNN", lambda: sf.DSConv(128, 128), lambda m, x: m.conv(x), (1, 128, 64, 128)),
    ("inverted residual", "Fast-SCNN", lambda: sf.InvertedResidual(64, 64, 2, act="relu"), plain_inverted, (1, 64, 64, 128)),
    ("inverted residual", "Fast-SCNN", lambda: sf.InvertedResidual(96, 96, act="relu"), plain_inverted, (1, 96, 16, 32)),
    ("inverted residual", "Fast-SCNN", lambda: sf.InvertedResidual(128, 128, act="relu"), plain_inverted, (1, 128, 16, 32)),
    ("inverted residual", "MobileNetV2", lambda: sf.InvertedResidual(24, 24), plain_inverted, (1, 24, 128, 256)),
    ("inverted residual", "MobileNetV2", lambda: sf.InvertedResidual(32, 32), plain_inverted, (1, 32, 64, 128)),
    ("inverted residual", "MobileNetV2", lambda: sf.InvertedResidual(96, 96), plain_inverted, (1, 96, 32, 64)),
    ("ShuffleNet v1 unit", "ShuffleNetV1 g3", lambda: sf.ShuffleV1Unit(240, 240, 3), plain_v1, (1, 240, 64, 128)),
    ("ShuffleNet v1 unit", "ShuffleNetV1 g8", lambda: sf.ShuffleV1Unit(384, 384, 8), plain_v1, (1, 384, 64, 128)),
    ("ShuffleNet v2 unit", "ShuffleNetV2 1.0", lambda: sf.ShuffleV2Unit(24, 116, 2), plain_v2, (1, 24, 128, 256)),
    ("ShuffleNet v2 unit", "ShuffleNetV2 1.0", lambda: sf.ShuffleV2Unit(116, 116), plain_v2, (1, 116, 64, 128)),
    ("ShuffleNet v2 unit", "ShuffleNetV2 1.0", lambda: sf.ShuffleV2Unit(232, 232), plain_v2, (1, 232, 32, 64)),
    ("ESP", "ESPNet", lambda: sf.ESP(19, 64, 2), plain_esp, (1, 19, 256, 512)),
    ("ESP", "ESPNet", lambda: sf.ESP(64, 64), plain_esp, (1, 64, 128, 256)),
    ("ESP", "ESPNet", lambda: sf.ESP(131, 128, 2), plain_esp, (1, 131, 128, 256)),
    ("ESP", "ESPNet", lambda: sf.ESP(128, 128), plain_esp, (1, 128, 64, 128)),
]


CHANNELS_LAST = ("ShuffleNet v1 unit", "ESP")  # fuse on channels_last maps alone


def randomise(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
            nn.init.normal_(layer.running_mean, std=0.1)
    return module.eval()


def once(call: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - start)


def default(unit: str, memory_format: torch.memory_format) -> str:
    return "fused" if memory_format == torch.channels_last or unit not in CHANNELS_LAST else "eager"


@torch.inference_mode()
def row(unit: str, network: str, build, plain, shape: tuple[int, ...], memory_format: torch.memory_format) -> dict:
    module = randomise(build()).to(memory_format=memory_format)
    x = torch.randn(shape).contiguous(memory_format=memory_format)
    fused, eager = (lambda: module(x)), (lambda: plain(module, x))
    ours, theirs = fused(), eager()
    exact = plain(module.double(), x.double())
    module.float()
    require_right(ours, theirs, exact)
    calls = max(1, round(1000 * SECONDS / ROUNDS / (once(fused) + once(eager))))
    rounds = []
    for _ in range(ROUNDS):
        pairs = [(once(fused), once(eager)) for _ in range(calls)]
        rounds.append(tuple(statistics.median(times) for times in zip(*pairs)))
    return {
        "unit": unit,
        "network": network,
        "shape": list(shape),
        "layout": "channels_last" if memory_format == torch.channels_last else "contiguous",
        "fused_ms": round(statistics.median(f for f, _ in rounds), 4),
        "eager_ms": round(statistics.median(e for _, e in rounds), 4),
        "ratio": round(statistics.median(e / f for f, e in rounds), 3),
        "default": default(unit, memory_format),
    }


def main() -> None:
    layouts = (torch.channels_last, torch.contiguous_format)
    rows = [row(*entry, memory_format) for entry in ROWS for memory_format in layouts]
    for r in rows:
        shape = "x".join(map(str, r["shape"]))
        print(f"{r['unit']:20} {r['network']:17} {shape:14} {r['layout']:14}", end=" ")
        print(f"{r['fused_ms']:8.3f} {r['eager_ms']:8.3f} {r['ratio']:6.2f}")
    if "--write" in sys.argv[1:]:
        result = {"machine": machine(), "rows": rows}
        (Path(__file__).parent / "units.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
