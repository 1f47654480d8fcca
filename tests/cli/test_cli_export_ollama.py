"""``qlora-ext export --to ollama``: the Modelfile, and its chat template as Ollama renders it."""

from __future__ import annotations

import pathlib
import re
import shutil
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig

from commands import Paths, here
from exports import Refused, adapt, read
from gguf_files import WIDE, WITH_BYTES, finish, tensors_of, writer_of
from go_templates import render
from qlora_app.exporting import chat_template, modelfile

CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nYou are helpful<|im_end|>\n"
    "{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ '<eos>' }}{% for m in messages %}<|start|>{{ m.role }}<|end|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}"
)
GEMMA = (
    "{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set first = '' %}{% endif %}"
    "{% for m in messages %}<start>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ first if loop.first else '' }}{{ m.content | trim }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<start>model\n{% endif %}"
)
INSTRUCT = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}"
    "{% elif m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
FITTING = {"chatml": CHATML, "llama3": LLAMA3, "gemma": GEMMA, "instruct": INSTRUCT}
# The system message goes to the last question; answers are numbered; the date is in it; Go's delimiters are in it.
UNFIT = {
    "last": "{% for m in messages %}{% if m.role == 'user' %}<u>{{ messages[0].content if loop.last and "
    "messages[0].role == 'system' else '' }}{{ m.content }}{% elif m.role == 'assistant' %}<a>{{ m.content }}"
    "{% endif %}{% endfor %}<a>",
    "numbered": "{% for m in messages %}<{{ m.role }}{{ loop.index }}>{{ m.content }}{% endfor %}<assistant>",
    "date": CHATML + "{{ strftime_now('%d %b %Y') }}",
    "braces": CHATML.replace("helpful", "{{ '{{' }}helpful"),
    "quotes": CHATML.replace("helpful", '"""helpful'),
}
CONVERSATION = [
    {"role": "system", "content": "Answer in\ntwo lines."},
    {"role": "user", "content": "Why is the sky blue?"},
    {"role": "assistant", "content": "Rayleigh scattering:\nshort waves scatter more."},
    {"role": "user", "content": 'And the sea? It is "blue" too.'},
]


@pytest.fixture
def tokenizer(paths: Paths) -> Any:
    return AutoTokenizer.from_pretrained(paths["model"])


@pytest.mark.parametrize("name", FITTING)
def test_the_template_is_the_models(tokenizer: Any, name: str) -> None:
    tokenizer.chat_template = FITTING[name]
    found = chat_template.fit(tokenizer)
    assert found is not None
    for begin in (1, 0) if name != "instruct" else (1,):
        for end in (2, 4):
            messages = CONVERSATION[begin:end]
            expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            assert render(found.go, messages) == expected, found.go


@pytest.mark.parametrize("name", UNFIT)
def test_other_templates_do_not_fit(tokenizer: Any, name: str) -> None:
    tokenizer.chat_template = UNFIT[name]
    assert chat_template.fit(tokenizer) is None


def test_a_beginning_that_the_tokenizer_adds_is_left_out(paths: Paths) -> None:
    from tokenizers import processors

    tokenizer = AutoTokenizer.from_pretrained(paths["model"])
    tokenizer.bos_token = "<eos>"
    tokenizer.chat_template = LLAMA3
    kept = chat_template.fit(tokenizer)
    assert kept is not None
    assert kept.go.startswith("<eos>") or "<eos>" in kept.go
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<eos> $A", special_tokens=[("<eos>", tokenizer.convert_tokens_to_ids("<eos>"))]
    )
    left_out = chat_template.fit(tokenizer)
    assert left_out is not None
    assert "<eos>" not in left_out.go


def test_the_lines_of_a_modelfile(tokenizer: Any) -> None:
    tokenizer.chat_template = CHATML
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>", "<|im_start|>"]})
    config = GenerationConfig(
        do_sample=True, temperature=0.6, top_p=0.9, top_k=20, repetition_penalty=1.1, eos_token_id=[256]
    )
    text, notes = modelfile.text(pathlib.PurePath("model.gguf"), None, tokenizer, config, "a model")
    assert notes == []
    lines = text.splitlines()
    assert "FROM ./model.gguf" in lines
    assert "ADAPTER" not in text
    assert sorted(line for line in lines if line.startswith("PARAMETER")) == [
        "PARAMETER repeat_penalty 1.1",
        'PARAMETER stop "<eos>"',
        'PARAMETER stop "<|im_end|>"',
        "PARAMETER temperature 0.6",
        "PARAMETER top_k 20",
        "PARAMETER top_p 0.9",
    ]
    found = re.search(r'TEMPLATE """(.*)"""', text, flags=re.DOTALL)
    assert found
    assert render(found[1], CONVERSATION) == tokenizer.apply_chat_template(
        CONVERSATION, tokenize=False, add_generation_prompt=True
    )
    greedy = GenerationConfig(do_sample=False)
    text, _ = modelfile.text(pathlib.PurePath("/a b/base.gguf"), "adapter.gguf", tokenizer, greedy, "a model")
    assert "FROM /a b/base.gguf\nADAPTER ./adapter.gguf\n" in text
    assert "temperature" not in text
    for template in (None, UNFIT["numbered"]):
        tokenizer.chat_template = template
        text, notes = modelfile.text(pathlib.PurePath("model.gguf"), None, tokenizer, greedy, "a model")
        assert "TEMPLATE" not in text
        assert len(notes) == 1
        assert "TEMPLATE" in notes[0]
        assert ("has no chat template" in notes[0]) == (template is None)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """An adapter whose base is a GGUF file with a chat template."""
    directory = tmp_path_factory.mktemp("ollama")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**{**WIDE, **WITH_BYTES}), dtype=torch.float32)
    writer = writer_of(model.config, directory / "base.gguf", "llama")
    writer.add_chat_template(CHATML)
    for name, values in tensors_of(model).items():
        writer.add_tensor(name, values)
    finish(writer)
    adapt(directory / "adapter", directory / "base.gguf", read(directory / "base.gguf"), target_modules=["q_proj"])
    return directory / "adapter"


@pytest.mark.parametrize("to", ["ollama", "ollama:q4_0", "ollama:adapter"])
def test_the_directory(adapter: pathlib.Path, tmp_path: pathlib.Path, to: str) -> None:
    output = tmp_path / "out"
    printed = here("export", "--check", "none", "--adapter", adapter, "--to", to, "--output", output)
    name = "adapter.gguf" if to.endswith("adapter") else "model.gguf"
    assert sorted(path.name for path in output.iterdir()) == sorted([name, "Modelfile", "qlora_output.json"])
    text = (output / "Modelfile").read_text()
    if to.endswith("adapter"):
        assert f"FROM {adapter.parent / 'base.gguf'}\nADAPTER ./adapter.gguf\n" in text
    else:
        assert "FROM ./model.gguf\n" in text
    assert 'TEMPLATE """' in text
    assert f"ollama create NAME -f {output / 'Modelfile'}" in printed
    gguf = "gguf-adapter" if to.endswith("adapter") else f"gguf:{to.partition(':')[2] or 'q8_0'}"
    here("export", "--adapter", adapter, "--to", gguf, "--output", tmp_path / "alone.gguf", "--check", "none")
    assert (tmp_path / "alone.gguf").read_bytes() == (output / name).read_bytes()
    here("export", "--adapter", adapter, "--to", to, "--output", output, "--overwrite", "--check", "none")


def test_what_is_rejected(
    refused: Refused, finished_run: pathlib.Path, adapter: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    to = ["--output", tmp_path / "no", "--to"]
    message = refused("export", "--adapter", finished_run, *to, "ollama:adapter")
    assert "expected an adapter whose base is a GGUF file" in message
    odd = tmp_path / "new\nline"
    shutil.copytree(adapter.parent, odd)
    message = refused("export", "--adapter", odd / "adapter", "--model", odd / "base.gguf", *to, "ollama:adapter")
    assert "a Modelfile cannot name" in message
    assert not (tmp_path / "no").exists()
