"""What configurations say about 4-bit weights, and which of them are rejected before weights load."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch

from checkpoint_samples import (
    auto_round,
    awq,
    compressed_config,
    compressed_mxfp4,
    compressed_nvfp4,
    deepseek_fp4,
    float_quantized,
    fp8,
    gptq,
    mlx,
    modelopt,
    mxfp4,
    mxfp8,
    packed,
)
from qlora_ext.checkpoints import Settings, format_of, formats_of

# As moonshotai/Kimi-K2-Thinking has it.
KIMI = {
    "config_groups": {
        "group_0": {
            "input_activations": None,
            "output_activations": None,
            "targets": ["Linear"],
            "weights": {
                "actorder": None,
                "block_structure": None,
                "dynamic": False,
                "group_size": 32,
                "num_bits": 4,
                "observer": "minmax",
                "observer_kwargs": {},
                "strategy": "group",
                "symmetric": True,
                "type": "int",
            },
        }
    },
    "format": "pack-quantized",
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"],
    "kv_cache_scheme": None,
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
}
MIXED = {
    "quant_method": "modelopt",
    "quant_algo": "MIXED_PRECISION",
    "quantized_layers": {
        "model.layers.0.self_attn.q_proj": {"quant_algo": "FP8"},
        "model.layers.0.self_attn.k_proj": {"quant_algo": "FP8"},
        "model.layers.0.mlp.up_proj": {"quant_algo": "NVFP4", "group_size": 16},
        "model.layers.0.mlp.down_proj": {"quant_algo": "W4A16_NVFP4", "group_size": 16},
    },
    "ignore": ["lm_head"],
}


def settings_of(config: dict[str, Any]) -> Settings:
    return format_of(config)[1]


def changed(config: dict[str, Any], *path: str, value: Any) -> dict[str, Any]:
    """``config`` with the value at ``path`` replaced."""
    result = copy.deepcopy(config)
    inner = result
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return result


def test_the_format_is_found_by_its_name() -> None:
    names = [format_of(make().config)[0].name for make in (mxfp4, modelopt, awq, gptq)]
    assert names == ["mxfp4", "modelopt", "awq", "gptq"]
    names = [format_of(make().config)[0].name for make in (compressed_mxfp4, compressed_nvfp4, packed)]
    assert names == ["mxfp4-pack-quantized", "nvfp4-pack-quantized", "pack-quantized"]


def test_the_format_of_a_group_goes_before_that_of_the_checkpoint() -> None:
    config = changed(KIMI, "format", value="mixed-precision")
    config["config_groups"]["group_0"]["format"] = "pack-quantized"
    assert format_of(config)[0].name == "pack-quantized"
    with pytest.raises(ValueError, match="got mixed-precision, which is not supported"):
        format_of(changed(KIMI, "format", value="mixed-precision"))


@pytest.mark.parametrize("method", ["bitnet", "quark", "hqq", "", "\x1b[2J" * 100])
def test_other_methods_are_rejected_by_their_name(method: str) -> None:
    with pytest.raises(ValueError, match="expected a format among mxfp4, modelopt, awq, gptq") as error:
        format_of({"quant_method": method})
    assert method[:20].lower().replace("\x1b", "\\x1b") in str(error.value)
    assert "\x1b" not in str(error.value)


def test_settings_of_fp8() -> None:
    settings = settings_of({"quant_method": "fp8", "weight_block_size": [128, 64], "scale_fmt": "ue8m0"})
    assert (settings.group_rows, settings.group_size, settings.code) == (128, 64, "e4m3")
    assert settings_of({"quant_method": "fp8"}).group_rows is None
    names = [kind.name for kind, _ in formats_of(deepseek_fp4().config)]
    assert names == ["fp8", "fp8", "fp8", "fp8 with expert_dtype fp4"]


def test_groups_of_several_formats() -> None:
    """llm-compressor quantizes attention to FP8, and experts to NVFP4."""
    config = compressed_nvfp4().config | {"format": "mixed-precision"}
    groups = {
        "a": config["config_groups"]["group_0"] | {"format": "nvfp4-pack-quantized"},
        "b": float_quantized(strategy="block").config["config_groups"]["group_0"] | {"format": "float-quantized"},
    }
    (nvfp4, _), (float8, settings) = formats_of(config | {"config_groups": groups})
    assert (nvfp4.name, float8.name) == ("nvfp4-pack-quantized", "float-quantized")
    assert (settings.group_rows, settings.group_size) == (128, 128)


def test_kimi() -> None:
    settings = settings_of(KIMI)
    assert (settings.group_size, settings.symmetric, settings.scale_dtype) == (32, True, torch.bfloat16)


def test_groups_that_differ_in_their_targets_only_are_joined() -> None:
    config = copy.deepcopy(KIMI)
    config["config_groups"]["group_0"]["targets"] = ["re:.*q_proj"]
    config["config_groups"]["group_1"] = copy.deepcopy(config["config_groups"]["group_0"]) | {"targets": ["re:.*up"]}
    config["config_groups"]["activations"] = {"targets": ["re:.*attn"], "weights": None}
    assert settings_of(config).group_size == 32
    config["config_groups"]["group_1"]["weights"]["group_size"] = 64
    with pytest.raises(ValueError, match="got 2 groups that differ, which are not supported"):
        format_of(config)


def test_mixed_precision_of_modelopt() -> None:
    assert settings_of(MIXED) == settings_of(modelopt().config)
    with pytest.raises(ValueError, match="expected NVFP4 or FP8 weights, got W8A8, which is not supported"):
        format_of(changed(MIXED, "quantized_layers", value={"a": {"quant_algo": "W8A8"}}))


def test_modelopts_own_file_is_read_alike() -> None:
    kind, settings = format_of(modelopt().config)
    own = {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"]}
    assert kind.settings_of({"producer": {"name": "modelopt"}, "quantization": own}) == settings


def test_settings_of_gptq() -> None:
    assert settings_of(gptq(version=2).config).zero_point_bias == 0
    assert settings_of(gptq().config).zero_point_bias == 1
    assert settings_of(gptq().config | {"group_size": -1}).group_size is None
    assert settings_of(gptq().config | {"group_size": -1, "desc_act": True}).group_size is None
    assert not settings_of(gptq().config).reorders
    assert settings_of(gptq(desc_act=True).config).reorders
    for never in ({"static_groups": True}, {"group_size": -1}):
        assert not settings_of(gptq(desc_act=True).config | never).reorders
    assert settings_of(gptq().config | {"dynamic": {".*up.*": {"desc_act": True}}}).reorders


@pytest.mark.parametrize("name", ["auto-round", "auto_round", "intel/auto-round"])
def test_auto_round_has_the_settings_of_the_format_that_packs_its_weights(name: str) -> None:
    for sample in (gptq(), awq()):
        kind, settings = format_of(auto_round(sample).config | {"quant_method": name})
        assert (kind.name, settings.group_size) == (sample.config["quant_method"], 128)
        assert settings.symmetric == settings_of(sample.config).symmetric


def test_layers_of_mlx_with_settings_of_their_own() -> None:
    config = mlx().config | {"mode": "affine", "model.a": {"bits": 8, "group_size": 32}, "model.b": False}
    settings = settings_of(config)
    assert (settings.bits, settings.group_size) == (4, 64)
    assert {name: (own.bits, own.group_size) for name, own in settings.layers.items()} == {"model.a": (8, 32)}


INT = compressed_config("pack-quantized", type="int", strategy="group", group_size=32)
FLOAT_BLOCK = float_quantized(strategy="block").config
WEIGHTS = ("config_groups", "group_0", "weights")
REJECTED: dict[str, tuple[dict[str, Any], str]] = {
    "gptq 3 bits": (gptq().config | {"bits": 3}, "expected 4 or 8 bits, got 3"),
    "gptq marlin": (gptq().config | {"checkpoint_format": "marlin"}, "got marlin"),
    "gptq older marlin": (gptq().config | {"is_marlin_format": True}, "got marlin"),
    "gptq words": (gptq().config | {"pack_dtype": "int16"}, "in int16 words"),
    "gptq group": (gptq().config | {"group_size": 0}, "expected a group_size of 1 or more, or -1, got 0"),
    "gptq mixed": (gptq().config | {"dynamic": {".*up.*": {"bits": 8}}}, "got others in dynamic for .*up.*"),
    "auto-round packing": (
        auto_round(gptq()).config | {"packing_format": "auto_round:llm_compressor"},
        "expected the packing_format auto_round:auto_gptq or auto_round:auto_awq, got auto_round:llm_compressor",
    ),
    "auto-round no packing": ({"quant_method": "auto-round", "bits": 4}, "expected packing_format in it"),
    "auto-round float": (auto_round(gptq()).config | {"data_type": "mx_fp"}, "expected the data_type int, got mx_fp"),
    "auto-round mixed": (
        auto_round(gptq()).config | {"extra_config": {"model.a": {"bits": 8}}},
        "extra_config.model.a: expected the same settings for all modules, got bits 8",
    ),
    "auto-round bits": (auto_round(gptq()).config | {"bits": 2}, "expected 4 or 8 bits, got 2"),
    "mlx 3 bits": (mlx().config | {"bits": 3}, "expected 4 or 5 or 6 or 8 bits, got 3"),
    "mlx mode": (mlx().config | {"mode": "mxfp4", "group_size": 32}, "expected the mode affine, got mxfp4"),
    "mlx group": (mlx().config | {"group_size": 16}, "expected group_size among 32, 64, 128, got 16"),
    "mlx layer": (mlx().config | {"model.a": {"bits": 7, "group_size": 64}}, "mlx: model.a: expected bits among 2, 3"),
    "mlx nothing": ({"quant_method": "mlx", "group_size": 64}, "expected bits in it"),
    "awq 8 bits": (awq().config | {"bits": 8}, "expected 4 bits, got 8"),
    "awq gemv": (awq().config | {"version": "gemv"}, "expected the layout gemm, got gemv"),
    "awq llm-awq": (awq().config | {"backend": "llm-awq"}, "expected the layout gemm, got llm-awq"),
    "2 bits": (changed(INT, *WEIGHTS, "num_bits", value=2), "got int weights of 2 bits"),
    "float": (changed(INT, *WEIGHTS, "type", value="float"), "got float weights of 4 bits"),
    "act-order": (changed(INT, *WEIGHTS, "actorder", value="group"), "activation order are not supported"),
    "strategy": (changed(INT, *WEIGHTS, "strategy", value="tensor"), "expected the strategy channel or group"),
    "group size": (changed(INT, *WEIGHTS, "group_size", value=None), "expected a positive group_size"),
    "no groups": (INT | {"config_groups": {}}, "got no quantized weights"),
    "dense": (INT | {"format": "dense"}, "got dense"),
    "int-quantized 4 bits": (INT | {"format": "int-quantized"}, "expected int weights of 8 bits for int-quantized"),
    "float-quantized int": (INT | {"format": "float-quantized"}, "expected float weights of 8 bits for float-quant"),
    "tile": (changed(FLOAT_BLOCK, *WEIGHTS, "block_structure", value=[128]), "expected the rows and columns of a tile"),
    "mxfp8 group": (changed(mxfp8().config, *WEIGHTS, "group_size", value=16), "the group_size 32"),
    "fp8 tile": (fp8().config | {"weight_block_size": [0, 128]}, "weight_block_size: expected the rows and columns"),
    "fp8 fmt": (fp8().config | {"fmt": "e3m4"}, "expected fmt e4m3 or e5m2, got e3m4"),
    "fp8 experts": (fp8().config | {"expert_dtype": "fp6"}, "expected expert_dtype fp8 or fp4, got fp6"),
    "mxfp4 group": (changed(compressed_mxfp4().config, *WEIGHTS, "group_size", value=16), "the group_size 32"),
    "nvfp4 asymmetric": (changed(compressed_nvfp4().config, *WEIGHTS, "symmetric", value=False), "got asymmetric"),
    "modelopt AWQ": (modelopt().config | {"quant_algo": "NVFP4_AWQ"}, "got NVFP4_AWQ"),
    "modelopt group": (modelopt().config | {"group_size": 32}, "expected group_size 16, got 32"),
}


@pytest.mark.parametrize("what", REJECTED)
def test_what_is_not_supported_is_rejected_by_its_name(what: str) -> None:
    config, reason = REJECTED[what]
    with pytest.raises(ValueError, match="^quantization_config") as error:
        format_of(json.loads(json.dumps(config)))
    assert reason in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("config", [None, 3, [], "mxfp4", {}, {"quant_method": 4}, {"quant_method": None}], ids=str)
def test_what_is_no_configuration_is_rejected(config: Any) -> None:
    with pytest.raises(ValueError, match="^quantization_config"):
        format_of(config)


def test_configurations_that_transformers_has_read() -> None:
    """Their texts may be members of enumerations, and they have more fields."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    for make, of in ((awq, transformers.AwqConfig), (gptq, transformers.GPTQConfig), (mxfp4, transformers.Mxfp4Config)):
        config = {key: value for key, value in make().config.items() if key != "quant_method"}
        assert settings_of(of(**config).to_dict()) == settings_of(make().config)
