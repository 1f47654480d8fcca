"""``Linear4bit``: a frozen linear layer with a 4-bit weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .._internal.dynamo import outside_graphs
from .._internal.shared_buffers import PackedTensors
from ..adapters import StackedAdapters, adapter_of_each_row
from ..autograd import call_linear, draw_seed, in_order_of
from ..form import Form, FormKeywords
from ..formats import EXACT, NF4, check_activations
from ..merged_linear import merged_linear_nf4
from ..ops import autocast_dtype
from ..weight import Weight4bit
from .packed import PackedWeight4bit

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Linear4bit(PackedWeight4bit, nn.Linear):
    """A linear layer with a frozen 4-bit weight: y = x · dequantize(weight)ᵀ + bias, in one fused operator.

    ``weight`` is a ``Weight4bit`` [N, K]. Moving the module moves it. Changing the dtype (``half()``, ``to(dtype)``)
    changes the bias, ``compute_dtype`` and the dtype to which the weight decodes, but not its codes and scales. A new
    module contains zeros until ``load_state_dict`` or ``set_weight``.

    Args:
        in_features, out_features: K and N.
        bias: whether the layer has a bias [N].
        compute_dtype: of the products, and of a new bias; x is cast to it, and y back to x's dtype.
        block_size: elements per scale: a power of two from 16 to 4096.
        double_quant: whether the scales are stored in 8 bits.
        device: of the packed state; "meta" allocates nothing.
        nested_block_size: scales per nested scale.
        code: the name of the values, as in ``Form``, or 16 values themselves, by code.
        scales: the form of the scales, one of ``formats.SCALE_FORMS``; None for the one that ``double_quant`` chooses.
        offsets: the form of the offsets, one of ``formats.OFFSET_FORMS``; None if there are none.
        reordered: whether the weight's columns are stored in the order of the buffer ``column_order``, int32 [K]. Each
            call brings x into that order.
        activations: "int8" rounds the layer's inputs and gradients to int8 on the CPU, see ``linear_nf4``. It is an
            attribute, which may be set at any time.

    Example:
        >>> layer = qlora_ext.nn.Linear4bit.from_linear(nn.Linear(64, 48))
        >>> layer(torch.randn(3, 64)).shape, layer.weight.shape, layer.weight.dtype
        (torch.Size([3, 48]), torch.Size([48, 64]), torch.float32)
        >>> layer.dequantize().shape
        torch.Size([48, 64])
    """

    # The class of the dense layer that this one replaces, and its attributes in addition to those of an nn.Linear.
    dense_class: type[nn.Linear] = nn.Linear
    dense_attributes: Mapping[str, Any] = MappingProxyType({})

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype = torch.bfloat16,
        block_size: int = 64,
        double_quant: bool = True,
        device: torch.device | str | None = None,
        nested_block_size: int = 256,
        code: str | Sequence[float] | Tensor = NF4,
        scales: str | None = None,
        offsets: str | None = None,
        reordered: bool = False,
        activations: str = EXACT,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        form = Form.of(
            block_size=block_size,
            double_quant=double_quant,
            nested_block_size=nested_block_size,
            code=code,
            scales=scales,
            offsets=offsets,
            reordered=reordered,
        )
        check_activations(activations)
        self.activations = activations
        self._set_form(form, compute_dtype)
        self._register_packed(device)
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, dtype=compute_dtype, device=device), requires_grad=False)
        else:
            self.register_parameter("bias", None)

    if TYPE_CHECKING:

        def __call__(self, x: Tensor) -> Tensor: ...

    @property
    def packed_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"weight": (self.out_features, self.in_features)}

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        compute_dtype: torch.dtype | None = None,
        activations: str = EXACT,
        **form: Unpack[FormKeywords],
    ) -> Linear4bit:
        """Quantizes an ``nn.Linear``. The bias does not change.

        Args:
            compute_dtype: as in the constructor; the default is the dtype of ``linear``.
            activations: as in the constructor.
            form: ``block_size``, ``double_quant``, ``nested_block_size``, ``code``, ``scales`` and ``offsets``, as in
                the constructor.

        Raises:
            TypeError: ``linear`` is not a dense ``nn.Linear``. ValueError: as from ``quantize_nf4``.
        """
        if isinstance(linear, Linear4bit) or not isinstance(linear, nn.Linear):
            raise TypeError(f"linear: expected an nn.Linear, got {type(linear).__name__}")
        dtype = compute_dtype or linear.weight.dtype
        sizes = linear.in_features, linear.out_features
        module = cls(*sizes, False, dtype, device="meta", activations=activations, **form)
        module.set_weight(module.quantize(linear.weight))
        if linear.bias is not None:
            module.bias = nn.Parameter(linear.bias.detach(), requires_grad=linear.bias.requires_grad)
        module.stand_for(linear)
        module.train(linear.training)
        return module

    def stand_for(self, linear: nn.Linear) -> None:
        """Records the class of the dense layer ``linear``, so that ``to_linear`` returns the same class."""
        if type(linear) is not nn.Linear:
            known = vars(nn.Linear(1, 1, device="meta"))
            self.dense_class = type(linear)
            self.dense_attributes = {key: value for key, value in vars(linear).items() if key not in known}

    def matrices_of(self, dense: nn.Module) -> dict[str, Tensor]:
        weight: Tensor = dense.weight  # type: ignore[assignment]
        return {"weight": weight.detach()}

    def forward(self, x: Tensor) -> Tensor:
        return self.fused_forward(x)

    def fused_forward(
        self,
        x: Tensor,
        lora_a: Tensor | StackedAdapters | None = None,
        lora_b: Tensor | None = None,
        scaling: float = 1.0,
        dropout_p: float = 0.0,
        adapter_of_row: Tensor | None = None,
    ) -> Tensor:
        """The layer with a LoRA branch in the same operator: adapters [R, K] and [N, R] of any floating dtype.

        Computed in ``compute_dtype`` and returned in x's dtype; under autocast, both are the autocast dtype.

        Args:
            adapter_of_row: which of several adapters each row of x uses, as in ``linear_nf4``. lora_a is then what
                ``stack_adapters`` has made of them, which includes lora_b and scaling.
        """
        if self.residency is not None:
            y: Tensor = _fused_streamed(self, x, lora_a, lora_b, scaling, dropout_p, adapter_of_row)
            return y
        w4: Any = self._parameters["weight"]  # faster than an attribute of the module
        if not isinstance(w4, Weight4bit):
            if w4.is_floating_point():
                raise TypeError(
                    f"weight: expected a 4-bit weight in a {type(self).__name__}, got a dense one, {w4.dtype} "
                    f"{list(w4.shape)}; quantize it with qlora_ext.quantize(w), or make the layer dense with to_dense()"
                )
            if not x.is_floating_point():  # such as after x.to(layer.weight.dtype)
                raise TypeError(
                    f"x: expected a floating dtype, got {x.dtype}; if the model casts x to the dtype of this layer's "
                    "weight, which FSDP2 shards as bytes, leave the layer dense (skip_modules)"
                )
            w4 = self.exposed_tensors("weight")
        if w4.column_order is not None:
            x, lora_a = in_order_of(w4.column_order, x, lora_a)
        return self._fused(w4, x, lora_a, lora_b, scaling, dropout_p, adapter_of_row)

    def _fused(
        self,
        packed: Weight4bit | PackedTensors,
        x: Tensor,
        lora_a: Tensor | StackedAdapters | None,
        lora_b: Tensor | None,
        scaling: float,
        dropout_p: float,
        adapter_of_row: Tensor | None,
    ) -> Tensor:
        adapters: tuple[Any, ...] = ()
        seeds = None
        if isinstance(lora_a, StackedAdapters):
            stacked = lora_a
            lora_a, lora_b, seeds = stacked.lora_a, stacked.lora_b, stacked.seeds
            adapters = stacked.arguments(adapter_of_each_row(adapter_of_row, x))
        seed_tensor = draw_seed(x.device) if dropout_p > 0.0 and lora_a is not None and seeds is None else None
        cast, dtype = self.dtypes(x)
        bias = self.bias  # read once, because reading a parameter is slower than a plain attribute
        y = call_linear(
            x.to(cast),
            packed,
            self.form,
            self.out_features,
            None if bias is None else bias.to(cast),
            None if lora_a is None else lora_a.to(cast),
            None if lora_b is None else lora_b.to(cast),
            scaling,
            dropout_p,
            0,
            seed_tensor,
            adapters=adapters,
            activations=self.activations,
        )
        return y.to(dtype)

    def merged_forward(
        self, x: Tensor, merged: Weight4bit, lora_a: Tensor, lora_b: Tensor, scaling: float = 1.0
    ) -> Tensor:
        """The layer with an adapter [R, K] and [N, R] merged into its weight; see ``qlora_ext.merging``.

        Args:
            merged: this layer's weight and the adapter, merged by ``merged_weight``.
        """
        cast, dtype = self.dtypes(x)
        bias = None if self.bias is None else self.bias.to(cast)
        lora = lora_a.to(cast), lora_b.to(cast), scaling
        return merged_linear_nf4(x.to(cast), merged, bias, *lora, activations=self.activations).to(dtype)

    def dtypes(self, x: Tensor) -> tuple[torch.dtype, torch.dtype]:
        """The dtype of the computation and the dtype of the output."""
        autocast = autocast_dtype(x.device.type)
        return (self.compute_dtype, x.dtype) if autocast is None else (autocast, autocast)

    def to_linear(self, dtype: torch.dtype | None = None, weight: Tensor | None = None) -> nn.Linear:
        """The dense layer for this one, in ``dtype`` or ``weight_dtype``.

        It has the decoded weight, or ``weight`` [N, K] if given (for example with a merged adapter).
        """
        weight = self.dequantize(dtype) if weight is None else weight.detach().to(dtype or self.weight_dtype)
        linear = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device="meta", dtype=weight.dtype
        )
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().to(weight.dtype), requires_grad=False)
        linear.__class__ = self.dense_class
        vars(linear).update(self.dense_attributes)
        return linear.train(self.training)

    def to_dense(self, dtype: torch.dtype | None = None) -> nn.Module:
        return self.to_linear(dtype)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}, {self._description()}"


# The memory of a streamed weight differs from call to call, so no compiled graph may contain it.
@outside_graphs
def _fused_streamed(layer: Linear4bit, x: Tensor, lora_a: Any, *args: Any) -> Tensor:
    assert layer.residency is not None
    with layer.residency.lend(layer, "weight") as packed:
        if packed.column_order is not None:  # copied, because the backward needs it after the loan
            x, lora_a = in_order_of(packed.column_order.clone(), x, lora_a)
        y: Tensor = layer._fused(packed, x, lora_a, *args)
    return y
