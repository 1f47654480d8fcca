"""Reading a checkpoint releases its memory, and does not affect other mappings of the same files in the process."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from qlora_ext import QLoRAConfig, Weight4bit
from tiny_models import CONFIGS, make, same_state


@pytest.fixture
def saved(tmp_path: pathlib.Path) -> pathlib.Path:
    model = make("llama")
    model.model.layers[0].mlp.up_proj.weight.data = torch.randn(192, 64).bfloat16()
    model.save_pretrained(tmp_path)
    return tmp_path


def load(path: pathlib.Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])  # a view of the mapping, and a copy
@pytest.mark.parametrize("first_is_4bit", [False, True])
def test_another_model_of_the_same_directory_keeps_its_changes(
    saved: pathlib.Path, dtype: torch.dtype, first_is_4bit: bool
) -> None:
    first = load(saved, **({"quantization_config": QLoRAConfig()} if first_is_4bit else {}))
    with torch.no_grad():
        for p in first.parameters():
            (p.packed if isinstance(p, Weight4bit) else p).add_(1)
    expected = {name: t.clone() for name, t in first.state_dict().items()}
    second = load(saved, quantization_config=QLoRAConfig(), dtype=dtype)
    changed = [name for name, t in first.state_dict().items() if not torch.equal(t, expected[name])]
    assert changed == []
    assert same_state(second, load(saved, quantization_config=QLoRAConfig(), dtype=dtype))


def test_a_state_that_the_caller_keeps_is_left_as_it_is(saved: pathlib.Path) -> None:
    state = load_file(saved / "model.safetensors")  # in a mapping, and written to
    for t in state.values():
        t.mul_(2.0)
    expected = {name: t.clone() for name, t in state.items()}
    model = LlamaForCausalLM.from_pretrained(
        None, config=CONFIGS["llama"](), state_dict=state, quantization_config=QLoRAConfig(), dtype=torch.bfloat16
    )
    assert all(torch.equal(t, expected[name]) for name, t in state.items())
    assert torch.equal(model.model.norm.weight, expected["model.norm.weight"])


def test_a_model_that_another_thread_loads_meanwhile_keeps_its_changes(
    saved: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora_ext.integrations.transformers import mapped_files

    others: list[Any] = []
    release = mapped_files.MappedFiles.release

    def load_another(self: Any, tensor: torch.Tensor) -> None:
        if not others:  # as if by another thread after this load began
            others.append(load(saved))
            with torch.no_grad():
                for p in others[0].parameters():
                    p.add_(1.0)
            others.append({name: t.clone() for name, t in others[0].state_dict().items()})
        release(self, tensor)

    monkeypatch.setattr(mapped_files.MappedFiles, "release", load_another)
    load(saved, quantization_config=QLoRAConfig())
    other, expected = others
    assert [name for name, t in other.state_dict().items() if not torch.equal(t, expected[name])] == []
