"""``qlora-ext check``: checks a 4-bit model for damage, measures what 4 bits cost it, and gives advice."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

from qlora_ext.untrusted import excerpt, printable

from ..data import DEFAULT_DATA, held_out
from ..errors import UserError, first_line
from ..models.devices import parse_computing_dtype, parse_device, parse_dtype
from ..models.loading import Loader, load_dense
from ..models.pretrained import dense_name, has_4bit_blocks, is_4bit, load_tokenizer
from ..models.sources import ModelSource, resolve
from ..models.validate_model import check_tokens
from ..options import (
    ACTIVATIONS,
    ACTIVATIONS_HELP,
    REQUIRED,
    BaseOptions,
    Options,
    add_options,
    like,
    option,
    options_in,
)
from ..outputs.directory import output_file
from ..outputs.files import write_json
from ..terminal.bars import counted
from ..terminal.tables import print_table
from ..vocabulary import vocabulary_size

if TYPE_CHECKING:
    from qlora_ext.fidelity import ModelCheck

# In nats per token: a factor of 1.35 in perplexity. Plain NF4 costs a small model (SmolLM2-135M) 0.19 to 0.25, and a
# large one a tenth of that. A model above the limit is damaged or useless.
MAX_INCREASE = 0.3
EXIT_FAILED = 3
CURVE = ("0%", "1%", "2%", "5%", "10%", "20%")
_SHOWN = 10
_MARK = "qlora-ext check"  # identifies files that --json wrote


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckRequest(Options):
    """What ``check`` compares, on which text."""

    model: str = option(
        REQUIRED,
        "a model directory, 4-bit (ours or bitsandbytes') or dense, a .gguf file, a hub name, or package:NAME",
    )
    trust_remote_code: bool = like(BaseOptions, "trust_remote_code")
    base: str | None = option(
        None, "the dense model to compare with (default: the one that --model records)", metavar="MODEL"
    )
    data: str | None = option(
        None,
        "the text: anything that finetune's --data takes, or self, a text that the dense model writes (default: "
        f"{DEFAULT_DATA}, or self if that is not installed)",
        metavar="DATA|self",
    )
    tokens: int = option(4096, "length of the text")
    seed: int = option(0, "seed of the written text and the random labels", 0, maximum=2**32 - 1)
    max_increase: float | None = option(
        None, f"maximum increase of the loss for exit code 0, in nats per token (default: {MAX_INCREASE})"
    )
    curve: bool = option(
        False, "also measure the loss with the costliest layers in 16 bits, for budgets of --keep from 0%% to 20%%"
    )
    json: str | None = option(None, "write all results to a JSON file", metavar="FILE")
    dtype: str = like(BaseOptions, "dtype")
    device: str = like(BaseOptions, "device", default="cpu")
    activations: str | None = option(None, f"{ACTIVATIONS_HELP} (default: as saved)", choices=ACTIVATIONS)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens < 2 * held_out.LENGTH:
            raise UserError(f"--tokens {self.tokens}: expected {2 * held_out.LENGTH} or more")
        if self.max_increase is not None and not 0 <= self.max_increase < float("inf"):
            raise UserError(f"--max-increase {self.max_increase}: expected 0 or more, in nats per token")


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "check",
        help="measure what 4 bits cost a model",
        description="Checks that the tensors of a 4-bit model are intact, measures how much its loss on a text exceeds "
        "that of the dense model and which layers cost the most, and gives advice. A dense model is quantized first. "
        f"Exit code 0: good; {EXIT_FAILED}: the loss rises by more than --max-increase, weights or logits are damaged, "
        "or a layer does not match the dense model; 2: the model cannot be loaded, or an option is wrong.",
    )
    add_options(parser, CheckRequest)
    parser.set_defaults(run=run)


def _base(request: CheckRequest, source: ModelSource) -> tuple[ModelSource | None, str]:
    """The dense model to compare with, or the reason why there is none.

    The model that a 4-bit directory records is used only if it is on this machine, and never with its own code.
    """
    if request.base is not None:
        base = resolve(request.base, request.trust_remote_code, "--base")
        if is_4bit(base):
            raise UserError(f"--base {request.base}: expected a dense model, got a quantized one")
        return base, ""
    if has_4bit_blocks(source):
        return None, "its file stores quantized weights, which are used as they are; name the dense model with --base"
    if not is_4bit(source):
        return source, ""
    name = dense_name(source)
    if name is None:
        return None, "it does not record its dense model; name the dense model with --base"
    try:
        base = resolve(name)
        if (base.directory or base.gguf_file) and not is_4bit(base):
            return base, ""
    except UserError:
        pass
    return None, f"its dense model {excerpt(name)} is not on this machine; name it with --base"


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; see the module's text."""
    from qlora_ext.fidelity import check_model
    from qlora_ext.form import Form

    from ..quantization.advice import advice_on

    request = options_in(CheckRequest, vars(arguments))
    dtype, device = parse_dtype(request.dtype), parse_device(request.device)
    compute = parse_computing_dtype(request.dtype, device)
    source = resolve(request.model, request.trust_remote_code)
    base_source, reason = _base(request, source)
    if base_source is None and (request.curve or request.max_increase is not None):
        given = "--curve" if request.curve else "--max-increase"
        raise UserError(f"{given}: {request.model} cannot be compared with a dense model: {reason}")
    found_file = None
    if request.json is not None:
        base_input = None if base_source is None else base_source.on_disk
        inputs = [("--model", source.on_disk), ("--base", base_input), ("--data", request.data)]
        found_file = output_file("--json", request.json, _MARK, inputs)
    tokenizer = load_tokenizer(source)
    text = held_out.default_text() if request.data is None else request.data
    model = Loader(source, Form(), dtype, device, compute, activations=request.activations).while_loading()
    base = None if base_source is None else load_dense(base_source, dtype, device, compute)
    if text == "self":
        ids = held_out.written(base or model, request.tokens, request.seed)
    else:
        ids = held_out.blocks(text, tokenizer, request.tokens, held_out.length_for(model))
    check_tokens(model, ids.tolist())
    if base is not None:
        known = [vocabulary_size(m) for m in (base, model)]
        if known[0] != known[1]:
            raise UserError(
                f"{request.base or request.model}: expected the dense model that --model was quantized from, got "
                f"a vocabulary of {known[0]} tokens instead of {known[1]}"
            )
    with counted("comparing layers") as progress:
        try:
            found = check_model(
                model, base, ids, curve=CURVE if request.curve else (), seed=request.seed, progress=progress
            )
        except ValueError as error:
            if not str(error).startswith(("base:", "model:")):
                raise
            raise UserError(f"{request.base or request.model}: {first_line(error)}") from error
    limit = MAX_INCREASE if request.max_increase is None else request.max_increase
    good = found.is_sound and (found.increase is None or found.increase.nats <= limit)
    advice = advice_on(found)
    _report(found, text, reason, limit)
    for line in advice:
        print(printable(f"advice: {line}"))
    if found_file is not None:
        record = {
            "written_by": _MARK,
            "model": request.model,
            "base": None if base_source is None else base_source.name,
            "data": text,
            "max_increase": limit,
            "good": good,
            **dataclasses.asdict(found),
            "advice": advice,
        }
        write_json(found_file, record)
    return 0 if good else EXIT_FAILED


def _report(found: ModelCheck, text: str, reason: str, limit: float) -> None:
    from qlora_ext.fidelity import perplexity

    for problem in found.problems:
        print(printable(f"damaged: {problem}"))
    for layer in found.damaged:
        print(
            f"damaged: {printable(layer.name)}: its outputs have a relative error of {layer.error:.3g}, "
            f"plain NF4's of {layer.plain_error:.3g}"
        )
    if found.loss is not None:
        before = "" if found.base_loss is None else f", {perplexity(found.base_loss):.2f} dense"
        name = printable(text)
        print(f"perplexity on {found.tokens:,} tokens of {name}: {perplexity(found.loss):.2f} in 4 bits{before}")
    if found.increase is not None:
        above = "" if found.increase.nats <= limit else f", more than --max-increase {limit:g}"
        print(f"the loss rises by {found.increase} nats per token{above}")
    elif reason:
        print(f"not compared: {printable(reason)}")
    if found.layers:
        title = (
            f"the {min(_SHOWN, len(found.layers))} costliest of {len(found.layers)} layers: relative error of the "
            "outputs (of plain NF4's), estimated cost in nats per token, additional MB in 16 bits"
        )
        rows = (
            (
                printable(c.name),
                f"{c.error:.3f}",
                f"({c.plain_error:.3f})",
                f"{c.loss:.2g}",
                f"{c.extra_bytes / 1e6:.2g}",
            )
            for c in found.worst[:_SHOWN]
        )
        print_table(title, ("layer", "error", "(plain)", "cost", "MB"), rows)
    if found.curve:
        points = (
            (str(p.budget), str(p.kept), f"{(found.bytes + p.extra_bytes) / 1e6:.1f}", str(p.increase))
            for p in found.curve
        )
        print_table("with the costliest layers in 16 bits", ("--keep", "layers", "MB", "loss rises by"), points)
