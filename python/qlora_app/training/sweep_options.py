"""``--sweep``: several values of some options. Each combination of them makes one adapter."""

from __future__ import annotations

import dataclasses
import itertools
import os
import pathlib
import re
import shlex
from collections.abc import Mapping
from typing import Any, TypeAlias

from qlora_ext.untrusted import check, excerpt

from ..errors import UserError, did_you_mean
from ..options import schema
from .settings import Settings

Values: TypeAlias = "dict[str, list[Any]]"  # of each option, by its name

# The options that may vary. The others determine the base, or only where and how fast a run computes.
VARIED = (
    "lr", "rank", "alpha", "dropout", "seed", "max_steps", "epochs", "batch_size", "grad_accum", "lr_schedule",
    "warmup_ratio", "warmup_steps", "weight_decay", "max_grad_norm", "neftune_alpha", "optimizer", "target_modules",
    "layers", "modules_to_save", "rslora", "dora", "data", "seq_len", "no_packing", "beta",
)  # fmt: skip
MAX_ADAPTERS = 100
_MAX_NAME = 200  # bytes; file systems allow 255, and unfinished and locked names have a prefix
_FORM = 'expected options with their values, such as "lr=1e-4,2e-4 rank=8,16"'
_BOOLEANS = {"true": True, "false": False}
_KINDS = {field.name: str(field.type) for field in dataclasses.fields(Settings)}


def _known(name: str) -> str:
    """The name of an option that may vary.

    Raises:
        UserError: it may not vary, or there is no such option.
    """
    option = name.replace("-", "_")
    if option in VARIED:
        return option
    if option in _KINDS and option != "former_steps":
        raise UserError(
            f"--sweep {option}: all adapters of a sweep have the same {option}; the options that may vary are "
            f"{', '.join(VARIED)}"
        )
    raise UserError(f"--sweep: unknown option {excerpt(name)}{did_you_mean(option, VARIED)}")


def _parsed(option: str, text: str) -> Any:
    kind = _KINDS[option]
    try:
        return _BOOLEANS[text] if kind == "bool" else {"int": int, "float": float, "str": str}[kind](text)
    except (KeyError, ValueError):
        expected = {"int": "an integer", "float": "a number", "bool": "true or false"}[kind]
        raise UserError(f"--sweep {option}={excerpt(text)}: expected {expected}") from None


def parse_sweep(text: str) -> Values:
    """The values in the text of ``--sweep``, which is split like a shell command.

    Raises:
        UserError: the text has another form; the message names the part.
    """
    try:
        parts = shlex.split(text)
    except ValueError as error:
        raise UserError(f"--sweep {excerpt(text)}: {error}") from None
    values: Values = {}
    for part in parts:
        name, equals, listed = part.partition("=")
        if not equals:
            raise UserError(f"--sweep {excerpt(part)}: {_FORM}")
        option = _known(name.removeprefix("--"))
        if option in values:
            raise UserError(f"--sweep {option}: given twice; write all its values after one {option}=")
        values[option] = [_parsed(option, value) for value in listed.split(",")] if listed else []
    return checked(values)


def checked(values: Mapping[str, Any]) -> Values:
    """``values`` with the types of their options.

    Raises:
        FileError: a value has a wrong type. UserError: an option may not vary, or has no values or one of them twice.
    """
    found: Values = {}
    for name, listed in values.items():
        option = _known(str(name))
        if not isinstance(listed, list | tuple):
            raise UserError(f"--sweep {option}: expected a list of values, got {excerpt(listed)}")
        items = [os.fspath(value) if isinstance(value, os.PathLike) else value for value in listed]
        for value in items:
            check({option: value}, {option: schema(Settings)[f"{option}?"]}, "--sweep")
        if _KINDS[option] == "float":
            items = [float(value) for value in items]
        if not items or "" in items:
            raise UserError(f"--sweep {option}: {'no values' if not items else 'an empty value'}; {_FORM}")
        if repeated := [value for i, value in enumerate(items) if value in items[:i]]:
            raise UserError(f"--sweep {option}: the value {shown(repeated[0])} is given twice")
        found[option] = items
    if not found:
        raise UserError(f"--sweep: no option; {_FORM}")
    return found


def shown(value: Any) -> str:
    """A value as it is written after an option."""
    return str(value).lower() if isinstance(value, bool) else str(value).removesuffix(".0")


def as_text(values: Values) -> str:
    """``values`` in the form of ``--sweep``."""
    return shlex.join(f"{option}={','.join(map(shown, listed))}" for option, listed in values.items())


def _name(values: Mapping[str, Any]) -> str:
    """The name of an adapter's directory, such as ``lr=0.0001,rank=8``. Of a path, it has the last part."""

    def part(value: Any) -> str:
        return re.sub(r"[^\w.+-]+", "-", pathlib.PurePath(shown(value)).name.replace(",", "+"))

    return ",".join(f"{option}={part(value)}" for option, value in values.items())


def combinations(values: Values) -> dict[str, dict[str, Any]]:
    """The options of each adapter, by the name of its directory.

    Raises:
        UserError: there are too many combinations, or names are too long or the same.
    """
    count = 1
    for listed in values.values():
        count *= len(listed)
    if count > MAX_ADAPTERS:
        raise UserError(f"--sweep: {count} combinations; expected at most {MAX_ADAPTERS} adapters")
    found: dict[str, dict[str, Any]] = {}
    for combination in itertools.product(*values.values()):
        options = dict(zip(values, combination, strict=True))
        name = _name(options)
        if len(os.fsencode(name)) > _MAX_NAME:
            raise UserError(f"--sweep: the directory name {excerpt(name)} would be too long; vary fewer options")
        if name in found:
            raise UserError(f"--sweep: two adapters would both be named {excerpt(name)}; rename one of the files")
        found[name] = options
    return found
