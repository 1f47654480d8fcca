"""``finetune`` on answers with a label: TRL's KTO on 4-bit layers, with checkpoints and resumption as in DPO."""

from __future__ import annotations

import json
import pathlib
import shutil
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("trl", reason="TRL is not installed")

import qlora_app
from commands import Paths, adapter_bytes, here, read_lines

RUN = ["--rank", "4", "--seq-len", "64", "--batch-size", "4", "--lr", "0.01", "--eval-size", "6"]


def write(path: pathlib.Path, labels: list[object]) -> pathlib.Path:
    """Answers of two numbers, or of nine if the label is false, alternately as texts and as messages."""
    with path.open("w") as file:
        for i, label in enumerate(labels):
            answer = " ".join(map(str, range(i, i + (2 if label else 9))))
            row: dict[str, Any] = {"prompt": f"count {i}", "completion": answer, "label": label}
            if i % 4 > 1:
                row["prompt"] = [{"role": "user", "content": row["prompt"]}]
                row["completion"] = [{"role": "assistant", "content": answer}]
            file.write(json.dumps(row) + "\n")
    return path


@pytest.fixture(scope="module")
def labelled(paths: Paths) -> pathlib.Path:
    """Short answers are good, long ones are bad."""
    return write(paths["root"] / "labelled.jsonl", [True, False] * 15)


@pytest.fixture(scope="module")
def run(paths: Paths, labelled: pathlib.Path) -> pathlib.Path:
    run = paths["root"] / "kto"
    more = ["--max-steps", "6", "--save-steps", "4", "--eval-steps", "3"]
    here("finetune", "--model", paths["model"], "--data", labelled, "--output", run, *RUN, *more)
    return run


def test_the_labels_are_learnt(run: pathlib.Path) -> None:
    measured = [line for line in read_lines(run / "metrics.jsonl") if "eval_loss" in line]
    assert [line["step"] for line in measured] == [0, 3, 6]
    assert measured[0]["eval_loss"] == pytest.approx(0.5, abs=1e-3)  # because the model still equals its reference
    assert measured[-1]["eval_loss"] < 0.45
    assert measured[-1]["eval_reward_margin"] > 0.2
    metrics = json.loads((run / "adapter" / "qlora_run.json").read_text())["metrics"]
    assert metrics["reward_margin_after"] == measured[-1]["eval_reward_margin"]
    names = {path.name for path in run.iterdir()}
    assert names == {"settings.json", "before.json", "metrics.jsonl", "loss.png", "adapter", "qlora_output.json",
                     "checkpoint-4", "checkpoint-6"}  # fmt: skip


def test_a_resumed_run_and_one_made_longer_have_the_same_bits(
    run: pathlib.Path, labelled: pathlib.Path, paths: Paths, tmp_path: pathlib.Path
) -> None:
    stopped = pathlib.Path(shutil.copytree(run, tmp_path / "run"))
    shutil.rmtree(stopped / "checkpoint-6")
    shutil.rmtree(stopped / "adapter")
    here("finetune", "--output", stopped, "--resume", "--eval-steps", "0")
    assert adapter_bytes(stopped) == adapter_bytes(run)
    short = tmp_path / "short"
    here("finetune", "--model", paths["model"], "--data", labelled, "--output", short, *RUN, "--max-steps", "2")
    here("finetune", "--output", short, "--resume", "--max-steps", "6")
    assert adapter_bytes(short) == adapter_bytes(run)


def test_the_measurements_are_those_of_the_paper(run: pathlib.Path, paths: Paths, labelled: pathlib.Path) -> None:
    """The loss of the held-out answers is that of the KTO paper's formula, with the base as reference."""
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import qlora_ext
    from qlora_app.data import read_examples, split

    tokenizer = AutoTokenizer.from_pretrained(paths["model"])
    base = AutoModelForCausalLM.from_pretrained(
        paths["model"], dtype=torch.bfloat16, quantization_config=qlora_ext.QLoRAConfig()
    )
    model = peft.PeftModel.from_pretrained(base, run / "adapter").eval()

    def reward(row: Any, answer: list[int]) -> float:
        """The logarithm of how much more likely the answer is than with the base."""
        ids = torch.tensor([row["prompt_ids"] + answer])

        def log_probability() -> float:
            logits = model(ids).logits[0, len(row["prompt_ids"]) - 1 : -1].float()
            return float(logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum())

        with model.disable_adapter():
            before = log_probability()
        return log_probability() - before

    held_out = split(tokenizer, read_examples(str(labelled)), 64, 24, 6, seed=0, preferences=True).held_out
    losses, rewards = [], {0: [], 1: []}
    with torch.no_grad():
        for batch in (held_out[:4], held_out[4:]):
            others = [reward(row, batch[i - 1]["completion_ids"]) for i, row in enumerate(batch)]
            divergence = max(0.0, sum(others) / len(others))
            for row in batch:
                (label,) = row["label"]
                rewards[label].append(0.1 * reward(row, row["completion_ids"]))
                away = rewards[label][-1] - 0.1 * divergence
                losses.append(1 - torch.sigmoid(torch.tensor(away if label else -away)))
    found = [line for line in read_lines(run / "metrics.jsonl") if "eval_loss" in line][-1]
    assert found["eval_loss"] == pytest.approx(float(torch.stack(losses).mean()), rel=0.05)  # padded rows round
    good, bad = (sum(rewards[label]) / len(rewards[label]) for label in (1, 0))
    assert found["eval_reward_margin"] == pytest.approx(good - bad, rel=0.05)


def test_each_question_gets_the_answer_of_another_row_of_its_batch() -> None:
    from qlora_app.training.preferences import _mismatched

    rows = [{"prompt_ids": [1], "completion_ids": [i], "label": [i % 2]} for i in range(5)]
    found = list(_mismatched(rows, 2))
    assert [row["KL_completion_ids"] for row in found] == [[1], [0], [3], [2], [3]]
    assert [row["label"] for row in found] == [False, True, False, True, False]


def test_the_good_answers_alone(
    paths: Paths, labelled: pathlib.Path, tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", paths["model"], "--data", labelled, "--output", tmp_path / "run", *RUN]
    here("finetune", *arguments, "--method", "sft", "--max-steps", "1")
    assert "dropped: the label calls the answer bad" in capfd.readouterr().out
    assert "eval_perplexity" in read_lines(tmp_path / "run" / "metrics.jsonl")[0]


@pytest.mark.parametrize(
    ("label", "note"), [(False, "all these labels are false"), (True, "all these labels are true")]
)
def test_labels_of_one_kind_are_reported(
    label: bool, note: str, paths: Paths, tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "data.jsonl", [label] * 12)
    run = ["--output", tmp_path / "run", "--max-steps", "1", *RUN]
    here("finetune", "--model", paths["model"], "--data", data, *run)
    assert note in capfd.readouterr().out
    assert "eval_reward_margin" not in read_lines(tmp_path / "run" / "metrics.jsonl")[0]


def test_what_kto_cannot_do(refused: Any, paths: Paths, labelled: pathlib.Path, tmp_path: pathlib.Path) -> None:
    arguments = ["finetune", "--model", paths["model"], "--output", tmp_path / "run", "--data"]
    for options, part in (
        (["--batch-size", "1"], "--batch-size 1: expected at least 2 with KTO"),
        (["--no-packing"], "--no-packing: KTO"),
        (["--chunked-loss"], "--chunked-loss: not supported with KTO"),
        (["--max-memory", "4GB"], "--max-memory: the planner does not support KTO"),
        (["--neftune-alpha", "5"], "--neftune-alpha: not supported with DPO and KTO"),
        (["--target-modules", "lm_head"], "--method kto: an adapter on the output head is not supported"),
        (["--method", "dpo"], "rows with prompt, chosen and rejected"),
    ):
        assert part in refused(*arguments, labelled, *options)
    assert "--method kto: expected labels" in refused(*arguments, paths["data"], "--method", "kto")
    few = write(tmp_path / "few.jsonl", [True, False])
    assert "expected at least two answers with a label" in refused(*arguments, few)
    assert not (tmp_path / "run").exists()


def test_a_sweep_from_python(paths: Paths, labelled: pathlib.Path, tmp_path: pathlib.Path) -> None:
    swept = qlora_app.finetune(
        model=paths["model"], data=labelled, output=tmp_path / "sweep", method="kto", rank=2, seq_len=64, max_steps=1,
        eval_size=6, sweep={"beta": [0.1, 0.5]},
    )  # fmt: skip
    assert set(swept.runs) == {"beta=0.1", "beta=0.5"}
    assert swept.best is not None
