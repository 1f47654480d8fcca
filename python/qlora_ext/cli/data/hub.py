"""Datasets of the Hugging Face hub, streamed by the library ``datasets``, without running their code."""

from __future__ import annotations

import re
from typing import Any

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


def rows(name: str, split: str) -> Rows:
    """The rows of a split of the dataset ``name``, one at a time.

    Raises:
        UserError: the dataset, the split or the library does not exist, or the hub cannot be reached.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"--data {name}: no such file or directory, and hub datasets need the package datasets; "
            f"install it with: pip install 'datasets>={_FIRST_VERSION}'"
        ) from error
    if int(datasets.__version__.partition(".")[0]) < _FIRST_VERSION:
        raise UserError(f"--data {name}: expected datasets >= {_FIRST_VERSION}, got {datasets.__version__}")
    datasets.disable_progress_bars()
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
