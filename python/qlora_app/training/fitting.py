"""``finetune --max-memory``: chooses the options with which a run fits into memory, before its model is loaded."""

from __future__ import annotations

import copy
import dataclasses
import pathlib
from typing import Any

import torch

from qlora_ext.output_head import changes_logits
from qlora_ext.sizes import parse_size
from qlora_ext.streaming import dense_mlps

from ..errors import UserError
from ..models import families
from ..models.loading import stored_forms
from ..models.pretrained import has_4bit_blocks, is_4bit, load_config
from ..models.sources import ModelSource, resolve
from ..planning import search
from ..planning.blocks import place, streamed
from ..planning.memory import FEW, OPTIMIZERS, Job, build, process_bytes, static_split, trains_head
from .settings import STORED, Settings, named_modules, options_of

_CONTEXT = 0.5e9  # bytes of a CUDA context
_SPARE = 0.8  # the largest share of the host's free memory that may be pinned


def job_of(options: Any, config: Any, source: ModelSource | None = None) -> Job:
    """The job for a model with ``config`` and the ``options`` of a command, whose names are those of its fields.

    Args:
        source: of the model, if it has files.
    """
    named = {field.name for field in dataclasses.fields(Job)} & set(vars(options))
    values = {name: getattr(options, name) for name in named}
    values["modules_to_save"] = tuple(named_modules(options.modules_to_save))
    if options.target_modules != "all-linear":
        values["target_modules"] = [name.strip() for name in options.target_modules.split(",")]
    forms = None if source is None else stored_forms(source, config, bool(getattr(options, "quantize", "")))
    job = Job(**{**values, "config": config, "forms": forms})
    if not options.teacher:
        return job
    chunked = job.chunked_loss or not (changes_logits(config) or trains_head(job))
    in_memory = not getattr(options, "teacher_cache", "")  # else it has been freed before the steps
    size = teacher_bytes(options.teacher, options.teacher_load, job) if in_memory else 0.0
    return dataclasses.replace(job, chunked_loss=chunked, teacher_bytes=size)


def teacher_bytes(name: str, load: str, student: Job) -> float:
    """The bytes on the device of the weights of ``--teacher`` with ``--teacher-load``.

    Args:
        student: the job of the model that learns, which computes in the same dtype.
    """
    if families.known(name) and not pathlib.Path(name).exists():
        source, config = None, families.config(name)
    else:
        source = resolve(name, option="--teacher")
        config = load_config(source)
    packed = source is not None and (is_4bit(source) or has_4bit_blocks(source))
    forms = stored_forms(source, config) if source is not None and packed else None
    config = copy.deepcopy(config)
    config.quantization_config = None  # the planner quantizes what it plans
    if load == STORED and not packed:
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=student.compute)
        return float(sum(parameter.nbytes for parameter in model.parameters()))
    job = Job(config, dtype=student.dtype, host=student.host, forms=forms)
    parts = static_split(job)
    if load in ("ram", "disk"):
        parts, _ = place(parts, streamed(job), None)
    return sum(parts.get(name, 0.0) for name in ("base weights", "scales", "other weights", "ring"))


def _overhead(device: torch.device) -> float:
    """Bytes that are used before the model is loaded: by CUDA, or by Python and its libraries."""
    return _CONTEXT if device.type == "cuda" else process_bytes()


def _possible(job: Job) -> list[dict[str, Any]]:
    """The planner's changes that the model and the device support, and that the user has not made."""
    import psutil

    out: set[str] = set()
    if changes_logits(job.config) or trains_head(job):
        out.add("chunked_loss")
    if job.mlp_chunk or not dense_mlps(build(job, FEW)):
        out.add("mlp_chunk")
    if job.stream != "none":
        out.add("stream")
    changes = [{k: v for k, v in change.items() if k not in out} for change in search.changes_of(job)]
    if job.host or streamed(job).host_bytes("ram") <= _SPARE * psutil.virtual_memory().available:
        return changes
    return [{"stream": "disk"} if "stream" in change else change for change in changes]


def fit(settings: Settings, config: Any, source: ModelSource | None, device: torch.device) -> tuple[Settings, str]:
    """The settings with which the run fits into ``--max-memory``, and a line that reports the changes.

    If layers are streamed, the ring gets the remaining memory.

    Args:
        config, source: of the model.
        device: of the run. On the CPU, the limit applies to the process.

    Raises:
        UserError: the run does not fit, whatever the options.
    """
    if settings.optimizer not in OPTIMIZERS:
        known = ", ".join(OPTIMIZERS)
        raise UserError(
            f"--max-memory: the planner does not support --optimizer {settings.optimizer}; expected one of {known}"
        )
    allowed = float(parse_size("--max-memory", settings.max_memory))
    config = copy.deepcopy(config)
    config.quantization_config = None  # the planner quantizes what it plans
    job = dataclasses.replace(job_of(settings, config, source), host=device.type == "cpu")
    changes = _possible(job)
    overhead = _overhead(device)  # measured after the planner's libraries are loaded
    memory = allowed - overhead
    chosen = search.choose(job, memory, changes)
    before = f"{overhead / 1e9:.2f} GB of it used by {'CUDA' if device.type == 'cuda' else 'Python and its libraries'}"
    if chosen is None:
        least = search.switched(job, changes)
        longest = search.longest_context(least.job, least.blocks, memory)
        size = search.total(least.job, least.blocks) + overhead
        raise UserError(
            f"--max-memory {settings.max_memory} ({before}): {settings.batch_size} rows of {settings.seq_len} tokens "
            f"need at least {size / 1e9:.2f} GB ({options_of(least.changes)}); "
            + (f"rows of {longest:,} tokens would fit" if longest else "rows of any length do not fit")
        )
    found, size = chosen
    fitted = dataclasses.replace(settings, **found.changes)
    if found.blocks is not None and not settings.resident:
        parts, _ = place(static_split(found.job), found.blocks, None)
        weights = parts["base weights"] + parts["other weights"] + parts["ring"]
        fitted = dataclasses.replace(fitted, resident=str(int(weights + memory - size)))
    options = options_of(found.changes)
    return fitted, f"fits into {settings.max_memory} ({before}) with {options}: {(size + overhead) / 1e9:.2f} GB"
