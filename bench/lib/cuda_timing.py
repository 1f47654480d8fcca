"""What benches on CUDA share: the card's name, capture into graphs, and what they report under the kernel simulator."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator

import torch

import qlora_ext

SIMULATED = "CUDASIM_TORCH_LIBRARY" in os.environ  # the simulator has no time: nothing is timed or written
NOT_MEASURED = "not measured"
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192), (28672, 8192))  # Llama 3 8B and 70B
TINY = ((256, 512), (96, 192))


def card_name() -> str:
    return "no card, kernel simulator" if SIMULATED else torch.cuda.get_device_name()


def require_cuda() -> None:
    """Ends the program where our CUDA kernels cannot run."""
    info = qlora_ext.build_info()
    if not info["cuda_available"]:
        sys.exit(f"no CUDA kernels here: {info['cuda_error'] or 'torch finds no device'}")


class Failures(list[str]):
    """Errors that a bench collects, so that one does not hide what comes after it."""

    @contextlib.contextmanager
    def caught(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.append(f"{what}: {type(error).__name__}: {str(error).partition(chr(10))[0]}")

    def exit(self) -> None:
        """Ends the program with all of them, if there are any."""
        if self:
            sys.exit("\n".join([f"{len(self)} failed:", *self]))


def captured(call: Callable[[int], object], turns: int) -> Callable[[int], object]:
    """One replay of a CUDA graph of calls 0 .. turns - 1."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # library handles and workspaces come into being outside of the capture
        call(0)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(turns):
            call(i)

    def replay(_: int) -> object:
        return graph.replay()

    return replay
