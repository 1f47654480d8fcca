"""What goes wrong on a user's side, as one sentence each."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import re
import shutil
import sys
from collections.abc import Iterator

from .._internal.untrusted import UserError as UserError
from .._internal.untrusted import excerpt
from .._internal.untrusted import first_line as first_line

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # at the end of what libraries in Rust report


def is_panic(error: BaseException) -> bool:
    """Whether an exception stands for a failed assertion of a library in Rust, which is no ``Exception``."""
    return type(error).__name__ == "PanicException"


@contextlib.contextmanager
def reading(what: str, name: str, on_hub: bool = False) -> Iterator[None]:
    """Turns whatever a library does over the files of a model into a ``UserError``: they are damaged, or unknown to it.

    Args:
        what: is read. name: of the model. on_hub: it can only be there; nothing on this machine has that name.
    """
    try:
        yield
    except UserError:
        raise
    except MemoryError as error:
        raise UserError(f"not enough memory to load {name}") from error
    except BaseException as error:
        # A damaged model file makes the parsers below fail in any way whatever; a healthy one in none.
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
    """The path that ``option`` names, whether or not there is anything.

    Raises:
        UserError: no file can have that name: it is empty, too long or holds a NUL; or nobody may look there.
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
    """Rejects a path that is not valid text: the libraries that write models need Unicode names.

    Raises:
        UserError: some bytes of it are invalid in the encoding of this locale.
    """
    _check_unicode(str(path.absolute()), f"{option} {excerpt(str(path))}: the name", "rename it")


def check_prompt(text: str, source: str) -> None:
    """Rejects a text from ``source`` that is not valid: tokenizers need Unicode.

    Raises:
        UserError: some bytes of it are invalid in the encoding of this locale.
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
    """The sentence for a disk that is full, by a path on it."""
    return f"the disk that holds {path} is full; nothing incomplete was left there"


def _is_full(directory: pathlib.Path) -> bool:
    while not directory.exists():
        directory = directory.parent
    return shutil.disk_usage(directory).free < 1 << 20


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns a failure to write below ``path`` into a ``UserError``, whatever library met it.

    torch reports a full disk as a RuntimeError, safetensors as an error class of its own, and tokenizers as an
    Exception, all without an errno.
    """
    path = pathlib.Path(path)
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        if error.errno in NO_SPACE:
            raise UserError(full(path)) from error
        reason = error.strerror or first_line(error)
        raise UserError(f"cannot write {path}: {reason}") from error
    except Exception as error:
        # These errors carry no type to catch without importing the libraries; others are not ours to explain.
        number = _OS_ERROR.search(str(error))
        known = "PytorchStreamWriter" in str(error) or type(error).__name__ == "SafetensorError"
        if not known and number is None:
            raise
        if _is_full(path) or (number is not None and int(number[1]) in NO_SPACE):
            raise UserError(full(path)) from error
        raise UserError(f"cannot write {path}: {first_line(error)}") from error
