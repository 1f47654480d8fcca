"""Every reader of files gets damaged files. It must succeed with a correct result, or raise a one-sentence error.

``QLORA_ATTACK`` is the number of mutations per file (default 4), ``QLORA_ATTACK_SEED`` their seed (default 0). A
failure prints both and the number of the mutation. More than 4 are marked slow.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import pathlib
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
gguf = pytest.importorskip("gguf")

from commands import Paths
from gguf_files import four_bit_file, llama_file, random_blocks, without_signed_zeros
from mutations import mutate_bytes, mutate_json
from qlora_app.main import main
from qlora_ext.gguf import blocks
from qlora_ext.untrusted import FileError

__all__ = ["four_bit_file", "llama_file"]  # fixtures

COUNT = int(os.environ.get("QLORA_ATTACK", "4"))
SEED = os.environ.get("QLORA_ATTACK_SEED", "0")
pytestmark = [pytest.mark.slow] if COUNT > 4 else []
SECONDS = 60  # seconds after which a command counts as hanging
Mutate = Callable[[random.Random, bytes], bytes]


class Hang(BaseException):
    pass


@contextlib.contextmanager
def limited() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hang(f"no end after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def command(*arguments: object) -> tuple[int, str]:
    """The command's exit code and output, checked: code 0 or 2, no escapes, one sentence on an error."""
    out, err = io.StringIO(), io.StringIO()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with limited(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main([str(argument) for argument in arguments])
    finally:
        torch.set_num_threads(threads)
    printed = out.getvalue() + err.getvalue()
    assert status in (0, 2), printed
    assert "\x1b" not in printed
    assert "\x07" not in printed
    if status == 2:
        assert len(err.getvalue()) < 1200, printed
        assert "Traceback" not in printed
    return status, printed


def attack(file: pathlib.Path, mutate: Mutate, trial: Callable[[], object], count: int = COUNT) -> None:
    """Calls ``trial`` after each of ``count`` mutations of ``file``, which is restored afterwards."""
    complete = file.read_bytes()
    try:
        for i in range(count):
            file.write_bytes(mutate(random.Random(f"{SEED} {file.name} {i}"), complete))
            try:
                trial()
            except BaseException as error:
                note = f"QLORA_ATTACK={COUNT} QLORA_ATTACK_SEED={SEED}: mutation {i} of {file.name}"
                raise AssertionError(f"{note}: {error!r}") from error
    finally:
        file.write_bytes(complete)


def weights_in(directory: pathlib.Path) -> dict[str, bytes]:
    from safetensors.torch import load_file

    return {
        name: t.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for name, t in load_file(directory / "model.safetensors").items()
    }


def quantized_alike(model: pathlib.Path, output: pathlib.Path, names: set[str]) -> None:
    """``quantize`` rejects the model, or gives the same result with any seed, so that no weight is random."""
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        shutil.rmtree(output, ignore_errors=True)
        status, _ = command("quantize", "--model", model, "--output", output)
        if status:
            assert not output.exists()
            return
        found.append(weights_in(output))
    assert found[0] == found[1]
    assert names <= set(found[0])


@pytest.fixture(scope="module")
def names(paths: Paths, tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Damages the weights of the 4-bit model."""
    output = tmp_path_factory.mktemp("whole") / "out"
    assert command("quantize", "--model", paths["model"], "--output", output)[0] == 0
    return set(weights_in(output))


def header_only(draw: random.Random, data: bytes) -> bytes:
    """A safetensors file with a damaged header, in half of the cases valid JSON with a corrected length."""
    size = 8 + int.from_bytes(data[:8], "little")
    if draw.random() < 0.5:
        return mutate_bytes(draw, data, size)
    header = mutate_json(draw, data[8:size])
    return len(header).to_bytes(8, "little") + header + data[size:]


def gguf_header(draw: random.Random, data: bytes) -> bytes:
    return mutate_bytes(draw, data, draw.choice((64, 1000, 5000, len(data))))


MODEL_FILES: dict[str, Mutate] = {
    "config.json": mutate_json,
    "generation_config.json": mutate_json,
    "tokenizer.json": mutate_json,
    "tokenizer_config.json": mutate_json,
    "model.safetensors": header_only,
}


@pytest.mark.parametrize("name", MODEL_FILES)
def test_models(paths: Paths, names: set[str], tmp_path: pathlib.Path, name: str) -> None:
    model = pathlib.Path(shutil.copytree(paths["model"], tmp_path / "model"))
    few = set() if name == "config.json" else names  # a changed configuration may be a valid one of another model
    attack(model / name, MODEL_FILES[name], lambda: quantized_alike(model, tmp_path / "out", few))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_4bit_models(paths: Paths, tmp_path: pathlib.Path, name: str) -> None:
    model = tmp_path / "model"
    assert command("quantize", "--model", paths["model"], "--output", model)[0] == 0
    attack(model / name, MODEL_FILES[name], lambda: quantized_alike(model, tmp_path / "out", set()))


def test_index_of_shards(paths: Paths, names: set[str], tmp_path: pathlib.Path) -> None:
    from transformers import AutoModelForCausalLM

    model = pathlib.Path(shutil.copytree(paths["model"], tmp_path / "model"))
    (model / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(paths["model"]).save_pretrained(model, max_shard_size="100KB")
    index = model / "model.safetensors.index.json"
    attack(index, mutate_json, lambda: quantized_alike(model, tmp_path / "out", names))


def test_gguf(llama_file: pathlib.Path, tmp_path: pathlib.Path) -> None:
    model = pathlib.Path(shutil.copy(llama_file, tmp_path / "model.gguf"))
    attack(model, gguf_header, lambda: quantized_alike(model, tmp_path / "out", set()), 3 * COUNT)


def test_gguf_with_4bit_weights(four_bit_file: pathlib.Path, tmp_path: pathlib.Path) -> None:
    model = pathlib.Path(shutil.copy(four_bit_file, tmp_path / "model.gguf"))
    attack(model, gguf_header, lambda: quantized_alike(model, tmp_path / "out", set()), COUNT)


@pytest.mark.parametrize("kind", blocks.KINDS)
def test_blocks_of_gguf(kind: str) -> None:
    """Damaged blocks are rejected, or have the values that the gguf package gives them, and are written back."""
    shape, number = (4, 512), gguf.GGMLQuantizationType[kind]
    complete = random_blocks(kind, shape, seed=0).tobytes()
    for i in range(50 * COUNT):
        damaged = mutate_bytes(random.Random(f"{SEED} {kind} {i}"), complete)
        try:
            w4 = blocks.read(kind, damaged, shape, "file: tensor")
        except FileError:
            continue
        data = np.frombuffer(damaged, np.uint8).reshape(gguf.quant_shape_to_byte_shape(shape, number))
        as_blocks = data.reshape(-1, gguf.GGML_QUANT_SIZES[number][1])
        assert blocks.write(kind, w4) == without_signed_zeros(kind, as_blocks).tobytes()
        with np.errstate(over="ignore"):
            expected = torch.from_numpy(gguf.dequantize(data, number))
        assert torch.equal(w4.dequantize(), expected), f"QLORA_ATTACK_SEED={SEED}: mutation {i}"


def test_configuration_for_a_plan(paths: Paths, tmp_path: pathlib.Path) -> None:
    model = pathlib.Path(shutil.copytree(paths["model"], tmp_path / "model"))
    attack(model / "config.json", mutate_json, lambda: command("plan", "--model", model, "--seq-len", 8))


@pytest.mark.parametrize(
    ("name", "mutate"),
    [
        ("adapter_config.json", mutate_json),
        ("qlora_base.json", mutate_json),
        ("qlora_run.json", mutate_json),
        ("adapter_model.safetensors", header_only),
    ],
)
def test_adapters(paths: Paths, finished_run: pathlib.Path, tmp_path: pathlib.Path, name: str, mutate: Mutate) -> None:
    from qlora_app.errors import UserError
    from qlora_app.models.adapter_files import find, load
    from qlora_app.models.loading import Loader
    from qlora_app.models.sources import resolve
    from qlora_ext.form import Form

    adapter = pathlib.Path(shutil.copytree(finished_run / "adapter", tmp_path / "adapter"))
    ask = ["generate", "--adapter", adapter, "--model", paths["model"], "--prompt", "1", "--max-new-tokens", "1"]

    def trial() -> None:
        command("adapters", tmp_path)
        if command(*ask)[0]:
            return
        found: list[dict[str, Any]] = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            base = Loader(resolve(str(paths["model"])), Form(), torch.bfloat16, torch.device("cpu")).while_loading()
            with contextlib.suppress(UserError):
                found.append(load(base, find(str(adapter)), False).state_dict())
        assert len(found) == 2
        assert found[0].keys() == found[1].keys()
        assert all(torch.equal(t, found[1][key]) for key, t in found[0].items())

    attack(adapter / name, mutate, trial)


PAIR = {"prompt": "a", "completion": "b", "input": "c"}
TALK = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "é"}]}


def lines(draw: random.Random, data: bytes) -> bytes:
    """A .jsonl file with one damaged line."""
    parts = data.split(b"\n")
    at = draw.randrange(len(parts) - 1)
    parts[at] = mutate_json(draw, parts[at])
    return b"\n".join(parts)


@pytest.mark.parametrize(
    ("name", "mutate"),
    [
        ("data.jsonl", lines),
        ("data.json", mutate_json),
        ("data.csv", mutate_bytes),
        ("data.parquet", mutate_bytes),
        ("data.txt", mutate_bytes),
        ("data.dict.dz", mutate_bytes),
        ("data.index", mutate_bytes),
    ],
)
def test_data(paths: Paths, tmp_path: pathlib.Path, name: str, mutate: Mutate) -> None:
    from qlora_app.data import encode, read_examples
    from qlora_app.errors import UserError
    from qlora_app.models.pretrained import load_tokenizer
    from qlora_app.models.sources import resolve

    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (PAIR, TALK, {"text": "t"}) * 4))
    (tmp_path / "data.json").write_text(json.dumps({"train": [PAIR, TALK] * 4, "test": [PAIR]}))
    (tmp_path / "data.csv").write_text('prompt,completion\n"a, ""b""","c\nd"\n' + "e,f\n" * 9)
    if name == "data.parquet":
        pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist([TALK] * 9), tmp_path / name)
    (tmp_path / "data.txt").write_text("some text, é\n" * 40, encoding="utf-8")
    (tmp_path / "data.dict.dz").write_bytes(gzip.compress(b"term\n a definition\n" * 20))
    (tmp_path / "data.index").write_text("term\tA\tT\nterm\tT\tT\n" * 10)
    tokenizer = load_tokenizer(resolve(str(paths["model"])))
    read = tmp_path / ("data.dict.dz" if name == "data.index" else name)

    def trial() -> None:
        with limited():
            try:
                examples = read_examples(str(read))
            except UserError:
                return
            for row in encode(tokenizer, examples, 32):
                assert len(row["input_ids"]) == len(row["labels"]) <= 32

    attack(tmp_path / name, mutate, trial, 10 * COUNT)


def torch_file(draw: random.Random, data: bytes) -> bytes:
    """A torch.save file, damaged or with a different object."""
    if draw.random() < 0.6:
        return mutate_bytes(draw, data)
    buffer = io.BytesIO()
    torch.save(draw.choice([None, 5, "a", [], {}, {"state": 5, "param_groups": []}, torch.zeros(3)]), buffer)
    return buffer.getvalue()


RUN_FILES: dict[str, Mutate] = {
    "settings.json": mutate_json,
    "before.json": mutate_json,
    "metrics.jsonl": mutate_bytes,
    "checkpoint-8/trainer_state.json": mutate_json,
    "checkpoint-8/optimizer.pt": torch_file,
    "checkpoint-8/scheduler.pt": torch_file,
    "checkpoint-8/rng_state.pth": torch_file,
    "checkpoint-8/adapter_model.safetensors": header_only,
}


@pytest.mark.parametrize("name", RUN_FILES)
def test_runs(finished_run: pathlib.Path, tmp_path: pathlib.Path, name: str) -> None:
    """A run is resumed to the same adapter, or not at all."""
    run = tmp_path / "run"
    kept = tmp_path / "kept"
    shutil.copytree(finished_run, kept)
    shutil.rmtree(kept / "checkpoint-11")
    shutil.rmtree(kept / "adapter")
    weights = (finished_run / "adapter" / "adapter_model.safetensors").read_bytes()

    def trial() -> None:
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(kept, run)
        status, printed = command("finetune", "--output", run, "--resume")
        if status:
            assert not (run / "adapter").exists()
        elif name != "settings.json":  # different settings are a different run
            assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == weights, printed

    attack(kept / name, RUN_FILES[name], trial, max(1, COUNT // 2))
