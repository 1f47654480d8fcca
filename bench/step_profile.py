"""Where the time of a training step on the CPU goes: 4-bit layers, output head, attention and the rest.

    python bench/step_profile.py [--tokens 4x256] [--steps 4] [--threads 2] [--dropout 0.05]

The contenders are those of bench/step.py, each in the faster of --dtypes. torch's profiler gives the time in each
operator without its callees, summed over --steps steps after one that is not counted. What the profiler attributes to
no operator, Python included, is a row of its own. The profiler itself slows the step, by the factor in the notes.
"""

from __future__ import annotations

import importlib.util
import pathlib
import tempfile
import time
from collections import defaultdict
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import step as steps
from lib import harness

LINEAR, DENSE, HEAD = "4-bit layers with LoRA", "dense matmuls", "output head and loss"
ATTENTION, DROPOUT, OPTIMIZER = "attention", "dropout", "optimizer"
ELEMENTWISE, OTHER = "elementwise, norms and copies", "Python and dispatch"
GROUPS = (LINEAR, DENSE, HEAD, ATTENTION, DROPOUT, ELEMENTWISE, OPTIMIZER, OTHER)
OPTIMIZER_STEP = "Optimizer.step"
MATMULS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "aten::matmul", "aten::addmm_"}


def group(name: str, shapes: list[Any], vocabulary: int) -> str:
    """The group of an operator. Operands with the size of the vocabulary belong to the output head."""
    operator = name.split("::")[-1]
    if "scaled_dot_product" in operator or "flash_attention" in operator or operator in ("bmm", "_softmax"):
        return ATTENTION
    if any(vocabulary in shape for shape in shapes if isinstance(shape, (list, tuple))):
        return HEAD
    if name.startswith(("qlora::", "bitsandbytes::")):
        return LINEAR
    if name in MATMULS or "mkldnn" in operator:
        return DENSE
    if "bernoulli" in operator or "dropout" in operator:
        return DROPOUT
    return ELEMENTWISE


def seconds_by_group(step: steps.Step, count: int) -> tuple[dict[str, float], float]:
    """Seconds per step in each group, and the factor by which the profiler slows the step."""
    step(0)
    plain = harness.wall_clock(step, range(count))
    found: defaultdict[str, float] = defaultdict(float)
    optimizer = step.optimizer.step

    def timed(*arguments: Any) -> Any:
        start = time.perf_counter()
        result = optimizer(*arguments)
        found[OPTIMIZER] += (time.perf_counter() - start) / count
        return result

    vocabulary = step.model.config.vocab_size
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as record:
        step.optimizer.step = timed  # type: ignore[method-assign]
        total = harness.wall_clock(step, range(count))
    step.optimizer.step = optimizer  # type: ignore[method-assign]
    for event in record.events():
        parent, inside = event.cpu_parent, False
        while parent is not None and not inside:
            inside, parent = parent.name.startswith(OPTIMIZER_STEP), parent.cpu_parent
        if not inside and not event.name.startswith(OPTIMIZER_STEP):
            name = group(event.name, list(event.input_shapes or []), vocabulary)
            found[name] += event.self_cpu_time_total * 1e-6 / count
    found[OTHER] = total - sum(found.values())
    return dict(found), total / plain


def main() -> None:
    parser = harness.parser(__doc__, seconds=0.0)
    parser.add_argument("--tokens", default="4x256", help="batch x sequence length (default %(default)s)")
    parser.add_argument("--steps", type=int, default=4, help="profiled steps per contender (default %(default)s)")
    parser.add_argument("--dropout", type=float, default=0.0, help="of LoRA (default %(default)s)")
    parser.add_argument(
        "--dtypes", nargs="+", default=["bfloat16", "float32"], choices=("bfloat16", "float32"),
        help="of the computation, of which each contender gets the faster (default: both)",
    )  # fmt: skip
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    batch, length = (int(part) for part in arguments.tokens.split("x"))
    names = [steps.OURS, "dense LoRA", *(["bitsandbytes"] if importlib.util.find_spec("bitsandbytes") else [])]
    rows: list[dict[str, Any]] = []
    slower = []
    with tempfile.TemporaryDirectory() as directory:
        path = pathlib.Path(directory)
        steps.prepare("smollm2", path, 4, batch, length)
        harness.keep_freed_memory()
        for name in names:
            probes = steps.probe(name, path, arguments.dtypes, arguments.dropout)
            dtype = min(probes, key=probes.__getitem__)
            found, factor = seconds_by_group(steps.Step(name, path, batch, dtype, arguments.dropout), arguments.steps)
            total = sum(found.values())
            slower.append(f"{name} {factor:.2f}")
            row = {"base": name, "dtype": steps.name_of(dtype), "seconds per step": total}
            rows.append(row | {key: found.get(key, 0.0) / total for key in GROUPS})
    report = harness.Report(
        f"step_profile_{'dropout_' if arguments.dropout else ''}{arguments.threads}_threads",
        "Where the time of a training step on the CPU goes",
        [
            f"SmolLM2-135M-Instruct, {batch} x {length} tokens per step, LoRA of rank {steps.RANK} and dropout",
            f"{arguments.dropout:g} on all linear layers. Peers without a fused layer run LoRA as dense matmuls.",
            "Shares of the step's time under torch's profiler, which slows it by: " + ", ".join(slower) + ".",
        ],
    )
    for row in rows:
        report.add(**row)
    report.write()


if __name__ == "__main__":
    main()
