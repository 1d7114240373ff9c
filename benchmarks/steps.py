"""Training steps whole: with the fused heads and losses, and with the formulas as people write them. Time and peak memory.

python benchmarks/steps.py                              all: times in one process, memory in a process each; docs/results/steps.md
python benchmarks/steps.py --memory supervised-plain    one step in this process: peak memory over what it began with
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from measure import machine
from torch import Tensor

from segfast import create_model
from segfast.distill import PairWiseLoss, PixelWiseLoss
from segfast.engine import checkpoint
from segfast.ops import upsample_cross_entropy

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
BATCH, SIZE, CLASSES = 8, (360, 480), 19
ROUNDS = 12
STEPS = {
    "supervised-plain": "Fast-SCNN, cross-entropy of the resized logits",
    "supervised-fused": "Fast-SCNN, `upsample_cross_entropy`",
    "official-plain": "+ pixel-wise and pair-wise distillation, the official code's formulas in eager PyTorch",
    "official-fused": "+ `PixelWiseLoss` and `PairWiseLoss`, official presets",
    "paper-plain": "+ pixel-wise KL and pair-wise distillation of 2x2 nodes, the paper's formulas in eager PyTorch",
    "paper-fused": "+ `PixelWiseLoss` and `PairWiseLoss`",
}


def plain_head(logits: Tensor, target: Tensor) -> Tensor:
    logits = F.interpolate(logits, target.shape[1:], mode="bilinear", align_corners=True)
    return F.cross_entropy(logits, target, ignore_index=255)


def fused_head(logits: Tensor, target: Tensor) -> Tensor:
    return upsample_cross_entropy(logits, target, align_corners=True)


def official_pixel_wise(student: Tensor, teacher: Tensor) -> Tensor:
    """The released code of Structured Knowledge Distillation: soft cross-entropy over W, H, summed over the images."""
    return -(teacher.softmax(1) * student.log_softmax(1)).sum() / student.shape[2] / student.shape[3]


def paper_pixel_wise(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student), the mean over the pixels."""
    return F.kl_div(student.log_softmax(1), teacher.log_softmax(1), reduction="none", log_target=True).sum(1).mean()


def similarities(x: Tensor, detach: bool) -> Tensor:
    norm = x.square().sum(1, keepdim=True).sqrt() + 1e-8
    x = x / (norm.detach() if detach else norm)
    return x.transpose(1, 2) @ x


def official_pair_wise(student: Tensor, teacher: Tensor) -> Tensor:
    """The released code: all similarities of the nodes of 2 x 2 max-pooling, as matrices; norms without gradient."""
    patch = student.shape[2] // 2, student.shape[3] // 2
    a, b = (similarities(F.max_pool2d(x, patch, patch, ceil_mode=True).flatten(2), True) for x in (student, teacher))
    return (a - b).square().mean()


def paper_pair_wise(student: Tensor, teacher: Tensor) -> Tensor:
    """Equations 2 and 3 over nodes of 2 x 2 pixels."""
    a, b = (similarities(F.avg_pool2d(x, 2, 2, ceil_mode=True).flatten(2), False) for x in (student, teacher))
    return (a - b).square().mean()


def make(name: str) -> Callable[[], Tensor]:
    """One training step: forward, loss, backward, optimiser. The teacher's outputs are given, as from the trainer's cache."""
    torch.manual_seed(0)
    model = create_model("fast_scnn", CLASSES).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    images = torch.randn(BATCH, 3, *SIZE).contiguous(memory_format=torch.channels_last)
    target = torch.randint(0, CLASSES, (BATCH, *SIZE))
    with torch.no_grad():
        output = model.forward_features(images)
        teacher_logits = torch.randn_like(output.logits)
        teacher_maps = torch.randn_like(output.features["pre_logits"])
    fused = name.endswith("fused")
    head = fused_head if fused else plain_head
    preset = name.partition("-")[0]
    losses = []
    if preset != "supervised" and fused:
        losses = [PixelWiseLoss(preset=preset), PairWiseLoss(preset=preset)]
    elif preset != "supervised":
        losses = [official_pixel_wise, official_pair_wise] if preset == "official" else [paper_pixel_wise, paper_pair_wise]

    def step() -> Tensor:
        optimizer.zero_grad()
        output = model.forward_features(images)
        loss = head(output.logits, target)
        for distillation, mine, theirs in zip(
            losses, (output.logits, output.features["pre_logits"]), (teacher_logits, teacher_maps)
        ):
            loss = loss + distillation(mine, theirs)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def peak(name: str) -> float:
    """MB that two steps add to the process's largest size."""
    step = make(name)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step()
    step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", choices=list(STEPS), help="print the peak memory of this step, in MB")
    chosen = parser.parse_args().memory
    if chosen:
        print(peak(chosen))
        return
    memory = {}
    for name in STEPS:
        # Blocks that are freed go back to the system at once: the peak is that of what was in use.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
        command = [sys.executable, __file__, "--memory", name]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        memory[name] = float(done.stdout)
        print(f"{name}: {memory[name]:.0f} MB", flush=True)
    steps = {name: make(name) for name in STEPS}
    first = {}
    for name, step in steps.items():
        torch.manual_seed(1)  # of the dropout
        first[name] = float(step())
    for kind in ("supervised", "official", "paper"):
        plain, fused = first[f"{kind}-plain"], first[f"{kind}-fused"]
        if abs(plain - fused) > 1e-4 * abs(plain):
            raise SystemExit(f"{kind}: the plain loss is {plain}, the fused {fused}: not measured")
    taken = {name: [] for name in STEPS}
    for i in range(ROUNDS):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            taken[name].append(1000 * (time.perf_counter() - start))
        print(f"round {i + 1} of {ROUNDS}", flush=True)
    milliseconds = {name: statistics.median(times) for name, times in taken.items()}
    facts = {"machine": machine(), "milliseconds": milliseconds, "megabytes": memory}
    checkpoint.write(RESULTS / "steps.json", json.dumps(facts, indent=1) + "\n")
    checkpoint.write(RESULTS / "steps.md", table(facts))
    print(table(facts))


def table(facts: dict) -> str:
    milliseconds, memory = facts["milliseconds"], facts["megabytes"]
    rows = [f"| {text} | {milliseconds[name]:.0f} | {memory[name]:.0f} |" for name, text in STEPS.items()]
    return "\n".join(
        [
            "# Training steps, fused and plain",
            "",
            f"Fast-SCNN ({CLASSES} classes), batch {BATCH}, {SIZE[0]}x{SIZE[1]}, channels_last, forward, loss, backward and SGD; "
            "the network is the same in all rows. The teacher's outputs are given. Milliseconds: median of "
            f"{ROUNDS}, interleaved in one process. MB: what two steps add to a fresh process's peak resident memory.",
            "Generated by `python benchmarks/steps.py`.",
            "",
            "| step | ms | peak MB |",
            "|---|---|---|",
            *rows,
            "",
            f"Machine: {', '.join(facts['machine'].values())}.",
            "",
        ]
    )


if __name__ == "__main__":
    main()
