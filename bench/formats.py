"""linear_nf4 and its input gradient on weights of every format, on the CPU.

    python bench/formats.py [--seconds 1] [--threads 2] [--dtype bfloat16] [--shapes 4096x4096]
                            [--formats 'GGUF Q8_0' ...]

Each row has two ratios, round by round, where lower is better: our time over that of dequantizing the weight and
`F.linear` (dX: `dy @ w`), which is what users have today; and our time over ours of NF4 with float32 scales in blocks
of the same size. `bytes` is the weight's bytes over those of this NF4. No LoRA. Operands are rotated out of the caches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lib import harness
from lib.forms import FORMS, WIDE_FORMS
from qlora_ext import formats
from qlora_ext.form import Form
from qlora_ext.weight import Weight4bit, weight_of

FORMATS = {**FORMS, "AWQ and GPTQ": Form("uint4", "float16", 128, offsets="zero_point8"), **WIDE_FORMS}
Run = Callable[[str, Tensor, Weight4bit], Tensor]
TOKENS = {"forward": (1, 8, 512), "dX": (512,)}


def random_weight(form: Form, n: int, k: int) -> Weight4bit:
    """Random codes, and scales and offsets that make the values about as large as those of a model."""
    values, mask = formats.code_values(form.code), 0xFF
    if form.code in ("e4m3", "e5m2"):  # codes that are finite
        mask = 0x9F
    largest = max(abs(values[code & mask]) for code in range(len(values)))
    tensors: dict[str, Tensor | None] = dict.fromkeys(("nested_absmax", "nested_offset"))
    for name, spec in form.tensors((n, k)).items():
        if name == "packed":
            t = torch.randint(256, spec.shape) & mask
        elif name == "block_offsets" and spec.dtype == torch.uint8:
            t = torch.randint(6, 10, spec.shape)
        elif spec.dtype == torch.uint8:
            t = torch.randint(20, 60, spec.shape)
        elif name == "scale_table" and form.scales == "nested_table8":
            t = torch.arange(256)  # as in GGUF's Q4_K
        elif name == "scale_table":
            t = torch.linspace(0.0, 4.0, 256) * 0.05 / largest
        elif name == "nested_absmax" and form.scales == "nested_table8":
            t = (0.5 + torch.rand(spec.shape)) * 0.05 / largest / 40
        else:
            t = (0.5 + torch.rand(spec.shape)) * (-0.025 if name == "block_offsets" else 0.05 / largest)
        tensors[name] = t.to(spec.dtype)
    return weight_of(form, **tensors, shape=torch.Size((n, k)), dtype=torch.float32)


def copies(w4: Weight4bit) -> harness.Ring[Weight4bit]:
    def copy() -> Weight4bit:
        tensors: dict[str, Any] = {name: t.clone() for name, t in w4.tensors.items()}
        return w4.replace(**tensors)

    return harness.cold(copy, w4.nbytes)


def ours(op: str, x: Tensor, w4: Weight4bit) -> Tensor:
    no_lora = None, None, 1.0, 0.0, 0, None
    if op == "forward":
        y: Tensor = torch.ops.qlora.linear_nf4(x, *w4.operands(w4.shape[0], None, *no_lora))
        return y
    dx: Tensor = torch.ops.qlora.linear_nf4_dx(x, *w4.operands(w4.shape[1], *no_lora))
    return dx


def theirs(op: str, x: Tensor, w4: Weight4bit) -> Tensor:
    dense = w4.dequantize(x.dtype)
    return functional.linear(x, dense) if op == "forward" else x @ dense


def measure(
    report: harness.Report, name: str, form: Form, shape: tuple[int, int], dtype: torch.dtype, seconds: float
) -> None:
    n, k = shape
    weights = copies(random_weight(form, n, k))
    nf4 = copies(random_weight(Form("nf4", "float32", form.block_size), n, k))
    clock = harness.thread_clock if torch.get_num_threads() == 1 else harness.wall_clock
    for op, tokens in TOKENS.items():
        for m in tokens:
            x = torch.randn(m, k if op == "forward" else n).to(dtype)
            harness.check_equal(ours(op, x, weights[0]), theirs(op, x.float(), weights[0]), name, 1e-2)

            def call(run: Run, of: harness.Ring[Weight4bit], op: str = op, x: Tensor = x) -> harness.Call:
                return lambda i: run(op, x, of.at(i))

            times = harness.interleave(
                {"ours": call(ours, weights), "dequantize": call(theirs, weights), "NF4": call(ours, nf4)},
                seconds=seconds,
                clock=clock,
            )
            report.add(
                format=name,
                shape=f"{n}x{k}",
                operator=op,
                M=m,
                us=round(times.median("ours") * 1e6, 1),
                dequantize=times.ratio("ours", "dequantize"),
                NF4=times.ratio("ours", "NF4"),
                bytes=round(weights[0].nbytes / nf4[0].nbytes, 2),
            )


def main() -> None:
    parser = harness.parser(__doc__, seconds=1.0)
    parser.add_argument("--dtype", choices=["bfloat16", "float32", "float16"], default="bfloat16")
    parser.add_argument("--shapes", default="4096x4096", help="N x K of the weights (default %(default)s)")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, help="only these")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    harness.keep_freed_memory()
    report = harness.Report(
        f"formats_{arguments.dtype}_{arguments.threads}_threads",
        f"Formats on the CPU, {arguments.dtype}",
        [
            "us: our time. dequantize: our time over that of dequantizing and torch's matmul. NF4: our time over ours "
            "of NF4 with float32 scales in blocks of the same size.",
        ],
    )
    for shape in arguments.shapes.split(","):
        n, k = map(int, shape.split("x"))
        for name in arguments.formats or FORMATS:
            form = FORMATS[name]
            measure(report, name, form, (n, k), getattr(torch, arguments.dtype), arguments.seconds)
    report.write()


if __name__ == "__main__":
    main()
