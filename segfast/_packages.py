"""Packages of the extras, imported where they are used."""

from __future__ import annotations

import importlib


def need(package: str, what: str, extra: str):
    """The module `package`, of the extra `segfast[extra]`.

    Raises:
        ImportError: it is missing or does not load (as a torchvision built for another torch); the message says what wants it and
            how to install it.
    """
    try:
        return importlib.import_module(package)
    except Exception as error:
        top = package.partition(".")[0]
        raise ImportError(f"{what}: want {top}: pip install 'segfast[{extra}]' ({error})") from error
