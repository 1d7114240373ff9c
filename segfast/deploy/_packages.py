"""Packages of the extras `segfast[deploy]` and `segfast[executorch]`, imported where they are used."""

from __future__ import annotations

import importlib


def need(package: str, what: str, extra: str = "deploy"):
    """The module `package`.

    Raises:
        ImportError: it is missing; the message says what wants it and how to install it.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        if (error.name or "").partition(".")[0] != package.partition(".")[0]:
            raise
        raise ImportError(f"{what}: want {package.partition('.')[0]}: pip install 'segfast[{extra}]'") from error
