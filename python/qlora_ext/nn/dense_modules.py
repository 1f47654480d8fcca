"""Names the modules that stay dense: output heads, towers, and layers that a library keeps in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from .._internal.integrate import integrate
from .conversions import conversion_of
from .embedding import is_table
from .experts import is_fused_experts


def paths_to(name: str) -> list[str]:
    """The dotted names of the modules from the outermost to ``name`` itself: a, a.b, a.b.c.

    Example:
        >>> qlora_ext.nn.paths_to("model.layers.0")
        ['model', 'model.layers', 'model.layers.0']
    """
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def is_dense(module: nn.Module) -> bool:
    """Whether ``module`` is dense and of a kind that can be 4-bit.

    Example:
        >>> qlora_ext.nn.is_dense(nn.Linear(4, 4)), qlora_ext.nn.is_dense(nn.ReLU())
        (True, False)
    """
    return conversion_of(module) is not None or is_table(module) or is_fused_experts(module)


# Names of the output heads of language models, classifiers and question-answering models.
HEADS = ("lm_head", "score", "classifier", "qa_outputs")


class DenseModules(NamedTuple):
    """Full names of modules that stay dense, including their submodules.

    Attributes:
        heads: output heads. They are dense by default, because they are small and often new, and then trained in full.
        towers: image and audio encoders and their projectors, dense by default.
        always: layers that a library keeps in float32, and those whose weight torch's attention reads.
    """

    heads: list[str]
    towers: list[str]
    always: list[str]


def _of_torch(model: nn.Module) -> DenseModules:
    heads = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in HEADS]
    # torch's attention computes with the weight of its out_proj, and PEFT's layer over it replaces that weight.
    attention = [name for name, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)]
    return DenseModules(heads, [], [f"{name}.out_proj".removeprefix(".") for name in attention])


# Functions that name the modules of a model that must stay dense. Each integration adds one for its library's models.
DENSE_RULES: list[Callable[[nn.Module], DenseModules]] = [_of_torch]


def dense_modules(model: nn.Module) -> DenseModules:
    """The modules of ``model`` that stay dense: the union of the answers of ``DENSE_RULES``.

    Example:
        >>> qlora_ext.nn.dense_modules(nn.ModuleDict({"up": nn.Linear(4, 4), "lm_head": nn.Linear(4, 4)})).heads
        ['lm_head']
    """
    integrate()
    answers = [find(model) for find in DENSE_RULES]
    return DenseModules(*(sorted({name for names in parts for name in names}) for parts in zip(*answers, strict=True)))
