"""4-bit models are saved and loaded bit for bit, and made dense again: families, forms, embeddings, experts, towers."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn

import tiny_vision
from qlora_ext import Form, QLoRAConfig
from qlora_ext.form import PRESETS
from qlora_ext.nn import Embedding4bit, Linear4bit, TiedLinear4bit, layers_of, quantize_model
from tiny_models import FAMILIES, make, same_state, token_ids


@dataclasses.dataclass
class Row:
    """A dense model, the options of ``QLoRAConfig`` and the model's inputs."""

    build: Callable[[], Any]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    inputs: Callable[[], dict[str, Any]] = lambda: {"input_ids": token_ids()}

    def quantize(self, model: Any, **more: Any) -> Any:
        options = {"skip" if name == "skip_modules" else name: value for name, value in self.options.items()}
        return quantize_model(model, **options, **more)

    def outputs(self, model: Any) -> Tensor:
        with torch.no_grad():
            found: Tensor = model(**self.inputs())[0]
        return found


def of(name: str, **sizes: Any) -> Any:
    """A model with a configuration of transformers."""
    if not hasattr(transformers, f"{name}Config"):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, **sizes}
    config = getattr(transformers, f"{name}Config")(**sizes)
    auto = transformers.AutoModel if name == "NomicBert" else transformers.AutoModelForCausalLM
    return auto.from_config(config, dtype=torch.bfloat16).eval()


def seeing(family: str, **options: Any) -> Row:
    return Row(lambda: tiny_vision.build(family), options, lambda: tiny_vision.inputs(family))


TABLES = ["embed_tokens", "wte", "lm_head"]
ROWS = {
    **{family: Row(lambda f=family: make(f)) for family in (*FAMILIES, "mixtral", "qwen3_moe")},
    **{
        f"{family}, embeddings, skips {skip}": Row(
            lambda f=family: make(f), {"embeddings": True} | ({} if skip is None else {"skip_modules": skip})
        )
        for family in ("llama", "qwen2", "gpt2", "qwen3_moe")
        for skip in (None, [], TABLES)
    },
    **{f"{f}, towers {towers}": seeing(f, towers=towers) for f in tiny_vision.CONFIGS for towers in (False, True)},
    "block size, one level of scales": Row(make, {"block_size": 128, "double_quant": False}),
    "int8 activations": Row(make, {"activations": "int8"}),
    "int8 activations of experts": Row(lambda: make("mixtral"), {"activations": "int8"}),
    "experts in small blocks": Row(lambda: make("mixtral"), {"block_size": 32}),
    "experts, of which some are skipped": Row(lambda: make("mixtral"), {"skip_modules": ["lm_head", "layers.1.mlp"]}),
    # Their files store q, k and v in one tensor.
    "nomic_bert": Row(lambda: of("NomicBert", intermediate_size=96, max_position_embeddings=64, pad_token_id=0)),
    "falcon": Row(lambda: of("Falcon")),  # linear layers with a class of its own
}
every_row = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)


@pytest.mark.usefixtures("native_bfloat16")
@every_row
def test_loading_quantizes_as_quantize_model_does_and_saving_keeps_every_bit(row: Row, tmp_path: Path) -> None:
    dense = row.build()
    dense.save_pretrained(tmp_path / "dense")
    load = type(dense).from_pretrained
    config = QLoRAConfig(**row.options)
    loaded, quantized = load(tmp_path / "dense", quantization_config=config), row.quantize(load(tmp_path / "dense"))
    assert {*layers_of(loaded)}
    assert same_state(loaded, quantized)
    y = row.outputs(loaded)
    for how, model in (("loaded", loaded), ("quantized", quantized)):
        model.save_pretrained(tmp_path / how, max_shard_size="40KB")
        assert len(list((tmp_path / how).glob("*.safetensors"))) > 1
        written = json.loads((tmp_path / how / "config.json").read_text())["quantization_config"]
        assert written["quant_method"] == "qlora_ext"
        assert {name: written[name] for name in ("block_size", "double_quant")} == {
            name: getattr(config, name) for name in ("block_size", "double_quant")
        }
        assert written["needs"] == "import qlora_ext"
        assert "import qlora_ext" in (tmp_path / how / "README.md").read_text()
        again = load(tmp_path / how)
        assert same_state(again, model)
        assert not any(p.requires_grad for _, layer in layers_of(again) for p in layer.packed_state().values())
        assert torch.equal(row.outputs(again), y)
        assert again.get_memory_footprint() == model.get_memory_footprint()
        again.save_pretrained(tmp_path / f"{how} twice")
        assert same_state(load(tmp_path / f"{how} twice", quantization_config=config), model)
        twice = json.loads((tmp_path / f"{how} twice" / "config.json").read_text())["quantization_config"]
        assert twice == written


@every_row
def test_dequantize_gives_the_dense_model(row: Row, tmp_path: Path) -> None:
    dense = row.build()
    dense.save_pretrained(tmp_path / "dense")
    load = type(dense).from_pretrained
    model = load(tmp_path / "dense", quantization_config=QLoRAConfig(**row.options))
    expected, original = row.outputs(model), load(tmp_path / "dense")
    plain = model.dequantize()
    assert {name: type(m) for name, m in plain.named_modules()} == {n: type(m) for n, m in original.named_modules()}
    assert not hasattr(plain.config, "quantization_config")
    torch.testing.assert_close(row.outputs(plain), expected, rtol=0.05, atol=0.05)
    plain.save_pretrained(tmp_path / "again")
    names = []
    for directory in ("dense", "again"):
        with safe_open(tmp_path / directory / "model.safetensors", framework="pt") as file:
            names.append({*file.keys()})
    assert names[0] == names[1]  # also one weight per expert, and fused ones
    assert same_state(load(tmp_path / "again"), plain)


FORMS = {
    # Rows of 64 elements hold no whole block of 128.
    **{name: dataclasses.replace(form, block_size=min(64, form.block_size)) for name, form in PRESETS.items()},
    "nf4 float32": Form(scales="float32"),
    "nf4 float16": Form(scales="float16"),
    "awq": Form("uint4", "float16", 32, offsets="zero_point8"),
}


@pytest.mark.usefixtures("native_bfloat16")
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("row", [ROWS["llama"], ROWS["qwen2, embeddings, skips None"]], ids=["linear", "embeddings"])
def test_forms(name: str, row: Row, tmp_path: Path) -> None:
    """Models in every format are saved in our layout."""
    model = row.quantize(row.build(), **FORMS[name].keywords)
    assert model.dtype == torch.bfloat16  # not that of the scales, which may come first
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.dtype == again.config.dtype == torch.bfloat16
    assert {layer.form for _, layer in layers_of(again)} == {FORMS[name]}
    assert same_state(again, model)
    dense = again.dequantize()
    assert {p.dtype for p in dense.parameters()} == {torch.bfloat16}
    assert same_state(dense, model.dequantize())


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("skip", [None, [], TABLES])
def test_embeddings_are_quantized_where_asked(family: str, skip: list[str] | None) -> None:
    model = ROWS[f"{family}, embeddings, skips {skip}"].quantize(make(family))
    tied = model.config.tie_word_embeddings
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if skip:
        assert (type(table), type(head)) == (nn.Embedding, nn.Linear)
    else:
        assert isinstance(table, Embedding4bit)
        assert type(head) is (TiedLinear4bit if tied else nn.Linear if skip is None else Linear4bit)
    for m in (model, model.dequantize()):
        assert (m.get_input_embeddings().weight is m.get_output_embeddings().weight) == tied


@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen3_moe"])
def test_a_footprint_counts_the_packed_bytes(family: str) -> None:
    dense = make(family)
    model = quantize_model(copy.deepcopy(dense), skip=["lm_head"], block_size=32)
    packed = sum(t.nbytes for _, layer in layers_of(model) for t in layer.packed_state().values())
    names = {name for name, _ in layers_of(model)}
    replaced = sum(p.nbytes for n, p in dense.named_parameters() if n.rpartition(".")[0] in names and p.ndim > 1)
    assert model.get_memory_footprint() == dense.get_memory_footprint() - replaced + packed
    assert packed == pytest.approx(replaced * (4 + 8 / 32) / 16, rel=0.03)


def test_no_card_where_there_is_nothing_to_say(tmp_path: Path) -> None:
    model = quantize_model(make())
    model.save_pretrained(tmp_path / "worker", is_main_process=False)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "README.md").write_text("of its owner")
    model.save_pretrained(tmp_path / "own")
    model.dequantize().save_pretrained(tmp_path / "dense again")
    assert [path.parent.name for path in tmp_path.rglob("README.md")] == ["own"]
    assert (tmp_path / "own" / "README.md").read_text() == "of its owner"


def test_bitsandbytes_form_needs_nothing_of_ours(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from qlora_ext.integrations.bitsandbytes import save_pretrained

    save_pretrained(quantize_model(make()), tmp_path / "theirs")
    assert "needs" not in (tmp_path / "theirs" / "config.json").read_text()
    assert not (tmp_path / "theirs" / "README.md").exists()
