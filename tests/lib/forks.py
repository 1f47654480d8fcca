"""Processes forked from a server that has imported what is slow to import, and started no thread."""

from __future__ import annotations

import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "torch.distributed.fsdp",
        "torch.distributed.checkpoint.state_dict",
        "transformers.models.llama",
        "transformers.trainer",
        "peft",
        "qlora_ext.cli",
    ]
)


def _run(arguments: list[str], told: list[str], before: Callable[[], object] | None) -> None:
    for number, path in enumerate(told, start=1):
        file = os.open(path, os.O_WRONLY)
        os.dup2(file, number)
        os.close(file)
    import torch

    from qlora_ext.cli import main

    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell takes from what it puts in the background
    torch.set_num_threads(1)  # a step of a tiny model is too short to share, least of all on a busy machine
    if before is not None:
        before()
    sys.exit(main(arguments))


class Command:
    """The console command with these arguments, as ``subprocess.Popen`` would be; ``before`` runs in it first."""

    def __init__(self, *arguments: object, before: Callable[[], object] | None = None) -> None:
        self._directory = tempfile.TemporaryDirectory()
        self._told = [pathlib.Path(self._directory.name, name) for name in ("stdout", "stderr")]
        for path in self._told:
            path.touch()
        self._arguments = [str(argument) for argument in arguments]
        self._process = CONTEXT.Process(target=_run, args=(self._arguments, [str(path) for path in self._told], before))
        self._process.start()

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
        told = [path.read_text() for path in self._told]
        self._directory.cleanup()
        return subprocess.CompletedProcess(self._arguments, self._process.exitcode, *told)

    def kill(self) -> None:
        self._process.kill()
        self.wait()
