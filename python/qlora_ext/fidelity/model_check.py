"""``check_model``: whether a 4-bit model is intact, and how much loss 4 bits cost, in total and per layer."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from ..form import Form
from ..formats import NF4
from ..nn import Packed4bit, is_dense, layers_of, places_in, quantized
from .comparison import Increase, compare, losses_of, text_of
from .integrity import problems_of
from .layer_costs import Candidate, LayerCost, measure
from .mixed_precision import choose
from .sensitivity import total_bytes

# Output errors of a layer and of plain NF4 that differ by a smaller fraction count as equal.
_TOLERANCE = 0.02
# Stochastic rounding, which merging into 4 bits uses, has 1.42 times the error of rounding to the nearest code. Errors
# above this bound do not come from rounding.
_DAMAGED_RATIO = 1.6


@dataclasses.dataclass(frozen=True)
class CurvePoint:
    """The model with some of its layers dense again.

    Attributes:
        budget: for the dense layers, as in ``Sensitivity.chosen``.
        kept: the number of dense layers.
        extra_bytes: their size in addition to that of the 4-bit layers.
        increase: of the loss over that of the dense model.
    """

    budget: int | str
    kept: int
    extra_bytes: int
    increase: Increase


@dataclasses.dataclass(frozen=True)
class ModelCheck:
    """The result of ``check_model``.

    Attributes:
        problems: what is damaged, one sentence each; empty if the model is intact.
        tokens: the number of tokens of the text.
        bytes: the size of the 4-bit model.
        loss, base_loss: of the 4-bit and the dense model on the text, in nats per token; None without a dense model, or
            if something is damaged.
        increase: of ``loss`` over ``base_loss``.
        layers: what each 4-bit layer costs, in the order of the model; empty without a dense model.
        curve: the model with layers dense again, in the order of their cost per byte.
    """

    problems: list[str]
    tokens: int
    bytes: int
    loss: float | None = None
    base_loss: float | None = None
    increase: Increase | None = None
    layers: list[LayerCost] = dataclasses.field(default_factory=list)
    curve: list[CurvePoint] = dataclasses.field(default_factory=list)

    @property
    def worst(self) -> list[LayerCost]:
        """The layers, sorted by falling estimate of their cost in loss."""
        return sorted(self.layers, key=lambda layer: layer.loss, reverse=True)

    @property
    def worse_than_plain(self) -> list[LayerCost]:
        """The layers whose outputs have a larger error than those of plain NF4, the worst first."""
        found = [layer for layer in self.layers if layer.error > (1 + _TOLERANCE) * layer.plain_error]
        return sorted(found, key=lambda layer: layer.error - layer.plain_error, reverse=True)

    @property
    def damaged(self) -> list[LayerCost]:
        """The layers that do not match the dense ones, the worst first.

        Their outputs have larger errors than plain NF4's, and their weights larger errors than any rounding explains.
        Calibration changes weights too, but improves the outputs.
        """
        found = [
            layer
            for layer in self.layers
            if not layer.error <= (1 + _TOLERANCE) * layer.plain_error and not layer.weight_ratio <= _DAMAGED_RATIO
        ]
        return sorted(found, key=lambda layer: math.inf if math.isnan(layer.error) else layer.error, reverse=True)

    @property
    def is_sound(self) -> bool:
        """Whether no tensor is damaged and every layer matches the dense one."""
        return not self.problems and not self.damaged

    @property
    def is_calibrated(self) -> bool:
        """Whether more layers have outputs with a smaller error than plain NF4's than with a larger one."""
        better = sum(layer.error < (1 - _TOLERANCE) * layer.plain_error for layer in self.layers)
        return better > len(self.worse_than_plain)

    def chosen(self, budget: int | str) -> list[LayerCost]:
        """The layers to leave dense; see ``Sensitivity.chosen``."""
        return choose(self.layers, self.bytes, budget)


def check_model(
    model: nn.Module,
    base: nn.Module | None = None,
    inputs: Tensor | str = "self",
    curve: Iterable[int | str] = (),
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> ModelCheck:
    """Checks a 4-bit language model: its packed tensors, its loss on a text, and each layer against the dense one.

    Memory holds both models, a second copy of the 4-bit weights that are not plain NF4, and the activations of one
    sequence. Neither model is changed.

    Args:
        model: with 4-bit layers, as made by ``quantize_model`` or ``from_pretrained``.
        base: the dense model that it was quantized from, on the same device. Without it, the layers and the increase of
            the loss are not measured.
        inputs: token ids int64 [B, T], B >= 2; or "self", a text of 4,096 tokens that the dense model writes, or the
            4-bit model if ``base`` is None.
        curve: budgets as for ``Sensitivity.chosen``; the loss is measured with the layers of each budget dense.
        seed: of the text and of the random labels.
        progress: called with the number of finished sequences and the number of all sequences.

    Raises:
        TypeError, ValueError: an argument is none of these, ``model`` has no 4-bit layer, or ``base`` is another model.

    Example:
        >>> import copy
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=128))
        >>> quantized = qlora_ext.quantize_model(copy.deepcopy(model))
        >>> found = qlora_ext.check_model(quantized, model, torch.randint(0, 128, (4, 16)))
        >>> found.is_sound, len(found.layers)
        (True, 14)
    """
    if not any(True for _ in layers_of(model)):
        raise ValueError("model: expected one with 4-bit layers (see qlora_ext.quantize_model), found none")
    ids = text_of(inputs, base or model, 16, 256, seed, least=2)
    dense = {} if base is None else _dense_modules(model, base)
    problems, size = problems_of(model), total_bytes(model)
    if problems:
        return ModelCheck(problems, ids.numel(), size)
    candidates = {dense[name]: _candidate(name, layer, dense[name]) for name, layer in layers_of(model) if dense}
    models = {"model": model} if base is None else {"model": model, "base": base}
    losses = {what: losses_of(m, ids) for what, m in models.items()}
    for what, finite in ((what, found.isfinite()) for what, found in losses.items()):
        if not finite.all():
            problems.append(f"{what}: its logits have NaN or infinity on {int((~finite).sum())} sequences")
    if problems:
        return ModelCheck(problems, ids.numel(), size)
    if base is None:
        return ModelCheck([], ids.numel(), size, losses["model"].mean().item())
    found = compare(losses["model"], losses["base"], ids)
    layers = measure(base, candidates, ids, seed, progress)
    del candidates
    points = []
    for budget in curve:
        chosen = choose(layers, size, budget)
        with _replaced(model, {layer.name: dense[layer.name] for layer in chosen}):
            increase = compare(model, found.before, ids).increase
        points.append(CurvePoint(budget, len(chosen), sum(layer.extra_bytes for layer in chosen), increase))
    return ModelCheck([], ids.numel(), size, found.loss, found.base_loss, found.increase, layers, points)


def _dense_modules(model: nn.Module, base: nn.Module) -> dict[str, nn.Module]:
    """The modules of ``base`` that the 4-bit modules of ``model`` replaced, by name."""
    found = {}
    modules = dict(base.named_modules(remove_duplicate=False))
    for name, _ in layers_of(model):
        dense = modules.get(name)
        if dense is None or not is_dense(dense):
            kind = "no such module" if dense is None else type(dense).__name__
            raise ValueError(f"base: expected the dense model that `model` was quantized from, got {kind} for {name}")
        found[name] = dense
    return found


def _candidate(name: str, layer: Packed4bit, dense: nn.Module) -> Candidate:
    form = layer.form if layer.form.code == NF4 else Form()  # weights of other formats are compared with plain NF4 too
    plain = quantized(dense, layer.compute_dtype, **form.keywords)
    if dict(plain.packed_shapes) != dict(layer.packed_shapes):
        raise ValueError(
            f"base: expected the dense model that `model` was quantized from, got {name} with weights "
            f"{_sizes(plain)} for {_sizes(layer)}"
        )
    pairs = [(plain.packed_weight(w).tensors, layer.packed_weight(w).tensors) for w in layer.packed_shapes]
    same = all(a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in pairs)
    return Candidate(name, layer) if same else Candidate(name, layer, plain, _weight_ratio(layer, plain, dense))


def _weight_ratio(layer: Packed4bit, plain: Packed4bit, dense: nn.Module) -> float:
    """The weight error of ``layer`` divided by that of ``plain``, each in the norm of the difference from ``dense``."""
    squares = [0.0, 0.0]
    weights = {"weight": dense.weight.detach()} if isinstance(dense, nn.Embedding) else layer.matrices_of(dense)
    for name, weight in weights.items():
        for i, packed in enumerate((layer.packed_weight(name), plain.packed_weight(name))):
            stack = [packed] if weight.ndim == 2 else [packed.matrix(e) for e in range(len(weight))]
            for w4, w in zip(stack, weight.reshape(-1, *weight.shape[-2:]), strict=True):
                squares[i] += (w4.dequantize(torch.float32) - w).square().sum().item()
    if squares[1] == 0.0:
        return 1.0 if squares[0] == 0.0 else math.inf
    return math.sqrt(squares[0] / squares[1])


def _sizes(layer: Packed4bit) -> str:
    return ", ".join(str(list(shape)) for shape in layer.packed_shapes.values())


@contextlib.contextmanager
def _replaced(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Puts ``modules`` in the place of the named modules of ``model``, and restores them at the end."""
    places = places_in(model)
    old = {name: model.get_submodule(name) for name in modules}

    def put(new: Mapping[str, nn.Module]) -> None:
        for name, module in new.items():
            for parent, child, _ in places[old[name]]:
                setattr(parent, child, module)

    put(modules)
    try:
        yield
    finally:
        put(old)
