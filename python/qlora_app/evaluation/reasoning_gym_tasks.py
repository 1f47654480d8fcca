"""The tasks of reasoning-gym, which makes any number of questions from a seed (Stojanovski et al., 2025)."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import json
import pathlib
import re
import sys
from collections.abc import Iterator
from typing import Any

from qlora_ext.untrusted import excerpt

from ..data.examples import question as message
from ..errors import UserError, did_you_mean, first_line
from .tasks import Question, Task, final_answer

PREFIX = "gym:"
_PACKAGE = "reasoning_gym"
_USUAL = 100  # questions
_INSTALL = "pip install reasoning-gym"


def find(name: str, limit: int | None, seed: int) -> Task:
    """The task ``gym:NAME`` or ``gym:NAME:KEY=VALUE,...``.

    Raises:
        UserError: the package, or a library that the task needs, is not installed; or the task does not exist, or does
            not take these values.
    """
    dataset_name, _, changes = name.removeprefix(PREFIX).partition(":")
    fields = _fields(name, changes)
    with _only_needed() as root:
        modules = _modules(root)
        if dataset_name not in modules:
            raise UserError(
                f"--task {excerpt(name)}: reasoning-gym has no task {excerpt(dataset_name)}"
                f"{did_you_mean(dataset_name, modules)}"
            )
        try:
            importlib.import_module(modules[dataset_name])
            create = importlib.import_module(f"{_PACKAGE}.factory").create_dataset
            dataset = create(dataset_name, seed=seed, size=limit or _USUAL, **fields)
            entries = [dataset[i] for i in range(len(dataset))]
        except ImportError as error:
            missing = f"{name} needs {error.name.partition('.')[0]}" if error.name else first_line(error)
            raise UserError(f"--task {missing}, not installed here; install with: {_INSTALL}") from error
        except (TypeError, ValueError, AssertionError) as error:  # of its configuration
            raise UserError(f"--task {excerpt(name)}: {first_line(error)}") from error
    questions = [
        Question([message(entry["question"])], entry["answer"], functools.partial(_grade, dataset, entry))
        for entry in entries
    ]
    return Task(name, questions)


def _grade(dataset: Any, entry: dict[str, Any], text: str) -> float:
    try:
        return float(dataset.score_answer(final_answer(text), entry))
    except Exception:  # tasks parse answers, and some raise for those that they cannot parse
        return 0.0


def _fields(name: str, changes: str) -> dict[str, Any]:
    """The values of ``KEY=VALUE,...``: JSON, or else text."""
    found: dict[str, Any] = {}
    for change in filter(None, changes.split(",")):
        key, equals, value = change.partition("=")
        if not equals or not key.isidentifier() or key in ("seed", "size"):
            raise UserError(
                f"--task {excerpt(name)}: expected {PREFIX}NAME:KEY=VALUE,..., got {excerpt(change)} (--seed and "
                "--limit choose the questions)"
            )
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return found


@contextlib.contextmanager
def _only_needed() -> Iterator[pathlib.Path]:
    """Makes the modules of reasoning-gym importable one by one. Yields its directory.

    Its packages import all of their modules, and these import libraries that most tasks do not need. Here, its packages
    are empty. They are forgotten at the end.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise UserError(f"--task {PREFIX}...: reasoning-gym is not installed here; install with: {_INSTALL}")
    root = pathlib.Path(spec.origin).parent
    former = {name: sys.modules.pop(name) for name in _imported()}
    for path in (root, *(path for path in root.iterdir() if (path / "__init__.py").is_file())):
        if path.name not in ("coaching", "data"):  # which import nothing else
            name = ".".join((_PACKAGE, *path.relative_to(root).parts))
            package = importlib.util.spec_from_loader(name, None, is_package=True)
            assert package is not None
            package.submodule_search_locations = [str(path)]
            sys.modules[name] = importlib.util.module_from_spec(package)
    try:
        yield root
    finally:
        for name in _imported():
            del sys.modules[name]
        sys.modules.update(former)


def _imported() -> list[str]:
    return [name for name in sys.modules if name.partition(".")[0] == _PACKAGE]


def _modules(root: pathlib.Path) -> dict[str, str]:
    """The module of each task, by the task's name."""
    found = {}
    for path in sorted(root.glob("*/**/*.py")):
        match = re.search(r'^DATASET_NAME = "(\w+)"', path.read_text(encoding="utf-8"), re.MULTILINE)
        if match:
            found[match[1]] = ".".join((_PACKAGE, *path.relative_to(root).with_suffix("").parts))
    return found
