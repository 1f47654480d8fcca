"""``finetune --max-memory``: chooses the options with which a run fits into memory, before its model is loaded."""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING, Any

from qlora_ext.sizes import parse_size
from qlora_ext.streaming import dense_mlps

from ..errors import UserError
from ..models.loading import stored_forms
from ..models.loss import changes_logits
from ..models.sources import ModelSource
from ..planning import search
from ..planning.blocks import place, streamed
from ..planning.memory import FEW, OPTIMIZERS, Job, build, process_bytes, static_split, trains_head
from .settings import Settings, named_modules, options_of

if TYPE_CHECKING:
    import torch

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
    return Job(**{**values, "config": config, "forms": forms})


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
