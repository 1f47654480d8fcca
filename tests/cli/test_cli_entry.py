"""The console command imports only the modules of the given command; --help and usage errors import no library."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest

from commands import environment

SLOW = ("torch", "numpy", "transformers", "peft", "rich", "matplotlib", "gguf", "datasets", "trl", "pyarrow")
# Runs the command, then prints the imported modules as JSON on the last line of stderr.
SCRIPT = """
import json, sys
from qlora_app.__main__ import main
status = None
try:
    status = main()
except SystemExit as stop:
    status = stop.code
finally:
    print(json.dumps([status, sorted(sys.modules)]), file=sys.stderr)
"""


def answer(*arguments: object, **more: Any) -> tuple[int, set[str], str, str]:
    """The exit code, the imported modules, stdout and stderr."""
    command = [sys.executable, "-c", SCRIPT, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment() | more, timeout=120, check=True)
    *errors, last = done.stderr.splitlines()
    status, modules = json.loads(last)
    return status or 0, set(modules), done.stdout, "\n".join(errors)


@pytest.mark.parametrize(
    ("typed", "status", "said"),
    [
        ("--version", 0, "qlora_ext "),
        ("version", 0, "qlora_ext "),
        ("--help", 0, "finetune"),
        ("help finetune", 0, "--max-memory"),
        ("finetune --help-all", 0, "--lr-schedule"),
        ("completion bash", 0, "_shtab_qlora_ext"),
        ("plan --help", 0, "--max-memory"),
        ("", 2, "expected a command"),
        ("fintune", 2, "did you mean finetune?"),
        ("finetune --rnak 1", 2, "did you mean --rank?"),
        ("check", 2, "--model"),
        ("run", 2, "expected a command after --"),
    ],
)
def test_nothing_slow_is_imported_for_an_answer(typed: str, status: int, said: str) -> None:
    code, modules, out, errors = answer(*typed.split())
    assert code == status
    assert said in out + errors
    assert modules & set(SLOW) == set()
    assert len(modules) < 280  # torch alone has over a thousand


def test_a_command_finds_the_package_imported(tmp_path: pathlib.Path) -> None:
    """The operators and the hooks for other libraries are registered."""
    code, modules, _, errors = answer("adapters", tmp_path)
    assert code == 2
    assert "there is no adapter in that directory" in errors
    assert {"torch", "qlora_ext.ops", "qlora_ext._internal.hooks", "qlora_ext.transforms"} <= modules


def test_the_package_is_as_if_it_had_been_imported(tmp_path: pathlib.Path) -> None:
    script = (
        "import sys; sys.argv = ['qlora-ext', 'adapters', sys.argv[1]]\n"
        "from qlora_app.__main__ import main; main()\n"
        "import qlora_ext, torch, transformers\n"
        "assert set(qlora_ext.__all__) <= set(dir(qlora_ext)) | {'QLoRAConfig', 'adopt'}\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING\n"
        "print(qlora_ext.__version__, qlora_ext.QLoRAConfig().block_size, 'qlora_ext' in AUTO_QUANTIZER_MAPPING)\n"
        "print(torch.ops.qlora.linear_nf4.default)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=120, check=True)
    assert done.stdout.split()[1:] == ["64", "True", "qlora.linear_nf4.default"]


def test_without_torch_the_error_names_what_is_missing(tmp_path: pathlib.Path) -> None:
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n")
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    code, _, _, errors = answer("info", PYTHONPATH=path)
    assert code == 2
    assert "No module named 'torch'; install what the command needs with: pip install" in errors
