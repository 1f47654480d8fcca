"""The 4-bit share of a model's linear weights is reported. A model without 4-bit layers is an error."""

from __future__ import annotations

import pathlib
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qlora_ext
from qlora_ext.nn import Embedding4bit, Linear4bit, coverage, quantize_model

WEIGHTS = 64 * 64


class Odd(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


def body(**more: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict({"body": nn.Linear(64, 64), **more})


def test_all_is_counted() -> None:
    model = body(
        odd=Odd(64, 64),
        lm_head=nn.Linear(64, 8),
        embedding=nn.Embedding(9, 64),
        convolution=nn.Conv2d(3, 3, 3),
        attention=nn.MultiheadAttention(64, 4),
        cell=nn.LSTM(8, 8),
    )
    with pytest.warns(UserWarning, match="ModuleDict: 16.3% of the linear weights are quantized; dense are attention"):
        found = coverage(quantize_model(model))
    cell = 2 * 4 * 8 * 8
    assert found.quantized == WEIGHTS
    assert found.by_request == {"lm_head": 64 * 8}
    assert found.dense == {
        "odd": WEIGHTS,
        "attention": 3 * WEIGHTS,
        "attention.out_proj": WEIGHTS,
        "cell": cell,
    }
    assert found.share == WEIGHTS / (6 * WEIGHTS + cell)
    assert found.reasons["odd"] == "a Odd, for which there is no 4-bit layer"
    assert found.reasons["attention.out_proj"] == "its library keeps it in float32, or computes with its weight"


def test_dense_layers_are_named_exactly() -> None:
    def blocks(*odd: int) -> nn.ModuleDict:
        layers = [nn.ModuleDict({"up": Odd(64, 64) if i in odd else nn.Linear(64, 64)}) for i in range(8)]
        return nn.ModuleDict({"blocks": nn.ModuleList(layers), "last": nn.Linear(64, 64)})

    why = r" \(a Odd, for which there is no 4-bit layer\)"
    for odd, name in (((3,), "3"), (range(8), r"\{0-7\}"), ((0, 1, 2, 5, 7), r"\{0-2,5,7\}")):
        with pytest.warns(UserWarning, match=rf"dense are blocks\.{name}\.up{why};"):
            quantize_model(blocks(*odd))
    two = nn.ModuleList([blocks(0, 1), blocks(1)])
    with pytest.warns(UserWarning, match=rf"dense are 3 of \{{0-1\}}\.blocks\.\{{0-1\}}\.up{why};"):
        quantize_model(two)


def test_layers_that_were_skipped_by_request_are_not_reported() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize_model(body(other=nn.Linear(64, 64), lm_head=nn.Linear(64, 64)), skip=["other"])
        quantize_model(body(other=nn.Linear(64, 64)), keep=["other"])
        quantize_model(body(small=Odd(64, 1)), skip=["small"])
    with pytest.warns(UserWarning, match=r"dense are odd \(a Odd, for which there is no 4-bit layer\)"):
        quantize_model(body(odd=Odd(64, 64), other=nn.Linear(64, 64)), skip=["other"])


NOTHING: dict[str, tuple[Any, dict[str, Any], str]] = {
    "convolutions": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3)), {}, "got a Sequential without any: it has no linear"),
    "unknown layers": (lambda: nn.ModuleDict({"odd": Odd(64, 64)}), {}, r"its linear weights stay dense: odd \(a Odd,"),
    "heads": (lambda: nn.ModuleDict({"lm_head": nn.Linear(64, 64)}), {}, "its linear layers are to stay dense"),
    "skipped": (body, {"skip": ["body"]}, "its linear layers are to stay dense: body"),
}


@pytest.mark.parametrize("case", NOTHING)
def test_a_model_without_layers_to_quantize_is_an_error(case: str) -> None:
    build, options, message = NOTHING[case]
    model = build()
    before = {name: type(m) for name, m in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        quantize_model(model, **options)
    assert {name: type(m) for name, m in model.named_modules()} == before


def test_a_4bit_model_is_left_as_it_is() -> None:
    model = quantize_model(body())
    layer = model["body"]
    with pytest.warns(UserWarning, match="its layers are 4-bit already and stay as they are"):
        assert quantize_model(model)["body"] is layer
    assert coverage(model).share == 1.0


def test_adopting_a_model_without_layers_of_bitsandbytes_is_refused() -> None:
    with pytest.raises(ValueError, match="expected layers that bitsandbytes has quantized, got a ModuleDict"):
        qlora_ext.adopt(body())


def test_from_pretrained_reports_coverage_and_rejects_models_without_4bit_layers(tmp_path: pathlib.Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")

    class OddMamba(transformers.MambaForCausalLM):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.backbone.odd = Odd(64, 1024)

    config = transformers.MambaConfig(hidden_size=64, num_hidden_layers=2, vocab_size=128, state_size=8)
    OddMamba(config).save_pretrained(tmp_path / "mamba")
    load = OddMamba.from_pretrained
    with pytest.warns(UserWarning, match=r"OddMamba: .* are quantized; dense are backbone.odd \(a Odd, for which"):
        model = load(tmp_path / "mamba", quantization_config=qlora_ext.QLoRAConfig())
    model.save_pretrained(tmp_path / "4bit")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load(tmp_path / "4bit")  # the checkpoint says which layers are dense
        load(tmp_path / "mamba", quantization_config=qlora_ext.QLoRAConfig(skip_modules=["odd"]))
    with pytest.raises(ValueError, match="got a OddMamba without any: its linear layers are to stay"):
        load(tmp_path / "mamba", quantization_config=qlora_ext.QLoRAConfig(skip_modules=["odd", "_proj", "lm_head"]))


def test_modules_named_like_the_output_head_become_4bit(tmp_path: pathlib.Path) -> None:
    """GIT's head is called ``output``, like two modules of each of its layers."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.GitConfig(**sizes, vocab_size=128, vision_config={**sizes, "image_size": 32, "patch_size": 8})
    transformers.GitForCausalLM(config).save_pretrained(tmp_path / "dense")
    load = transformers.GitForCausalLM.from_pretrained
    model = load(tmp_path / "dense", quantization_config=qlora_ext.QLoRAConfig())
    model.save_pretrained(tmp_path / "4bit")
    for found in (model, load(tmp_path / "4bit")):
        assert [name for name, m in found.named_modules() if type(m) is nn.Linear] == ["output"]
        assert isinstance(found.git.encoder.layer[0].attention.output.dense, Linear4bit)


def test_a_tied_embedding_is_4bit_where_the_heads_weight_is_read() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.MambaConfig(
        hidden_size=64, num_hidden_layers=1, vocab_size=128, state_size=8, tie_word_embeddings=True
    )
    model = transformers.MambaForCausalLM(config).eval()  # casts its hidden states to the dtype of lm_head.weight
    quantize_model(model, embeddings=True)
    assert type(model.get_input_embeddings()) is Embedding4bit
    logits = model(torch.arange(4)[None]).logits
    torch.testing.assert_close(logits, model.dequantize()(torch.arange(4)[None]).logits, rtol=1e-3, atol=1e-4)


def test_a_layer_whose_parameter_is_4bit_counts_and_stays() -> None:
    model = nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 64))
    model[0].weight = nn.Parameter(qlora_ext.quantize(model[0].weight))
    packed = model[0].weight.packed
    qlora_ext.quantize_model(model)
    assert type(model[0]) is nn.Linear
    assert model[0].weight.packed is packed
    found = qlora_ext.nn.coverage(model)
    assert (found.quantized, found.dense) == (2 * 48 * 64, {})
