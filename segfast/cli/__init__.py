"""The command line: one file a command. `segfast` and `python -m segfast` both end up here."""

from segfast.cli.main import app, main

__all__ = ["app", "main"]
