"""Dense layers that keep 16-bit weights in a model that computes in float32: the same results, half the memory."""

from __future__ import annotations

import copy
import pathlib

import peft
import pytest
import torch
from torch import nn

import qlora_ext
from qlora_app.models.loss import head_loss
from qlora_app.planning import memory
from qlora_ext import dtypes
from qlora_ext.nn import Embedding16bit, Linear16bit, computing_in, set_compute_dtype
from qlora_ext.nn.dense_16bit import to_dense_classes
from tiny_models import CONFIGS, make, token_ids

OPS = torch.ops.qlora
TRAINED = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": "all-linear"}


@pytest.fixture
def laptop(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor without bfloat16 arithmetic."""
    monkeypatch.setattr(dtypes, "native_bfloat16", lambda: False)


def models(family: str) -> tuple[nn.Module, nn.Module]:
    """The same 4-bit model that computes in float32, with the dense weights in 16 bits, and cast to float32."""
    stored = qlora_ext.quantize_model(make(family))
    cast = copy.deepcopy(stored).to(torch.float32)
    return set_compute_dtype(stored, torch.float32), cast


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gemma2", "xglm"])
def test_results_are_those_of_float32_weights(family: str) -> None:
    stored, cast = models(family)
    ids = token_ids()
    with torch.no_grad():
        torch.testing.assert_close(stored(ids).logits, cast(ids).logits, rtol=1e-5, atol=1e-5)
    assert stored.dtype == torch.float32


def test_large_weights_keep_16_bits_and_others_are_cast() -> None:
    stored, cast = models("qwen2")
    head, table = stored.get_output_embeddings(), stored.get_input_embeddings()
    assert type(head) is Linear16bit
    assert type(table) is Embedding16bit
    assert head.weight is table.weight
    assert head.weight.dtype == torch.bfloat16
    assert stored.model.norm.weight.dtype == torch.float32
    assert stored.model.layers[0].self_attn.q_proj.bias.dtype == torch.float32
    assert table(torch.tensor([3])).dtype == torch.float32
    sizes = [sum(t.nbytes for t in (*m.parameters(), *m.buffers())) for m in (stored, cast)]
    assert sizes[1] - sizes[0] == 2 * head.weight.numel()


def test_an_embedding_that_scales_its_rows_keeps_16_bits() -> None:
    """Gemma's. The head that is tied to it does too."""
    dense = qlora_ext.quantize_model(make("gemma2"))
    kind = type(dense.get_input_embeddings())
    assert kind is not nn.Embedding
    model = set_compute_dtype(copy.deepcopy(dense), torch.float32)
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    assert isinstance(table, Embedding16bit)
    assert isinstance(table, kind)
    assert type(head) is Linear16bit
    assert head.weight is table.weight
    assert head.weight.dtype == torch.bfloat16
    to_dense_classes(model)
    assert type(table) is kind
    assert type(head) is nn.Linear


def test_an_embedding_that_computes_something_else_is_cast() -> None:
    class Shifted(nn.Embedding):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids) + 8.0

    model = nn.ModuleDict({"table": Shifted(100, 64), "up": nn.Linear(64, 64), "head": nn.Linear(64, 100)})
    model["head"].weight = model["table"].weight
    model = set_compute_dtype(qlora_ext.quantize_model(model.bfloat16(), skip=("head",)), torch.float32)
    assert type(model["head"]) is nn.Linear
    assert model["head"].weight is model["table"].weight
    assert model["head"].weight.dtype == torch.float32


def test_the_dtype_of_the_model_changes_again() -> None:
    model = models("qwen2")[0]
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        logits = set_compute_dtype(model, dtype)(token_ids()).logits
        assert logits.dtype == model.dtype == dtype
    assert model.lm_head.weight.dtype == model.model.layers[0].mlp.up_proj.dequantize().dtype == torch.float16
    assert model.to(torch.bfloat16)(token_ids()).logits.dtype == torch.bfloat16


def test_computing_in_float32_makes_no_copy() -> None:
    model = models("qwen2")[0]
    weight = model.lm_head.weight
    data, expected = weight.data_ptr(), model(token_ids()).logits
    with computing_in(model, torch.float32):
        assert weight.data_ptr() == data
        assert torch.equal(model(token_ids()).logits, expected)


@pytest.mark.parametrize("chunked", [False, True])
def test_the_gradient_reaches_the_hidden_states(chunked: bool) -> None:
    stored, cast = models("llama")
    hidden, labels = torch.randn(7, 64), torch.randint(0, 128, (7,))
    gradients = []
    for model in (stored, cast.requires_grad_(False)):
        x = hidden.clone().requires_grad_()
        loss = head_loss(model.get_output_embeddings(), x, labels, chunked)
        loss.backward()
        gradients.append((loss.detach(), x.grad))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_module_that_is_trained_in_full_is_float32(family: str) -> None:
    model = peft.get_peft_model(models(family)[0], peft.LoraConfig(**TRAINED, modules_to_save=["lm_head"]))
    wrapper = model.get_base_model().lm_head
    assert wrapper.original_module.weight.dtype == torch.bfloat16
    trained = wrapper.modules_to_save["default"].weight
    assert trained.dtype == torch.float32
    assert trained.requires_grad
    model(token_ids(), labels=token_ids()).loss.backward()
    assert trained.grad is not None
    assert trained.grad.dtype == torch.float32
    assert trained.grad.any()


def test_an_adapter_on_the_head_and_the_table() -> None:
    options = {**TRAINED, "target_modules": ["lm_head", "embed_tokens", "q_proj"]}
    model = peft.get_peft_model(models("llama")[0], peft.LoraConfig(**options))
    model(token_ids(), labels=token_ids()).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(g is not None and g.isfinite().all() for g in gradients.values())


def test_a_bfloat16_model_multiplies_in_float32(laptop: None, tmp_path: pathlib.Path) -> None:
    """Without bfloat16 arithmetic, the dense head of a loaded model is served too, and the model stays bfloat16."""
    from transformers import AutoModelForCausalLM

    make("qwen2").save_pretrained(tmp_path / "dense")
    config = qlora_ext.QLoRAConfig()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16, quantization_config=config)
    assert type(model.lm_head) is Linear16bit
    x = torch.randn(2, 5, 64).bfloat16()
    with torch.no_grad():
        y = model.lm_head(x)
    assert torch.equal(y, OPS.linear_dense(x.float(), model.lm_head.weight.detach()).bfloat16())
    # The biases of 4-bit layers keep their dtype, in memory and in files.
    assert model.model.layers[0].self_attn.q_proj.bias.dtype == torch.bfloat16
    assert {p.dtype for name, p in model.named_parameters() if name.endswith("bias")} == {torch.bfloat16}
    model.save_pretrained(tmp_path / "4bit")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "4bit")
    assert type(again.lm_head) is Linear16bit
    assert again.lm_head.weight is again.model.embed_tokens.weight
    with torch.no_grad():
        assert torch.equal(again(token_ids()).logits, model(token_ids()).logits)


def test_a_layer_without_the_operator_computes_as_a_linear_layer() -> None:
    layer = nn.Linear(64, 48).bfloat16()
    ours = copy.deepcopy(layer)
    ours.__class__ = Linear16bit
    x = torch.randn(3, 64)
    for dtype in (torch.float64, torch.float16):
        exact = copy.deepcopy(layer).double()(x.to(dtype).double())
        torch.testing.assert_close(ours(x.to(dtype)).double(), exact, rtol=1e-2, atol=1e-2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(x), layer(x))
    ours(x).sum().backward()  # not frozen
    assert ours.weight.grad.dtype == torch.bfloat16


def test_compiles_whole() -> None:
    layer = nn.Linear(64, 48).bfloat16().requires_grad_(False)
    layer.__class__ = Linear16bit
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(3, 64).to(dtype)
        assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_plan_is_of_the_stored_weights(laptop: None, family: str) -> None:
    job = memory.Job(config=CONFIGS[family](), host=True)
    model = peft.get_peft_model(models(family)[0], peft.LoraConfig(**{**TRAINED, "r": job.rank}))
    planned = memory.static_split(job)
    names = ("base weights", "scales", "other weights", "adapters")
    total = sum(t.nbytes for t in {*model.parameters(), *model.buffers()})
    assert sum(planned[name] for name in names) == total
