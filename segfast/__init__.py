"""segfast: compact, real-time semantic segmentation in PyTorch."""

from segfast import ops
from segfast._version import __version__

__all__ = ["__version__", "ops"]
