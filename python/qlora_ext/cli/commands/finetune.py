"""``qlora-ext finetune``: a 4-bit model, LoRA adapters, text; out comes a PEFT adapter."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.util
import pathlib
import shlex
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..._internal.untrusted import Schema, excerpt, printable, read_json
from ..data import Example, Parts, Row, check_template, is_preference, read_examples, split, told
from ..errors import UserError
from ..generation.completion import complete
from ..models import validate_model
from ..models.adapter_files import RECORD, check_files, config_of, find
from ..models.conversion import four_bit_directory, is_quantized
from ..models.devices import name_of, parse_computing_dtype, parse_device, parse_dtype
from ..models.loading import Loader
from ..models.pretrained import load_config, load_tokenizer
from ..models.size import dense_share, model_size
from ..models.sources import PACKAGE, ModelSource, resolve
from ..options import DEFAULT_RUN, add_trust_option
from ..outputs.directory import Output, claim, read_marker
from ..outputs.files import need_space, staged_directory, write_json, write_json_lines
from ..outputs.ownership import foreign_in_adapter
from ..training import adapting
from ..training.checkpoints import checkpoints, newest_checkpoint, step_of
from ..training.identity import check_same, digest_of_adapter, digest_of_examples, digest_of_model, digest_of_rows
from ..training.settings import NO_NEFTUNE_IN_DPO, Settings, add_options, flag, given, read_settings, resumed

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from ..training.trainer import RunTrainer

_SETTINGS = "settings.json"
_SAMPLE_TOKENS = 40
_COMPUTING = "compute_dtype"  # in the marker of a run's directory
_BEFORE: Schema = {"loss": float, "perplexity?": float, "reward_accuracy?": float, "prompt": str, "sample": str}


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "finetune",
        help="train LoRA adapters on a 4-bit model",
        description="Quantizes a language model to 4 bits (NF4, double quantization), trains LoRA adapters on it, and "
        "saves them as a PEFT adapter. With no options: SmolLM2-135M-Instruct on human conversations. Of data with "
        "chosen and rejected answers it learns the preference (DPO, by TRL).",
        epilog='A row of --data is {"text": ...}, a pair such as {"prompt": ..., "completion": ...}, a conversation '
        '{"messages": [{"role": ..., "content": ...}, ...]} or a preference {"prompt": ..., "chosen": ..., "rejected": '
        "...}; docs/data.md has all forms. A run that was stopped, in whatever way, goes on from its last checkpoint "
        "with --resume (other options need not be repeated) and ends with the same adapter, bit for bit. "
        "With --resume and a larger --max-steps (or --epochs) a finished run is trained further. --overwrite replaces "
        "what qlora-ext wrote, and nothing else. docs/finetune.md explains the options.",
    )
    parser.add_argument(
        "--output", default=DEFAULT_RUN, metavar="DIR", help="directory of the run (default: %(default)s)"
    )
    parser.add_argument("--resume", action="store_true", help="go on with the run in --output")
    parser.add_argument("--overwrite", action="store_true", help="replace what qlora-ext wrote to --output")
    parser.add_argument(
        "--force",
        action="store_true",
        help="with --resume: go on over another base or other data than it was begun with",
    )
    add_trust_option(parser)  # not one of the settings: it is to be said of every run, resumed ones too
    add_options(parser)
    parser.set_defaults(run=run)


@dataclasses.dataclass
class _Run:
    """A run directory: ``settings.json``, checkpoints, ``metrics.jsonl``, ``loss.png`` and ``adapter/``."""

    output: Output
    settings: Settings
    source: ModelSource
    examples: Sequence[Example]
    resume: bool
    force: bool
    checkpoint: pathlib.Path | None
    longer: bool = False  # whether this command extends the run
    digests: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def preferences(self) -> bool:
        """Whether DPO is what the run does."""
        return self.settings.method != "sft" and is_preference(self.examples[0])

    @property
    def directory(self) -> pathlib.Path:
        return self.output.path

    @property
    def before(self) -> pathlib.Path:
        return self.directory / "before.json"

    @property
    def adapter(self) -> pathlib.Path:
        return self.directory / "adapter"

    @property
    def metrics(self) -> pathlib.Path:
        return self.directory / "metrics.jsonl"


def _prepare(arguments: argparse.Namespace, output: Output) -> _Run:
    """Checks everything that can be checked before the model is loaded."""
    directory = output.path
    typed = given(arguments)
    begun = (directory / _SETTINGS).is_file()
    if arguments.resume and arguments.overwrite:
        raise UserError("--resume and --overwrite ask for opposite things")
    if arguments.force and not arguments.resume:
        raise UserError("--force goes with --resume: it accepts another base or other data")
    resume = arguments.resume and begun
    if arguments.resume and not begun and (directory.parent / _SETTINGS).is_file():
        raise UserError(f"--output {directory} lies in the run {directory.parent}; name that with --output")
    if not typed and not arguments.resume:
        print(
            "no option names a model, data or an adapter: this is a demonstration, SmolLM2-135M on conversations, of "
            "about 4 minutes on a CPU; Ctrl-C stops it at any time"
        )
    longer = False
    if resume:
        recorded = read_settings(directory / _SETTINGS)
        settings = resumed(recorded, typed)
        longer = getattr(settings, settings.longer) > getattr(resumed(recorded, {}), settings.longer)
    else:
        settings = Settings(**typed)
        if begun and not arguments.overwrite:
            raise UserError(
                f"--output {directory} holds a run already; add --resume to go on with it, or --overwrite to start anew"
            )
    parse_device(settings.device)
    source = resolve(settings.model, arguments.trust_remote_code, trusted=not resume or "model" in typed)
    output.protect("--model", settings.model, source.on_disk)
    output.protect("--data", settings.data)
    if resume:
        _check_adapter(directory)
    else:
        output.check()
    checkpoint = newest_checkpoint(directory) if resume else None
    if source.directory is None and source.gguf_file is None:
        load_config(source)  # checks that the hub has the model before the data are read
    examples = read_examples(settings.data, settings.split)
    run = _Run(output, settings, source, examples, resume, arguments.force, checkpoint, longer)
    _check_method(run, typed)
    _check_init_adapter(run, typed)
    _identify(run, "data", digest_of_examples(run.examples), f"--data {settings.data}")
    return run


def _check_adapter(run: pathlib.Path) -> None:
    """Rejects resuming a run if the adapter directory that it would replace holds foreign files."""
    adapter = run / "adapter"
    foreign = "adapter" if adapter.is_symlink() else foreign_in_adapter(adapter) if adapter.is_dir() else None
    if foreign is not None:
        raise UserError(
            f"--resume: {adapter} holds {foreign!a}, which qlora-ext did not write and does not delete; "
            "move it elsewhere"
        )


def _check_method(run: _Run, typed: dict[str, Any]) -> None:
    s = run.settings
    if "beta" in typed and not run.preferences:
        raise UserError("--beta belongs to DPO, and what is learnt here are answers, not preferences")
    if s.method == "dpo" and not run.preferences:
        raise UserError(f"--method dpo: expected preferences in --data {s.data}: rows with prompt, chosen and rejected")
    if run.preferences:
        if s.no_packing:
            raise UserError("--no-packing: preferences are never packed")
        if s.neftune_alpha:
            raise UserError(NO_NEFTUNE_IN_DPO)
        if importlib.util.find_spec("trl") is None:
            raise UserError(
                f"--data {s.data} holds preferences, which TRL learns (DPO); install it with: pip install 'trl>=1.16', "
                "or learn the chosen answers alone, with --method sft"
            )
        if s.max_memory:
            raise UserError("--max-memory: the planner knows runs that learn answers, not DPO")
        if s.chunked_loss:
            raise UserError("--chunked-loss: DPO has a loss of its own, which never holds all logits")


def _check_init_adapter(run: _Run, typed: dict[str, Any]) -> None:
    """Finds the adapter to go on from, which says itself what is trained."""
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
    _identify(run, "adapter", digest_of_adapter(path), f"--init-adapter {name}")


def _identify(run: _Run, what: str, digest: str, name: str) -> None:
    """Notes what a new run begins with, and checks that one that goes on has the same."""
    if run.resume:
        check_same(run.directory, name, read_marker(run.directory).get(what), digest, run.force)
    else:
        run.digests[what] = digest


def _begin(run: _Run) -> None:
    """Makes the run directory, once nothing but training is left that could be refused."""
    path = run.directory / _SETTINGS
    if run.longer:
        lengths = {key: getattr(run.settings, key) for key in (run.settings.longer, "former_steps")}
        write_json(path, {**read_settings(path), **lengths})
    if run.resume:
        return
    recorded = {**dataclasses.asdict(run.settings), "model": run.source.name}
    path = pathlib.Path(run.settings.data).expanduser()
    if not run.settings.data.startswith(PACKAGE) and path.exists():
        recorded["data"] = str(path.resolve())
    if run.settings.init_adapter:
        recorded["init_adapter"] = str(find(run.settings.init_adapter).resolve())
    with run.output.written("finetune", **run.digests) as partial:
        write_json(partial / _SETTINGS, recorded)


def _asked(row: Row) -> list[int]:
    """The tokens of a row before learning begins; of a plain text, its first ones."""
    if "prompt_ids" in row:
        return row["prompt_ids"]
    ids = row["input_ids"]
    learnt = next(i for i, label in enumerate(row["labels"]) if label != -100)
    return ids[: learnt or max(1, min(24, len(ids) // 2))]


def _sample(model: Any, tokenizer: Any, rows: list[Row]) -> tuple[str, str]:
    """What the held-out row with the most to say asks, and how the model goes on."""
    prompt = max(map(_asked, rows), key=len)
    return tokenizer.decode(prompt, skip_special_tokens=True), complete(model, tokenizer, prompt, _SAMPLE_TOKENS)


def _show_sample(console: Console, title: str, prompt: str, answer: str) -> None:
    from rich.panel import Panel
    from rich.text import Text

    text = Text(printable(prompt.strip()[-300:], lines=True), style="dim")
    text.append("\n" + printable(answer.strip(), lines=True), style="not dim")
    console.print(Panel(text, title=title, title_align="left"))


def _encode(run: _Run, console: Console) -> tuple[Any, Parts]:
    """The tokenizer, and the rows that it makes of the examples."""
    s = run.settings
    data = f"--data {s.data}"
    console.print(
        f"model {printable(run.source.name)}\ntext  {printable(s.data)} ({len(run.examples):,} "
        f"{'preferences' if is_preference(run.examples[0]) else 'examples'})"
    )
    tokenizer = load_tokenizer(run.source)
    check_template(tokenizer, run.examples, s.data, run.source.name)
    parts = split(
        tokenizer, run.examples, s.seq_len, s.train_rows, s.eval_size, s.seed, run.preferences, s.first_rows,
        not s.no_packing,
    )  # fmt: skip
    for reason in told(parts.counts, s.seq_len):
        console.print(f"      {reason}")
    steps = s.steps(len(parts.train))
    kind = "pairs" if run.preferences else f"rows of at most {s.seq_len} tokens"
    console.print(
        f"rows  {len(parts.train):,} {kind} to train on, {steps * s.step_rows / len(parts.train):.2f} times in "
        f"{steps:,} steps; {len(parts.held_out)} examples held out"
    )
    # A run that was made longer has more rows than it was begun with.
    begun_with = parts.train[: s.first_rows] if s.former_steps else parts.train
    digest = digest_of_rows(begun_with, parts.held_out)
    _identify(run, "rows", digest, f"tokens that --model {run.source.name} makes of {data}")
    return tokenizer, parts


def _computing_dtype(run: _Run, console: Console, device: torch.device) -> torch.dtype:
    """The compute dtype of the run, which is printed. A resumed run keeps its dtype, even on another machine."""
    dtype = run.settings.dtype
    chosen = parse_computing_dtype(dtype, device)
    why = ", because the processor has no bfloat16 arithmetic" if chosen != parse_dtype(dtype) else ""
    if run.resume and (began := read_marker(run.directory).get(_COMPUTING)) is not None:
        chosen, why = parse_dtype(str(began)), ", as at the start of the run"
    run.digests[_COMPUTING] = name_of(chosen)
    console.print(f"computing in {name_of(chosen)} on {device}{why}")
    return chosen


def _load(run: _Run, console: Console, device: torch.device) -> Any:
    from ...form import Form

    s = run.settings
    dtype, source = parse_dtype(s.dtype), run.source
    compute = _computing_dtype(run, console, device)
    loader = Loader(source, Form(dtype, s.block_size), device, compute)
    streamed: dict[str, Any] = {}
    if s.stream != "none":
        streamed = {"stream": s.stream, "resident": s.resident or None}
    if s.stream == "disk" and not is_quantized(load_config(source)):
        loader = dataclasses.replace(loader, source=four_bit_directory(loader, run.output))
    model = loader.while_loading(**streamed)
    _identify(run, "base", digest_of_model(model), f"--model {run.source.name}")
    weights = model_size(model)
    console.print(
        f"weights {weights.dense_bytes / 1e6:.1f} MB in {name_of(compute)} -> {weights.bytes / 1e6:.1f} MB in 4 bits "
        f"({weights.dense_bytes / weights.bytes:.2f} times smaller; embeddings, which stay as they are, included)"
    )
    if told_share := dense_share(model):
        console.print(told_share)
    model = adapting.add_adapter(model, run.source, s, run.force)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = weights.parameters + trainable
    console.print(f"trainable parameters {trainable:,} of {total:,} ({100 * trainable / total:.2f}%)")
    return model


def _trainer(run: _Run, recipe: Any, model: Any, tokenizer: Any, parts: Parts) -> RunTrainer:
    if run.preferences:
        from ..training.preferences import PreferenceTrainer

        return PreferenceTrainer(model, recipe, parts.train, parts.held_out, tokenizer)
    from ..training.trainer import QLoRATrainer

    return QLoRATrainer(model, recipe, parts.train, parts.held_out, chunked=run.settings.chunked_loss)


def _recipe(run: _Run, steps: int, device: torch.device) -> Any:
    if run.preferences:
        from ..training.preferences import preference_arguments

        return preference_arguments(run.settings, steps, run.directory, device)
    from ..training.trainer import training_arguments

    return training_arguments(run.settings, steps, run.directory, device)


def _measure_before(run: _Run, trainer: RunTrainer, model: Any, tokenizer: Any) -> dict[str, Any]:
    """What the untrained model measures and says: found once a run, and kept for one that goes on."""
    if run.before.is_file():
        before: dict[str, Any] = read_json(run.before, _BEFORE)
        if not before.keys() & {"perplexity", "reward_accuracy"}:
            raise UserError(f"{run.before}: expected a perplexity in it, found none")
        return before
    prompt, answer = _sample(model, tokenizer, trainer.held_out)
    before = {**_figures(trainer.measure()), "prompt": prompt, "sample": answer}
    write_json(run.before, before)
    return before


def _figures(measured: dict[str, Any]) -> dict[str, Any]:
    """What was measured, under the names that are kept of it."""
    return {key.removeprefix("eval_"): value for key, value in measured.items() if key.startswith("eval_")}


def _save_adapter(run: _Run, model: Any, metrics: dict[str, Any]) -> None:
    from ... import __version__

    record = {
        "model": run.source.name,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "version": __version__,
        "settings": dataclasses.asdict(run.settings),
        "metrics": metrics,
    }
    with staged_directory(run.adapter, foreign_in_adapter) as partial:
        model.save_pretrained(str(partial))
        files = sorted(p.relative_to(partial).as_posix() for p in partial.rglob("*") if not p.is_dir())
        write_json(partial / RECORD, {**record, "files": files})


def _token_ids(parts: Parts) -> Iterator[list[int]]:
    for rows in (parts.train, parts.held_out):
        for row in rows:
            yield from (ids for key, ids in row.items() if key.endswith("_ids") and key != "position_ids")


def _try_it(run: _Run, command: str, *options: str) -> str:
    """A command that asks the adapter, as a shell takes it."""
    if run.source.trust_remote_code:
        options = (*options, "--model", run.source.name, "--trust-remote-code")
    return printable(shlex.join(["qlora-ext", command, "--adapter", str(run.adapter), *options]))


def _fit(run: _Run, config: Any, device: torch.device, console: Console) -> None:
    """Chooses the switches of a new run that is to fit into ``--max-memory``; one that goes on has its own."""
    from ..training.fitting import fit

    if run.settings.max_memory and not run.resume:
        run.settings, told = fit(run.settings, config, device)
        console.print(told)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; see the module's text."""
    with claim(arguments.output, arguments.overwrite) as output:
        return _run(_prepare(arguments, output), arguments.resume)


def _run(job: _Run, may_resume: bool) -> int:
    from rich.console import Console

    from ...streaming import chunk_mlp, dense_mlps
    from ..terminal.progress import ProgressCallback, describe, plot_loss
    from ..training.trainer import NameInertAdapters, OffloadCheckpoints, Rescale, train

    console = Console(highlight=False, markup=False, soft_wrap=not sys.stdout.isatty())
    device = parse_device(job.settings.device)
    config = load_config(job.source)
    adapting.check_without_weights(job.source, config, job.settings)
    _fit(job, config, device, console)
    s = job.settings
    tokenizer, parts = _encode(job, console)
    recipe = _recipe(job, s.steps(len(parts.train)), device)
    model = _load(job, console, device)
    if s.mlp_chunk:
        if not dense_mlps(model):
            raise UserError("--mlp-chunk: the model has no dense MLP, only mixtures of experts or none that is known")
        chunk_mlp(model, s.mlp_chunk)
    if s.chunked_loss:
        adapting.check_chunked_loss(model)
    validate_model.check_tokens(model, _token_ids(parts))
    _begin(job)
    # A checkpoint is the adapter and two moments of it; three exist for a moment, and the adapter at the end.
    trainable_bytes = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    need_space(job.directory, 10 * trainable_bytes + (4 << 20), "the run's checkpoints")
    trainer = _trainer(job, recipe, model, tokenizer, parts)
    before = _measure_before(job, trainer, model, tokenizer)
    start = {"step": 0, **{f"eval_{key}": before[key] for key in before if key not in ("prompt", "sample")}}
    progress = ProgressCallback(console, job.metrics, start)
    trainer.add_callback(progress)
    trainer.add_callback(NameInertAdapters(console.print))
    if s.former_steps:
        trainer.stages = s.stages[:-1]
    if job.longer:
        lengths = f"{s.epochs:g} passes" if s.epochs else f"{s.max_steps} steps"
        console.print(f"extending the run to {lengths}")
    if s.offload_checkpoints:
        trainer.add_callback(OffloadCheckpoints())
    console.print(f"held-out {describe(start)} before training ({len(parts.held_out)} examples)")
    _show_sample(console, "before training", before["prompt"], before["sample"])
    if job.checkpoint:
        trainer.add_callback(Rescale(console.print if job.longer and s.depends_on_length else None))
        console.print(f"going on after step {step_of(job.checkpoint)}")
    elif may_resume:
        console.print("no checkpoint yet: starting at step 0")
    try:
        train(trainer, job.checkpoint)
    except KeyboardInterrupt:
        kept = checkpoints(job.directory)
        at = f"step {step_of(kept[-1])} is saved" if kept else "no checkpoint was due yet"
        again = shlex.join(["qlora-ext", "finetune", "--output", str(job.directory), "--resume"])
        raise KeyboardInterrupt(f"{at}; go on with: {again}") from None
    finally:
        progress.close()
    end = trainer.measure()
    steps = [line for line in trainer.state.log_history if "loss" in line or "eval_loss" in line]
    history = [progress.before, *(line for line in steps if "loss" in line or line["step"] < end["step"]), end]
    write_json_lines(job.metrics, history)
    metrics = {"steps": end["step"]}
    for when, measured in (("before", start), ("after", end)):
        metrics |= {f"{key}_{when}": value for key, value in _figures(measured).items()}
    _save_adapter(job, model, metrics)
    plot_loss(history, job.directory / "loss.png", f"{pathlib.Path(s.model).name} on {pathlib.Path(s.data).name}")
    console.print(f"held-out {describe(start)} before -> {describe(end)} after training")
    _show_sample(console, "after training", *_sample(model, tokenizer, parts.held_out))
    console.print(f"adapter {job.adapter}\nmetrics {job.metrics}\ncurve   {job.directory / 'loss.png'}")
    # A line that the console wraps could not be copied.
    console.print(f"try it: {_try_it(job, 'generate', '--prompt', 'Hello')}", soft_wrap=True)
    console.print(f"   or:  {_try_it(job, 'chat')}", soft_wrap=True)
    return 0
