"""The memory that loading and saving a model take, measured in a separate process."""

from __future__ import annotations

import pathlib
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from forks import CONTEXT, start


def peak_of_loading(path: pathlib.Path, first: pathlib.Path) -> tuple[int, int]:
    """The bytes by which a process grows at most while it loads ``path`` in 4 bits, and those of the model.

    Args:
        path: a model directory, or a GGUF file.
        first: another one, which is loaded first, so that imports and allocations that happen once are not counted.
    """
    peak, footprint = _run(path, first)
    return peak, footprint


def peaks_of_loading_and_saving(path: pathlib.Path, first: pathlib.Path, saved: pathlib.Path) -> tuple[int, int, int]:
    """``peak_of_loading``, and the bytes by which the process then grows at most while it saves the model."""
    peak, footprint, saving = _run(path, first, saved)
    return peak, footprint, saving


def _run(*paths: pathlib.Path) -> list[int]:
    receiver, sender = CONTEXT.Pipe(duplex=False)
    process = start(_measure, sender, *paths)
    sender.close()
    found = receiver.recv()
    process.join()
    assert isinstance(found, list), found
    return found


def _status(field: str) -> int:
    """A number of bytes in the status of this process."""
    status = pathlib.Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(field))


def _load(path: pathlib.Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    import qlora_ext

    options = {"quantization_config": qlora_ext.QLoRAConfig(), "dtype": torch.bfloat16}
    if path.suffix != ".gguf":
        return AutoModelForCausalLM.from_pretrained(path, **options)
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, **options)


def _peak_of(function: Callable[[], Any]) -> tuple[int, Any]:
    """The bytes by which the process grows at most during a call, and its result."""
    before = _status("VmRSS")
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # VmHWM, the peak, begins anew
    result = function()
    return _status("VmHWM") - before, result


def _measure(pipe: Connection, *paths: pathlib.Path) -> None:
    """Sends the numbers, or the traceback of an exception."""
    try:
        pipe.send(_numbers(*paths))
    except Exception:
        pipe.send(traceback.format_exc())


def _numbers(path: pathlib.Path, first: pathlib.Path, saved: pathlib.Path | None = None) -> list[int]:
    small = _load(first)
    if saved is not None:
        small.save_pretrained(saved)
    peak, model = _peak_of(lambda: _load(path))
    numbers = [peak, model.get_memory_footprint()]
    if saved is not None:
        numbers.append(_peak_of(lambda: model.save_pretrained(saved))[0])
    return numbers
