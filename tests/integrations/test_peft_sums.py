"""Several PEFT adapters at once that are summed, and adapters that change between calls."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch import Tensor, nn

from adapted_models import BASE, adapted, alone, base, counting_fused_calls
from qlora_ext.integrations import peft as integration
from test_peft_mixed import IDS, OTHERS, adapted_layers, of_samples, one_layer, several
from tiny_models import logits


def test_adapters_change_between_calls(tmp_path: Path) -> None:
    """Hot-swapped, combined, deleted and added again: mixed batches follow."""
    model = several()
    model.save_pretrained(tmp_path, selected_adapters=["wide"])
    names = ["few", "few", BASE, "default", "wide"]
    before = of_samples(model, names)
    model.add_weighted_adapter(["few", "wide"], [0.5, -1.0], "both", combination_type="cat")
    mixed = of_samples(model, ["both", *names[1:]])
    assert torch.equal(mixed[1:], before[1:])
    with alone(model, "both"):
        assert torch.equal(mixed[0], of_samples(model)[0])
    model.delete_adapter("one")
    with pytest.raises(ValueError, match="non-existing"):
        of_samples(model, ["one", *names[1:]])
    model.load_adapter(tmp_path / "wide", "one")
    assert torch.equal(of_samples(model, ["one" if name == "wide" else name for name in names]), before)
    model.delete_adapter("few")
    model.add_adapter("few", LoraConfig(r=5, init_lora_weights=True, target_modules=["q_proj"]))  # the identity
    assert torch.equal(of_samples(model, names)[:2], of_samples(model, [BASE] * 5)[:2])


@pytest.mark.parametrize("prepared", [False, True])
def test_hot_swapped_adapters(prepared: bool, tmp_path: Path) -> None:
    """Also with scalings as tensors and padded ranks, as ``prepare_model_for_compiled_hotswap`` makes them."""
    config = LoraConfig(r=6, lora_alpha=3, init_lora_weights=False, target_modules="all-linear")
    other = get_peft_model(base(), config)
    other.save_pretrained(tmp_path)
    model = adapted()
    model.add_adapter("wide", LoraConfig(**OTHERS["wide"], init_lora_weights=False))
    if prepared:
        prepare_model_for_compiled_hotswap(model, target_rank=20)
    names = ["wide", "default", BASE, "default", "wide"]
    before = of_samples(model, names)
    hotswap_adapter(model, tmp_path, adapter_name="default")
    after = of_samples(model, names)
    assert torch.equal(after[[0, 2, 4]], before[[0, 2, 4]])
    torch.testing.assert_close(after[[1, 3]], of_samples(other.eval())[[1, 3]], rtol=1e-4, atol=1e-4)
    with alone(model, "default"):
        assert torch.equal(after[[1, 3]], of_samples(model)[[1, 3]])


def test_a_hot_swapped_merge_aware_adapter_is_merged_again(tmp_path: Path) -> None:
    get_peft_model(base(), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")).save_pretrained(tmp_path)
    model = adapted()
    integration.set_merge_aware(model)
    assert not torch.equal(logits(model), logits(base()))
    hotswap_adapter(model, tmp_path, adapter_name="default")  # B is 0, so that the merged weights are the base's
    torch.testing.assert_close(logits(model), logits(base()))


def exact(layer: Any, x: Tensor, names: Sequence[str]) -> Tensor:
    """The layer with the sum of adapters, in float64."""
    w = layer.base_layer.dequantize(torch.float32).double()
    for name in names:
        w = w + layer.lora_B[name].weight.double() @ layer.lora_A[name].weight.double() * float(layer.scaling[name])
    y: Tensor = x.double() @ w.T
    return y + layer.base_layer.bias.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("names", [["default", "wide", "few", "one"], ["one", "default"]], ids="+".join)
def test_sums_are_one_operator(names: list[str], dtype: torch.dtype) -> None:
    layer = one_layer(dtype)
    layer.set_adapter(names)
    x = torch.randn(2, 5, 64, dtype=dtype)
    with torch.no_grad(), counting_fused_calls() as calls:
        y = layer(x)
        assert calls == ["fused"]
        error = (y - exact(layer, x, names)).norm() / y.norm()
        layer.base_layer.register_forward_hook(lambda *_: None)
        theirs = (layer(x) - exact(layer, x, names)).norm() / y.norm()
    assert calls == ["fused", "plain"]
    assert error <= {torch.float32: 3e-7, torch.float64: 1e-6}.get(dtype, 1.5 * theirs.item())


def test_models_sum_adapters_and_train_them() -> None:
    model = several()
    model.base_model.set_adapter(["few", "default", "wide"])

    def step() -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        out = model(input_ids=IDS, labels=IDS)
        out.loss.backward()
        return out.logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    with counting_fused_calls() as calls:
        fused, gradients = step()
    assert calls == ["fused"] * len(adapted_layers(model))
    for layer in adapted_layers(model).values():
        layer.base_layer.register_forward_hook(lambda *_: None)
    theirs, expected = step()
    torch.testing.assert_close(fused, theirs, rtol=1e-4, atol=1e-4)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5)
    assert not any(".one." in name for name in gradients)


def test_sums_with_dropout_draw_a_mask_per_adapter() -> None:
    layer = one_layer()
    layer.set_adapter(["default", "wide"])
    layer.lora_dropout["wide"] = nn.Dropout(0.5)
    x = torch.randn(5, 64)
    with counting_fused_calls() as calls:
        layer.eval()(x)
        torch.manual_seed(1)
        y = layer.train()(x)
    assert calls == ["fused", "plain"]
    torch.manual_seed(1)
    dropped = layer.lora_dropout["wide"](x)
    layer.eval()
    parts = {"default": x, "wide": dropped}
    expected = layer.base_layer(x)
    for name, part in parts.items():
        expected = expected + layer.lora_B[name](layer.lora_A[name](part)) * layer.scaling[name]
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_cast_adapters_give_the_same_bits() -> None:
    model = several(torch.bfloat16)
    names = ["wide", "few", BASE, "default", "one"]
    expected = of_samples(model, names)
    model.base_model.set_adapter(["few", "wide"])
    total = of_samples(model)
    model.set_adapter("default")
    integration.cast_fused(model)
    assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {torch.bfloat16}
    assert torch.equal(of_samples(model, names), expected)
    model.base_model.set_adapter(["few", "wide"])
    # Where scalings differ, B is rounded before and after it is multiplied.
    torch.testing.assert_close(of_samples(model), total, rtol=0.05, atol=0.05)
