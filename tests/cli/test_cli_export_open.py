"""``generate``, ``chat`` and ``check`` open what ``export`` has written."""

from __future__ import annotations

import io
import pathlib
import re
from collections.abc import Callable

import pytest
import torch

for library in ("transformers", "peft", "gguf"):
    pytest.importorskip(library, reason=f"{library} is not installed")

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, set_seed

import qlora_ext
from commands import here
from gguf_files import WIDE, WITH_BYTES, write
from qlora_app.main import main
from qlora_ext.untrusted import printable

Refused = Callable[..., str]
DIRECTORIES = (
    "dense", "bitsandbytes", "compressed-tensors:int4", "compressed-tensors:nvfp4", "compressed-tensors:mxfp4",
)  # fmt: skip
FILES = ("gguf:f16", "gguf:q8_0", "gguf:q4_0", "gguf:iq4_nl", "gguf:mxfp4")


@pytest.fixture(scope="module")
def gguf_adapter(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """An adapter whose base is a GGUF file that reads any text."""
    directory = tmp_path_factory.mktemp("open")
    set_seed(0)
    write(
        AutoModelForCausalLM.from_config(LlamaConfig(**{**WIDE, **WITH_BYTES}), dtype=torch.float32),
        directory / "base.gguf",
        "llama",
        kinds=["Q4_0"],
    )
    model = AutoModelForCausalLM.from_pretrained(directory, gguf_file="base.gguf", dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=2))
    model.peft_config["default"].base_model_name_or_path = str(directory / "base.gguf")
    model.save_pretrained(directory / "adapter")
    return directory / "adapter"


Exported = Callable[[str], pathlib.Path]


@pytest.fixture(scope="module")
def exported(
    finished_run: pathlib.Path, gguf_adapter: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> Exported:
    """What ``export --to`` writes. "gguf:dense" is the dense model of the adapter whose base is a GGUF file."""
    made: dict[str, pathlib.Path] = {}

    def of(to: str) -> pathlib.Path:
        if "compressed" in to or to == "bitsandbytes":
            library = "bitsandbytes" if to == "bitsandbytes" else "compressed_tensors"
            pytest.importorskip(library, reason=f"{library} is not installed")
        if to not in made:
            adapter = gguf_adapter if to.startswith("gguf:") else finished_run
            target = to.removeprefix("gguf:") if to == "gguf:dense" else to
            made[to] = tmp_path_factory.mktemp("exported") / ("out.gguf" if target.startswith("gguf") else "out")
            here("export", "--adapter", adapter, "--to", target, "--output", made[to], "--check", "none")
        return made[to]

    return of


def greedy(output: pathlib.Path) -> str:
    """What the dense model with the same weights answers."""
    if output.is_file():
        model = AutoModelForCausalLM.from_pretrained(output.parent, gguf_file=output.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(output.parent, gguf_file=output.name)
    else:
        config = qlora_ext.QLoRAConfig()
        model = AutoModelForCausalLM.from_pretrained(output, quantization_config=config, dtype=torch.float32)
        model, tokenizer = model.dequantize(), AutoTokenizer.from_pretrained(output)
    ids = tokenizer("count 3", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        found = model.generate(ids, do_sample=False, max_new_tokens=6, pad_token_id=0)
    text: str = tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)
    return text.strip()


@pytest.mark.parametrize("to", [*DIRECTORIES, *FILES])
def test_exported_models_answer(
    exported: Exported, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], to: str
) -> None:
    output = exported(to)
    capfd.readouterr()
    here("generate", "--model", output, "--raw", "--max-new-tokens", "6", "--prompt", "count 3", "--dtype", "float32")
    answer = capfd.readouterr().out
    if to not in ("dense", "gguf:f16", "gguf:q8_0"):  # generate quantizes these
        assert answer == f"{printable(greedy(output), lines=True)}\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("count 3\n"))
    here("chat", "--model", output, "--max-new-tokens", "4")
    assert capfd.readouterr().out.endswith("\n")


@pytest.mark.parametrize("to", [*DIRECTORIES, *FILES])
def test_exported_models_are_checked(
    exported: Exported, tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str], to: str
) -> None:
    output, base = exported(to), exported("gguf:dense" if to.startswith("gguf:") else "dense")
    text = tmp_path / "text.txt"
    text.write_text("some text that is long enough for a check. " * 30)
    capfd.readouterr()
    check = ["check", "--model", output, "--data", text, "--tokens", "512", "--max-increase", "2"]
    here(*check, "--base", base)
    printed = capfd.readouterr().out
    assert re.search(r"perplexity on [\d,]+ tokens of .*: [\d.]+ in 4 bits, [\d.]+ dense", printed), printed
    assert "the loss rises by" in printed
    assert "damaged" not in printed


def test_an_adapter_file_is_not_a_model(
    refused: Refused, finished_run: pathlib.Path, tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "adapter.gguf"
    here("export", "--adapter", finished_run, "--to", "gguf-adapter", "--output", path, "--check", "none")
    capfd.readouterr()
    for command in ("generate", "check"):
        message = refused(command, "--model", path, *(["--prompt", "1"] if command == "generate" else []))
        assert "holds an adapter, not a model" in message
    message = refused("generate", "--adapter", path, "--prompt", "1")
    assert "expected a directory with an adapter of PEFT, got a file" in message
    assert main(["generate", "--adapter", str(finished_run), "--prompt", "1", "--max-new-tokens", "1"]) == 0
