"""The time and memory of streaming on the CPU, for a random Llama.

    python bench/streaming.py [--layers 8] [--hidden 1024] [--tokens 1024] [--directory DIR]

The first part measures tokens per second of a training step (LoRA of rank 16 on all linear layers, AdamW, gradient
checkpointing, chunked loss): streamed over resident, round by round, with the files in the page cache, and with every
layer read from the disk (its pages are dropped after each read), and the bandwidth of the disk.

The second part measures peak memory in separate processes: of `quantize` on the dense model in shards, without Python
and its libraries, and of a streamed run of `finetune`, compared with the prediction of `plan`.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

import qlora_ext
from lib import harness
from qlora_app.models.loss import learnt_loss
from qlora_ext.streaming import stream, streaming_of
from qlora_ext.streaming.files import File

RANK, VOCABULARY = 16, 8192
TINY = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 1,
    "vocab_size": 512,
}


def drop_cache(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


class Cold:
    """Drops the pages of streamed blocks from the page cache after each read."""

    def __enter__(self) -> None:
        self._read = File.read

        def read(file: File, offset: int, into: memoryview) -> None:
            self._read(file, offset, into)
            os.posix_fadvise(file._descriptor, offset, len(into), os.POSIX_FADV_DONTNEED)

        File.read = read  # type: ignore[method-assign]

    def __exit__(self, *_: object) -> None:
        File.read = self._read  # type: ignore[method-assign]


def disk_rate(files: list[pathlib.Path], size: int) -> float:
    """Bytes per second of consecutive uncached reads of `size` bytes."""
    buffer = memoryview(bytearray(size))
    total, seconds = 0, 0.0
    for path in files:
        drop_cache(path)
        with path.open("rb", buffering=0) as file:
            start = time.perf_counter()
            while count := file.readinto(buffer):
                total += count
            seconds += time.perf_counter() - start
    return total / seconds


def trainable(path: pathlib.Path, from_disk: bool) -> Any:
    model = AutoModelForCausalLM.from_pretrained(path, device_map="cpu")
    if from_disk:
        stream(model, source="disk")
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def step_of(model: Any, tokens: int) -> Callable[[int], Any]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    positions = torch.arange(tokens)[None]

    def step(turn: int) -> float:
        ids = torch.randint(0, VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(turn))
        inputs = {"input_ids": ids, "labels": ids, "position_ids": positions}
        loss = learnt_loss(model, inputs, None, chunked=True)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return step


def speed(report: harness.Report, packed: pathlib.Path, tokens: int, seconds: float) -> None:
    # Each contender reads its own files, because the pages that one has mapped stay in the cache.
    paths = {how: packed.with_name(how) for how in ("resident", "streamed", "cold")}
    for path in paths.values():
        shutil.copytree(packed, path)
    models = {how: trainable(path, how != "resident") for how, path in paths.items()}
    steps = {how: step_of(model, tokens) for how, model in models.items()}
    if len({step(0) for step in steps.values()}) != 1:
        raise AssertionError("a streamed step is not the resident one, nothing is timed")
    streaming = streaming_of(models["cold"])
    files = sorted(paths["cold"].glob("*.safetensors"))
    for file in files:
        drop_cache(file)

    def cold(turn: int) -> None:
        with Cold():
            steps["cold"](turn)

    times = harness.interleave({**steps, "cold": cold}, seconds=seconds)
    for name, cache in (("streamed", "warm"), ("cold", "dropped behind every read")):
        ratio = harness.spread([a / b for a, b in zip(times["resident"], times[name], strict=True)])
        row = {"tokens per step": tokens, "page cache": cache, "tokens/s": tokens / times.median(name)}
        report.add(**row, **{"tokens/s resident": tokens / times.median("resident"), "ratio": ratio})
    size = streaming.block_bytes // len(streaming.blocks)
    rate = disk_rate(files, size)
    needed = 2 * (len(streaming.blocks) - len(streaming.slots)) * size / rate
    report.notes.append(
        f"A layer is {size / 1e6:.1f} MB; the disk gave {rate / 1e6:.0f} MB/s uncached, {needed:.2f} s for what a step "
        f"reads of {times.median('cold'):.2f} s that the cold step took."
    )


_MAIN = "import sys; from qlora_app.main import main; sys.exit(main(sys.argv[1:]))"
# Runs the command, and prints its peak resident memory in bytes.
_MEASURED = """
import pathlib, re, sys
from qlora_app.main import main
code = main(sys.argv[1:])
print("peak", int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]) * 1024)
sys.exit(code)
"""


def peak_of(*command: str) -> int:
    run = subprocess.run([sys.executable, "-c", _MEASURED, *command, "--device", "cpu"], capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"qlora-ext {' '.join(command)}: {run.stderr[-2000:]}")
    return int(run.stdout.split()[-1])


def memory(report: harness.Report, dense: pathlib.Path, packed: pathlib.Path, tokens: int) -> None:
    """Report the peak memory of `quantize`, less its peak for a tiny model, and of `finetune`, next to its plan."""
    tiny_dense, _ = save(LlamaConfig(**TINY, max_position_embeddings=tokens), dense.with_name("tiny"))
    data, turns = dense.with_name("data.jsonl"), iter(range(4))
    words = " ".join(f"{i}" for i in range(2 * tokens))
    data.write_text("".join(json.dumps({"text": f"{i} {words}"}) + "\n" for i in range(8)))
    sizes = ["--seq-len", str(tokens), "--batch-size", "1"]
    options = ["--chunked-loss", "--grad-checkpointing", "--stream", "disk"]

    def quantizing(path: pathlib.Path) -> int:
        return peak_of("quantize", "--model", str(path), "--output", str(dense.with_name(f"out{next(turns)}")))

    def tuning(path: pathlib.Path) -> int:
        files = ["--model", str(path), "--data", str(data), "--output", str(dense.with_name(f"out{next(turns)}"))]
        return peak_of("finetune", *files, *sizes, *options, "--eval-size", "1", "--max-steps", "5")

    model = AutoModelForCausalLM.from_pretrained(dense)
    largest = max(t.nbytes for t in model.parameters())
    table = model.get_input_embeddings().weight.nbytes
    bytes_in = {path: sum(file.stat().st_size for file in path.glob("*.safetensors")) for path in (dense, packed)}
    own = quantizing(tiny_dense)
    report.notes.append(
        f"`quantize`: {(quantizing(dense) - own) / 1e6:.0f} MB at most above the {own / 1e6:.0f} MB that it needs for "
        f"a tiny model. The dense model has {bytes_in[dense] / 1e6:.0f} MB ({bytes_in[packed] / 1e6:.0f} MB in 4 "
        f"bits); its largest weight has {largest / 1e6:.0f} MB, its embeddings and head {table / 1e6:.0f} MB each."
    )
    plan = [sys.executable, "-c", _MAIN, "plan", "--model", str(packed), *sizes, *options, "--device", "cpu", "--json"]
    planned = json.loads(subprocess.run(plan, capture_output=True, text=True, check=True).stdout)
    found = tuning(packed)
    total, process, ring = planned["total"], planned["bytes"]["process"], planned["bytes"]["ring"]
    report.notes.append(
        f"`finetune --stream disk`, {tokens} tokens per step: {found / 1e6:.0f} MB at most, {total / 1e6:.0f} MB by "
        f"`plan --device cpu` ({found / total:.2f} of it), including {process / 1e6:.0f} MB of Python and its "
        f"libraries and {ring / 1e6:.0f} MB of a ring of two layers."
    )


def save(config: LlamaConfig, directory: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """A random model, dense and in 4 bits, with a byte-level tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    dense, packed = directory / "dense", directory / "packed"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(dense, max_shard_size="200MB")
    qlora_ext.quantize_model(model, skip=("lm_head",)).save_pretrained(packed, max_shard_size="200MB")
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<eos>"]
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    for path in (dense, packed):
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(path)
    return dense, packed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8, help="default %(default)s")
    parser.add_argument("--hidden", type=int, default=1024, help="default %(default)s")
    parser.add_argument("--tokens", type=int, default=1024, help="default %(default)s")
    parser.add_argument("--seconds", type=float, default=120.0, help="of timing, default %(default)s")
    parser.add_argument("--directory", type=pathlib.Path, help="on the disk to be measured; default: a temporary one")
    arguments = parser.parse_args()
    report = harness.Report(
        "streaming",
        "A streamed base against a resident one, on the CPU",
        [
            f"A random Llama of {arguments.layers} layers of {arguments.hidden}, bfloat16, LoRA of rank {RANK} on all",
            "linear layers, gradient checkpointing, chunked loss, ring of two layers. Ratio: tokens",
            "per second, streamed over resident, round by round (median, 10th and 90th percentile).",
        ],
    )
    with tempfile.TemporaryDirectory(dir=arguments.directory) as scratch:
        config = LlamaConfig(
            hidden_size=arguments.hidden,
            intermediate_size=arguments.hidden * 11 // 4,
            num_hidden_layers=arguments.layers,
            num_attention_heads=arguments.hidden // 64,
            num_key_value_heads=arguments.hidden // 128,
            vocab_size=VOCABULARY,
            max_position_embeddings=arguments.tokens,
        )
        dense, packed = save(config, pathlib.Path(scratch, "model"))
        memory(report, dense, packed, arguments.tokens)
        speed(report, packed, arguments.tokens, arguments.seconds)
    report.write()


if __name__ == "__main__":
    main()
