"""``--config``: a file with the options of a run."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import pytest

from commands import SMALL, Paths, here
from qlora_app.errors import UserError
from qlora_app.training.config_file import read_config
from qlora_app.training.settings import Settings, given


def write(path: pathlib.Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_the_values_in_a_file(tmp_path: pathlib.Path) -> None:
    text = "# mine\nrank: 8\nlr: 1e-4\nbatch-size: 2\nrslora: true\ntarget_modules: [q_proj, v_proj]\nlayers: 3\n"
    assert read_config(write(tmp_path / "run.yaml", text), {}) == {
        "rank": 8, "lr": 1e-4, "batch_size": 2, "rslora": True, "target_modules": "q_proj,v_proj", "layers": "3",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "typed", "expected"),
    [
        ("rank: 8", {"rank": 4}, {}),
        ("epochs: 2", {"max_steps": 5}, {}),
        ("max_steps: 9", {"epochs": 1.0}, {}),
        ("warmup_steps: 3", {"warmup_ratio": 0.1}, {}),
        ("output: here\nrank: 8", {"lr": 1.0}, {"output": "here", "rank": 8}),
        ("rank: 16", {}, {}),  # the default
        ("rank:", {}, {}),
        ("merge_aware: true", {}, {"merge_aware": True}),
    ],
)
def test_options_that_are_typed_replace_those_in_the_file(
    text: str, typed: dict[str, Any], expected: dict[str, Any], tmp_path: pathlib.Path
) -> None:
    assert read_config(write(tmp_path / "run.yaml", text), typed) == expected


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("batchsize: 8", ["unknown option batchsize", "did you mean batch_size?"]),
        ("trust_remote_code: true", ["unknown option trust_remote_code"]),
        ("rank: eight", ["expected rank to be an integer", "got eight"]),
        ("rank: 8.5", ["expected rank to be an integer"]),
        ("lr: fast", ["expected lr to be a number", "got fast"]),
        ("rslora: 1", ["expected rslora to be true or false", "got 1"]),
        ("batch-size: 1\nbatch_size: 2", ["the option batch_size appears twice"]),
        ("rank: 8\nlr: 1\nrank: 8", ["the option rank appears twice"]),
        ('{"rank": 8, "rank": 16}', ["the option rank appears twice"]),
        ("rank: &r 8\nalpha: *r", ["expected YAML without aliases"]),
        ("- rank", ["expected options with their values", "got ['rank']"]),
        ("", ["expected options with their values", "got None"]),
        ("rank: [", ["not YAML or JSON"]),
        ("!!python/object/apply:os.getcwd []", ["not YAML or JSON"]),
    ],
)
def test_a_bad_file_is_rejected(text: str, parts: list[str], refused: Any, tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "run.yaml", text)
    sentence = refused("finetune", "--config", path)
    for part in ["run.yaml", *parts]:
        assert part in sentence, sentence


def test_a_file_that_cannot_be_read_is_rejected(refused: Any, tmp_path: pathlib.Path) -> None:
    assert "No such file" in refused("finetune", "--config", tmp_path / "none.yaml")
    assert "Is a directory" in refused("finetune", "--config", tmp_path)
    (tmp_path / "large.yaml").write_bytes(b"#" * (2 << 20))
    assert "larger than the limit" in refused("finetune", "--config", tmp_path / "large.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe")
    assert "not UTF-8" in refused("finetune", "--config", tmp_path / "bytes.yaml")
    assert "rank 0: expected a value of at least 1" in refused(
        "finetune", "--config", write(tmp_path / "zero.yaml", "rank: 0"), "--output", tmp_path / "run"
    )


@pytest.mark.parametrize(
    "options",
    [{}, {"epochs": 2.0}, {"warmup_steps": 3}, {"lr_schedule": "constant"}, {"merge_aware": True}, {"layers": "0-2"}],
)
def test_the_settings_of_a_run_are_such_a_file(options: dict[str, Any], tmp_path: pathlib.Path) -> None:
    settings = Settings(**given(options))
    path = write(tmp_path / "settings.json", json.dumps(dataclasses.asdict(settings)))
    assert Settings(**given(read_config(path, {}))) == settings


def test_a_run_by_a_file_is_the_run_by_options(paths: Paths, tmp_path: pathlib.Path) -> None:
    options = ["--model", paths["model"], "--data", paths["data"], *SMALL, "--max-steps", "3"]
    here("finetune", *options, "--output", tmp_path / "typed")
    settings = tmp_path / "typed" / "settings.json"
    here("finetune", "--config", settings, "--output", tmp_path / "again")
    here("finetune", "--config", write(tmp_path / "c.yaml", f"output: {tmp_path / 'third'}\nlr: 3e-3\nmax_steps: 3"),
         "--model", paths["model"], "--data", paths["data"], *SMALL)  # fmt: skip
    files = [tmp_path / run / "adapter" / "adapter_model.safetensors" for run in ("typed", "again", "third")]
    assert files[0].read_bytes() == files[1].read_bytes() == files[2].read_bytes()


def test_an_unknown_type_in_the_file_names_it(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=r"run\.yaml.*expected output to be a text, got \{"):
        read_config(write(tmp_path / "run.yaml", "output: {a: 1}"), {})
