"""Packed weights reject arithmetic; the error says what to do instead."""

from __future__ import annotations

from multiprocessing.reduction import ForkingPickler
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch._ops import OpOverload, OpOverloadPacket
from torch.multiprocessing import reductions

_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")
_UNARY = ("neg", "abs", "len")
# Indexing, iteration and NumPy also turn an object into tensors.
_ACCESS = ("getitem", "array")

# Names of torch's functions and methods. ``_FORMS`` adds the in-place, operator and ``_foreach`` variants.
_NAMES = """
    add sub subtract rsub mul multiply div divide floor_divide true_divide remainder fmod pow rpow square sqrt rsqrt
    neg negative abs absolute reciprocal exp log sum nansum prod mean nanmean median std var norm cumsum cumprod
    clamp clip clamp_min clamp_max maximum minimum lerp addcmul addcdiv addmm addmv addr addbmm baddbmm
    matmul mm bmm mv dot vdot inner outer ger kron linear bilinear einsum tensordot chain_matmul multi_dot
    conv1d conv2d conv3d embedding embedding_bag softmax log_softmax sigmoid tanh relu gelu silu dropout
    normal uniform bernoulli random exponential erfinv sign round floor ceil trunc
"""
_FORMS = "{}", "{}_", "__{}__", "__r{}__", "__i{}__", "_foreach_{}", "_foreach_{}_"
_ARITHMETIC = {form.format(name) for name in (*_NAMES.split(), *_BINARY) for form in _FORMS}
# Views of the same bytes; their results reject arithmetic too.
_SAME_BYTES = "detach data t T mT H mH transpose swapaxes movedim permute view reshape flatten contiguous"
_VIEWS = {*_SAME_BYTES.split()}


def _refuse(what: str, cause: Exception | None = None) -> NoReturn:
    reason = "" if cause is None else f" ({str(cause).partition(chr(10))[0]})"
    raise RuntimeError(
        f"{what}: expected a dense tensor, got the packed state of a 4-bit weight{reason}; layer.dequantize() gives "
        "the decoded weight; average, decay and cast the trainable parameters only"
    ) from cause


def _is_custom(func: Any) -> bool:
    """Whether ``func`` is an operator of ours or of another library, which checks its own arguments."""
    return isinstance(func, OpOverload | OpOverloadPacket) and not str(func).startswith("aten")


class _Packed(Tensor):
    """Bytes that can be moved, copied, compared, viewed and saved like any tensor, but reject arithmetic.

    A torch function with such an argument is rejected in three cases: its name is that of an arithmetic function, torch
    itself fails on bytes, or the result is a floating-point tensor. Arithmetic on a copy (``clone``) is not detected.
    While a graph is traced, only the name decides.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if torch.compiler.is_compiling():
                if func.__name__ in _ARITHMETIC:
                    _refuse(func.__name__)
                return func(*args, **(kwargs or {}))
            if _is_custom(func):
                return func(*args, **(kwargs or {}))
            return _guarded(func, args, kwargs or {})

    def plain(self) -> Tensor:
        """The same memory as a plain ``Tensor``."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.detach()

    def as_parameter(self) -> nn.Parameter:
        """The same memory as a plain parameter, with the attributes of this one."""
        parameter = nn.Parameter(self.plain(), requires_grad=False)
        vars(parameter).update({key: value for key, value in vars(self).items() if key != "_is_param"})
        return parameter


def _guarded(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func.__name__
    if name in ("__get__", "__set__"):  # of an attribute
        name = func.__self__.__name__ if name == "__get__" else f"{func.__self__.__name__} ="
    if name in _ARITHMETIC:
        _refuse(name)
    if name in ("copy_", "data =") and isinstance(args[0], _Packed):
        target, source = args[:2]
        if source.dtype != target.dtype and (source.is_floating_point() or target.is_floating_point()):
            _refuse(f"{name} of {source.dtype} in the place of {target.dtype}")
    try:
        result = func(*args, **kwargs)
    except (RuntimeError, NotImplementedError) as error:
        if type(error) not in (RuntimeError, NotImplementedError):  # a subclass: out of memory, or a lost connection
            raise
        _refuse(name, error)
    if not isinstance(result, Tensor):
        return result
    reinterpreted = name == "view" or name.startswith("new_") or name.endswith("_like")
    of_them = any(result.dtype == t.dtype for t in args if isinstance(t, Tensor))
    if result.is_floating_point() and not of_them and not reinterpreted:
        _refuse(name)
    return result.as_subclass(PackedTensor) if name in _VIEWS and of_them and type(result) is Tensor else result


class PackedTensor(_Packed):
    """The result of ``detach()``, ``data`` and ``state_dict()`` on a ``PackedParameter``. Its copies are plain."""

    def __new__(cls, data: Tensor, requires_grad: bool = False) -> Any:
        # For a tensor subclass, nn.Parameter(t) constructs the class of t, which must return a parameter.
        return PackedParameter(data, requires_grad)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied = self.plain().clone()
        memo[id(self)] = PackedParameter(copied) if isinstance(self, nn.Parameter) else copied
        return memo[id(self)]  # type: ignore[no-any-return]

    def __reduce_ex__(self, protocol: Any) -> Any:  # pickled as a plain tensor
        plain = self.as_parameter() if isinstance(self, nn.Parameter) else self.plain()
        return plain.__reduce_ex__(protocol)


class PackedParameter(_Packed, nn.Parameter):
    """A frozen parameter with packed codes or scales; see ``_Packed``."""

    def __new__(cls, data: Tensor, requires_grad: bool = False) -> Any:
        plain = data.plain() if isinstance(data, _Packed) else data
        return super().__new__(cls, plain, requires_grad)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_parameter().__reduce_ex__(protocol)


def refuse_arithmetic(parameter: nn.Parameter | None) -> None:
    """Turns a plain ``parameter`` into a ``PackedParameter``, in place."""
    if type(parameter) in (nn.Parameter, PackedTensor):
        parameter.__class__ = PackedParameter


# Processes share the memory, as for plain tensors.
ForkingPickler.register(PackedTensor, lambda t: reductions.reduce_tensor(t.plain()))
ForkingPickler.register(PackedParameter, lambda p: reductions.reduce_tensor(p.as_parameter()))


class NoArithmetic:
    """A base class for holders of a weight that are not tensors: rejects Python's operators and torch's functions."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        _refuse_operator(cls, func.__name__)

    def __bool__(self) -> bool:
        return True  # otherwise Python would call __len__


def _refuse_operator(cls: type, name: str) -> NoReturn:
    raise TypeError(
        f"{name}: expected a tensor, got {cls.__name__}, which holds packed codes; use dequantize() for the decoded "
        "tensor, or qlora_ext.linear_nf4(x, w4) for the product"
    )


def _refusing(name: str) -> Any:
    def method(self: Any, *others: Any) -> NoReturn:
        _refuse_operator(type(self), name)

    method.__name__ = name
    return method


for _name in (*_UNARY, *_ACCESS, *(prefix + name for name in _BINARY for prefix in ("", "r"))):
    setattr(NoArithmetic, f"__{_name}__", _refusing(f"__{_name}__"))
