"""``finetune --method grpo``: TRL's GRPO on 4-bit layers, whose answers come from batched decoding."""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed")

from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOTrainer

import qlora_app
from commands import Paths, adapter_bytes, here, read_lines, stopped
from qlora_app.data.prompts import prompt_of
from qlora_app.errors import UserError
from qlora_app.training.reward_function import find_rewards
from qlora_app.training.rewards import CheckedReward

REWARD = '''
def share(completions, wanted, **columns):
    """The share of the answer's characters whose code is below ``wanted``."""
    return [sum(ord(c) < code for c in text) / max(len(text), 1) for text, code in zip(completions, wanted)]

def few(completions, **columns):
    return [1.0]

def wrong(completions, **columns):
    raise KeyError("no such column")
'''
RUN = ["--method", "grpo", "--rank", "4", "--seq-len", "32", "--max-new-tokens", "8", "--batch-size", "16",
       "--generations", "8", "--lr", "0.005", "--eval-size", "8", "--max-steps", "8", "--save-steps", "5"]  # fmt: skip


@pytest.fixture(scope="module")
def task(paths: Paths) -> dict[str, pathlib.Path]:
    """A model, prompts, and a reward for answers in ASCII.

    The tied head of the tiny model is scaled up, because its logits would be so small that no answer is likely.
    """
    data, reward, directory = (paths["root"] / name for name in ("prompts.jsonl", "reward.py", "decided"))
    model = AutoModelForCausalLM.from_pretrained(paths["model"])
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(12)
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(paths["model"]).save_pretrained(directory)
    with data.open("w") as file:
        for i in range(160):
            file.write(json.dumps({"prompt": f"count {i}", "wanted": 128}) + "\n")
    reward.write_text(REWARD)
    return {"model": directory, "data": data, "reward": reward}


def options(task: dict[str, pathlib.Path], function: str = "share") -> list[object]:
    return ["--model", task["model"], "--data", task["data"], "--reward", f"{task['reward']}:{function}", *RUN]


@pytest.fixture(scope="module")
def run(paths: Paths, task: dict[str, pathlib.Path]) -> pathlib.Path:
    run = paths["root"] / "grpo"
    here("finetune", *options(task), "--output", run)
    return run


def test_the_reward_rises(run: pathlib.Path) -> None:
    lines = read_lines(run / "metrics.jsonl")
    measured = [line["eval_reward"] for line in lines if "eval_reward" in line]
    sampled = [line["reward"] for line in lines if "reward" in line]
    assert len(measured) == 2
    assert len(sampled) == 8
    assert measured[1] > measured[0] + 0.25
    assert sum(sampled[-2:]) > sum(sampled[:2]) + 0.6
    metrics = json.loads((run / "adapter" / "qlora_run.json").read_text())["metrics"]
    assert metrics["reward_after"] == measured[1]
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_resumed_run_has_the_same_bits(
    run: pathlib.Path, task: dict[str, pathlib.Path], refused: Any, tmp_path: pathlib.Path
) -> None:
    begun = stopped(run, tmp_path, 5)
    resume = ["finetune", "--output", begun, "--resume"]
    assert "the run does not record which code to run" in refused(*resume)
    assert "--reward differs" in refused(*resume, "--reward", f"{task['reward']}:few")
    here(*resume, "--reward", f"{task['reward']}:share")
    assert adapter_bytes(begun) == adapter_bytes(run)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--reward", "missing.py:share"], "no such file"),
        (["--reward", "share"], "expected FILE.py:FUNCTION or MODULE:FUNCTION"),
        (["--reward", "json:share"], "has no function share"),
        (["--reward", "no_such_module:share"], "cannot import"),
        (["--method", "sft"], "--reward is an option of --method grpo"),
        (["--generations", "5"], "expected a divisor of --batch-size times --grad-accum, which is 16"),
        (["--max-new-tokens", "32"], "expected less than --seq-len"),
        (["--dropout", "0.1"], "--dropout: not supported with --method grpo"),
        (["--temperature", "0"], "expected a positive number"),
        (["--sweep", "seed=1,2"], "--sweep and --method grpo exclude each other"),
        (["--max-new-tokens", "31"], "0 of 160 prompts have at most 1 tokens"),
    ],
)
def test_wrong_options(
    refused: Any, task: dict[str, pathlib.Path], tmp_path: pathlib.Path, changes: list[str], message: str
) -> None:
    assert message in refused("finetune", *options(task), "--output", tmp_path / "run", *changes)


@pytest.mark.parametrize(
    ("function", "message"),
    [("few", "expected 8 finite numbers from few, one per answer, got [1.0]"), ("wrong", "wrong raised KeyError")],
)
def test_wrong_rewards(
    refused: Any, task: dict[str, pathlib.Path], tmp_path: pathlib.Path, function: str, message: str
) -> None:
    assert message in refused("finetune", *options(task, function), "--output", tmp_path / "run")


@pytest.mark.parametrize(
    "returned",
    [None, 1.0, [None, 1.0], [float("nan"), 0], [1e300, 0], [10**400, 0], "12", {0: 1.0, 1: 1.0}, torch.zeros(2, 2)],
    ids=str,
)
def test_rewards_that_are_not_one_number_per_answer(returned: Any) -> None:
    with pytest.raises(UserError, match="--reward: expected 2 finite numbers from <lambda>, one per answer, got"):
        CheckedReward(lambda **_: returned)(completions=["a", "b"])


def test_rewards_of_other_types() -> None:
    async def later(completions: list[str], **columns: Any) -> list[float]:
        return [float(len(text)) for text in completions]

    def greedy(completions: list[str], **columns: Any) -> Any:
        torch.set_grad_enabled(False)
        return (torch.tensor(len(completions.pop(0))) for _ in range(2))

    answers = ["a", "bcd"]
    for reward in (later, greedy, lambda **_: torch.tensor([1.0, 3.0], requires_grad=True)):
        assert CheckedReward(reward)(completions=answers, level=[1, 1]) == [1.0, 3.0]
    assert answers == ["a", "bcd"]
    assert torch.is_grad_enabled()


def test_reward_functions_without_the_parameters() -> None:
    def short(completions: list[str]) -> list[float]:
        return [1.0 for _ in completions]

    message = r"expected short to take the keyword arguments completions, level \(\*\*columns .*argument 'level'"
    with pytest.raises(UserError, match=message):
        CheckedReward(short)(completions=["a"], level=[1])


def test_modules_next_to_the_file_and_in_the_working_directory(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for a script. A dataclass looks for its module among the imported ones."""
    (tmp_path / "scoring").mkdir()
    (tmp_path / "scoring" / "share.py").write_text("def score(completions, **columns):\n    return [1.0]\n")
    (tmp_path / "leave.py").write_text("raise SystemExit(3)\n")
    (tmp_path / "mine.py").write_text(
        "from __future__ import annotations\nimport dataclasses\nfrom scoring.share import score\n"
        "@dataclasses.dataclass\nclass Level:\n    number: int\n"
    )
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    names = ["scoring.share:score", "mine.py:score", "mine.py:Level"]
    share, mine, level = find_rewards(names)
    assert share(completions=["a"]) == mine(completions=["a"]) == [1.0]
    assert sys.modules[level.__module__].score is mine  # the file was executed once
    with pytest.raises(UserError, match="cannot import leave.py"):
        find_rewards(["leave.py:score"])


def test_the_python_function_takes_a_function(
    task: dict[str, pathlib.Path], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And TRL compares the training forward's log-probabilities with themselves, so that their ratio is 1."""
    seen: list[int] = []
    compared: list[Any] = []
    usual = GRPOTrainer._compute_loss

    def compute_loss(self: Any, model: Any, inputs: Any) -> Any:
        compared.append([inputs.get(name) for name in ("old_per_token_logps", "importance_sampling_ratio")])
        return usual(self, model, inputs)

    monkeypatch.setattr(GRPOTrainer, "_compute_loss", compute_loss)

    def longest(completions: list[str], wanted: list[int], **columns: Any) -> list[float]:
        seen.extend(wanted)
        return [float(len(text)) for text in completions]

    done = qlora_app.finetune(
        model=task["model"], data=task["data"], output=tmp_path / "run", method="grpo", reward=longest, rank=2,
        seq_len=32, max_new_tokens=4, generations=2, batch_size=2, grad_accum=2, max_steps=1, eval_size=2,
    )  # fmt: skip
    assert compared == [[None, None]] * 2
    assert "reward_after" in done.metrics
    assert set(seen) == {128}


def test_several_rewards_add_up(refused: Any, task: dict[str, pathlib.Path], tmp_path: pathlib.Path) -> None:
    other = tmp_path / "other.py"
    other.write_text("def half(completions, **columns):\n    return [0.5] * len(completions)\n")
    run = ["--output", tmp_path / "run", "--eval-size", "2", "--max-steps", "1"]
    rewards = ["--reward", f"{other}:half", "--reward", f"{other}:half"]
    here("finetune", *options(task)[:4], *rewards, *RUN, *run)
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["eval_reward"] for line in lines if "eval_reward" in line] == [1.0, 1.0]
    assert [line["reward"] for line in lines if "reward" in line] == [1.0]
    assert "--reward differs" in refused("finetune", "--output", tmp_path / "run", "--resume", *rewards[:2])
    for reward in (3, ["a.py:f", None]):
        with pytest.raises(TypeError, match="reward: expected a function, its name, or a list of these"):
            qlora_app.finetune(output=tmp_path / "other", method="grpo", reward=reward)


def test_rows_of_prompts() -> None:
    user, answer = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}
    assert prompt_of({"prompt": "2 + 2?", "level": 3}, "row") == {"prompt": [user], "columns": {"level": 3}}
    assert prompt_of({"question": "2 + 2?", "answer": "4"}, "row") == {"prompt": [user], "columns": {"answer": "4"}}
    assert prompt_of({"messages": [user, answer]}, "row") == {"prompt": [user], "columns": {"answer": "4"}}
    system = {"role": "system", "content": "Be brief."}
    assert prompt_of({"prompt": [user], "system": "Be brief."}, "row") == {"prompt": [system, user], "columns": {}}
    for record, message in [
        ({"text": "2 + 2"}, "expected an object with a prompt"),
        ({"prompt": "2 + 2?", "completion": "4"}, "the column 'completion' has a name that TRL uses"),
        ({"messages": [answer]}, "expected a question before the answer"),
        ({"prompt": []}, "expected a prompt, got an empty conversation"),
        ({"prompt": "2 + 2?", "tools": [{}]}, "tools: not supported"),
        ("2 + 2?", "expected an object"),
    ]:
        with pytest.raises(UserError, match="row: .*" + message.replace("+", r"\+")):
            prompt_of(record, "row")
