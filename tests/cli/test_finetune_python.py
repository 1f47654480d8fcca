"""``qlora_app.finetune`` runs the command's fine-tuning from Python."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
from typing import Any

import pytest
import torch

pytest.importorskip("rich", reason="the command's libraries are not installed")

import qlora_app
from commands import Paths, adapter_bytes, environment, listing

# commands.RUN as keyword arguments.
RUN: dict[str, Any] = {
    "rank": 2, "seq_len": 48, "batch_size": 2, "lr": 0.003, "dropout": 0.1, "eval_size": 4, "max_steps": 11,
    "save_steps": 4,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def record_of(adapter: pathlib.Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((adapter / "qlora_run.json").read_text())
    return {key: value for key, value in record.items() if key != "date"}


def test_the_adapter_is_that_of_the_command(paths: Paths, finished_run: pathlib.Path, tmp_path: pathlib.Path) -> None:
    done = qlora_app.finetune(model=paths["model"], data=str(paths["data"]), output=tmp_path / "run", **RUN)
    assert (done.directory, done.adapter) == (tmp_path / "run", tmp_path / "run" / "adapter")
    assert adapter_bytes(done.directory) == adapter_bytes(finished_run)
    assert record_of(done.adapter) == record_of(finished_run / "adapter")
    assert done.metrics == record_of(done.adapter)["metrics"]
    assert done.metrics["steps"] == 11
    assert done.metrics["perplexity_after"] < done.metrics["perplexity_before"]
    assert listing(done.directory).keys() == listing(finished_run).keys() - {"stdout.txt"}


def test_a_run_is_resumed(paths: Paths, tmp_path: pathlib.Path) -> None:
    begun = {"model": paths["model"], "data": paths["data"], "output": tmp_path / "run", **RUN, "max_steps": 1}
    first = adapter_bytes(qlora_app.finetune(**begun).directory)
    done = qlora_app.finetune(output=tmp_path / "run", resume=True, max_steps=2)
    assert done.metrics["steps"] == 2
    with pytest.raises(ValueError, match=r"^output .* already has a run; add resume to continue it, or overwrite"):
        qlora_app.finetune(**begun)
    assert adapter_bytes(qlora_app.finetune(**begun, overwrite=True).directory) == first


def test_none_means_the_default(paths: Paths, tmp_path: pathlib.Path) -> None:
    run = {"model": paths["model"], "data": paths["data"], "output": tmp_path / "run", **RUN}
    done = qlora_app.finetune(**run | {"max_steps": 1, "alpha": None, "layers": None})
    assert record_of(done.adapter)["settings"]["alpha"] == 32.0


def test_the_plain_import_stays_light() -> None:
    program = (
        "import sys, qlora_app\n"
        "libraries = {'torch', 'numpy', 'transformers', 'peft', 'qlora_ext'}\n"
        "assert not libraries & set(sys.modules)\n"
        "import qlora_ext\n"
        "names = {'transformers', 'peft', 'gguf', 'qlora_app.main', 'qlora_app.decoding', 'qlora_app.planning'}\n"
        "assert not names & set(sys.modules)\n"
        "assert callable(qlora_app.finetune) and callable(qlora_app.export) and callable(qlora_app.plan)\n"
        "assert qlora_app.planning.families.known('llama-7b')\n"
        "from qlora_ext import gguf\n"
        "assert gguf is qlora_ext.gguf and callable(gguf.read_header)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env=environment(), timeout=120)
