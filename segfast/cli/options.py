"""Every field of `segfast.engine.Config` as an option of a command, and what the training commands print."""

from __future__ import annotations

import dataclasses
import inspect
import json
import signal
import time
import typing
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from segfast.engine import config as configs
from segfast.engine.run import Stopped

EXIT_CODES = "Exit codes: 0 done, 1 the loss was not finite, 2 wrong arguments, data or files, 130 Ctrl-C, 143 SIGTERM."


def takes_config(command: Callable) -> Callable:
    """Give a command an option for every config field; those that were given arrive as the dict `given`.

    `command` has further parameters of its own, and `config`, the path of a YAML file.
    """
    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "given"]
    hints = typing.get_type_hints(configs.Config)
    added = []
    for f in dataclasses.fields(configs.Config):
        wanted, _ = configs.kind(hints[f.name])
        default = f.default if f.default is not dataclasses.MISSING else "{}"
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        text = f.metadata["help"] + ("" if default is None else f" [default: {shown}]")
        option = typer.Option(help=text, show_default=False)
        added.append(
            inspect.Parameter(
                f.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[(str if wanted is dict else wanted) | None, option],
            )
        )

    def run(**arguments):
        given = {p.name: arguments.pop(p.name) for p in added}
        given = {name: value for name, value in given.items() if value is not None}
        for name, value in given.items():
            if hints[name] is dict:
                try:
                    given[name] = json.loads(value)
                except json.JSONDecodeError as error:
                    raise typer.BadParameter(f"--{name.replace('_', '-')}: want JSON, got {value!r}") from error
        return command(**arguments, given=given)

    keyword = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
    run.__signature__ = inspect.Signature(keyword + added)
    run.__annotations__ = {p.name: p.annotation for p in keyword + added}
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    return run


def merged(path: Path | None, given: dict, **more) -> configs.Config:
    """The config of a YAML file, overridden by what the command line gave."""
    values = configs.read(path) if path else {}
    return configs.from_mapping({**values, **more, **given}, str(path or "command line"))


class Reporter:
    """Bars with rates and times left on a terminal; where the output goes elsewhere, plain lines, one in ten seconds at most."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console()
        self.bars = None
        self.tasks: dict[str, int] = {}
        self.began: dict[str, tuple[float, int]] = {}
        self.spoke = 0.0

    def __enter__(self) -> Reporter:
        if self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[text]}"),
            )  # fmt: skip
            self.bars = Progress(*columns, console=self.console)
            self.bars.start()
        return self

    def __exit__(self, *_) -> None:
        if self.bars:
            self.bars.stop()

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def progress(self, stage: str, done: int, total: int, values: dict[str, float]) -> None:
        now = time.monotonic()
        first = self.began.get(stage)
        if first is None or done <= first[1]:
            first = self.began[stage] = now, done - 1
            if self.bars and stage in self.tasks:
                self.bars.reset(self.tasks[stage])
        rate = (done - first[1] - 1) / (now - first[0]) if now > first[0] and done > first[1] + 1 else 0.0
        text = "  ".join(f"{name} {value:.3f}" for name, value in values.items())
        if self.bars:
            if stage not in self.tasks:
                self.tasks[stage] = self.bars.add_task(stage, text="", rate="", completed=done - 1, total=total)
            self.bars.update(self.tasks[stage], completed=done, total=total, text=text, rate=f"{rate:.1f}/s" if rate else "")
        elif done == total or now - self.spoke >= 10:
            self.spoke = now
            left = f", {duration((total - done) / rate)} left" if rate and done < total else ""
            self.say(f"{stage} {done}/{total}{f', {rate:.1f}/s' if rate else ''}{left}{'  ' + text if text else ''}")


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@contextmanager
def explained(command: str, again: str = ""):
    """Turn errors into a line on stderr and an exit code; `again` says how to go on."""
    try:
        yield
    except Stopped as stop:
        typer.echo(
            f"segfast {command}: {stop}; {'the state is saved' if stop.step else 'no step was done yet'}. Go on with: {again}",
            err=True,
        )
        raise typer.Exit(128 + stop.signal) from None
    except KeyboardInterrupt:
        typer.echo(f"segfast {command}: interrupted. {f'Go on with: {again}' if again else ''}".rstrip(), err=True)
        raise typer.Exit(128 + signal.SIGINT) from None
    except FloatingPointError as error:
        typer.echo(f"segfast {command}: {error}", err=True)
        raise typer.Exit(1) from error
    except (ValueError, OSError, ImportError) as error:
        typer.echo(f"segfast {command}: {error}", err=True)
        raise typer.Exit(2) from error
