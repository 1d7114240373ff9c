"""Official names of parameters, turned into ours."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

# pytorchcv's names of a depthwise-separable unit's layers.
SEPARABLE_KEYS = (
    (r"\.dw_conv\.(conv|bn)\.", lambda match: f".conv.{('conv', 'bn').index(match[1])}."),
    (r"\.pw_conv\.(conv|bn)\.", lambda match: f".conv.{('conv', 'bn').index(match[1]) + 3}."),
)


def rename(key: str, rules: Iterable[tuple[str, str | Callable]]) -> str:
    """A key after all substitutions (`re.sub`), in their order."""
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key
