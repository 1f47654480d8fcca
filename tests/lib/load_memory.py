"""The memory that loading a model takes: run as a program, it loads one and prints its peak."""

from __future__ import annotations

import pathlib
import subprocess
import sys
import threading
from typing import Any


def peak_of_loading(path: pathlib.Path, first: pathlib.Path) -> tuple[int, int]:
    """The bytes by which a process grows at most while it loads ``path`` in 4 bits, and those of the model.

    Args:
        path: a model directory, or a GGUF file.
        first: another one, which is loaded first, so that imports and allocations that happen once are not counted.
    """
    command = [sys.executable, __file__, str(path), str(first)]
    peak, footprint = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return int(peak), int(footprint)


def _resident() -> int:
    status = pathlib.Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS"))


def _load(path: pathlib.Path) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    import qlora_ext

    options = {"quantization_config": qlora_ext.QLoRAConfig(), "dtype": torch.bfloat16}
    if path.suffix != ".gguf":
        return AutoModelForCausalLM.from_pretrained(path, **options)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path.parent, gguf_file=path.name))
    return qlora_ext.gguf.GGUFWeights(path, model).load(**options)


def _main(path: pathlib.Path, first: pathlib.Path) -> None:
    _load(first)
    before, peak, done = _resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, _resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = _load(path)
    done.set()
    watcher.join()
    print(max(peak, _resident()) - before, model.get_memory_footprint())


if __name__ == "__main__":
    _main(*map(pathlib.Path, sys.argv[1:]))
