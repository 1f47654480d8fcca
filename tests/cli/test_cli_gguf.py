"""GGUF files: incomplete ones are rejected, others are quantized one weight at a time."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import struct
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import qlora_ext
from commands import SMALL, here
from exports import contents, write_base
from gguf_files import four_bit_file, llama_file, write
from qlora_app.commands.check import _base
from qlora_app.exporting.targets import ExportRequest
from qlora_app.main import main
from qlora_app.models.adapted import find_adapted
from qlora_app.models.loading import Loader
from qlora_app.models.sources import ModelSource, resolve
from qlora_app.training.adapting import add_adapter
from qlora_app.training.settings import Settings
from qlora_ext.form import Form
from qlora_ext.gguf import read_header, weights
from tiny_models import SIZES, make, same_state

__all__ = ["four_bit_file", "llama_file"]  # fixtures


def mixture() -> Any:
    # Experts of a size that transformers reads from the file's header.
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 768}
    config = Qwen3MoeConfig(**SIZES, head_dim=16, **experts)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def test_incomplete_files(refused, llama_file: pathlib.Path, tmp_path: pathlib.Path) -> None:
    path, output = tmp_path / "changed.gguf", tmp_path / "out"
    complete = llama_file.read_bytes()
    count = struct.unpack_from("<Q", complete, 8)[0]
    assert count == 21
    blocks = complete.index(b"llama.block_count") + len(b"llama.block_count") + 4
    vocabulary = complete.index(b"llama.vocab_size") + len(b"llama.vocab_size") + 4
    norm = complete.index(b"output_norm.weight")
    cases = {
        **{f"{n} tensors": (8, struct.pack("<Q", n)) for n in (0, 1, count - 1, count + 1, 2**40)},
        "1 layer": (blocks, struct.pack("<I", 1)),
        "3 layers": (blocks, struct.pack("<I", 3)),
        "a number of layers that is a float": (blocks - 4, struct.pack("<I", 6)),
        "a vocabulary of 2^32": (vocabulary, struct.pack("<I", 2**32 - 1)),
        "no norm": (norm, b"output_nomr.weight"),
        "metadata": (16, struct.pack("<Q", 2**60)),
        "version": (4, struct.pack("<I", 99)),
    }
    for name, (at, change) in cases.items():
        path.write_bytes(complete[:at] + change + complete[at + len(change) :])
        assert "changed.gguf" in refused("quantize", "--model", path, "--output", output), name
        if name.startswith("a "):
            assert "changed.gguf" in refused("plan", "--model", path), name
    for size in (len(complete) - 64, len(complete) // 2, 200, 24, 5, 0):
        path.write_bytes(complete[:size])
        assert "changed.gguf" in refused("quantize", "--model", path, "--output", output), size
    assert not output.exists()


def test_headers_that_are_no_header(llama_file: pathlib.Path, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "changed.gguf"
    complete = llama_file.read_bytes()
    name = complete.index(b"general.architecture") + len(b"general.architecture")
    text = complete[name + 12 : name + 12 + struct.unpack_from("<Q", complete, name + 4)[0]]
    changes = {
        "general.architecture to be a text, got an array of 5 values": struct.pack("<IIQ", 9, 0, len(text)),
        "general.architecture to be a text, got 5": struct.pack("<IQ", 10, len(text)),
    }
    for told, change in changes.items():
        rest = text if "array" in told else b""
        path.write_bytes(complete[:name] + change + rest + complete[name + 12 + len(text) :])
        with pytest.raises(ValueError, match=told):
            read_header(path)
    os.mkfifo(tmp_path / "fifo.gguf")
    with pytest.raises(ValueError, match=r"fifo\.gguf: not a regular file"):
        read_header(tmp_path / "fifo.gguf")


@pytest.mark.parametrize("architecture", ["llama", "qwen3moe"])
def test_weights_read_one_by_one_are_the_same(
    architecture: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tiny.gguf"
    model = make("llama") if architecture == "llama" else mixture()
    write(model, path, architecture)
    decoded: list[str] = []
    decode = weights.GGUFWeights.decode
    monkeypatch.setattr(
        weights.GGUFWeights, "decode", lambda self, name, dtype: (decoded.append(name), decode(self, name, dtype))[1]
    )
    found = Loader(resolve(str(path)), Form(), torch.bfloat16, torch.device("cpu")).while_loading()
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.bfloat16)
    assert sorted(decoded) == sorted(expected.state_dict())
    assert same_state(found, qlora_ext.quantize_model(expected))


def test_surplus_weights_are_reported(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(make("llama"), tmp_path / "more.gguf", "llama", {"rope_freqs.weight": np.ones(8, np.float32)})
    assert main(["quantize", "--model", str(tmp_path / "more.gguf"), "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().err
    assert "1 weights in its files do not belong to a LlamaForCausalLM and were ignored: rope_freqs.weight" in printed


def test_a_directory_that_holds_one_file(refused, llama_file: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """An adapter's configuration names the base's directory, for tools that support only directories."""
    directory = tmp_path / "directory"
    directory.mkdir()
    (directory / "a.gguf").write_bytes(llama_file.read_bytes())
    found = resolve(str(directory))
    assert found == resolve(str(directory / "a.gguf"))
    assert (found.path, found.gguf_file) == (str(directory), "a.gguf")
    (directory / "b.gguf").write_bytes(llama_file.read_bytes())
    assert "no config.json" in refused("quantize", "--model", directory, "--output", tmp_path / "out")


def test_the_base_in_an_adapters_configuration() -> None:
    """A path or hub name for other tools; the name with the GGUF file is in qlora_ext's own file."""
    for source, expected in (
        (ModelSource("package:llm-x", "/some/where", "x.gguf"), "/some/where"),
        (ModelSource("/some/x.gguf", "/some", "x.gguf"), "/some"),
        (ModelSource("/some/model", "/some/model"), "/some/model"),
        (ModelSource("owner/name", "owner/name"), "owner/name"),
    ):
        adapted = add_adapter(qlora_ext.quantize_model(make()), source, Settings(), force=False)
        assert adapted.peft_config["default"].base_model_name_or_path == expected


def test_the_reader_is_a_library(llama_file: pathlib.Path, tmp_path: pathlib.Path) -> None:
    header = qlora_ext.gguf.read_header(llama_file)
    expected = gguf.GGUFReader(llama_file)
    assert header.architecture == "llama"
    assert [(t.name, t.begin, t.nbytes) for t in header.tensors] == [
        (t.name, t.data_offset, t.n_bytes) for t in expected.tensors
    ]
    model = make("llama")
    read = qlora_ext.gguf.GGUFWeights(str(llama_file), model)
    assert read.unknown == []
    assert torch.equal(read.decode("model.norm.weight"), model.model.norm.weight.float())
    (tmp_path / "cut.gguf").write_bytes(llama_file.read_bytes()[:500])
    for reader in (qlora_ext.gguf.read_header, lambda path: qlora_ext.gguf.GGUFWeights(path, model)):
        with pytest.raises(ValueError, match=r"cut\.gguf: truncated or damaged"):
            reader(tmp_path / "cut.gguf")


def test_quantize_keeps_stored_weights(
    four_bit_file: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def quantized(*options: str) -> Any:
        output = tmp_path / "-".join(("out", *options))
        assert main(["quantize", "--model", str(four_bit_file), "--output", str(output), *options]) == 0
        return AutoModelForCausalLM.from_pretrained(output)

    kept = quantized()
    printed = capsys.readouterr()
    assert "1 MXFP4 as stored" in printed.err
    assert "1 IQ3_XXS decoded (" in printed.err
    assert same_state(
        kept, Loader(resolve(str(four_bit_file)), Form(), torch.bfloat16, torch.device("cpu")).while_loading()
    )
    rest = quantized("--quantize-rest")
    printed = capsys.readouterr()
    assert "1 IQ3_XXS quantized to NF4" in printed.err
    codes = [layer.form.code for _, layer in qlora_ext.nn.layers_of(rest)]
    assert len(codes) == 16
    assert codes.count("nf4") == 1
    assert kept.model.layers[1].mlp.gate_proj.weight.dtype == torch.bfloat16
    expected = qlora_ext.quantize_nf4(kept.model.layers[1].mlp.gate_proj.weight)
    assert torch.equal(rest.model.layers[1].mlp.gate_proj.weight.packed, expected.packed)


def test_quantize_decodes_for_options_that_need_dense_weights(
    four_bit_file: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["quantize", "--model", str(four_bit_file), "--output", str(tmp_path / "out"), "--format", "bitsandbytes"]
    assert main(command) == 0
    assert "are decoded and quantized to NF4, because options need the dense model" in capsys.readouterr().err


def test_the_rest_of_a_model_of_floats(refused, llama_file: pathlib.Path, tmp_path: pathlib.Path) -> None:
    error = refused("quantize", "--model", llama_file, "--output", tmp_path / "out", "--quantize-rest")
    assert "--quantize-rest: expected a GGUF file with quantized weights" in error


def test_a_plan_has_the_sizes_of_the_file(four_bit_file: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--seq-len", "8", "--device", "cpu", "--dtype", "bfloat16", "--json"]
    assert main(["plan", "--model", str(four_bit_file), *options]) == 0
    planned = json.loads(capsys.readouterr().out)["bytes"]
    model = Loader(resolve(str(four_bit_file)), Form(), torch.bfloat16, torch.device("cpu")).while_loading()
    own = [layer for _, layer in qlora_ext.nn.layers_of(model) if not isinstance(layer, qlora_ext.nn.TiedLinear4bit)]
    layers = [layer.packed_state() for layer in own]
    packed = sum(state["weight"].nbytes for state in layers)
    assert planned["base weights"] == packed
    assert planned["scales"] == sum(t.nbytes for state in layers for t in state.values()) - packed
    everything = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert planned["other weights"] == everything - planned["base weights"] - planned["scales"]


def test_a_plan_of_a_tied_table(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.gguf"
    write(make("llama"), path, "llama", kinds=["F16"], of={"token_embd.weight": "Q8_0", "output.weight": None})
    test_a_plan_has_the_sizes_of_the_file(path, capsys)


def test_finetune_quantizes_the_layers_anew(refused: Any, tmp_path: pathlib.Path) -> None:
    """The adapter then fits these layers, also where it is exported."""
    base, run, out = write_base(tmp_path / "base.gguf", "Q8_0"), tmp_path / "run", tmp_path / "out.gguf"
    (tmp_path / "data.txt").write_text("one two three four five six seven eight nine ten\n" * 40)
    train = ["finetune", "--model", base, "--data", tmp_path / "data.txt", "--output", run, *SMALL, "--max-steps", "2"]
    assert "--quantize q4_0: expected the format" in refused(
        *train, "--dropout", "0", "--quantize", "q4_0", "--merge-aware", "mxfp4"
    )
    here(*train, "--quantize", "q4_0")
    model = find_adapted(ExportRequest(to="dense", adapter=str(run), output="none")).load()
    codes = {name: layer.form.code for name, layer in qlora_ext.nn.layers_of(model)}
    assert {code for name, code in codes.items() if ".layers." in name} == {"int4"}
    assert {code for name, code in codes.items() if ".layers." not in name} == {"int8"}
    here("export", "--check", "none", "--adapter", run, "--to", "gguf:same", "--output", out)
    before, after = contents(base)[1], contents(out)[1]
    assert {kind for kind, _ in after.values()} == {"Q8_0", "F32"}
    assert {name for name in before if before[name] != after[name]} == {
        name for name in before if name.startswith("blk.") and "norm" not in name
    }


def test_check_needs_the_dense_model_of_a_file(four_bit_file: pathlib.Path) -> None:
    base, reason = _base(argparse.Namespace(base=None), resolve(str(four_bit_file)))
    assert base is None
    assert reason == "its file stores quantized weights, which are used as they are; name the dense model with --base"
