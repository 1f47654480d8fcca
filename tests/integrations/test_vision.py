"""Vision-language models: the language model is in 4 bits, towers and projectors stay dense unless requested."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from qlora_ext import QLoRAConfig
from qlora_ext.nn import Linear4bit, quantize_model
from tiny_models import logits
from tiny_vision import CONFIGS, IMAGE, build, inputs

every_family = pytest.mark.parametrize("family", CONFIGS)


def seen(model: Any, family: str, brightness: float = 1.0) -> Tensor:
    given = inputs(family)
    return logits(model, given.pop("input_ids"), **{**given, "pixel_values": brightness * given["pixel_values"]})


def linear(model: Any, kind: type[nn.Module]) -> set[str]:
    return {name for name, m in model.named_modules() if type(m) is kind}


@every_family
def test_the_language_model_alone_is_4bit(family: str) -> None:
    model = quantize_model(build(family))
    assert len(linear(model, Linear4bit)) == 14
    assert all(".language_model." in name for name in linear(model, Linear4bit))
    twin = build(family)
    twin.load_state_dict(quantize_model(build(family)).dequantize().state_dict())
    torch.testing.assert_close(seen(model, family), seen(twin, family), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(
        seen(model, family), seen(model, family, 3.0), atol=1e-3
    )  # the output depends on the image


@every_family
@pytest.mark.parametrize("towers", [False, True])
def test_lora_learns_from_an_image(family: str, towers: bool) -> None:
    config = peft.LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.05)
    model = peft.get_peft_model(quantize_model(build(family), towers=towers), config).train()
    given = inputs(family)
    labels = given["input_ids"].masked_fill(given["input_ids"] == IMAGE, -100)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model(**given, labels=labels).loss
        loss.backward()
        if not losses:
            first = {name: p.grad for name, p in model.named_parameters() if "lora_B" in name}
            assert any("language_model" in name and g.abs().sum() > 0 for name, g in first.items())
            assert any("language_model" not in name and g.abs().sum() > 0 for name, g in first.items() if g is not None)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3


def test_names_to_skip_say_nothing_of_towers() -> None:
    for skip in ((), ("lm_head",)):
        model = quantize_model(build("llava"), skip=skip)
        assert all(".language_model." in name or name == "lm_head" for name in linear(model, Linear4bit))
        assert ("lm_head" in linear(model, Linear4bit)) == (skip == ())
    with pytest.raises(ValueError, match="towers: expected True or False, got 'yes'"):
        QLoRAConfig(towers="yes")  # type: ignore[arg-type]
