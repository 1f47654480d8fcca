"""Asks llama.cpp in another process, whose interpreter may be another one: ``LLAMA_CPP_PYTHON`` names it."""

from __future__ import annotations

import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np
import pytest
import torch

_PROGRAM = pathlib.Path(__file__).with_name("llama_cpp_answers.py")
_PYTHON = os.environ.get("LLAMA_CPP_PYTHON", sys.executable)


def _run(request: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [_PYTHON, str(_PROGRAM)], input=request, capture_output=True, text=True, timeout=300, env=environment
    )


@functools.cache
def why_missing() -> str:
    """Why llama.cpp cannot be asked; empty if it can."""
    done = _run("")
    return "" if done.returncode == 0 else f"llama-cpp-python is not installed for {_PYTHON} (see LLAMA_CPP_PYTHON)"


def ask(model: pathlib.Path, **request: Any) -> dict[str, Any]:
    """The answers to a request, see ``llama_cpp_answers``. Skips the test if llama.cpp is missing."""
    if why_missing():
        pytest.skip(why_missing())
    done = _run(json.dumps({"model": str(model), **request}))
    assert done.returncode == 0, done.stderr[-2000:]
    answers: dict[str, Any] = json.loads(done.stdout)
    return answers


def logits(model: pathlib.Path, ids: torch.Tensor, **request: Any) -> torch.Tensor:
    """The logits of llama.cpp for one sequence of tokens."""
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "logits.npy"
        ask(model, ids=ids.tolist(), logits=str(file), **request)
        return torch.from_numpy(np.load(file)).clone()
