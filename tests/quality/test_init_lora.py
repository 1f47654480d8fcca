"""Adapters initialized with the quantization error, with and without weighting by the layers' inputs."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from torch import nn

import qlora_ext
from qlora_ext import Form
from qlora_ext._internal.svd import low_rank_approximation
from qlora_ext.calibration import Calibration, InitLora, initial_lora_of
from test_calibration import Chain, correlated


def test_the_low_rank_approximation_equals_that_of_a_full_decomposition() -> None:
    for matrix in (torch.randn(96, 64), torch.randn(40, 200), correlated(64)):
        a, b = low_rank_approximation(matrix, 8)
        assert (a.shape, b.shape) == ((8, matrix.shape[1]), (matrix.shape[0], 8))
        singular = torch.linalg.svdvals(matrix)
        best = singular[8:].square().sum().sqrt().item()
        assert (matrix - b @ a).norm().item() <= 1.01 * best
    a, b = low_rank_approximation(torch.randn(4, 64), 8)  # a rank that exceeds the matrix's
    assert (a[4:] == 0).all()
    assert (b[:, 4:] == 0).all()


def test_finding_it_draws_no_random_number() -> None:
    matrix, state = torch.randn(64, 64), torch.get_rng_state()
    assert all(
        torch.equal(x, y)
        for x, y in zip(low_rank_approximation(matrix, 4), low_rank_approximation(matrix, 4), strict=True)
    )
    assert torch.equal(torch.get_rng_state(), state)


def lost(model: nn.Module, dense: nn.Module, x: torch.Tensor, name: str, with_lora: bool) -> float:
    """The error of one layer's outputs on inputs x."""
    layer, exact = model.get_submodule(name), dense.get_submodule(name)
    w = layer.dequantize(torch.float32)
    if with_lora:
        a, b = initial_lora_of(model)[name]
        w = w + b @ a
    return ((w - exact.weight.detach()) @ x.T).norm().item()


@pytest.mark.parametrize("method", ["feedback", "scales"])
def test_weighed_by_the_inputs_the_outputs_come_nearest(method: str) -> None:
    dense, x = Chain(), correlated(512)
    calibration = Calibration([x], method=method)
    models = {
        how: qlora_ext.quantize_model(
            copy.deepcopy(dense), skip=(), calibration=calibration, init_lora=InitLora(how, rank=8)
        )
        for how in ("svd", "loftq")
    }
    assert set(initial_lora_of(models["svd"])) == {n for n, m in dense.named_modules() if type(m) is nn.Linear}
    before, svd, loftq = (
        lost(models[how], dense, x, "embed", with_lora)
        for how, with_lora in (("svd", False), ("svd", True), ("loftq", True))
    )
    assert svd < 0.8 * before
    assert svd < loftq


@pytest.mark.parametrize("name", ["q5_k", "q8_0"])
def test_loftq_over_more_than_4_bits(name: str) -> None:
    dense = nn.Sequential(nn.Linear(128, 64))
    settings = InitLora("loftq", rank=8, iterations=3)
    model = qlora_ext.quantize_model(copy.deepcopy(dense), init_lora=settings, **Form.named(name).keywords)
    (a, b), w = initial_lora_of(model)["0"], dense[0].weight
    plain = qlora_ext.quantize(w, name).dequantize() - w
    assert (model[0].dequantize() + b @ a - w).norm() < 0.9 * plain.norm()


def test_loftq_fits_weights_and_adapters_in_turns() -> None:
    dense = Chain()

    def error(iterations: int) -> float:
        model = qlora_ext.quantize_model(
            copy.deepcopy(dense), skip=(), init_lora=InitLora("loftq", rank=8, iterations=iterations)
        )
        return lost(model, dense, torch.eye(64), "embed", True)

    plain = qlora_ext.quantize_model(copy.deepcopy(dense), skip=())
    alone = lost(plain, dense, torch.eye(64), "embed", False)
    assert error(5) < error(1) < alone


def test_a_stopped_calibration_keeps_the_adapters(tmp_path: Any) -> None:
    dense, x = Chain(), correlated(256)
    complete = qlora_ext.quantize_model(copy.deepcopy(dense), calibration=[x], init_lora="svd")

    def stop(done: int, of: int, name: str) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        qlora_ext.quantize_model(
            copy.deepcopy(dense), calibration=Calibration([x], directory=tmp_path, progress=stop), init_lora="svd"
        )
    again = Calibration([x], directory=tmp_path)
    resumed = qlora_ext.quantize_model(copy.deepcopy(dense), calibration=again, init_lora="svd")
    assert initial_lora_of(resumed).keys() == initial_lora_of(complete).keys()
    for name, pair in initial_lora_of(complete).items():
        assert all(torch.equal(a, b) for a, b in zip(pair, initial_lora_of(resumed)[name], strict=True))
    with pytest.raises(ValueError, match="directory: expected an empty directory"):
        qlora_ext.quantize_model(copy.deepcopy(dense), calibration=again)


def test_invalid_arguments_are_rejected() -> None:
    with pytest.raises(ValueError, match=r"init_lora: expected calibration=... with 'svd'"):
        qlora_ext.quantize_model(Chain(), init_lora="svd")
    with pytest.raises(ValueError, match=r"init_lora: expected 'svd' or 'loftq', got 'pissa'"):
        qlora_ext.quantize_model(Chain(), init_lora="pissa")
    with pytest.raises(ValueError, match=r"init_lora: expected a model that contains layers, got a single Linear"):
        qlora_ext.quantize_model(nn.Linear(64, 64), init_lora="loftq")
    with pytest.raises(ValueError, match=r"iterations: expected 1 with a calibration"):
        qlora_ext.quantize_model(Chain(), calibration=[correlated(64)], init_lora=InitLora("loftq", iterations=2))
    for wrong in ({"rank": 0}, {"iterations": 0}, {"iterations": 2}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            InitLora("svd", **wrong)


def tiny() -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize("rank", [4, 8])
def test_peft_begins_with_them_and_saves_them_for_peft_alone(rank: int, tmp_path: Any) -> None:
    ids = torch.randint(64, (4, 32))
    dense = tiny()
    with torch.no_grad():
        exact = dense(ids).logits
    model = qlora_ext.quantize_model(dense, calibration=ids, init_lora=InitLora("svd", rank=8))
    with torch.no_grad():
        plain = (model(ids).logits - exact).norm()
    config = peft.LoraConfig(r=rank, lora_alpha=3 * rank, target_modules="all-linear", lora_dropout=0.0)
    adapted = peft.get_peft_model(model, config)
    qlora_ext.integrations.peft.initialize_lora(adapted)
    with torch.no_grad():
        expected = adapted(ids).logits
    assert (expected - exact).norm() < 0.9 * plain
    adapted.save_pretrained(tmp_path)
    decoded = tiny()
    state = adapted.unload().dequantize().state_dict()
    decoded.load_state_dict(state)
    with torch.no_grad():
        by_peft = peft.PeftModel.from_pretrained(decoded, tmp_path)(ids).logits
    torch.testing.assert_close(by_peft, expected, atol=2e-5, rtol=1e-4)


def test_adapters_that_it_has_no_values_for() -> None:
    initialize_lora = qlora_ext.integrations.peft.initialize_lora
    config = peft.LoraConfig(r=16, target_modules="all-linear")
    with pytest.raises(ValueError, match=r"peft_model: expected a base from quantize_model\(init_lora=...\)"):
        initialize_lora(peft.get_peft_model(qlora_ext.quantize_model(tiny()), config))
    model = qlora_ext.quantize_model(tiny(), init_lora=InitLora("loftq", rank=8))
    with pytest.raises(
        ValueError, match=r"expected an adapter of rank 8 or less, the rank of the initial values, got 16"
    ):
        initialize_lora(peft.get_peft_model(model, config))
