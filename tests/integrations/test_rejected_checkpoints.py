"""Checkpoints in packed formats that are damaged, incomplete or not supported are rejected in one sentence."""

from __future__ import annotations

import json
import pathlib
import re
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import packed_models
from packed_models import change, configured, load
from tiny_models import same_state

NVFP4 = ("llama", "nvfp4-pack-quantized")
MOE = ("qwen3_moe", "nvfp4-pack-quantized")
MXFP4 = ("gpt_oss", "mxfp4")
MLX = ("llama", "mlx")
SCALE = r"expected weight_scale to be float8_e4m3fn \[64, 4\]"
FP8 = ("deepseek_v3", "fp8")
DENSE = "expected a dense weight or the tensor"
Q = "model.layers.1.self_attn.q_proj"
E = "model.layers.1.mlp.experts"
ZEROS = torch.zeros(64, 64)
# What the tensor becomes, in place of which there is none, and the error.
BAD: dict[str, tuple[tuple[str, str], str, Any, str]] = {
    "no scale": (NVFP4, f"{Q}.weight_scale", None, "tensor weight_scale of nvfp4-pack-quantized too"),
    "no codes": (NVFP4, f"{Q}.weight_packed", None, "tensor weight_packed of nvfp4-pack-quantized"),
    "no expert": (MOE, f"{E}.2.up_proj.weight_packed", None, "expected the tensor weight_packed of nvfp4"),
    "no scale of an expert": (MOE, f"{E}.2.up_proj.weight_scale", None, "expected the tensor weight_scale of"),
    "no scales of MLX": (MLX, f"{Q}.scales", None, "expected the tensor scales of mlx too"),
    "no blocks": (MXFP4, f"{E}.down_proj_blocks", None, "expected the tensor blocks of mxfp4 too"),
    "shape": (NVFP4, f"{Q}.weight_scale", lambda t: t[:-1], rf"{SCALE}, got"),
    "dtype": (NVFP4, f"{Q}.weight_scale", lambda t: t.float(), rf"{SCALE}, got"),
    "experts": (MXFP4, f"{E}.gate_up_proj_blocks", lambda t: t[:3], r"blocks to be uint8 \[4, 192, 2, 16\], got"),
    "factor": (NVFP4, f"{Q}.weight_global_scale", lambda t: t * 0, "weight_global_scale to be finite and above 0"),
    "NaN": (MXFP4, f"{E}.down_proj_scales", lambda t: t | 255, "expected scales to be E8M0 codes of numbers, got 0xFF"),
    "extra": (NVFP4, f"{Q}.weight_zero_point", lambda t: torch.zeros(1), "weight_zero_point"),
    "dtype of codes": (
        NVFP4,
        f"{Q}.weight_packed",
        lambda t: t.float(),
        "weight_packed to be codes of nvfp4-pack-quantized, got F32",
    ),
    "dtype of MLX": (MLX, f"{Q}.weight", lambda t: ZEROS, "expected weight to be codes of mlx, got F32"),
    "dense too": (NVFP4, f"{Q}.weight", lambda t: ZEROS, rf"{DENSE} weight_packed of nvfp4-pack-quantized, got both"),
    "no scale of FP8": (
        FP8,
        f"{E}.2.up_proj.weight_scale_inv",
        None,
        "expected the tensor weight_scale_inv of fp8 too",
    ),
    "shape of FP8": (FP8, f"{E}.2.up_proj.weight_scale_inv", lambda t: t[:1], r"\[2, 1\], got float32 \[1, 1\]"),
    "NaN of FP8": (
        FP8,
        f"{E}.2.up_proj.weight",
        lambda t: (t.view(torch.uint8) | 127).view(t.dtype),
        "expected weight to be E4M3 codes of numbers, got NaN or infinity",
    ),
    "dtype of FP8": (FP8, f"{E}.2.up_proj.weight", lambda t: t.float(), "expected weight to be codes of fp8, got F32"),
    "INT8": (("llama", "int-quantized"), f"{Q}.weight_scale", lambda t: t * float("nan"), "weight_scale to be finite"),
    "GPTQ's dense too": (("llama", "gptq"), f"{Q}.weight", lambda t: ZEROS, f"{DENSE} qweight of gptq, got both"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_tensors(case: str, tmp_path: pathlib.Path) -> None:
    (family, kind), name, made, message = BAD[case]
    checkpoint = packed_models.save(tmp_path, family, kind)
    change(checkpoint, name, made or (lambda t: None))
    with pytest.raises(ValueError, match=message) as raised:
        load(checkpoint.path)
    assert "model.safetensors" in str(raised.value)
    weight = re.sub(r"(\.weight(_\w+)?|[._]scales|_blocks)$", "", name)
    assert weight in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_layer_without_a_weight_is_an_error(tmp_path: pathlib.Path) -> None:
    """transformers would draw the weight at random, and go on."""
    checkpoint = packed_models.save(tmp_path, *NVFP4)
    tensors = {name: t for name, t in checkpoint.tensors.items() if not name.startswith(f"{Q}.")}
    renamed = {name.replace(Q, Q + "s"): t for name, t in checkpoint.tensors.items()}
    for changed, message in (
        (tensors, "found none$"),
        (renamed, f"found none; the model has no place for {Q}s.weight"),
    ):
        save_file(changed, checkpoint.path / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=f"model.safetensors: expected the weights {Q}.weight too, {message}"):
            load(checkpoint.path)


@pytest.mark.parametrize(
    ("dtype", "scale"), [(torch.float8_e4m3fn, None), (torch.float8_e4m3fn, (8, 8)), (torch.int8, (64, 1))]
)
def test_codes_that_are_not_read_are_an_error(
    dtype: torch.dtype, scale: tuple[int, int] | None, tmp_path: pathlib.Path
) -> None:
    checkpoint = packed_models.save(tmp_path, "llama", "nvfp4-pack-quantized", keep="self_attn")
    tensors = {**checkpoint.tensors, f"{Q}.weight": checkpoint.tensors[f"{Q}.weight"].to(dtype)}
    if scale is not None:
        tensors[f"{Q}.weight_scale"] = torch.ones(scale)
    save_file(tensors, checkpoint.path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"{Q}.weight: expected (values, or codes with|weight to be codes)"):
        load(checkpoint.path)


@pytest.mark.parametrize("key", ["transform_config", "sparsity_config"])
def test_configurations_that_change_the_product(key: str, tmp_path: pathlib.Path) -> None:
    for i, value in enumerate((None, {}, {"config_groups": {}, "format": "dense"})):
        checkpoint = packed_models.save(tmp_path / str(i), *NVFP4, changed={key: value})
        load(checkpoint.path)
    changed = {key: {"config_groups": {"R4": {}}, "format": "sparse-24-bitmask"}}
    checkpoint = packed_models.save(tmp_path / "refused", *NVFP4, changed=changed)
    with pytest.raises(ValueError, match="not supported"):
        load(checkpoint.path)


def test_a_truncated_file(tmp_path: pathlib.Path) -> None:
    checkpoint = packed_models.save(tmp_path, *NVFP4)
    file = checkpoint.path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors: truncated or damaged"):
        load(checkpoint.path)


@pytest.mark.parametrize(
    ("kind", "changed", "message"),
    [
        ("mlx", {"bits": 3}, "8 bits, got 3, .*load the model's original checkpoint"),
        ("mlx", {"mode": "nvfp4", "group_size": 16}, "expected the mode affine, got nvfp4"),
        ("auto-round", {"packing_format": "auto_round:llm_compressor"}, "packing_format auto_round:auto_gptq or"),
        ("gptq", {"bits": 3}, "4 or 8 bits, got 3, .*load the model's original checkpoint"),
        ("awq", {"bits": 2}, "4 bits, got 2, .*load the model's original checkpoint"),
        ("awq", {"version": "gemv"}, "gemm"),
        ("awq", {"quant_method": "aqlm"}, "not supported"),
        ("modelopt", {"quant_algo": "W8A8"}, "W8A8"),
        ("awq", {"quant_method": "unheard-of"}, "unheard-of"),
    ],
)
def test_formats_that_are_not_served(kind: str, changed: dict[str, Any], message: str, tmp_path: pathlib.Path) -> None:
    checkpoint = packed_models.save(tmp_path, "llama", kind, changed=changed)
    (checkpoint.path / "model.safetensors").write_bytes(b"not read")
    with pytest.raises(ValueError, match=message):
        load(checkpoint.path)


def test_layers_that_are_4bit_in_the_checkpoint_are_not_skipped(tmp_path: pathlib.Path) -> None:
    checkpoint = packed_models.save(tmp_path, *NVFP4)
    load(checkpoint.path, skip_modules=["lm_head"])
    message = (
        r"^skip_modules: expected layers that are dense in this nvfp4-pack-quantized checkpoint, got .*_proj \(6 in"
    )
    with pytest.raises(ValueError, match=message):
        load(checkpoint.path, skip_modules=["mlp"])
    with pytest.raises(ValueError, match="^embeddings: expected False for a nvfp4-pack-quantized checkpoint"):
        load(checkpoint.path, embeddings=True)


def test_a_missing_file_is_named(tmp_path: pathlib.Path) -> None:
    model = load(packed_models.save(tmp_path, *NVFP4).path)
    model.save_pretrained(tmp_path / "saved", max_shard_size="60KB")
    file = sorted((tmp_path / "saved").glob("*.safetensors"))[1]
    assert same_state(load(tmp_path / "saved"), model)
    file.unlink()
    with pytest.raises(ValueError, match=f"{file.name}: expected this file of the checkpoint, found none"):
        load(tmp_path / "saved")


def sharded(checkpoint: packed_models.Checkpoint) -> tuple[pathlib.Path, pathlib.Path]:
    """Distributes the tensors to two files and returns these. The index beside them is complete."""
    names = [f"model-0000{i + 1}-of-00002.safetensors" for i in range(2)]
    keys = [*checkpoint.tensors]
    parts = keys[: len(keys) // 2], keys[len(keys) // 2 :]
    for name, part in zip(names, parts, strict=True):
        save_file({key: checkpoint.tensors[key] for key in part}, checkpoint.path / name, {"format": "pt"})
    (checkpoint.path / "model.safetensors").unlink()
    places = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (checkpoint.path / "model.safetensors.index.json").write_text(json.dumps(index))
    return checkpoint.path / names[0], checkpoint.path / names[1]


def test_a_tensor_in_two_files(tmp_path: pathlib.Path) -> None:
    """transformers takes the last one."""
    checkpoint = packed_models.save(tmp_path, *NVFP4)
    first, second = sharded(checkpoint)
    load(checkpoint.path)
    tensors = load_file(second)
    key = next(iter(load_file(first)))
    save_file({**tensors, key: checkpoint.tensors[key] + 1}, second, {"format": "pt"})
    message = rf"{second.name}: expected each tensor in one file, found {key}, which \S*{first.name} has too$"
    with pytest.raises(ValueError, match=message):
        load(checkpoint.path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "expected an object"),
        ("{}", "metadata"),
        ('{"metadata": {}, "weight_map": 3}', "weight_map"),
        ('{"metadata": {}, "weight_map": {}}', "expected the names of the checkpoint's tensors, found none"),
        ('{"metadata": {}, "weight_map": {"a.weight": 3}}', "expected the name of a file for a.weight, got 3"),
        (
            '{"metadata": {}, "weight_map": {"a.weight": "absent.safetensors"}}',
            "absent.safetensors: expected this file of the checkpoint, found none",
        ),
    ],
)
def test_a_damaged_index(text: str, message: str, tmp_path: pathlib.Path) -> None:
    checkpoint = packed_models.save(tmp_path, *NVFP4)
    sharded(checkpoint)
    (checkpoint.path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=message) as raised:
        load(checkpoint.path)
    assert "safetensors" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_experts_in_one_tensor(tmp_path: pathlib.Path) -> None:
    """Their layout depends on the program that fused them, so they are rejected by name."""
    checkpoint = packed_models.save(tmp_path, "qwen3_moe", "modelopt")
    tensors = {name: t for name, t in checkpoint.tensors.items() if ".experts." not in name}
    for layer in range(2):
        for stack, parts in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
            for tensor, end in (("weight", ""), ("weight_scale", "_weight_scale")):
                prefix = f"model.layers.{layer}.mlp.experts"
                experts = [
                    torch.cat([checkpoint.tensors[f"{prefix}.{e}.{part}.{tensor}"] for part in parts]) for e in range(4)
                ]
                tensors[f"{prefix}.{stack}{end}"] = torch.stack(experts)
    save_file(tensors, checkpoint.path / "model.safetensors", {"format": "pt"})
    message = (
        r"experts\.\w+_proj: expected the modelopt weights of each expert in tensors of their own, .* got those of 4 "
        r"experts in one tensor, which is not supported; load the model's original checkpoint"
    )
    with pytest.raises(ValueError, match=message):
        load(checkpoint.path)


@pytest.mark.parametrize(
    "kind", ["nvfp4-pack-quantized", "gptq", "modelopt", "mlx", "fp8", "float-quantized", "int-quantized"]
)
def test_codes_without_a_configuration(kind: str, tmp_path: pathlib.Path) -> None:
    """transformers reports mismatched or missing weights, and may go on with random ones."""
    checkpoint = packed_models.save(tmp_path, "llama", kind)
    configured(checkpoint, quantization_config=None)
    with pytest.raises(ValueError, match=r"model.safetensors: expected dense weights, .* the codes model\.layers"):
        load(checkpoint.path)
