"""Merge-aware training for a served format: the exported file, read by its own reader, is the trained model."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("compressed_tensors", reason="compressed_tensors is not installed")

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from commands import Paths, here
from exports import dense, loaded, ours, output_of, read, write_base
from qlora_ext.form import Form
from qlora_ext.integrations.peft import set_merge_aware
from qlora_ext.nn import Packed4bit
from qlora_ext.weight import quantize
from tiny_directories import config_of, make, save
from tiny_models import save_tiny_llama, token_ids

LEARNT, HELD_OUT = token_ids(6, 24).split((4, 2))
EXPERTS = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}


def train(base: pathlib.Path, code: str, adapter: pathlib.Path, **options: Any) -> Any:
    """Trains an adapter for the format ``code``, and saves it."""
    torch.manual_seed(3)
    config = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **options}
    model = get_peft_model(loaded(base, code), LoraConfig(task_type="CAUSAL_LM", **config))
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    set_merge_aware(model, code=code)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    losses = []
    for _ in range(4):
        loss = model.train()(input_ids=LEARNT, labels=LEARNT).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.eval().save_pretrained(adapter)
    return model


def export(adapter: pathlib.Path, to: str, *options: str) -> pathlib.Path:
    out = output_of(to, adapter.parent)
    here("export", "--adapter", adapter, "--to", to, "--output", out, "--dtype", "float32", "--check", "none", *options)
    return out


def held_out_loss(model: Any) -> float:
    with torch.no_grad():
        return float(model.eval()(input_ids=HELD_OUT, labels=HELD_OUT).loss)


def trained_weights(model: Any) -> dict[str, torch.Tensor]:
    """The values of all linear layers that the model computes with, by name."""
    model.merge_adapter()
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "lora_" not in name:
            weight = module.dequantize(torch.float32) if isinstance(module, Packed4bit) else module.weight
            found[name.removeprefix("base_model.model.").replace(".base_layer", "")] = weight.detach().float()
    model.unmerge_adapter()
    return found


def check(trained: Any, exported: Any) -> None:
    """The loss is the same, and so is every weight, bit for bit."""
    assert held_out_loss(exported) == pytest.approx(held_out_loss(trained), abs=1e-5)
    weights = trained_weights(trained)
    assert len(weights) == 15
    for name, weight in weights.items():
        assert torch.equal(exported.get_submodule(name).weight.float(), weight), name


@pytest.mark.parametrize("code", ["q4_0", "iq4_nl", "mxfp4"])
@pytest.mark.parametrize("kinds", [("Q4_0", "Q4_1", "F16", "MXFP4", "Q8_0"), ("F16",)])
@pytest.mark.parametrize("targets", ["all-linear", ["k_proj", "down_proj"]])
def test_a_gguf_file_is_the_trained_model(
    tmp_path: pathlib.Path, code: str, kinds: tuple[str, ...], targets: Any
) -> None:
    """The base has other 4-bit types and dense ones, or only dense ones, which are quantized when they are read."""
    base = write_base(tmp_path / "base.gguf", *kinds)
    model = train(base, code, tmp_path / "adapter", target_modules=targets)
    check(model, read(export(tmp_path / "adapter", f"gguf:{code}")))


@pytest.mark.parametrize("code", ["int4", "nvfp4", "mxfp4"])
def test_a_directory_of_compressed_tensors_is_the_trained_model(
    paths: Paths, tmp_path: pathlib.Path, code: str
) -> None:
    model = train(paths["model"], code, tmp_path / "adapter", target_modules=["q_proj", "v_proj", "down_proj"])
    theirs = read(export(tmp_path / "adapter", f"compressed-tensors:{code}"), torch.bfloat16)
    assert type(theirs.hf_quantizer).__name__ == "CompressedTensorsHfQuantizer"
    held_out_loss(theirs)  # decodes the weights, to bfloat16
    assert held_out_loss(torch.nn.Module.float(theirs)) == pytest.approx(held_out_loss(model), abs=1e-3)


@pytest.mark.parametrize("to", ["gguf:q4_0", "gguf:iq4_nl", "gguf:mxfp4", "compressed-tensors:int4",
                                "compressed-tensors:nvfp4", "compressed-tensors:mxfp4"])  # fmt: skip
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_a_directory_and_its_experts_are_the_trained_model(tmp_path: pathlib.Path, family: str, to: str) -> None:
    base = save(tmp_path / "base", make(config_of(family)))
    experts = EXPERTS if "moe" in family else {}
    target, code = to.split(":")
    model = train(base, code, tmp_path / "adapter", target_modules=["q_proj", "v_proj"], **experts)
    out = export(tmp_path / "adapter", to, *(["--embeddings", "f32"] if target == "gguf" else []))
    found = dense(out) if target == "gguf" else ours(out).dequantize()
    assert held_out_loss(found) == pytest.approx(held_out_loss(model), abs=1e-5)


def test_a_directory_of_bitsandbytes_is_the_trained_model(tmp_path: pathlib.Path) -> None:
    """The base has other 4-bit types, which no other export to that format takes."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    base = write_base(tmp_path / "base.gguf", "Q8_0", "Q4_0", "Q4_1", "MXFP4")
    model = train(base, "nf4", tmp_path / "adapter")
    theirs = read(export(tmp_path / "adapter", "bitsandbytes"))
    assert type(theirs.hf_quantizer).__name__ == "Bnb4BitHfQuantizer"
    check(model, theirs.dequantize())


def test_a_head_in_other_4_bits_is_decoded(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    base = write_base(tmp_path / "base.gguf", "Q4_0")
    model = train(base, "nf4", tmp_path / "adapter", target_modules=["q_proj"])
    theirs = read(export(tmp_path / "adapter", "bitsandbytes"))
    assert type(theirs.lm_head) is nn.Linear
    check(model, theirs.dequantize())


def test_a_base_in_another_stored_format(paths: Paths, tmp_path: pathlib.Path) -> None:
    base = tmp_path / "base"
    to = ["--to", "compressed-tensors:int4", "--output", base]
    here("export", "--check", "none", "--model", paths["model"], *to)
    model = train(base, "nvfp4", tmp_path / "adapter")
    check(model, ours(export(tmp_path / "adapter", "compressed-tensors:nvfp4")).dequantize())


def test_layers_that_do_not_fit_stay_dense(tmp_path: pathlib.Path) -> None:
    """Rows of 80 are no multiple of 32, so down_proj is not encoded, in training as in the file."""
    save_tiny_llama(tmp_path / "base", 0)
    config = LlamaConfig.from_pretrained(tmp_path / "base", intermediate_size=80)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "base")
    model = train(tmp_path / "base", "int4", tmp_path / "adapter")
    exported = ours(export(tmp_path / "adapter", "compressed-tensors:int4"))
    assert not isinstance(exported.model.layers[0].mlp.down_proj, Packed4bit)
    assert isinstance(exported.model.layers[0].mlp.up_proj, Packed4bit)
    assert held_out_loss(exported.dequantize()) == pytest.approx(held_out_loss(model), abs=1e-5)


@pytest.mark.parametrize("code", ["int4", "nvfp4"])
def test_a_dense_base_is_quantized_once(paths: Paths, tmp_path: pathlib.Path, code: str) -> None:
    """In NVFP4, whose factor is that of several layers, the base is first quantized to NF4."""
    model = train(paths["model"], code, tmp_path / "adapter")
    found = model.unload().model.layers[0].mlp.down_proj.weight4bit
    expected = quantize(
        dense(paths["model"]).model.layers[0].mlp.down_proj.weight, Form.named(code if code == "int4" else "nf4")
    )
    if code == "nvfp4":
        expected = quantize(expected.dequantize(torch.float32), code)
    assert torch.equal(found.dequantize(torch.float32), expected.dequantize(torch.float32))
    record = json.loads((tmp_path / "adapter" / "qlora_base.json").read_text())
    assert record.get("base_format") == ("int4" if code == "int4" else None)


def test_finetune_trains_for_a_format(paths: Paths, tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    command = (
        "finetune", "--model", paths["model"], "--data", paths["data"], "--output", run, "--max-steps", "2",
        "--seq-len", "32", "--batch-size", "2", "--eval-size", "4", "--dtype", "float32", "--merge-aware",
    )  # fmt: skip
    here(*command, "int4")
    settings = json.loads((run / "settings.json").read_text())
    assert (settings["merge_aware"], settings["dropout"]) == ("int4", 0.0)
    assert json.loads((run / "adapter" / "qlora_base.json").read_text())["merge_aware"] == "int4"
    assert json.loads((run / "adapter" / "qlora_base.json").read_text())["base_format"] == "int4"
    capfd.readouterr()
    options = "--check", "none", "--dtype", "float32", "--overwrite"
    export = "export", "--adapter", run, *options, "--output", tmp_path / "out", "--to"
    here(*export, "compressed-tensors:int4")
    assert "was trained for" not in capfd.readouterr().err
    for to in ("compressed-tensors:nvfp4", "dense"):
        here(*export, to)
        assert (
            f"--to {to}: the adapter was trained for int4, so the loss of the result will differ from the trained one; "
            "use --to compressed-tensors:int4 to keep the weights that were trained"
        ) in capfd.readouterr().err
