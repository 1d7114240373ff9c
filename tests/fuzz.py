"""Random descriptors through every op, forward and backward, on every kernel set. tests/sanitize.sh runs it under sanitizers.

python tests/fuzz.py [--count N] [--seed S] [--ops OP ...]
python tests/fuzz.py --replay '{"op": ..., "kernel_set": ..., ...}'

The descriptor that runs is in a file before it runs; when the process dies in it, or the call raises, it is printed for --replay.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parent))

PACKED = "packed"  # all operations over packed weights, which are private
COUNTS = {"ci": 2_000, "full": 100_000}


def call(case: dict) -> None:
    import fuzz_packed
    from descriptors import build
    from harness import evaluate

    from segfast import _backend, ops

    case = dict(case)
    op, kernel_set, threads = case.pop("op"), case.pop("kernel_set"), case.pop("threads")
    _backend._C.set_kernel_set(kernel_set)
    import torch

    torch.set_num_threads(threads)
    if op == PACKED:
        return fuzz_packed.call(**case)
    sample = build(op, case)
    evaluate(getattr(ops, op), sample, [0])  # the first input alone: nowhere must the reference serve
    if case["seed"] % 4 == 0:
        evaluate(getattr(ops, op), sample)
    if case["seed"] % 2 == 0:
        evaluate(getattr(ops, op), sample, backward=False)


def fuzz(number: int, seed: int, chosen: list[str], current: Path) -> None:
    import fuzz_packed
    from descriptors import DESCRIBE, draw

    from segfast import _backend

    if _backend._C is None:
        raise SystemExit("fuzz.py: want a compiled segfast._C, got the pure-Python package")
    generator = random.Random(seed)
    names = chosen or [*sorted(DESCRIBE), PACKED]
    sets = _backend._C.cpu_features()["kernel_sets"]
    started, done = time.monotonic(), dict.fromkeys(names, 0)
    before = _backend._C.kernel_calls()
    for i in range(number):
        op = names[i % len(names)]
        drawer = fuzz_packed.draw if op == PACKED else partial(draw, op)
        descriptor = drawer(generator.randint, generator.choice)
        case = {"op": op, "kernel_set": sets[i // len(names) % len(sets)], "threads": generator.choice((1, 2)), **descriptor}
        current.write_text(json.dumps(case))
        call(case)
        done[op] += 1
    after = _backend._C.kernel_calls()
    still = [op for op in names if done[op] and all(after[o] == before[o] for o in after if o.startswith(op))]
    if still:
        raise SystemExit(f"fuzz.py: no kernel ran for {still}")
    counts = ", ".join(f"{op} {done[op]}" for op in names)
    kernels = sum(after.values()) - sum(before.values())
    print(f"{number} descriptors, seed {seed}, kernel sets {', '.join(sets)}: {counts}; {kernels} kernel calls, no report")
    print(f"{time.monotonic() - started:.0f} s", flush=True)


def main() -> None:
    effort = os.environ.get("SEGFAST_EFFORT", "ci")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=COUNTS[effort])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ops", nargs="*", default=[])
    parser.add_argument("--replay", type=json.loads)
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.replay is not None:
        return call(arguments.replay)
    if arguments.inside is not None:
        return fuzz(arguments.count, arguments.seed, arguments.ops, arguments.inside)
    with TemporaryDirectory() as scratch:
        current = Path(scratch) / "descriptor.json"
        status = subprocess.run([sys.executable, *sys.argv, "--inside", str(current)], check=False).returncode
        if status and current.exists():
            print(f"exit status {status} in this descriptor; again:\n  bash tests/sanitize.sh --replay '{current.read_text()}'")
        sys.exit(1 if status else 0)


if __name__ == "__main__":
    main()
