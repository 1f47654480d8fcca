"""``qlora-ext finetune``: a 4-bit model, LoRA adapters, text; out comes a PEFT adapter."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import math
import pathlib
import sys
from typing import TYPE_CHECKING, Any

from .._outside import Schema, printable, read_json
from . import adapter as adapters
from . import settings as options
from . import whole
from .data import Example, read_examples, split
from .errors import UserError, first_line
from .files import need_space, new_directory, remove, staged_directory, write_json, write_json_lines
from .generate import add_trust_option
from .models import (
    PACKAGE,
    ModelSource,
    load_quantized,
    load_tokenizer,
    parse_device,
    parse_dtype,
    resolve,
    weigh,
)
from .settings import Settings

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from .training import QLoRATrainer

DEFAULT_OUTPUT = "qlora-run"
_SAMPLE_TOKENS = 40
_BEFORE: Schema = {"loss": float, "perplexity": float, "prompt": str, "sample": str}


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "finetune",
        help="train LoRA adapters on a 4-bit model",
        description="Quantizes a language model to 4 bits (NF4, double quantization), trains LoRA adapters on it, and "
        "saves them as a PEFT adapter. With no options: SmolLM2-135M-Instruct on human conversations.",
        epilog="A run that was stopped, in whatever way, goes on from its last checkpoint with --resume (other "
        "options need not be repeated) and ends with the same adapter, bit for bit.",
    )
    parser.add_argument(
        "--output", default=DEFAULT_OUTPUT, metavar="DIR", help="directory of the run (default: %(default)s)"
    )
    parser.add_argument("--resume", action="store_true", help="go on with the run in --output")
    parser.add_argument("--overwrite", action="store_true", help="replace what is in --output")
    add_trust_option(parser)  # not one of the settings: it is to be said of every run, resumed ones too
    options.add_options(parser)
    parser.set_defaults(run=run)


@dataclasses.dataclass
class _Run:
    """A run directory: ``settings.json``, checkpoints, ``metrics.jsonl``, ``loss.png`` and ``adapter/``."""

    directory: pathlib.Path
    settings: Settings
    source: ModelSource
    examples: list[Example]
    resume: bool

    @property
    def begun(self) -> pathlib.Path:
        return self.directory / "settings.json"

    @property
    def before(self) -> pathlib.Path:
        return self.directory / "before.json"

    @property
    def adapter(self) -> pathlib.Path:
        return self.directory / "adapter"

    @property
    def metrics(self) -> pathlib.Path:
        return self.directory / "metrics.jsonl"


def _prepare(arguments: argparse.Namespace) -> _Run:
    """Checks everything that can be checked before the model is loaded."""
    directory = pathlib.Path(arguments.output).expanduser().resolve()
    typed = options.given(arguments)
    if arguments.resume and arguments.overwrite:
        raise UserError("--resume and --overwrite ask for opposite things")
    resume = arguments.resume and (directory / "settings.json").is_file()
    if resume:
        settings = options.resumed(options.read(directory / "settings.json"), typed)
    else:
        settings = Settings(**typed)
        if (directory / "settings.json").is_file() and not arguments.overwrite:
            raise UserError(
                f"--output {directory} holds a run already; add --resume to go on with it, or --overwrite to start anew"
            )
        new_directory(directory, arguments.overwrite)
    parse_device(settings.device)
    source = resolve(settings.model, arguments.trust_remote_code)
    examples = read_examples(settings.data)
    return _Run(directory, settings, source, examples, resume)


def _begin(run: _Run) -> None:
    """Makes the run directory, once nothing but training is left that could be refused."""
    if run.resume:
        return
    remove(run.directory)
    recorded = {**dataclasses.asdict(run.settings), "model": run.source.name}
    if not run.settings.data.startswith(PACKAGE):
        recorded["data"] = str(pathlib.Path(run.settings.data).expanduser().resolve())
    with staged_directory(run.directory) as partial:
        write_json(partial / run.begun.name, recorded)


def _check_targets(model: Any, targets: str) -> str | list[str]:
    if targets == "all-linear":
        return targets
    import torch

    linears = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)})
    names = [name.strip() for name in targets.split(",") if name.strip()]
    modules = [name for name, _ in model.named_modules()]
    for name in names:
        if not any(module == name or module.endswith("." + name) for module in modules):
            raise UserError(
                f"--target-modules {name}: no layer of the model has that name; there are {', '.join(linears)}"
            )
    if not names:
        raise UserError(f"--target-modules: no name given; there are {', '.join(linears)}")
    return names


def _add_adapter(model: Any, run: _Run) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    s = run.settings
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=s.rank,
        lora_alpha=s.alpha,
        lora_dropout=s.dropout,
        target_modules=_check_targets(model, s.target_modules),
    )
    set_seed(s.seed)
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"--target-modules {s.target_modules}: {first_line(error)}") from error
    adapted.peft_config["default"].base_model_name_or_path = run.source.name
    return adapted


def _sample(model: Any, tokenizer: Any, rows: list[dict[str, list[int]]]) -> tuple[str, str]:
    """The beginning of a held-out row, and how the model goes on.

    That is the row with the most to say before learning begins; of a plain text, its first tokens.
    """
    from .generate import complete

    def asked(row: dict[str, list[int]]) -> int:
        return next(i for i, label in enumerate(row["labels"]) if label != -100)

    row = max(rows, key=asked)
    prompt = row["input_ids"][: asked(row) or max(1, min(24, len(row["input_ids"]) // 2))]
    return tokenizer.decode(prompt, skip_special_tokens=True), complete(model, tokenizer, prompt, _SAMPLE_TOKENS)


def _show_sample(console: Console, title: str, prompt: str, answer: str) -> None:
    from rich.panel import Panel
    from rich.text import Text

    text = Text(printable(prompt.strip()[-300:], lines=True), style="dim")
    text.append("\n" + printable(answer.strip(), lines=True), style="not dim")
    console.print(Panel(text, title=title, title_align="left"))


def _load(run: _Run, console: Console, device: torch.device) -> tuple[Any, Any]:
    text = f"{printable(run.settings.data)} ({len(run.examples)} examples)"
    console.print(f"model {printable(run.source.name)}\ntext  {text}")
    tokenizer = load_tokenizer(run.source)
    model = load_quantized(run.source, parse_dtype(run.settings.dtype), device, run.settings.block_size)
    weights = weigh(model)
    console.print(
        f"weights {weights.dense_bytes / 1e6:.1f} MB in {run.settings.dtype} -> {weights.bytes / 1e6:.1f} MB in 4 bits "
        f"({weights.dense_bytes / weights.bytes:.2f} times smaller; embeddings, which stay as they are, included)"
    )
    model = _add_adapter(model, run)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = weights.parameters + trainable
    console.print(f"trainable parameters {trainable:,} of {total:,} ({100 * trainable / total:.2f}%)")
    return model, tokenizer


def _measure_before(run: _Run, trainer: QLoRATrainer, model: Any, tokenizer: Any) -> dict[str, Any]:
    """Held-out perplexity and a sample of the untrained model: measured once a run, and kept for one that goes on."""
    if run.before.is_file():
        before: dict[str, Any] = read_json(run.before, _BEFORE)
        return before
    prompt, answer = _sample(model, tokenizer, trainer.held_out)
    loss = trainer.held_out_loss()
    before = {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "prompt": prompt, "sample": answer}
    write_json(run.before, before)
    return before


def _save_adapter(run: _Run, model: Any, metrics: dict[str, Any]) -> None:
    from .. import __version__

    record = {
        "model": run.source.name,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "version": __version__,
        "settings": dataclasses.asdict(run.settings),
        "metrics": metrics,
    }
    with staged_directory(run.adapter) as partial:
        model.save_pretrained(str(partial))
        write_json(partial / adapters.RECORD, record)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; see the module's text."""
    job = _prepare(arguments)
    from rich.console import Console

    from .loss import check_chunked_loss
    from .progress import ProgressCallback, measured, plot_loss
    from .training import QLoRATrainer, last_checkpoint, train, training_arguments

    console = Console(highlight=False, markup=False, soft_wrap=not sys.stdout.isatty())
    s = job.settings
    device = parse_device(s.device)
    model, tokenizer = _load(job, console, device)
    if s.chunked_loss:
        check_chunked_loss(model)
    recipe = training_arguments(s, job.directory, device)
    rows, held_out = split(
        tokenizer, job.examples, s.seq_len, s.max_steps * s.batch_size * s.grad_accum, s.eval_size, s.seed
    )
    whole.check_tokens(model, [row["input_ids"] for row in (*rows, *held_out)])
    _begin(job)
    # A checkpoint is the adapter and two moments of it; three exist for a moment, and the adapter at the end.
    trainable_bytes = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    need_space(job.directory, 10 * trainable_bytes + (4 << 20), "the run's checkpoints")
    trainer = QLoRATrainer(
        model,
        recipe,
        rows,
        held_out,
        chunked=s.chunked_loss,
    )
    before = _measure_before(job, trainer, model, tokenizer)
    progress = ProgressCallback(console, job.metrics, measured(0, before["loss"]))
    trainer.add_callback(progress)
    console.print(f"held-out perplexity before training {before['perplexity']:.2f} ({len(held_out)} examples)")
    _show_sample(console, "before training", before["prompt"], before["sample"])
    checkpoint = last_checkpoint(job.directory) if arguments.resume else None
    if arguments.resume:
        console.print(f"going on after step {checkpoint[1]}" if checkpoint else "no checkpoint yet: starting at step 0")
    try:
        train(trainer, checkpoint and checkpoint[0])
    except KeyboardInterrupt:
        kept = last_checkpoint(job.directory)
        at = f"step {kept[1]} is saved" if kept else "no checkpoint was due yet"
        raise KeyboardInterrupt(f"{at}; go on with: qlora-ext finetune --output {job.directory} --resume") from None
    finally:
        progress.close()
    end = measured(trainer.state.global_step, trainer.held_out_loss())
    after = end["eval_perplexity"]
    steps = [line for line in trainer.state.log_history if "loss" in line or "eval_loss" in line]
    history = [progress.before, *(line for line in steps if "loss" in line or line["step"] < end["step"]), end]
    write_json_lines(job.metrics, history)
    metrics = {"steps": end["step"], "perplexity_before": before["perplexity"], "perplexity_after": after}
    _save_adapter(job, model, metrics)
    plot_loss(history, job.directory / "loss.png", f"{pathlib.Path(s.model).name} on {pathlib.Path(s.data).name}")
    console.print(f"held-out perplexity {before['perplexity']:.2f} before -> {after:.2f} after training")
    _show_sample(console, "after training", *_sample(model, tokenizer, held_out))
    console.print(f"adapter {job.adapter}\nmetrics {job.metrics}\ncurve   {job.directory / 'loss.png'}")
    console.print(f'try it: qlora-ext generate --adapter {job.adapter} --prompt "..."')
    return 0
