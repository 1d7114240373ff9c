"""`segfast train` and `segfast distill`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from segfast.cli.options import EXIT_CODES, Reporter, explained, merged, takes_config
from segfast.engine.run import fit, shown

Folder = Annotated[Path, typer.Option(help="The run folder; one that holds a run goes on with it.")]
File = Annotated[Path | None, typer.Option(help="YAML file of the fields below; the command line goes first.")]


def train(out: Folder = Path("segfast-run"), config: File = None, given: dict | None = None) -> None:
    """Train a network, or go on with a run that was stopped."""
    start("train", out, config, given or {})


def distill(out: Folder = Path("segfast-run"), config: File = None, given: dict | None = None) -> None:
    """Train a network on labels and on a teacher: `train` with --method and --teacher."""
    start("distill", out, config, given or {})


def start(command: str, out: Path, path: Path | None, given: dict) -> None:
    again = f"segfast {command} --out {shlex.quote(str(out))}"
    with explained(command, again):
        if path is None and (out / "config.yaml").is_file():
            path = out / "config.yaml"
        config = merged(path, given)
        if command == "distill" and not config.method:
            raise ValueError("want --method and --teacher, got neither; segfast train needs none")
        with Reporter() as reporter:
            result = fit(config, out, reporter.say, reporter.progress)
            if result:
                reporter.say(
                    f"mIoU {shown(result['miou'])}, best {result['best_miou']:.4f}, {result['seconds']:.0f} s of training"
                )
                reporter.say(f"wrote {out}/best.safetensors, last.safetensors, metrics.jsonl, result.json")


EXAMPLES = f"""

Examples:

  segfast train --data camvid --root camvid --model fast_scnn --crop 176 240 --steps 2500 --out teacher

  segfast distill --method pixel-wise --teacher teacher --data camvid --root camvid --cache logits --out student

  segfast train --out teacher        (goes on with it)

  torchrun --nproc-per-node 2 -m segfast train --out teacher

{EXIT_CODES}
"""
train.__doc__ += EXAMPLES
distill.__doc__ += EXAMPLES
train, distill = takes_config(train), takes_config(distill)
