"""Only layers whose weights a model's own code reads stay dense."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from qlora_ext.nn import Linear4bit, quantize_model
from qlora_ext.nn.weight_reads import weights_read


class Block(nn.Module):
    """Reads weights in every supported way, and inspects attributes of others without reading them."""

    def __init__(self, slices: int = 1) -> None:
        super().__init__()
        self.slices = slices
        self.state = 1
        self.called = nn.Linear(64, 64)
        self.multiplied = nn.Linear(64, 64)
        self.clamped = nn.Linear(64, 64)
        self.cast = nn.Linear(64, 64)
        self.told_apart = nn.Linear(64, 64)
        self.asked_for_its_device = nn.Linear(64, 64)
        self.sliced = nn.Linear(64, 64)
        self.of_a_state = nn.Linear(64, 64)
        self.of_nobody = nn.Linear(64, 64)
        self.listed = nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 64)])

    def forward(self, x: Tensor) -> Tensor:
        self.state = 0
        x = self.called(x.to(self.asked_for_its_device.weight.device)) @ self.multiplied.weight
        self._clamp()
        x = self.cast(x.to(self.cast.weight.dtype))
        if self.told_apart.weight.dtype not in (torch.int8, torch.uint8):
            x = x.to(self.told_apart.weight.dtype)
        if self.slices > 1:
            x = functional.linear(x, self.sliced.weight)
        if self.state > 0:
            x = functional.linear(x, self.of_a_state.weight)
        return x @ self.listed[1].weight

    def _clamp(self) -> None:
        self.clamped.weight.data.clamp_(-1, 1)

    def reset(self) -> None:
        nn.init.zeros_(self.called.weight)

    def left_over(self) -> Tensor:
        return self.of_nobody.weight


class Model(nn.Module):
    def __init__(self, slices: int = 1) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(slices), Block(slices)])
        self.head = nn.ModuleDict({"inner": nn.ModuleDict({"proj": nn.Linear(64, 64)}), "proj": nn.Linear(64, 64)})

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        for part in (self.head,):
            x = x @ part.inner.proj.weight
        return x


READ = {"multiplied", "clamped", "cast", "of_a_state", "listed.0", "listed.1"}


@pytest.mark.parametrize("slices", [1, 2])
def test_reads_of_weights_are_found(slices: int) -> None:
    expected = READ | ({"sliced"} if slices > 1 else set())
    assert weights_read(Model(slices)) == {f"blocks.{i}.{name}" for i in (0, 1) for name in expected} | {
        "head.inner.proj"
    }


def test_quantize_model_leaves_it_dense() -> None:
    with pytest.warns(UserWarning, match="the model's own code takes the weight"):
        model = quantize_model(Model(), skip=())
    dense = {name for name, m in model.named_modules() if type(m) is nn.Linear}
    assert dense == weights_read(Model())
    assert isinstance(model.blocks[0].called, Linear4bit)


def test_a_class_without_its_source_keeps_the_layers_it_names_dense() -> None:
    namespace: dict[str, Any] = {"nn": nn, "__name__": "without_source"}
    exec(
        "class Hidden(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.taken, self.other = nn.Linear(64, 64), nn.Linear(64, 64)\n"
        "    def forward(self, x):\n"
        "        return x @ self.taken.weight\n",
        namespace,
    )
    assert weights_read(namespace["Hidden"]()) == {"taken"}


FAMILIES: dict[str, tuple[dict[str, Any], set[str], set[str]]] = {
    # configuration; layers whose weights are read; layers whose weights are not read
    "Mamba": ({"state_size": 8}, {"x_proj", "dt_proj", "out_proj"}, {"in_proj"}),
    "Rwkv": ({}, {"output", "value"}, {"key", "receptance"}),
    "Bloom": ({"n_head": 4}, set(), {"dense", "dense_4h_to_h", "query_key_value"}),
    "Falcon": ({"num_attention_heads": 4}, set(), {"dense", "query_key_value"}),
    "Qwen3_5Text": (
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
        },
        set(),
        {"out_proj", "in_proj_qkv"},
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_of_transformers(family: str) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    if not hasattr(transformers, f"{family}Config"):
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    options, read, called = FAMILIES[family]
    config = getattr(transformers, f"{family}Config")(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, vocab_size=128, **options
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    kinds: dict[str, set[bool]] = {}
    for name, m in quantize_model(model).named_modules():
        if isinstance(m, nn.Linear):
            kinds.setdefault(name.rpartition(".")[2], set()).add(isinstance(m, Linear4bit))
    assert {name for name in read | called if kinds[name] == {True}} == called
