"""``Linear4bit``: a frozen linear layer whose weight is NF4."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..autograd import call_linear_nf4, draw_seed
from ..weight import NF4Weight, _check_block_sizes, quantize_nf4

# The part of the packed state that is scales: it may hold float32, which no change of a model's dtype may touch.
SCALES = ("absmax", "nested_absmax", "nested_offset")


class Linear4bit(nn.Linear):
    """A linear layer over a frozen NF4 weight: y = x · dequantize(weight)ᵀ + bias, fused.

    The packed state is ``weight`` (uint8 [N, K/2], a parameter without gradient) and the buffers ``absmax`` and,
    double quantized, ``nested_absmax`` and ``nested_offset``; together they are ``weight4bit``. Moving the module
    moves them; changing its dtype (``half()``, ``to(dtype)``) changes the bias and ``compute_dtype`` alone. A freshly
    built module holds zeros, until ``load_state_dict`` or ``set_weight``.

    Args:
        in_features, out_features: K and N.
        bias: whether there is a bias [N].
        compute_dtype: of the bias and the products; x is cast to it, and y back to x's dtype.
        block_size: elements a scale: a power of two from 32 to 4096.
        double_quant: whether the scales are 8-bit codes themselves.
        device: of the packed state; "meta" allocates nothing.
    """

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
    ) -> None:
        nn.Module.__init__(self)
        _check_block_sizes(block_size, nested_block_size)
        self.in_features, self.out_features = in_features, out_features
        self.compute_dtype = compute_dtype
        self.block_size, self.nested_block_size = block_size, nested_block_size
        self.weight_dtype = compute_dtype
        numel = in_features * out_features
        blocks = -(-numel // block_size)
        packed = torch.zeros(ops.packed_shape((out_features, in_features)), dtype=torch.uint8, device=device)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.absmax: Tensor
        self.nested_absmax: Tensor | None
        self.nested_offset: Tensor | None
        if double_quant:
            nested = -(-blocks // nested_block_size)
            self.register_buffer("absmax", torch.zeros(blocks, dtype=torch.uint8, device=device))
            self.register_buffer("nested_absmax", torch.zeros(nested, dtype=torch.float32, device=device))
            self.register_buffer("nested_offset", torch.zeros((), dtype=torch.float32, device=device))
        else:
            self.register_buffer("absmax", torch.zeros(blocks, dtype=torch.float32, device=device))
            self.nested_absmax = self.nested_offset = None
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, dtype=compute_dtype, device=device), requires_grad=False)
        else:
            self.register_parameter("bias", None)

    @property
    def double_quant(self) -> bool:
        return self.nested_absmax is not None

    @property
    def weight4bit(self) -> NF4Weight:
        """The packed state as one value; it shares memory with the module."""
        return NF4Weight(
            self.weight.detach(),
            self.absmax,
            self.nested_absmax,
            self.nested_offset,
            torch.Size((self.out_features, self.in_features)),
            self.weight_dtype,
            self.block_size,
            self.nested_block_size,
        )

    def packed_args(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, int, int]:
        """As ``NF4Weight.packed_args``, without making one."""
        return (
            self.weight,
            self.absmax,
            self.nested_absmax,
            self.nested_offset,
            self.block_size,
            self.nested_block_size,
        )

    def set_weight(self, w4: NF4Weight) -> None:
        """Takes ``w4`` (shape [N, K]) as the packed state, with its block sizes, scale form and device."""
        if tuple(w4.shape) != (self.out_features, self.in_features):
            raise ValueError(f"w4: expected shape [{self.out_features}, {self.in_features}], got {list(w4.shape)}")
        self.weight = nn.Parameter(w4.packed, requires_grad=False)
        self.block_size, self.nested_block_size = w4.block_size, w4.nested_block_size
        self.weight_dtype = w4.dtype
        for name in SCALES:
            value = getattr(w4, name)
            self._buffers.pop(name, None)
            if value is None:
                setattr(self, name, None)
            else:
                self.__dict__.pop(name, None)
                self.register_buffer(name, value)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        compute_dtype: torch.dtype | None = None,
        block_size: int = 64,
        double_quant: bool = True,
        nested_block_size: int = 256,
    ) -> Linear4bit:
        """Quantizes an ``nn.Linear``. Its dtype is the compute dtype by default; its bias is kept as it is."""
        if isinstance(linear, Linear4bit) or not isinstance(linear, nn.Linear):
            raise TypeError(f"linear: expected an nn.Linear, got {type(linear).__name__}")
        w4 = quantize_nf4(linear.weight, block_size, double_quant, nested_block_size)
        module = cls(
            linear.in_features,
            linear.out_features,
            bias=False,
            compute_dtype=compute_dtype or linear.weight.dtype,
            block_size=block_size,
            double_quant=double_quant,
            device="meta",
            nested_block_size=nested_block_size,
        )
        module.set_weight(w4)
        if linear.bias is not None:
            module.bias = nn.Parameter(
                linear.bias.detach().to(module.compute_dtype), requires_grad=linear.bias.requires_grad
            )
        module.train(linear.training)
        return module

    def forward(self, x: Tensor) -> Tensor:
        return self.fused_forward(x)

    def fused_forward(
        self,
        x: Tensor,
        lora_a: Tensor | None = None,
        lora_b: Tensor | None = None,
        scaling: float = 1.0,
        dropout_p: float = 0.0,
    ) -> Tensor:
        """The layer with a LoRA branch in the same operator: adapters [R, K] and [N, R] of any floating dtype.

        Computed in ``compute_dtype`` and returned in x's dtype; under autocast, both are the autocast dtype.
        """
        seed = draw_seed() if dropout_p > 0.0 and lora_a is not None else 0
        device_type, dtype, cast = x.device.type, x.dtype, self.compute_dtype
        if torch.is_autocast_enabled(device_type):
            dtype = cast = torch.get_autocast_dtype(device_type)
        y = call_linear_nf4(
            device_type,
            x.to(cast),
            *self.packed_args(),
            self.out_features,
            None if self.bias is None else self.bias.to(cast),
            None if lora_a is None else lora_a.to(cast),
            None if lora_b is None else lora_b.to(cast),
            scaling,
            dropout_p,
            seed,
        )
        return y.to(dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The decoded weight [N, K], in ``dtype`` or that of the weight that was quantized."""
        return self.weight4bit.dequantize(dtype)

    def to_linear(self, dtype: torch.dtype | None = None, weight: Tensor | None = None) -> nn.Linear:
        """A dense layer in this one's place, in ``dtype`` or that of the weight that was quantized.

        It holds the decoded weight, or ``weight`` [N, K] (an adapter merged into it, say) if given.
        """
        weight = self.dequantize(dtype) if weight is None else weight.detach().to(dtype or self.weight_dtype)
        linear = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device="meta", dtype=weight.dtype
        )
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().to(weight.dtype), requires_grad=False)
        return linear.train(self.training)

    def reset_parameters(self) -> None:
        """Nothing to draw: the weight is frozen and comes from a checkpoint or from ``from_linear``."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Linear4bit:
        # half(), to(dtype) and the like reach every floating tensor, type() every tensor: the packed state keeps its
        # bits, and takes only the device that fn would have given it.
        before = {name: t.detach() for name, t in self._packed_state().items()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, kept in before.items():
            after = getattr(self, name)
            if after.dtype == kept.dtype:
                continue
            if name == "weight":
                after.data = kept.to(after.device)
            else:
                self._buffers[name] = kept.to(after.device)
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype)).dtype
        return self

    def _packed_state(self) -> dict[str, Tensor]:
        tensors = {"weight": self.weight, **{name: getattr(self, name) for name in SCALES}}
        return {name: t for name, t in tensors.items() if t is not None}

    def check_form(self, state: dict[str, Tensor] | None = None, prefix: str = "") -> None:
        """Checks a packed state (default: the module's own) against the layer's shape, block sizes and scale form.

        Args:
            state: tensors by name, each name beginning with ``prefix``; what it lacks is not checked.

        Raises:
            ValueError: a dtype or a shape is another; copied in, its scales would be read as something else.
        """
        empty = Linear4bit(
            self.in_features,
            self.out_features,
            bias=False,
            block_size=self.block_size,
            double_quant=self.double_quant,
            nested_block_size=self.nested_block_size,
            device="meta",
        )._packed_state()
        form = (
            f"the packed state of a weight [{self.out_features}, {self.in_features}] with block_size={self.block_size}"
            f", double_quant={self.double_quant}"
        )
        found = {prefix + name: t for name, t in self._packed_state().items()} if state is None else state
        for name in ("weight", *SCALES):
            t, expected = found.get(prefix + name), empty.get(name)
            if t is None:
                continue
            if expected is None:
                raise ValueError(f"{prefix}{name}: expected {form}, got scales that are double quantized")
            if t.dtype != expected.dtype or t.shape != expected.shape:
                raise ValueError(
                    f"{prefix}{name}: expected {expected.dtype} {list(expected.shape)}, {form}; "
                    f"got {t.dtype} {list(t.shape)}"
                )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        try:
            self.check_form(state_dict, prefix)
        except ValueError as error:  # refused even where the load is not strict
            args[-1].append(str(error))
            return
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"block_size={self.block_size}, double_quant={self.double_quant}"
        )
