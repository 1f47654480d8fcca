"""What 4 bits cost a model, per layer and on a text: ``sensitivity`` before quantizing, ``check_model`` after."""

from .check import CurvePoint, ModelCheck, check_model, perplexity
from .layers import LayerCost
from .loss import Increase, block_losses
from .mixed_precision import allowance
from .sensitivity import Sensitivity, sensitivity

__all__ = [
    "CurvePoint",
    "Increase",
    "LayerCost",
    "ModelCheck",
    "Sensitivity",
    "allowance",
    "block_losses",
    "check_model",
    "perplexity",
    "sensitivity",
]
