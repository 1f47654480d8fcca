"""Frozen modules whose weights are NF4, and ``quantize_model``, which puts them into a model."""

from .linear import SCALES, Linear4bit
from .model import AFTER_QUANTIZE, CONVERSIONS, paths_to, quantize_model

__all__ = ["AFTER_QUANTIZE", "CONVERSIONS", "SCALES", "Linear4bit", "paths_to", "quantize_model"]
