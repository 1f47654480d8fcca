"""``Packed4bit``: the base class of modules with 4-bit weights, which preserves their bits."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from .. import ops
from .._internal.loans import Loan, PackedTensors
from ..form import Form
from ..no_arithmetic import refuse_arithmetic
from ..weight import TENSORS, Weight4bit, quantize, weight_of

# The names of the scales in the packed state, offsets included. No change of a model's dtype may touch them.
SCALES = TENSORS[1:]
# Those with an entry per block, which FSDP2 shards like the weight.
_PER_BLOCK = ("absmax", "block_offsets")
# The attributes of ``nn.Module`` that hold forward and backward hooks.
_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook"),
)
Self = TypeVar("Self", bound="Packed4bit")


def scale_names(weight: str) -> dict[str, str]:
    """The names of the scales of the parameter ``weight``. Parameters with another name give them a prefix.

    Example:
        >>> qlora_ext.nn.scale_names("up_proj")["absmax"]
        'up_proj_absmax'
    """
    prefix = "" if weight == "weight" else f"{weight}_"
    return {scale: f"{prefix}{scale}" for scale in SCALES}


def _names_of(weight: str) -> dict[str, str]:
    """The names in the module of all tensors of the parameter ``weight``, by their names in ``Weight4bit``."""
    return {"packed": weight, **scale_names(weight)}


def full_tensor(t: Tensor) -> Tensor:
    """``t``, or the full tensor of which a DTensor is one rank's shard. Gathering it is a collective operation."""
    gathered: Tensor = t.full_tensor() if hasattr(t, "full_tensor") else t
    return gathered


class Residency(Protocol):
    """Provides the packed weights of a module whose parameters are not on the computing device; see ``streaming``."""

    @property
    def device(self) -> torch.device:
        """The device that computes."""

    def lend(self, weight: str) -> Loan:
        """The packed tensors of ``weight`` on ``device``, valid until the loan ends."""

    def read(self, weight: str) -> PackedTensors:
        """Permanent copies of the packed tensors of ``weight``."""

    def read_experts(self, weight: str, experts: list[int]) -> PackedTensors:
        """Permanent copies for some matrices of a stack, stacked in that order."""

    def check(self) -> None:
        """Raises an error if the parameters can no longer be read."""


class Packed4bit(nn.Module, abc.ABC):
    """A module with frozen 4-bit weights.

    Each weight named in ``packed_shapes`` is uint8 and has the scales ``scale_names``, of which those that its form
    lacks are None. The weight and the tensors with an entry per block (its absmax and block_offsets) are parameters
    without gradient, so that FSDP2 shards them; the others, which are small, are buffers. Moving the module moves them.
    Changing its dtype changes ``compute_dtype``, ``weight_dtype`` and other floating-point tensors, but no packed
    state. Loading a state of another form is an error, even with ``strict=False``, and so is arithmetic on the
    parameters (``no_arithmetic``). A weight with more than two dimensions is a stack of separately quantized matrices.

    Attributes:
        weight_dtype: the dtype to which weights are decoded. It is that of the weights that were quantized, until the
            module is cast to another one.

    Example:
        >>> layer = qlora_ext.nn.Linear4bit.from_linear(nn.Linear(64, 48))
        >>> layer.to(torch.float16).compute_dtype, sorted(layer.packed_state())
        (torch.float16, ['absmax', 'nested_absmax', 'nested_offset', 'weight'])
    """

    form: Form
    weight_dtype: torch.dtype
    residency: Residency | None = None
    # Whether the module shares its packed state with another module.
    packed_is_tied = False
    # Whether FSDP2 gathers the packed state for each use.
    is_gathered = False

    @property
    @abc.abstractmethod
    def packed_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every 4-bit weight, as if it were dense, by the name of its parameter."""

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype in which the module computes. Setting it to anything but a floating dtype is a TypeError."""
        return self._compute_dtype

    @compute_dtype.setter
    def compute_dtype(self, dtype: torch.dtype) -> None:
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise TypeError(f"compute_dtype: expected a floating-point torch.dtype, got {dtype!r}")
        self._compute_dtype = dtype

    @property
    def block_size(self) -> int:
        """Elements per scale."""
        return self.form.block_size

    @property
    def double_quant(self) -> bool:
        """Whether the scales are stored in 8 bits."""
        return self.form.double_quant

    @property
    def nested_block_size(self) -> int:
        """Scales per nested scale."""
        return self.form.nested_block_size

    def _set_form(self, form: Form, compute_dtype: torch.dtype) -> None:
        for name, shape in self.packed_shapes.items():
            ops.check_shape(name, shape)
        self.form = form
        self.compute_dtype = self.weight_dtype = compute_dtype

    def _empty_state(self, device: torch.device | str | None) -> dict[str, Tensor]:
        """Zeros with the names, shapes and dtypes of the packed state."""
        state: dict[str, Tensor] = {}
        for name, shape in self.packed_shapes.items():
            names = _names_of(name)
            for tensor, spec in self.form.tensors(shape[-2:], shape[:-2]).items():
                state[names[tensor]] = torch.zeros(spec.shape, dtype=spec.dtype, device=device)
        return state

    def _register_packed(self, device: torch.device | str | None) -> None:
        state = self._empty_state(device)
        for name in self.packed_shapes:
            self.register_parameter(name, nn.Parameter(state[name], requires_grad=False))
            for scale, attribute in scale_names(name).items():
                t = state.get(attribute)
                if scale in _PER_BLOCK:
                    self.register_parameter(attribute, None if t is None else nn.Parameter(t, requires_grad=False))
                else:
                    self.register_buffer(attribute, t)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        super().register_parameter(name, param)
        self._guard(name)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for name in self._parameters:
            self._guard(name)

    def _guard(self, name: str) -> None:
        if name in self.packed_shapes or any(name in scale_names(weight).values() for weight in self.packed_shapes):
            refuse_arithmetic(self._parameters[name])

    def set_packed(self, name: str, w4: Weight4bit) -> None:
        """Stores ``w4`` as the weight ``name``. The module takes over its form and device.

        Raises:
            ValueError: the shape is not the one in ``packed_shapes``, or a tensor's shape or dtype is wrong.
        """
        if self.residency is not None:
            w4 = w4.to(getattr(self, name).device)
        if tuple(w4.shape) != self.packed_shapes[name]:
            raise ValueError(f"w4: expected shape {list(self.packed_shapes[name])}, got {list(w4.shape)}")
        form = self.form
        self.form = w4.form
        names, tensors = _names_of(name), w4.tensors
        try:
            self.check_form({names[tensor]: t for tensor, t in tensors.items()})
        except ValueError:
            self.form = form
            raise
        old = self._parameters[name]
        if old is not None and (old.device, old.dtype, old.shape) == (w4.device, torch.uint8, w4.packed.shape):
            old.data = w4.packed  # the same parameter, because other modules may share it
        else:
            setattr(self, name, nn.Parameter(w4.packed, requires_grad=False))
        self.weight_dtype = w4.dtype
        for scale in SCALES:
            t = tensors.get(scale)
            if t is not None and scale in _PER_BLOCK:
                t = nn.Parameter(t, requires_grad=False)
            setattr(self, names[scale], t)

    def packed_parts(self, name: str) -> dict[str, Tensor]:
        """The parameters and buffers of the weight ``name``, by their names in the module. They are not copies."""
        state = self.packed_state()
        return {part: state[part] for part in _names_of(name).values() if part in state}

    def packed_tensors(self, name: str, state: Mapping[str, Tensor]) -> PackedTensors:
        """The tensors of the weight ``name`` among ``state``, which has them by their names in the module."""
        return PackedTensors(*(state.get(part) for part in _names_of(name).values()))  # type: ignore[arg-type]

    def unshare(self, name: str) -> None:
        """Gives the module its own parameter for the weight ``name``, over the same memory.

        A later ``set_packed`` then does not affect other modules that shared the parameter. Streamed modules and tied
        tables keep their parameter.
        """
        if self.residency is None and not self.packed_is_tied:
            setattr(self, name, nn.Parameter(self._parameters[name].detach(), requires_grad=False))  # type: ignore[union-attr]

    def put_back(self, name: str, w4: Weight4bit, parts: Mapping[str, Tensor]) -> None:
        """Undoes ``unshare`` and ``set_packed``.

        Args:
            w4: the weight before the change.
            parts: ``packed_parts`` before the change. The module shares them again, unless it has moved to another
                device.
        """
        device = getattr(self, name).device
        if self.residency is None and not self.packed_is_tied and all(t.device == device for t in parts.values()):
            for part, t in parts.items():
                own: dict[str, Any] = self._parameters if part in self._parameters else self._buffers
                own[part] = t
        else:
            self.set_packed(name, w4.to(device))

    @property
    def is_sharded(self) -> bool:
        """Whether this process holds only a shard of the packed state (FSDP2, between uses)."""
        return any(hasattr(getattr(self, name), "full_tensor") for name in self.packed_shapes)

    def packed_weight(self, name: str = "weight") -> Weight4bit:
        """The 4-bit weight ``name`` as one value that shares memory with the module.

        For a module that FSDP2 has sharded, the full weight is gathered: every rank has to call this. For a streamed
        module, the result is a copy on the device that computes.
        """
        if self.residency is not None:
            return self._as_weight(name, self.residency.read(name))
        tensors = {tensor: getattr(self, part) for tensor, part in _names_of(name).items()}
        with torch._C.DisableTorchFunctionSubclass():  # a Weight4bit holds plain tensors
            for tensor in ("packed", *_PER_BLOCK):
                if tensors[tensor] is not None:
                    tensors[tensor] = full_tensor(tensors[tensor].detach())
        return self._as_weight(name, PackedTensors(**tensors))

    def _as_weight(self, name: str, tensors: PackedTensors) -> Weight4bit:
        shape = torch.Size(self.packed_shapes[name])
        return weight_of(self.form, **tensors._asdict(), shape=shape, dtype=self.weight_dtype)

    def freeze_packed(self) -> None:
        """Clears ``requires_grad`` of the packed state, which other code may have set for all parameters."""
        for t in self.packed_state().values():
            t.requires_grad_(False)

    def quantize(self, w: Tensor) -> Weight4bit:
        """Quantizes a dense weight of this module to the module's form."""
        return quantize(w, self.form)

    def as_quantized(self, dense: Tensor) -> Tensor:
        """A dense weight in the layout of ``packed_shapes``, transposed if the dense module stores it that way."""
        return dense

    def take_hooks(self, replaced: nn.Module) -> None:
        """Takes over the hooks of the module that this one replaces. Their handles still remove them.

        Example:
            >>> dense = nn.Linear(64, 48)
            >>> handle = dense.register_forward_hook(lambda module, args, y: -y)
            >>> layer = qlora_ext.nn.Linear4bit.from_linear(dense)
            >>> layer.take_hooks(dense)
            >>> torch.equal(layer(torch.ones(64)), -layer.forward(torch.ones(64)))
            True
        """
        vars(self).update({name: vars(replaced)[name] for name in _HOOKS})

    def matrices_of(self, dense: nn.Module) -> dict[str, Tensor]:
        """The matrices of the replaced module that can be calibrated, by name, in the layout of ``packed_shapes``."""
        return {}

    @abc.abstractmethod
    def to_dense(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The decoded dense module, in ``dtype`` or ``weight_dtype``."""

    def reset_parameters(self) -> None:
        """Does nothing, because the weights are frozen and come from a checkpoint or a dense module."""

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # fn may change dtypes: half() and to(dtype) reach every floating tensor, type() every tensor. The packed state
        # keeps its bits and takes only the device from fn.
        if self.residency is not None:  # the packed state does not move
            with self._packed_aside():
                super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            self._cast_dtypes(fn)
            return self
        with torch._C.DisableTorchFunctionSubclass():
            before = {name: t.detach() for name, t in self.packed_state().items()}
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            for name, saved in before.items():
                after = getattr(self, name)
                if after.dtype == saved.dtype:
                    continue
                if name in self._parameters:
                    after.data = saved.to(after.device)
                else:
                    self._buffers[name] = saved.to(after.device)
        self._cast_dtypes(fn)
        return self

    def _cast_dtypes(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Changes the dtypes of the computation and of the decoded weights as ``fn`` changes tensors."""
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype, device="cpu")).dtype
        self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype, device="cpu")).dtype

    @contextlib.contextmanager
    def _packed_aside(self) -> Iterator[None]:
        saved: list[tuple[dict[str, Any], str, Tensor]] = []
        for name in self.packed_state():
            own: dict[str, Any] = self._parameters if name in self._parameters else self._buffers
            saved.append((own, name, own[name]))
            own[name] = None  # the order of the names stays
        try:
            yield
        finally:
            for own, name, tensor in saved:
                own[name] = tensor

    def packed_state(self) -> dict[str, Tensor]:
        """The packed weights and their scales, by their names in the module."""
        names = [part for name in self.packed_shapes for part in _names_of(name).values()]
        tensors = {name: getattr(self, name) for name in names}
        return {name: t for name, t in tensors.items() if t is not None}

    def check_form(self, state: Mapping[str, Tensor] | None = None, prefix: str = "") -> None:
        """Checks a packed state (default: the module's own) against the module's shapes and form.

        Args:
            state: tensors by name; every name begins with ``prefix``. Missing tensors are not checked.

        Raises:
            ValueError: a dtype or a shape differs, so that the scales would be misread.
        """
        empty = self._empty_state("meta")
        found = {prefix + name: t for name, t in self.packed_state().items()} if state is None else state
        for weight, shape in self.packed_shapes.items():
            form = f"the packed state of a weight {list(shape)} with {self.form}"
            for tensor, name in _names_of(weight).items():
                t, expected = found.get(prefix + name), empty.get(name)
                if t is None:
                    continue
                if expected is None:
                    raise ValueError(f"{prefix}{name}: expected {form}, which has no {tensor}")
                if t.dtype != expected.dtype or t.shape != expected.shape:
                    raise ValueError(
                        f"{prefix}{name}: expected {expected.dtype} {list(expected.shape)}, {form}; "
                        f"got {t.dtype} {list(t.shape)}"
                    )

    def _save_to_state_dict(self, *args: Any) -> None:
        if self.residency is not None:
            self.residency.check()
        super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        try:
            self.check_form(state_dict, prefix)
        except ValueError as error:  # an error even with strict=False
            args[-1].append(str(error))
            return
        super()._load_from_state_dict(state_dict, prefix, *args)


class PackedWeight4bit(Packed4bit):
    """A module with one 4-bit weight, called ``weight``."""

    @property
    def weight4bit(self) -> Weight4bit:
        """The packed weight as one value; see ``packed_weight``."""
        return self.packed_weight()

    def set_weight(self, w4: Weight4bit) -> None:
        """Stores ``w4``, which has the dense weight's shape; see ``set_packed``."""
        self.set_packed("weight", w4)


def layers_of(model: nn.Module) -> Iterable[tuple[str, Packed4bit]]:
    """The 4-bit modules of ``model`` with their names.

    Example:
        >>> model = qlora_ext.quantize_model(nn.Sequential(nn.Linear(64, 48), nn.ReLU()))
        >>> [name for name, layer in qlora_ext.nn.layers_of(model)]
        ['0']
    """
    return ((name, m) for name, m in model.named_modules() if isinstance(m, Packed4bit))
