"""``evaluate``: asks a model the questions of tasks, and counts its right answers."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

from qlora_ext.untrusted import excerpt, printable

from ..errors import UserError, as_arguments, check_prompt, path_named
from ..models.adapted import Adapted, find_adapted
from ..models.devices import parse_computing_dtype, parse_device, parse_dtype
from ..models.loading import load_dense
from ..models.pretrained import is_4bit
from ..options import COMPILED, SamplingOptions, keywords_of, like, option
from ..outputs.output_file import OutputFile, claim_file
from ..terminal.bars import counted
from ..training.identity import digest_of_model
from . import file_tasks, human_eval_tasks, lm_eval_tasks, reasoning_gym_tasks
from .answer_file import MARK, AnswerFile, Answers
from .statistics import LEVEL, wilson
from .tasks import Task

# Options that may differ between the command that began a file and the one that goes on.
_FREE = ("tasks", "output", "overwrite", "compile", "adapter", "model", "trust_remote_code", "force",
         "confirm_run_unsafe_code", "device")  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateRequest(SamplingOptions):
    """The options of ``evaluate``."""

    adapter: str | None = like(SamplingOptions, "adapter")
    model: str | None = like(SamplingOptions, "model")
    tasks: tuple[str, ...] = option(
        (),
        "gym:NAME of reasoning-gym, or gym:NAME:KEY=VALUE,...; humaneval; a file of prompts with answers (.jsonl, "
        ".csv, ...); or lm-eval:NAME; repeat it for several tasks",
        flag="--task",
        metavar="TASK",
    )
    limit: int | None = option(
        None, "questions of each task (default: all, and 100 of reasoning-gym's)", 1, maximum=1_000_000
    )
    output: str | None = option(
        None, "save each answer to this .jsonl file; if it exists, the same command resumes", metavar="FILE"
    )
    overwrite: bool = option(False, "replace the answers in --output")
    dense: bool = option(False, "keep the weights in 16 bits (those of a .gguf file are decoded), to compare with")
    system: str = option("", "system prompt", metavar="TEXT")
    max_new_tokens: int = like(SamplingOptions, "max_new_tokens", default=512)
    seed: int = option(0, "seed of reasoning-gym's questions, and of sampling", 0, maximum=2**32 - 1)
    sequences: int = option(16, "answers that are written at the same time", 1, maximum=256)
    confirm_run_unsafe_code: bool = option(False, "run programs that the model writes, which humaneval needs")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tasks:
            raise UserError(f"--task: expected a task, such as gym:chain_sum, {human_eval_tasks.NAME} or answers.jsonl")
        for task in self.tasks:
            if self.tasks.count(task) > 1:
                raise UserError(f"--task {excerpt(task)}: given twice")
        check_prompt(self.system, "--system")


def _find(name: str, request: EvaluateRequest) -> Task | None:
    """The task; None for one of lm-eval, which makes the questions itself."""
    if name.startswith(reasoning_gym_tasks.PREFIX):
        return reasoning_gym_tasks.find(name, request.limit, request.seed)
    if name.startswith(lm_eval_tasks.PREFIX):
        lm_eval_tasks.check_installed(name)
        return None
    if name == human_eval_tasks.NAME:
        return human_eval_tasks.find(request.limit, request.confirm_run_unsafe_code)
    if not path_named(name, "--task").exists():
        raise UserError(
            f"--task {excerpt(name)}: expected a file, {human_eval_tasks.NAME}, {reasoning_gym_tasks.PREFIX}NAME or "
            f"{lm_eval_tasks.PREFIX}NAME"
        )
    return file_tasks.find(name, request.limit)


def _load(request: EvaluateRequest, adapted: Adapted) -> Any:
    if not request.dense:
        return adapted.load_to_answer()
    from ..decoding import prepare_to_answer
    from ..models.adapter_files import load

    source = adapted.source
    if is_4bit(source):
        raise UserError(f"--dense: {source.name} was saved in 4 bits; name a dense model, or omit --dense")
    dtype, device = parse_dtype(request.dtype), parse_device(request.device)
    model = load_dense(source, dtype, device, parse_computing_dtype(request.dtype, device))
    return prepare_to_answer(model if adapted.adapter is None else load(model, adapted.adapter, request.force))


@contextlib.contextmanager
def _claimed(request: EvaluateRequest, adapted: Adapted) -> Iterator[OutputFile | None]:
    if request.output is None:
        yield None
        return
    with claim_file(request.output, request.overwrite, ".jsonl", MARK) as output:
        output.protect("--model", request.model, adapted.source.on_disk)
        output.protect("--adapter", request.adapter, None if adapted.adapter is None else str(adapted.adapter))
        for task in request.tasks:
            output.protect("--task", task)
        yield output


def _unfinished(path: pathlib.Path, head: dict[str, Any]) -> AnswerFile:
    """The answers of an interrupted run of the same command.

    Raises:
        UserError: the file is damaged, or has answers of another run.
    """
    file = AnswerFile.read(path)
    for name in ("tasks", "options"):
        _require_same(path, file, name, head[name], f"other {name}")
    return file


def _require_same(path: pathlib.Path, file: AnswerFile, name: str, value: Any, other: str) -> None:
    if file.head[name] != value:
        raise UserError(f"--output {printable(path)}: has answers of {other}; name another file, or add --overwrite")


def _answer(request: EvaluateRequest) -> AnswerFile:
    """Asks all questions that have no answers yet."""
    found = {name: _find(name, request) for name in request.tasks}
    adapted = find_adapted(request)
    options = {name: value for name, value in dataclasses.asdict(request).items() if name not in _FREE}
    head = {"model": adapted.source.name, "adapter": request.adapter, "tasks": [*request.tasks], "options": options}
    with _claimed(request, adapted) as output:
        path = None if output is None else output.path
        file = None
        if output is not None and path is not None and path.exists():
            if request.overwrite:
                output.check()
            else:
                file = _unfinished(path, head)
        model = _load(request, adapted)
        head["digest"] = digest_of_model(model)
        if file is None:
            file = AnswerFile.begin(head, path)
        else:
            assert path is not None
            _require_same(path, file, "digest", head["digest"], "another model or adapter")
            file.repair()
        pending = []
        for name, task in found.items():
            if task is not None:
                done = file.start(name, len(task.questions), task.digest).records
                pending += [(task, i) for i in range(len(task.questions)) if i not in done]
        from .answering import answered

        records = answered(
            model, adapted.tokenizer, pending,
            system=request.system, max_new_tokens=request.max_new_tokens, temperature=request.temperature,
            seed=request.seed, sequences=request.sequences, compiled=COMPILED[request.compile],
            progress=lambda text: print(text, file=sys.stderr),
        )  # fmt: skip
        with counted("answering") as progress:
            for i, record in enumerate(records, 1):
                file.add(record)
                progress(i, len(pending), record["task"])
        for name in [name for name, task in found.items() if task is None and name not in file.tasks]:
            lines = lm_eval_tasks.answers(
                name, model, adapted.tokenizer, limit=request.limit, seed=request.seed, sequences=request.sequences,
                unsafe=request.confirm_run_unsafe_code,
            )  # fmt: skip
            for line in lines:
                file.add(line)
        file.require_complete()
        return file


def _summary(name: str, answers: Answers) -> dict[str, Any]:
    return {
        "task": name,
        "questions": answers.questions,
        "correct": answers.correct,
        "accuracy": answers.correct / answers.questions,
        "interval": list(wilson(answers.correct, answers.questions)),
        "mean_score": sum(answers.scores) / len(answers.scores),
    }


def run(request: EvaluateRequest) -> dict[str, Any]:
    """Runs ``evaluate``, and returns what ``--json`` prints."""
    file = _answer(request)
    return {
        "model": file.head["model"],
        "adapter": file.head["adapter"],
        "interval": f"Wilson, {LEVEL:.0%}",
        "tasks": [_summary(name, file.tasks[name]) for name in request.tasks],
        "answers": request.output,
    }


def evaluate(**options: Any) -> dict[str, Any]:
    """Asks a model the questions of tasks and counts its right answers, like the command ``qlora-ext evaluate``.

    Args:
        options: the options of the command, with underscores: ``model="MODEL"``, ``adapter="RUN"``,
            ``tasks=["gym:chain_sum", "questions.jsonl"]``, ``limit=200``, ``output="answers.jsonl"``. None stands for
            the default.

    Returns:
        What the command prints with ``--json``: for each of the ``tasks`` the number of ``questions`` and ``correct``
        answers, the ``accuracy``, its 95% confidence ``interval`` by Wilson's method, and the ``mean_score``.

    Raises:
        TypeError: an option is unknown, or its value has a wrong type.
        ValueError: an argument is out of range, a task does not exist or its package is not installed, or a file is
            missing or damaged, or has answers of another run. The message names the argument.
        ImportError: a required library is missing.

    Example:
        >>> def accuracy(model):
        ...     found = qlora_app.evaluate(model=model, tasks=["gym:chain_sum:max_terms=3"], limit=50)
        ...     return found["tasks"][0]["accuracy"], found["tasks"][0]["interval"]
        >>> qlora_app.evaluate(model="M", tasks=[])
        Traceback (most recent call last):
        ValueError: task: expected a task, such as gym:chain_sum, humaneval or answers.jsonl
    """
    try:
        given = keywords_of("evaluate", EvaluateRequest, options)
        return run(EvaluateRequest(**{**given, "tasks": tuple(given.get("tasks", ()))}))
    except UserError as error:
        raise ValueError(as_arguments(str(error))) from error
