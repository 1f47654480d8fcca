"""Several adapters in one call of the linear layer, compared with a call per adapter and with one adapter for all rows.

    python bench/adapters.py [--threads 2] [--dtype bfloat16] [--seconds 2]

LoRA of rank 16, double quantization, warm operands. With one thread, its CPU time is measured. "training": 8 adapters
with 32 rows each, consecutive; forward, dX and the gradients of A and B against eight calls one after the other.
"decoding": 16 rows that use 16 adapters, forward only, against 16 rows that use one. Adapters are stacked once, before
the calls.
"""

from __future__ import annotations

import torch
from torch import Tensor

import qlora_ext
from lib import harness
from qlora_ext.adapters import StackedAdapters, stack_adapters

SHAPES = {  # N x K
    "SmolLM2-135M": [(576, 576), (192, 576), (1536, 576), (576, 1536)],
    "1.1B": [(2048, 2048), (256, 2048), (5632, 2048), (2048, 5632)],
}
RANK, SCALING = 16, 2.0
OPS = torch.ops.qlora


class Layer:
    """A weight and the adapters of one bench."""

    def __init__(self, n: int, k: int, adapters: int, dtype: torch.dtype) -> None:
        self.n, self.k = n, k
        self.w4 = qlora_ext.quantize_nf4((torch.randn(n, k) * 0.02).to(dtype))
        self.lora_a = [(torch.randn(RANK, k) * k**-0.5).to(dtype) for _ in range(adapters)]
        self.lora_b = [(torch.randn(n, RANK) * 0.1).to(dtype) for _ in range(adapters)]
        self.stacked = stack_adapters(self.lora_a, self.lora_b, SCALING)

    def _last(self, of_row: Tensor) -> tuple:
        s: StackedAdapters = self.stacked
        return of_row, s.rank_offsets, s.scalings, None, s.max_rank

    def forward(self, x: Tensor, adapter: int) -> Tensor:
        lora = self.lora_a[adapter], self.lora_b[adapter], SCALING, 0.0, 0, None
        y: Tensor = OPS.linear_nf4(x, *self.w4.operands(self.n, None, *lora))
        return y

    def forward_together(self, x: Tensor, of_row: Tensor) -> Tensor:
        lora = self.stacked.lora_a, self.stacked.lora_b, 1.0, 0.0, 0, None
        y: Tensor = OPS.linear_nf4(x, *self.w4.operands(self.n, None, *lora), *self._last(of_row))
        return y

    def step(self, x: Tensor, dy: Tensor, adapter: int) -> Tensor:
        """y; dx, da and db are computed and dropped."""
        lora = self.lora_a[adapter], self.lora_b[adapter], SCALING, 0.0, 0, None
        y, h = OPS.linear_nf4_with_h(x, *self.w4.operands(self.n, None, *lora))
        _, g = OPS.linear_nf4_dx_with_g(dy, *self.w4.operands(self.k, *lora))
        OPS.linear_nf4_dlora(dy, x, *lora, h, g)
        result: Tensor = y
        return result

    def step_together(self, x: Tensor, dy: Tensor, of_row: Tensor) -> Tensor:
        lora = self.stacked.lora_a, self.stacked.lora_b, 1.0, 0.0, 0, None
        last = self._last(of_row)
        y, h = OPS.linear_nf4_with_h(x, *self.w4.operands(self.n, None, *lora), *last)
        _, g = OPS.linear_nf4_dx_with_g(dy, *self.w4.operands(self.k, *lora), *last)
        OPS.linear_nf4_dlora(dy, x, *lora, h, g, *last)
        result: Tensor = y
        return result


def interleave(contenders: dict[str, harness.Call], seconds: float) -> harness.Times:
    clock = harness.thread_clock if torch.get_num_threads() == 1 else harness.wall_clock
    return harness.interleave(contenders, seconds=seconds, clock=clock)


def training(layers: list[Layer], dtype: torch.dtype, seconds: float, adapters: int, rows: int) -> harness.Times:
    of_row = torch.arange(adapters, dtype=torch.int32).repeat_interleave(rows)
    inputs = [(torch.randn(len(of_row), a.k).to(dtype), torch.randn(len(of_row), a.n).to(dtype)) for a in layers]

    def separately(i: int) -> None:
        for layer, (x, dy) in zip(layers, inputs, strict=True):
            for e in range(adapters):
                layer.step(x[e * rows : (e + 1) * rows], dy[e * rows : (e + 1) * rows], e)

    def together(i: int) -> None:
        for layer, (x, dy) in zip(layers, inputs, strict=True):
            layer.step_together(x, dy, of_row)

    return interleave({"separately": separately, "together": together}, seconds)


def decoding(layers: list[Layer], dtype: torch.dtype, seconds: float) -> harness.Times:
    of_row = torch.arange(len(layers[0].lora_a), dtype=torch.int32)
    inputs = [torch.randn(len(of_row), layer.k).to(dtype) for layer in layers]
    for layer, x in zip(layers, inputs, strict=True):
        harness.check_equal(layer.forward_together(x, of_row)[3], layer.forward(x, 3)[3], "row 3")

    def one(i: int) -> None:
        for layer, x in zip(layers, inputs, strict=True):
            layer.forward(x, 0)

    def mixed(i: int) -> None:
        for layer, x in zip(layers, inputs, strict=True):
            layer.forward_together(x, of_row)

    return interleave({"one": one, "mixed": mixed}, seconds)


def main() -> None:
    parser = harness.parser(__doc__, seconds=2.0)
    parser.add_argument("--dtype", choices=["bfloat16", "float32", "float16"], default="bfloat16")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)
    harness.keep_freed_memory()
    dtype = getattr(torch, arguments.dtype)
    report = harness.Report(
        f"adapters_{arguments.dtype}_{arguments.threads}_threads",
        f"Several adapters in one call on the CPU, {arguments.dtype}",
        [
            "Speedup of training 8 adapters of rank 16 with 32 rows each in one call, against a call per adapter;",
            "time of decoding 16 rows with 16 adapters, in units of that with one adapter. All four shapes of a block.",
        ],
    )
    for model, shapes in SHAPES.items():
        train = training([Layer(n, k, 8, dtype) for n, k in shapes], dtype, arguments.seconds, 8, 32)
        decode = decoding([Layer(n, k, 16, dtype) for n, k in shapes], dtype, arguments.seconds)
        report.add(
            model=model,
            **{
                "training: speedup": train.ratio("separately", "together"),
                "training: tokens/s": round(256 / train.median("together")),
                "decoding: time": decode.ratio("mixed", "one"),
            },
        )
    report.write()


if __name__ == "__main__":
    main()
