"""The first phase of a run: checks all inputs and encodes the data, before the model's weights are read."""

from __future__ import annotations

import importlib.util
import pathlib
from typing import Any

from qlora_ext.untrusted import excerpt, printable

from ..data import (
    Parts,
    check_template,
    is_labelled,
    is_preference,
    is_prompt,
    read_examples,
    split,
    split_prompts,
    summary,
)
from ..errors import UserError
from ..models.adapter_files import check_files, config_of, find
from ..models.devices import parse_device
from ..models.pretrained import load_config, load_tokenizer
from ..models.sources import resolve
from ..options import flag
from ..outputs.directory import Output
from ..outputs.ownership import foreign_in_adapter
from . import adapting
from .checkpoints import newest_checkpoint
from .identity import digest_of_examples, digest_of_files, digest_of_rows
from .reward_function import digest_of_rewards, find_rewards
from .run import SETTINGS, Request, Run, Shared
from .settings import NO_NEFTUNE, OF_TEACHER, Settings, given, read_settings, resumed


def prepare(request: Request, output: Output, shared: Shared | None = None) -> Run:
    """The run for ``request`` in ``output``, with its rows to train on.

    Args:
        shared: with the other runs of a sweep.

    Raises:
        UserError: the request is invalid.
    """
    typed = given(request.options, request.resume)
    run = _find(request, typed, output, Shared() if shared is None else shared)
    s = run.settings
    _check_method(run, typed)
    _check_init_adapter(run, typed)
    digest = run.shared.once(("digest", s.data, s.split), lambda: digest_of_examples(run.examples))
    run.identify("data", digest, f"--data {s.data}")
    config = load_config(run.source)
    largest = run.shared.once(
        ("adapter", s.target_modules, s.layers, s.modules_to_save),
        lambda: adapting.check_without_weights(run.source, config, s),
    )
    if largest is not None and s.rank > largest and not s.init_adapter:
        run.report(
            f"note: --rank {s.rank} is larger than the layers, whose weights have at most rank {largest}: the adapter "
            "takes more memory without learning more"
        )
    if s.max_memory and not run.resumes:  # a resumed run keeps its options
        from .fitting import fit

        run.settings, chosen = fit(s, config, run.source, run.device)
        run.report(chosen)
    _encode(run)
    if s.teacher:
        from .teacher import find_teacher

        find_teacher(run, config, "teacher" in typed)
    from .train import arguments_of

    run.arguments = arguments_of(run)
    return run


def _find(request: Request, typed: dict[str, Any], output: Output, shared: Shared) -> Run:
    """Finds the settings and inputs of the run, and checks them against each other."""
    directory = output.path
    begun = (directory / SETTINGS).is_file()
    resumes = request.resume and begun
    if request.resume and not begun and (directory.parent / SETTINGS).is_file():
        raise UserError(f"--output {directory} is inside the run {directory.parent}; name the run with --output")
    if request.resume and not begun:
        request.begin_anew()
    if not typed and not request.resume:
        print(
            "no options: running a demonstration (SmolLM2-135M on conversations), which takes about 4 minutes on a "
            "CPU; Ctrl-C stops it at any time"
        )
    longer = False
    if resumes:
        recorded = read_settings(directory / SETTINGS)
        settings = resumed(recorded, typed)
        longer = getattr(settings, settings.longer) > getattr(resumed(recorded, {}), settings.longer)
    else:
        settings = Settings(**typed)
        if begun and not request.overwrite:
            raise UserError(
                f"--output {directory} already has a run; add --resume to continue it, or --overwrite to start over"
            )
    if request.rewards and settings.method != "grpo":
        raise UserError("--reward is an option of --method grpo")
    device = parse_device(settings.device)
    source = resolve(settings.model, request.trust_remote_code, trusted=not resumes or "model" in typed)
    output.protect("--model", settings.model, source.on_disk)
    output.protect("--data", settings.data)
    if resumes:
        _check_adapter(directory)
    else:
        output.check()
    checkpoint = newest_checkpoint(directory) if resumes else None
    if source.directory is None and source.gguf_file is None:
        load_config(source)  # checks that the hub has the model before the data are read
    prompts = settings.method == "grpo"
    examples = shared.once(
        ("examples", settings.data, settings.split, prompts),
        lambda: read_examples(settings.data, settings.split, prompts),
    )
    return Run(request, output, settings, source, device, examples, resumes, longer, checkpoint, shared=shared)


def _check_adapter(run: pathlib.Path) -> None:
    """Rejects resuming a run if the adapter directory that it would replace holds foreign files."""
    adapter = run / "adapter"
    foreign = "adapter" if adapter.is_symlink() else foreign_in_adapter(adapter) if adapter.is_dir() else None
    if foreign is not None:
        raise UserError(
            f"--resume: {adapter} holds {foreign!a}, which qlora-ext did not write and does not delete; "
            "move it elsewhere"
        )


def _check_method(run: Run, typed: dict[str, Any]) -> None:
    s, first, name = run.settings, run.examples[0], run.method.upper()
    if s.method == "grpo":
        _check_rewards(run)
        return
    if not s.student_samples and (given := [flag(name) for name in ("max_new_tokens", "temperature") if name in typed]):
        raise UserError(f"{given[0]} is an option of --method grpo, and of distill with --student-samples")
    if "generations" in typed:
        raise UserError("--generations is an option of --method grpo")
    if not s.teacher and (given := [flag(name) for name in OF_TEACHER if name in typed]):
        raise UserError(f"{given[0]} is an option of --method distill")
    if "beta" in typed and not run.preferences:
        raise UserError(f"--beta is an option of DPO, KTO and GRPO, but this run only learns answers ({run.method})")
    if s.method == "dpo" and not is_preference(first):
        raise UserError(f"--method dpo: expected preferences in --data {s.data}: rows with prompt, chosen and rejected")
    if s.method == "kto" and not is_labelled(first):
        raise UserError(f"--method kto: expected labels in --data {s.data}: rows with prompt, completion and label")
    if run.preferences:
        if s.no_packing:
            raise UserError(f"--no-packing: {name} never packs rows")
        if s.neftune_alpha:
            raise UserError(NO_NEFTUNE)
        if importlib.util.find_spec("trl") is None:
            what, learnt = ("preferences", "chosen") if name == "DPO" else ("labels", "good")
            raise UserError(
                f"--data {s.data} has {what}, which need TRL ({name}); install it with: pip install 'trl>=1.16', or "
                f"train on the {learnt} answers only, with --method sft"
            )
        if s.max_memory:
            raise UserError(f"--max-memory: the planner does not support {name}")
        if s.chunked_loss:
            raise UserError(f"--chunked-loss: not supported with {name}, which has its own loss")
    if name == "KTO" and s.batch_size == 1:
        raise UserError(
            "--batch-size 1: expected at least 2 with KTO, which estimates how far the model is from its base (the KL "
            "divergence) on questions with the answers of other rows of the batch"
        )


def _check_rewards(run: Run) -> None:
    """Finds the reward functions. A resumed run needs them again."""
    if not run.request.rewards:
        again = " again: the run does not record which code to run" if run.resumes else ""
        raise UserError(f"--method grpo: expected --reward FILE.py:FUNCTION{again}")
    if importlib.util.find_spec("trl") is None:
        raise UserError("--method grpo needs TRL; install it with: pip install 'trl>=1.16'")
    run.rewards = find_rewards(run.request.rewards)
    run.identify("reward", digest_of_rewards(run.rewards), "--reward")


def _check_init_adapter(run: Run, typed: dict[str, Any]) -> None:
    """Checks the adapter of ``--init-adapter``, which determines what is trained."""
    name = run.settings.init_adapter
    if not name:
        return
    if own := [flag(key) for key in adapting.OWN if key in typed]:
        raise UserError(f"{own[0]}: the adapter of --init-adapter has its own; leave the option out")
    path = find(name, "--init-adapter")
    run.output.protect("--init-adapter", name, str(path))
    config = config_of(path)
    if config.get("peft_type") != "LORA":
        kind = excerpt(str(config.get("peft_type")))
        raise UserError(f"--init-adapter {name}: expected an adapter of PEFT's LoRA, got one of {kind}")
    check_files(path)
    digest = digest_of_files(path / "adapter_config.json", path / "adapter_model.safetensors")
    run.identify("adapter", digest, f"--init-adapter {name}")


def _encode(run: Run) -> None:
    """Encodes the examples with the model's tokenizer."""
    s = run.settings
    run.tokenizer = run.shared.once("tokenizer", lambda: load_tokenizer(run.source))
    options = (s.seq_len, s.train_rows, s.eval_size, s.seed, run.preferences, s.first_rows, not s.no_packing)
    parts = run.parts = run.shared.once(("rows", s.data, s.split, *options), lambda: _split(run, options))
    steps = s.steps(len(parts.train))
    first = run.examples[0]
    kinds = {"dpo": "pairs", "kto": "answers", "grpo": "prompts"}
    kind = kinds.get(run.method, f"rows of at most {s.seq_len} tokens")
    rows = steps * s.step_rows // (s.generations if is_prompt(first) else 1)
    run.report(
        f"rows  {len(parts.train):,} {kind} to train on, {rows / len(parts.train):.2f} times in "
        f"{steps:,} steps; {len(parts.held_out)} examples held out"
    )
    if run.method == "kto":
        _check_labels(run)
    # An extended run has more rows than at its start; the digest covers the original ones.
    begun_with = parts.train[: s.first_rows] if s.former_steps and not is_prompt(first) else parts.train
    digest = digest_of_rows(begun_with, parts.held_out)
    run.identify("rows", digest, f"tokens that --model {run.source.name} makes of --data {s.data}")


def _check_labels(run: Run) -> None:
    """Reports how many answers to train on are good and bad.

    Raises:
        UserError: there is only one, and KTO compares each with another.
    """
    labels = [bool(row["label"][0]) for row in run.parts.train]
    if len(labels) < 2:
        raise UserError(f"--data {run.settings.data}: expected at least two answers with a label to train on, got one")
    good = sum(labels)
    run.report(f"      {good:,} with the label true (good), {len(labels) - good:,} with false (bad)")
    if good == 0:
        run.report("note: all these labels are false: KTO only makes the answers less likely, and learns no good ones")
    elif good == len(labels):
        run.report("note: all these labels are true: KTO learns no bad answers; --method sft learns good ones alone")


def _split(run: Run, options: tuple[Any, ...]) -> Parts:
    s, first = run.settings, run.examples[0]
    kinds = {"prompts": is_prompt, "preferences": is_preference, "labelled answers": is_labelled}
    what = next((name for name, fits in kinds.items() if fits(first)), "examples")
    run.report(f"model {printable(run.source.name)}\ntext  {printable(s.data)} ({len(run.examples):,} {what})")
    check_template(run.tokenizer, run.examples, s.data, run.source.name)
    if is_prompt(first):
        parts = split_prompts(run.tokenizer, run.examples, s.seq_len - s.max_new_tokens, s.eval_size, s.seed)
    else:
        parts = split(run.tokenizer, run.examples, *options)
    for reason in summary(parts.counts, s.seq_len):
        run.report(f"      {reason}")
    return parts
