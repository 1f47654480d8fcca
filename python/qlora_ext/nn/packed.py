"""``Packed4bit``: the base class of modules with 4-bit weights, which preserves their bits."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from .. import cpu, ops
from .._internal.shared_buffers import PackedTensors
from ..form import Form
from ..formats import EXACT
from ..weight import TENSORS, Weight4bit, quantize, weight_of
from .residency import Residency

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


class Packed4bit(nn.Module, abc.ABC):
    """A module with frozen 4-bit weights.

    Each weight named in ``packed_shapes`` is a parameter, a ``Weight4bit``. In ``state_dict()`` and in files, its
    tensors stand separately: the codes under the name of the weight, and the scales under ``scale_names``. ``expose``
    registers them so in the module too, for programs that shard or offload tensors by name (FSDP2, accelerate) and for
    loaders.

    Moving the module moves the weights. Changing its dtype changes ``compute_dtype`` and the dtype to which the weights
    decode, but no code and no scale. Loading a state of another form is an error, even with ``strict=False``. A weight
    with more than two dimensions is a stack of separately quantized matrices.

    Example:
        >>> layer = qlora_ext.nn.Linear4bit.from_linear(nn.Linear(64, 48))
        >>> layer.weight.shape, layer.to(torch.float16).weight.dtype, sorted(layer.state_dict())
        (torch.Size([48, 64]), torch.float16, ['absmax', 'bias', 'nested_absmax', 'nested_offset', 'weight'])
    """

    # The form of each weight, by the name of its parameter. The two of experts may differ, as in a GGUF file.
    forms: dict[str, Form]
    # What meets the weights of layers and experts: "exact" or "int8", see ``linear_nf4``. Embeddings have no products.
    activations: str = EXACT
    residency: Residency | None = None
    # Whether the module shares its packed state with another module.
    packed_is_tied = False
    # Whether FSDP2 gathers the packed state for each use.
    is_gathered = False
    # The dtype to which exposed weights decode.
    _exposed_dtype: torch.dtype

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
    def form(self) -> Form:
        """The form of the module's weights; of its first one, if they differ."""
        return self.forms[next(iter(self.packed_shapes))]

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

    @property
    def weight_dtype(self) -> torch.dtype:
        """The dtype to which the weights decode."""
        w4 = self._parameters[next(iter(self.packed_shapes))]
        return w4.dtype if isinstance(w4, Weight4bit) else self._exposed_dtype

    @weight_dtype.setter
    def weight_dtype(self, dtype: torch.dtype) -> None:
        self._exposed_dtype = dtype
        for name in self.packed_shapes:
            w4 = self._parameters[name]
            if isinstance(w4, Weight4bit):
                w4.become(w4.replace(dtype=dtype))

    def _set_form(self, form: Form, compute_dtype: torch.dtype) -> None:
        cpu.limit_threads_once()
        for name, shape in self.packed_shapes.items():
            ops.check_shape(name, shape)
        self.forms = dict.fromkeys(self.packed_shapes, form)
        self.compute_dtype = self._exposed_dtype = compute_dtype

    def take_forms(self, forms: Mapping[str, Form]) -> None:
        """Gives the weights of a module on the meta device other forms, by the names of their parameters."""
        if forms != self.forms:
            self.forms = {**forms}
            self._register_packed("meta")

    def _register_packed(self, device: torch.device | str | None) -> None:
        for name, shape in self.packed_shapes.items():
            specs = self.forms[name].tensors(shape[-2:], shape[:-2])
            zeros = {t: torch.zeros(spec.shape, dtype=spec.dtype, device=device) for t, spec in specs.items()}
            w4 = self._as_weight(name, PackedTensors(**zeros), self._exposed_dtype)
            self.register_parameter(name, nn.Parameter(w4, requires_grad=False))

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if isinstance(param, Weight4bit) and name not in self.packed_shapes:  # prune and weight_norm rename it
            self._refuse_computed(*self.packed_shapes)
        if isinstance(param, Weight4bit):
            if tuple(param.shape) != self.packed_shapes[name]:
                expected = list(self.packed_shapes[name])
                raise ValueError(f"{name}: expected shape {expected}, got {list(param.shape)}")
            if param.form != self.forms[name]:
                self.forms = {**self.forms, name: param.form}
        super().register_parameter(name, param)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if "form" in vars(self):  # pickled before its weights had forms of their own
            self.forms = dict.fromkeys(self.packed_shapes, vars(self).pop("form"))
        if "_exposed_dtype" not in vars(self):  # pickled by version 0.1.0, with separate tensors
            self._exposed_dtype = vars(self).pop("weight_dtype", self.compute_dtype)
            self.join()

    def __delattr__(self, name: str) -> None:
        if name in self.packed_shapes:  # parametrizations delete it
            self._refuse_computed(name)
        super().__delattr__(name)

    def _refuse_computed(self, *names: str) -> NoReturn:
        raise RuntimeError(
            f"{', '.join(names)}: expected a weight that is a parameter of this {type(self).__name__}, got one that is "
            "computed from others (pruned, normalized, parametrized); change the dense module, see to_dense()"
        )

    @property
    def is_exposed(self) -> bool:
        """Whether the tensors of the weights are registered separately, see ``expose``."""
        return not self._weights()

    def _weights(self) -> dict[str, Weight4bit]:
        """The weights that are one parameter each, that is, not exposed."""
        own: dict[str, Any] = {name: self._parameters.get(name) for name in self.packed_shapes}
        return {name: w4 for name, w4 in own.items() if isinstance(w4, Weight4bit)}

    def _parts(self, name: str) -> dict[str, str]:
        """The names in the module's state of the tensors of the weight ``name``, by their names in ``Weight4bit``."""
        return _names_of(name)

    def expose(self) -> None:
        """Registers the tensors of each weight separately, under their names in files, until ``join``.

        The codes and the tensors with an entry per block become parameters without gradient, which FSDP2 shards; the
        others, which are small, become buffers.
        """
        for name, w4 in self._weights().items():
            self._exposed_dtype = w4.dtype
            self._expose(name, w4.tensors)

    def _expose(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        for tensor, part in self._parts(name).items():
            t = tensors.get(tensor)
            if tensor == "packed" or tensor in _PER_BLOCK:
                self._parameters[part] = None if t is None else nn.Parameter(t, requires_grad=False)
            else:
                self._buffers[part] = t

    def join(self) -> None:
        """Undoes ``expose``: each weight is one parameter again, over the same memory."""
        for name, shape in self.packed_shapes.items():
            if not isinstance(self._parameters[name], Weight4bit):
                w4 = weight_of(self.forms[name], **self._taken_parts(name), shape=shape, dtype=self._exposed_dtype)
                self._parameters[name] = nn.Parameter(w4, requires_grad=False)

    def _taken_parts(self, name: str) -> dict[str, Any]:
        """The tensors of an exposed weight, which are no longer registered afterwards."""
        parts = {tensor: self._tensor(part) for tensor, part in self._parts(name).items()}
        for part in self._parts(name).values():
            if part != name:
                self._parameters.pop(part, None)
                self._buffers.pop(part, None)
        return {tensor: None if t is None else t.detach() for tensor, t in parts.items()}

    def _tensor(self, part: str) -> Tensor | None:
        """A tensor of an exposed weight, by its name in the module."""
        return self._parameters[part] if part in self._parameters else self._buffers.get(part)

    def set_packed(self, name: str, w4: Weight4bit) -> None:
        """Stores ``w4`` as the weight ``name``. The module takes over its form and device.

        Raises:
            ValueError: the shape is not the one in ``packed_shapes``, or a tensor's shape or dtype is wrong.
        """
        old = self._parameters[name]
        if self.residency is not None:
            assert old is not None
            w4 = w4.to(old.device)
        if tuple(w4.shape) != self.packed_shapes[name]:
            raise ValueError(f"w4: expected shape {list(self.packed_shapes[name])}, got {list(w4.shape)}")
        forms = self.forms
        self.forms = {**forms, name: w4.form}
        names, tensors = _names_of(name), w4.tensors
        try:
            self.check_form({names[tensor]: t for tensor, t in tensors.items()})
        except ValueError:
            self.forms = forms
            raise
        if isinstance(old, Weight4bit):
            self._parameters[name] = _in_place_of(old, w4)
        else:
            self._exposed_dtype = w4.dtype
            self._expose(name, tensors)

    def exposed_tensors(self, name: str) -> PackedTensors:
        """The tensors of the exposed weight ``name``, of which this process may hold only shards."""
        state = self.packed_state()
        return PackedTensors(*(state.get(part) for part in _names_of(name).values()))  # type: ignore[arg-type]

    def unshare(self, name: str) -> None:
        """Gives the module its own parameter for the weight ``name``, over the same memory.

        A later ``set_packed`` then does not affect other modules that shared the parameter. Streamed modules and tied
        tables keep their parameter.
        """
        w4 = self._parameters[name]
        if self.residency is None and not self.packed_is_tied and isinstance(w4, Weight4bit):
            self._parameters[name] = nn.Parameter(w4.detach(), requires_grad=False)

    def put_back(self, name: str, w4: Weight4bit, parameter: Tensor) -> None:
        """Undoes ``unshare`` and ``set_packed``.

        Args:
            w4: the weight before the change.
            parameter: the module's parameter before the change. The module shares it again, unless it has moved to
                another device.
        """
        now = self._parameters[name]
        assert now is not None
        own = isinstance(parameter, Weight4bit) and self.residency is None and not self.packed_is_tied
        if own and parameter.device == now.device:
            self.forms = {**self.forms, name: w4.form}
            self._parameters[name] = parameter  # type: ignore[assignment]
        else:
            self.set_packed(name, w4.to(now.device))

    @property
    def is_sharded(self) -> bool:
        """Whether this process holds only a shard of the packed state (FSDP2, between uses)."""
        return any(hasattr(self._parameters[name], "full_tensor") for name in self.packed_shapes)

    def packed_weight(self, name: str = "weight") -> Weight4bit:
        """The 4-bit weight ``name`` over the module's memory, which a later ``set_packed`` does not change.

        For a module that FSDP2 has sharded, the full weight is gathered: every rank has to call this. For a streamed
        module, the result is a copy on the device that computes.
        """
        if self.residency is not None:
            return self._as_weight(name, self.residency.read(self, name))
        w4 = self._parameters[name]
        if isinstance(w4, Weight4bit):
            return w4.replace()
        full = (None if t is None else full_tensor(t.detach()) for t in self.exposed_tensors(name))
        return self._as_weight(name, PackedTensors(*full))  # type: ignore[arg-type]

    def _as_weight(self, name: str, tensors: PackedTensors, dtype: torch.dtype | None = None) -> Weight4bit:
        shape = self.packed_shapes[name]
        return weight_of(self.forms[name], **tensors._asdict(), shape=shape, dtype=dtype or self.weight_dtype)

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

    def _description(self) -> str:
        """The form, and ``activations`` unless they are exact, for ``extra_repr``."""
        form = str(self.form)
        if len({*self.forms.values()}) > 1:
            form = ", ".join(f"{name}: {form}" for name, form in self.forms.items())
        return form if self.activations == EXACT else f"{form}, activations={self.activations}"

    @abc.abstractmethod
    def to_dense(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The decoded dense module, in ``dtype`` or ``weight_dtype``."""

    def reset_parameters(self) -> None:
        """Does nothing, because the weights are frozen and come from a checkpoint or a dense module."""

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # fn may change dtypes: half() and to(dtype) reach every floating tensor, type() every tensor. The packed state
        # keeps its bits and takes only the device from fn.
        weights = self._weights()
        exposed = {} if weights else {name: t.detach() for name, t in self.packed_state().items()}
        self._parameters.update(dict.fromkeys(weights))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, w4 in weights.items():
            self._parameters[name] = w4 if self.residency is not None else _applied(fn, w4)  # type: ignore[assignment]
        for name, saved in exposed.items():
            after = self._tensor(name)
            if after is None or after.dtype == saved.dtype:
                continue
            if name in self._parameters:
                after.data = saved.to(after.device)
            else:
                self._buffers[name] = saved.to(after.device)
        empty = torch.empty(0, dtype=self.compute_dtype, device="cpu")
        self.compute_dtype = fn(empty).dtype
        if exposed or self.residency is not None:
            self.weight_dtype = fn(empty.to(self.weight_dtype)).dtype
        return self

    def packed_state(self) -> dict[str, Tensor]:
        """The tensors of the weights, by their names in files."""
        state: dict[str, Tensor] = {}
        for name in self.packed_shapes:
            w4 = self._parameters[name]
            for tensor, part in _names_of(name).items():
                t = getattr(w4, tensor) if isinstance(w4, Weight4bit) else self._tensor(part)
                if t is not None:
                    state[part] = t
        return state

    def check_form(self, state: Mapping[str, Tensor] | None = None, prefix: str = "") -> None:
        """Checks a packed state (default: the module's own) against the module's shapes and form.

        Args:
            state: tensors by name; every name begins with ``prefix``. Missing tensors are not checked.

        Raises:
            ValueError: a dtype or a shape differs, so that the scales would be misread.
        """
        found = {prefix + name: t for name, t in self.packed_state().items()} if state is None else state
        for weight, shape in self.packed_shapes.items():
            form = f"the packed state of a weight {list(shape)} with {self.forms[weight]}"
            specs = self.forms[weight].tensors(shape[-2:], shape[:-2])
            for tensor, name in _names_of(weight).items():
                t, expected = found.get(prefix + name), specs.get(tensor)
                if t is None:
                    continue
                if expected is None:
                    raise ValueError(f"{prefix}{name}: expected {form}, which has no {tensor}")
                if t.dtype != expected.dtype or t.shape != expected.shape:
                    raise ValueError(
                        f"{prefix}{name}: expected {expected.dtype} {list(expected.shape)}, {form}; "
                        f"got {t.dtype} {list(t.shape)}"
                    )

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.residency is not None:
            self.residency.check()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, w4 in self._weights().items():
            parts = {prefix + part: getattr(w4, tensor) for tensor, part in self._parts(name).items()}
            destination.update({part: t for part, t in parts.items() if t is not None})

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        try:
            self.check_form(state_dict, prefix)
        except ValueError as error:  # an error even with strict=False
            args[-1].append(str(error))
            return
        weights = self._weights()
        for name, w4 in weights.items():
            self._expose(name, w4.tensors)
        super()._load_from_state_dict(state_dict, prefix, *args)
        for name, w4 in weights.items():
            loaded = w4.replace(**self._taken_parts(name))
            self._parameters[name] = _in_place_of(w4, loaded)


def _in_place_of(parameter: Weight4bit, w4: Weight4bit) -> nn.Parameter:
    """The parameter whose weight is ``w4``: ``parameter`` itself, which others may share, if that is possible."""
    taken = w4 is parameter or parameter.become(w4)
    return parameter if taken else nn.Parameter(w4.detach(), requires_grad=False)  # type: ignore[return-value]


def _applied(fn: Callable[[Tensor], Tensor], parameter: Weight4bit) -> nn.Parameter:
    probe = fn(torch.empty(0, dtype=parameter.dtype, device=parameter.device))
    is_cast = probe.is_floating_point() and probe.dtype != parameter.dtype and probe.device == parameter.device
    with torch.no_grad():
        w4 = parameter.replace(dtype=probe.dtype) if is_cast else fn(parameter)  # a cast does not copy the codes
    return _in_place_of(parameter, w4 if isinstance(w4, Weight4bit) else parameter)


def _part(name: str) -> Any:
    """The property that is the tensor ``name`` of a module's weight."""

    def tensor(module: Any) -> Tensor | None:
        found: Tensor | None = module.packed_state().get(name)
        return found

    return property(tensor)


class PackedWeight4bit(Packed4bit):
    """A module with one 4-bit weight, called ``weight``."""

    absmax, nested_absmax, nested_offset = _part("absmax"), _part("nested_absmax"), _part("nested_offset")
    scale_table, block_offsets, offset_scale = _part("scale_table"), _part("block_offsets"), _part("offset_scale")
    column_order = _part("column_order")

    @property
    def weight4bit(self) -> Weight4bit:
        """The packed weight as one value; see ``packed_weight``."""
        return self.packed_weight()

    def set_weight(self, w4: Weight4bit) -> None:
        """Stores ``w4``, which has the dense weight's shape; see ``set_packed``."""
        self.set_packed("weight", w4)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The decoded weight, in ``dtype`` or ``weight_dtype``."""
        return self.packed_weight().dequantize(dtype)


def layers_of(model: nn.Module) -> Iterable[tuple[str, Packed4bit]]:
    """The 4-bit modules of ``model`` with their names.

    Example:
        >>> model = qlora_ext.quantize_model(nn.Sequential(nn.Linear(64, 48), nn.ReLU()))
        >>> [name for name, layer in qlora_ext.nn.layers_of(model)]
        ['0']
    """
    return ((name, m) for name, m in model.named_modules() if isinstance(m, Packed4bit))
