"""Runs a program that a model wrote in a process of its own, with limits."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import pathlib
import secrets
import signal
import subprocess
import sys
import tempfile

from ..errors import UserError

_PROCESS = pathlib.Path(__file__).with_name("sandboxed.py")
_MEMORY, _DISK = 1 << 30, 16 << 20


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
        passed: whether it ran to its end, without an exception and without ending its process.
        reason: "passed", "failed" or "timed out".
        isolated: whether it had no network and could not write outside of its directory.
    """

    passed: bool
    reason: str
    isolated: bool


def check_system() -> None:
    """Rejects systems whose processes cannot be limited.

    Raises:
        UserError: this is one.
    """
    if importlib.util.find_spec("resource") is None:
        raise UserError("humaneval: needs Linux or macOS, whose processes can be limited")


def run(program: str, seconds: float = 10.0, memory: int = _MEMORY, disk: int = _DISK) -> Outcome:
    """Runs a Python program.

    It gets an empty temporary directory, no input, no environment, no further processes, and a limited time and memory.
    On Linux, where unprivileged user namespaces are allowed, it also has no network and sees the file system write
    protected. It may read what this user may read.

    Args:
        seconds: of wall-clock time.
        memory: bytes of its address space.
        disk: the most bytes that it may write.
    """
    token = secrets.token_hex(16)
    order = {"program": program, "token": token, "seconds": int(seconds) + 1, "memory": memory, "disk": disk}
    with tempfile.TemporaryDirectory(prefix="qlora-ext-") as directory:
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", str(_PROCESS)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            cwd=directory, env={"TMPDIR": directory, "HOME": directory}, start_new_session=True,
        )  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(order).encode())
            process.stdin.close()
            status = process.wait(seconds)
        except BrokenPipeError:  # it ended before it read the program
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _end(process)
        os.set_blocking(process.stdout.fileno(), False)
        written = os.read(process.stdout.fileno(), 256)
        process.stdout.close()
    kind, _, rest = written.decode(errors="replace").partition("\n")
    passed = status == 0 and rest == token
    reason = "timed out" if status is None else "passed" if passed else "failed"
    return Outcome(passed, reason, kind == "isolated")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the process and those that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
