"""What is said of a name that is none of those wanted."""

import difflib
from collections.abc import Iterable


def nearest(name: str, names: Iterable[str]) -> str:
    """The names most like `name` as a question with a space behind it, empty if none is."""
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    return f"did you mean {' or '.join(near)}? " if near else ""


def unknown(what: str, name: str, names: Iterable[str]) -> ValueError:
    """The error for a name that is not among `names`: the nearest ones first."""
    return ValueError(f"{what}: {nearest(name, names)}want one of {', '.join(sorted(names))}, got {name!r}")
