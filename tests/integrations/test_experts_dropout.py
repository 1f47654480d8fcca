"""LoRA with dropout on a mixture of experts, which PEFT alone rejects: results, and files that PEFT can load."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import qlora_ext
from adapted_models import base, draw
from qlora_app.main import main
from qlora_ext.integrations.peft.experts import LoraExperts4bit
from qlora_ext.nn import Experts4bit, ExpertsLora
from tiny_experts import Experts, routing
from tiny_models import MIXTURES, logits, make, save_tiny_llama, token_ids

IDS = token_ids()
P = 0.3


def adapted(model: Any = None, lora_dropout: float = P, **options: Any) -> Any:
    """The README's snippet."""
    torch.manual_seed(2)
    config = LoraConfig(**{"r": 4, "target_modules": "all-linear", "lora_dropout": lora_dropout, **options})
    return draw(get_peft_model(model or base("mixtral"), config))


def experts_of(model: Any) -> list[LoraExperts4bit]:
    return [m for m in model.modules() if isinstance(m, LoraExperts4bit)]


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
def test_the_mean_over_masks_is_the_result_without_dropout(name: str) -> None:
    """The experts are linear in an adapter of their last weight, and nearly linear in a small one of their first."""
    module = Experts4bit.from_experts(Experts())
    index, weights = routing()
    x = torch.randn(11, 64)
    e, n, k = module.packed_shapes[name]
    a, b = torch.randn(e, 4, k), torch.randn(e, n, 4) / 100
    plain = module(x, index, weights)
    expected = module(x, index, weights, {name: ExpertsLora(a, b, 0.5)}) - plain
    torch.manual_seed(0)
    draws = [module(x, index, weights, {name: ExpertsLora(a, b, 0.5, P)}) - plain for _ in range(400)]
    assert not torch.equal(draws[0], draws[1])
    assert (draws[0] - expected).norm() > 0.2 * expected.norm()
    assert (sum(draws) / len(draws) - expected).norm() < 0.1 * expected.norm()


def test_all_dropped_leaves_the_base_alone() -> None:
    model = adapted(lora_dropout=1.0, target_modules=["q_proj", "w1", "w2", "w3"])
    assert len(experts_of(model)) == 4
    plain = logits(base("mixtral"))
    assert torch.equal(logits(model.train()), plain)
    assert not torch.equal(logits(model.eval()), plain)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_trains_with_dropout_and_checkpointing_replays_it(family: str) -> None:
    with pytest.warns(UserWarning, match=r"lora_dropout=0.3: has no effect on \w+Router.weight"):
        model = adapted(base(family)).train()
    assert {m.lora_dropout["default"].p for m in experts_of(model)} == {P}

    def gradients() -> list[Tensor]:
        model.zero_grad()
        torch.manual_seed(5)
        model(input_ids=IDS, labels=IDS).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    plain = gradients()
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(), strict=True))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(), strict=True))
    model.eval()
    assert not all(torch.equal(a, b) for a, b in zip(plain, gradients(), strict=True))


def test_gradients_are_those_of_the_mask_that_was_drawn() -> None:
    """The experts are linear in B of the last weight: <dL/dB, B> = L for L = <dy, y - plain> with the same masks."""
    module = Experts4bit.from_experts(Experts())
    index, weights = routing()
    x, dy = torch.randn(11, 64), torch.randn(11, 64)
    e, n, k = module.packed_shapes["down_proj"]
    a, b = torch.randn(e, 4, k), torch.randn(e, n, 4).requires_grad_()
    plain = (dy * module(x, index, weights)).sum()
    loss = (dy * module(x, index, weights, {"down_proj": ExpertsLora(a, b, 0.5, P)})).sum()
    loss.backward()
    torch.testing.assert_close((b.grad * b).sum(), loss - plain, rtol=1e-3, atol=1e-2)


def test_files_are_those_of_peft_and_training_continues_with_dropout(tmp_path: pathlib.Path) -> None:
    model = adapted(target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    expected = logits(model.eval())
    model.save_pretrained(tmp_path)
    assert model.peft_config["default"].lora_dropout == P
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_dropout"] == 0.0

    dense = PeftModel.from_pretrained(base("mixtral").dequantize(), tmp_path)
    assert {type(m) for m in dense.modules() if isinstance(m, ParamWrapper)} == {ParamWrapper}  # PEFT's own
    torch.testing.assert_close(logits(dense), expected, rtol=1e-3, atol=1e-3)

    again = PeftModel.from_pretrained(base("mixtral"), tmp_path, is_trainable=True)
    assert again.peft_config["default"].lora_dropout == P
    layers = [m for m in again.modules() if hasattr(m, "lora_dropout")]
    assert {m.lora_dropout["default"].p for m in layers} == {P}
    assert torch.equal(logits(again.eval()), expected)
    model.train()
    again.train()
    torch.manual_seed(3)
    dropped = logits(model)
    torch.manual_seed(3)
    assert torch.equal(logits(again), dropped)
    (tmp_path / "qlora_base.json").write_text('{"fingerprint": "", "format_version": 1, "lora_dropout": 1.5}')
    with pytest.raises(ValueError, match="expected a probability from 0 to 1 as lora_dropout, got 1.5"):
        PeftModel.from_pretrained(base("mixtral"), tmp_path)


def test_adapters_active_together_have_one_dropout() -> None:
    options = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}
    model = adapted(**options).train()
    try:
        model.add_adapter("second", LoraConfig(**options, lora_dropout=0.5))
    except ValueError as error:  # PEFT 0.19
        pytest.skip(f"this PEFT has one adapter of target_parameters: {error}")
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"lora_dropout: expected one probability .*down_proj.*got \[0.3, 0.5\]"):
        logits(model)
    model.eval()
    assert logits(model).isfinite().all()


def test_a_dense_model_is_left_to_peft() -> None:
    with pytest.raises(ValueError, match="does not work with lora_dropout != 0"):
        adapted(make("mixtral", torch.float32))


def test_the_command_trains_a_mixture_with_its_default_options(tmp_path: pathlib.Path) -> None:
    save_tiny_llama(tmp_path / "model", 0)  # only its tokenizer is used
    config = MIXTURES["mixtral"]()
    config.update({"vocab_size": 257, "eos_token_id": 256})
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("one and two make three, and three and two make five.\n" * 100)
    files = ["--model", tmp_path / "model", "--data", tmp_path / "text.txt", "--output", tmp_path / "run"]
    assert main([*map(str, ["finetune", *files, "--max-steps", 2, "--seq-len", 32, "--eval-size", 2])]) == 0
    adapter = tmp_path / "run" / "adapter"
    assert main(["generate", "--adapter", str(adapter), "--prompt", "one", "--max-new-tokens", "2"]) == 0
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model", quantization_config=qlora_ext.QLoRAConfig())
    model = PeftModel.from_pretrained(base, adapter)
    assert len(experts_of(model)) == 4
    assert all(isinstance(m.lora_dropout["default"], nn.Dropout) for m in experts_of(model))
