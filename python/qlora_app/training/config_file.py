"""``--config``: a file with the options of a run, in YAML or JSON. The settings.json of a run is such a file."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

from qlora_ext.untrusted import check, excerpt, first_line, printable, read_text

from ..errors import UserError, did_you_mean, path_named
from ..options import schema
from .settings import Settings

_MAX_BYTES = 1 << 20
_MORE = ("output", "sweep")  # options that are not settings of a run
# An option that was typed replaces not only its own value in the file, but also that of the option it excludes.
_EXCLUDES = {
    "epochs": "max_steps",
    "max_steps": "epochs",
    "warmup_steps": "warmup_ratio",
    "warmup_ratio": "warmup_steps",
}


def _number(value: Any) -> Any:
    """A float where YAML 1.1 reads a text: it takes 2e-4, without a point, for a string."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _text(value: Any) -> Any:
    """Names as their option takes them: a list becomes one text with commas, and YAML's 3 is the text "3"."""
    if isinstance(value, list) and all(isinstance(item, str | int) for item in value):
        return ",".join(map(str, value))
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _parsed(path: pathlib.Path, source: str) -> dict[str, Any]:
    import yaml

    text = read_text(path, _MAX_BYTES)
    try:
        # A few aliases of aliases stand for gigabytes.
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text, yaml.SafeLoader)):
            raise UserError(f"{source}: expected YAML without aliases (*name); write the value again")
        root = yaml.compose(text, yaml.SafeLoader)
        keys = [key.value for key, _ in root.value] if isinstance(root, yaml.MappingNode) else []
        if twice := [key for i, key in enumerate(keys) if key in keys[:i]]:
            raise UserError(f"{source}: the option {excerpt(twice[0])} appears twice")
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{source}: not YAML or JSON: {first_line(error)}") from error
    if not isinstance(values, dict):
        raise UserError(f"{source}: expected options with their values, such as `rank: 8`, got {excerpt(values)}")
    return values


def read_config(name: str, typed: dict[str, Any]) -> dict[str, Any]:
    """The options in the file ``name`` that were not ``typed``, and ``output`` and ``sweep`` if it has them.

    A value that is the default is left out, because an option may change the default of another.

    Raises:
        FileError: the file cannot be read, or a value has a wrong type.
        UserError: it is not YAML or JSON, or has an unknown option.
    """
    path = path_named(name, "--config")
    source = f"--config {printable(path)}"
    fields = {field.name: field for field in dataclasses.fields(Settings)}
    options: dict[str, Any] = {}
    for key, value in _parsed(path, source).items():
        option = str(key).replace("-", "_")
        if option == "former_steps":
            continue  # how a run came to its length, which a new run has from the start
        if option not in fields and option not in _MORE:
            meant = did_you_mean(option, (*fields, *_MORE))
            raise UserError(f"{source}: unknown option {excerpt(str(key))}{meant}")
        if option in options:
            raise UserError(f"{source}: the option {option} appears twice")
        kind = "str" if option in _MORE else fields[option].type
        options[option] = {"float": _number, "str": _text}.get(str(kind), lambda same: same)(value)
    check(options, {**schema(Settings), **{f"{name}?": str for name in _MORE}}, source)
    given = {}
    for option, value in options.items():
        replaced = option in typed or _EXCLUDES.get(option) in typed
        if value is not None and not replaced and (option in _MORE or value != fields[option].default):
            given[option] = value
    return given
