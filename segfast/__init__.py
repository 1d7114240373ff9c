"""segfast: compact, real-time semantic segmentation in PyTorch."""

from segfast import ops
from segfast._version import __version__
from segfast.backbones import create_backbone, list_backbones
from segfast.models import create_model, list_models, load_official
from segfast.optimize import optimize

__all__ = ["__version__", "create_backbone", "create_model", "list_backbones", "list_models", "load_official", "ops", "optimize"]
