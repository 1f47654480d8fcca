"""Chooses the codes and scales of a layer for its inputs: a better 4-bit model of the same size.

The format defines how a weight is decoded, but leaves the choice of scales and codes open. ``Calibration`` runs a model
on tokens and encodes each layer so that the error of its outputs on them is small: scales are weighted by the inputs'
second moments, and later codes compensate the rounding errors of earlier ones (GPTQ, Frantar et al., 2022).
"""

from .calibrator import Calibrator, LayerReport, calibration_of
from .init_lora import InitLora, initial_lora_of
from .learning import DISTILLED
from .settings import Calibration
from .store import finished_weights
from .weighted_encoding import Encoded, Feedback, encode

__all__ = [
    "DISTILLED",
    "Calibration",
    "Calibrator",
    "Encoded",
    "Feedback",
    "InitLora",
    "LayerReport",
    "calibration_of",
    "encode",
    "finished_weights",
    "initial_lora_of",
]
