"""Checkpoints in packed formats keep their bits in a model, and are saved as they were."""

from __future__ import annotations

import copy
import json
import pathlib
import re
import sys
import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Llama4TextConfig

import packed_models
from load_memory import peak_of_loading
from packed_models import FORMATS, IDS, change, check_our_format, check_saved, configured, load
from qlora_app.models.pretrained import is_4bit
from qlora_app.models.sources import ModelSource
from qlora_ext import quantize_model
from qlora_ext.fingerprint import fingerprint
from qlora_ext.form import Form
from qlora_ext.integrations.peft import merge_to_4bit, set_merge_aware
from qlora_ext.nn import Embedding4bit, Experts4bit, Linear4bit, layers_of
from tiny_models import same_state

CASES = [
    *(("llama", kind) for kind in FORMATS),
    *(("qwen3_moe", kind) for kind in FORMATS if kind != "gptq-order"),
    ("mixtral", "nvfp4-pack-quantized"),
    ("mixtral", "pack-quantized"),
    ("deepseek_v3", "fp8"),
    ("deepseek_v3", "fp8-e8m0"),
    ("minimax_m2", "fp8"),
    ("gpt_oss", "mxfp4"),
    ("gpt_oss", "mxfp4-pack-quantized"),
    ("gpt_oss", "nvfp4-pack-quantized"),
    ("gpt_oss", "modelopt"),
    ("gpt_oss", "pack-quantized-zero-points"),
    ("gpt_oss", "awq"),
]


def decoded(model: Any) -> dict[str, torch.Tensor]:
    """The values of all 4-bit weights, in the layout of dense modules."""
    found = {}
    for name, layer in layers_of(model):
        for weight in layer.packed_shapes:
            name_of_weight = [weight] if isinstance(layer, Experts4bit) else []
            found[f"{name}.{weight}"] = layer.dequantize(*name_of_weight, torch.float32)
    return found


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_the_weights_are_the_files(family: str, kind: str, tmp_path: pathlib.Path) -> None:
    checkpoint = packed_models.save(tmp_path, family, kind)
    model = load(checkpoint.path)
    state = checkpoint.dense.state_dict()
    values = decoded(model)
    assert values
    assert not any(isinstance(m, Embedding4bit) for m in model.modules())
    for name, found in values.items():
        assert torch.equal(found, state[name]), name
    for name, t in model.state_dict().items():
        if name in state and name not in values:
            assert torch.equal(t, state[name]), name

    check_saved(model, tmp_path / "saved", checkpoint)
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["quantization_config"] == checkpoint.config
    assert same_state(load(tmp_path / "saved"), model)

    dense = model.dequantize()
    assert not any(True for _ in layers_of(dense))
    assert torch.equal(dense(IDS).logits, checkpoint.dense(IDS).logits)


@pytest.mark.parametrize("served", [None, "q4_0"])
@pytest.mark.parametrize(
    ("family", "kind"), [("llama", "fp8"), ("llama", "gptq-order"), ("qwen3_moe", "fp8"), ("gpt_oss", "mxfp4")]
)
def test_layers_are_quantized_anew(family: str, kind: str, served: str | None, tmp_path: pathlib.Path) -> None:
    """Like those of the decoded model, and saved in our format."""
    checkpoint = packed_models.save(tmp_path, family, kind)
    model = load(checkpoint.path, requantize=True, served=served)
    found = [name for name, _ in layers_of(load(checkpoint.path))]
    expected = quantize_model(copy.deepcopy(checkpoint.dense), **Form.named(served or "nf4").keywords)
    assert [name for name, _ in layers_of(model)] == found
    for name, layer in layers_of(model):
        assert same_state(layer, expected.get_submodule(name)), name
    check_our_format(model, tmp_path / "saved")


def test_only_layers_that_are_packed_by_others_are_quantized_anew(tmp_path: pathlib.Path) -> None:
    checkpoint = packed_models.save(tmp_path, "llama", "fp8")
    load(checkpoint.path, requantize=True).save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match="requantize: expected a dense model, .* got a model that qlora_ext"):
        load(tmp_path / "ours", requantize=True)
    with pytest.raises(ValueError, match="skip_modules: expected layers that are dense in this fp8 checkpoint"):
        load(checkpoint.path, requantize=True, skip_modules=["q_proj"])


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_the_outputs_are_those_of_the_dense_model(family: str, kind: str, tmp_path: pathlib.Path) -> None:
    checkpoint = packed_models.save(tmp_path, family, kind)
    y, expected = load(checkpoint.path)(IDS).logits, checkpoint.dense(IDS).logits
    torch.testing.assert_close(y, expected, rtol=2e-4, atol=2e-4)


def test_weights_that_the_checkpoint_keeps_dense_stay_dense(tmp_path: pathlib.Path) -> None:
    keep = r"layers\.0\..*experts|self_attn"
    checkpoint = packed_models.save(tmp_path, "qwen3_moe", "modelopt", keep=keep)  # its codes are called "weight" too
    model = load(checkpoint.path)
    packed = [name for name, _ in layers_of(model)]
    assert packed == ["model.layers.1.mlp.experts"]
    torch.testing.assert_close(model(IDS).logits, checkpoint.dense(IDS).logits, rtol=2e-4, atol=2e-4)
    check_saved(model, tmp_path / "saved", checkpoint)


def test_a_model_without_our_configuration_is_transformers_own(tmp_path: pathlib.Path) -> None:
    checkpoint = packed_models.save(tmp_path, "gpt_oss", "mxfp4")
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32, device_map="cpu")
    assert not [*layers_of(model)]
    assert torch.equal(model(IDS).logits, checkpoint.dense(IDS).logits)


@pytest.mark.parametrize("old_names", [False, True])
def test_experts_of_gpt_oss_that_are_stored_one_by_one(old_names: bool, tmp_path: pathlib.Path) -> None:
    """Some experts are dense, and some checkpoints call the list of experts ``experts``, too."""
    checkpoint = packed_models.save(tmp_path, "gpt_oss", "modelopt", keep=r"layers\.0\.mlp")
    if old_names:
        for name in [name for name in checkpoint.tensors if ".mlp.experts." in name]:
            renamed = re.sub(r"experts\.(\d)", r"experts.experts.\1", name)
            checkpoint.tensors[renamed] = checkpoint.tensors.pop(name)
        change(checkpoint, "", lambda t: None)
    model = load(checkpoint.path)
    names = [name for name, _ in layers_of(model)]
    assert "model.layers.1.mlp.experts" in names
    assert "model.layers.0.mlp.experts" not in names
    state = model.state_dict()
    for name, t in checkpoint.dense.state_dict().items():
        if "layers.0.mlp" in name or name.endswith("_bias"):
            assert torch.equal(state[name], t), name
    torch.testing.assert_close(model(IDS).logits, checkpoint.dense(IDS).logits, rtol=2e-4, atol=2e-4)
    check_saved(model, tmp_path / "saved", checkpoint)


def test_an_expert_that_is_missing(tmp_path: pathlib.Path) -> None:
    checkpoint = packed_models.save(tmp_path, "gpt_oss", "modelopt")
    complete = dict(checkpoint.tensors)
    for absent, message in (
        (r"experts\.2\.up_proj\.w", r"expected 4 weights of modelopt with names like \S*up_proj\.weight, found 3"),
        (r"experts\.2\.up_proj\.b", r"expected 4 tensors with names like \S*up_proj\.bias, found 3"),
        (r"experts\.\d\.up_proj\.w", r"expected 4-bit weights with names like \S*up_proj\.weight too, found none"),
        (r"experts\.\d\.up_proj\.b", r"expected 4 tensors with names like \S*up_proj\.bias, found 0"),
        (r"experts\.\d\.(gate|up)_proj\.b", r"layers.0.mlp.experts: the checkpoint has no gate_up_proj_bias"),
    ):
        checkpoint.tensors = {name: t for name, t in complete.items() if not re.search(absent, name)}
        change(checkpoint, "", lambda t: None)
        with pytest.raises(ValueError, match=message):
            load(checkpoint.path)


def test_experts_without_a_4bit_layer(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama 4 computes its experts by code of its own, so a checkpoint with 4-bit experts is rejected by name."""
    sizes = {**packed_models.SIZES, "intermediate_size_mlp": 96, "head_dim": 16, "num_local_experts": 4}
    config = Llama4TextConfig(**sizes, num_experts_per_tok=1, interleave_moe_layer_step=1)
    monkeypatch.setitem(packed_models.CONFIGS, "llama4_text", lambda: config)
    checkpoint = packed_models.save(tmp_path, "llama4_text", "modelopt")
    with pytest.raises(
        ValueError, match=r"no 4-bit layer can replace model\.layers\.\d\.feed_forward\.experts; load the"
    ):
        load(checkpoint.path)


@pytest.mark.parametrize(
    ("kind", "message"),
    [("weight", "expected one name for each weight"), ("bias", "expected one name for each tensor")],
)
def test_an_expert_that_has_two_names(kind: str, message: str, tmp_path: pathlib.Path) -> None:
    checkpoint = packed_models.save(tmp_path, "gpt_oss", "modelopt")
    for name in [name for name in checkpoint.tensors if f".down_proj.{kind}" in name]:
        checkpoint.tensors[name.replace("down_proj", "w2")] = checkpoint.tensors[name].clone()
    change(checkpoint, "", lambda t: None)
    with pytest.raises(ValueError, match=message):
        load(checkpoint.path)


TRAINED = [
    ("llama", "pack-quantized"),
    ("llama", "awq"),
    ("llama", "gptq-order"),
    ("llama", "mlx"),
    ("llama", "int-quantized"),
    ("qwen3_moe", "nvfp4-pack-quantized"),
    ("qwen3_moe", "fp8"),
    ("gpt_oss", "mxfp4"),
    ("gpt_oss", "modelopt"),
]


def adapted(model: Any, std: float = 0.1) -> Any:
    """The model with LoRA on its attention, and on the experts that it has."""
    experts = [name for name, p in model.named_parameters() if name.endswith(("experts.gate_up_proj", "down_proj"))]
    options: dict[str, Any] = {"target_parameters": experts} if experts else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns about parameters
        model = get_peft_model(
            model, LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], **options)
        )
    torch.manual_seed(2)
    for name, p in sorted(model.named_parameters()):
        if "lora_" in name:
            torch.nn.init.normal_(p, std=std)
    return model


@pytest.mark.parametrize(("family", "kind"), TRAINED)
def test_training(family: str, kind: str, tmp_path: pathlib.Path) -> None:
    """Gradients are those over the dense weights, the base keeps its bits, and the adapter serves on the checkpoint."""
    checkpoint = packed_models.save(tmp_path, family, kind)
    model, twin = adapted(load(checkpoint.path)), adapted(copy.deepcopy(checkpoint.dense))
    before = fingerprint(model)
    losses = [m(input_ids=IDS, labels=IDS).loss for m in (model, twin)]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)
    for loss in losses:
        loss.backward()
    expected = {name: p.grad for name, p in twin.named_parameters() if p.requires_grad}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == expected.keys()
    assert family == "llama" or any("experts" in name for name in trained)
    for name, p in trained.items():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-2, atol=1e-4)
    torch.optim.SGD(trained.values(), lr=0.1).step()
    assert fingerprint(model) == before
    with torch.no_grad():
        y = model(IDS).logits
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(checkpoint.path), tmp_path / "adapter")
    assert torch.equal(again(IDS).logits, y)
    on_dense = PeftModel.from_pretrained(checkpoint.dense, tmp_path / "adapter")
    torch.testing.assert_close(on_dense(IDS).logits, y, rtol=1e-3, atol=1e-3)


def test_merging_an_adapter_on_dense_layers_decodes_the_others(tmp_path: pathlib.Path) -> None:
    """An adapter on all linear layers of gpt-oss leaves the experts out, and these are its only 4-bit layers."""
    checkpoint = packed_models.save(tmp_path, "gpt_oss", "mxfp4")
    config = LoraConfig(target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(load(checkpoint.path), config)
    y = model(IDS).logits
    merged = model.merge_and_unload()
    assert not [*layers_of(merged)]
    torch.testing.assert_close(merged(IDS).logits, y, rtol=1e-3, atol=1e-3)
    merged.save_pretrained(tmp_path / "merged")
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())


NVFP4 = ("llama", "nvfp4-pack-quantized")
MOE = ("qwen3_moe", "nvfp4-pack-quantized")
MXFP4 = ("gpt_oss", "mxfp4")


ORDER = ("llama", "gptq-order")  # the permutation of its columns belongs to the layer
FP8 = ("deepseek_v3", "fp8")


@pytest.mark.parametrize("case", [MXFP4, ORDER, ("qwen3_moe", "fp8")], ids="-".join)
def test_streaming(case: tuple[str, str], tmp_path: pathlib.Path) -> None:
    checkpoint = packed_models.save(tmp_path, *case)
    model = load(checkpoint.path, stream="ram")
    check_saved(model, tmp_path / "saved", checkpoint)
    with pytest.raises(ValueError, match=f"'disk' needs a 4-bit model saved by qlora_ext; load the {case[1][:3]}"):
        load(checkpoint.path, stream="disk")
    gradients = []
    for base in (load(checkpoint.path), model):
        trained = adapted(base)
        trained(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append({name: p.grad for name, p in trained.named_parameters() if p.requires_grad})
    assert all(torch.equal(grad, gradients[1][name]) for name, grad in gradients[0].items())


@pytest.mark.parametrize("case", [MXFP4, MOE, NVFP4, ORDER, FP8], ids="-".join)
def test_saved_in_our_format(case: tuple[str, str], tmp_path: pathlib.Path) -> None:
    check_our_format(load(packed_models.save(tmp_path, *case).path), tmp_path / "ours")


@pytest.mark.filterwarnings("error")
def test_fp8_beside_nvfp4(tmp_path: pathlib.Path) -> None:
    """A checkpoint of ModelOpt whose attention is in FP8, with one scale or with one per row."""
    checkpoint = packed_models.save(tmp_path, "llama", "modelopt", keep="self_attn")
    layers = {}
    for name in [name for name in checkpoint.tensors if "_proj.weight" in name and name.endswith("weight")]:
        module = name.removesuffix(".weight")
        layers[module] = {"quant_algo": "NVFP4", "group_size": 16}
        if "self_attn" not in name:
            continue
        layers[module] = {"quant_algo": "FP8"}
        scale = torch.tensor(0.0017) if "q_proj" in name else torch.rand(checkpoint.tensors[name].shape[0], 1) / 100
        codes = (checkpoint.tensors[name] / scale).to(torch.float8_e4m3fn)
        new = {name: codes, f"{module}.weight_scale": scale, f"{module}.input_scale": torch.tensor(0.5)}
        checkpoint.tensors.update(new)
        checkpoint.dense.get_submodule(module).weight.data = codes.float() * scale
    change(checkpoint, "", lambda t: None)
    changed = {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers, "ignore": []}
    configured(checkpoint, quantization_config=checkpoint.config | changed)
    model = load(checkpoint.path)
    assert {layer.form.code for _, layer in layers_of(model)} == {"e2m1", "e4m3"}
    assert sum(1 for _ in layers_of(model)) == 14
    for name, found in decoded(model).items():
        assert torch.equal(found, checkpoint.dense.state_dict()[name]), name
    torch.testing.assert_close(model(IDS).logits, checkpoint.dense(IDS).logits, rtol=2e-4, atol=2e-4)
    check_saved(model, tmp_path / "saved", checkpoint)


def test_mxfp4_experts_beside_fp8(tmp_path: pathlib.Path) -> None:
    """DeepSeek-V4, in which no packed layer can replace the grouped projection o_a_proj."""
    checkpoint = packed_models.save(
        tmp_path,
        "deepseek_v4",
        "fp8-e8m0",
        packed=r"\.(w[123qkvob_a]+)\.weight$",
        changed={"expert_dtype": "fp4"},
        experts="fp8-fp4",
    )
    with pytest.warns(UserWarning, match=r"2 weights of the fp8 checkpoint are decoded .*o_a_proj\.weight \(8 bits\)"):
        model = load(checkpoint.path)
    codes = {(type(layer), layer.form.code) for _, layer in layers_of(model)}
    assert codes == {(Linear4bit, "e4m3"), (Experts4bit, "e2m1")}
    state = {**model.state_dict(), **decoded(model)}
    for name, expected in checkpoint.dense.state_dict().items():
        assert torch.equal(state[name], expected), name
    torch.testing.assert_close(model(IDS).logits, checkpoint.dense(IDS).logits, rtol=2e-4, atol=2e-4)
    check_saved(model, tmp_path / "saved", checkpoint)


LLAMA = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 8}
QWEN3_MOE = {"hidden_size": 1024, "moe_intermediate_size": 768, "num_experts": 32, "num_hidden_layers": 8}
GPT_OSS = {"hidden_size": 1440, "intermediate_size": 1440, "num_local_experts": 24, "num_hidden_layers": 3}
GPT_OSS_LAYERS = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
LARGE: list[tuple[str, dict[str, Any], str]] = [
    ("llama", LLAMA, "pack-quantized"),
    ("llama", LLAMA, "awq"),
    ("llama", LLAMA, "gptq"),
    ("llama", LLAMA, "modelopt"),
    ("qwen3_moe", QWEN3_MOE, "nvfp4-pack-quantized"),
    ("qwen3_moe", QWEN3_MOE, "gptq"),
    ("qwen3_moe", QWEN3_MOE, "fp8-128"),
    ("gpt_oss", GPT_OSS | GPT_OSS_LAYERS, "mxfp4"),
]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize(("family", "sizes", "kind"), LARGE, ids=lambda value: value if isinstance(value, str) else "")
def test_loading_takes_the_memory_of_the_model(
    family: str, sizes: dict[str, Any], kind: str, tmp_path: pathlib.Path
) -> None:
    """At most a tenth more than the larger one of the file and the model, at any time.

    A weight that is being read takes 4 to 7% of that, and the allocator keeps 2 to 4 MiB that are free.
    """
    config = packed_models.CONFIGS[family]()
    packed_models.save_large(tmp_path / "small", config, kind)
    config.update(sizes)
    packed_models.save_large(tmp_path / "large", config, kind)
    peak, footprint = peak_of_loading(tmp_path / "large", tmp_path / "small")
    size = (tmp_path / "large" / "model.safetensors").stat().st_size
    assert size > 90e6
    assert footprint < 1.05 * size
    assert peak < 1.1 * max(size, footprint), f"peak {peak >> 20}, file {size >> 20}, model {footprint >> 20} MiB"


QUANTIZE = {"bits": 4, "group_size": 32, "sym": True, "desc_act": False, "damp_percent": 0.01}
ELSEWHERE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "modelopt": (
        "modelopt",
        "hf_quant_config.json",
        {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"}},
    ),
    "gptq": ("gptq", "quantize_config.json", QUANTIZE),
    "gptqmodel": ("gptq-v2-zero-points", "quantize_config.json", QUANTIZE | {"sym": False, "format": "gptq_v2"}),
    "awq": ("awq", "quant_config.json", {"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"}),
}


@pytest.mark.parametrize("case", ELSEWHERE)
def test_configurations_in_files_of_their_own(case: str, tmp_path: pathlib.Path) -> None:
    kind, name, fields = ELSEWHERE[case]
    checkpoint = packed_models.save(tmp_path, "llama", kind)
    configured(checkpoint, quantization_config=None)
    (checkpoint.path / name).write_text(json.dumps(fields))
    assert is_4bit(ModelSource("model", str(checkpoint.path)))  # as the commands find it
    model = load(checkpoint.path)
    torch.testing.assert_close(model(IDS).logits, checkpoint.dense(IDS).logits, rtol=2e-4, atol=2e-4)
    check_saved(model, tmp_path / "saved", checkpoint)
    assert same_state(load(tmp_path / "saved"), model)
    (checkpoint.path / name).write_text("{")
    with pytest.raises(ValueError, match=rf"{name}: not JSON"):
        load(checkpoint.path)


def test_an_older_name_of_the_configuration(tmp_path: pathlib.Path) -> None:
    checkpoint = packed_models.save(tmp_path, *NVFP4)
    configured(checkpoint, compression_config=checkpoint.config, quantization_config=None)
    model = load(checkpoint.path)
    torch.testing.assert_close(model(IDS).logits, checkpoint.dense(IDS).logits, rtol=2e-4, atol=2e-4)
    model.save_pretrained(tmp_path / "saved")
    assert same_state(load(tmp_path / "saved"), model)


def test_layers_whose_groups_are_in_order_have_no_permutation(tmp_path: pathlib.Path) -> None:
    checkpoint = packed_models.save(tmp_path, *ORDER)
    change(checkpoint, "model.layers.0.mlp.up_proj.g_idx", lambda t: t.sort().values)
    model = load(checkpoint.path)
    plain = [name for name, layer in layers_of(model) if not layer.form.reordered]
    assert plain == ["model.layers.0.mlp.up_proj"]


def test_merging_in_activation_order(tmp_path: pathlib.Path) -> None:
    checkpoint = packed_models.save(tmp_path, *ORDER)
    model = adapted(load(checkpoint.path), 0.01).eval()
    y = model(IDS).logits
    model.merge_adapter()
    assert not torch.equal(model(IDS).logits, y)
    model.unmerge_adapter()
    assert torch.equal(model(IDS).logits, y)
    dense = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(dense(IDS).logits, y, rtol=1e-4, atol=1e-4)
    merged, error = merge_to_4bit(model)
    assert 0.8 < error.retained < 1.2
    merged.save_pretrained(tmp_path / "merged")
    assert same_state(load(tmp_path / "merged"), merged)


def test_merge_aware_training_in_activation_order(tmp_path: pathlib.Path) -> None:
    model = adapted(load(packed_models.save(tmp_path, *ORDER).path)).eval()
    set_merge_aware(model)
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    y = model(IDS).logits
    merged, _ = merge_to_4bit(model)
    assert torch.equal(merged(IDS).logits, y)


def test_another_order_is_not_saved(tmp_path: pathlib.Path) -> None:
    model = load(packed_models.save(tmp_path, *ORDER).path)
    layer = model.model.layers[0].mlp.up_proj
    layer.set_weight(layer.weight.replace(column_order=layer.column_order.flip(0)))
    with pytest.raises(ValueError, match=r"up_proj\.weight: expected the columns in the order of the checkpoint's"):
        model.save_pretrained(tmp_path / "saved")


def test_experts_in_activation_order_are_rejected(tmp_path: pathlib.Path) -> None:
    checkpoint = packed_models.save(tmp_path, "qwen3_moe", "gptq-order")
    with pytest.raises(
        ValueError, match=r"experts\.0\.down_proj\.weight: expected .* got an activation order \(desc_act\)"
    ):
        load(checkpoint.path)
    for name in [name for name in checkpoint.tensors if ".experts." in name and name.endswith("g_idx")]:
        checkpoint.tensors[name] = checkpoint.tensors[name].sort().values
    change(checkpoint, "", lambda t: None)
    model = load(checkpoint.path)
    assert {layer.form.reordered for _, layer in layers_of(model)} == {False, True}
    assert any(isinstance(layer, Experts4bit) for _, layer in layers_of(model))
    check_saved(model, tmp_path / "saved", checkpoint)
    fields = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert fields["quantization_config"]["desc_act"]
