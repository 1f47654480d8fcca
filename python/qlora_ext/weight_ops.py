"""What torch's functions do with a ``Weight4bit``.

A function that reads a weight gets its decoded values, unless ``FUNCTIONS`` or ``OPERATORS`` has an entry for it: those
run on the codes, or keep them. A function that writes to a weight may leave all values as they are, as an average of
equal weights does, or clamping to a range that holds them; any other change is an error.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from .formats import bits_of

aten = torch.ops.aten

# Functions of torch and operators of aten, by function.
FUNCTIONS: dict[Any, Callable[..., Any]] = {}
OPERATORS: dict[Any, Callable[..., Any]] = {}


def implements(table: dict[Any, Callable[..., Any]], *functions: Any) -> Callable[[Any], Any]:
    """Registers the decorated function for ``functions``. It may return NotImplemented, for the decoded values."""

    def register(implementation: Any) -> Any:
        table.update(dict.fromkeys(functions, implementation))
        return implementation

    return register


def _refuse(what: str) -> NoReturn:
    raise RuntimeError(
        f"{what}: a 4-bit weight is frozen; train an adapter, or replace the weight by qlora_ext.quantize(w)"
    )


def torch_function(cls: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    """``__torch_function__`` of a weight."""
    kwargs = kwargs or {}
    implementation = FUNCTIONS.get(func)
    with torch._C.DisableTorchFunctionSubclass():
        result = NotImplemented if implementation is None else implementation(*args, **kwargs)
        return func(*args, **kwargs) if result is NotImplemented else result


def torch_dispatch(cls: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    """``__torch_dispatch__`` of a weight."""
    kwargs = kwargs or {}
    implementation = OPERATORS.get(func)
    if implementation is not None and (result := implementation(*args, **kwargs)) is not NotImplemented:
        return result
    weights = {id(w): w for w in pytree.tree_leaves((args, kwargs)) if isinstance(w, cls)}
    decoded = {key: w.dequantize() for key, w in weights.items()}
    written = _written(func, args, kwargs, weights) if func._schema.is_mutable else []
    before = {key: decoded[key].clone() for key in written}
    args, kwargs = pytree.tree_map_only(Tensor, lambda t: decoded.get(id(t), t), (args, kwargs))
    result = func(*args, **kwargs)
    if not written:
        return _read_only(func, result)
    for key, values in before.items():
        if not _unchanged(decoded[key], values, is_copy=func is aten.copy_.default):
            _refuse(func._schema.name.partition("::")[2])
    own = {id(decoded[key]): weights[key] for key in written}
    return pytree.tree_map_only(Tensor, lambda t: own.get(id(t), t), result)


def _unchanged(after: Tensor, before: Tensor, is_copy: bool) -> bool:
    """Whether the values are those of before. Copied values may be an average of equal ones, which is rounded."""
    if (after.shape, after.dtype) != (before.shape, before.dtype):
        return False
    # 0.9 * w + 0.1 * w rounds the factors, the two products and their sum.
    rounding = 1.5 * torch.finfo(before.dtype).eps if is_copy else 0.0
    return before.is_meta or torch.allclose(after, before, rtol=rounding, atol=0, equal_nan=True)


class DecodedView(Tensor):
    """A view of a weight's decoded values: an error tells who writes to it, because the weight would not change."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.__name__, kwargs or {}
        in_place = name.endswith("_") and not name.endswith("__")
        in_place |= name == "__setitem__" or (
            name.startswith("__i") and name not in ("__index__", "__int__", "__invert__")
        )
        written = (args[:1] if in_place else (), kwargs.get("out"))
        if any(isinstance(t, cls) for t in pytree.tree_leaves(written)):
            _refuse(name)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        if (
            isinstance(result, Tensor)
            and not isinstance(result, cls)
            and any(
                isinstance(t, cls) and t.untyped_storage().data_ptr() == result.untyped_storage().data_ptr()
                for t in args
            )
        ):
            return result.as_subclass(cls)
        return result

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)


def _read_only(func: Any, result: Any) -> Any:
    """``result``, in which views of decoded values cannot be written to."""
    is_view = any(out.alias_info is not None for out in func._schema.returns)
    if not is_view or torch.compiler.is_compiling() or isinstance(result, FakeTensor):
        return result
    return pytree.tree_map_only(Tensor, lambda t: t.as_subclass(DecodedView), result)


def _written(func: Any, args: Any, kwargs: Any, weights: dict[int, Any]) -> list[int]:
    """The ids of the weights to which ``func`` writes."""
    targets = [
        args[i] if i < len(args) else kwargs.get(argument.name)
        for i, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return [*dict.fromkeys(id(t) for t in pytree.tree_leaves(targets) if id(t) in weights)]


# Attributes and methods that are no operators.


@implements(FUNCTIONS, Tensor.requires_grad_)
def _requires_grad_(w: Any, requires_grad: bool = True) -> Any:
    if requires_grad and getattr(w, "_is_param", False):  # nn.Parameter(w) asks a new tensor, which stays frozen
        _refuse("requires_grad")
    return w


@implements(FUNCTIONS, Tensor.requires_grad.__set__)  # type: ignore[attr-defined]
def _(w: Any, requires_grad: bool) -> None:  # not w: torch would never release it
    _requires_grad_(w, requires_grad)


@implements(FUNCTIONS, Tensor.grad.__set__)  # type: ignore[union-attr]
def _(w: Any, grad: Any) -> Any:
    return NotImplemented if grad is None else _refuse("grad")


@implements(FUNCTIONS, Tensor.data.__set__)  # type: ignore[attr-defined]
def _(w: Any, data: Any) -> None:
    if type(data) is not type(w):
        aten.copy_.default(w, data)
    elif data.shape != w.shape or not w.become(data):
        raise RuntimeError(f"data: expected a weight of shape {list(w.shape)} on {w.device}, got {data!r}")


def _of_decoded(function: Any) -> None:
    def read(w: Any, *args: Any, **kwargs: Any) -> Any:
        values = function(w.dequantize(), *args, **kwargs)
        if hasattr(values, "flags"):  # an array of NumPy's, writes to which would be lost
            values.flags.writeable = False
        return values

    FUNCTIONS[function] = read


for _function in (Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__):
    _of_decoded(_function)


@implements(FUNCTIONS, Tensor.__setitem__)
def _(t: Any, index: Any, value: Any) -> Any:
    return _refuse("__setitem__") if hasattr(t, "packed") else NotImplemented  # otherwise the value is a weight


@implements(FUNCTIONS, Tensor.data_ptr)
def _(w: Any) -> int:
    pointer: int = w.packed.data_ptr()
    return pointer


@implements(FUNCTIONS, Tensor.storage, Tensor._typed_storage)
def _(w: Any) -> NoReturn:
    raise RuntimeError(
        "storage: a 4-bit weight has several tensors; save a module's state_dict(), or the weight's .tensors"
    )


@implements(FUNCTIONS, Tensor.share_memory_)
def _(w: Any) -> Any:
    for t in w.tensors.values():
        t.share_memory_()
    return w


@implements(FUNCTIONS, Tensor.is_shared)
def _(w: Any) -> bool:
    return all(t.is_shared() for t in w.tensors.values())


# Operators that keep the codes.


@implements(OPERATORS, aten.detach.default, aten.alias.default)
def _(w: Any) -> Any:
    return w.map(lambda t: t.detach())


@implements(OPERATORS, aten.clone.default)
def _(w: Any, *, memory_format: Any = None) -> Any:
    return w.map(torch.clone)


@implements(OPERATORS, aten._to_copy.default)
def _(w: Any, *, dtype: Any = None, device: Any = None, non_blocking: bool = False, **_: Any) -> Any:
    if dtype is not None and not dtype.is_floating_point:
        return NotImplemented
    return w.map(
        lambda t: t.to(device=device, non_blocking=non_blocking, copy=True),
        **({} if dtype is None else {"dtype": dtype}),
    )


@implements(OPERATORS, aten.empty_like.default)
def _(w: Any, *, dtype: Any = None, device: Any = None, **_: Any) -> Any:
    return w.map(lambda t: torch.empty_like(t, device=device), **({} if dtype is None else {"dtype": dtype}))


@implements(OPERATORS, aten._pin_memory.default)
def _(w: Any, device: Any = None) -> Any:
    return w.map(lambda t: t.pin_memory())


@implements(OPERATORS, aten.is_pinned.default)
def _(w: Any, device: Any = None) -> bool:
    return all(t.is_pinned() for t in w.tensors.values())


@implements(OPERATORS, aten.copy_.default)
def _(target: Any, source: Any, non_blocking: bool = False) -> Any:
    if type(target) is not type(source) or target.shape != source.shape or target.form != source.form:
        return NotImplemented
    for name, t in target.tensors.items():
        t.copy_(getattr(source, name), non_blocking)
    return target


@implements(OPERATORS, aten.view.default, aten.reshape.default, aten._unsafe_view.default)
def _(w: Any, shape: Any) -> Any:
    return w.map(lambda t: t.detach()) if [*shape] == [*w.shape] else NotImplemented


@implements(OPERATORS, aten.slice.Tensor)
def _(w: Any, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Any:
    if dim not in (0, -w.ndim) or step != 1:
        return NotImplemented
    begin, stop, _ = slice(start, end).indices(w.shape[0])
    return rows_of(w, begin, max(begin, stop))


@implements(OPERATORS, aten.split.Tensor, aten.split_with_sizes.default)
def _(w: Any, sizes: Any, dim: int = 0) -> Any:
    if dim not in (0, -w.ndim):
        return NotImplemented
    rows = w.shape[0]
    ends = [*range(sizes, rows, sizes), rows] if isinstance(sizes, int) else [*itertools.accumulate(sizes)]
    parts = [rows_of(w, begin, end) for begin, end in itertools.pairwise([0, *ends])]
    return NotImplemented if any(part is NotImplemented for part in parts) else parts


@implements(OPERATORS, aten.select.int)
def _(w: Any, dim: int, index: int) -> Any:
    return w.matrix(index) if w._is_stack and dim in (0, -3) else NotImplemented


@implements(OPERATORS, aten.unbind.int)
def _(w: Any, dim: int = 0) -> Any:
    return [w.matrix(e) for e in range(w.shape[0])] if w._is_stack and dim in (0, -3) else NotImplemented


def rows_of(w: Any, begin: int, end: int) -> Any:
    """The rows from ``begin`` to ``end`` as a weight over the same memory; NotImplemented if a block is in two parts.

    A stack is divided between its matrices. Where nested scales are divided, they are decoded to float32.
    """
    shape = (end - begin, *w.shape[1:])
    if shape == w.shape:
        return w.map(lambda t: t.detach())
    if w._is_stack:
        return w.map(lambda t: t[begin:end], shape=shape)
    width = w.numel() // max(w.shape[0], 1)
    inside = [row for row in (begin, end) if 0 < row < w.shape[0]]
    if w.ndim < 2 or width * bits_of(w.code) % 8 or any(row * width % w.block_size for row in inside):
        return NotImplemented
    first, last = (-(-row * width // w.block_size) for row in (begin, end))
    parts = {"packed": w.packed[begin:end]}
    if w.nested_absmax is not None or w.offset_scale is not None:
        scales = w.decoded_scales()
        offsets = w.decoded_offsets(scales)
        plain = {"nested_absmax": None, "nested_offset": None, "scale_table": None, "offset_scale": None}
        w = w.replace(absmax=scales, block_offsets=offsets, **plain)
    for name in ("absmax", "block_offsets"):
        t = getattr(w, name)
        parts[name] = None if t is None else t[first:last]
    return w.replace(**parts, shape=shape)
