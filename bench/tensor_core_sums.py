"""What rounding does to long sums on tensor cores: one chain of products, and partial sums of 64 as the forward makes.

    python bench/tensor_core_sums.py

Computed in numpy, with the arithmetic of A100 and H100 in tests/cudasim/tests/runtime/card_sums.py (after MMA-Sim,
arXiv 2511.10909). The kernel simulator agrees with it bit for bit. No GPU was measured. Writes a section of
bench/results/kernel_simulator.json.
"""

from __future__ import annotations

import sys

import numpy as np

from lib import results_files as files

sys.path.extend(str(files.RESULTS.parents[1] / "tests" / folder) for folder in ("lib", "cudasim/tests/runtime"))
from card_sums import KINDS, Kind, card_sum

from reference import NF4

CARDS = {"A100": 80, "H100": 90}
TERMS = (512, 4096, 17792)
ROWS, SEGMENT = 256, 64  # 8 sums per row; the weights of a block
NOTES = (
    "Sums of normal activations times NF4 values, both rounded to the type; 2048 sums per row of this table. Bias: the "
    "mean of the error toward zero, over the mean magnitude of the sums. Error: the root mean square, over that of the "
    "sums. One chain adds each product to the accumulator, as the products of dX, of LoRA's gradients and of a dense "
    "matmul do. The forward sums 64 products from zero, then adds them, times their scale, in float32.",
)


def rounded(x: np.ndarray, kind: Kind) -> np.ndarray:
    """To the nearest value of the kind's type."""
    if kind is KINDS["f16"]:
        return x.astype(np.float16).astype(np.float64)
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32).astype(np.float64)


def chain(arch: int, kind: Kind, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    total = np.zeros((len(a), b.shape[1]), np.float32)
    for k in range(0, len(b), kind.k):
        total = card_sum(arch, kind, a[:, k : k + kind.k], b[k : k + kind.k], total)
    return total


def by_segments(arch: int, kind: Kind, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    total = np.zeros((len(a), b.shape[1]), np.float32)
    for k in range(0, len(b), SEGMENT):
        total += chain(arch, kind, a[:, k : k + SEGMENT], b[k : k + SEGMENT])
    return total


def row(name: str, terms: int, card: str) -> files.Row:
    kind, rng = KINDS[name], np.random.default_rng(terms)
    a = rounded(rng.standard_normal((ROWS, terms)), kind)
    b = rounded(NF4[rng.integers(0, 16, (terms, 8))], kind)
    exact = a @ b
    found: files.Row = {"type": {"f16": "float16", "bf16": "bfloat16"}[name], "terms": terms, "card": card}
    biases = []
    for how, add in (("one chain", chain), ("forward", by_segments)):
        error = add(CARDS[card], kind, a, b) - exact
        biases.append(float(-(error * np.sign(exact)).mean() / np.abs(exact).mean()))
        found |= {f"bias, {how}": biases[-1], f"error, {how}": float(np.sqrt((error**2).mean() / (exact**2).mean()))}
    return found | {"bias, chain over forward": biases[0] / biases[1]}


def main() -> None:
    rows = [row(name, terms, card) for name in ("f16", "bf16") for terms in TERMS for card in CARDS]
    section = {"title": "Rounding of long sums on tensor cores", "notes": list(NOTES), "machine": {}, "rows": rows}
    files.write_section(files.RESULTS / f"{files.SIMULATOR}.json", "tensor_core_sums", section)
    print("\n".join(files.table(rows)))


if __name__ == "__main__":
    main()
