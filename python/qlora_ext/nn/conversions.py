"""Which linear layers can be 4-bit: ``nn.Linear``, what integrations add, and subclasses that compute the same."""

from __future__ import annotations

import ast
import dis
import functools
import inspect
import re
import textwrap
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..weight import Weight4bit
from .linear import Linear4bit
from .packed import Packed4bit

# Dense linear classes and their 4-bit classes, for quantize_model. Integrations add those of their libraries.
CONVERSIONS: dict[type[nn.Module], type[Linear4bit]] = {nn.Linear: Linear4bit}

# The methods that a subclass of nn.Linear may define. Other code could call any further methods.
_OWN = re.compile(r"__init__|__repr__|_?init|_?reset|extra_repr$|forward$")
_COMPARING = ("COMPARE_OP", "IS_OP", "CONTAINS_OP")
_LINEAR_STATE = frozenset(vars(nn.Linear(1, 1, device="meta")))


class _Empty(nn.Linear):
    """An empty class, whose attributes every class has."""

    in_features: int


def conversion_of(module: nn.Module) -> type[Linear4bit] | None:
    """The 4-bit class that can replace ``module``; None if there is none.

    A subclass of ``nn.Linear`` can be replaced if it computes x · Wᵀ + b, holds only W and b, and has no further
    methods that other code could call. A layer whose weight is computed from other parameters (weight and spectral
    norm, pruning) cannot: those parameters may be trained, and 4-bit weights are not.

    Example:
        >>> qlora_ext.nn.conversion_of(nn.Linear(4, 4)).__name__
        'Linear4bit'
    """
    kind: Any = type(module)
    if "weight" not in module._parameters or isinstance(module._parameters["weight"], Weight4bit):
        return None
    if kind in CONVERSIONS:
        return CONVERSIONS[kind]
    if not isinstance(module, nn.Linear) or isinstance(module, Packed4bit) or not _holds_a_linear(module):
        return None
    return Linear4bit if _computes_linear(kind, frozenset(vars(module)) - _LINEAR_STATE) else None


def _holds_a_linear(module: nn.Linear) -> bool:
    weight = module._parameters.get("weight")
    return (
        weight is not None
        and not torch.nn.parameter.is_lazy(weight)
        and tuple(weight.shape) == (module.out_features, module.in_features)
        and module._parameters.keys() == {"weight", "bias"}
        and not module._buffers
        and not module._modules
        and "forward" not in vars(module)
    )


@functools.lru_cache(maxsize=1024)
def _computes_linear(kind: type[nn.Linear], attributes: frozenset[str]) -> bool:
    """Whether layers of the class ``kind`` with these ``attributes``, in addition to ``nn.Linear``'s, are linear."""
    bases = kind.__mro__[: kind.__mro__.index(nn.Linear)]
    if not all(_is_harmless(name, value) for base in bases for name, value in vars(base).items()):
        return False
    forward = inspect.unwrap(kind.forward)
    if forward is nn.Linear.forward:
        return True
    if any(_depends_on_input(inspect.unwrap(vars(base)["forward"])) for base in bases if "forward" in vars(base)):
        return False
    code = getattr(forward, "__code__", None)
    # If the outcome depends on an attribute, it may change later.
    if code is None or len(inspect.signature(forward).parameters) != 2 or attributes & {*code.co_names}:
        return False
    try:
        return all(_agrees(kind, bias, training) for bias in (False, True) for training in (False, True))
    except Exception:  # an arbitrary forward, called with inputs that it may not support
        return False


def _depends_on_input(forward: Any) -> bool:
    """Whether a test in ``forward`` depends on more than the dtype and device of its input, such as its row count.

    ``_agrees`` cannot try all inputs, so a layer whose forward branches on them stays dense.
    """
    if not hasattr(forward, "__code__"):
        return True
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):  # without the source, assume that every test does
        names = {step.opname for step in dis.get_instructions(forward)}
        return any("JUMP_IF" in name or "_IF_" in name or name in _COMPARING for name in names)
    above = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    tests: list[ast.AST] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.If | ast.IfExp | ast.While):
            tests.append(node.test)
        elif isinstance(node, ast.Compare | ast.BoolOp | ast.Match):
            tests.append(node.subject if isinstance(node, ast.Match) else node)
    names_in = (name for test in tests for name in ast.walk(test) if isinstance(name, ast.Name))
    return any(name.id != "self" and getattr(above[name], "attr", "") not in ("dtype", "device") for name in names_in)


def _is_harmless(name: str, value: object) -> bool:
    """Whether a class with this attribute can still be equivalent to ``nn.Linear``."""
    if _OWN.match(name) or name in vars(_Empty):
        return True
    return not hasattr(nn.Linear, name) and isinstance(value, bool | int | float | str | tuple | None)


def _agrees(kind: type[nn.Linear], bias: bool, training: bool) -> bool:
    """Whether a layer of ``kind`` with some weight gives the output and the gradient of ``functional.linear``."""
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weight, offset = _random(4, 6), _random(4) if bias else None
        probe = kind.__new__(kind)
        nn.Module.__init__(probe)
        # Plain attributes: contexts that put new parameters on the meta device do not see them.
        vars(probe).update(in_features=6, out_features=4, weight=weight, bias=offset, training=training)
        for shape, size in (
            ((6,), 1.0),
            ((3, 6), 1.0),
            ((2, 3, 6), 1.0),
            ((3, 6), 1e4),
        ):  # large x: forwards that clamp
            x = _random(*shape) * size
            results = [_with_gradient(call, x) for call in (probe, lambda t: functional.linear(t, weight, offset))]
            if not all(torch.allclose(ours, theirs, 1e-4, 1e-5 * size) for ours, theirs in zip(*results, strict=True)):
                return False
    return True


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, device="cpu", dtype=torch.float32)


def _with_gradient(call: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = call(x)
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    return y.detach(), dx
