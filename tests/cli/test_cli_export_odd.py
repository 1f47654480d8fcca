"""Exports of adapters with odd contents: what a target holds, it holds exactly; the rest is rejected before writing.

Where an adapter changes one of an output head and the embeddings that are tied to each other, the result has both.
"""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from commands import here
from exports import Refused, adapt, dense, loaded, logits, ours, output_of, read, share, write_base
from qlora_app.main import main
from qlora_ext.gguf.file import read_header
from tensors import error
from tiny_models import save_tiny_llama

Weights = dict[str, torch.Tensor]
Q = ["q_proj"]
# Settings of adapters by what is odd about them.
PLAIN: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"layers.0.self_attn.q_proj": 20}},
    "some layers": {"layers_to_transform": [1]},
}
MERGED: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "tokens": {"trainable_token_indices": {"embed_tokens": [3, 5]}},
    "saved head": {"target_modules": Q, "modules_to_save": ["lm_head"]},
    "LoRA on the embeddings": {"target_modules": [*Q, "embed_tokens"]},
}
# And of adapters on a model that ties head and embeddings: whether the merged model still does.
TIED: dict[str, tuple[dict[str, Any], bool]] = {
    "LoRA on the head": ({"target_modules": [*Q, "lm_head"]}, False),
    "LoRA on the embeddings": ({"target_modules": [*Q, "embed_tokens"]}, False),
    "saved head": ({"target_modules": Q, "modules_to_save": ["lm_head"]}, False),
    "saved embeddings": ({"target_modules": Q, "modules_to_save": ["embed_tokens"]}, False),
    "both saved": ({"target_modules": Q, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
    "neither": ({"target_modules": Q}, True),
    "saved norm": ({"target_modules": Q, "modules_to_save": ["norm"]}, True),
}
DIRECTORIES = {"dense": "transformers", "bitsandbytes": "bitsandbytes", "compressed-tensors:int4": "compressed_tensors"}
FILES = ("gguf-adapter", "gguf:q4_0", "ollama:adapter", "ollama:q8_0")
EXACT = ("dense", "merge", "gguf-adapter", "ollama:adapter", "ollama:q8_0", "gguf:f16")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    """A directory, one whose head is tied to the embeddings, a GGUF file, and a text."""
    root = tmp_path_factory.mktemp("odd")
    for name in ("plain", "tied"):
        save_tiny_llama(root / name, 0)
    model = AutoModelForCausalLM.from_pretrained(root / "tied", dtype="auto")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(root / "tied")
    (root / "text.txt").write_text("some text that is long enough for a check. " * 30)
    gguf = write_base(root / "base.gguf", "F16")
    return {"plain": root / "plain", "tied": root / "tied", "gguf": gguf, "text": root / "text.txt"}


def adapted(directory: pathlib.Path, base: pathlib.Path, **options: Any) -> Any:
    """Saves a random adapter on the dense model at ``base``."""
    return adapt(directory, base, read(base), noise=0.05, **{"target_modules": ["q_proj", "down_proj"], **options})


def export(adapter: pathlib.Path, to: str, directory: pathlib.Path, *more: object) -> list[object]:
    if library := DIRECTORIES.get(to):
        pytest.importorskip(library, reason=f"{library} is not installed")
    return ["export", "--adapter", adapter, "--to", to, "--output", output_of(to, directory), *more]


@pytest.mark.parametrize(
    ("kind", "to"),
    [
        *((kind, to) for kind in (*PLAIN, *MERGED) for to in DIRECTORIES),
        *((kind, to) for kind in PLAIN for to in FILES),
    ],
)
def test_the_report_finds_the_update(
    bases: dict[str, pathlib.Path], tmp_path: pathlib.Path, kind: str, to: str
) -> None:
    base = bases["gguf" if to in FILES else "plain"]
    adapted(tmp_path / "adapter", base, **(PLAIN | MERGED)[kind])
    assert abs(
        share(here(*export(tmp_path / "adapter", to, tmp_path, "--data", bases["text"], "--dtype", "float32"))) - 100
    ) < (0.5 if to in EXACT else 15)


@pytest.fixture(scope="module")
def on_tied(
    bases: dict[str, pathlib.Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[pathlib.Path, torch.Tensor]]:
    """An adapter of ``TIED``, and the logits that it computes."""
    made: dict[str, tuple[pathlib.Path, torch.Tensor]] = {}

    def of(kind: str) -> tuple[pathlib.Path, torch.Tensor]:
        if kind not in made:
            path = tmp_path_factory.mktemp("tied") / "adapter"
            made[kind] = path, logits(adapt(path, bases["tied"], **TIED[kind][0]))
        return made[kind]

    return of


@pytest.mark.parametrize("kind", TIED)
@pytest.mark.parametrize("to", [*DIRECTORIES, "gguf:f16", "merge", "merge --4bit"])
def test_a_merged_model_unties_what_the_adapter_changes(
    bases: dict[str, pathlib.Path], on_tied: Any, tmp_path: pathlib.Path, kind: str, to: str
) -> None:
    (adapter, expected), tied = on_tied(kind), TIED[kind][1]
    assert error(logits(loaded(bases["tied"])), expected) > 0.02
    command = export(adapter, to, tmp_path, "--check", "none")
    if to.startswith("merge"):
        command = [*to.split(), "--adapter", adapter, "--output", output_of(to, tmp_path)]
    here(*command)
    out = output_of(to, tmp_path)
    if to == "gguf:f16":
        names = {tensor.name for tensor in read_header(out).tensors}
        assert ("output.weight" in names) == (kind not in ("neither", "saved norm"))
        model = dense(out)
    else:
        assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] == tied
        model = ours(out) if "compressed" in to else read(out)
        assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    assert error(logits(model), expected) < (0.02 if to in EXACT else 0.2)


def test_an_adapter_file_of_a_tied_model(bases: dict[str, pathlib.Path], on_tied: Any, tmp_path: pathlib.Path) -> None:
    assert share(here(*export(on_tied("neither")[0], "gguf-adapter", tmp_path, "--data", bases["text"]))) == 100


# What a target rejects: the targets, the base, settings of the adapter, and the message.
REJECTED: dict[str, tuple[tuple[str, ...], str, dict[str, Any], str]] = {
    "dora": (FILES, "gguf", {"use_dora": True}, "has DoRA, which that target cannot hold; use --to dense"),
    "saved head": (FILES, "gguf", MERGED["saved head"], r"saved in full \(modules_to_save\), .* use --to dense"),
    "tokens": (FILES, "gguf", MERGED["tokens"], "has trained tokens .* use --to dense"),
    "embeddings": (
        FILES, "gguf", MERGED["LoRA on the embeddings"],
        "weights other than those of LoRA on linear layers.*lora_embedding_A.*use --to dense",
    ),
    "no effect": (("gguf-adapter",), "plain", {"lora_alpha": 0}, "whose scaling is 0 in every layer; use --to dense"),
    "alora": (("gguf-adapter",), "plain", {"alora_invocation_tokens": [5]}, "is activated LoRA, which only PEFT runs"),
    "tied head": (
        ("gguf-adapter",), "tied", TIED["LoRA on the head"][0],
        "is on lm_head, and the model ties its output head to its embeddings.*use --to dense, which unties them",
    ),
    "bias": (
        ("dense", "gguf-adapter"), "plain", {"lora_bias": True},
        r"has a bias \(lora_bias\) on .*_proj, which has none in the model.* load it with PEFT",
    ),
    "bias on a file": (("gguf:q4_0",), "gguf", {"lora_bias": True}, r"has a bias \(lora_bias\) on .*_proj, which has"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REJECTED)
def test_what_a_target_cannot_hold_is_rejected(
    refused: Refused, bases: dict[str, pathlib.Path], tmp_path: pathlib.Path, kind: str,
) -> None:  # fmt: skip
    targets, base, options, message = REJECTED[kind]
    adapted(tmp_path / "adapter", bases[base], **options)
    for to in targets:
        told = refused(*export(tmp_path / "adapter", to, tmp_path))
        assert re.search(message, told), (to, told)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


BROKEN: dict[str, tuple[Callable[[Weights], Weights], str]] = {
    "empty": (lambda weights: {}, "has no weights"),
    "half": (
        lambda weights: {name: t for name, t in weights.items() if ".lora_B." in name},
        r"is incomplete|does not fit its base",
    ),
    "more layers": (
        lambda weights: weights | {n.replace("layers.1", "layers.7"): t.clone() for n, t in weights.items()},
        r"is incomplete|does not fit|no such",
    ),
    "other sizes": (lambda weights: {n: t[..., :-1].contiguous() for n, t in weights.items()}, "does not fit"),
    "nan": (
        lambda weights: {n: t * float("nan") for n, t in weights.items()},
        r"8 weights \(of the 8 that it needs\) have NaN or infinity",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_adapters_are_rejected(
    bases: dict[str, pathlib.Path], tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str], kind: str
) -> None:
    edit, message = BROKEN[kind]
    for base, targets in (("plain", ("dense",)), ("gguf", ("gguf-adapter", "gguf:q4_0"))):
        adapter = tmp_path / f"{base}-adapter"
        adapted(adapter, bases[base])
        path = adapter / "adapter_model.safetensors"
        save_file(edit(load_file(path)), path, {"format": "pt"})
        capfd.readouterr()
        for to in targets:
            assert main([str(argument) for argument in export(adapter, to, tmp_path)]) == 2
            told = capfd.readouterr().err
            assert re.search(message, told), (to, told)
            assert kind == "nan" or told.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gguf-adapter", "plain-adapter"]
