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
from qlora_ext import QLoRAConfig, quantize_nf4
from qlora_ext.nn import Linear4bit, layers_of, quantize_model
from tiny_models import FAMILIES, make, same_state, token_ids


def load(path: Path, *args: Any, **kwargs: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, *args, **kwargs)


@pytest.fixture
def saved(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    family = getattr(request, "param", "llama")
    make(family).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def test_skip_modules_and_tied_weights(tmp_path: Path) -> None:
    make("qwen2").save_pretrained(tmp_path / "tied")
    model = load(tmp_path / "tied", quantization_config=QLoRAConfig(skip_modules=["mlp"]))
    quantized = [name for name, m in model.named_modules() if isinstance(m, Linear4bit)]
    assert quantized
    assert all("self_attn" in name for name in quantized)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_compute_dtype(saved: Path, tmp_path: Path) -> None:
    model = load(saved, quantization_config=QLoRAConfig(compute_dtype=torch.float32))
    layer = model.model.layers[0].mlp.up_proj
    assert layer.compute_dtype == torch.float32
    model.save_pretrained(tmp_path / "4bit")
    assert load(tmp_path / "4bit").model.layers[0].mlp.up_proj.compute_dtype == torch.float32


def test_activations(saved: Path, tmp_path: Path) -> None:
    """They are saved and told in the card; a configuration that names some replaces them."""
    load(saved, quantization_config=QLoRAConfig(activations="int8", embeddings=True)).save_pretrained(tmp_path / "int8")
    load(saved, quantization_config=QLoRAConfig(activations="exact")).save_pretrained(tmp_path / "exact")
    for name, config, expected in (
        ("int8", None, "int8"),
        ("int8", QLoRAConfig(), "int8"),
        ("int8", QLoRAConfig(activations="exact"), "exact"),
        ("exact", None, "exact"),
        ("exact", QLoRAConfig(activations="int8"), "int8"),
    ):
        model = load(tmp_path / name, **({} if config is None else {"quantization_config": config}))
        assert {layer.activations for _, layer in layers_of(model)} == {expected}
        assert model.config.quantization_config.activations == expected
        assert ("to int8" in (tmp_path / name / "README.md").read_text()) == (name == "int8")
        written = json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]
        assert written.get("activations") == (None if name == "exact" else "int8")


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


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_generates(family: str) -> None:
    model, ids = quantize_model(make(family)), token_ids()
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert out.shape == (2, ids.shape[1] + 4)
    assert torch.equal(out[:, : ids.shape[1]], ids)


@pytest.mark.parametrize(
    ("saved", "double_quant", "storage", "shards", "kind"),
    [
        *[(family, double_quant, "uint8", "20KB", "nf4") for family in FAMILIES for double_quant in (True, False)],
        *[("llama", True, storage, "5GB", "nf4") for storage in ("bfloat16", "float16", "float32", "float64")],
        *[("llama", double_quant, "uint8", "5GB", "fp4") for double_quant in (True, False)],
    ],
    indirect=["saved"],
)
def test_loads_bitsandbytes_checkpoints(
    saved: Path, tmp_path: Path, double_quant: bool, storage: str, shards: str, kind: str
) -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    theirs = load(
        saved,
        quantization_config=transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=kind,
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
        assert (layer.form.code, layer.double_quant) == (kind, double_quant)
        assert torch.equal(layer.dequantize(), decoded)
        assert (module.bias is None) == (layer.bias is None)
        assert module.bias is None or torch.equal(layer.bias, module.bias)
        compared += 1
    assert compared == sum(isinstance(m, Linear4bit) for m in ours.modules()) > 0
    assert torch.equal(ours.get_input_embeddings().weight, theirs.get_input_embeddings().weight)
    ours.save_pretrained(tmp_path / "ours")
    assert same_state(load(tmp_path / "ours"), ours)


def test_experts_of_a_bitsandbytes_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from safetensors.torch import load_file, save_file

    make("mixtral").save_pretrained(tmp_path / "dense")
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    theirs = load(tmp_path / "dense", quantization_config=config)
    theirs.save_pretrained(tmp_path / "bnb")
    model = load(tmp_path / "bnb", quantization_config=QLoRAConfig())
    assert torch.equal(model.model.layers[1].mlp.experts.down_proj, theirs.model.layers[1].mlp.experts.down_proj)
    model.save_pretrained(tmp_path / "4bit")
    assert same_state(load(tmp_path / "4bit"), model)

    # As in transformers < 5: every expert is a separate, quantized module.
    name = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    file = tmp_path / "bnb" / "model.safetensors"
    state = load_file(file)
    one = quantize_nf4(torch.randn(96, 64)).to_bitsandbytes(name)
    save_file({**{key: t for key, t in state.items() if key != name}, **one}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"expected stacked experts.* got .*experts.0.w1"):
        load(tmp_path / "bnb", quantization_config=QLoRAConfig())


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
    for name in ("int4", 8, True):
        with pytest.raises(ValueError, match=f"activations: expected exact or int8, got .?{name}"):
            QLoRAConfig(activations=name)
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
