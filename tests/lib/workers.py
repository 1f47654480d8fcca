"""Processes connected by gloo that run a task on every rank. A rank that hangs or dies fails only its own test."""

from __future__ import annotations

import datetime
import multiprocessing.connection
import os
import pathlib
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from forks import CONTEXT, start


def _work(rank: int, world: int, meeting: str, timeout: float, pipe: Connection) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    limit = datetime.timedelta(seconds=timeout)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world, timeout=limit)
    while (job := pipe.recv()) is not None:
        task, args = job
        try:
            pipe.send((True, task(*args)))
        except Exception:
            pipe.send((False, f"rank {rank} of {world}:\n{traceback.format_exc()}"))
    dist.destroy_process_group()


class Workers:
    """``world`` processes, started for the first task and restarted after a failed one."""

    def __init__(self, world: int, directory: pathlib.Path, timeout: float = 180.0) -> None:
        self.world, self.directory, self.timeout = world, directory, timeout
        self._starts = 0
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def _start(self) -> None:
        meeting = self.directory / f"world_{self.world}_{self._starts}"
        self._starts += 1
        for rank in range(self.world):
            ours, theirs = CONTEXT.Pipe()
            process = start(_work, rank, self.world, str(meeting), self.timeout, theirs, daemon=True)
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def run(self, task: Callable[..., Any], *args: Any) -> list[Any]:
        """The results of ``task(*args)`` by rank. The workers import the task by its name."""
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((task, args))
        deadline = time.monotonic() + self.timeout
        results: dict[int, Any] = {}
        try:
            while len(results) < self.world:
                waiting = [rank for rank in range(self.world) if rank not in results]
                ready = multiprocessing.connection.wait(
                    [self._pipes[rank] for rank in waiting], max(0.0, deadline - time.monotonic())
                )
                if not ready:
                    raise TimeoutError(f"{task.__name__}: ranks {waiting} did not answer within {self.timeout:.0f} s")
                for rank in waiting:
                    if self._pipes[rank] in ready:
                        done, value = self._pipes[rank].recv()
                        if not done:
                            raise AssertionError(value)
                        results[rank] = value
        except BaseException:
            self.kill()
            raise
        return [results[rank] for rank in range(self.world)]

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
        self._forget()

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        deadline = time.monotonic() + self.timeout
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
        self._forget()

    def _forget(self) -> None:
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []
