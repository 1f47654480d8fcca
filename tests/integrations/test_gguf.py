"""Models of GGUF files: weights of the types that we pack keep their bits, and others are those of transformers."""

from __future__ import annotations

import collections
import copy
import inspect
import pathlib
import pickle
import sys
import warnings
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS
from transformers.quantizers.auto import get_hf_quantizer

import qlora_ext
from gguf_files import WIDE, four_bit_file, llama_file, write
from load_memory import peak_of_loading
from qlora_ext import QLoRAConfig
from qlora_ext.form import Form
from qlora_ext.gguf import GGUFWeights, blocks, read_header
from qlora_ext.gguf.rows import find_rows
from qlora_ext.nn import Embedding4bit, Experts4bit, Linear4bit, TiedLinear4bit, layers_of
from tiny_models import same_state, token_ids

__all__ = ["four_bit_file", "llama_file"]  # fixtures

EXPERTS = {"head_dim": 64, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 768}
CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**WIDE),
    "qwen3moe": lambda: Qwen3MoeConfig(**{**WIDE, "num_hidden_layers": 1}, **EXPERTS),
}

needs_quantizers = pytest.mark.skipif(
    "gguf_file" not in inspect.signature(get_hf_quantizer).parameters,
    reason="transformers hands GGUF files to no quantizer",
)


def reader(path: pathlib.Path) -> GGUFWeights:
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path.parent, gguf_file=path.name))
    return GGUFWeights(path, skeleton)


def made(family: str, path: pathlib.Path, **options: Any) -> GGUFWeights:
    """A file with a tiny model of the family."""
    torch.manual_seed(0)
    write(AutoModelForCausalLM.from_config(CONFIGS[family](), dtype=torch.float32), path, family, **options)
    return reader(path)


def decoded(w4: Any) -> torch.Tensor:
    if len(w4.shape) == 2:
        return w4.dequantize(torch.float32)
    return torch.stack([w4.matrix(e).dequantize(torch.float32) for e in range(w4.shape[0])])


def dense(path: pathlib.Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model as transformers reads it."""
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)


@pytest.mark.parametrize("kind", blocks.KINDS)
@pytest.mark.parametrize("family", CONFIGS)
def test_every_weight_is_read_as_transformers_reads_it(family: str, kind: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.gguf"
    weights = made(family, path, kinds=[kind])
    for name, value in dense(path).state_dict().items():
        assert torch.equal(weights.decode(name), value), name
        assert torch.equal(weights.decode(name, torch.bfloat16), value.bfloat16()), name
        if value.ndim > 1:
            assert torch.equal(decoded(weights.stored(name)), value), name
        else:
            with pytest.raises(ValueError, match="expected a weight stored in one of the types Q4_0, Q4_1"):
                weights.stored(name)


def test_layers_keep_the_bits_of_the_file(four_bit_file: pathlib.Path) -> None:
    weights = reader(four_bit_file)
    model = weights.load(quantization_config=QLoRAConfig(), dtype=torch.bfloat16)
    expected = dense(four_bit_file).state_dict()
    stored = [t.type_name for t in read_header(four_bit_file).tensors if t.type_name in blocks.KINDS]
    assert {*stored} == {*blocks.KINDS}
    layers = [*layers_of(model)]
    assert {layer.form for _, layer in layers} == {blocks.form_of(kind) for kind in stored}
    for name, layer in layers:
        assert type(layer) is (Embedding4bit if name == "model.embed_tokens" else Linear4bit)
        assert layer.weight_dtype == torch.bfloat16
        assert torch.equal(layer.weight4bit.dequantize(torch.float32), expected.pop(f"{name}.weight")), name
    assert len(layers) == len(stored)
    state = model.state_dict()
    assert all(torch.equal(state[name], value.bfloat16()) for name, value in expected.items())
    assert not any(p.requires_grad for _, layer in layers for p in layer.parameters())
    counts = collections.Counter(stored)
    assert all(f"{count} {kind} as stored" in weights.summary for kind, count in counts.items())
    share = 2 * state["model.layers.1.mlp.gate_proj.weight"].numel() / model.get_memory_footprint()
    assert f"1 IQ3_XXS decoded ({share:.1%} of the memory)" in weights.summary
    assert "5 F32 dense" in weights.summary


def test_named_modules_stay_dense_and_the_rest_becomes_nf4(four_bit_file: pathlib.Path) -> None:
    weights = reader(four_bit_file)
    config = QLoRAConfig(skip_modules=["lm_head", "q_proj"])
    model = weights.load(quantization_config=config, dtype=torch.float32)
    expected = dense(four_bit_file)
    kinds = {t.name: t.type_name for t in read_header(four_bit_file).tensors}
    nf4 = kept = 0
    for name, layer in layers_of(model):
        w4, w = layer.packed_weight(), expected.get_submodule(name).weight
        if isinstance(w4, qlora_ext.NF4Weight):
            nf4 += 1
            assert torch.equal(w4.dequantize(), qlora_ext.quantize_nf4(w).dequantize())
        else:
            kept += 1
            assert torch.equal(w4.dequantize(torch.float32), w)
    others = sum(
        kind not in blocks.KINDS for name, kind in kinds.items() if name.startswith("blk.") and "norm" not in name
    )
    assert nf4 == others > 0
    assert nf4 + kept == 2 * 6 + 1
    assert f"{nf4} IQ3_XXS quantized to NF4" in weights.summary
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, expected.model.layers[0].self_attn.q_proj.weight)


@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "Q6_K", "F16"])
def test_embeddings(kind: str, embeddings: bool, tmp_path: pathlib.Path) -> None:
    """Tables and heads stay as stored, or become NF4 if the user asks for it."""
    weights = made("llama", tmp_path / "a.gguf", kinds=["Q4_1"], of={"token_embd.weight": kind, "output.weight": kind})
    model = weights.load(quantization_config=QLoRAConfig(embeddings=embeddings), dtype=torch.float32)
    table, expected = model.model.embed_tokens, dense(tmp_path / "a.gguf").model.embed_tokens.weight
    assert type(table) is (torch.nn.Embedding if kind == "F16" and not embeddings else Embedding4bit)
    if kind == "F16" and embeddings:
        expected = qlora_ext.quantize_nf4(expected).dequantize()
    ids = torch.arange(len(expected))
    assert torch.equal(table(ids), expected)
    assert type(model.lm_head) is (torch.nn.Linear if kind == "F16" else Linear4bit)


def test_a_tied_head_is_the_table(tmp_path: pathlib.Path) -> None:
    options = {"kinds": ["F16"], "of": {"token_embd.weight": "Q8_0", "output.weight": None}}
    weights = made("llama", tmp_path / "a.gguf", **options)
    model = weights.load(quantization_config=QLoRAConfig(), dtype=torch.float32)
    assert type(model.lm_head) is TiedLinear4bit
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert weights.summary == "a.gguf: 14 F16 quantized to NF4, 5 F32 dense, 1 Q8_0 as stored"
    assert {layer.form.code for name, layer in layers_of(model) if "layers" in name} == {"nf4"}


def test_a_file_of_floats_is_quantized(tmp_path: pathlib.Path) -> None:
    weights = made("llama", tmp_path / "a.gguf", kinds=["F16", "BF16"])
    model = weights.load(quantization_config=QLoRAConfig(), dtype=torch.float32)
    assert same_state(model, qlora_ext.quantize_model(dense(tmp_path / "a.gguf")))
    assert "7 BF16 quantized to NF4, 7 F16 quantized to NF4" in weights.summary


@pytest.mark.parametrize("served", [None, "q4_0"])
def test_layers_are_quantized_anew(served: str | None, tmp_path: pathlib.Path) -> None:
    weights = made("llama", tmp_path / "a.gguf", kinds=["Q8_0", "Q5_K"])
    config = QLoRAConfig(requantize=True, served=served)
    model = weights.load(quantization_config=config, dtype=torch.float32)
    expected = qlora_ext.quantize_model(dense(tmp_path / "a.gguf"), **Form.named(served or "nf4").keywords)
    for name, layer in layers_of(model):
        if ".layers." in name:
            assert same_state(layer, expected.get_submodule(name)), name
        else:
            assert layer.form == blocks.form_of("Q8_0")
    assert "quantized to" in weights.summary


@pytest.mark.parametrize("kind", ["IQ3_XXS", "IQ2_XXS"])
def test_other_types_are_not_quantized_a_second_time(kind: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.gguf"
    weights = made("llama", path, kinds=[kind], of={"token_embd.weight": "F16", "output.weight": "F16"})
    message = rf"^\S*a\.gguf: blk\.0\.attn_q\.weight: expected one of Q4_0, .* got {kind}, which NF4 would quantize a"
    with pytest.raises(ValueError, match=message):
        weights.load(quantization_config=QLoRAConfig())
    asked = weights.load(quantization_config=QLoRAConfig(skip_modules=["lm_head"]), dtype=torch.float32)
    assert all(layer.form.code == "nf4" for _, layer in layers_of(asked))
    made("llama", path, kinds=["Q4_0"], of={"blk.0.attn_q.weight": kind})
    mixed = reader(path).load(quantization_config=QLoRAConfig(), dtype=torch.float32)
    assert type(mixed.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    assert type(mixed.model.layers[1].self_attn.q_proj) is Linear4bit


def test_experts(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.gguf"
    model = made("qwen3moe", path, kinds=["MXFP4"]).load(quantization_config=QLoRAConfig(), dtype=torch.float32)
    experts, expected = model.model.layers[0].mlp.experts, dense(path).model.layers[0].mlp.experts
    assert type(experts) is Experts4bit
    for name in ("gate_up_proj", "down_proj"):
        assert torch.equal(decoded(experts.packed_weight(name)), getattr(expected, name))


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0"])
def test_the_stacks_of_experts_may_have_different_types(kind: str, tmp_path: pathlib.Path) -> None:
    """As in llama.cpp's Q4_K_M, whose down_proj is in Q6_K in half of the layers."""
    path = tmp_path / "a.gguf"
    weights = made("qwen3moe", path, kinds=["Q4_0"], of={"blk.0.ffn_down_exps.weight": kind})
    model = weights.load(quantization_config=QLoRAConfig(), dtype=torch.float32)
    experts, expected = model.model.layers[0].mlp.experts, dense(path)
    assert experts.forms == {"gate_up_proj": blocks.form_of("Q4_0"), "down_proj": blocks.form_of(kind)}
    for name in experts.forms:
        assert torch.equal(experts.dequantize(name), getattr(expected.model.layers[0].mlp.experts, name))
        assert weights.forms()[f"model.layers.0.mlp.experts.{name}"] == experts.forms[name]
    ids = torch.arange(24).reshape(2, 12)
    logits = model(ids).logits
    torch.testing.assert_close(logits, expected(ids).logits, rtol=1e-4, atol=1e-4)
    assert "gate_up_proj: code=int4" in repr(experts)

    model.save_pretrained(tmp_path / "saved")
    for stream in (None, "disk"):
        again = AutoModelForCausalLM.from_pretrained(
            tmp_path / "saved", quantization_config=QLoRAConfig(stream=stream), dtype=torch.float32, device_map="cpu"
        )
        assert torch.equal(again(ids).logits, logits)
    copied = copy.deepcopy(experts)
    copied.expose()
    copied.load_state_dict(experts.state_dict())
    copied.join()
    assert same_state(copied, experts)


def test_experts_with_a_matrix_of_mixed_types_stay_dense(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.gguf"
    for kind in ("Q4_1", "Q8_0"):
        weights = made("qwen3moe", path, kinds=["Q4_0"], of={"blk.0.ffn_up_exps.weight": kind})
        model = weights.load(quantization_config=QLoRAConfig(), dtype=torch.float32)
        experts, expected = model.model.layers[0].mlp.experts, dense(path).model.layers[0].mlp.experts
        assert same_state(experts, expected)
        assert type(model.model.layers[0].self_attn.q_proj) is Linear4bit


def test_half_of_a_matrix_is_missing(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.gguf"
    weights = made("qwen3moe", path, kinds=["Q4_0"], of={"blk.0.ffn_up_exps.weight": None})
    with pytest.raises(ValueError, match=r"a.gguf: blk.0.ffn_gate_exps.weight: incomplete: expected 3072 rows"):
        weights.load(quantization_config=QLoRAConfig(), dtype=torch.float32)


def test_a_layer_without_a_weight_is_an_error(four_bit_file: pathlib.Path) -> None:
    weights = reader(four_bit_file)
    del weights._parts["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(ValueError, match=r"gguf: expected the weights model\.layers\.1\.mlp\.up_proj\.weight too"):
        weights.load(quantization_config=QLoRAConfig())


DAMAGED = r"a.gguf: blk.0.ffn_gate.weight: expected finite scales, got d = inf in block 1$"


def with_infinite_scale(path: pathlib.Path) -> bytes:
    data = bytearray(path.read_bytes())
    tensor = next(t for t in read_header(path).tensors if t.name == "blk.0.ffn_gate.weight")
    assert tensor.kind == gguf.GGMLQuantizationType.Q4_K
    data[tensor.begin + 144 : tensor.begin + 146] = b"\x00\x7c"
    return bytes(data)


def test_damaged_scales(four_bit_file: pathlib.Path, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(with_infinite_scale(four_bit_file))
    with pytest.raises(ValueError, match=DAMAGED):
        reader(path).load(quantization_config=QLoRAConfig())


@needs_quantizers
@pytest.mark.parametrize("options", [{}, {"skip_modules": ["lm_head", "q_proj"]}, {"embeddings": True}], ids=str)
@pytest.mark.parametrize("file", ["four_bit_file", "llama_file"])
def test_from_pretrained(
    file: str,
    options: dict[str, Any],
    tmp_path: pathlib.Path,
    request: pytest.FixtureRequest,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = request.getfixturevalue(file)
    weights = reader(path)
    expected = weights.load(quantization_config=QLoRAConfig(**options), dtype=torch.bfloat16)
    given = {"gguf_file": path.name, "quantization_config": QLoRAConfig(**options)}
    with caplog.at_level("INFO", "qlora_ext"):
        model = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.bfloat16, **given)
    assert caplog.messages == [weights.summary]
    assert same_state(model, expected)
    assert model.name_or_path == expected.name_or_path == str(path.parent)
    assert [name for name, _ in layers_of(model)] == [name for name, _ in layers_of(expected)]
    model.save_pretrained(tmp_path)
    assert same_state(AutoModelForCausalLM.from_pretrained(tmp_path), model)
    assert AutoModelForCausalLM.from_pretrained(path.parent, **given).dtype == torch.float32
    pickle.dumps(model.config)  # as for another process: it does not hold the file's reader


@needs_quantizers
def test_from_pretrained_with_experts(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.gguf"
    expected = made("qwen3moe", path, kinds=["MXFP4"]).load(quantization_config=QLoRAConfig(), dtype=torch.float32)
    options = {"gguf_file": path.name, "quantization_config": QLoRAConfig()}
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, **options)
    assert same_state(model, expected)
    assert type(model.model.layers[0].mlp.experts) is Experts4bit


@needs_quantizers
def test_from_pretrained_checks_the_file(four_bit_file: pathlib.Path, tmp_path: pathlib.Path) -> None:
    data = four_bit_file.read_bytes()
    options = {"gguf_file": "a.gguf", "quantization_config": QLoRAConfig()}
    for damaged, message in (
        (with_infinite_scale(four_bit_file), DAMAGED),
        (data.replace(b"blk.1.ffn_up.", b"blk.1.ffn_uq."), r"a\.gguf: expected the weights .*layers\.1\.mlp\.up_proj"),
    ):
        (tmp_path / "a.gguf").write_bytes(damaged)
        with pytest.raises(ValueError, match=message):
            AutoModelForCausalLM.from_pretrained(tmp_path, **options)


def test_saved_and_loaded_again(four_bit_file: pathlib.Path, tmp_path: pathlib.Path) -> None:
    model = reader(four_bit_file).load(quantization_config=QLoRAConfig(), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "saved")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert same_state(model, again)
    assert [(name, layer.form) for name, layer in layers_of(again)] == [
        (n, layer.form) for n, layer in layers_of(model)
    ]
    ids = token_ids()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)


def test_rows() -> None:
    def processed(function: Any, shape: tuple[int, ...] = (8, 64)) -> Any:
        return find_rows(lambda values: {"w": torch.from_numpy(np.array(function(values)))}, shape)["w"]

    same = processed(lambda v: v)
    assert (same.numbers, same.stack, same.transposed) == (slice(0, 8), (8,), False)
    swapped = processed(lambda v: np.concatenate(np.split(v, 2)[::-1]))
    assert (swapped.numbers.tolist(), swapped.stack) == ([4, 5, 6, 7, 0, 1, 2, 3], (8,))
    assert processed(lambda v: v.T).transposed
    assert processed(lambda v: v[:, None]).stack == (8, 1)
    lower = processed(lambda v: np.concatenate((np.zeros_like(v), v)))
    assert (lower.numbers, lower.stack) == (slice(8, 16), (16,))
    stack = processed(lambda v: np.concatenate((v, np.zeros_like(v)), axis=1), (2, 4, 64))
    assert (stack.numbers.tolist(), stack.stack) == ([0, 1, 2, 3, 8, 9, 10, 11], (2, 8))
    needs_all = processed(lambda v: v.reshape(2, 4, 64)[::-1].reshape(8, 64))
    assert needs_all.numbers.tolist() == [4, 5, 6, 7, 0, 1, 2, 3]
    for function in (
        lambda v: v - 1,
        lambda v: np.log(-v),
        lambda v: v * 2,
        lambda v: v[:, ::-1],
        lambda v: v[:4],
        lambda v: np.concatenate((v[:4], v[:4])),
        lambda v: v.astype(np.float32),
        lambda v: v.reshape(4, -1),
    ):
        with np.errstate(all="ignore"):
            assert processed(function) is None


@pytest.mark.parametrize(
    ("architecture", "config", "name", "shape"),
    [
        ("llama", {"num_attention_heads": 4, "num_key_value_heads": 2}, "blk.0.attn_q.weight", (64, 32)),
        ("llama", {"num_attention_heads": 4, "num_key_value_heads": 2}, "blk.0.attn_k.weight", (32, 64)),
        ("bloom", {"n_head": 4, "hidden_size": 64}, "blk.0.attn_qkv.weight", (192, 64)),
        ("gpt2", {}, "blk.0.attn_qkv.weight", (192, 64)),
        ("gpt2", {}, "blk.0.ffn_up.weight", (64, 64)),
    ],
)
def test_rows_of_transformers_processors(
    architecture: str, config: dict[str, int], name: str, shape: tuple[int, ...]
) -> None:
    """Moving rows by their numbers has the effect of the processor on values."""
    processor = TENSOR_PROCESSORS[architecture](config=config)

    def process(values: Any) -> dict[str, torch.Tensor]:
        return {"w": torch.from_numpy(np.array(processor.process(values, name=name).weights))}

    rows, values = find_rows(process, shape)["w"], torch.randn(shape)
    out = torch.empty(shape)
    out[rows.numbers] = values
    assert torch.equal(out.T if rows.transposed else out, process(values.numpy())["w"])
    assert rows.transposed == (architecture == "gpt2")


def test_nvfp4_with_a_further_scale(tmp_path: pathlib.Path) -> None:
    """llama.cpp multiplies a tensor's products by NAME.scale, or those of each expert by one of its values."""
    path, plain = tmp_path / "a.gguf", tmp_path / "plain.gguf"
    names = [f"blk.0.{name}" for name in ("attn_q", "ffn_gate_exps", "ffn_down_exps")]
    factors = [[0.7], [0.3, 1.7], [1.1, 0.6]]
    scales = {f"{name}.scale": np.float32(factor) for name, factor in zip(names, factors, strict=True)}
    expected = made("qwen3moe", plain, kinds=["NVFP4"])
    weights = made("qwen3moe", path, kinds=["NVFP4"], more=scales)
    assert weights.unknown == []
    model = weights.load(quantization_config=QLoRAConfig(), dtype=torch.float32)
    layer = model.model.layers[0]
    query = "model.layers.0.self_attn.q_proj.weight"
    w4 = expected.stored(query)
    table = w4.scale_table * torch.tensor(0.7)
    assert torch.equal(layer.self_attn.q_proj.weight4bit.scale_table, table)
    for name in ("gate_up_proj", "down_proj"):  # two tensors make up gate_up_proj, with factors of their own
        w = expected.decode(f"model.layers.0.mlp.experts.{name}")
        factor = torch.ones(2, w.shape[1], 1)
        if name == "down_proj":
            factor *= torch.tensor([1.1, 0.6]).view(2, 1, 1)
        else:
            factor[:, :768] *= torch.tensor([0.3, 1.7]).view(2, 1, 1)
        assert torch.equal(getattr(layer.mlp.experts, name), w * factor)
    tables = expected.stored("model.layers.0.mlp.experts.down_proj").scale_table * torch.tensor([[1.1], [0.6]])
    found = weights.stored("model.layers.0.mlp.experts.down_proj").scale_table
    assert torch.equal(found, tables)
    scale = next(t for t in read_header(path).tensors if t.name == "blk.0.attn_q.scale")
    data = bytearray(path.read_bytes())
    data[scale.begin : scale.begin + 4] = b"\x00\x00\xc0\x7f"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a.gguf: blk.0.attn_q.scale: expected 1 finite factors, got .*nan"):
        reader(path).stored(query)


def test_training_leaves_the_bits_of_the_file(four_bit_file: pathlib.Path) -> None:
    """An adapter on the file's weights gets the gradients of one on the decoded weights."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    ids = token_ids()
    gradients = []
    for model in (
        reader(four_bit_file).load(quantization_config=QLoRAConfig(), dtype=torch.float32),
        dense(four_bit_file),
    ):
        before = {name: t.clone() for name, t in model.state_dict().items()}
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        adapted = peft.get_peft_model(model, config)
        loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        gradients.append({name: p.grad for name, p in adapted.named_parameters() if p.requires_grad})
        torch.optim.SGD(adapted.parameters(), lr=0.1).step()
        after = {name.replace(".base_layer", ""): t for name, t in model.state_dict().items() if "lora_" not in name}
        assert after.keys() == before.keys()
        assert all(torch.equal(t, before[name]) for name, t in after.items())
    ours, expected = gradients
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (ours[name] - gradient).norm() <= 1e-4 * gradient.norm(), name


LARGE: dict[str, tuple[dict[str, Any], list[str], dict[str, str]]] = {
    "llama": (
        {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6, "vocab_size": 8192},
        ["Q4_K"],
        {"token_embd.weight": "Q8_0", "output.weight": "F16"},
    ),
    "qwen3moe": ({**EXPERTS, "hidden_size": 512, "num_hidden_layers": 4, "num_experts": 32}, ["Q4_0"], {}),
}


@pytest.mark.slow
@needs_quantizers
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize("family", LARGE)
def test_loading_takes_the_memory_of_the_model(family: str, tmp_path: pathlib.Path) -> None:
    """At most a tenth more than the larger one of the file and the model, at any time."""
    sizes, kinds, of = LARGE[family]
    config = CONFIGS[family]()
    config.update({"head_dim": 64, "num_attention_heads": sizes["hidden_size"] // 64, **sizes})
    path, small = tmp_path / "large.gguf", tmp_path / "small.gguf"
    write(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), path, family, kinds=kinds, of=of)
    write(AutoModelForCausalLM.from_config(CONFIGS[family]()), small, family, kinds=kinds, of=of)
    peak, footprint = peak_of_loading(path, small)
    size = path.stat().st_size
    assert size > 60e6
    assert peak < 1.1 * max(size, footprint), f"peak {peak >> 20}, file {size >> 20}, model {footprint >> 20} MiB"
