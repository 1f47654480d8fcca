"""Tables of options: dataclasses from whose fields the command line and the Python functions are made."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import os
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from qlora_ext.dtype_names import AUTO
from qlora_ext.formats import EXACT, INT8
from qlora_ext.untrusted import FileError, check, excerpt

from .errors import UserError

# --activations
ACTIVATIONS = (EXACT, INT8, AUTO)
ACTIVATIONS_HELP = "int8: round inputs of 4-bit layers, which is faster on CPUs; auto: where it is"
# The default directory of a run: ``finetune`` writes it, other commands read the adapter from it.
DEFAULT_RUN = "qlora-run"
REQUIRED: Any = dataclasses.MISSING
_KINDS: dict[str, Any] = {"int": int, "float": float, "str": str, "bool": bool}
_KINDS |= {"tuple[int, ...]": [int], "tuple[str, ...]": [str]}
_Table = TypeVar("_Table", bound="Options")


def option(default: Any, text: str, minimum: float | None = None, below: float | None = None, **more: Any) -> Any:
    """A field with the metadata of its command-line option.

    Args:
        default: ``REQUIRED`` if the option must be given.
        text: its help.
        minimum, below: its limits, ``minimum <= value < below``.
        more: arguments of ``add_argument``, and

            - ``maximum``, the largest value, instead of ``below``;
            - ``flag``, if the option has another name than the field;
            - ``bare``, the value of an option without one;
            - ``schema``, of a recorded value, if it is not that of the field's type.
    """
    return dataclasses.field(default=default, metadata={"help": text, "minimum": minimum, "below": below, **more})


def like(table: type[Options], name: str, **changes: Any) -> Any:
    """A field that has the option ``name`` of another table, with some ``changes``."""
    field = table.__dataclass_fields__[name]
    default = changes.pop("default", field.default)
    return dataclasses.field(default=default, metadata={**field.metadata, **changes})


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The options of a command, whose values are among their choices and within their limits."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, limits = getattr(self, field.name), field.metadata
            minimum, below, maximum = (limits.get(name) for name in ("minimum", "below", "maximum"))
            given = f"{flag(field.name)} {excerpt(value)}: expected"
            choices = limits.get("choices")
            if choices and value not in (*choices, field.default):
                raise UserError(f"{given} one of {', '.join(map(str, choices))}")
            if value is None:
                continue
            if maximum is not None:
                valid, expected = minimum <= value <= maximum, f"{minimum} to {maximum}"
            elif below is not None:
                valid, expected = minimum <= value < below, f"a value of at least {minimum} and below {below}"
            else:
                valid, expected = minimum is None or value >= minimum, f"{minimum} or more"
            if not valid:
                raise UserError(f"{given} {expected}")


def fields_of(table: type[Options]) -> list[dataclasses.Field[Any]]:
    """The fields that are options: those of ``table`` itself, then those that it inherits."""
    fields = {field.name: field for field in dataclasses.fields(table)}
    names = dict.fromkeys(name for base in table.__mro__ for name in inspect.get_annotations(base))
    return [fields[name] for name in names if name in fields and fields[name].metadata]


def _kind(field: dataclasses.Field[Any]) -> Any:
    return _KINDS[str(field.type).removesuffix(" | None")]


def schema(table: type[Options]) -> dict[str, Any]:
    """The schema of recorded values. All fields are optional."""
    return {f"{field.name}?": field.metadata.get("schema", _kind(field)) for field in dataclasses.fields(table)}


def add_options(
    parser: argparse.ArgumentParser,
    table: type[Options],
    only: Collection[str] = (),
    titles: Mapping[str, str] | None = None,
    omit: bool = False,
) -> None:
    """Adds one option per field of ``table``.

    Args:
        only: the fields that get an option (default: all).
        titles: of groups of options in the help, by the first field of each.
        omit: leave options that are not given out of the namespace.
    """
    group: Any = parser
    for field in fields_of(table):
        if only and field.name not in only:
            continue
        if titles and field.name in titles:
            group = parser.add_argument_group(titles[field.name])
        default, kind, more, text = field.default, _kind(field), field.metadata, field.metadata["help"]
        keywords: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS if omit else default}
        if default is REQUIRED:
            keywords.update(required=True, default=None)
        if kind is bool:
            keywords["action"] = "store_true"
        elif isinstance(kind, list):  # repeated
            keywords.update(action="append", type=kind[0], metavar=more["metavar"], default=[])
        else:
            keywords.update(type=kind, metavar={int: "N", float: "X"}.get(kind, more.get("metavar")))
            keywords.update({key: more[key] for key in ("choices", "action") if key in more})
            if default not in (REQUIRED, None, "") and "(default" not in text:
                text += f" (default: {default})"
        if "bare" in more:
            keywords.update(nargs="?", const=more["bare"])
        name = more.get("flag", flag(field.name))
        group.add_argument(name, help=text, **keywords)


def options_in(table: type[_Table], values: Mapping[str, Any]) -> _Table:
    """The options of ``table`` among ``values``, which has all of them."""
    given = {field.name: values[field.name] for field in fields_of(table)}
    return table(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})


def keywords_of(function: str, table: type[Options], keywords: Mapping[str, Any]) -> dict[str, Any]:
    """The options that the Python function got, with paths as text. None stands for the default.

    Raises:
        TypeError: an option is unknown, or its value has a wrong type.
    """
    names = {field.name for field in fields_of(table)}
    for name in keywords:
        if name not in names:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
    given = {name: value for name, value in keywords.items() if value is not None}
    given = {name: os.fspath(value) if isinstance(value, os.PathLike) else value for name, value in given.items()}
    try:
        check(given, schema(table), function)
    except FileError as error:
        raise TypeError(str(error)) from None
    return given


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseOptions(Options):
    """The options of commands that put an adapter on its base."""

    adapter: str | None = option(
        None,
        f"the adapter, or the run that made it (default: ./{DEFAULT_RUN}, if it exists and --model is not given)",
        metavar="DIR",
    )
    model: str | None = option(None, "the base model (default: that of the adapter)")
    trust_remote_code: bool = option(False, "run Python code that comes with the --model")
    force: bool = option(False, "accept an adapter that has another 4-bit base")
    device: str = option(AUTO, "auto, cpu, cuda or cuda:N")
    dtype: str = option(
        AUTO,
        "dtype of the computation: bfloat16, float16, float32, or auto: bfloat16, except on a CPU that computes "
        "faster in float32 and on a GPU that lacks it, which takes float16",
    )

    activations: str | None = EXACT  # no option, except of commands that generate text


@dataclasses.dataclass(frozen=True, kw_only=True)
class SavedOptions(BaseOptions):
    """The options of commands that save what an adapter and its base make together."""

    adapter: str | None = option(None, "the adapter, or the run that made it", metavar="DIR")
    dtype: str = option("bfloat16", "dtype of the saved weights that are not 4-bit: bfloat16, float16 or float32")


# The values of --compile, and what ``BatchDecoder`` calls them.
COMPILED = {"auto": None, "always": True, "never": False}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingOptions(BaseOptions):
    """The options of commands that generate text."""

    max_new_tokens: int = option(80, "maximum length of an answer", 1, maximum=1_000_000)
    temperature: float = option(0.0, "sampling temperature; 0 always takes the most likely token")
    seed: int = option(0, "seed of sampling", 0, maximum=2**32 - 1)
    activations: str | None = option(None, f"{ACTIVATIONS_HELP} (default: as trained or saved)", choices=ACTIVATIONS)
    compile: str = option(
        "auto",
        "generate with compiled code, which takes about two minutes to compile and is cached for later runs; "
        "auto: if it is cached, or an answer may be long",
        choices=tuple(COMPILED),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature and not 1e-3 <= self.temperature <= 1e3:
            raise UserError(f"--temperature {self.temperature}: expected 0, or 0.001 to 1000")
