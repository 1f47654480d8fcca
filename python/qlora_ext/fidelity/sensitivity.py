"""``sensitivity``: estimates, before quantizing, how much loss the quantization of each layer would cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..nn import quantized, to_be_quantized
from .comparison import text_of
from .layer_costs import Candidate, LayerCost, measure
from .mixed_precision import choose

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..form import FormKeywords


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """What 4 bits would cost each layer of a model.

    Attributes:
        layers: the cost of each layer, in the order of the model.
        bytes: size of the model with all these layers in 4 bits.
    """

    layers: list[LayerCost]
    bytes: int

    def chosen(self, budget: int | str) -> list[LayerCost]:
        """The layers to leave dense, in the order of their cost in loss per byte.

        Args:
            budget: a number of layers, or a limit on their additional bytes: a percentage of ``bytes`` ("5%"), or a
                size ("200MB").

        Raises:
            ValueError: ``budget`` is none of these.
        """
        return choose(self.layers, self.bytes, budget)

    def keep(self, budget: int | str) -> list[str]:
        """The names of the layers in ``chosen``, for the argument ``keep`` of ``quantize_model``."""
        return [layer.name for layer in self.chosen(budget)]


def total_bytes(model: nn.Module) -> int:
    """The size of all parameters and buffers of ``model``. A tensor that several modules share counts once."""
    return sum(t.nbytes for t in {id(t): t for t in (*model.parameters(), *model.buffers())}.values())


def sensitivity(
    model: nn.Module,
    inputs: Tensor | str = "self",
    skip: Iterable[str] | None = None,
    *,
    towers: bool = False,
    tokens: int = 4096,
    length: int = 128,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    **form: Unpack[FormKeywords],
) -> Sensitivity:
    """Estimates for each layer that ``quantize_model`` would quantize how much the loss rises if only it is 4-bit.

    It is a second-order estimate from the Fisher information of the layer's outputs; see ``fidelity/layer_costs.py``.
    Memory holds the dense model, a 4-bit copy of its layers and the activations of one sequence. The time is that of
    about six forward passes over the tokens. Typical use is
    ``quantize_model(model, keep=sensitivity(model).keep("5%"))``.

    Args:
        model: a dense language model that maps token ids [B, T] to logits [B, T, V]. It is not changed.
        inputs: "self" (a transformers model writes its own text), or token ids int64 [B, T].
        skip, towers: as in ``quantize_model``.
        tokens, length: number of tokens that the model writes, in total and per sequence.
        seed: of that text, and of the random labels.
        progress: called with the number of finished sequences and the number of all sequences.
        form: ``block_size``, ``double_quant``, ``nested_block_size`` and ``code``, as in ``Linear4bit``.

    Raises:
        TypeError, ValueError: an argument is invalid, or the model has no layer to quantize.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=128))
        >>> costs = qlora_ext.sensitivity(model, torch.randint(0, 128, (4, 16)))
        >>> model = qlora_ext.quantize_model(model, keep=costs.keep(2))  # the two costliest of 14 layers stay dense
        >>> sum(isinstance(module, qlora_ext.nn.Linear4bit) for module in model.modules())
        12
    """
    layers = to_be_quantized(model, skip, towers=towers)
    if not layers:
        raise ValueError("model: expected one with dense layers to quantize, found none")
    ids = text_of(inputs, model, tokens // length, length, seed, least=1)
    candidates = {module: Candidate(name, quantized(module, **form)) for module, name in layers.items()}
    costs = measure(model, candidates, ids, seed, progress)
    return Sensitivity(costs, total_bytes(model) - sum(cost.extra_bytes for cost in costs))
