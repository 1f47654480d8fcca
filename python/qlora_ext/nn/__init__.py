"""Frozen modules with 4-bit weights, and ``quantize_model``, which puts them into a model."""

from .compute_dtype import activations_of, computing_in, multiply_in_bfloat16, set_compute_dtype
from .conversions import CONVERSIONS, conversion_of
from .coverage_report import Coverage, check_something_is_4bit, coverage, report_coverage
from .dense_16bit import Embedding16bit, Linear16bit
from .dense_modules import DENSE_RULES, DenseModules, dense_modules, is_dense, paths_to
from .embedding import Embedding4bit, TiedLinear4bit, is_table
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
from .packed import SCALES, Packed4bit, layers_of, scale_names

__all__ = [
    "AFTER_QUANTIZE",
    "BEFORE_QUANTIZE",
    "CONVERSIONS",
    "DENSE_RULES",
    "SCALES",
    "Coverage",
    "DenseModules",
    "Embedding4bit",
    "Embedding16bit",
    "Experts4bit",
    "ExpertsLora",
    "Linear4bit",
    "Linear16bit",
    "Packed4bit",
    "TiedLinear4bit",
    "activations_of",
    "check_something_is_4bit",
    "computing_in",
    "conversion_of",
    "coverage",
    "dense_modules",
    "is_dense",
    "is_fused_experts",
    "is_table",
    "layers_of",
    "multiply_in_bfloat16",
    "paths_to",
    "places_in",
    "quantize_model",
    "quantized",
    "report_coverage",
    "scale_names",
    "set_compute_dtype",
    "tied_heads",
    "to_be_quantized",
]
