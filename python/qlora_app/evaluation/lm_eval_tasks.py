"""The tasks of lm-eval, EleutherAI's evaluation harness, with our model as its model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qlora_ext.untrusted import excerpt, read_text

from ..errors import UserError, first_line, path_named
from .tasks import digest_of

PREFIX = "lm-eval:"


def check_installed(name: str) -> None:
    """Rejects the task without the package.

    Raises:
        UserError: it is not installed.
    """
    try:
        import lm_eval.evaluator  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--task {excerpt(name)}: lm-eval is not installed here ({first_line(error)}); install with: "
            "pip install lm-eval"
        ) from error


def answers(
    name: str, model: Any, tokenizer: Any, *, limit: int | None, seed: int, sequences: int, unsafe: bool
) -> Iterator[dict[str, Any]]:
    """The line of the task ``lm-eval:NAME`` and of each answer, for an ``AnswerFile``.

    The answer is right by the first metric of the task that is 0 or 1 for each question.

    Args:
        name: NAME is a task of lm-eval, or its .yaml file.
        unsafe: whether the user has agreed to run the model's programs.

    Raises:
        UserError: lm-eval does not know the task or cannot load its data, or it has no such metric.
    """
    import yaml
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    task: Any = name.removeprefix(PREFIX)
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), seed)
    try:
        if task.endswith(".yaml"):
            task = yaml.safe_load(read_text(path_named(task, "--task")))
        found: Any = simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=sequences), tasks=[task], limit=limit,
            bootstrap_iters=0, confirm_run_unsafe_code=unsafe, **seeds,
        )  # fmt: skip
    except Exception as error:  # its tasks are configurations, whose data come from the hub
        raise UserError(f"--task {excerpt(name)}: lm-eval: {first_line(error)}") from error
    samples = [sample for each in found["samples"].values() for sample in each if sample["filter"] == each[0]["filter"]]
    metric = next((metric for metric in samples[0]["metrics"] if _is_binary(samples, metric)), None)
    if metric is None:
        raise UserError(f"--task {excerpt(name)}: expected a metric that is 0 or 1 for each question, found none")
    asked = [[sample["arguments"], sample["target"]] for sample in samples]
    yield {"task": name, "questions": len(samples), "digest": digest_of(asked), "metric": metric}
    for i, sample in enumerate(samples):
        score = float(sample[metric])
        answer = str(sample["filtered_resps"])
        yield {"task": name, "id": i, "answer": answer, "score": score, "correct": score == 1}


def _is_binary(samples: list[dict[str, Any]], metric: str) -> bool:
    return all(isinstance(sample.get(metric), int | float) and sample[metric] in (0, 1) for sample in samples)
