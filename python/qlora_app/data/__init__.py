"""Training data: files, directories, datasets of the hub, and packages with openly licensed text.

``files``, ``directory``, ``hub`` and ``packages`` yield rows, each with its place; ``examples`` defines what a row may
be, ``prompts`` what a prompt for GRPO is; ``encoding`` tokenizes examples; ``store`` holds large sequences;
``held_out`` is the text for comparing models.
"""

from __future__ import annotations

from collections.abc import Sequence

from qlora_ext.untrusted import FileError

from ..errors import UserError, path_named
from ..models.sources import PACKAGE
from . import directory, hub, packages
from .encoding import Parts as Parts
from .encoding import Row as Row
from .encoding import answers_of as answers_of
from .encoding import as_prompt as as_prompt
from .encoding import as_question as as_question
from .encoding import check_template as check_template
from .encoding import encode as encode
from .encoding import formatted_tokens as formatted_tokens
from .encoding import in_order as in_order
from .encoding import pack as pack
from .encoding import split as split
from .encoding import summary as summary
from .encoding import tokenizing as tokenizing
from .encoding import unsupported_part as unsupported_part
from .examples import Example as Example
from .examples import Message as Message
from .examples import example_of, kind_of
from .examples import is_labelled as is_labelled
from .examples import is_preference as is_preference
from .examples import is_prompt as is_prompt
from .examples import tool_call as tool_call
from .files import READERS, Rows, reader_of
from .packages import DEFAULT_DATA as DEFAULT_DATA
from .prompts import prompt_of
from .prompts import split_prompts as split_prompts
from .store import Stored


def _rows(name: str, split: str, prompts: bool) -> Rows:
    if name.startswith(PACKAGE):
        return packages.rows(name)
    path = path_named(name, "--data")
    if path.is_dir() and hub.is_saved(path):
        return hub.saved_rows(path, split)
    if path.is_dir():
        return directory.rows(path, split, prompts)
    if path.is_file():
        reader = reader_of(path)
        if reader is None:
            raise UserError(
                f"--data {name}: expected a file name that ends in {', '.join(READERS)} (text also with .gz)"
            )
        return reader(path, split, prompts)
    if reader_of(path) is None and hub.is_name(name):
        return hub.rows(name, split)
    raise UserError(f"--data {name}: no such file or directory")


def read_examples(name: str, split: str = "train", prompts: bool = False) -> Sequence[Example]:
    """All examples of ``--data name``; see docs/data.md.

    Args:
        split: the split to read, if the data have several.
        prompts: whether the rows are prompts for GRPO, with further columns for the reward function.

    Raises:
        UserError: the data do not exist or are empty, or a row is not an example; the message gives its place.
    """
    examples: Stored[Example] = Stored()
    first: str | None = None
    try:
        for place, record in _rows(name, split, prompts):
            example = prompt_of(record, place) if prompts else example_of(record, place)
            first = first or kind_of(example)
            if kind_of(example) != first:
                raise UserError(f"{place}: expected {first}, like the rows before it, got {kind_of(example)}")
            examples.append(example)
    except FileError as error:
        raise UserError(str(error) if "--data" in str(error) else f"--data {error}") from error
    if not examples:
        raise UserError(f"--data {name}: the dataset is empty")
    return examples
