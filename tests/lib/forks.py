"""Processes forked from a server that has imported the slow modules and has not started threads."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.forkserver
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "torch.distributed.fsdp",
        "torch.distributed.checkpoint.state_dict",
        "transformers.models.llama",
        "transformers.trainer",
        "peft",
        "qlora_app.main",
    ]
)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Discards the standard output and error of this process."""
    with contextlib.ExitStack() as stack:
        nothing = os.open(os.devnull, os.O_WRONLY)
        stack.callback(os.close, nothing)
        for number in (1, 2):
            saved = os.dup(number)
            stack.callback(os.close, saved)
            stack.callback(os.dup2, saved, number)
            os.dup2(nothing, number)
        yield


def ensure_running() -> None:
    """Starts the server, unless it runs.

    It keeps the standard output and error with which it is started. With those of a test, the test would receive what
    libraries print when the server imports them.
    """
    with _silent():
        multiprocessing.forkserver.ensure_running()


def start(target: Callable[..., None], *args: Any, daemon: bool = False) -> Any:
    """Starts ``target(*args)`` in a fork of the server."""
    ensure_running()
    process = CONTEXT.Process(target=target, args=args, daemon=daemon)
    process.start()
    return process


def _run(arguments: list[str], message: list[str], before: Callable[[], object] | None) -> None:
    for number, path in enumerate(message, start=1):
        file = os.open(path, os.O_WRONLY)
        os.dup2(file, number)
        os.close(file)
    import torch

    from qlora_app.main import main

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores this signal in background jobs
    torch.set_num_threads(1)  # a step of a tiny model is too short for several threads, especially on a busy machine
    if before is not None:
        before()
    sys.exit(main(arguments))


class Command:
    """The console command with these arguments, as ``subprocess.Popen`` starts one; it calls ``before`` first."""

    def __init__(self, *arguments: object, before: Callable[[], object] | None = None) -> None:
        self._directory = tempfile.TemporaryDirectory()
        self._output = [pathlib.Path(self._directory.name, name) for name in ("stdout", "stderr")]
        for path in self._output:
            path.touch()
        self._arguments = [str(argument) for argument in arguments]
        self._process = start(_run, self._arguments, [str(path) for path in self._output], before)

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def send(self, number: signal.Signals) -> None:
        assert self.pid is not None
        os.kill(self.pid, number)

    def wait(self, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        self._process.join(timeout)
        if self._process.exitcode is None:
            self._process.kill()
            raise subprocess.TimeoutExpired(self._arguments, timeout)
        printed = [path.read_text() for path in self._output]
        self._directory.cleanup()
        return subprocess.CompletedProcess(self._arguments, self._process.exitcode, *printed)

    def kill(self) -> None:
        self._process.kill()
        self.wait()
