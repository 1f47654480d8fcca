"""Finds the layers whose weights a model's own code reads instead of calling the layer.

Code that reads ``layer.weight`` would get packed bytes from a 4-bit layer, so such a layer has to stay dense. They are
found in the source of the model's classes: ``self.out_proj.weight`` in a method names the ``out_proj`` of the class's
instances, and ``block.attention.output.weight`` names every module inside them whose name ends that way.
"""

from __future__ import annotations

import ast
import dis
import functools
import inspect
import operator
import re
import textwrap
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType
from typing import Any, NamedTuple

from torch import nn

# Methods that run before a model is quantized, or that replace weights (as diffusers' fuse_projections does). They are
# not part of a forward pass.
_NOT_IN_USE = re.compile(r"init|tie|reset|resize|prune|load|save|set_|_embeddings$|_projections$|extra_repr")
# Attributes of a packed weight that equal those of the dense one.
_SAME_ANSWER = {"device", "requires_grad", "is_meta", "is_cuda", "ndim", "dim"}
# Code that tests for one of these handles quantized weights itself.
_HANDLED = re.compile(r"uint8|is_floating_point|_is_quantized")
# The class of torch whose code reads the weight of a linear layer inside it.
_TORCH_CLASSES = {nn.MultiheadAttention}


class _Read(NamedTuple):
    """A place where the code of a class reads a weight.

    Attributes:
        path: to the layer; a subscript (``self.layers[i]``) is "*".
        from_self: whether the path begins at ``self`` instead of at another variable.
        guards: the tests around the read, each with the outcome that leads to it.
    """

    path: tuple[str, ...]
    from_self: bool
    guards: tuple[tuple[ast.expr, bool], ...] = ()


def _names_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in(constant)


def _functions(cls: type) -> Iterator[FunctionType]:
    """The functions that ``cls`` itself defines, without their decorators."""
    for value in vars(cls).values():
        value = getattr(value, "fget", None) or getattr(value, "__func__", None) or value
        if callable(value):
            value = inspect.unwrap(value)
        if isinstance(value, FunctionType):
            yield value


def _path(node: ast.expr) -> list[str]:
    """``block.mlp[0].fc`` as ["block", "mlp", "*", "fc"]; [] if the expression is not such a path."""
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute):
        return [*parts, node.attr] if (parts := _path(node.value)) else []
    if isinstance(node, ast.Subscript):
        return [*parts, "*"] if (parts := _path(node.value)) else []
    return []


def _guards(node: ast.AST, above: dict[ast.AST, ast.AST]) -> Iterator[tuple[ast.expr, bool]]:
    """The tests around ``node``, each with the outcome that leads to it."""
    while node in above:
        inner, node = node, above[node]
        if isinstance(node, ast.If | ast.IfExp) and inner is not node.test:
            body = node.body if isinstance(node.body, list) else [node.body]
            yield node.test, inner in body


def _is_harmless(node: ast.Attribute, above: dict[ast.AST, ast.AST]) -> bool:
    """Whether ``node``, a read of ``layer.weight``, gives the same for a packed weight, or never runs with one."""
    user = above.get(node)
    if isinstance(user, ast.Attribute) and user.attr in _SAME_ANSWER:
        return True
    if isinstance(user, ast.Call) and ast.unparse(user.func) in ("isinstance", "hasattr", "getattr"):
        return True
    if not (isinstance(user, ast.Attribute) and user.attr == "dtype"):
        return False
    tests = [ast.unparse(test) for test, _ in _guards(node, above)]
    inner: ast.AST = node
    while inner in above:  # a test may itself read the dtype
        outer = above[inner]
        if isinstance(outer, ast.If | ast.IfExp) and outer.test is inner:
            tests.append(ast.unparse(inner))
        inner = outer
    return any(map(_HANDLED.search, tests))


_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}
_UNKNOWN = object()


def _value(node: ast.expr, module: nn.Module) -> Any:
    """The value of ``node`` in a method of ``module`` if it depends on settings only; else ``_UNKNOWN``."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Attribute):
        root, *path = _path(node) or [""]
        # Only attributes of ``self`` and its configuration that are set once, not those that change at run time.
        if root != "self" or path[:-1] not in ([], ["config"]) or path[-1].startswith("_") or path[-1] == "training":
            return _UNKNOWN
        owner = vars(module) if len(path) == 1 else vars(vars(module).get("config", module))
        cls: Any = type(module)
        found = _UNKNOWN if path[-1] in _assigned(cls) else owner.get(path[-1], _UNKNOWN)
        return found if found is None or isinstance(found, bool | int | float | str) else _UNKNOWN
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        value = _value(node.operand, module)
        return value if value is _UNKNOWN else not value
    if isinstance(node, ast.BoolOp):
        values = [_value(part, module) for part in node.values]
        decides = isinstance(node.op, ast.Or)
        if any(value is not _UNKNOWN and bool(value) == decides for value in values):
            return decides
        return _UNKNOWN if _UNKNOWN in values else not decides
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _COMPARISONS:
        left, right = _value(node.left, module), _value(node.comparators[0], module)
        if left is _UNKNOWN or right is _UNKNOWN:
            return _UNKNOWN
        try:
            return _COMPARISONS[type(node.ops[0])](left, right)
        except TypeError:
            return _UNKNOWN
    return _UNKNOWN


def _is_reached(read: _Read, module: nn.Module) -> bool:
    return all((value := _value(test, module)) is _UNKNOWN or bool(value) == taken for test, taken in read.guards)


@functools.lru_cache(maxsize=4096)
def _assigned(cls: Any) -> frozenset[str]:
    """The attributes that methods of ``cls`` set after its construction."""
    functions = (f for base in cls.__mro__ if base is not nn.Module for f in _functions(base))
    return frozenset(
        step.argval
        for function in functions
        if function.__name__ != "__init__"
        for step in dis.get_instructions(function)
        if step.opname == "STORE_ATTR"
    )


def _reads_of(function: FunctionType, names: frozenset[str]) -> tuple[_Read, ...]:
    if "weight" not in names:
        return ()
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        # Without the source, assume that the function reads the weight of every attribute it names.
        return tuple(_Read((name,), True) for name in names)
    above = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    found: dict[_Read, None] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "weight" and not _is_harmless(node, above):
            root, *path = _path(node.value) or [""]
            if root == "self" or (path and path[-1] != "*"):
                found[_Read(tuple(path), root == "self", tuple(_guards(node, above)))] = None
    return tuple(read for read in found if read.path)


@functools.lru_cache(maxsize=4096)
def _methods_of(cls: type) -> tuple[tuple[str, frozenset[str], tuple[_Read, ...]], ...]:
    """The methods of ``cls`` and its bases: for each its name, the names in its code, and the weights it reads."""
    found = []
    for base in cls.__mro__:
        library = base.__module__.partition(".")[0]
        if (library == "torch" and base not in _TORCH_CLASSES) or library in ("builtins", "qlora_ext", "peft"):
            continue
        for function in _functions(base):
            if not _NOT_IN_USE.search(function.__name__):
                names = frozenset(_names_in(function.__code__))
                found.append((function.__name__, names, _reads_of(function, names)))
    return tuple(found)


def _resolve(module: nn.Module, read: _Read) -> Iterator[str]:
    """The names, relative to ``module``, of the submodules that ``read`` may mean."""
    path = r"\.".join(r"[^.]+" if part == "*" else re.escape(part) for part in read.path)
    pattern = re.compile(path if read.from_self else rf"(?:.+\.)?{path}")
    return (name for name, _ in module.named_modules(remove_duplicate=False) if pattern.fullmatch(name))


def weights_read(model: nn.Module) -> set[str]:
    """The full names of the modules in ``model`` whose ``weight`` the model's code reads.

    A method counts if it is ``forward``, or if another method names it. All other methods are dead code.
    """
    classes: set[Any] = {type(module) for module in model.modules()}
    called = {"forward"}.union(*(names for cls in classes for _, names, _ in _methods_of(cls)))
    reads = {cls: {r for name, _, found in _methods_of(cls) if name in called for r in found} for cls in classes}
    return {
        f"{name}.{inner}" if name else inner
        for name, module in model.named_modules()
        for read in reads[type(module)]
        if _is_reached(read, module)
        for inner in _resolve(module, read)
    }
