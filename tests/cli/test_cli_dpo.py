"""``finetune`` on preferences: TRL's DPO on 4-bit layers, with checkpoints, resumption and files as in SFT."""

from __future__ import annotations

import importlib.util
import json
import pathlib
import shutil
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("trl", reason="TRL is not installed")

from commands import Paths, adapter_bytes, here, read_lines

RUN = ["--rank", "4", "--seq-len", "64", "--batch-size", "4", "--lr", "0.01", "--eval-size", "4", "--max-steps", "6"]


@pytest.fixture(scope="module")
def preferences(paths: Paths) -> pathlib.Path:
    """Short answers are preferred to long ones."""
    data = paths["root"] / "preferences.jsonl"
    with data.open("w") as file:
        for i in range(24):
            row = {"prompt": f"count {i}", "chosen": f"{i} {i + 1}", "rejected": " ".join(map(str, range(i, i + 9)))}
            file.write(json.dumps(row) + "\n")
    return data


@pytest.fixture(scope="module")
def run(paths: Paths, preferences: pathlib.Path) -> pathlib.Path:
    run = paths["root"] / "dpo"
    more = ["--save-steps", "4", "--eval-steps", "3"]
    here("finetune", "--model", paths["model"], "--data", preferences, "--output", run, *RUN, *more)
    return run


def test_the_preference_is_learnt(run: pathlib.Path) -> None:
    lines = read_lines(run / "metrics.jsonl")
    measured = [line for line in lines if "eval_reward_accuracy" in line]
    assert [line["step"] for line in measured] == [0, 3, 6]
    assert measured[0]["eval_loss"] == pytest.approx(
        0.6931, abs=1e-3
    )  # log 2, because the model still equals its reference
    assert measured[-1]["eval_loss"] < 0.6
    assert measured[-1]["eval_reward_accuracy"] == 1.0
    metrics = json.loads((run / "adapter" / "qlora_run.json").read_text())["metrics"]
    assert metrics["reward_accuracy_after"] == 1.0
    names = {path.name for path in run.iterdir()}
    assert names == {"settings.json", "before.json", "metrics.jsonl", "loss.png", "adapter", "qlora_output.json",
                     "checkpoint-4", "checkpoint-6"}  # fmt: skip


def test_a_resumed_run_has_the_same_bits(run: pathlib.Path, paths: Paths, tmp_path: pathlib.Path) -> None:
    stopped = pathlib.Path(shutil.copytree(run, tmp_path / "run"))
    shutil.rmtree(stopped / "checkpoint-6")
    shutil.rmtree(stopped / "adapter")
    here("finetune", "--output", stopped, "--resume", "--eval-steps", "0")
    assert adapter_bytes(stopped) == adapter_bytes(run)


def test_the_adapter_is_one_like_any_other(run: pathlib.Path, capfd: pytest.CaptureFixture[str]) -> None:
    here("generate", "--adapter", run, "--prompt", "count 3", "--max-new-tokens", "3")
    here("adapters", run)
    assert "adapter" in capfd.readouterr().out


def test_the_chosen_answers_alone(paths: Paths, preferences: pathlib.Path, tmp_path: pathlib.Path) -> None:
    arguments = ["--model", paths["model"], "--data", preferences, "--output", tmp_path / "run", *RUN]
    here("finetune", *arguments, "--method", "sft")
    assert "eval_perplexity" in read_lines(tmp_path / "run" / "metrics.jsonl")[0]


def test_without_trl(
    refused: Any, paths: Paths, preferences: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == "trl" else find(name, *a))
    arguments = ["finetune", "--model", paths["model"], "--data", preferences, "--output", tmp_path / "run"]
    assert "pip install 'trl" in refused(*arguments)


def test_the_measured_loss_is_that_of_the_paper(run: pathlib.Path, paths: Paths, preferences: pathlib.Path) -> None:
    """The loss of the held-out pairs is that of the DPO paper's formula, with the base as reference."""
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import qlora_ext
    from qlora_app.data import read_examples, split

    tokenizer = AutoTokenizer.from_pretrained(paths["model"])
    base = AutoModelForCausalLM.from_pretrained(
        paths["model"], dtype=torch.bfloat16, quantization_config=qlora_ext.QLoRAConfig()
    )
    model = peft.PeftModel.from_pretrained(base, run / "adapter").eval()

    def log_probability(prompt: list[int], answer: list[int]) -> torch.Tensor:
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].float()
        return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum()

    examples = read_examples(str(preferences))
    losses = []
    with torch.no_grad():
        for row in split(tokenizer, examples, 64, 24, 4, seed=0, preferences=True).held_out:
            pairs = [(row["prompt_ids"], row["chosen_ids"]), (row["prompt_ids"], row["rejected_ids"])]
            chosen, rejected = (log_probability(*pair) for pair in pairs)
            with model.disable_adapter():
                chosen0, rejected0 = (log_probability(*pair) for pair in pairs)
            losses.append(-torch.nn.functional.logsigmoid(0.1 * ((chosen - chosen0) - (rejected - rejected0))))
    found = [line["eval_loss"] for line in read_lines(run / "metrics.jsonl") if "eval_loss" in line][-1]
    assert found == pytest.approx(float(torch.stack(losses).mean()), rel=0.05)  # padded rows round differently
