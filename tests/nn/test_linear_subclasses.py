"""Which subclasses of ``nn.Linear`` become 4-bit, and that dequantizing restores the original class."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.utils.prune
from torch import Tensor, nn
from torch.nn import functional

from qlora_ext.nn import Linear4bit, conversion_of, quantize_model


class Spelled(nn.Linear):
    """Equivalent to nn.Linear, with a setting that its forward does not use."""

    kind = "projection"

    def __init__(self, n_in: int, n_out: int, bias: bool = True) -> None:
        super().__init__(n_in, n_out, bias)
        self.std = 0.02

    def forward(self, input: Tensor) -> Tensor:
        y = input @ self.weight.T
        return y if self.bias is None else y + self.bias


class Renamed(nn.Linear):
    def __init__(self, n_in: int, n_out: int, init: str = "default") -> None:
        super().__init__(n_in, n_out)
        self.init = init

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)
        nn.init.normal_(self.bias)


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Adjustable(nn.Linear):
    """Equivalent to nn.Linear until its scale is changed."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out)
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias) * self.scale


class Gated(nn.Linear):
    """Equivalent to nn.Linear only in evaluation mode."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y.relu() if self.training else y


class WithoutGradient(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return super().forward(x)


class Helpful(nn.Linear):
    def rows(self) -> Tensor:
        return self.weight


class Clamped(nn.Linear):
    """Equivalent to nn.Linear except for large x."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.clamp(-50, 50))


class ManyRows(nn.Linear):
    """Equivalent to nn.Linear for few rows."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return 2 * y if x.shape[0] > 1000 else y


class Counting(nn.Linear):
    """Equivalent to nn.Linear for few rows, without a branch."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias) * (1 + (len(x) > 1000))


class Heir(ManyRows):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Casting(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != self.weight.dtype:
            x = x.to(self.weight.dtype)
        return functional.linear(x, self.weight, self.bias)


class Quantile(nn.Linear):
    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out)
        self.register_buffer("steps", torch.zeros(1))


class Pair(nn.Linear):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x + y)


@pytest.mark.parametrize("cls", [Spelled, Renamed, Casting])
@pytest.mark.parametrize("context", ["cpu", "meta"])
def test_a_linear_subclass_has_a_4bit_layer(cls: type[nn.Linear], context: str) -> None:
    with torch.device(context):
        layer = cls(64, 32)
        assert conversion_of(layer) is Linear4bit


@pytest.mark.parametrize(
    "cls",
    [Scaled, Adjustable, Gated, Clamped, ManyRows, Counting, Heir, WithoutGradient, Helpful, Quantile, Pair],
)
def test_a_subclass_that_may_compute_something_else_stays_dense(cls: type[nn.Linear]) -> None:
    assert conversion_of(cls(64, 32)) is None


def test_a_subclass_without_source_may_not_branch() -> None:
    made: dict[str, Any] = {"nn": nn, "linear": functional.linear}
    exec(
        "class Plain(nn.Linear):\n"
        "    def forward(self, x): return linear(x, self.weight, self.bias)\n"
        "class Branching(nn.Linear):\n"
        "    def forward(self, x): return linear(x if len(x) < 1000 else 2 * x, self.weight, self.bias)\n",
        made,
    )
    assert conversion_of(made["Plain"](8, 8)) is Linear4bit
    assert conversion_of(made["Branching"](8, 8)) is None


def test_layers_of_torch_that_are_not_plain_stay_dense() -> None:
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
    patched = Spelled(8, 8)
    patched.forward = lambda x: x  # type: ignore[method-assign]
    for layer in (normed, patched, nn.LazyLinear(8), nn.Bilinear(4, 4, 4), nn.Conv1d(4, 4, 1)):
        assert conversion_of(layer) is None


@pytest.mark.parametrize(
    "computed",
    [
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.orthogonal,
        lambda layer: nn.utils.prune.l1_unstructured(layer, "weight", 0.5),
    ],
    ids=["weight_norm", "spectral_norm", "parametrized weight_norm", "orthogonal", "prune"],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
def test_a_layer_whose_weight_is_computed_stays_dense(computed: Callable[[nn.Linear], nn.Module]) -> None:
    layer = computed(nn.Linear(64, 64))
    with pytest.warns(UserWarning, match=r"dense are 0 \(its weight is computed from other parameters\)"):
        model = quantize_model(nn.Sequential(layer, nn.Linear(64, 64)))
    assert model[0] is layer
    assert isinstance(model[1], Linear4bit)


@pytest.mark.parametrize("alone", [False, True])
def test_hooks_move_to_the_4bit_layer(alone: bool) -> None:
    layer, calls = nn.Linear(64, 64), []
    handles = [
        layer.register_forward_pre_hook(lambda _, args: calls.append("before")),
        layer.register_forward_hook(lambda _, args, kwargs, y: calls.append("after"), with_kwargs=True),
        layer.register_full_backward_hook(lambda *_: calls.append("backward")),
    ]
    model = quantize_model(layer if alone else nn.Sequential(layer))
    x = torch.randn(3, 64, requires_grad=True)
    model(x).sum().backward()
    assert calls == ["before", "after", "backward"]
    for handle in handles:
        handle.remove()
    model(x)
    assert len(calls) == 3


def test_the_analysis_draws_no_random_numbers() -> None:
    class Fresh(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(x, self.weight, self.bias)

    layer, state = Fresh(8, 8), torch.get_rng_state()
    assert conversion_of(layer) is Linear4bit
    assert torch.equal(torch.get_rng_state(), state)


def test_dequantize_restores_the_original_class() -> None:
    layer = quantize_model(nn.Sequential(Spelled(64, 32), Renamed(64, 32, init="final")))
    x = torch.randn(3, 64)
    for four_bit, cls in zip(layer, (Spelled, Renamed), strict=True):
        assert isinstance(four_bit, Linear4bit)
        dense = four_bit.to_linear()
        assert type(dense) is cls
        torch.testing.assert_close(dense(x), four_bit(x), rtol=1e-4, atol=1e-4)
    assert layer[1].to_linear().init == "final"


def test_the_output_projection_of_torchs_attention_stays_dense() -> None:
    """Its class is equivalent to nn.Linear, but nn.MultiheadAttention reads its weight."""
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(64, 4), "after": nn.Linear(64, 64)})
    x = torch.randn(5, 1, 64)
    expected = model["attention"](x, x, x)[0]
    quantize_model(model)
    assert isinstance(model["after"], Linear4bit)
    assert torch.equal(model["attention"](x, x, x)[0], expected)


def test_falcon_is_4bit_and_bitsandbytes_has_no_place_for_its_class(tmp_path: pathlib.Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from qlora_ext.integrations.bitsandbytes import save_pretrained

    config = transformers.FalconConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=128)
    model = quantize_model(transformers.FalconForCausalLM(config))
    assert sum(isinstance(m, Linear4bit) for m in model.modules()) == 8
    with pytest.raises(ValueError, match=r"query_key_value: expected .*, got a FalconLinear"):
        save_pretrained(model, tmp_path)


@pytest.mark.parametrize("gradients", [False, True])
def test_torchs_encoder_calls_its_4bit_layers_in_evaluation(gradients: bool) -> None:
    """If no gradient is needed, its fast path would read the weights of dense layers."""
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
    model = quantize_model(nn.TransformerEncoder(layer, 2)).requires_grad_(False)
    assert sum(isinstance(m, Linear4bit) for m in model.modules()) == 4
    x, padding = torch.randn(2, 5, 64), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    for mask in (None, padding):
        with torch.set_grad_enabled(gradients):
            trained, evaluated = (model.train(mode)(x, src_key_padding_mask=mask) for mode in (True, False))
        torch.testing.assert_close(evaluated, trained)
