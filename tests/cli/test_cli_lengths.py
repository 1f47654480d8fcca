"""Prompts and examples of more tokens than the model has positions for."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
import torch

from commands import SMALL, Paths, here


@pytest.fixture
def positions(paths: Paths) -> int:
    return int(json.loads((paths["model"] / "config.json").read_text())["max_position_embeddings"])


def test_a_prompt_beyond_the_positions_is_rejected(refused: Any, paths: Paths, positions: int) -> None:
    sentence = refused("generate", "word " * positions * 2, "--raw", "--model", paths["model"])
    assert sentence.startswith("qlora-ext: --prompt: the prompt has ")
    assert f"the model reads at most {positions}, its answer included" in sentence


def test_an_answer_ends_with_the_positions(
    paths: Paths, positions: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from qlora_app.commands import generate

    lengths = []

    def recorded(model: Any, tokenizer: Any, prompt: list[int], new_tokens: int, temperature: float) -> str:
        ids = torch.tensor([prompt])
        out = model.generate(input_ids=ids, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)
        lengths.append(out.shape[1])
        return ""

    monkeypatch.setattr(generate, "complete", recorded)
    here("generate", "a b", "--raw", "--model", paths["model"], "--max-new-tokens", str(positions * 4))
    assert lengths == [positions]


def test_examples_beyond_the_positions_are_rejected(
    refused: Any, paths: Paths, positions: int, tmp_path: pathlib.Path
) -> None:
    data = tmp_path / "long.jsonl"
    data.write_text("".join(json.dumps({"text": "word " * positions * 2 + str(i)}) + "\n" for i in range(12)))
    options = ["--model", paths["model"], "--data", data, "--output", tmp_path / "run", *SMALL, "--max-steps", "1"]
    sentence = refused("finetune", *options, "--seq-len", positions + 9)
    assert f"--seq-len {positions + 9}: the longest example has {positions + 9} tokens" in sentence
    assert f"use --seq-len {positions}" in sentence
    here("finetune", *options, "--seq-len", positions)


def test_short_examples_may_share_a_longer_row(paths: Paths, positions: int, tmp_path: pathlib.Path) -> None:
    data = tmp_path / "short.jsonl"
    data.write_text("".join(json.dumps({"text": f"word {i} and so on"}) + "\n" for i in range(400)))
    here("finetune", "--model", paths["model"], "--data", data, "--output", tmp_path / "run", *SMALL,
         "--max-steps", "1", "--batch-size", "1", "--seq-len", positions * 2)  # fmt: skip
