"""``finetune`` on preferences and labels: TRL's DPO and KTO on 4-bit layers, with checkpoints and files as in SFT."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed")

import peft
from transformers import AutoModelForCausalLM, AutoTokenizer

import qlora_app
import qlora_ext
from commands import Paths, adapter_bytes, here, read_lines, stopped
from qlora_app.data import read_examples, split
from qlora_app.training.preferences import _mismatched

RUN = ["--rank", "4", "--seq-len", "64", "--batch-size", "4", "--lr", "0.01", "--max-steps", "6"]


@dataclasses.dataclass(frozen=True)
class Method:
    """What is learnt, and how well.

    Attributes:
        row: of the data, in which short answers are good and long ones bad.
        rows: how many, of which the last ones are held out.
        first: the loss of a model that still equals its reference.
        last: an upper bound of the loss after training.
        metric: what is measured beside the loss, and a lower bound of it after training.
    """

    row: Callable[[int], dict[str, Any]]
    rows: int
    held_out: int
    first: float
    last: float
    metric: tuple[str, float]


def preference(i: int) -> dict[str, Any]:
    return {"prompt": f"count {i}", "chosen": f"{i} {i + 1}", "rejected": " ".join(map(str, range(i, i + 9)))}


def labelled(i: int, label: object) -> dict[str, Any]:
    """Alternately texts and messages."""
    answer = " ".join(map(str, range(i, i + (2 if label else 9))))
    row: dict[str, Any] = {"prompt": f"count {i}", "completion": answer, "label": label}
    if i % 4 > 1:
        row["prompt"] = [{"role": "user", "content": row["prompt"]}]
        row["completion"] = [{"role": "assistant", "content": answer}]
    return row


METHODS = {
    "dpo": Method(preference, 24, 4, 0.6931, 0.6, ("reward_accuracy", 0.99)),
    "kto": Method(lambda i: labelled(i, i % 2 == 0), 30, 6, 0.5, 0.45, ("reward_margin", 0.2)),
}


def write(path: pathlib.Path, rows: list[dict[str, Any]]) -> pathlib.Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def data(paths: Paths) -> dict[str, pathlib.Path]:
    return {
        name: write(paths["root"] / f"{name}.jsonl", [method.row(i) for i in range(method.rows)])
        for name, method in METHODS.items()
    }


def options(paths: Paths, data: pathlib.Path, run: pathlib.Path, held_out: int = 6) -> list[object]:
    return ["finetune", "--model", paths["model"], "--data", data, "--output", run, *RUN, "--eval-size", str(held_out)]


@pytest.fixture(scope="module")
def runs(paths: Paths, data: dict[str, pathlib.Path]) -> dict[str, pathlib.Path]:
    found = {name: paths["root"] / name for name in METHODS}
    for name, method in METHODS.items():
        more = ["--save-steps", "4", "--eval-steps", "3"]
        here(*options(paths, data[name], found[name], method.held_out), *more)
    return found


@pytest.mark.parametrize("name", METHODS)
def test_it_is_learnt(runs: dict[str, pathlib.Path], name: str) -> None:
    run, method = runs[name], METHODS[name]
    metric, least = method.metric
    measured = [line for line in read_lines(run / "metrics.jsonl") if "eval_loss" in line]
    assert [line["step"] for line in measured] == [0, 3, 6]
    assert measured[0]["eval_loss"] == pytest.approx(method.first, abs=1e-3)
    assert measured[-1]["eval_loss"] < method.last
    assert measured[-1][f"eval_{metric}"] > least
    metrics = json.loads((run / "adapter" / "qlora_run.json").read_text())["metrics"]
    assert metrics[f"{metric}_after"] == measured[-1][f"eval_{metric}"]
    names = {path.name for path in run.iterdir()}
    assert names == {"settings.json", "before.json", "metrics.jsonl", "loss.png", "adapter", "qlora_output.json",
                     "checkpoint-4", "checkpoint-6"}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_run_has_the_same_bits(runs: dict[str, pathlib.Path], tmp_path: pathlib.Path, name: str) -> None:
    run = stopped(runs[name], tmp_path, 4)
    here("finetune", "--output", run, "--resume", "--eval-steps", "0")
    assert adapter_bytes(run) == adapter_bytes(runs[name])


def test_a_run_made_longer_has_the_same_bits(
    runs: dict[str, pathlib.Path], paths: Paths, data: dict[str, pathlib.Path], tmp_path: pathlib.Path
) -> None:
    here(*options(paths, data["kto"], tmp_path / "short"), "--max-steps", "2")
    here("finetune", "--output", tmp_path / "short", "--resume", "--max-steps", "6")
    assert adapter_bytes(tmp_path / "short") == adapter_bytes(runs["kto"])


def test_the_adapter_is_one_like_any_other(runs: dict[str, pathlib.Path]) -> None:
    here("generate", "--adapter", runs["dpo"], "--prompt", "count 3", "--max-new-tokens", "3")
    assert "adapter" in here("adapters", runs["dpo"])


@pytest.mark.parametrize("name", METHODS)
def test_the_good_answers_alone(paths: Paths, data: dict[str, pathlib.Path], tmp_path: pathlib.Path, name: str) -> None:
    assert (
        "dropped: the label calls the answer bad"
        in here(*options(paths, data[name], tmp_path / "run"), "--method", "sft", "--max-steps", "1")
    ) == (name == "kto")
    assert "eval_perplexity" in read_lines(tmp_path / "run" / "metrics.jsonl")[0]


@pytest.mark.parametrize("name", METHODS)
def test_the_measurements_are_those_of_the_paper(
    runs: dict[str, pathlib.Path], paths: Paths, data: dict[str, pathlib.Path], name: str
) -> None:
    """Of the held-out answers, by the formulas of the papers on DPO and KTO, with the base as reference."""

    tokenizer = AutoTokenizer.from_pretrained(paths["model"])
    base = AutoModelForCausalLM.from_pretrained(
        paths["model"], dtype=torch.bfloat16, quantization_config=qlora_ext.QLoRAConfig()
    )
    model = peft.PeftModel.from_pretrained(base, runs[name] / "adapter").eval()

    def reward(row: Any, answer: list[int]) -> float:
        """The logarithm of how much more likely the answer is than with the base."""
        ids = torch.tensor([row["prompt_ids"] + answer])

        def log_probability() -> float:
            logits = model(ids).logits[0, len(row["prompt_ids"]) - 1 : -1].float()
            return float(logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum())

        with model.disable_adapter():
            before = log_probability()
        return log_probability() - before

    count = METHODS[name].held_out
    held_out = split(tokenizer, read_examples(str(data[name])), 64, 24, count, seed=0, preferences=True).held_out
    found = [line for line in read_lines(runs[name] / "metrics.jsonl") if "eval_loss" in line][-1]
    better, rewards = [], {0: [], 1: []}  # by how much an answer is better, as its loss counts it
    with torch.no_grad():
        if name == "dpo":
            better = [reward(row, row["chosen_ids"]) - reward(row, row["rejected_ids"]) for row in held_out]
            losses = -torch.nn.functional.logsigmoid(0.1 * torch.tensor(better))
        else:
            for batch in (held_out[:4], held_out[4:]):
                others = [reward(row, batch[i - 1]["completion_ids"]) for i, row in enumerate(batch)]
                divergence = max(0.0, sum(others) / len(others))
                for row in batch:
                    (label,) = row["label"]
                    rewards[label].append(0.1 * reward(row, row["completion_ids"]))
                    away = rewards[label][-1] - 0.1 * divergence
                    better.append(away if label else -away)
            losses = 1 - torch.sigmoid(torch.tensor(better))
            good, bad = (sum(rewards[label]) / len(rewards[label]) for label in (1, 0))
            assert found["eval_reward_margin"] == pytest.approx(good - bad, rel=0.05)
    assert found["eval_loss"] == pytest.approx(float(losses.mean()), rel=0.05)  # padded rows round differently


def test_each_question_gets_the_answer_of_another_row_of_its_batch() -> None:
    rows = [{"prompt_ids": [1], "completion_ids": [i], "label": [i % 2]} for i in range(5)]
    found = list(_mismatched(rows, 2))
    assert [row["KL_completion_ids"] for row in found] == [[1], [0], [3], [2], [3]]
    assert [row["label"] for row in found] == [False, True, False, True, False]


@pytest.mark.parametrize("label", [False, True])
def test_labels_of_one_kind_are_reported(label: bool, paths: Paths, tmp_path: pathlib.Path) -> None:
    data = write(tmp_path / "data.jsonl", [labelled(i, label) for i in range(12)])
    assert f"all these labels are {str(label).lower()}" in here(
        *options(paths, data, tmp_path / "run"), "--max-steps", "1"
    )
    assert "eval_reward_margin" not in read_lines(tmp_path / "run" / "metrics.jsonl")[0]


def test_what_is_rejected(
    refused: Any, paths: Paths, data: dict[str, pathlib.Path], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = write(tmp_path / "few.jsonl", [labelled(0, True), labelled(1, False)])
    for rows, more, part in (
        (data["kto"], "--batch-size 1", "--batch-size 1: expected at least 2 with KTO"),
        (data["kto"], "--no-packing", "--no-packing: KTO"),
        (data["kto"], "--chunked-loss", "--chunked-loss: not supported with KTO"),
        (data["kto"], "--max-memory 4GB", "--max-memory: the planner does not support KTO"),
        (data["kto"], "--neftune-alpha 5", "--neftune-alpha: not supported with DPO and KTO"),
        (data["kto"], "--target-modules lm_head", "--method kto: an adapter on the output head is not supported"),
        (data["kto"], "--method dpo", "rows with prompt, chosen and rejected"),
        (paths["data"], "--method kto", "--method kto: expected labels"),
        (few, "", "expected at least two answers with a label"),
    ):
        assert part in refused(*options(paths, rows, tmp_path / "run"), *more.split())
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == "trl" else find(name, *a))
    assert "pip install 'trl" in refused(*options(paths, data["dpo"], tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_sweep_from_python(paths: Paths, data: dict[str, pathlib.Path], tmp_path: pathlib.Path) -> None:
    swept = qlora_app.finetune(
        model=paths["model"], data=data["kto"], output=tmp_path / "sweep", method="kto", rank=2, seq_len=64,
        max_steps=1, eval_size=6, sweep={"beta": [0.1, 0.5]},
    )  # fmt: skip
    assert set(swept.runs) == {"beta=0.1", "beta=0.5"}
    assert swept.best is not None
