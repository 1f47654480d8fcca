"""What a call of a small layer costs in eager mode, where Python and the dispatcher take most of the time.

    python bench/eager_overhead.py [--against DIR] [--rounds 3] [--seconds 4]

One token, 576x576, bfloat16, no gradient, one thread, whose CPU time is measured. Contenders run interleaved in one
process, in each of --rounds processes, and the shortest of all samples counts: other processes only add time.
`--against` measures the package of another checkout too, whose libraries must be compiled, by turns with this one's.
A contender that it lacks has no time there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

from lib import harness

ROOT = Path(__file__).resolve().parents[1]
FEATURES, RANK, SCALING = 576, 16, 2.0


def contenders() -> dict[str, nn.Module | harness.Call]:
    from peft import LoraConfig, get_peft_model

    import qlora_ext

    dense = nn.Linear(FEATURES, FEATURES, bias=False, dtype=torch.bfloat16)
    layer = qlora_ext.nn.Linear4bit.from_linear(dense)
    a, b = (torch.randn(RANK, FEATURES) * 0.04).bfloat16(), (torch.randn(FEATURES, RANK) * 0.04).bfloat16()
    x = torch.randn(1, FEATURES).bfloat16()
    adapted = get_peft_model(
        nn.ModuleDict({"proj": qlora_ext.nn.Linear4bit.from_linear(dense)}),
        LoraConfig(r=RANK, lora_alpha=round(RANK * SCALING), target_modules=["proj"]),
    ).base_model.model["proj"]
    calls: dict[str, harness.Call] = {
        "Linear4bit": lambda _: layer(x),
        "Linear4bit, LoRA in the same operator": lambda _: layer.fused_forward(x, a, b, SCALING),
        "Linear4bit, LoRA of PEFT": lambda _: adapted(x),
    }
    w4 = qlora_ext.quantize_nf4(dense.weight)
    if isinstance(w4, torch.Tensor):
        plain = nn.Linear(FEATURES, FEATURES, bias=False, device="meta")
        plain.weight = nn.Parameter(w4, requires_grad=False)
        harness.check_equal(plain(x), layer(x), "nn.Linear with a 4-bit weight")
        calls["nn.Linear with a 4-bit weight"] = lambda _: plain(x)
    calls["nn.Linear, dense"] = lambda _: dense(x)
    return calls


@torch.no_grad()
def measure(seconds: float) -> dict[str, float]:
    """Microseconds per call of each contender."""
    torch.set_num_threads(1)
    calls = contenders()
    times = harness.interleave(calls, seconds=seconds, clock=harness.thread_clock)
    return {name: times.best(name) * 1e6 for name in calls}


def measured(checkout: Path, seconds: float) -> dict[str, float]:
    """The same in a process that imports the package of ``checkout``."""
    command = [sys.executable, __file__, "--measure", "--seconds", str(seconds)]
    environment = {**os.environ, "PYTHONPATH": str(checkout / "python")}
    run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(run.stdout)
    return found


def main() -> None:
    parser = harness.parser(__doc__, seconds=4.0)
    parser.add_argument("--against", type=Path, metavar="DIR", help="another checkout")
    parser.add_argument("--rounds", type=int, default=3, help="processes per checkout (default %(default)s)")
    parser.add_argument("--measure", action="store_true", help="print this process's times as JSON, and nothing else")
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.seconds)))
        return
    torch.set_num_threads(1)
    checkouts = {"microseconds": ROOT} | ({"before": arguments.against} if arguments.against else {})
    runs: dict[str, list[dict[str, float]]] = {column: [] for column in checkouts}
    for _ in range(arguments.rounds):
        for column, checkout in checkouts.items():
            runs[column].append(measured(checkout, arguments.seconds))
    notes = []
    if arguments.against:
        commit = ["git", "-C", str(arguments.against), "log", "-1", "--format=before: commit %h"]
        notes = [subprocess.run(commit, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()]
    report = harness.Report("eager_overhead", "One token through a 576x576 layer, eager", notes)
    for name in runs["microseconds"][0]:
        best = {column: [run[name] for run in found if name in run] for column, found in runs.items()}
        report.add(contender=name, **{column: round(min(times), 1) for column, times in best.items() if times})
    report.write()


if __name__ == "__main__":
    main()
