"""``QuantizeRequest``: the options of ``quantize``."""

from __future__ import annotations

import dataclasses

from qlora_ext.formats import BLOCK_SIZES

from ..errors import UserError
from ..options import REQUIRED, BaseOptions, like, option
from .calibrate import INITIAL_ADAPTER, CalibrationOptions


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
        if self.init_lora == "svd" and self.calibrate == "none":
            raise UserError(
                "--init-lora svd needs the layers' inputs on a text; add --calibrate self, or --calibrate with a text"
            )
        if self.embeddings and self.format == "bitsandbytes":
            raise UserError(
                "--embeddings and --format bitsandbytes exclude each other: bitsandbytes loads no 4-bit embeddings"
            )
