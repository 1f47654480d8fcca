"""Loading, saving and dequantizing with transformers, on random models of four families."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_submodules
from torch import nn
from transformers import AutoModelForCausalLM

from load_memory import peak_of_loading
from qlora_ext import QLoRAConfig
from qlora_ext.nn import Linear4bit, quantize_model
from tiny_models import FAMILIES, make, same_state, token_ids


def load(path: Path, *args: Any, **kwargs: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, *args, **kwargs)


@pytest.fixture
def saved(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    family = getattr(request, "param", "llama")
    make(family).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


every_family = pytest.mark.parametrize("saved", FAMILIES, indirect=True)


@pytest.mark.usefixtures("native_bfloat16")
@every_family
def test_quantizes_while_loading_as_quantize_model_does(saved: Path) -> None:
    model = load(saved, quantization_config=QLoRAConfig())
    expected = quantize_model(load(saved))
    assert any(isinstance(m, Linear4bit) for m in model.modules())
    assert same_state(model, expected)
    linears = [name for name, m in model.named_modules() if type(m) is nn.Linear]
    assert linears == ["lm_head"]


@pytest.mark.usefixtures("native_bfloat16")
@every_family
@pytest.mark.parametrize("how", ["from_pretrained", "quantize_model"])
def test_saves_and_loads_4bit_bit_for_bit(saved: Path, tmp_path: Path, how: str) -> None:
    config = QLoRAConfig(block_size=128, double_quant=False)
    if how == "from_pretrained":
        model = load(saved, quantization_config=config)
    else:
        model = quantize_model(load(saved), block_size=128, double_quant=False)
    model.save_pretrained(tmp_path / "4bit", max_shard_size="20KB")
    assert len(list((tmp_path / "4bit").glob("*.safetensors"))) > 1
    written = json.loads((tmp_path / "4bit" / "config.json").read_text())["quantization_config"]
    assert (written["quant_method"], written["block_size"], written["double_quant"]) == ("qlora_ext", 128, False)
    again = load(tmp_path / "4bit")
    assert not any(m.weight.requires_grad for m in again.modules() if isinstance(m, Linear4bit))
    assert same_state(again, model)
    assert torch.equal(again(token_ids()).logits, model(token_ids()).logits)
    assert same_state(
        load(tmp_path / "4bit", quantization_config=QLoRAConfig(block_size=128, double_quant=False)), model
    )


@every_family
def test_dequantize_gives_the_dense_model(saved: Path, tmp_path: Path) -> None:
    model = load(saved, quantization_config=QLoRAConfig())
    expected = model(token_ids()).logits
    kinds = {name: type(m) for name, m in load(saved).named_modules()}
    dense = model.dequantize()
    assert {name: type(m) for name, m in dense.named_modules()} == kinds
    assert not hasattr(dense.config, "quantization_config")
    torch.testing.assert_close(dense(token_ids()).logits, expected, rtol=0.02, atol=0.02)
    dense.save_pretrained(tmp_path / "again")
    assert same_state(load(tmp_path / "again"), dense)


def test_memory_footprint_counts_the_packed_bytes(saved: Path) -> None:
    model = load(saved, quantization_config=QLoRAConfig())
    four_bit = sum(m.weight4bit.nbytes for m in model.modules() if isinstance(m, Linear4bit))
    dense = load(saved)
    linears = sum(m.weight.nbytes for n, m in dense.named_modules() if isinstance(m, nn.Linear) and n != "lm_head")
    assert model.get_memory_footprint() == dense.get_memory_footprint() - linears + four_bit


def test_skip_modules_and_tied_weights(tmp_path: Path) -> None:
    make("qwen2").save_pretrained(tmp_path / "tied")
    model = load(tmp_path / "tied", quantization_config=QLoRAConfig(skip_modules=["mlp"]))
    quantized = [name for name, m in model.named_modules() if isinstance(m, Linear4bit)]
    assert quantized
    assert all("self_attn" in name for name in quantized)
    assert model.lm_head.weight is model.model.embed_tokens.weight

    make("llama").save_pretrained(tmp_path / "untied")
    model = load(tmp_path / "untied", quantization_config=QLoRAConfig(skip_modules=[]))
    assert isinstance(model.lm_head, Linear4bit)
    model.save_pretrained(tmp_path / "4bit")
    assert same_state(load(tmp_path / "4bit"), model)


def test_compute_dtype(saved: Path, tmp_path: Path) -> None:
    model = load(saved, quantization_config=QLoRAConfig(compute_dtype=torch.float32))
    layer = model.model.layers[0].mlp.up_proj
    assert layer.compute_dtype == torch.float32
    model.save_pretrained(tmp_path / "4bit")
    assert load(tmp_path / "4bit").model.layers[0].mlp.up_proj.compute_dtype == torch.float32


def test_device_map(saved: Path, tmp_path: Path) -> None:
    expected = load(saved, quantization_config=QLoRAConfig())
    model = load(saved, quantization_config=QLoRAConfig(), device_map={"": "cpu"})
    assert same_state(model, expected)
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0"), "cpu")
    places["model.layers.1"] = "disk"
    with pytest.raises(ValueError, match=r"device_map: expected no layers on disk"):
        load(saved, quantization_config=QLoRAConfig(), device_map=places)
    expected.save_pretrained(tmp_path / "4bit")
    offloaded = load(tmp_path / "4bit", device_map=places, offload_folder=tmp_path / "offload")
    assert offloaded.model.layers[1].mlp.up_proj.weight.is_meta
    assert torch.equal(offloaded(token_ids()).logits, expected(token_ids()).logits)


class ReadsADtype(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.to(self[0].weight.dtype))


@pytest.mark.parametrize("whole", [False, True])
def test_code_that_reads_the_dtype_of_an_offloaded_weight(whole: bool) -> None:
    model = quantize_model(ReadsADtype(nn.Linear(64, 64), nn.Linear(64, 48)))
    x = torch.randn(3, 64)
    expected = model(x)
    cpu_offload(model, torch.device("cpu"), preload_module_classes=["ReadsADtype"] if whole else None)
    assert model[0].weight.is_meta
    assert model[0].weight.shape == (64, 64)
    assert torch.equal(model(x), expected)
    remove_hook_from_submodules(model)
    assert not model[0].weight.is_meta
    assert torch.equal(model(x), expected)


def test_generates(saved: Path) -> None:
    model = load(saved, quantization_config=QLoRAConfig())
    ids = token_ids()
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert out.shape == (2, ids.shape[1] + 4)
    assert torch.equal(out[:, : ids.shape[1]], ids)


@pytest.mark.parametrize(
    ("saved", "double_quant", "storage", "shards"),
    [
        *[(family, double_quant, "uint8", "20KB") for family in FAMILIES for double_quant in (True, False)],
        *[("llama", True, storage, "5GB") for storage in ("bfloat16", "float16", "float32", "float64")],
    ],
    indirect=["saved"],
)
def test_loads_bitsandbytes_checkpoints(
    saved: Path, tmp_path: Path, double_quant: bool, storage: str, shards: str
) -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    theirs = load(
        saved,
        quantization_config=transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=double_quant,
            bnb_4bit_quant_storage=storage,
        ),
    )
    theirs.save_pretrained(tmp_path / "bnb", max_shard_size=shards)
    ours = load(tmp_path / "bnb", quantization_config=QLoRAConfig())
    compared = 0
    for name, module in theirs.named_modules():
        if not isinstance(module, bnb.nn.Linear4bit):
            continue
        layer = ours.get_submodule(name)
        decoded = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        assert layer.double_quant == double_quant
        assert torch.equal(layer.dequantize(), decoded)
        assert (module.bias is None) == (layer.bias is None)
        assert module.bias is None or torch.equal(layer.bias, module.bias)
        compared += 1
    assert compared == sum(isinstance(m, Linear4bit) for m in ours.modules()) > 0
    assert torch.equal(ours.get_input_embeddings().weight, theirs.get_input_embeddings().weight)
    ours.save_pretrained(tmp_path / "ours")
    assert same_state(load(tmp_path / "ours"), ours)


@pytest.mark.parametrize(
    ("options", "kind"),
    [({"load_in_4bit": True, "bnb_4bit_quant_type": "int4"}, "INT4"), ({"load_in_8bit": True}, "int8")],
)
def test_refuses_other_bitsandbytes_checkpoints(saved: Path, options: dict[str, Any], kind: str) -> None:
    config = json.loads((saved / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", **options}
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"expected a bitsandbytes NF4( or FP4)? checkpoint, got {kind}"):
        load(saved, quantization_config=QLoRAConfig())


def test_a_4bit_checkpoint_with_a_hole_is_refused(saved: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    load(saved, quantization_config=QLoRAConfig()).save_pretrained(tmp_path / "4bit")
    file = tmp_path / "4bit" / "model.safetensors"
    complete = load_file(file)
    name = "model.layers.1.mlp.down_proj"

    save_file({key: t for key, t in complete.items() if key != f"{name}.absmax"}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"{name}: the checkpoint has no absmax"):
        load(tmp_path / "4bit")

    save_file({**complete, f"{name}.absmax": complete[f"{name}.absmax"][:-1].clone()}, file, {"format": "pt"})
    with pytest.raises((ValueError, RuntimeError), match=r"absmax|size mismatch|mismatched"):
        load(tmp_path / "4bit")


def test_config_rejects_invalid_values() -> None:
    with pytest.raises(ValueError, match="block_size"):
        QLoRAConfig(block_size=48)
    for skip in (3, "lm_head", ["lm_head", 1]):
        with pytest.raises(ValueError, match="skip_modules: expected a list of names"):
            QLoRAConfig(skip_modules=skip)
    with pytest.raises(ValueError, match="compute_dtype"):
        QLoRAConfig(compute_dtype="uint8")
    with pytest.raises(TypeError, match="'bits'"):
        QLoRAConfig(bits=3)
    with pytest.raises(ValueError, match="newer version of qlora_ext"):
        QLoRAConfig.from_dict({**QLoRAConfig().to_dict(), "format_version": 3})
    assert QLoRAConfig.from_dict(QLoRAConfig(compute_dtype="float16").to_dict()).compute_dtype == torch.float16


RECOGNISED = """
import sys
{imports}
assert "qlora_ext.integrations.transformers" not in sys.modules or {eager}
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(sum(isinstance(m, qlora_ext.nn.Linear4bit) for m in model.modules()))
"""


@pytest.mark.parametrize(
    ("imports", "eager"),
    [
        ("import qlora_ext\nassert 'transformers' not in sys.modules", False),
        ("import transformers, qlora_ext", False),
        ("from transformers.quantizers import auto\nimport qlora_ext", True),
    ],
)
def test_import_qlora_ext_is_enough(saved: Path, tmp_path: Path, imports: str, eager: bool) -> None:
    load(saved, quantization_config=QLoRAConfig()).save_pretrained(tmp_path / "4bit")
    script = RECOGNISED.format(imports=imports, eager=eager)
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "4bit")], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["14"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_loading_peaks_near_the_4bit_size(saved: Path, tmp_path: Path, stored: torch.dtype) -> None:
    config = transformers.LlamaConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=6, num_attention_heads=8, vocab_size=128
    )
    AutoModelForCausalLM.from_config(config, dtype=stored).save_pretrained(tmp_path / "big")
    dense = sum(f.stat().st_size for f in (tmp_path / "big").glob("*.safetensors"))
    largest_layer = 1024 * 4096 * stored.itemsize
    peak, footprint = peak_of_loading(tmp_path / "big", saved)
    assert footprint < dense / 3
    slack = 8 << 20  # for the allocator and the file's header
    assert peak < footprint + 2 * largest_layer + slack, f"peak {peak >> 20} MiB, 4-bit {footprint >> 20} MiB"
