"""What 4 bits cost a model, per layer and on a text: ``sensitivity`` before quantizing, ``check_model`` after."""

from .comparison import Comparison, Increase, compare, losses_of, perplexity
from .layer_costs import LayerCost
from .mixed_precision import allowance
from .model_check import CurvePoint, ModelCheck, check_model
from .sensitivity import Sensitivity, sensitivity

__all__ = [
    "Comparison",
    "CurvePoint",
    "Increase",
    "LayerCost",
    "ModelCheck",
    "Sensitivity",
    "allowance",
    "check_model",
    "compare",
    "losses_of",
    "perplexity",
    "sensitivity",
]
