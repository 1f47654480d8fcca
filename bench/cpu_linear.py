"""linear_nf4 and its input gradient on the CPU, compared with the alternatives that users have.

    python bench/cpu_linear.py [--seconds 3] [--threads 2] [--dtype bfloat16]

Ratios are times over that of torch's `F.linear` (dX: `dy @ w`) on the dense weight in the same dtype, round by round:
lower is better. Ours includes LoRA of rank 16 and double quantization. The contenders are:

- `F.linear` with LoRA as two more matmuls, with adapters in the same dtype, and in float32 with casts, as in PEFT;
- our decoding followed by `F.linear`;
- the training paths of bitsandbytes and of torchao's NF4, if installed, without LoRA;
- two kernels for inference only, in bfloat16 and without LoRA: bitsandbytes' over the weight that it repacks in eval
  mode, and ATen's over affine int4 in groups of 64.

Operands are rotated out of the caches. With one thread, CPU time is measured, because other processes affect it less.

For another instruction set, also in torch: QLORA_CPU_ISA=avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional

import qlora_ext
from lib import harness
from qlora_ext import _C

SHAPES = "1536x576,4096x4096,14336x4096"
TOKENS = "1,4,16,64,256,1024"
RANK, SCALING = 16, 2.0
INT4_GROUP = 64
Kernel = Callable[[Tensor, int], Tensor]  # arguments: x, and the number of the call


def lora(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return functional.linear(functional.linear(x, a), b) * SCALING


def aten_int4(w: Tensor, count: int) -> Kernel:
    """ATen's kernel over `count` copies of w, rounded to 15 steps of each group."""
    n, k = w.shape
    groups = w.float().reshape(n, k // INT4_GROUP, INT4_GROUP)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = (high - low) / 15
    codes = ((groups - low) / scale).round()
    middle = low + 8 * scale  # a code stands for (code - 8) * scale + middle
    scale_and_middle = torch.cat([scale, middle], -1).transpose(0, 1).to(w.dtype).contiguous()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.reshape(n, k).int(), 1)
    packs = harness.Ring(packed.clone() for _ in range(count))

    def kernel(x: Tensor, i: int) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, packs.at(i), INT4_GROUP, scale_and_middle)

    x = torch.randn(4, k).to(w.dtype)
    decoded = ((codes - 8) * scale + middle).reshape(n, k)
    harness.check_equal(kernel(x, 0), x.double() @ decoded.double().T, "ATen int4", 1e-2)
    return kernel


def repacked_bitsandbytes(bnb: ModuleType, w: Tensor, dense: Tensor, count: int) -> Kernel | None:
    """The kernel of bitsandbytes' eval mode over `count` copies of w; None if the processor does not support it."""
    layer = bnb.nn.Linear4bit(w.shape[1], w.shape[0], bias=False, compute_dtype=w.dtype, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(w, requires_grad=False, quant_type="nf4")
    layer.to("cpu").eval()
    x = torch.randn(4, w.shape[1]).to(w.dtype)
    y, state = layer(x), layer.weight.quant_state
    if not getattr(state, "packing_format_for_cpu", False):
        return None
    harness.check_equal(y, x.double() @ dense.double().T, "bitsandbytes, repacked", 1e-2)
    packs = harness.Ring(layer.weight.data.clone() for _ in range(count))
    return lambda x, i: bnb.matmul_4bit(x, packs.at(i), quant_state=state)


def torchao_nf4() -> tuple[Callable[[Tensor, int, int], Tensor], Callable[[Tensor, Tensor], Tensor]] | None:
    """torchao's functions that create an NF4 tensor and multiply with it; None if it is not installed."""
    for name in ("torchao.quantization.quantize_.workflows.nf4.nf4_tensor", "torchao.dtypes.nf4tensor"):
        with contextlib.suppress(ImportError):
            module = importlib.import_module(name)
            return module.to_nf4, module.linear_nf4
    return None


class Bench:
    def __init__(self, report: harness.Report, seconds: float, dtype: torch.dtype, tokens: list[int]) -> None:
        self.report, self.seconds, self.dtype, self.tokens = report, seconds, dtype, tokens
        self.clock = harness.thread_clock if torch.get_num_threads() == 1 else harness.wall_clock
        self.bnb = None
        if importlib.util.find_spec("bitsandbytes"):
            import bitsandbytes

            self.bnb = bitsandbytes
        self.torchao = torchao_nf4()

    def shape(self, n: int, k: int) -> None:
        w = (torch.randn(n, k) * 0.02).to(self.dtype)
        a, b = (torch.randn(RANK, k) * 0.02).to(self.dtype), (torch.randn(n, RANK) * 0.02).to(self.dtype)
        w4 = qlora_ext.quantize_nf4(w)
        dense = w4.dequantize(self.dtype)
        count = len(harness.cold(lambda: None, dense.nbytes))
        weights = harness.Ring(dense.clone() for _ in range(count))
        packs = harness.Ring(w4.replace(packed=w4.packed.clone()) for _ in range(count))
        bnb_packs = None
        if self.bnb is not None and k % 64 == 0:
            packed, state = self.bnb.functional.quantize_4bit(w, compress_statistics=True, quant_type="nf4")
            bnb_packs = harness.Ring((packed.clone(), state) for _ in range(count))
        torchao: dict[str, Kernel] = {}
        if self.torchao is not None:
            to_nf4, linear_nf4 = self.torchao
            theirs = to_nf4(w, 64, 256)
            torchao["torchao NF4"] = lambda x, i: linear_nf4(x, theirs)
        inference: dict[str, Kernel | None] = {}
        if self.dtype == torch.bfloat16:
            if bnb_packs is not None:
                inference["bitsandbytes, repacked"] = repacked_bitsandbytes(self.bnb, w, dense, count)
            inference["ATen int4"] = aten_int4(w, count)
        for m in self.tokens:
            if m * n * k <= 2**36:
                self.forward(m, weights, packs, bnb_packs, torchao | inference, a, b)
                self.gradient(m, weights, packs, bnb_packs, a, b)

    def forward(self, m, weights, packs, bnb_packs, others, a: Tensor, b: Tensor) -> None:
        n, k = weights.at(0).shape
        x = torch.randn(m, k).to(self.dtype)

        def ours(i: int) -> Tensor:
            return torch.ops.qlora.linear_nf4(x, *packs.at(i).operands(n, None, a, b, SCALING, 0.0, 0, None))

        def decoded(i: int) -> Tensor:
            return packs.at(i).dequantize(self.dtype)

        a32, b32 = a.float(), b.float()
        calls = {
            "F.linear": lambda i: functional.linear(x, weights.at(i)),
            "ours": ours,
            "F.linear + LoRA": lambda i: functional.linear(x, weights.at(i)) + lora(x, a, b),
            "F.linear + float32 LoRA": lambda i: (
                functional.linear(x, weights.at(i)) + lora(x.float(), a32, b32).to(self.dtype)
            ),
            "decode + F.linear": lambda i: functional.linear(x, decoded(i)),
        }
        if bnb_packs is not None:
            calls["bitsandbytes"] = lambda i: self.bnb.matmul_4bit(
                x, bnb_packs.at(i)[0].t(), quant_state=bnb_packs.at(i)[1]
            )
        for name, kernel in others.items():
            if kernel is not None:
                calls[name] = functools.partial(kernel, x)
        expected = x.double() @ weights.at(0).double().T + SCALING * (x.double() @ a.double().T) @ b.double().T
        harness.check_equal(ours(0), expected, "linear_nf4", 1e-2)
        self.run("forward", m, n, k, calls, "F.linear")

    def gradient(self, m, weights, packs, bnb_packs, a: Tensor, b: Tensor) -> None:
        n, k = weights.at(0).shape
        dy = torch.randn(m, n).to(self.dtype)

        def ours(i: int) -> Tensor:
            return torch.ops.qlora.linear_nf4_dx(dy, *packs.at(i).operands(k, a, b, SCALING, 0.0, 0, None))

        calls = {
            "dy @ w": lambda i: dy @ weights.at(i),
            "ours": ours,
            "dy @ w + LoRA": lambda i: dy @ weights.at(i) + (dy @ b) @ a * SCALING,
        }
        if bnb_packs is not None:
            decode = self.bnb.functional.dequantize_4bit
            calls["bitsandbytes"] = lambda i: dy @ decode(*bnb_packs.at(i)).to(self.dtype)
        expected = dy.double() @ weights.at(0).double() + SCALING * (dy.double() @ b.double()) @ a.double()
        harness.check_equal(ours(0), expected, "linear_nf4_dx", 1e-2)
        self.run("dX", m, n, k, calls, "dy @ w")

    def run(self, op: str, m: int, n: int, k: int, calls: dict[str, harness.Call], base: str) -> None:
        times = harness.interleave(calls, seconds=self.seconds, clock=self.clock)
        operator = {"forward": "linear_nf4", "dX": "linear_nf4_dx"}[op]
        kernel = _C.choose(operator, str(self.dtype).removeprefix("torch."), m, n, k)[0]
        row = {"op": op, "N x K": f"{n}x{k}", "M": m, "kernel": kernel, "torch us": round(times.median(base) * 1e6)}
        for name in times:
            if name != base:
                row[name.replace("F.linear", "torch").replace("dy @ w", "torch")] = times.ratio(name, base)
        self.report.add(**row)


def main() -> None:
    parser = harness.parser(__doc__, seconds=3.0)
    parser.add_argument("--dtype", choices=["bfloat16", "float32", "float16"], default="bfloat16")
    parser.add_argument("--shapes", default=SHAPES, help="N x K of the weights (default %(default)s)")
    parser.add_argument("--tokens", default=TOKENS, help="default %(default)s")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)
    harness.keep_freed_memory()
    torch.manual_seed(0)
    forced = [os.environ["QLORA_CPU_ISA"]] if "QLORA_CPU_ISA" in os.environ else []
    report = harness.Report(
        "_".join(["linear", arguments.dtype, str(arguments.threads), "threads", *forced]),
        f"The fused linear layer and its input gradient on the CPU, {arguments.dtype}",
        [
            "Time over that of torch's F.linear (dX: dy @ w) on the dense weight, median (10th to 90th percentile),",
            "lower is better. Ours includes LoRA of rank 16 and double quantization.",
        ],
    )
    tokens = [int(part) for part in arguments.tokens.split(",")]
    bench = Bench(report, arguments.seconds, getattr(torch, arguments.dtype), tokens)
    for shape in arguments.shapes.split(","):
        n, k = (int(part) for part in shape.split("x"))
        bench.shape(n, k)
    report.write()


if __name__ == "__main__":
    main()
