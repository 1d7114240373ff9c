"""Mutants of the CUDA kernels: every barrier, comparison, condition, shuffle and integer constant, found by pattern.

    python tests/simt/mutate.py [--jobs 2] [--only shuffle.cuh] [--part 0/4] [--draw 8 --seed 0]

Each is removed, turned or shifted by one, and the drivers must notice: by a wrong result, an access out of bounds, wrong counts
of bytes, a divergent barrier, a crash, or no end. Most mutants share one build and are chosen at run time (mutants.h); those in
constant expressions have a build each. Exits with 1 if fewer than 95 % are killed, or a survivor is not in EQUIVALENT.
"""

from __future__ import annotations

import argparse
import random
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import simt_build

FLAGS = ("-w", "-ftrivial-auto-var-init=zero", "-DSIMT_MUTANTS", "-fsanitize=bounds", "-fsanitize-undefined-trap-on-error")
DRIVERS_OF = {"launch.cuh": ("pixelwise_kl", "depthwise", "shuffle")}  # of the others: their own
TURNED = {"<": "<=", "<=": "<", ">": ">=", ">=": ">"}
SECONDS = 60
# Survivors that change nothing, by file, line of code, column and change; each with its proof in docs/proof/mutation.md.
EQUIVALENT = Path(__file__).with_name("equivalent.txt")


@dataclass
class Mutant:
    file: str
    line: int
    start: int
    end: int
    what: str
    alone: str  # the text that replaces [start, end) in a build of its own
    shared: str | None  # with {id} filled in: the text that holds original and mutant; None: only alone
    original: str = ""
    id: int = -1
    killed_by: str | None = field(default=None)

    def key(self) -> str:
        return (
            f"{self.file}: {self.original.strip()} @{self.start - len(self.original) + len(self.original.lstrip())}: {self.what}"
        )


def closing(text: str, at: int) -> int:
    """Where the parenthesis that opens at `at` closes, or -1."""
    depth = 0
    for i in range(at, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i
    return -1


def operands(text: str, start: int, end: int) -> tuple[int, int]:
    """From where to where the operands of the && or || at [start, end) reach; (-1, -1) if not within the line."""
    left, depth = start, 0
    while left > 0:
        c = text[left - 1]
        depth += {")": 1, "]": 1, "(": -1, "[": -1}.get(c, 0)
        before = text[left - 3 : left]
        if depth < 0 or (depth == 0 and (c in ",;{?" or before in ("&& ", "|| ", " = ") or text[left - 7 : left] == "return ")):
            break
        left -= 1
    right, depth = end, 0
    while right < len(text):
        c = text[right]
        depth += {"(": 1, "[": 1, ")": -1, "]": -1}.get(c, 0)
        if depth < 0 or (depth == 0 and (c in ",;?" or text[right : right + 2] in ("&&", "||"))):
            break
        right += 1
    if left == 0 or right == len(text):
        return -1, -1
    left += len(text[left:start]) - len(text[left:start].lstrip())
    right -= len(text[end:right]) - len(text[end:right].rstrip())
    return left, right


def find(path: Path) -> list[Mutant]:
    mutants: list[Mutant] = []
    device_only = False
    for number, line in enumerate(path.read_text().splitlines()):
        if line.startswith("#else"):
            device_only = True
        if line.startswith("#endif"):
            device_only = False
        code = line.split("//")[0].rstrip()
        if device_only or line.startswith(("#", "template <", "using", "namespace", "enum")) or "__launch_bounds__" in line:
            continue
        constant = "constexpr" in code or code.lstrip().startswith("case ")
        spans = [m.span() for m in re.finditer(r"\w<[^<>;(){}]*(?:<[^<>]*>[^<>;(){}]*)*>", code)]

        def add(start, end, what, alone, shared, line=line, number=number, constant=constant, spans=spans):
            inside = any(a <= start < b for a, b in spans)
            shared = None if constant or inside else shared
            mutants.append(Mutant(path.name, number, start, end, what, alone, shared, line))

        for m in re.finditer(r"__syncthreads\(\);", code):
            add(*m.span(), "no barrier", ";", "if (!simt_is({id})) __syncthreads();")
        for m in re.finditer(r" (<=|>=|<|>) ", code):
            kind = {"<": "<", "<=": "l", ">": ">", ">=": "g"}[m[1]]
            turned = TURNED[m[1]]
            add(m.start(1), m.end(1), f"{m[1]} to {turned}", turned, f"<simt_compare({{id}}, '{kind}')>")
        for m in re.finditer(r" (==|!=) ", code):
            turned = "!=" if m[1] == "==" else "=="
            add(m.start(1), m.end(1), f"{m[1]} to {turned}", turned, f"==simt_equal({{id}}, '{m[1][0]}')==")
        for m in re.finditer(r"\bif \(", code):
            end = closing(code, m.end() - 1)
            if end < 0:
                continue
            condition = code[m.end() : end]
            for value in ("true", "false"):
                add(m.end(), end, f"condition {value}", value, f"simt_is({{id}}) ? {value} : ({condition})")
        for m in re.finditer(r" (&&|\|\|) ", code):
            turned = "||" if m[1] == "&&" else "&&"
            start, end = operands(code, m.start(1), m.end(1))
            mutated = f"({code[start : m.start(1)]}{turned}{code[m.end(1) : end]})"
            chained = re.search(r"&&|\|\|", code[:start].rstrip()[-2:] + code[end:].lstrip()[:2])
            shared = None if chained or start < 0 else f"(simt_is({{id}}) ? {mutated} : ({code[start:end]}))"
            if start >= 0:
                add(start, end, f"{m[1]} to {turned} @{m.start(1) - start}", mutated, shared)
        for m in re.finditer(r"__shfl_down_sync\(kFullMask, ([\w.]+), offset\)", code):
            add(*m.span(), "no shuffle", m[1], f"(simt_is({{id}}) ? {m[1]} : {m[0]})")
        for m in re.finditer(r"\bkFullMask\b(?! =)", code):
            add(*m.span(), "half the mask", "0xffffu", "(simt_is({id}) ? 0xffffu : kFullMask)")
        for m in re.finditer(r"(?<![\w.])(?<!\. / )(\d+)(?![\w.]|\s*\.)", code):  # not of 1. / 720
            value = int(m[1])
            for shifted in (value + 1, value - 1) if value else (1,):
                add(*m.span(), f"{value} to {shifted}", str(shifted), f"(simt_is({{id}}) ? {shifted} : {value})")
    for i, mutant in enumerate(mutants):
        mutant.id = i
    return mutants


def nest(text: str, mutants: list[Mutant]) -> str:
    """The line with all of its shared mutants: those that lie within another's text are kept there."""
    pieces: dict[tuple[int, int], list[Mutant]] = {}
    for mutant in mutants:
        pieces.setdefault((mutant.start, mutant.end), []).append(mutant)

    def render(start: int, end: int, chosen: list[tuple[int, int]]) -> str:
        out, at = "", start
        outer = [s for s in chosen if not any(o != s and o[0] <= s[0] and s[1] <= o[1] for o in chosen)]
        for a, b in sorted(outer):
            inner = [s for s in chosen if s != (a, b) and a <= s[0] and s[1] <= b]
            here = render(a, b, inner) if inner else text[a:b]
            for mutant in pieces[a, b]:
                here = (
                    mutant.shared.replace("{id}", str(mutant.id)).replace(text[a:b], here)
                    if text[a:b] in mutant.shared
                    else (mutant.shared.replace("{id}", str(mutant.id)))
                )
            out += text[at:a] + here
            at = b
        return out + text[at:end]

    return render(0, len(text), list(pieces))


def headers(folder: Path, file: str, text: str) -> Path:
    """A copy of csrc/cuda in which one file has another text."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in simt_build.CUDA.glob("*.cuh"):
        shutil.copy(path, folder)
    (folder / file).write_text(text)
    return folder


def build_shared(folder: Path, file: str, driver: str, mutants: list[Mutant]) -> Path:
    """One program with all mutants that fit in; a line that does not compile gives up its shared mutants."""
    lines = (simt_build.CUDA / file).read_text().splitlines()
    for attempt in range(8):
        made = list(lines)
        by_line: dict[int, list[Mutant]] = {}
        for mutant in mutants:
            if mutant.shared is not None:
                by_line.setdefault(mutant.line, []).append(mutant)
        for number, here in by_line.items():
            made[number] = nest(lines[number], here)
        where = headers(folder / f"{file}-{driver}-{attempt}", file, "\n".join(made) + "\n")
        try:
            return simt_build.driver(driver, where / "driver", ("-O1", *FLAGS), where)
        except RuntimeError as failed:
            broken = {int(n) - 1 for n in re.findall(rf"{re.escape(file)}:(\d+):\d+: error", str(failed))}
            broken |= {int(n) - 1 for n in re.findall(rf"{re.escape(file)}:(\d+):\d+:   (?:in|required)", str(failed))}
            broken &= set(by_line)
            if not broken:
                raise
            for mutant in mutants:
                if mutant.line in broken:
                    mutant.shared = None
    raise RuntimeError(f"{file}: the mutants do not compile")


def fails(command: list[str]) -> str | None:
    """Why the driver failed, or None."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return "no end"
    if done.returncode == 0:
        return None
    return done.stderr.strip().splitlines()[-1][:120] if done.stderr.strip() else f"signal {-done.returncode}"


def run_alone(mutant: Mutant, folder: Path, drivers: tuple[str, ...]) -> None:
    lines = (simt_build.CUDA / mutant.file).read_text().splitlines()
    line = lines[mutant.line]
    lines[mutant.line] = line[: mutant.start] + mutant.alone + line[mutant.end :]
    where = headers(folder / f"alone-{mutant.file}-{mutant.id}", mutant.file, "\n".join(lines) + "\n")
    for driver in drivers:
        try:
            program = simt_build.driver(driver, where / driver, ("-O0", *FLAGS), where)
        except RuntimeError:
            mutant.killed_by = "the compiler"
            break
        mutant.killed_by = fails([str(program)])
        if mutant.killed_by:
            break
    shutil.rmtree(where, ignore_errors=True)


def run(files: list[str], jobs: int, draw: int | None = None, seed: int = 0, part: tuple[int, int] = (0, 1)) -> list[Mutant]:
    """The mutants of these files, `draw` of them or the part-th of so many parts, each with what killed it."""
    folder = Path(tempfile.mkdtemp(prefix="segfast-mutants-"))
    chosen: list[Mutant] = []
    try:
        with ThreadPoolExecutor(jobs) as pool:
            for file in files:
                drivers = DRIVERS_OF.get(file, (file.removesuffix(".cuh"),))
                mutants = find(simt_build.CUDA / file)
                programs = [build_shared(folder, file, driver, mutants) for driver in drivers]
                for program in programs:
                    unchanged = fails([str(program)])
                    if unchanged:
                        raise RuntimeError(f"{file}: the driver fails without a mutant: {unchanged}")
                shared = [m for m in mutants if m.shared is not None]
                here = random.Random(seed).sample(shared, min(draw, len(shared))) if draw else mutants[part[0] :: part[1]]

                def one(mutant: Mutant, programs=programs, drivers=drivers) -> None:
                    if mutant.shared is None:
                        return run_alone(mutant, folder, drivers)
                    for program in programs:
                        mutant.killed_by = fails([str(program), str(mutant.id)])
                        if mutant.killed_by:
                            return None
                    return None

                list(pool.map(one, here))
                chosen += here
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return [m for m in chosen if m.killed_by != "the compiler"]  # what does not compile is no mutant


def equivalents() -> set[str]:
    return (
        {line for line in EQUIVALENT.read_text().splitlines() if line and not line.startswith("#")}
        if EQUIVALENT.exists()
        else set()
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=[path.name for path in sorted(simt_build.CUDA.glob("*.cuh"))])
    parser.add_argument("--draw", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part", default="0/1", help="i/n: every n-th mutant, from the i-th")
    options = parser.parse_args()
    mutants = run(options.only, options.jobs, options.draw, options.seed, tuple(map(int, options.part.split("/"))))
    survivors = [m for m in mutants if m.killed_by is None]
    known = equivalents()
    rows = []
    for file in options.only:
        here = [m for m in mutants if m.file == file]
        rows.append(f"| {file} | {len(here)} | {sum(m.killed_by is not None for m in here)} |")
    killed = len(mutants) - len(survivors)
    print("\n".join(rows))
    print(f"{killed} of {len(mutants)} killed: {100 * killed / max(1, len(mutants)):.1f} %")
    for m in survivors:
        print(("equivalent  " if m.key() in known else "SURVIVOR    ") + f"{m.line + 1}  {m.key()}")
    return int(killed < 0.95 * len(mutants) or any(m.key() not in known for m in survivors))


if __name__ == "__main__":
    sys.exit(main())
