"""Frozen modules whose weights are NF4, and ``quantize_model``, which puts them into a model."""

from .conversions import CONVERSIONS, conversion_of
from .coverage_report import Coverage, check_something_is_4bit, coverage, tell_coverage
from .embedding import Embedding4bit, TiedLinear4bit
from .experts import Experts4bit, ExpertsLora, is_fused_experts
from .linear import Linear4bit
from .model import (
    AFTER_QUANTIZE,
    BEFORE_QUANTIZE,
    places_in,
    quantize_model,
    quantized,
    tied_heads,
    to_be_quantized,
)
from .packed import SCALES, Packed4bit, computing_in, layers_of, scale_names
from .staying_dense import KEPT_DENSE, KeptDense, is_dense, kept_dense, paths_to

__all__ = [
    "AFTER_QUANTIZE",
    "BEFORE_QUANTIZE",
    "CONVERSIONS",
    "KEPT_DENSE",
    "SCALES",
    "Coverage",
    "Embedding4bit",
    "Experts4bit",
    "ExpertsLora",
    "KeptDense",
    "Linear4bit",
    "Packed4bit",
    "TiedLinear4bit",
    "check_something_is_4bit",
    "computing_in",
    "conversion_of",
    "coverage",
    "is_dense",
    "is_fused_experts",
    "kept_dense",
    "layers_of",
    "paths_to",
    "places_in",
    "quantize_model",
    "quantized",
    "scale_names",
    "tell_coverage",
    "tied_heads",
    "to_be_quantized",
]
