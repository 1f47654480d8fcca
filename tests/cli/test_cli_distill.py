"""``finetune --method distill``: a student learns the probabilities of its teacher."""

from __future__ import annotations

import json
import pathlib
import shutil
import sqlite3
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import qlora_app
from commands import Paths, adapter_bytes, here, read_lines, stopped
from qlora_app.training.distillation import prompts_of
from qlora_ext.divergence import TopK

RUN = ["--method", "distill", "--rank", "8", "--seq-len", "48", "--batch-size", "2", "--lr", "0.02", "--eval-size", "4",
       "--max-steps", "10", "--save-steps", "4", "--dtype", "float32"]  # fmt: skip


@pytest.fixture(scope="module")
def teacher(paths: Paths) -> pathlib.Path:
    """The other model, with a larger head, so that its probabilities are far from uniform."""
    directory = paths["root"] / "teacher"
    model = AutoModelForCausalLM.from_pretrained(paths["other"])
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(4)
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(paths["other"]).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def distill(paths: Paths, teacher: pathlib.Path) -> Callable[..., list[float]]:
    """Runs the command, and returns the held-out divergences before and after."""

    def run(output: pathlib.Path, *more: object) -> list[float]:
        options = ["--model", paths["model"], "--data", paths["data"], "--teacher", teacher, *RUN, *more]
        here("finetune", *options, "--output", output)
        return [line["eval_loss"] for line in read_lines(output / "metrics.jsonl") if "eval_loss" in line]

    return run


@pytest.fixture(scope="module")
def run(paths: Paths, distill: Callable[..., list[float]]) -> pathlib.Path:
    distill(paths["root"] / "distilled")
    return paths["root"] / "distilled"


def test_the_divergence_falls(run: pathlib.Path, teacher: pathlib.Path) -> None:
    lines = read_lines(run / "metrics.jsonl")
    before, after = (line for line in lines if "eval_loss" in line)
    assert after["eval_loss"] < 0.9 * before["eval_loss"]
    assert after["eval_text_perplexity"] != before["eval_text_perplexity"]
    settings = json.loads((run / "settings.json").read_text())
    assert settings["teacher"] == str(teacher.resolve())
    card = (run / "adapter" / "README.md").read_text()
    assert f"forward KL divergence from the teacher `{teacher}`" in card


def test_a_resumed_run_has_the_same_bits(run: pathlib.Path, paths: Paths, refused: Any, tmp_path: pathlib.Path) -> None:
    begun = stopped(run, tmp_path, 4)
    resume = ["finetune", "--output", begun, "--resume"]
    assert "--teacher" in refused(*resume, "--teacher", paths["other"])
    here(*resume)
    assert adapter_bytes(begun) == adapter_bytes(run)


def test_a_base_that_is_its_own_teacher_has_no_divergence(
    paths: Paths, distill: Callable[..., list[float]], tmp_path: pathlib.Path
) -> None:
    quantized = tmp_path / "quantized"
    here("quantize", "--model", paths["model"], "--output", quantized)
    before, _ = distill(tmp_path / "run", "--model", quantized, "--teacher", quantized, "--max-steps", "1")
    assert abs(before) < 1e-6


@pytest.mark.parametrize("how", ["4bit", "ram", "disk"])
def test_a_teacher_in_4_bits(
    run: pathlib.Path, distill: Callable[..., list[float]], tmp_path: pathlib.Path, how: str
) -> None:
    found = distill(tmp_path / "run", "--teacher-load", how, "--max-steps", "1")
    dense = read_lines(run / "metrics.jsonl")[0]["eval_loss"]
    assert found[0] == pytest.approx(dense, rel=0.05)
    assert found[0] != dense


def test_the_students_own_answers(distill: Callable[..., list[float]], tmp_path: pathlib.Path) -> None:
    options = ["--student-samples", "0.5", "--max-new-tokens", "8", "--divergence", "reverse"]
    before, after = distill(tmp_path / "run", *options)
    assert after < 0.9 * before
    begun = stopped(tmp_path / "run", tmp_path, 4)
    here("finetune", "--output", begun, "--resume")
    assert adapter_bytes(begun) == adapter_bytes(tmp_path / "run")


def test_prompts_of_packed_rows() -> None:
    batch = {
        "input_ids": [[5, 6, 7, 8, 9, 0], [1, 2, 3, 4, 5, 6]],
        "labels": [[-100, -100, 7, -100, 9, -100], [1, 2, 3, -100, -100, -100]],
        "position_ids": [[0, 1, 2, 0, 1, 0], [0, 1, 2, 0, 1, 2]],
    }
    assert list(prompts_of({key: torch.tensor(rows) for key, rows in batch.items()})) == [[5, 6], [8], [1]]


def test_a_cache_serves_instead_of_the_teacher(
    run: pathlib.Path, distill: Callable[..., list[float]], monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    """With all but one token of the vocabulary, it is the teacher. An interrupted computation continues."""
    cache = ["--teacher-cache", str(tmp_path / "cache"), "--teacher-top-k", "256"]
    computed: list[int] = []
    original = TopK.of

    def counted(logits: Any, k: int) -> TopK:
        computed.append(len(logits.hidden))
        if len(computed) == 2:
            raise KeyboardInterrupt
        return original(logits, k)

    monkeypatch.setattr(TopK, "of", counted)
    with pytest.raises(AssertionError):  # its exit code is not 0
        distill(tmp_path / "run", *cache)
    distill(tmp_path / "run", *cache)
    assert len(computed) == 8  # 13 rows in 7 batches, of which the second one was interrupted
    expected = [line["eval_loss"] for line in read_lines(run / "metrics.jsonl") if "eval_loss" in line]
    found = [line["eval_loss"] for line in read_lines(tmp_path / "run" / "metrics.jsonl") if "eval_loss" in line]
    assert found == pytest.approx(expected, rel=1e-3)
    rows = len(computed)
    distill(tmp_path / "again", *cache)
    assert len(computed) == rows
    assert adapter_bytes(tmp_path / "again") == adapter_bytes(tmp_path / "run")
    begun = stopped(tmp_path / "run", tmp_path, 4)
    here("finetune", "--output", begun, "--resume")
    assert adapter_bytes(begun) == adapter_bytes(tmp_path / "run")


def test_damaged_and_foreign_caches(
    paths: Paths, teacher: pathlib.Path, distill: Callable[..., list[float]], refused: Any, tmp_path: pathlib.Path
) -> None:
    cache = tmp_path / "cache"
    distill(tmp_path / "run", "--teacher-cache", cache, "--max-steps", "1")

    def error(file: pathlib.Path, *more: object) -> str:
        options = ["--model", paths["model"], "--data", paths["data"], "--teacher", teacher, *RUN, "--max-steps", "1"]
        text: str = refused("finetune", *options, "--output", tmp_path / "other", "--teacher-cache", file, *more)
        assert not (tmp_path / "other").exists()
        return text

    assert "another --teacher-top-k: expected 8, got 64" in error(cache, "--teacher-top-k", "8")
    assert "another teacher" in error(cache, "--teacher", paths["other"])
    assert "another --teacher-load" in error(cache, "--teacher-load", "4bit")
    assert "cannot be read or written (file is not a database)" in error(paths["data"])
    with sqlite3.connect(tmp_path / "database") as database:
        database.execute("CREATE TABLE made (key TEXT)")
    assert "of another program" in error(tmp_path / "database")
    changed = tmp_path / "changed"
    for statement in (
        "UPDATE rows SET targets = zeroblob(length(targets))",
        "UPDATE rows SET targets = 'text'",
        "UPDATE rows SET targets = substr(targets, 2)",
        "UPDATE made SET key = '['",
        "DELETE FROM made",
    ):
        shutil.copy(cache, changed)
        with sqlite3.connect(changed) as database:
            database.execute(statement)
        database.close()
        assert "is damaged" in error(changed), statement
    changed.write_bytes(cache.read_bytes()[: cache.stat().st_size // 2])
    assert "cannot be read or written (database disk image is malformed)" in error(changed)
    assert cache.read_bytes()  # it is never deleted


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--method", "sft"], "--method distill and --teacher need each other"),
        (["--teacher", "missing/model"], "there is no directory missing/model"),
        (["--student-samples", "0.5"], "--max-new-tokens 128: expected less than --seq-len"),
        (["--student-samples", "2"], "--student-samples 2.0: expected 0 to 1"),
        (["--max-new-tokens", "8"], "--max-new-tokens is an option of --method grpo, and of distill"),
        (["--generations", "8"], "--generations is an option of --method grpo"),
        (["--beta", "0.1"], "this run only learns answers (distill)"),
        (["--divergence", "sideways"], "--divergence"),
        (["--teacher-cache", "no/such/directory"], "there is no directory"),
        (["--teacher-cache", "{output}"], "lies inside --output"),
        (["--teacher-cache", "cache", "--teacher-top-k", "257"], "expected less than the vocabulary, 257"),
        (
            ["--teacher-cache", "cache", "--student-samples", "1", "--max-new-tokens", "8"],
            "--student-samples and --teacher-cache exclude each other",
        ),
    ],
)
def test_wrong_options(
    paths: Paths,
    teacher: pathlib.Path,
    refused: Any,
    tmp_path: pathlib.Path,
    changes: list[str],
    message: str,
) -> None:
    output = tmp_path / "run"
    changes = [change.format(output=output / "cache") for change in changes]
    options = ["--model", paths["model"], "--data", paths["data"], "--teacher", teacher, *RUN]
    assert message in refused("finetune", *options, "--output", output, *changes)
    assert not output.exists()


def test_options_of_distillation_need_a_teacher(paths: Paths, refused: Any, tmp_path: pathlib.Path) -> None:
    options = ["--model", paths["model"], "--data", paths["data"], "--output", tmp_path / "run"]
    assert "need each other" in refused("finetune", *options, "--method", "distill")
    assert "--divergence is an option of --method distill" in refused("finetune", *options, "--divergence", "mix")


def test_teachers_of_another_vocabulary(
    paths: Paths, teacher: pathlib.Path, refused: Any, tmp_path: pathlib.Path
) -> None:
    other = pathlib.Path(shutil.copytree(teacher, tmp_path / "teacher"))
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(other)
    options = ["--model", paths["model"], "--data", paths["data"], "--teacher", other, *RUN, "--output", tmp_path / "r"]
    assert "expected the vocabulary of --model" in refused("finetune", *options)
    (other / "model.safetensors").write_bytes(b"damaged")
    AutoTokenizer.from_pretrained(teacher).save_pretrained(other)
    assert "damaged" in refused("finetune", *options) or "truncated" in refused("finetune", *options)


def test_a_teacher_with_further_rows(
    paths: Paths, distill: Callable[..., list[float]], teacher: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Rows of the head that belong to no token do not count."""
    model = AutoModelForCausalLM.from_pretrained(teacher)
    model.resize_token_embeddings(320, mean_resizing=False)
    model.save_pretrained(tmp_path / "padded")
    AutoTokenizer.from_pretrained(teacher).save_pretrained(tmp_path / "padded")
    padded, same = (
        distill(tmp_path / f"run{i}", "--teacher", name, "--max-steps", "1")
        for i, name in enumerate((tmp_path / "padded", teacher))
    )
    assert padded == pytest.approx(same, rel=1e-4)


def test_several_adapters_from_one_teacher(
    run: pathlib.Path, distill: Callable[..., Any], paths: Paths, teacher: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    done = qlora_app.finetune(
        model=paths["model"], data=paths["data"], teacher=teacher, method="distill", output=tmp_path / "sweep",
        sweep={"lr": [0.02, 0.01]}, rank=8, seq_len=48, batch_size=2, eval_size=4, max_steps=10, dtype="float32",
    )  # fmt: skip
    assert adapter_bytes(done.runs["lr=0.02"].directory) == adapter_bytes(run)


def test_the_plan_counts_the_teacher(paths: Paths, teacher: pathlib.Path) -> None:
    plain, dense, packed = (
        qlora_app.plan(model=paths["model"], seq_len=64, dtype="float32", **options)
        for options in ({}, {"teacher": teacher}, {"teacher": teacher, "teacher_load": "4bit"})
    )
    size = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(teacher).parameters())
    assert "teacher" not in plain["bytes"]
    assert dense["bytes"]["teacher"] == 4 * size
    assert 0 < packed["bytes"]["teacher"] < dense["bytes"]["teacher"]
    named = qlora_app.plan(model=paths["model"], teacher="llama-7b", teacher_load="4bit")
    assert 3e9 < named["bytes"]["teacher"] < 5e9
