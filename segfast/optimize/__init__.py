"""Whole networks made fast: capture, patterns, what runs them."""

from segfast.optimize._module import Explanation, Line, OptimizedModel, optimize

__all__ = ["Explanation", "Line", "OptimizedModel", "optimize"]
