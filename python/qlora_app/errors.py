"""Errors that the user can fix, each reported in one sentence."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import re
import shutil
import sys
from collections.abc import Iterator

from qlora_ext.untrusted import UserError as UserError
from qlora_ext.untrusted import excerpt
from qlora_ext.untrusted import first_line as first_line

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # at the end of messages of Rust libraries
_OPTION = re.compile(r"(?<![\w/.-])--([a-z][a-z0-9-]*)")


def as_arguments(text: str) -> str:
    """A message of the command, with options replaced by argument names: ``--max-steps`` by ``max_steps``."""
    return _OPTION.sub(lambda option: option[1].replace("-", "_"), text)


def is_panic(error: BaseException) -> bool:
    """Whether an exception is a panic of a Rust library, which is not an ``Exception``."""
    return type(error).__name__ == "PanicException"


@contextlib.contextmanager
def reading(what: str, name: str, on_hub: bool = False) -> Iterator[None]:
    """Turns any error of a library that reads the files of a model into a ``UserError``.

    Args:
        what: the thing that is read, for the message.
        name: of the model.
        on_hub: whether nothing on this machine has that name, so that the model can only be on the hub.
    """
    try:
        yield
    except UserError:
        raise
    except MemoryError as error:
        raise UserError(f"not enough memory to load {name}") from error
    except BaseException as error:
        # Parsers raise arbitrary exceptions for damaged files, and none for intact ones.
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{name} needs Python code that comes with it, which does not run by default; "
                "read it, and add --trust-remote-code if you trust it"
            ) from error
        if type(error).__name__ == "SafetensorError":  # not imported for its name alone
            raise UserError(f"the weights of {name} are truncated or damaged: {first_line(error)}") from error
        if on_hub and isinstance(error, OSError):
            raise UserError(
                f"there is no directory {excerpt(name)}, and the model cannot be loaded from the Hugging Face "
                f"hub ({first_line(error)})"
            ) from error
        raise UserError(f"cannot load the {what} of {name}: {first_line(error)}") from error


def path_named(name: str, option: str) -> pathlib.Path:
    """The path that ``option`` names. It need not exist.

    Raises:
        UserError: the name is empty, too long or contains NUL, or the directory cannot be read.
    """
    if not name:
        raise UserError(f"{option}: the name is empty")
    try:
        path = pathlib.Path(name).expanduser()
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else first_line(error)
        raise UserError(f"{option} {excerpt(name)}: {reason}") from error
    check_text(path, option)
    return path


def check_text(path: pathlib.Path, option: str) -> None:
    """Rejects a path that is not valid text, because the libraries that write models need Unicode names.

    Raises:
        UserError: the path has bytes that are invalid in the locale's encoding.
    """
    _check_unicode(str(path.absolute()), f"{option} {excerpt(str(path))}: the name", "rename it")


def check_prompt(text: str, source: str) -> None:
    """Rejects invalid text from ``source``, because tokenizers need Unicode.

    Raises:
        UserError: the text has bytes that are invalid in the locale's encoding.
    """
    _check_unicode(text, f"{source}: the text", "write it in that encoding")


def _check_unicode(text: str, what: str, advice: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        encoding = sys.getfilesystemencoding()
        if encoding != "utf-8":
            advice = "set PYTHONUTF8=1, or a locale such as LC_ALL=C.UTF-8"
        raise UserError(f"{what} is not {encoding} text; {advice}") from error


def full(path: str | os.PathLike[str]) -> str:
    """The message for a full disk that contains ``path``."""
    return f"the disk that holds {path} is full; no incomplete file was left there"


def _is_full(directory: pathlib.Path) -> bool:
    while not directory.exists():
        directory = directory.parent
    return shutil.disk_usage(directory).free < 1 << 20


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns an error of any library while writing below ``path`` into a ``UserError``.

    For a full disk, torch raises a RuntimeError, safetensors its own error class, tokenizers an Exception and numpy an
    OSError, all without an errno.
    """
    path = pathlib.Path(path)
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        if error.errno in NO_SPACE or (error.errno is None and _is_full(path)):
            raise UserError(full(path)) from error
        reason = error.strerror or first_line(error)
        raise UserError(f"cannot write {path}: {reason}") from error
    except Exception as error:
        # Recognized by name and text, because catching the type would require importing the libraries.
        number = _OS_ERROR.search(str(error))
        known = "PytorchStreamWriter" in str(error) or type(error).__name__ == "SafetensorError"
        if not known and number is None:
            raise
        if _is_full(path) or (number is not None and int(number[1]) in NO_SPACE):
            raise UserError(full(path)) from error
        raise UserError(f"cannot write {path}: {first_line(error)}") from error
