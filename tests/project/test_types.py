"""Type checkers and notebooks find the public names."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest

import qlora_ext

ROOT = pathlib.Path(__file__).parents[2]
PROGRAM = """
from typing import Any
import torch
from torch import nn
import qlora_ext
from qlora_ext.nn import Embedding4bit, Linear4bit

class Mine(nn.Module):
    answer = 42

model = qlora_ext.quantize_model(Mine())
reveal_type(model)
reveal_type(qlora_ext.streaming.stream(model))
reveal_type(qlora_ext.streaming.chunk_mlp(model, 8))
reveal_type(Linear4bit(4, 4)(torch.ones(4)))
reveal_type(Embedding4bit(4, 4)(torch.arange(4)))
qlora_ext.QLoRAConfig(block_size=64, bnb_4bit_use_double_quant=True, load_in_4bit=True)
saved: dict[str, Any] = {"block_size": 64}
qlora_ext.QLoRAConfig(**saved)
qlora_ext.QLoRAConfig(blok_size=3)
qlora_ext.QLoRAConfig(load_in_4bit="yes")
"""


@pytest.mark.slow
def test_a_type_checker_knows_the_model_and_finds_a_wrong_argument(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("mypy", reason="mypy is not installed")
    (tmp_path / "program.py").write_text(PROGRAM)
    options = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(ROOT / ".mypy_cache")]
    command = [sys.executable, "-m", "mypy", *options, str(tmp_path / "program.py")]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600).stdout
    found = [line.partition(": ")[2] for line in out.splitlines() if "program.py" in line]
    revealed = [line.partition('"')[2].rstrip('"') for line in found if line.startswith("note: Revealed")]
    assert revealed == ["program.Mine"] * 3 + ["torch._tensor.Tensor"] * 2, out
    errors = [line for line in found if line.startswith("error")]
    assert len(errors) == 2, out
    assert 'Unexpected keyword argument "blok_size" for "QLoRAConfig"' in errors[0]
    assert 'Argument "load_in_4bit" to "QLoRAConfig" has incompatible type "str"' in errors[1]


def test_the_names_that_completion_offers_are_the_public_ones() -> None:
    import qlora_app
    import qlora_ext.integrations.bitsandbytes as bitsandbytes

    for module in (qlora_ext, qlora_app, bitsandbytes):
        assert [name for name in dir(module) if not name.startswith("__")] == sorted(module.__all__)
        assert {"__doc__", "__file__", "__name__"} <= set(dir(module))
        assert all(hasattr(module, name) for name in dir(module))
    assert {"QLoRAConfig", "adopt", "quantize_model"} <= set(dir(qlora_ext))
