"""``qlora_ext.adopt`` replaces bitsandbytes' layers in place: alone, in transformers models and under PEFT."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import _convert_weight_packed_for_cpu
from peft import LoraConfig, LoraModel, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import qlora_ext
from bitsandbytes_layers import bare
from qlora_ext.integrations.bitsandbytes import state_dict
from qlora_ext.integrations.peft import LoraLinear4bit
from qlora_ext.nn import Embedding4bit, Linear4bit
from tensors import error, same_bits
from tiny_models import FAMILIES, make, token_ids

IDS = token_ids()


def config(**options: Any) -> BitsAndBytesConfig:
    usual = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.float32}
    return BitsAndBytesConfig(load_in_4bit=True, **usual | options)


def load(path: Path, quantization_config: Any = None, **options: Any) -> Any:
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    return AutoModelForCausalLM.from_pretrained(path, **options)


def theirs(model: nn.Module) -> dict[str, Any]:
    return {name: m for name, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}


def exact(model: Any) -> Any:
    """Disables bitsandbytes' AVX-512 inference kernel, which ignores the compute dtype and computes in bfloat16."""
    model.eval()
    for layer in theirs(model).values():
        layer.train()
    return model


def decoded(layer: Any) -> Tensor:
    weight: Tensor = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return weight


@pytest.mark.parametrize("compress_statistics", [True, False])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
def test_a_layer_keeps_its_memory_and_its_bits(compress_statistics: bool, storage: torch.dtype) -> None:
    layer = bare(compress_statistics=compress_statistics, quant_storage=storage, compute_dtype=torch.float32)
    layer.bias.requires_grad_(False)
    state, bias, expected = layer.weight.quant_state, layer.bias, decoded(layer)
    memory = layer.weight.data_ptr(), state.absmax.data_ptr()
    x = torch.randn(3, 64, requires_grad=True)
    y = layer(x)
    (dx,) = torch.autograd.grad(y.sum(), x)

    adoption = qlora_ext.adopt(layer)
    assert (adoption.adopted, adoption.left) == (("",), {})
    assert str(adoption) == "layers adopted: 1; left to bitsandbytes: 0"
    assert isinstance(layer, Linear4bit)
    assert isinstance(layer, bnb.nn.Linear4bit)
    assert layer.bias is bias
    assert (layer.weight.data_ptr(), layer.absmax.data_ptr()) == memory
    if compress_statistics:
        assert layer.nested_absmax.data_ptr() == state.state2.absmax.data_ptr()
        assert layer.nested_offset.data_ptr() == state.offset.data_ptr()
    assert torch.equal(layer.dequantize(), expected)
    assert error(layer(x), y) < 1e-6
    assert error(torch.autograd.grad(layer(x).sum(), x)[0], dx) < 3e-3  # bitsandbytes decodes to bfloat16 here
    assert set(dict(layer.named_parameters())) == {"weight", "bias"}
    assert str(qlora_ext.adopt(layer)) == "layers adopted: 0; left to bitsandbytes: 0"


@pytest.mark.parametrize(("n", "k"), [(5, 7), (1, 3), (3, 128)])
def test_odd_shapes(n: int, k: int) -> None:
    layer = bare(n, k, compute_dtype=torch.float32)
    expected = decoded(layer).reshape(n, k)
    qlora_ext.adopt(layer)
    assert torch.equal(layer.dequantize(), expected)
    x = torch.randn(2, k)
    assert error(layer(x), nn.functional.linear(x, layer.dequantize(torch.float32), layer.bias)) < 1e-5


@pytest.mark.parametrize("compress_statistics", [True, False])
def test_a_weight_that_was_not_moved_yet_gets_the_bits_that_it_would_get(compress_statistics: bool) -> None:
    torch.manual_seed(0)
    fresh = bnb.nn.Linear4bit(128, 64, quant_type="nf4", compress_statistics=compress_statistics)
    moved = copy.deepcopy(fresh).to("cpu")
    assert qlora_ext.adopt(fresh).adopted == ("",)
    assert torch.equal(fresh.weight.packed.reshape(-1), moved.weight.data.reshape(-1))
    assert torch.equal(fresh.absmax, moved.weight.quant_state.absmax)
    # The mean of the scales is summed in a different order, so its last bit may differ.
    torch.testing.assert_close(fresh.dequantize(), decoded(moved), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("compress_statistics", [True, False])
def test_a_weight_that_was_repacked_for_the_cpu_is_packed_back(compress_statistics: bool, storage: torch.dtype) -> None:
    layer = bare(64, 128, compress_statistics=compress_statistics, quant_storage=storage, compute_dtype=torch.float32)
    codes, expected = layer.weight.data.view(torch.uint8).clone(), decoded(layer).float()
    # A forward in evaluation does this on a processor with AVX-512 BF16.
    layer.weight.data, layer.weight.quant_state = _convert_weight_packed_for_cpu(
        layer.weight.data, layer.weight.quant_state
    )
    assert qlora_ext.adopt(layer).adopted == ("",)
    assert torch.equal(layer.weight.packed.reshape(-1), codes.reshape(-1))
    assert layer.double_quant == compress_statistics
    assert error(layer.dequantize(torch.float32), expected) < 0.01  # its scales were rounded to bfloat16


def test_without_a_compute_dtype_it_is_that_of_the_first_input() -> None:
    layer = bare()
    qlora_ext.adopt(layer)
    assert layer(torch.randn(2, 64)).dtype == torch.float32
    assert layer.compute_dtype == torch.float32
    given = bare(compute_dtype=torch.float16)
    qlora_ext.adopt(given)
    given(torch.randn(2, 64))
    assert given.compute_dtype == torch.float16


@pytest.mark.parametrize("compress_statistics", [True, False])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_a_state_of_bitsandbytes_loads(compress_statistics: bool, storage: torch.dtype) -> None:
    options = {"compress_statistics": compress_statistics, "quant_storage": storage}
    source, other = bare(64, 128, **options), bare(64, 128, **options)
    other.weight = bnb.nn.Params4bit(torch.randn(64, 128), quant_type="nf4", **options).to("cpu")
    model, state = nn.Sequential(other), nn.Sequential(source).state_dict()
    qlora_ext.adopt(model)
    weight, memory = other.weight, other.weight.data_ptr()
    assert other.dequantize().dtype == torch.float32
    model.load_state_dict(state)
    assert torch.equal(other.dequantize(), decoded(source))  # in its dtype
    assert torch.equal(other.bias, source.bias)
    assert (other.weight is weight, other.weight.data_ptr()) == (True, memory)

    copied = copy.deepcopy(model)
    assert copied.load_state_dict(state, assign=True) == ([], [])
    for kept in (copied.state_dict(), model.state_dict()):  # qlora_ext's own format
        model.load_state_dict(kept)
        assert torch.equal(other.dequantize(), decoded(source))


@pytest.mark.parametrize(
    ("other", "dropped", "message"),
    [
        ({"quant_type": "fp4"}, None, "1.weight: expected NF4 codes, got FP4"),
        ({"compress_statistics": False}, None, "1.absmax: expected torch.uint8"),
        ({"n": 7, "k": 5}, None, r"1.weight: expected shape \[5, 7\], got \[7, 5\]"),
        ({}, "1.weight.absmax", "1.weight.absmax: missing from the bitsandbytes state"),
        ({}, "1.weight.quant_state.bitsandbytes__nf4", "1.weight: expected torch.uint8"),
    ],
)
def test_a_state_of_another_form_is_refused(other: dict[str, Any], dropped: str | None, message: str) -> None:
    model = nn.Sequential(nn.Identity(), bare(5, 7, bias=False))
    state = nn.Sequential(nn.Identity(), bare(**{"n": 5, "k": 7, "bias": False} | other)).state_dict()
    state.pop(dropped, None)
    qlora_ext.adopt(model)
    before = model[1].dequantize()
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=message):
            model.load_state_dict(state, strict=strict)
        assert torch.equal(model[1].dequantize(), before)


@pytest.mark.parametrize("compress_statistics", [True, False])
def test_a_layer_has_a_quant_state_over_its_memory(compress_statistics: bool) -> None:
    layer = bare(compress_statistics=compress_statistics)
    expected = layer.weight.quant_state
    qlora_ext.adopt(layer)
    for one in (layer, copy.deepcopy(layer)):
        found = one.quant_state
        assert found == expected
        assert found.absmax.data_ptr() == one.absmax.data_ptr()
        if compress_statistics:
            assert found.state2.absmax.data_ptr() == one.nested_absmax.data_ptr()
            assert found.offset.data_ptr() == one.nested_offset.data_ptr()
        assert torch.equal(bnb.functional.dequantize_4bit(one.weight.packed.reshape(-1, 1), found), layer.dequantize())
    assert layer.to("meta").quant_state is None


@pytest.mark.parametrize("compress_statistics", [True, False])
@pytest.mark.parametrize("storage", [torch.uint8, torch.float32])
def test_a_state_is_written_as_bitsandbytes_would(compress_statistics: bool, storage: torch.dtype) -> None:
    options = {"compress_statistics": compress_statistics, "quant_storage": storage}
    shared = bare(5, 128, bias=False, **options)
    model = nn.Sequential(bare(64, 96, **options), nn.Linear(4, 4), shared, shared)
    expected = [copy.deepcopy(module).state_dict() for module in (model, model[0])]
    qlora_ext.adopt(model)
    for module, theirs_state in zip((model, model[0]), expected, strict=True):
        found = state_dict(module, storage)
        assert same_bits(found, theirs_state)


def test_a_state_that_bitsandbytes_has_not_is_refused() -> None:
    with pytest.raises(TypeError, match="model: expected an nn.Module, got str"):
        state_dict("model")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="storage: expected a torch.dtype, got str"):
        state_dict(nn.Sequential(), "bfloat16")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="0: expected 4-bit linear layers, .*, got Embedding4bit"):
        state_dict(nn.Sequential(Embedding4bit.from_embedding(nn.Embedding(4, 64))))
    with pytest.raises(ValueError, match="model: expected whole elements of torch.float32, got 2 bytes"):
        state_dict(Linear4bit(3, 1), torch.float32)


def test_the_layers_own_state_is_one_of_plain_parameters() -> None:
    """Accelerate's offloading and torch's checkpoints use it, so names and shapes must be the parameters'."""
    hooks = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model, x = nn.Sequential(bare(compute_dtype=torch.float32)), torch.randn(2, 64)
    qlora_ext.adopt(model)
    expected = model(x)
    assert get_model_state_dict(model).keys() == model.state_dict().keys()
    hooks.cpu_offload(model, torch.device("cpu"))
    assert model[0].weight.is_meta
    assert torch.equal(model(x), expected)


def test_unsupported_layers_are_unchanged_and_counted() -> None:
    class Doubled(bnb.nn.Linear4bit):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    foreign = bare()
    foreign.weight.quant_state.code = foreign.weight.quant_state.code + 0.01
    lost = bare()
    lost.weight.quant_state = lost.quant_state = None
    doubled = Doubled(64, 32, quant_type="nf4").to("cpu")
    model = nn.ModuleDict(
        {
            "ours": bare(),
            "dense": nn.Linear(8, 8),
            "fp4": bare(quant_type="fp4"),
            "int8": bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False),
            "foreign": foreign,
            "lost": lost,
            "doubled": doubled,
            "fp4, not moved yet": bnb.nn.Linear4bit(64, 32, quant_type="fp4"),
            "absent": bnb.nn.Linear4bit(64, 32, quant_type="nf4", device="meta"),
        }
    )
    before = {name: (type(m), m.weight) for name, m in model.items()}
    adoption = qlora_ext.adopt(model)
    assert adoption.adopted == ("ours", "fp4")
    reasons = {
        "int8": "int8",
        "foreign": "expected bitsandbytes' own code values",
        "lost": "quant_state is lost",
        "doubled": "Doubled, which has its own forward",
        "fp4, not moved yet": "has not quantized yet",
        "absent": "its weight is offloaded",
    }
    assert adoption.left.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert reason in adoption.left[name]
        assert (type(model[name]), model[name].weight) == before[name]
    assert str(adoption).startswith("layers adopted: 2; left to bitsandbytes: 1 (int8 ")


def test_a_sharded_model_is_refused_untouched() -> None:
    model = nn.Sequential(bare(), bare())
    del model[1]._parameters["weight"]  # the state after FSDP1; FSDP2 uses a DTensor
    with pytest.raises(ValueError, match="1: expected an unsharded weight, got one that FSDP has sharded"):
        qlora_ext.adopt(model)
    assert not isinstance(model[0], Linear4bit)
    with pytest.raises(TypeError, match="model: expected an nn.Module, got str"):
        qlora_ext.adopt("model")  # type: ignore[arg-type]


def test_hooks_of_accelerate_and_of_torch_stay() -> None:
    hooks = pytest.importorskip("accelerate.hooks", reason="accelerate is not installed")
    layer, x, seen = bare(compute_dtype=torch.float32), torch.randn(2, 64), []
    expected = layer(x)
    hooks.add_hook_to_module(layer, hooks.AlignDevicesHook(execution_device="cpu"))
    layer.register_forward_hook(lambda *_: seen.append("torch"))
    hook = layer._hf_hook
    qlora_ext.adopt(layer)
    assert layer._hf_hook is hook
    assert error(layer(x), expected) < 1e-6
    assert layer._old_forward.__func__ is Linear4bit.forward
    assert seen == ["torch"]


@pytest.mark.parametrize(("family", "kind"), [*((family, "nf4") for family in FAMILIES), ("llama", "fp4")])
def test_a_model_stays_one_of_bitsandbytes_to_all_around(family: str, kind: str, tmp_path: Path) -> None:
    make(family, torch.float32).save_pretrained(tmp_path / "dense")
    model = load(tmp_path / "dense", config(bnb_4bit_quant_type=kind, bnb_4bit_quant_storage=torch.bfloat16))
    model.save_pretrained(tmp_path / "before")
    names, size, given = set(theirs(model)), model.num_parameters(), model.config.quantization_config
    with torch.no_grad():
        expected = exact(model)(IDS).logits
    adoption = qlora_ext.adopt(model)
    assert set(adoption.adopted) == names == set(theirs(model))
    with torch.no_grad():
        assert error(model(IDS).logits, expected) < 1e-5
    assert model.num_parameters() == size
    assert model.is_loaded_in_4bit
    assert model.config.quantization_config is given

    model.save_pretrained(tmp_path / "after")
    before, after = ((tmp_path / kind / "model.safetensors").read_bytes() for kind in ("before", "after"))
    assert before == after
    plain = load(tmp_path / "after")
    assert {type(m) for m in theirs(plain).values()} == {bnb.nn.Linear4bit}
    qlora_ext.adopt(
        plain
    )  # a model that was loaded in 4 bits: its conversion of bitsandbytes' keys must not be reversed
    plain.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == before
    dense = plain.dequantize()
    assert not theirs(dense)
    assert not hasattr(dense.config, "quantization_config")


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_training_continues_with_the_same_optimizer(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    make(family, torch.float32).save_pretrained(tmp_path / "dense")
    lora = LoraConfig(
        r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM",
        fan_in_fan_out=family == "gpt2", **options,
    )  # fmt: skip
    model = exact(get_peft_model(load(tmp_path / "dense", config()), lora))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected, parameters = gradients(), dict(model.named_parameters())
    count = model.get_nb_trainable_parameters()
    model.base_model.__class__ = LoraModel  # as PEFT makes it before qlora_ext is imported
    assert len(qlora_ext.adopt(model).adopted) == sum(isinstance(m, LoraLinear4bit) for m in model.modules()) > 0
    kept = {name: p for name, p in model.named_parameters() if not name.endswith("base_layer.weight")}
    assert all(p is parameters[name] for name, p in kept.items())
    assert model.get_nb_trainable_parameters() == count
    found = gradients()
    assert found.keys() == expected.keys()
    assert all(error(found[name], g) < 1e-4 for name, g in expected.items())
    before = model(input_ids=IDS, labels=IDS).loss.item()
    optimizer.step()
    assert model(input_ids=IDS, labels=IDS).loss.item() < before

    model.eval().save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        trained = model(input_ids=IDS).logits
        plain = PeftModel.from_pretrained(load(tmp_path / "dense", config()), tmp_path / "adapter")
        assert error(exact(plain)(input_ids=IDS).logits, trained) < 1e-5
        merged = model.merge_and_unload()
        assert error(merged(input_ids=IDS).logits, trained) < 1e-5
    assert not theirs(merged)
    assert not merged.is_loaded_in_4bit
    merged.save_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert error(load(tmp_path / "merged")(input_ids=IDS).logits, trained) < 1e-5


def test_layers_under_merged_adapters_and_other_methods_are_left(tmp_path: Path) -> None:
    from peft import IA3Config

    make(dtype=torch.float32).save_pretrained(tmp_path)
    merged = get_peft_model(load(tmp_path, config()), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    merged.merge_adapter()
    assert set(qlora_ext.adopt(merged).left.values()) == {"an adapter is merged into it; unmerge it first"}
    ia3 = get_peft_model(load(tmp_path, config()), IA3Config(task_type="CAUSAL_LM"))
    adoption = qlora_ext.adopt(ia3)
    assert {why for why in adoption.left.values() if "under PEFT's ia3" in why}
    assert adoption.adopted
    ia3(input_ids=IDS, labels=IDS).loss.backward()


def test_quantize_model_adopts_or_says_why_not(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path / "dense")
    model = load(tmp_path / "dense", config())
    expected = {name: decoded(m) for name, m in theirs(model).items()}
    qlora_ext.quantize_model(model)
    assert {name: m.dequantize() for name, m in theirs(model).items()}.keys() == expected.keys()
    assert all(torch.equal(m.dequantize(), expected[name]) for name, m in theirs(model).items())
    model.save_pretrained(tmp_path / "ours")
    again = load(tmp_path / "ours")
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model.eval()(IDS).logits)

    int8 = load(tmp_path / "dense", BitsAndBytesConfig(load_in_8bit=True))
    with pytest.raises(ValueError, match=r"14 bitsandbytes layers cannot be adopted, such as .*q_proj \(int8 "):
        qlora_ext.quantize_model(int8)


def test_code_that_casts_every_small_parameter_does_no_harm(tmp_path: Path) -> None:
    make(dtype=torch.float32).save_pretrained(tmp_path)
    model = load(tmp_path, config())
    qlora_ext.adopt(model)
    before = {name: m.dequantize() for name, m in theirs(model).items()}
    for p in model.parameters():  # as in the first QLoRA scripts
        p.requires_grad = False
        if p.ndim == 1:
            p.data = p.data.to(torch.float32)
    assert all(torch.equal(m.dequantize(), before[name]) for name, m in theirs(model).items())
    assert model(IDS).logits.isfinite().all()


def test_a_compiled_copy_and_a_pickled_one(tmp_path: Path) -> None:
    layer = bare(compute_dtype=torch.float32)
    qlora_ext.adopt(layer)
    x = torch.randn(2, 64)
    torch.save(layer, tmp_path / "layer.pt")
    loaded = torch.load(tmp_path / "layer.pt", weights_only=False)
    for other in (copy.deepcopy(layer), loaded):
        assert type(other) is type(layer)
        assert torch.equal(other(x), layer(x))
    torch._dynamo.reset()
    assert error(torch.compile(layer, fullgraph=True, backend="eager")(x), layer(x)) < 1e-6
