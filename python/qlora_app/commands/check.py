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
from ..options import BaseOptions, add_options
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


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "check",
        help="measure what 4 bits cost a model",
        description="Checks that the tensors of a 4-bit model are intact, measures how much its loss on a text exceeds "
        "that of the dense model and which layers cost the most, and gives advice. A dense model is quantized first. "
        f"Exit code 0: good; {EXIT_FAILED}: the loss rises by more than --max-increase, weights or logits are damaged, "
        "or a layer does not match the dense model; 2: the model cannot be loaded, or an option is wrong.",
    )
    parser.add_argument(
        "--model", required=True, help="a model directory, 4-bit (ours or bitsandbytes') or dense, a .gguf file, a hub "
        "name, or package:NAME",
    )  # fmt: skip
    add_options(parser, BaseOptions, ["trust_remote_code"])
    parser.add_argument(
        "--base", metavar="MODEL", help="the dense model to compare with (default: the one that --model records)"
    )
    parser.add_argument(
        "--data", metavar="DATA|self",
        help="the text: anything that finetune's --data takes, or self, a text that the dense model writes (default: "
        f"{DEFAULT_DATA}, or self if that is not installed)",
    )  # fmt: skip
    parser.add_argument(
        "--tokens", type=int, default=4096, metavar="N", help="length of the text (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of the written text and the random labels"
    )
    parser.add_argument(
        "--max-increase", type=float, metavar="X",
        help=f"maximum increase of the loss for exit code 0, in nats per token (default: {MAX_INCREASE})",
    )  # fmt: skip
    parser.add_argument(
        "--curve", action="store_true",
        help="also measure the loss with the costliest layers in 16 bits, for budgets of --keep from 0%% to 20%%",
    )  # fmt: skip
    parser.add_argument("--json", metavar="FILE", help="write all results to a JSON file")
    add_options(parser, BaseOptions, ["dtype"])
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    parser.set_defaults(run=run)


def _base(arguments: argparse.Namespace, source: ModelSource) -> tuple[ModelSource | None, str]:
    """The dense model to compare with, or the reason why there is none.

    The model that a 4-bit directory records is used only if it is on this machine, and never with its own code.
    """
    if arguments.base is not None:
        base = resolve(arguments.base, arguments.trust_remote_code, "--base")
        if is_4bit(base):
            raise UserError(f"--base {arguments.base}: expected a dense model, got a quantized one")
        return base, ""
    if has_4bit_blocks(source):
        return None, "its file stores 4-bit weights, which are used as they are; name the dense model with --base"
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


def _check_options(arguments: argparse.Namespace) -> None:
    if arguments.tokens < 2 * held_out.LENGTH:
        raise UserError(f"--tokens {arguments.tokens}: expected {2 * held_out.LENGTH} or more")
    if not 0 <= arguments.seed < 2**32:
        raise UserError(f"--seed {arguments.seed}: expected 0 to 4294967295")
    if arguments.max_increase is not None and not 0 <= arguments.max_increase < float("inf"):
        raise UserError(f"--max-increase {arguments.max_increase}: expected 0 or more, in nats per token")


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; see the module's text."""
    from qlora_ext.fidelity import check_model
    from qlora_ext.form import Form

    from ..quantization.advice import advice_on

    _check_options(arguments)
    dtype, device = parse_dtype(arguments.dtype), parse_device(arguments.device)
    compute = parse_computing_dtype(arguments.dtype, device)
    source = resolve(arguments.model, arguments.trust_remote_code)
    base_source, reason = _base(arguments, source)
    if base_source is None and (arguments.curve or arguments.max_increase is not None):
        option = "--curve" if arguments.curve else "--max-increase"
        raise UserError(f"{option}: {arguments.model} cannot be compared with a dense model: {reason}")
    found_file = None
    if arguments.json is not None:
        base_input = None if base_source is None else base_source.on_disk
        inputs = [("--model", source.on_disk), ("--base", base_input), ("--data", arguments.data)]
        found_file = output_file("--json", arguments.json, _MARK, inputs)
    tokenizer = load_tokenizer(source)
    text = held_out.default_text() if arguments.data is None else arguments.data
    model = Loader(source, Form(), dtype, device, compute).while_loading()
    base = None if base_source is None else load_dense(base_source, dtype, device, compute)
    if text == "self":
        ids = held_out.written(base or model, arguments.tokens, arguments.seed)
    else:
        ids = held_out.blocks(text, tokenizer, arguments.tokens, held_out.length_for(model))
    check_tokens(model, ids.tolist())
    if base is not None:
        known = [vocabulary_size(m) for m in (base, model)]
        if known[0] != known[1]:
            raise UserError(
                f"{arguments.base or arguments.model}: expected the dense model that --model was quantized from, got "
                f"a vocabulary of {known[0]} tokens instead of {known[1]}"
            )
    with counted("comparing layers") as progress:
        try:
            found = check_model(
                model, base, ids, curve=CURVE if arguments.curve else (), seed=arguments.seed, progress=progress
            )
        except ValueError as error:
            if not str(error).startswith(("base:", "model:")):
                raise
            raise UserError(f"{arguments.base or arguments.model}: {first_line(error)}") from error
    limit = MAX_INCREASE if arguments.max_increase is None else arguments.max_increase
    good = found.is_sound and (found.increase is None or found.increase.nats <= limit)
    advice = advice_on(found)
    _report(found, text, reason, limit)
    for line in advice:
        print(printable(f"advice: {line}"))
    if found_file is not None:
        record = {
            "written_by": _MARK,
            "model": arguments.model,
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
