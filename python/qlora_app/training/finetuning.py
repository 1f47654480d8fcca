"""``qlora_app.finetune``: the command ``finetune`` as a Python function."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, overload

from qlora_ext.untrusted import FileError, excerpt

from ..errors import UserError, as_arguments, path_named
from ..options import keywords_of
from . import sweep as sweeping
from .reward_function import Reward
from .run import Finetuned, Request
from .settings import Settings
from .sweep import Swept
from .sweep_options import checked


def _values(sweep: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    """The values to vary.

    Raises:
        TypeError: a value has a wrong type.
    """
    if not isinstance(sweep, Mapping):
        raise TypeError(f"sweep: expected a mapping of options to lists of values, got {type(sweep).__name__}")
    try:
        return checked(sweep)
    except FileError as error:
        raise TypeError(as_arguments(str(error))) from None


def _rewards(reward: str | Reward | Sequence[str | Reward] | None) -> Sequence[str | Reward]:
    """The reward functions, or their names.

    Raises:
        TypeError: one is neither.
    """
    rewards: Any = reward if isinstance(reward, list | tuple) else [] if reward is None else [reward]
    for found in rewards:
        if not isinstance(found, str) and not callable(found):
            raise TypeError(f"reward: expected a function, its name, or a list of these, got {excerpt(found)}")
    return tuple(rewards)


@overload
def finetune(
    *,
    output: str | os.PathLike[str],
    model: str | os.PathLike[str] | None = None,
    data: str | os.PathLike[str] | None = None,
    sweep: None = None,
    resume: bool = False,
    overwrite: bool = False,
    force: bool = False,
    trust_remote_code: bool = False,
    reward: str | Reward | Sequence[str | Reward] | None = None,
    **options: Any,
) -> Finetuned: ...


@overload
def finetune(
    *,
    output: str | os.PathLike[str],
    model: str | os.PathLike[str] | None = None,
    data: str | os.PathLike[str] | None = None,
    sweep: Mapping[str, Sequence[Any]],
    resume: bool = False,
    overwrite: bool = False,
    force: bool = False,
    trust_remote_code: bool = False,
    **options: Any,
) -> Swept: ...


def finetune(
    *,
    output: str | os.PathLike[str],
    model: str | os.PathLike[str] | None = None,
    data: str | os.PathLike[str] | None = None,
    sweep: Mapping[str, Sequence[Any]] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    force: bool = False,
    trust_remote_code: bool = False,
    reward: str | Reward | Sequence[str | Reward] | None = None,
    **options: Any,
) -> Finetuned | Swept:
    """Trains LoRA adapters on a 4-bit model, like the command ``qlora-ext finetune``, with the same output bit for bit.

    It prints what the command prints. ``docs/finetune.md`` explains the options, ``docs/data.md`` the data.

    Args:
        output: directory of the run, which is created. Its subdirectory ``adapter`` is a PEFT adapter.
        model: a model directory, a .gguf file, a hub name, or package:NAME; the default is SmolLM2-135M-Instruct.
        data: a file (.jsonl, .json, .csv, .tsv, .parquet, .txt), a directory of such files, a dataset of the hub, or
            package:NAME; the default is human conversations. A row is a text, a pair of prompt and completion, a
            conversation, a preference (learnt with DPO), or a pair with a label (learnt with KTO).
        sweep: lists of values of some options, such as ``{"lr": [1e-4, 2e-4], "rank": [8, 16]}``. Trains an adapter
            with each combination of them, one after the other over one base in memory.
        resume: continue the run in ``output`` from its last checkpoint; other arguments need not be repeated, except
            ``sweep``. A sweep continues with the adapter that was interrupted.
        overwrite: replace what an earlier run wrote to ``output``. Other files are never deleted.
        force: with ``resume``, continue even if the base or the data have changed.
        trust_remote_code: run Python code that comes with the model.
        reward: with ``method="grpo"``, a function that takes ``completions``, a list of texts, and the columns of the
            data by keyword, and returns a number per answer; or its name as FILE.py:FUNCTION; or a list of several,
            whose rewards are added up. A resumed run needs them again.
        options: the options of the command, with underscores: ``rank=8``, ``max_steps=200``, ``lr=1e-4``,
            ``grad_checkpointing=True``, ``max_memory="8GB"``, ``method="distill", teacher="LARGER"``. None stands for
            the default.

    Returns:
        The run's directory, its adapter's directory, and the metrics: ``steps``, and ``loss_before``, ``loss_after``,
        ``perplexity_before`` and ``perplexity_after`` on the held-out rows. With ``sweep``, a ``Swept``: the directory,
        the ``runs`` of the adapters by name, such as ``"lr=0.0001,rank=8"``, and the name of the ``best`` one.

    Raises:
        TypeError: an option is unknown, or its value has a wrong type.
        ValueError: an argument is out of range, contradicts another, or names a file that is missing or damaged; or
            memory or the disk are too small. The message names the argument.
        ImportError: a required library is missing.

    Example:
        >>> def learn(directory, data):
        ...     run = qlora_app.finetune(model=directory, data=data, output="run", rank=8, epochs=1.0, seq_len=512)
        ...     print(run.metrics["perplexity_before"], run.metrics["perplexity_after"])
        ...     return peft.AutoPeftModelForCausalLM.from_pretrained(run.adapter)
        >>> qlora_app.finetune(output="run", rank=0)
        Traceback (most recent call last):
        ValueError: rank 0: expected a value of at least 1 and below 2147483648
    """
    given = keywords_of("finetune", Settings, {"model": model, "data": data, **options})
    try:
        if sweep is None and resume and sweeping.is_sweep(path_named(os.fspath(output), "--output")):
            raise UserError(f"output {os.fspath(output)} has a sweep; give its values with sweep, to resume it")
        values = None if sweep is None else _values(sweep)
        return sweeping.run(
            Request(given, os.fspath(output), resume, overwrite, force, trust_remote_code, _rewards(reward), values)
        )
    except UserError as error:
        raise ValueError(as_arguments(str(error))) from error
