"""Datasets of the library ``datasets``: of the Hugging Face hub, streamed without running their code, or saved."""

from __future__ import annotations

import pathlib
import re
from typing import Any

from qlora_ext.untrusted import excerpt, printable

from ..errors import UserError, first_line
from .files import Rows

_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+)?")
_FIRST_VERSION = 4  # of the library: earlier versions run Python code of a dataset
_KINDS = ("arrow", "csv", "json", "parquet", "text")  # tables; other kinds are images, archives and the like


def is_name(name: str) -> bool:
    """Whether ``name`` has the form of a hub dataset: OWNER/NAME, or OWNER/NAME:SUBSET."""
    return _NAME.fullmatch(name) is not None


def _builder_kind(builder: Any) -> str:
    modules = [cls.__module__ for cls in type(builder).__mro__ if ".packaged_modules." in cls.__module__]
    return modules[0].split(".packaged_modules.")[1].partition(".")[0] if modules else type(builder).__name__


def _library(problem: str) -> Any:
    """The library ``datasets``.

    Args:
        problem: the beginning of the error message.

    Raises:
        UserError: it is missing, or too old.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"{problem} the package datasets; install it with: pip install 'datasets>={_FIRST_VERSION}'"
        ) from error
    if int(datasets.__version__.partition(".")[0]) < _FIRST_VERSION:
        raise UserError(f"{problem} datasets >= {_FIRST_VERSION}, got {datasets.__version__}")
    datasets.disable_progress_bars()
    return datasets


def is_saved(directory: pathlib.Path) -> bool:
    """Whether ``directory`` is a dataset, or one per split, that ``save_to_disk`` wrote."""
    one, several = ("state.json", "dataset_info.json"), ("dataset_dict.json",)
    return any(all((directory / name).is_file() for name in names) for names in (one, several))


def saved_rows(directory: pathlib.Path, split: str) -> Rows:
    """The rows of a dataset that ``save_to_disk`` wrote, one at a time.

    Raises:
        UserError: it is damaged, has no such split, or the library does not exist.
    """
    shown = f"--data {printable(directory)}"
    datasets = _library(f"{shown}: written by save_to_disk, which needs")
    try:
        found = datasets.load_from_disk(str(directory))
        if isinstance(found, datasets.DatasetDict):
            if split not in found:
                known = ", ".join(map(excerpt, found))
                raise UserError(f"{shown}: no split {excerpt(split)}; --split takes one of {known}")
            found = found[split]
        for number, record in enumerate(found, 1):
            yield f"{shown}, row {number}", record
    except UserError:
        raise
    except Exception as error:  # from the library, which does not check its files
        raise UserError(f"{shown}: damaged, or not written by save_to_disk ({first_line(error)})") from error


def rows(name: str, split: str) -> Rows:
    """The rows of a split of the dataset ``name``, one at a time.

    Raises:
        UserError: the dataset, the split or the library does not exist, or the hub cannot be reached.
    """
    datasets = _library(f"--data {name}: no such file or directory, and hub datasets need")
    repository, _, subset = name.partition(":")
    try:
        kind = _builder_kind(datasets.load_dataset_builder(repository, subset or None))
        if kind not in _KINDS:
            raise UserError(f"--data {name}: expected a dataset of {', '.join(_KINDS)} files on the hub, got {kind}")
        stream = datasets.load_dataset(repository, subset or None, split=split, streaming=True)
        for number, record in enumerate(stream, 1):
            yield f"--data {name}, {split} row {number}", record
    except UserError:
        raise
    except Exception as error:  # from the library, the hub's client or the network
        raise UserError(
            f"--data {name}: no such file or directory, and cannot read it from the hub ({first_line(error)})"
        ) from error
