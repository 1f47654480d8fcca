"""Heads of classification and question-answering models stay dense, and PEFT trains them. Layers whose weights a
model's own code reads stay dense too."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from qlora_ext import QLoRAConfig
from qlora_ext.nn import Linear4bit, quantize_model
from tiny_models import same_state, token_ids

IDS = token_ids()
CAUSAL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
MASKED = {key: CAUSAL[key] for key in list(CAUSAL)[:5]} | {"pad_token_id": 0, "max_position_embeddings": 64}
CONFIGS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**CAUSAL),
    "qwen2": lambda: transformers.Qwen2Config(**CAUSAL),
    "bert": lambda: transformers.BertConfig(**MASKED),
    "roberta": lambda: transformers.RobertaConfig(**MASKED, type_vocab_size=1),
    "deberta": lambda: transformers.DebertaV2Config(**MASKED),
    "distilbert": lambda: transformers.DistilBertConfig(vocab_size=128, dim=64, hidden_dim=96, n_layers=2, n_heads=4),
    "gpt2": lambda: transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=128, pad_token_id=0),
}
TASKS = {
    "SequenceClassification": ("SEQ_CLS", {"score", "classifier", "pre_classifier", "pooler"}),
    "TokenClassification": ("TOKEN_CLS", {"score", "classifier"}),
    "QuestionAnswering": ("QUESTION_ANS", {"qa_outputs"}),
}
ATTENTION = r".*(q_proj|query|query_proj|q_lin|c_attn)"
cases = pytest.mark.parametrize(("family", "task"), [(family, task) for family in CONFIGS for task in TASKS])


def build(family: str, task: str) -> Any:
    torch.manual_seed(0)
    return getattr(transformers, f"AutoModelFor{task}").from_config(CONFIGS[family](), dtype=torch.float32).eval()


def labels(task: str) -> dict[str, torch.Tensor]:
    if task == "QuestionAnswering":
        return {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])}
    return {"labels": torch.tensor([0, 1]) if task == "SequenceClassification" else IDS % 2}


def check_heads(model: Any, task: str) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            in_body = name.startswith(model.base_model_prefix + ".")
            assert isinstance(module, Linear4bit) == in_body, name
            assert in_body or name.partition(".")[0] in TASKS[task][1]
    assert any(isinstance(m, Linear4bit) for m in model.modules())


@cases
def test_heads_are_dense_and_peft_trains_them(family: str, task: str) -> None:
    model = quantize_model(build(family, task))
    check_heads(model, task)
    task_type = TASKS[task][0]
    head = next(name for name, m in model.named_children() if name in ("score", "classifier", "qa_outputs"))
    config = LoraConfig(task_type=task_type, target_modules=ATTENTION, modules_to_save=[head])
    model = get_peft_model(model, config).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert any(head in name for name in before)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        model(input_ids=IDS, **labels(task)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {name for name, p in model.named_parameters() if p.requires_grad and not torch.equal(p, before[name])}
    assert changed == set(before)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_classifier_loads_in_4_bits_and_is_saved_as_it_is(family: str, tmp_path: pathlib.Path) -> None:
    build(family, "SequenceClassification").save_pretrained(tmp_path / "dense")
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    config = QLoRAConfig()
    model = load(tmp_path / "dense", quantization_config=config)
    check_heads(model, "SequenceClassification")
    assert config.skip_modules is None  # the caller's configuration, unchanged for the next model
    model.save_pretrained(tmp_path / "4bit")
    assert same_state(load(tmp_path / "4bit"), model)
    all_of_it = load(tmp_path / "dense", quantization_config=QLoRAConfig(skip_modules=[]))
    assert all(isinstance(m, Linear4bit) for m in all_of_it.modules() if isinstance(m, nn.Linear))
    all_of_it.save_pretrained(tmp_path / "all")
    assert same_state(load(tmp_path / "all"), all_of_it)

    lora = LoraConfig(task_type="SEQ_CLS", target_modules=ATTENTION)
    adapted = get_peft_model(model, lora).eval()
    nn.init.normal_(next(p for name, p in adapted.named_parameters() if "modules_to_save" in name))
    adapted.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(tmp_path / "4bit"), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS).logits, adapted(input_ids=IDS).logits)


def test_names_serve_where_there_is_no_transformers_model() -> None:
    model = nn.ModuleDict({"body": nn.Linear(64, 64), "classifier": nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2))})
    assert [name for name, m in quantize_model(model).named_modules() if isinstance(m, Linear4bit)] == ["body"]
    wrapped = nn.ModuleDict({"inner": build("bert", "SequenceClassification")})
    quantize_model(wrapped)
    check_heads(wrapped["inner"], "SequenceClassification")


def test_a_4bit_head_that_peft_is_to_train_is_refused() -> None:
    model = quantize_model(build("llama", "SequenceClassification"), skip=())
    with pytest.raises(ValueError, match=r"modules_to_save: Linear4bit\(.*\) is 4-bit; .*skip"):
        get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"]))


MIXERS = {
    "mamba": lambda: transformers.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=128, state_size=8),
    "falcon_mamba": lambda: transformers.FalconMambaConfig(
        hidden_size=32, num_hidden_layers=2, vocab_size=128, state_size=8
    ),
    "mamba2": lambda: transformers.Mamba2Config(
        hidden_size=32, num_hidden_layers=2, vocab_size=128, state_size=8, head_dim=8, num_heads=8, n_groups=1
    ),
}


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("family", MIXERS)
def test_mamba_computes_with_4bit_projections(family: str, by_name: bool) -> None:
    def mamba() -> Any:
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(MIXERS[family](), dtype=torch.float32).eval()

    model = quantize_model(mamba(), **({"skip": ["lm_head"]} if by_name else {}))
    kinds = {name.rpartition(".")[2]: isinstance(m, Linear4bit) for name, m in model.named_modules()}
    assert all(kinds[name] for name in ("in_proj", "dt_proj", "x_proj", "out_proj") if name in kinds)
    twin = mamba()
    twin.load_state_dict(quantize_model(mamba()).dequantize().state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, twin(IDS).logits, rtol=1e-3, atol=1e-4)


def test_modules_that_transformers_keeps_in_float32_stay_dense() -> None:
    """T5 casts the inputs of ``wo`` to the dtype of its weight."""
    config = transformers.T5Config(vocab_size=128, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4)

    def t5() -> Any:
        torch.manual_seed(0)
        return transformers.T5ForConditionalGeneration(config).eval()

    model = quantize_model(t5())
    assert {name.rpartition(".")[2] for name, m in model.named_modules() if type(m) is nn.Linear} == {"wo", "lm_head"}
    twin = t5()
    twin.load_state_dict(quantize_model(t5()).dequantize().state_dict())
    with torch.no_grad():
        logits = [m(input_ids=IDS, decoder_input_ids=IDS).logits for m in (model, twin)]
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-4)
