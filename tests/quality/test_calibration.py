"""Calibrated NF4 has the same size, a smaller error of the outputs, and is plain NF4 if no inputs are known."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import qlora_ext
from qlora_ext.calibration import Calibration, Feedback, calibration_of, encode
from qlora_ext.form import PRESETS, Form
from qlora_ext.nn import Linear4bit


class Block(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(size, 2 * size), nn.Linear(2 * size, size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Chain(nn.Module):
    """Blocks in a list, like transformers' models."""

    def __init__(self, size: int = 64, blocks: int = 3) -> None:
        super().__init__()
        self.embed = nn.Linear(size, size)
        self.layers = nn.ModuleList(Block(size) for _ in range(blocks))
        self.head = nn.Linear(size, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in self.layers:
            x = block(x)
        return self.head(x)


def correlated(rows: int, size: int = 64) -> torch.Tensor:
    return torch.randn(rows, 12) @ torch.randn(12, size) + 0.1 * torch.randn(rows, size)


def output_error(model: nn.Module, dense: nn.Module, x: torch.Tensor) -> float:
    with torch.no_grad():
        expected = dense(x)
        return ((model(x) - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("double_quant", [True, False])
def test_outputs_come_nearer_on_inputs_that_it_did_not_see(double_quant: bool) -> None:
    dense, (x, others) = Chain(), correlated(1024).split(512)
    plain = qlora_ext.quantize_model(copy.deepcopy(dense), skip=(), double_quant=double_quant)
    errors = [output_error(plain, dense, others)]
    for method in ("scales", "feedback"):
        calibration = Calibration([x[:256], x[256:]], method=method)
        model = qlora_ext.quantize_model(
            copy.deepcopy(dense), skip=(), double_quant=double_quant, calibration=calibration
        )
        assert {r.method for r in calibration_of(model)} <= {method, "scales"}
        errors.append(output_error(model, dense, others))
    assert errors[2] < 0.75 * errors[0], errors
    assert errors[1] < errors[0], errors


def test_the_form_and_the_bytes_are_those_of_plain_nf4() -> None:
    dense = Chain()
    plain = qlora_ext.quantize_model(copy.deepcopy(dense))
    model = qlora_ext.quantize_model(copy.deepcopy(dense), calibration=[correlated(64)])
    before, after = plain.state_dict(), model.state_dict()
    assert list(before) == list(after)
    assert all((a.dtype, a.shape) == (b.dtype, b.shape) for a, b in zip(before.values(), after.values(), strict=True))
    layer = model.get_submodule("layers.0.up")
    again = qlora_ext.NF4Weight.from_bitsandbytes(layer.weight4bit.to_bitsandbytes("w"), "w")
    assert torch.equal(again.dequantize(torch.float32), layer.dequantize(torch.float32))


def test_every_layer_is_reported() -> None:
    seen: list[tuple[int, int, str]] = []
    calibration = Calibration([correlated(300)], progress=lambda *arguments: seen.append(arguments))
    model = qlora_ext.quantize_model(Chain(), skip=(), calibration=calibration)
    report = calibration_of(model)
    names = [name for name, m in model.named_modules() if isinstance(m, Linear4bit)]
    assert sorted(r.name for r in report) == sorted(names)
    assert seen == [(i + 1, len(names), r.name) for i, r in enumerate(report)]
    assert all(r.tokens == 300 and 0 < r.error <= r.absmax_error for r in report)


@pytest.mark.parametrize("after", [1, 3, 5, 7])
def test_a_stopped_calibration_is_resumed(after: int, tmp_path: Any) -> None:
    dense, x = Chain(), correlated(256)
    complete = qlora_ext.quantize_model(copy.deepcopy(dense), calibration=[x])

    def stop(done: int, of: int, name: str) -> None:
        if done == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        qlora_ext.quantize_model(copy.deepcopy(dense), calibration=Calibration([x], directory=tmp_path, progress=stop))
    assert len(list(tmp_path.glob("*.safetensors"))) == after
    resumed = qlora_ext.quantize_model(copy.deepcopy(dense), calibration=Calibration([x], directory=tmp_path))
    assert all(
        torch.equal(a, b) for a, b in zip(complete.state_dict().values(), resumed.state_dict().values(), strict=True)
    )
    for other, inputs in ((Chain(), x), (copy.deepcopy(dense), x + 1)):
        calibration = Calibration(iter([inputs]), directory=tmp_path)
        with pytest.raises(ValueError, match=r"directory: expected an empty directory, or one with this calibration"):
            qlora_ext.quantize_model(other, calibration=calibration)


def test_dead_inputs_and_layers_without_tokens() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(64, 16), nn.Linear(64, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    x = correlated(100)
    x[:, 3] = x[:, 40:] = 0
    dense = Odd()
    model = qlora_ext.quantize_model(copy.deepcopy(dense), calibration=[x])
    used, unused = calibration_of(model)
    assert used.method == "feedback"
    assert (unused.method, unused.note) == ("absmax", "no token reached it")
    w = model.used.dequantize(torch.float32)
    assert w.isfinite().all()
    assert (w - dense.used.weight)[:, 40:].abs().max() < 0.2 * dense.used.weight.abs().max()


def test_inputs_that_say_nothing_leave_plain_nf4() -> None:
    dense = nn.Sequential(nn.Linear(64, 32))
    plain = qlora_ext.quantize_model(copy.deepcopy(dense))
    for x in (torch.zeros(5, 64), torch.full((5, 64), math.inf)):
        model = qlora_ext.quantize_model(copy.deepcopy(dense), calibration=[x])
        (report,) = calibration_of(model)
        assert report.method == "absmax"
        assert "moments: expected finite" in report.note
        assert torch.equal(model[0].weight, plain[0].weight)


@pytest.mark.parametrize("value", [-0.5, math.nan, math.inf])
def test_importances_that_a_search_cannot_use_are_refused(value: float) -> None:
    importance = torch.ones(64)
    importance[7] = value
    with pytest.raises(ValueError, match=f"importance: expected finite values of 0 or more, got {value:g} in column 7"):
        Feedback(importance, torch.arange(64), None)


def test_one_token_is_enough_to_factorize() -> None:
    x = torch.randn(1, 64)
    feedback = Feedback.of(x.T @ x)
    assert feedback.factor is not None
    h = (x.T @ x)[feedback.order][:, feedback.order] / (x * x).mean() + 0.01 * torch.eye(64)
    assert torch.allclose(feedback.factor.T @ feedback.factor @ h, torch.eye(64), atol=1e-3)


def tiny(**kwargs: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=97, bos_token_id=1, eos_token_id=2, pad_token_id=0, **kwargs,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def test_a_model_writes_its_own_text() -> None:
    settings = {"tokens": 64, "length": 16}
    dense = [tiny() for _ in range(3)]
    random_state = torch.get_rng_state()
    models = [
        qlora_ext.quantize_model(model, calibration=Calibration(seed=seed, **settings))
        for model, seed in zip(dense, (1, 1, 2), strict=True)
    ]
    assert torch.equal(torch.get_rng_state(), random_state)
    states = [m.state_dict() for m in models]
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(states[0].values(), states[2].values(), strict=True))
    assert all(r.tokens == 64 for r in calibration_of(models[0]))


def test_blocks_are_calibrated_on_outputs_of_quantized_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora_ext.calibration import stages

    advanced: list[int] = []
    advance = stages.Stack.advance
    monkeypatch.setattr(stages.Stack, "advance", lambda self: (advanced.append(self.at), advance(self))[1])
    ids = torch.randint(0, 97, (4, 16))
    model = qlora_ext.quantize_model(tiny(), calibration=ids)
    assert advanced == [0, 1]
    with torch.no_grad():
        assert model(ids).logits.isfinite().all()
    assert model.config.use_cache


def test_q_k_and_v_share_their_moments() -> None:
    from qlora_ext.calibration.moments import Gathering

    model, ids = tiny(), torch.randint(0, 97, (2, 8))
    attention = model.model.layers[0].self_attn
    gathering = Gathering({name: getattr(attention, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}, [None])
    with torch.no_grad():
        model(ids)
        gathering.next_batch()
        model(ids)
    gathering.stop()
    found = {name: moments for (name, _), moments in gathering.found.items()}
    assert found["q_proj"] is found["k_proj"] is found["v_proj"]
    assert found["o_proj"] is not found["q_proj"]
    assert found["q_proj"].tokens == found["o_proj"].tokens == 32


def test_experts_are_calibrated_one_by_one() -> None:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=97, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    dense = transformers.MixtralForCausalLM(config).eval()
    ids, others = torch.randint(0, 97, (16, 16)), torch.randint(0, 97, (16, 16))
    plain = qlora_ext.quantize_model(copy.deepcopy(dense))
    model = qlora_ext.quantize_model(copy.deepcopy(dense), calibration=ids)
    report = {r.name: r for r in calibration_of(model)}
    gate_up = report["model.layers.1.mlp.experts.gate_up_proj"]
    assert gate_up.method == "feedback"
    assert gate_up.tokens == 2 * ids.numel()
    assert gate_up.error < gate_up.absmax_error
    with torch.no_grad():
        errors = [((m(others).logits - dense(others).logits).norm()).item() for m in (plain, model)]
    assert errors[1] < errors[0]


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ("other", ValueError, "inputs: expected 'self'"),
        ([], ValueError, "inputs: expected at least one batch"),
        (3, TypeError, "inputs: expected 'self'"),
        (torch.zeros(3, dtype=torch.int64), ValueError, "inputs: expected token ids"),
        ("self", TypeError, "cannot generate text"),
    ],
)
def test_invalid_calibrations_are_rejected(given: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        qlora_ext.quantize_model(nn.Sequential(nn.Linear(64, 8)), calibration=given)


@pytest.mark.parametrize(
    ("field", "value"),
    [("method", "gptq"), ("damping", 0.0), ("tokens", 0), ("length", 4), ("length", 99999), ("batch_size", 1.5)],
)
def test_settings_are_checked(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{field}: expected"):
        Calibration(**{field: value})


def test_padding_does_not_count() -> None:
    from tiny_models import make, token_ids

    ids = token_ids(4, 24)
    padded = torch.nn.functional.pad(ids, (0, 8), value=7)
    mask = torch.nn.functional.pad(torch.ones_like(ids), (0, 8))
    found = []
    for inputs in ({"input_ids": ids}, {"input_ids": padded, "attention_mask": mask}, {"input_ids": padded}):
        model = qlora_ext.quantize_model(make("llama", torch.float32), calibration=[inputs])
        found.append((calibration_of(model)[3], model.get_submodule("model.layers.0.self_attn.o_proj").weight))
    (plain, weight), (masked, same), (unmasked, _) = found
    assert plain.tokens == masked.tokens == ids.numel() != unmasked.tokens
    assert plain.error == pytest.approx(masked.error, rel=1e-3)
    assert (weight != same).float().mean() < 0.02


FORMS = {
    **{name: form for name, form in PRESETS.items() if form.bits == 4},
    "awq": Form("uint4", "float16", 128, offsets="zero_point8"),
    "iq4_nl float32": Form("iq4_nl", "float32"),
    "nf4 bfloat16": Form("nf4", "bfloat16"),
}
EVERY = pytest.mark.parametrize("name", FORMS)


def test_more_than_4_bits_are_not_calibrated() -> None:
    model = nn.Sequential(nn.Linear(128, 64))
    with pytest.raises(ValueError, match="^calibration: expected a form of 4 bits, got code=int8, "):
        qlora_ext.quantize_model(model, calibration=[torch.randn(256, 128)], **PRESETS["q8_0"].keywords)
    assert type(model[0]) is nn.Linear


def inputs(k: int = 128) -> torch.Tensor:
    return torch.randn(500, k) @ (torch.randn(k, k) * torch.logspace(-1, 1, k))


@EVERY
@pytest.mark.parametrize("factorize", [True, False])
def test_the_error_of_the_outputs_falls(name: str, factorize: bool) -> None:
    w, x = torch.randn(32, 128) * 0.05, inputs()
    moments = x.T @ x / len(x)
    plain = qlora_ext.quantize(w, FORMS[name])
    found = encode(w, moments, Feedback.of(moments, factorize=factorize), plain)
    assert found.weight.form == FORMS[name]
    assert {k: (t.shape, t.dtype) for k, t in found.weight.tensors.items()} == {
        k: (t.shape, t.dtype) for k, t in plain.tensors.items()
    }

    def error_of(w4: qlora_ext.Weight4bit) -> float:
        return ((x @ (w4.dequantize() - w).T).norm() / (x @ w.T).norm()).item()

    assert found.error == pytest.approx(error_of(found.weight), rel=1e-3)
    assert found.absmax_error == pytest.approx(error_of(plain), rel=1e-3)
    assert found.error <= found.absmax_error
    keeps_scales = FORMS[name].offsets is not None or FORMS[name].scales == "nested_table8"
    if factorize:
        assert found.error < 0.8 * found.absmax_error
        assert found.method == "feedback"
    elif not keeps_scales:
        assert found.error < 0.97 * found.absmax_error
        assert found.method == "scales"
    if keeps_scales:
        assert all(torch.equal(t, plain.tensors[k]) for k, t in found.weight.tensors.items() if k != "packed")
    if plain.scale_table is not None:
        assert torch.equal(found.weight.scale_table.nan_to_num(), plain.scale_table.nan_to_num())
        assert found.weight.decoded_scales().isfinite().all()
        assert (found.weight.decoded_scales() > 0).all() or name == "iq4_xs"


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_the_search_stays_inside_of_the_table(name: str) -> None:
    magnitudes = torch.tensor([2.0**-126, 2.0**-120, 1e-30, 1e-3, 1.0, 1e3, 1e30, 2.0**123])
    w = torch.randn(8, 128) * magnitudes[:, None]
    feedback = Feedback.of(torch.eye(128))
    weight = encode(w, torch.eye(128), feedback, qlora_ext.quantize(w, name)).weight
    assert weight.dequantize().isfinite().all()
    assert (weight.decoded_scales() >= 0).all()


@EVERY
def test_a_calibrated_model_of_that_form(name: str) -> None:
    model = nn.Sequential(nn.Linear(128, 64), nn.Linear(64, 32))
    model = qlora_ext.quantize_model(model, calibration=[torch.randn(256, 128)], **FORMS[name].keywords)
    assert [layer.form for layer in model] == [FORMS[name]] * 2
    assert all(report.error < report.absmax_error for report in calibration_of(model))
