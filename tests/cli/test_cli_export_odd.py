"""Exports of adapters with odd contents: what a target holds, it holds exactly; the rest is rejected before writing."""

from __future__ import annotations

import json
import pathlib
import re
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch

for library in ("transformers", "peft", "gguf"):
    pytest.importorskip(library, reason=f"{library} is not installed")

from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from commands import Paths, here
from gguf_files import WIDE, WITH_BYTES, write
from qlora_app.main import main
from tiny_models import save_tiny_llama

Refused = Callable[..., str]
# A target of each kind that the adapters below are exported to. None: for a base that is a GGUF file.
DIRECTORIES = ("dense", "bitsandbytes", "compressed-tensors:int4")
FILES = ("gguf-adapter", "gguf:q4_0", "ollama:adapter", "ollama:q8_0")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    """A directory, one whose head is tied to the embeddings, and a GGUF file."""
    root = tmp_path_factory.mktemp("odd")
    save_tiny_llama(root / "plain", 0)
    save_tiny_llama(root / "tied", 0)
    config = json.loads((root / "tied" / "config.json").read_text())
    (root / "tied" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    weights = load_file(root / "tied" / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, root / "tied" / "model.safetensors", {"format": "pt"})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**{**WIDE, **WITH_BYTES}), dtype=torch.float32)
    write(model, root / "base.gguf", "llama", kinds=["F16"])
    return {"plain": root / "plain", "tied": root / "tied", "gguf": root / "base.gguf"}


def adapt(directory: pathlib.Path, base: pathlib.Path, **options: Any) -> pathlib.Path:
    """Saves a random adapter on ``base``."""
    if base.is_file():
        model = AutoModelForCausalLM.from_pretrained(base.parent, gguf_file=base.name, dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(3)
    config = {"r": 4, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False, **options}
    peft = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **config))
    for name, parameter in peft.named_parameters():
        if ".modules_to_save." in name or "trainable_tokens" in name:
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    peft.peft_config["default"].base_model_name_or_path = str(base)
    peft.save_pretrained(directory)
    return directory


def export(adapter: pathlib.Path, to: str, directory: pathlib.Path, *more: object) -> list[object]:
    library = {"bitsandbytes": "bitsandbytes", "compressed-tensors:int4": "compressed_tensors"}.get(to)
    if library is not None:
        pytest.importorskip(library, reason=f"{library} is not installed")
    output = directory / ("out.gguf" if to.startswith("gguf") else "out")
    return ["export", "--adapter", adapter, "--to", to, "--output", output, *more]


HELD: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"layers.0.self_attn.q_proj": 20}},
    "some layers": {"layers_to_transform": [1]},
}


@pytest.mark.parametrize("to", [*DIRECTORIES, *FILES])
@pytest.mark.parametrize("kind", HELD)
def test_every_target_holds(
    bases: dict[str, pathlib.Path], tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str], kind: str, to: str
) -> None:
    adapter = adapt(tmp_path / "adapter", bases["gguf" if to in FILES else "plain"], **HELD[kind])
    capfd.readouterr()
    here(*export(adapter, to, tmp_path, "--data", "self", "--dtype", "float32"))
    printed = capfd.readouterr().out
    held = re.search(r"which hold ([\d.]+)% of the adapter's update", printed)
    assert held, printed
    exact = to in ("dense", "gguf-adapter", "ollama:adapter", "ollama:q8_0")
    assert abs(float(held[1]) - 100) < (0.5 if exact else 15)


# Contents that only merged models hold.
MORE: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "has DoRA"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, "modules saved in full"),
    "tokens": ({"trainable_token_indices": {"embed_tokens": [3, 5]}}, "trained tokens"),
    "embeddings": ({"target_modules": ["q_proj", "embed_tokens"]}, "weights other than those of LoRA on linear layers"),
}


@pytest.mark.parametrize("to", [*DIRECTORIES, "gguf-adapter", "gguf:q4_0"])
@pytest.mark.parametrize("kind", MORE)
def test_only_directories_hold(
    refused: Refused,
    bases: dict[str, pathlib.Path],
    tmp_path: pathlib.Path,
    capfd: pytest.CaptureFixture[str],
    kind: str,
    to: str,
) -> None:
    options, message = MORE[kind]
    adapter = adapt(tmp_path / "adapter", bases["gguf" if to in FILES else "plain"], **options)
    capfd.readouterr()
    if to in FILES:
        told = refused(*export(adapter, to, tmp_path))
        assert message in told
        assert "use --to dense" in told
        assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
        return
    here(*export(adapter, to, tmp_path, "--data", "self", "--dtype", "float32"))
    printed = capfd.readouterr().out
    held = re.search(r"which hold ([\d.]+)% of the adapter's update", printed)
    assert held, printed
    assert abs(float(held[1]) - 100) < (0.5 if to == "dense" else 15)


def test_an_adapter_file_rejects_an_adapter_on_a_tied_head(
    refused: Refused, bases: dict[str, pathlib.Path], tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    adapter = adapt(tmp_path / "adapter", bases["tied"], target_modules=["q_proj", "lm_head"])
    capfd.readouterr()
    assert "ties its output head to its embeddings" in refused(*export(adapter, "gguf-adapter", tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_tied_model_is_held(
    bases: dict[str, pathlib.Path], tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    adapter = adapt(tmp_path / "adapter", bases["tied"])
    for to in (*DIRECTORIES, "gguf-adapter"):
        here(*export(adapter, to, tmp_path, "--data", "self"))
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        assert "loss on" in capfd.readouterr().out


def change(adapter: pathlib.Path, edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = adapter / "adapter_model.safetensors"
    save_file(edit(load_file(path)), path, {"format": "pt"})


def test_a_bias_without_a_place_is_rejected(
    refused: Refused, bases: dict[str, pathlib.Path], tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for base, to in (("plain", "dense"), ("gguf", "gguf:q4_0")):
        adapter = adapt(tmp_path / base, bases[base], lora_bias=True)
        capfd.readouterr()
        told = refused(*export(adapter, to, tmp_path))
        assert re.search(r"has a bias \(lora_bias\) on .*_proj, which has none in the model.* load it with PEFT", told)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gguf", "plain"]


BROKEN: dict[str, tuple[Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], str]] = {
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
}


@pytest.mark.parametrize("to", ["dense", "gguf-adapter", "gguf:q4_0"])
@pytest.mark.parametrize("kind", BROKEN)
def test_broken_adapters_are_rejected(
    refused: Refused,
    bases: dict[str, pathlib.Path],
    tmp_path: pathlib.Path,
    capfd: pytest.CaptureFixture[str],
    kind: str,
    to: str,
) -> None:
    edit, message = BROKEN[kind]
    adapter = adapt(tmp_path / "adapter", bases["gguf" if to in FILES else "plain"])
    change(adapter, edit)
    capfd.readouterr()
    told = refused(*export(adapter, to, tmp_path))
    assert re.search(message, told), told
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("to", ["dense", "gguf-adapter", "gguf:q4_0"])
def test_nan_is_rejected(
    bases: dict[str, pathlib.Path], tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str], to: str
) -> None:
    adapter = adapt(tmp_path / "adapter", bases["gguf" if to in FILES else "plain"])
    change(adapter, lambda weights: {name: t * float("nan") for name, t in weights.items()})
    capfd.readouterr()
    assert main([str(argument) for argument in export(adapter, to, tmp_path)]) == 2
    assert "8 weights (of the 8 that it needs) have NaN or infinity" in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_an_unknown_family_is_rejected(refused: Refused, paths: Paths, tmp_path: pathlib.Path) -> None:
    from tiny_configs import config_of

    config = config_of("gpt_neox")
    config.save_pretrained(tmp_path / "base")
    for file in paths["model"].glob("tokenizer*"):
        shutil.copy(file, tmp_path / "base")
    model = AutoModelForCausalLM.from_config(config)
    peft = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["dense"]))
    peft.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    peft.save_pretrained(tmp_path / "adapter")
    told = refused(*export(tmp_path / "adapter", "gguf-adapter", tmp_path))
    assert "is a gpt_neox model, expected one of llama, mistral, " in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
