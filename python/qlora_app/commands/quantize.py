"""``qlora-ext quantize``: saves a model in 4 bits."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from typing import Any

from qlora_ext.formats import BLOCK_SIZES
from qlora_ext.untrusted import printable

from ..errors import UserError
from ..models.conversion import SHARD_SIZE, spilled
from ..models.devices import parse_device, parse_dtype
from ..models.loading import Loader
from ..models.pretrained import dense_name, has_4bit_blocks, is_4bit, load_tokenizer, restore_use_cache
from ..models.size import dense_share, model_size
from ..models.sources import PROVENANCE, resolve
from ..options import REQUIRED, BaseOptions, add_options, like, option, options_in
from ..outputs.directory import Output, claim
from ..outputs.files import write_json
from ..quantization import calibrate, mixed_precision
from ..quantization.calibrate import INITIAL_ADAPTER, CalibrationOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizeRequest(CalibrationOptions):
    """What ``quantize`` reads, and how it encodes the weights."""

    model: str = option(REQUIRED, "a model directory, a .gguf file, a hub name, or package:NAME")
    trust_remote_code: bool = like(BaseOptions, "trust_remote_code")
    output: str = option(REQUIRED, "output directory", metavar="DIR")
    overwrite: bool = option(False, "replace what qlora-ext wrote to --output")
    block_size: int = option(64, "weights per scale, a power of two from 16 to 4096", choices=BLOCK_SIZES)
    format: str = option(
        "qlora_ext", "format of the 4-bit weights: ours, or one that loads with bitsandbytes alone",
        choices=("qlora_ext", "bitsandbytes"),
    )  # fmt: skip
    no_double_quant: bool = option(False, "keep the scales in float32")
    embeddings: bool = option(
        False, "quantize embeddings too, and output heads tied to them: smaller, faster to generate with, less accurate"
    )
    quantize_rest: bool = option(
        False,
        "of a GGUF file with 4-bit weights, which stay as they are, quantize the other layers to NF4 instead of "
        "leaving them dense",
    )
    dtype: str = option("bfloat16", "dtype of the dense weights")
    device: str = like(BaseOptions, "device", default="cpu")
    init_lora: str | None = option(
        None,
        f"also write an adapter to OUTPUT/{INITIAL_ADAPTER} that approximates the quantization error: of the "
        "outputs on the text of --calibrate (svd), or of the weights (loftq); finetune --init-adapter starts from it",
        choices=("svd", "loftq"),
    )
    init_rank: int = option(16, "rank of that adapter", 1)
    keep: str | None = option(
        None,
        "keep the layers in 16 bits whose 4 bits cost the most loss per byte: a number of layers (8), or as many "
        "as fit into a percentage of the 4-bit model's size (5%%) or into a size (200MB). Measured on the text of "
        "--calibrate, or on text that the model writes",
        metavar="N|SHARE|SIZE",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_lora == "svd" and self.text == "none":
            raise UserError(
                "--init-lora svd needs the layers' inputs on a text; add --calibrate self, or --calibrate with a text"
            )
        if self.init_lora and self.distill != "none":
            raise UserError("--distill and --init-lora exclude each other: distilling changes the weights afterwards")
        if self.embeddings and self.format == "bitsandbytes":
            raise UserError(
                "--embeddings and --format bitsandbytes exclude each other: bitsandbytes loads no 4-bit embeddings"
            )


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "quantize",
        help="save a model in 4 bits",
        description="Quantizes a model to NF4 while loading it, and saves it with its tokenizer. The result loads with "
        "AutoModelForCausalLM.from_pretrained after `import qlora_ext`, and as --model of all commands.",
    )
    add_options(parser, QuantizeRequest)
    parser.shorten_help(
        "--model",
        "--output",
        "--overwrite",
        "--block-size",
        "--format",
        "--embeddings",
        "--device",
        "--calibrate",
        "--distill",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; see the module's text."""
    request = options_in(QuantizeRequest, vars(arguments))
    with claim(request.output, request.overwrite) as output:
        return _run(request, output)


def _run(request: QuantizeRequest, output: Output) -> int:
    from qlora_ext.calibration import InitLora, calibration_of
    from qlora_ext.fidelity.integrity import problems_of
    from qlora_ext.form import Form
    from qlora_ext.integrations.bitsandbytes import save_pretrained
    from qlora_ext.nn import Embedding4bit

    dtype, device = parse_dtype(request.dtype), parse_device(request.device)
    source = resolve(request.model, request.trust_remote_code)
    output.protect("--model", request.model, source.on_disk)
    if request.quantize_rest and not has_4bit_blocks(source):
        raise UserError(f"--quantize-rest: expected a GGUF file with quantized weights, got {request.model}")
    calibrate.protect(request, output)
    output.check()
    init_lora = None if request.init_lora is None else InitLora(request.init_lora, request.init_rank)
    tokenizer = load_tokenizer(source)
    form = Form.of(block_size=request.block_size, double_quant=not request.no_double_quant)
    loader = Loader(source, form, dtype, device, embeddings=request.embeddings, rest=request.quantize_rest)
    mixed = mixed_precision.from_options(request.keep, request, tokenizer, form)
    dense_first = request.text != "none" or init_lora is not None or mixed is not None
    dense_first = dense_first or (request.format == "bitsandbytes" and has_4bit_blocks(source))  # it has NF4 only
    with contextlib.ExitStack() as stack:
        spill = None
        if not dense_first and device.type == "cpu":
            spill = stack.enter_context(spilled(loader, output))
        layers = stack.enter_context(calibrate.stored_layers(request, output))
        with calibrate.calibration(request, tokenizer, layers) as calibration:
            if dense_first:
                model = loader.dense_first(calibration, init_lora, mixed)
            else:
                model = loader.while_loading(spill=spill)
        if request.embeddings and not any(isinstance(module, Embedding4bit) for module in model.modules()):
            raise UserError(f"--embeddings: {source.name} has no embeddings that can be 4-bit, or is already 4-bit")
        if is_4bit(source):
            problems = problems_of(model)
            if problems:
                raise UserError(f"{source.name}: the model is damaged and was not copied: {problems[0]}")
            print(f"note: {printable(source.name)} is 4-bit already; its 4-bit weights are copied as they are")
        report = calibration_of(model)
        restore_use_cache(model, source)
        with output.written("quantize") as partial:
            dense = None if mixed is None else mixed.record()
            write_json(partial / PROVENANCE, {"model": dense_name(source), "kept": dense})
            if report:
                write_json(partial / calibrate.RECORD, calibrate.record(request, report))
            if request.format == "bitsandbytes":
                save_pretrained(model, partial)
            else:
                model.save_pretrained(partial, max_shard_size=SHARD_SIZE)
            tokenizer.save_pretrained(partial)
            if init_lora is not None:
                base = str(output.path.resolve())
                calibrate.write_initial_adapter(model, init_lora, partial / calibrate.INITIAL_ADAPTER, base)
    if coverage_note := dense_share(model):
        print(coverage_note)
    for line in calibrate.summary(report, request.distill != "none"):
        print(line)
    if mixed is not None:
        print(mixed.summary())
    weights = model_size(model)
    print(
        f"{output.path}: {weights.dense_bytes(dtype) / 1e6:.1f} MB in {request.dtype} -> "
        f"{weights.bytes / 1e6:.1f} MB in {weights.bits}"
    )
    return 0
