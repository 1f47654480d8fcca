"""``Experts4bit``: the experts of a mixture-of-experts layer, with stacked 4-bit weights."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .._internal.dynamo import outside_graphs
from ..adapters import StackedAdapters, adapter_of_each_row
from ..autograd import call_linear, draw_seed
from ..form import Form, FormKeywords
from ..formats import EXACT, check_activations
from ..merged_linear import merged_linear_nf4
from ..ops import autocast_dtype
from ..weight import Weight4bit
from .packed import Packed4bit, scale_names

if TYPE_CHECKING:
    from typing_extensions import Unpack

# The instance attributes of nn.Module itself, which are never copied from another module.
_MODULE_STATE = frozenset(vars(nn.Module()))


class ExpertsLora(NamedTuple):
    """An adapter on one stack of weights: y += scaling · dropout(x) · a[e]ᵀ · b[e]ᵀ for the tokens of expert e.

    Attributes:
        a, b: [E, R, K] and [E, N, R], of any floating dtype. Of several adapters per call, ``a`` is what
            ``adapters.stack_adapters`` has made of them, which includes ``b`` (then None) and ``scaling``.
        scaling: lora_alpha / R.
        dropout_p: probability of dropping an element of x, 0 to 1. Each expert of a token draws its own mask, as if the
            experts were separate layers.
        merged: the weights with the adapter, by ``qlora_ext.merging``. If given, the experts run with these, without
            dropout, and ``a`` and ``b`` only get gradients.
        adapter_of_row: which of several adapters each token uses, -1 for none: integers [tokens].

    Example:
        >>> lora = qlora_ext.nn.ExpertsLora(a=torch.randn(4, 8, 64), b=torch.zeros(4, 32, 8), scaling=2.0)
        >>> lora.dropout_p
        0.0
    """

    a: Tensor | StackedAdapters
    b: Tensor | None
    scaling: float = 1.0
    dropout_p: float = 0.0
    merged: Weight4bit | None = None
    adapter_of_row: Tensor | None = None

    def dense(self) -> tuple[Tensor, Tensor]:
        """lora_a and lora_b as the operators take them.

        Raises:
            TypeError: the fields are neither those of one adapter nor those of several.
        """
        if isinstance(self.a, StackedAdapters) and self.b is None:
            return self.a.lora_a, self.a.lora_b
        if not isinstance(self.a, Tensor) or not isinstance(self.b, Tensor) or self.adapter_of_row is not None:
            raise TypeError(
                "lora: expected tensors a and b without adapter_of_row, or a made by stack_adapters and b None, got "
                f"{type(self.a).__name__} and {type(self.b).__name__}"
            )
        return self.a, self.b

    def several(self) -> tuple[Any, ...]:
        """The last arguments of the operators, which describe several adapters; none of one adapter."""
        return self.a.arguments(self.adapter_of_row) if isinstance(self.a, StackedAdapters) else ()


def is_fused_experts(module: nn.Module) -> bool:
    """Whether ``Experts4bit`` can replace ``module``.

    Example:
        >>> qlora_ext.nn.is_fused_experts(nn.Linear(4, 4))
        False
    """
    if isinstance(module, Packed4bit) or not hasattr(type(module), "_apply_gate"):
        return False
    weights = [module._parameters.get(name) for name in _projections(module)]
    return all(w is not None and w.ndim == 3 for w in weights)


def _projections(module: nn.Module) -> tuple[str, str]:
    return ("gate_up_proj" if getattr(module, "has_gate", True) else "up_proj", "down_proj")


def _hand_over(old: nn.Module, new: nn.Module, attributes: Iterable[str], but: Container[str]) -> None:
    """Copies attributes, submodules, parameters and buffers from ``old`` to ``new``; tensors named in ``but`` stay."""
    new.__dict__.update({key: old.__dict__[key] for key in attributes})
    new._modules.update(old._modules)
    new._parameters.update({name: p for name, p in old._parameters.items() if name not in but})
    new._buffers.update({name: t for name, t in old._buffers.items() if name not in but})


class Experts4bit(Packed4bit):
    """The experts of a mixture-of-experts layer in 4 bits. Each expert's matrices are quantized separately.

    It replaces a module that transformers (>= 5.0) decorates with ``use_experts_implementation``. Such a module has the
    3-D parameters ``gate_up_proj`` (``up_proj`` if ``has_gate`` is False) and ``down_proj``, of shape [E, N, K], or
    [E, K, N] if ``is_transposed``, and between them ``_apply_gate`` or ``act_fn``. Everything else is taken over from
    that module: biases, activation, sizes, configuration.

    Each parameter becomes uint8 [E, N, K/2] with the same name and the scales ``gate_up_proj_absmax`` [E, blocks],
    ``gate_up_proj_nested_absmax`` [E, nested blocks] and ``gate_up_proj_nested_offset`` [E]. Expert e has the bits that
    ``quantize_nf4`` gives its [N, K] matrix. A new module contains zeros until ``load_state_dict`` or ``set_packed``.

    Args:
        experts: the dense module. Its weights are not read.
        compute_dtype: of the products; the default is the dtype of the dense weights.
        device: of the packed state; "meta" allocates nothing.
        activations: as in ``Linear4bit``.
        form: ``block_size``, ``double_quant``, ``nested_block_size``, ``code``, ``scales`` and ``offsets``, as in
            ``Linear4bit``.

    Raises:
        TypeError: ``experts`` is not such a module. ValueError: a weight has an odd number of input features.

    Example:
        >>> from transformers import MixtralConfig
        >>> from transformers.models.mixtral.modeling_mixtral import MixtralExperts
        >>> config = MixtralConfig(hidden_size=64, intermediate_size=32, num_local_experts=4)
        >>> dense = MixtralExperts(config)
        >>> parameters = [nn.init.normal_(p) for p in dense.parameters()]
        >>> experts = qlora_ext.nn.Experts4bit.from_experts(dense)
        >>> experts(torch.randn(5, 64), torch.randint(0, 4, (5, 2)), torch.rand(5, 2)).shape
        torch.Size([5, 64])
    """

    def __init__(
        self,
        experts: nn.Module,
        compute_dtype: torch.dtype | None = None,
        *,
        device: torch.device | str | None = None,
        activations: str = EXACT,
        **form: Unpack[FormKeywords],
    ) -> None:
        super().__init__()
        if not is_fused_experts(experts):
            raise TypeError(
                "experts: expected a module with 3-D parameters gate_up_proj (or up_proj) and down_proj, as "
                f"transformers' use_experts_implementation decorates, got {type(experts).__name__}"
            )
        self.experts_class = type(experts)
        self.has_gate = bool(getattr(experts, "has_gate", True))
        self.has_post_expert_norm = bool(getattr(experts, "has_post_expert_norm", False))
        self.is_transposed = bool(getattr(experts, "is_transposed", False))
        self._shapes: dict[str, tuple[int, ...]] = {}
        for name in _projections(experts):
            e, *matrix = getattr(experts, name).shape
            n, k = reversed(matrix) if self.is_transposed else matrix
            if k % 2:
                raise ValueError(f"{name}: expected an even number of in_features, got {k}")
            self._shapes[name] = (e, n, k)
        self._taken_over = [key for key in vars(experts) if key not in _MODULE_STATE]
        _hand_over(experts, self, self._taken_over, but=self._shapes)
        dtype: torch.dtype = experts.down_proj.dtype  # type: ignore[assignment]
        check_activations(activations)
        self.activations = activations
        self._set_form(Form.of(**form), compute_dtype or dtype)
        self._register_packed(device)
        self.train(experts.training)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            names = {part for weight in self._shapes for part in scale_names(weight).values()}
            if name not in names:
                raise
            return self.packed_state().get(name)

    @property
    def packed_shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    def dense_shape(self, name: str) -> tuple[int, int, int]:
        """The shape of the weight ``name`` in the dense module."""
        e, n, k = self._shapes[name]
        return (e, k, n) if self.is_transposed else (e, n, k)

    def quantize(self, dense: Tensor) -> Weight4bit:
        """Quantizes a stack of weights in the layout of the dense module, expert by expert."""
        return Weight4bit.stack([super(Experts4bit, self).quantize(w) for w in self.as_quantized(dense.detach())])

    def as_quantized(self, dense: Tensor) -> Tensor:
        return dense.transpose(1, 2) if self.is_transposed else dense

    def matrices_of(self, dense: nn.Module) -> dict[str, Tensor]:
        return {name: self.as_quantized(getattr(dense, name).detach()) for name in self._shapes}

    @classmethod
    def from_experts(
        cls,
        experts: nn.Module,
        compute_dtype: torch.dtype | None = None,
        activations: str = EXACT,
        **form: Unpack[FormKeywords],
    ) -> Experts4bit:
        """Quantizes a dense module. Arguments and errors are those of the constructor and of ``quantize_nf4``."""
        module = cls(experts, compute_dtype, device="meta", activations=activations, **form)
        for name in module._shapes:
            module.set_packed(name, module.quantize(getattr(experts, name)))
        return module

    def dequantize(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The decoded weight ``name``, with its shape in the dense module."""
        out = self.packed_weight(name).dequantize(dtype)
        return out.transpose(1, 2).contiguous() if self.is_transposed else out

    def to_experts(self, dtype: torch.dtype | None = None, weights: dict[str, Tensor] | None = None) -> nn.Module:
        """The dense module for this one, in ``dtype`` or ``weight_dtype``.

        It has the decoded weights, or those in ``weights``, by name (for example with merged adapters).
        """
        dtype = dtype or self.weight_dtype
        dense = self.experts_class.__new__(self.experts_class)
        nn.Module.__init__(dense)
        _hand_over(self, dense, self._taken_over, but=self.packed_state())
        for name in self._shapes:
            weight = (weights or {}).get(name)
            weight = self.dequantize(name, dtype) if weight is None else weight.detach().to(dtype)
            dense.register_parameter(name, nn.Parameter(weight, requires_grad=False))
        for name, p in dense._parameters.items():
            if p is not None:
                dense._parameters[name] = nn.Parameter(p.detach().to(dtype), requires_grad=False)
        return dense.train(self.training)

    def to_dense(self, dtype: torch.dtype | None = None) -> nn.Module:
        return self.to_experts(dtype)

    def _project(self, name: str, x: Tensor, offsets: Tensor, lora: ExpertsLora | None) -> Tensor:
        if lora is not None and lora.merged is not None:
            given = self._parameters.get(f"{name}_bias")
            bias = None if given is None else given.to(x.dtype).contiguous()
            a, b = (t.to(x.dtype).contiguous() for t in lora.dense())
            return merged_linear_nf4(x, lora.merged, bias, a, b, lora.scaling, offsets, self.activations)
        dense = self._parameters.get(f"{name}_bias"), *((None, None) if lora is None else lora.dense())
        numbers = (1.0, 0.0) if lora is None else (lora.scaling, lora.dropout_p)
        several = () if lora is None else lora.several()
        if self.residency is not None:
            y: Tensor = _grouped_streamed(self, name, x, offsets, dense, numbers, several)
            return y
        held = self._parameters[name]
        w4 = held if isinstance(held, Weight4bit) else self.packed_weight(name)
        return self._grouped(w4, x, offsets, dense, numbers, several)

    def _grouped(
        self,
        w4: Weight4bit,
        x: Tensor,
        offsets: Tensor,
        dense: tuple[Tensor | None, ...],
        numbers: tuple[float, float],
        several: tuple[Any, ...],
    ) -> Tensor:
        scaling, dropout_p = numbers
        own_seeds = bool(several) and several[3] is not None
        return call_linear(
            x,
            w4,
            w4,
            w4.shape[1],
            *(None if t is None else t.to(x.dtype).contiguous() for t in dense),
            scaling,
            dropout_p,
            0,
            draw_seed(x.device) if dropout_p > 0.0 and not own_seeds else None,
            adapters=several,
            offsets=offsets,
            activations=self.activations,
        )

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        lora: Mapping[str, ExpertsLora] | None = None,
    ) -> Tensor:
        """The weighted sum of each token's experts.

        Args:
            hidden_states: [T, hidden].
            top_k_index: integers [T, k], the experts of each token. Numbers outside 0 to E - 1 are ignored.
            top_k_weights: the weights of these experts [T, k], or of all experts [T, E].
            lora: adapters, by the name of the weight that they adapt.

        Returns:
            [T, hidden] in the dtype of ``hidden_states``, computed in ``compute_dtype`` or the autocast dtype.

        Raises:
            TypeError: ``top_k_index`` is a floating-point tensor.
        """
        if top_k_index.is_floating_point():
            raise TypeError(f"top_k_index: expected integer expert numbers, got {top_k_index.dtype}")
        tokens, k = top_k_index.shape
        cast, dtype = self.dtypes(hidden_states)
        experts = self._shapes["down_proj"][0]
        if top_k_weights.shape[-1] != k:
            top_k_weights = top_k_weights.gather(1, top_k_index)
        number = top_k_index.reshape(-1)
        expert, order = torch.where(number < 0, experts, number).sort(stable=True)
        offsets = torch.searchsorted(
            expert, torch.arange(experts, dtype=expert.dtype, device=expert.device), right=True
        )
        # Repeating each token k times and then permuting makes the gradient a sum in a fixed order.
        x = hidden_states.to(cast).repeat_interleave(k, dim=0).index_select(0, order)
        first, second = self._shapes
        lora = {name: _of_rows(adapters, hidden_states, k, order) for name, adapters in (lora or {}).items()}
        h = self._project(first, x, offsets, lora.get(first))
        if self.has_gate:
            h = self.experts_class._apply_gate(self, h)  # type: ignore[attr-defined]
        else:
            h = self.act_fn(h)
        y = self._project(second, h.to(cast), offsets, lora.get(second))
        if self.has_post_expert_norm:
            y = self.post_expert_norm(y)
        y = torch.zeros_like(y).index_copy(0, order, y).view(tokens, k, y.shape[1])
        return (y * top_k_weights.unsqueeze(-1)).sum(1).to(dtype)

    def dtypes(self, x: Tensor) -> tuple[torch.dtype, torch.dtype]:
        """The dtype of the computation and the dtype of the output."""
        return autocast_dtype(x.device.type) or self.compute_dtype, x.dtype

    def extra_repr(self) -> str:
        shapes = ", ".join(f"{name}={list(shape)}" for name, shape in self._shapes.items())
        return f"{shapes}, {self._description()}"


def _of_rows(lora: ExpertsLora, hidden_states: Tensor, k: int, order: Tensor) -> ExpertsLora:
    """``lora`` with the adapter of each row of the products. The rows are the tokens, k times each, in that order."""
    if not isinstance(lora.a, StackedAdapters):
        return lora
    of_token = adapter_of_each_row(lora.adapter_of_row, hidden_states)
    return lora._replace(adapter_of_row=of_token.repeat_interleave(k).index_select(0, order))


@outside_graphs  # as in a Linear4bit
def _grouped_streamed(
    experts: Experts4bit,
    name: str,
    x: Tensor,
    offsets: Tensor,
    dense: tuple[Tensor | None, ...],
    numbers: tuple[float, float],
    several: tuple[Any, ...],
) -> Tensor:
    assert experts.residency is not None
    if x.shape[0] < offsets.shape[0]:  # some experts have no token and are not loaded
        before = torch.cat([offsets.new_zeros(1), offsets[:-1]])
        chosen = (offsets > before).nonzero().squeeze(1)
        w4 = experts._as_weight(name, experts.residency.read_experts(experts, name, chosen.tolist()))
        w4 = w4.replace(shape=torch.Size((len(chosen), *w4.shape[1:])))
        dense = tuple(None if t is None else t.index_select(0, chosen) for t in dense)
        return experts._grouped(w4, x, offsets[chosen], dense, numbers, several)
    with experts.residency.lend(experts, name) as packed:
        return experts._grouped(experts._as_weight(name, packed), x, offsets, dense, numbers, several)
