"""Tiny models whose checkpoints store weights in packed formats, and their dense forms."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import safetensors.torch as safetensors
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV4Config,
    GptOssConfig,
    LlamaConfig,
    MiniMaxM2Config,
    MixtralConfig,
    Qwen3MoeConfig,
)

import checkpoint_samples as samples
from checkpoint_samples import Sample, kind_of
from qlora_ext import QLoRAConfig
from qlora_ext.integrations.transformers import save_in_our_format
from tensors import same_bits
from tiny_models import same_state

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=96, head_dim=16
    ),
    "deepseek_v3": lambda: DeepseekV3Config(
        **SIZES | {"num_key_value_heads": 4},
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=96,
        first_k_dense_replace=1,
        n_group=2,
        topk_group=1,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=16,
    ),
    "deepseek_v4": lambda: DeepseekV4Config(
        **SIZES | {"num_key_value_heads": 1},
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=96,
        head_dim=32,
        q_lora_rank=32,
        o_groups=2,
        o_lora_rank=32,
        index_n_heads=2,
        index_head_dim=16,
        index_topk=4,
        hc_mult=2,
        sliding_window=8,
    ),
    "minimax_m2": lambda: MiniMaxM2Config(**SIZES, num_local_experts=4, num_experts_per_tok=2, head_dim=16),
    "gpt_oss": lambda: GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, head_dim=16, sliding_window=8),
}
IDS = torch.randint(3, 128, (2, 6), generator=torch.Generator().manual_seed(1))


def _moderate(sample: Sample) -> Sample:
    """The sample with scales such that its values are below 1, as a model needs them."""
    tensors = dict(sample.tensors)
    largest = 1 << kind_of(sample)[1].bits - 4  # of the codes, relative to 4 bits
    for name in ("scales", "weight_scale", "weight_scale_inv", "scale", "biases"):
        t = tensors.get(name)
        if t is None:
            continue
        if t.dtype in (torch.uint8, torch.float8_e8m0fnu):  # E8M0
            tensors[name] = ((112 if largest > 1 else 117) + t.view(torch.uint8) % 5).view(t.dtype)
        elif t.dtype == torch.float8_e4m3fn:
            tensors[name] = (t.view(torch.uint8) % 16 + 48).view(torch.float8_e4m3fn)
        else:
            tensors[name] = ((torch.rand(t.shape) * 0.02 + 0.01) / largest).to(t.dtype)
    return dataclasses.replace(sample, tensors=tensors)


def _nvfp4(sample: Sample, name: str, factor: float) -> Sample:
    """The sample with a global scale of its own near ``factor``."""
    tensors = _moderate(sample).tensors
    own = torch.tensor(factor * (1 + 0.3 * torch.rand(()).item())).reshape(tensors[name].shape)
    return dataclasses.replace(sample, tensors={**tensors, name: own})


# Formats for weights that a checkpoint stores one by one.
FORMATS: dict[str, Callable[[Any], Sample]] = {
    "mxfp4-pack-quantized": lambda shape: _moderate(samples.compressed_mxfp4(shape)),
    "nvfp4-pack-quantized": lambda shape: _nvfp4(samples.compressed_nvfp4(shape), "weight_global_scale", 40.0),
    "pack-quantized": lambda shape: _moderate(samples.packed(shape)),
    "pack-quantized-channel": lambda shape: _moderate(samples.packed(shape, None)),
    "pack-quantized-zero-points": lambda shape: _moderate(samples.packed(shape, symmetric=False)),
    "modelopt": lambda shape: _nvfp4(samples.modelopt(shape), "weight_scale_2", 0.02),
    "awq": lambda shape: _moderate(samples.awq(shape, 32)),
    "gptq": lambda shape: _moderate(samples.gptq(shape, 32)),
    "gptq-v2-zero-points": lambda shape: _moderate(samples.gptq(shape, 32, symmetric=False, version=2)),
    "gptq-order": lambda shape: _moderate(samples.gptq(shape, 32, symmetric=False, desc_act=True)),
    "auto-round": lambda shape: _moderate(samples.auto_round(samples.gptq(shape, 32))),
    "mlx": lambda shape: _moderate(samples.mlx(shape, 32)),
    "mlx-6": lambda shape: _moderate(samples.mlx(shape, 32, bits=6)),
    "gptq-8": lambda shape: _moderate(samples.gptq(shape, 32, bits=8)),
    "int-quantized": lambda shape: _moderate(samples.int8(shape)),
    "fp8": lambda shape: _moderate(samples.fp8(shape, (48, 64))),  # tiles that end within the tiny weights
    "fp8-128": lambda shape: _moderate(samples.fp8(shape)),
    "fp8-static": lambda shape: _moderate(samples.fp8(shape, None)),
    "fp8-e8m0": lambda shape: _moderate(samples.fp8(shape, (48, 64), torch.float8_e8m0fnu, name="scale")),
    "fp8-fp4": lambda shape: _moderate(samples.deepseek_fp4(shape)),
    "float-quantized": lambda shape: _moderate(samples.float_quantized(shape)),
    "modelopt-fp8": lambda shape: _moderate(samples.modelopt_fp8(shape)),
}
# The names of the weights that are 4-bit in the checkpoints.
_LINEAR = r"(proj|w[123])\.weight$"
_STACKS = re.compile(r"experts\.(gate_up|down)_proj$")
# gpt-oss' experts. In formats other than its own MXFP4, checkpoints store them one by one.
_IN_STACKS = re.compile(r"experts\.(gate_up|down)_proj(_bias)?$")


def build(family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A dense model with distinct weights, and nonzero biases."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[family](), dtype=dtype)
    for name, p in model.named_parameters():
        if name.endswith("bias") or name.endswith("sinks"):
            torch.nn.init.normal_(p, std=0.1)
    return model.eval()


@dataclasses.dataclass
class Checkpoint:
    """A directory with a packed checkpoint, its tensors, its quantization_config, and the dense model in float32."""

    path: pathlib.Path
    tensors: dict[str, Tensor]
    config: dict[str, Any]
    dense: Any


def _one_by_one(name: str, t: Tensor, made: Callable[[Any], Sample] | None) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of the experts in gpt-oss' stack ``name``, and the stack of their values.

    Args:
        made: makes a sample of a shape; None: the weights are dense.
    """
    prefix, _, stack = name.rpartition(".")
    is_bias, parts = stack.endswith("_bias"), ("gate", "up") if stack.startswith("gate_up") else ("down",)
    rows = (t if is_bias else t.transpose(1, 2)).to(torch.bfloat16).float().contiguous()
    found = {}
    for e, matrix in enumerate(rows):
        for i, part in enumerate(parts):  # rows of gate and up alternate
            own, to = matrix[i :: len(parts)], f"{prefix}.{e}.{part}_proj."
            if is_bias or made is None:
                found[to + ("bias" if is_bias else "weight")] = own.clone()
                continue
            sample = made(tuple(own.shape))
            found |= {to + tensor: value for tensor, value in sample.tensors.items()}
            own.copy_(torch.from_numpy(sample.values))
    return found, rows if is_bias else rows.transpose(1, 2).contiguous()


def save(
    directory: pathlib.Path,
    family: str,
    kind: str,
    keep: str = "$^",
    changed: Mapping[str, Any] | None = None,
    packed: str = _LINEAR,
    experts: str | None = None,
) -> Checkpoint:
    """Saves a tiny model in the format ``kind``.

    Args:
        keep: a regular expression of names in the files; weights that it matches stay dense.
        changed: fields of the quantization_config.
        packed: a regular expression of names in the files; weights that it matches are packed.
        experts: the format of the experts, if they have another one.
    """
    model = build(family)
    plain = directory / "dense"
    model.save_pretrained(plain)
    tensors: dict[str, Tensor] = {}
    decoded: dict[str, Tensor] = {}
    config: dict[str, Any] = {}
    torch.manual_seed(1)
    for name, t in safetensors.load_file(plain / "model.safetensors").items():
        is_stack = bool(_STACKS.search(name))
        if kind != "mxfp4" and _IN_STACKS.search(name):
            of_experts, decoded[name] = _one_by_one(name, t, None if re.search(keep, name) else FORMATS[kind])
            tensors |= of_experts
            continue
        if re.search(keep, name) or not (is_stack or re.search(packed, name)) or (kind == "mxfp4") != is_stack:
            tensors[name] = decoded[name] = t.to(torch.bfloat16).float() if t.is_floating_point() else t
            continue
        if is_stack:  # the rows of the file's matrices are the columns of the model's
            sample = _moderate(samples.mxfp4((t.shape[0], t.shape[2], t.shape[1])))
            decoded[name] = torch.from_numpy(sample.values).transpose(1, 2).contiguous()
        else:
            sample = FORMATS[experts if experts and ".experts." in name else kind](tuple(t.shape))
            decoded[name] = torch.from_numpy(sample.values)
        prefix = f"{name}_" if is_stack else name.removesuffix("weight")
        tensors |= {prefix + tensor: value for tensor, value in sample.tensors.items()}
        config = sample.config
    config = {**config, **(changed or {})}
    if kind.startswith("mlx"):
        del config["quant_method"]  # MLX does not write it
    safetensors.save_file(
        {k: t.contiguous() for k, t in decoded.items()}, plain / "model.safetensors", {"format": "pt"}
    )
    path = directory / "packed"
    path.mkdir()
    safetensors.save_file({k: t.contiguous() for k, t in tensors.items()}, path / "model.safetensors", {"format": "pt"})
    fields = json.loads((plain / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**fields, "quantization_config": config}))
    (path / "generation_config.json").write_text((plain / "generation_config.json").read_text())
    dense = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    return Checkpoint(path, tensors, config, dense)


def save_large(path: pathlib.Path, config: Any, kind: str) -> None:
    """Saves a checkpoint with 4-bit layers of random codes. No dense form of them is computed."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    tensors: dict[str, Tensor] = {}
    fields: dict[str, Any] = {}
    for name, t in model.state_dict().items():
        if _STACKS.search(name) and kind == "mxfp4":
            made = {f"{name}_": _moderate(samples.mxfp4((t.shape[0], t.shape[2], t.shape[1])))}
        elif _STACKS.search(name):
            module, _, stack = name.rpartition(".")
            parts = ("gate", "up") if stack.startswith("gate_up") else ("down",)
            shape = (t.shape[1] // len(parts), t.shape[2])
            names = [f"{module}.{e}.{part}_proj." for e in range(t.shape[0]) for part in parts]
            made = {name: FORMATS[kind](shape) for name in names}
        elif re.search(_LINEAR, name) and kind != "mxfp4":
            made = {name.removesuffix("weight"): FORMATS[kind](tuple(t.shape))}
        else:
            tensors[name] = torch.zeros(t.shape, dtype=t.dtype)
            continue
        for prefix, sample in made.items():
            fields = sample.config
            tensors |= {prefix + tensor: value for tensor, value in sample.tensors.items()}
    path.mkdir(parents=True)
    safetensors.save_file({k: t.contiguous() for k, t in tensors.items()}, path / "model.safetensors", {"format": "pt"})
    stored = {**config.to_dict(), "architectures": [type(model).__name__], "quantization_config": fields}
    (path / "config.json").write_text(json.dumps(stored))


def load(path: pathlib.Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, quantization_config=QLoRAConfig(**options), device_map="cpu"
    )


def same_tensors(path: pathlib.Path, expected: dict[str, Tensor]) -> bool:
    found = safetensors.load_file(path / "model.safetensors")
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    return same_bits(found, expected)


def configured(checkpoint: Checkpoint, **fields: Any) -> None:
    """Saves the configuration again with other fields; without those that are None."""
    path = checkpoint.path / "config.json"
    fields = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({name: value for name, value in fields.items() if value is not None}))


def check_saved(model: Any, path: pathlib.Path, checkpoint: Checkpoint) -> None:
    """The model is saved with the tensors of its checkpoint."""
    model.save_pretrained(path)
    assert same_tensors(path, checkpoint.tensors)


def check_our_format(model: Any, path: pathlib.Path) -> None:
    """The model is saved in our format, loads with the same bits, and can be streamed."""
    save_in_our_format(model)
    model.save_pretrained(path)
    again = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, device_map="cpu")
    assert same_state(again, model)
    assert torch.equal(load(path, stream="disk")(IDS).logits, model(IDS).logits)


def change(checkpoint: Checkpoint, name: str, made: Any) -> None:
    """Saves the checkpoint again with a tensor replaced by ``made`` of it; without it if that is None."""
    tensors = dict(checkpoint.tensors)
    value = made(tensors.pop(name, None))
    if value is not None:
        tensors[name] = value
    safetensors.save_file(
        {k: t.contiguous() for k, t in tensors.items()}, checkpoint.path / "model.safetensors", {"format": "pt"}
    )
