"""TRL's SFTTrainer runs QLoRA unchanged: only the quantization config differs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import qlora_ext
from qlora_ext.integrations.peft import LoraLinear4bit, check_base
from qlora_ext.streaming import streaming_of
from tiny_models import save_tiny_llama

COUNTING = [" ".join(str(i + j) for j in range(6)) for i in range(16)]


def sft(model: Path, run: Path, config: qlora_ext.QLoRAConfig, **options: Any) -> Any:
    return trl.SFTTrainer(
        model=str(model),
        args=trl.SFTConfig(
            output_dir=str(run),
            max_steps=4,
            save_steps=4,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            max_length=64,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            model_init_kwargs={"dtype": "bfloat16"},
            **options,
        ),
        train_dataset=Dataset.from_dict({"text": COUNTING}),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        quantization_config=config,
    )


def losses_of(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("options", [{}, {"packing": True, "gradient_checkpointing": False}], ids=str)
def test_sft_trainer_runs_unchanged(options: dict[str, Any], tmp_path: Path) -> None:
    save_tiny_llama(tmp_path / "model", 0)
    trainer = sft(tmp_path / "model", tmp_path / "run", qlora_ext.QLoRAConfig(), **options)
    assert sum(isinstance(m, LoraLinear4bit) for m in trainer.model.modules()) == 14
    trainer.train()
    losses = losses_of(trainer)
    assert len(losses) == 4
    assert losses[-1] < losses[0] - 0.2

    checkpoint = tmp_path / "run" / "checkpoint-4"
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype="bfloat16", quantization_config=qlora_ext.QLoRAConfig()
    )
    assert check_base(base, checkpoint, "refuse") is True
    ids = AutoTokenizer.from_pretrained(tmp_path / "model")(COUNTING[0], return_tensors="pt")["input_ids"]
    again = PeftModel.from_pretrained(base, checkpoint).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, trainer.model.eval()(ids).logits)


def test_a_streamed_base_trains_as_a_resident_one(tmp_path: Path) -> None:
    dense, saved = tmp_path / "dense", tmp_path / "4bit"
    save_tiny_llama(dense, 0)
    model = AutoModelForCausalLM.from_pretrained(dense, dtype="bfloat16", quantization_config=qlora_ext.QLoRAConfig())
    model.save_pretrained(saved)
    AutoTokenizer.from_pretrained(dense).save_pretrained(saved)
    runs = []
    for config in (qlora_ext.QLoRAConfig(), qlora_ext.QLoRAConfig(stream="disk")):
        trainer = sft(saved, tmp_path / f"run{len(runs)}", config)
        trainer.train()
        runs.append((losses_of(trainer), {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}))
        assert (streaming_of(trainer.model) is None) == (config.stream is None)
    (resident, expected), (streamed, found) = runs
    assert streamed == resident
    assert len(set(resident)) == 4
    assert found.keys() == expected.keys()
    assert all(torch.equal(p, expected[name]) for name, p in found.items())
