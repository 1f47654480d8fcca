"""Finds the reward function of ``--method grpo``, which the user's own code defines."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from qlora_ext.untrusted import excerpt

from ..errors import UserError, first_line

Reward: TypeAlias = "Callable[..., list[float]]"


def find_rewards(names: Sequence[str | Reward]) -> list[Reward]:
    """The functions that ``--reward`` names as FILE.py:FUNCTION or MODULE:FUNCTION, and those that were given.

    Each file or module is executed once.

    Raises:
        UserError: there is no such file, module or function, or it raises an exception when it is imported.
    """
    modules: dict[str, Any] = {}
    return [_find(name, modules) if isinstance(name, str) else name for name in names]


def _find(name: str, modules: dict[str, Any]) -> Reward:
    where, _, function = name.rpartition(":")
    if not where or not function.isidentifier():
        raise UserError(f"--reward {excerpt(name)}: expected FILE.py:FUNCTION or MODULE:FUNCTION")
    try:
        module = modules[where] = modules.get(where) or _imported(where, len(modules))
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # the user's code may raise any exception
        raise UserError(f"--reward {excerpt(name)}: cannot import {excerpt(where)} ({first_line(error)})") from error
    found = getattr(module, function, None)
    if not callable(found):
        raise UserError(f"--reward {excerpt(name)}: {excerpt(where)} has no function {function}")
    reward: Reward = found
    return reward


def _imported(where: str, number: int) -> Any:
    path = pathlib.Path(where).expanduser()
    if path.suffix != ".py":
        _make_importable(pathlib.Path.cwd())
        return importlib.import_module(where)
    if not path.is_file():
        raise UserError(f"--reward {excerpt(where)}: no such file")
    path = path.resolve()
    _make_importable(path.parent)  # the modules next to it, as for a script
    spec = importlib.util.spec_from_file_location(f"qlora_ext_reward_{number}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # dataclasses find the module of a class there
    spec.loader.exec_module(module)
    return module


def _make_importable(directory: pathlib.Path) -> None:
    """Makes the modules in ``directory`` importable, after all others. A console script does not find them."""
    if str(directory) not in sys.path:
        sys.path.append(str(directory))


def digest_of_rewards(rewards: Sequence[Reward]) -> str:
    """That of a single function, or SHA-256 over those of several."""
    digests = [_digest(reward) for reward in rewards]
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _digest(reward: Reward) -> str:
    """SHA-256 over the source file of a function, or over its name if it has none."""
    try:
        source = pathlib.Path(inspect.getfile(inspect.unwrap(reward))).read_bytes()
    except (TypeError, OSError):  # an object with __call__, or a function typed into an interpreter
        source = b""
    name = getattr(reward, "__qualname__", type(reward).__qualname__)
    return hashlib.sha256(f"{name}\n".encode() + source).hexdigest()
