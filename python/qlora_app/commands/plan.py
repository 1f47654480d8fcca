"""``qlora-ext plan``: predicts the memory of a fine-tuning run, and whether it fits, before anything is loaded."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import re
from typing import TYPE_CHECKING, Any

from qlora_ext.sizes import parse_size
from qlora_ext.untrusted import excerpt, printable

from ..errors import UserError, as_arguments, did_you_mean, path_named, reading
from ..models import families, validate_model
from ..models.devices import check_dtype
from ..models.pretrained import load_config
from ..models.sources import DEFAULT_MODEL, ModelSource, resolve
from ..options import BaseOptions, Options, add_options, flag, keywords_of, like, option, options_in
from ..outputs.directory import output_file
from ..outputs.files import staged_file
from ..training.settings import Settings, options_of
from ..training.sweep_options import MAX_ADAPTERS, combinations, parse_sweep

if TYPE_CHECKING:
    from ..planning.memory import Job

_MARK = "qlora-ext plan"  # identifies files that --plot wrote
_SIZES = ("rank", "target_modules", "modules_to_save", "seq_len", "batch_size", "optimizer")  # may vary in a sweep
_MAX_COUNT = 1_000_000  # limit of all options that are counts


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanRequest(Options):
    """What ``plan`` predicts: some of finetune's options, and those of the machine."""

    model: str = option(
        DEFAULT_MODEL,
        "a model directory, its config.json, a .gguf file, a hub name, package:NAME, or one of "
        f"{', '.join(families.names())}",
    )
    trust_remote_code: bool = like(BaseOptions, "trust_remote_code")
    sizes: str | None = option(
        None, "a Llama of these sizes: hidden=N,intermediate=N,layers=N,heads=N[,kv-heads=N][,vocab=N]"
    )
    rank: int = like(Settings, "rank", maximum=_MAX_COUNT)
    target_modules: str = like(Settings, "target_modules")
    modules_to_save: str = like(Settings, "modules_to_save")
    seq_len: int = like(Settings, "seq_len", default=512, minimum=1, maximum=_MAX_COUNT)
    batch_size: int = like(Settings, "batch_size", default=1, maximum=_MAX_COUNT, help="rows per pass and device")
    grad_checkpointing: bool = like(Settings, "grad_checkpointing")
    chunked_loss: bool = like(Settings, "chunked_loss")
    offload_checkpoints: bool = like(Settings, "offload_checkpoints")
    mlp_chunk: int = like(Settings, "mlp_chunk", maximum=_MAX_COUNT)
    optimizer: str = like(Settings, "optimizer")
    quantize: str = like(Settings, "quantize")
    teacher: str = like(Settings, "teacher", help="plan for --method distill with this teacher in memory")
    teacher_load: str = like(Settings, "teacher_load")
    dtype: str = like(BaseOptions, "dtype")
    device: str = option(
        "cuda", "cpu includes the memory of Python, its libraries and its allocator", choices=("cuda", "cpu")
    )
    devices: int = option(1, "number of devices that share the weights (FSDP2)", 1, maximum=_MAX_COUNT)
    memory: str | None = option(
        None, "memory of one device, such as 24GB or 40GiB (default: that of this machine)", metavar="SIZE"
    )
    stream: str = like(Settings, "stream", metavar=None)
    resident: str | None = like(Settings, "resident", default=None)
    link: str = option("25GB/s", "bandwidth of streaming to the device (default: 25GB/s, PCIe 4)", metavar="RATE")
    flops: str = option("150e12", "operations per second of the device", metavar="X")
    max_memory: str | None = option(
        None,
        "find the options with which the run fits into this memory, the longest context, and the largest model",
        metavar="SIZE",
    )
    sweep: str | None = option(
        None, "as in finetune: memory of the largest adapter, and disk of all of them", action="append",
        metavar="VALUES",
    )  # fmt: skip
    adapters: int = option(1, "number of adapters of this size in a sweep", 1, maximum=MAX_ADAPTERS)
    plot: str | None = option(None, "plot the memory by purpose", metavar="PNG")

    def __post_init__(self) -> None:
        super().__post_init__()
        for one, other in (("model", "sizes"), ("sweep", "adapters")):
            if all(getattr(self, name) != getattr(PlanRequest, name) for name in (one, other)):
                raise UserError(f"{flag(one)} and {flag(other)} exclude each other; give one of them")
        if self.resident and self.stream == "none":
            raise UserError(f"--resident {self.resident} needs --stream ram or --stream disk")
        if self.offload_checkpoints and not self.grad_checkpointing:
            raise UserError("--offload-checkpoints needs --grad-checkpointing")
        check_dtype(self.dtype)


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "plan",
        help="predict the memory of a fine-tuning run",
        description="Runs a training step on tensors without memory, and shows how the memory is used, whether it "
        "fits, and how to reduce it. Loads no weights. The CUDA context (about 0.5 GB) is not included; with --device "
        "cpu, the process is.",
    )
    add_options(parser, PlanRequest)
    parser.add_argument("--json", action="store_true", help="print JSON, in bytes")
    parser.shorten_help(
        "--model", "--rank", "--seq-len", "--batch-size", "--grad-checkpointing", "--dtype", "--device", "--memory",
        "--max-memory", "--plot", "--json",
    )  # fmt: skip
    parser.set_defaults(run=run)


def _size(option: str, text: str) -> float:
    try:
        return float(parse_size(option, text))
    except ValueError:
        raise UserError(f"{option} {excerpt(text)}: expected a size such as 24GB or 40GiB") from None


def _rate(option: str, text: str) -> float:
    """A rate per second, which may be written as a size."""
    return _size(option, re.sub(r"/s$", "", text.strip()))


def _memory(text: str | None, device: str) -> tuple[float, str]:
    """The available bytes, and a name for them."""
    if text is not None:
        return _size("--memory", text), "--memory"
    import torch

    if device == "cuda" and torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        return float(card.total_memory), str(card.name)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")), "this machine's memory"


def _config(request: PlanRequest) -> tuple[str, Any, ModelSource | None]:
    """The name, the configuration, and the files of the model, if it has some."""

    if request.sizes is not None:
        try:
            return request.sizes, families.config_of_sizes(request.sizes), None
        except ValueError as error:
            raise UserError(f"--{error}") from None
    name = str(request.model)
    path = path_named(name, "--model")
    if path.name == "config.json" and path.is_file():
        return name, load_config(resolve(str(path.parent), request.trust_remote_code)), None
    if not path.exists() and families.known(name):
        return name, families.config(name), None
    source = resolve(name, request.trust_remote_code)
    try:
        config = load_config(source)
    except UserError as error:
        raise UserError(f"{error}{did_you_mean(name, families.names())}") from error
    validate_model.check_room(source, config)
    return name, config, source


def _job(request: PlanRequest, config: Any, source: ModelSource | None) -> Job:
    from ..planning.memory import FEW, OPTIMIZERS, build, trains_head
    from ..training import adapting
    from ..training.fitting import job_of

    if request.optimizer not in OPTIMIZERS:
        raise UserError(f"--optimizer {request.optimizer}: expected one of {', '.join(OPTIMIZERS)}")
    job = dataclasses.replace(job_of(request, config, source), host=request.device == "cpu")
    if job.modules_to_save:
        with reading("configuration", str(request.model)):
            plain = build(dataclasses.replace(job, modules_to_save=()), FEW).get_base_model()
            adapting.check_saved(plain, job.modules_to_save)
            if job.chunked_loss and trains_head(job):
                raise UserError(
                    "--chunked-loss: --modules-to-save names the output head, whose gradient needs all logits"
                )
    return job


def _adapters(request: PlanRequest) -> dict[str, PlanRequest]:
    """The options of each adapter of ``--sweep``, by name. ``--adapters`` makes one that stands for all of them."""
    if request.sweep is None:
        return {"": request}
    values = parse_sweep(request.sweep)
    if unsupported := {"dora", "layers"} & values.keys():
        raise UserError(f"--sweep {min(unsupported)}: the planner does not support it")
    sizes = {name: {key: found[key] for key in _SIZES if key in found} for name, found in combinations(values).items()}
    return {name: dataclasses.replace(request, **found) for name, found in sizes.items()}


def _largest(
    request: PlanRequest, config: Any, source: ModelSource | None
) -> tuple[Job, list[dict[str, float]], dict[str, Any]]:
    """The largest job of a sweep, its peaks, and what is printed about the sweep; empty for a run of one adapter."""
    from ..planning.memory import disk_bytes, peaks, split

    adapters = _adapters(request)
    measured: dict[PlanRequest, tuple[Job, list[dict[str, float]]]] = {}
    for options in dict.fromkeys(adapters.values()):
        job = _job(options, config, source)
        try:
            measured[options] = job, peaks(job)
        except ValueError as error:
            if "arget modules" not in str(error):
                raise
            raise UserError(
                f"--target-modules {options.target_modules}: no layer of the model has that name"
            ) from error
    disk = sum(disk_bytes(*measured[options]) for options in adapters.values())
    largest = max(adapters, key=lambda name: sum(split(*measured[adapters[name]]).values()))
    count = max(len(adapters), request.adapters)
    sweep = {"adapters": count, "largest": largest or None, "disk_bytes": disk * count / len(adapters)}
    return *measured[adapters[largest]], sweep if count > 1 else {}


def _plot(path: pathlib.Path, title: str, split: dict[str, float], memory: float) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 2.4), dpi=150, layout="constrained")
    left = 0.0
    for i, (name, size) in enumerate(split.items()):
        axes.barh([0], [size / 1e9], left=left, label=f"{name} {size / 1e9:.2f}", color=f"C{i}")
        left += size / 1e9
    axes.axvline(memory / 1e9, color="black", linestyle="--", label=f"available {memory / 1e9:.1f}")
    axes.set(xlabel="GB", yticks=[], title=title)
    axes.legend(fontsize=7, ncols=5, loc="upper center", bbox_to_anchor=(0.5, -0.35))
    with staged_file(path) as partial:
        figure.savefig(partial, format="png", metadata={"Software": _MARK})
    pyplot.close(figure)


def _options_that_fit(job: Job, memory: float, link: float, flops: float) -> dict[str, Any]:
    """The options with which the job fits into ``memory`` bytes; see ``--max-memory`` in ``plan --help``."""
    from ..planning.memory import process_bytes
    from ..planning.search import changes_of, choose, largest_model, longest_context, switched

    process = process_bytes() if job.host else 0.0  # used before the model is loaded
    changes = changes_of(job)
    chosen = choose(job, memory - process, changes)
    best, size = chosen or (switched(job, changes), float("nan"))
    blocks = best.blocks
    return {
        "memory": memory,
        "fits": chosen is not None,
        "options": options_of(best.changes),
        "total": None if chosen is None else size + process,
        "host_bytes": 0.0 if blocks is None or job.host else blocks.host_bytes("ram"),
        "longest_context": longest_context(best.job, blocks, memory - process),
        "free_tokens": None if blocks is None else blocks.free_tokens(link, flops, best.job.grad_checkpointing)[0],
        "largest_model": largest_model(job, memory - process, changes),
    }


def _print_options(found: dict[str, Any], request: PlanRequest) -> None:
    memory = f"{found['memory'] / 1e9:.1f} GB"
    if found["fits"]:
        print(f"fits into {memory} with {found['options']}: {found['total'] / 1e9:.2f} GB")
    else:
        print(f"rows of {request.seq_len:,} tokens do not fit into {memory} with any option ({found['options']})")
    if host := found["host_bytes"]:
        free = found["free_tokens"]
        print(f"{host / 1e9:.2f} GB of pinned host memory; transfers are hidden from {free:,} tokens per step on")
    context = found["longest_context"]
    print(
        f"the longest context then: {context:,} tokens per row, {request.batch_size} rows per pass"
        if context
        else "no context fits"
    )
    largest = found["largest_model"] or "none"
    print(f"the largest known model that fits: {largest} (with --stream, at {request.seq_len:,} tokens)")


def _planned(request: PlanRequest) -> dict[str, Any]:
    """What ``--json`` prints."""
    if request.max_memory is not None and request.modules_to_save:
        raise UserError("--max-memory does not support --modules-to-save; use only one of them")
    if request.max_memory is not None and (request.sweep is not None or request.adapters != 1):
        raise UserError("--max-memory plans one adapter; remove --sweep and --adapters")
    resident = None if request.resident is None else _size("--resident", request.resident)
    link, flops = _rate("--link", request.link), _rate("--flops", request.flops)
    memory, _ = _memory(request.memory, request.device)
    name, config, source = _config(request)
    from qlora_ext import cpu

    from ..planning.blocks import place, streamed
    from ..planning.memory import process_bytes, split
    from ..planning.search import savings

    if request.max_memory is not None:
        job = _job(request, config, source)
        with reading("configuration", name):
            return _options_that_fit(job, _size("--max-memory", request.max_memory), link, flops)
    with reading("configuration", name):
        job, measured, sweep = _largest(request, config, source)
    parts = split(job, measured)
    streaming: dict[str, Any] = {}
    if request.stream != "none":
        blocks = streamed(job)
        parts, slots = place(parts, blocks, resident)
        every_pass, step = blocks.free_tokens(link, flops, job.grad_checkpointing)
        streaming = {
            "source": request.stream,
            "slots": slots,
            "block_bytes": blocks.total / blocks.blocks,
            "device_bytes": sum(parts.values()),
            "host_bytes": blocks.host_bytes(request.stream),
            "disk_bytes": blocks.total if request.stream == "disk" else 0,
            "step_bytes": blocks.step_bytes(slots),
            "free_tokens": every_pass,
            "free_tokens_of_the_step": step,
        }
    if job.host:
        parts["process"] = process_bytes()
    total = sum(parts.values())
    fits = total <= memory
    if request.plot is not None:
        _plot(output_file("--plot", request.plot, _MARK, []), f"{printable(name)}: {total / 1e9:.2f} GB", parts, memory)
    advice = {}
    for change, saving in [] if fits or streaming else savings(job, measured):
        note = " (its state may leave the GPU)" if change.get("optimizer") == "paged_adamw_8bit" else ""
        advice[options_of(change) + note] = saving
    return (
        {"bytes": parts, "total": total, "memory": memory, "fits": fits, "savings": advice}
        | ({"streaming": streaming} if streaming else {})
        | ({"sweep": sweep} if sweep else {})
        | ({"threads": cpu.describe_threads()} if job.host else {})
    )


def _print_plan(found: dict[str, Any], request: PlanRequest) -> None:
    total, memory = found["total"], found["memory"]
    for key, size in found["bytes"].items():
        print(f"{key:<16} {size / 1e9:9.3f} GB  {100 * size / total:5.1f}%")
    print(f"{'total':<16} {total / 1e9:9.3f} GB per device, at the peak of a step")
    if streaming := found.get("streaming"):
        link, flops = _rate("--link", request.link), _rate("--flops", request.flops)
        print(
            f"streamed from {request.stream}: {streaming['slots']} buffers of "
            f"{streaming['block_bytes'] / 1e9:.3f} GB, {streaming['host_bytes'] / 1e9:.2f} GB pinned on the host, "
            f"{streaming['step_bytes'] / 1e9:.2f} GB per step"
        )
        print(
            f"transfers are hidden from {streaming['free_tokens']:,} tokens per step on, at {link / 1e9:.0f} GB/s and "
            f"{flops / 1e12:.0f} Tflop/s (from {streaming['free_tokens_of_the_step']:,} on, they take no longer than "
            "the whole step)"
        )
    if sweep := found.get("sweep"):
        whose_peak = f"the largest, {sweep['largest']}" if sweep["largest"] else "one"
        print(f"{sweep['adapters']} adapters are trained one after the other; the peak is that of {whose_peak}")
        print(f"{'disk':<16} {sweep['disk_bytes'] / 1e9:9.3f} GB for all of them, with two checkpoints each")
    _, whose = _memory(request.memory, request.device)
    print(f"{'fits' if found['fits'] else 'does not fit'} in {memory / 1e9:.1f} GB ({whose})")
    if "threads" in found:
        print(f"threads: {found['threads']}")
    for text, saving in found["savings"].items():
        print(f"  {text} saves {saving / 1e9:.2f} GB{'' if total - saving > memory else ', and then it fits'}")


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; see the module's text."""
    sweep = None if arguments.sweep is None else " ".join(arguments.sweep)
    options = options_in(PlanRequest, {**vars(arguments), "sweep": sweep})
    found = _planned(options)
    if arguments.json:
        print(json.dumps(found, indent=2))
    elif "options" in found:
        _print_options(found, options)
    else:
        _print_plan(found, options)
    return 0


def plan(**options: Any) -> dict[str, Any]:
    """Predicts the memory of a fine-tuning run, like the command ``qlora-ext plan``. It loads no weights.

    Args:
        options: the options of the command, with underscores: ``model="llama-3-8b"``, ``rank=8``, ``memory="24GB"``,
            ``grad_checkpointing=True``, ``max_memory="8GB"``. None stands for the default.

    Returns:
        What the command prints with ``--json``: the ``bytes`` by purpose, their ``total``, the ``memory``, whether it
        ``fits``, and the ``savings`` by option; with ``max_memory``, the ``options`` with which the run fits.

    Raises:
        TypeError: an option is unknown, or its value has a wrong type.
        ValueError: an argument is out of range, contradicts another, or names a file that is missing or damaged. The
            message names the argument.
        ImportError: a required library is missing.

    Example:
        >>> plan = qlora_app.plan(sizes="hidden=64,intermediate=128,layers=2,heads=4,vocab=512", memory="1GB")
        >>> plan["fits"], sorted(plan["bytes"])[:2]
        (True, ['activations', 'adapters'])
    """
    try:
        return _planned(PlanRequest(**keywords_of("plan", PlanRequest, options)))
    except UserError as error:
        raise ValueError(as_arguments(str(error))) from error
