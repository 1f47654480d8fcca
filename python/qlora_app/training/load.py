"""The second phase of a run: loads the base in 4 bits, and adds the adapter."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import torch

from qlora_ext.dtypes import gpu_without_bfloat16, layers_dtype
from qlora_ext.form import Form
from qlora_ext.formats import SERVED_FORMATS
from qlora_ext.nn import activations_of, layers_of
from qlora_ext.streaming import chunk_mlp, dense_mlps

from ..data import answers_of
from ..errors import UserError
from ..models.adapter_files import find
from ..models.conversion import load_streamed
from ..models.devices import name_of, parse_computing_dtype, parse_dtype
from ..models.loading import Loader
from ..models.pretrained import load_config
from ..models.size import dense_share, model_size
from ..models.validate_model import check_tokens, longest_input
from ..outputs.directory import Output
from ..outputs.ownership import read_marker
from . import adapting
from .identity import digest_of_model
from .run import Run
from .teacher import load_teacher

# In the marker of a run's directory: the dtypes of the model, and of the products in its 4-bit layers, and what these
# multiply.
_COMPUTING = "compute_dtype"
_LAYERS = "layers_dtype"
ACTIVATIONS = "activations"


@dataclasses.dataclass(frozen=True)
class Base:
    """A 4-bit model, its digest, its number of parameters, and how it computes: dtypes and activations, by name."""

    model: Any
    digest: str
    parameters: int
    computes: dict[str, str]


def load(run: Run) -> None:
    """Loads the model of a prepared run, and adds its adapter.

    Raises:
        UserError: the model's files are damaged, or an option does not fit the model.
    """
    load_teacher(run)
    base = load_base(run, run.output)
    identify(run, base)
    adapt(run, base)


def load_base(run: Run, output: Output) -> Base:
    """Loads the model of a prepared run, and reports its size and dtypes.

    Args:
        output: next to it, a dense model that is streamed from disk is stored in 4 bits.

    Raises:
        UserError: the model's files are damaged.
    """
    compute, layers = _dtypes(run)
    model = _in_4_bits(run, compute, layers, output)
    size = model_size(model)
    dense = size.dense_bytes(compute)
    run.report(
        f"weights {dense / 1e6:.1f} MB in {name_of(compute)} -> {size.bytes / 1e6:.1f} MB in {size.bits} "
        f"({dense / size.bytes:.2f} times smaller, including all that is dense)"
    )
    for dtype in {layer.compute_dtype for _, layer in layers_of(model)} - {compute}:
        why = "as at the start of the run" if run.resumes else f"which takes less time than {name_of(compute)} here"
        run.report(f"4-bit layers multiply in {name_of(dtype)}, {why}")
    if coverage_note := dense_share(model):
        run.report(coverage_note)
    computes = {_COMPUTING: name_of(compute), _LAYERS: name_of(layers), ACTIVATIONS: activations_of(model)}
    return Base(model, digest_of_model(model), size.parameters, computes)


def identify(run: Run, base: Base) -> None:
    """Records the base of a new run, or checks that of a resumed run."""
    run.identify("base", base.digest, f"--model {run.source.name}")
    run.digests |= base.computes


def adapt(run: Run, base: Base) -> None:
    """Adds the run's adapter to its base, and checks that the rows fit.

    Raises:
        UserError: an option does not fit the model.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    s = run.settings
    run.model = adapting.add_adapter(base.model, run.source, s, run.request.force)
    if run.preferences and isinstance(run.model.get_output_embeddings(), BaseTunerLayer):
        raise UserError(f"--method {run.method}: an adapter on the output head is not supported; train other modules")
    trainable = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    total = base.parameters + trainable
    run.report(f"trainable parameters {trainable:,} of {total:,} ({100 * trainable / total:.2f}%)")
    if s.mlp_chunk:
        if not dense_mlps(run.model):
            raise UserError("--mlp-chunk: the model has no dense MLP, only mixtures of experts or unknown modules")
        chunk_mlp(run.model, s.mlp_chunk)
    if s.chunked_loss:
        adapting.check_chunked_loss(run.model)
    _check_rows(run)


def _dtypes(run: Run) -> tuple[torch.dtype, torch.dtype]:
    """Chooses and reports the compute dtype, and chooses that of the 4-bit layers.

    A resumed run keeps its dtypes, even on another machine. Runs of earlier versions did not record the second one.
    """
    dtype = run.settings.dtype
    marker = read_marker(run.directory) if run.resumes else {}
    chosen = parse_computing_dtype(dtype, run.device)
    processor = "processor" if run.device.type == "cpu" else "GPU"
    why = f", because the {processor} has no bfloat16 arithmetic" if chosen != parse_dtype(dtype) else ""
    if (began := marker.get(_COMPUTING)) is not None:
        chosen, why = parse_computing_dtype(str(began), run.device), ", as at the start of the run"
    run.report(f"computing in {name_of(chosen)} on {run.device}{why}")
    layers = layers_dtype(parse_dtype(dtype), chosen, run.device)
    if (began := marker.get(_LAYERS)) is not None and not gpu_without_bfloat16(run.device):
        layers = parse_computing_dtype(str(began), run.device)
    return chosen, layers


def _in_4_bits(run: Run, compute: torch.dtype, layers: torch.dtype, output: Output) -> Any:
    """The model in 4 bits. To stream from disk, it is converted to a 4-bit directory first."""
    s = run.settings
    form, dtype = Form(block_size=s.block_size), parse_dtype(s.dtype)
    # A resumed run keeps what auto was at its start.
    activations = (read_marker(run.directory) if run.resumes else {}).get(ACTIVATIONS, s.activations)
    loader = Loader(run.source, form, dtype, run.device, compute, layers, activations=activations, **_read_in(run))
    return load_streamed(loader, s.stream, s.resident or None, output)


def _read_in(run: Run) -> dict[str, Any]:
    """How the base is quantized when it is read: fields of a ``Loader``. An initial adapter has its own base."""
    from qlora_ext.integrations.peft.base_file import recorded_base_format, recorded_requantized

    s = run.settings
    if s.init_adapter:
        adapter = find(s.init_adapter, "--init-adapter")
        return {"served": recorded_base_format(adapter), "requantize": recorded_requantized(adapter)}
    saved = getattr(load_config(run.source), "quantization_config", None)
    if s.quantize and saved is not None and saved.get("quant_method", "bitsandbytes") in ("qlora_ext", "bitsandbytes"):
        raise UserError(
            f"--quantize {s.quantize}: {run.source.name} was saved in 4 bits by qlora_ext or bitsandbytes; name the "
            "model that it was made from, or omit --quantize"
        )
    served = s.quantize or (s.merge_aware if s.merge_aware in SERVED_FORMATS else None)
    return {"served": served, "requantize": bool(s.quantize)}


def _check_rows(run: Run) -> None:
    """Rejects tokens that the model lacks, and examples of more tokens than it reads.

    An example in a packed row has positions of its own.
    """

    def rows() -> Iterator[Any]:
        return itertools.chain(run.parts.train, run.parts.held_out)

    def size(row: Any) -> int:
        if "columns" in row:
            return len(row["prompt_ids"]) + run.settings.max_new_tokens
        if "prompt_ids" in row:
            return len(row["prompt_ids"]) + max(map(len, answers_of(row)))
        return max(row["position_ids"]) + 1 if "position_ids" in row else len(row["input_ids"])

    check_tokens(
        run.model, (ids for row in rows() for key, ids in row.items() if key.endswith("_ids") and key != "position_ids")
    )
    limit = longest_input(run.model)
    if limit is None or run.settings.seq_len <= limit:
        return
    if (longest := max(map(size, rows()), default=0)) > limit:
        raise UserError(
            f"--seq-len {run.settings.seq_len}: the longest example has {longest} tokens, and the model reads at most "
            f"{limit} (max_position_embeddings in its config.json); use --seq-len {limit}"
        )
