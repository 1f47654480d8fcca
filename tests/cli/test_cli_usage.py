"""Messages of the command: for misspelt options, on narrow terminals, and at the end of a run."""

from __future__ import annotations

import io
import json
import pathlib
import shlex
from typing import Any

import pytest
from rich.console import Console
from transformers import TrainerState

from commands import SMALL, Paths, here
from qlora_app.main import main
from qlora_app.terminal.progress import ProgressCallback


@pytest.mark.parametrize(
    ("typed", "parts"),
    [
        ("finetune --rnak 4", ["qlora-ext finetune: unknown option --rnak", "did you mean --rank?", "finetune --help"]),
        ("finetune --batch_size=1", ["unknown option --batch_size", "did you mean --batch-size?"]),
        ("generate --adaptr x --prompt y", ["did you mean --adapter?", "qlora-ext generate --help"]),
        ("chat hello", ["unexpected argument hello", "qlora-ext chat --help"]),
        ("finetune --rank", ["--rank", "qlora-ext finetune --help"]),
        ("finetune --method dop", ["--method dop", "did you mean dpo?", "qlora-ext finetune --help"]),
        ("quantize --model x --output y --format bitandbytes", ["did you mean bitsandbytes?"]),
        ("completion nosh", ["did you mean zsh?"]),
        ("export --to gguf:f61 --output x", ["did you mean gguf:f16?"]),
        ("plan --model llama3", ["did you mean llama-3-8b?"]),
        ("finetun", ["command finetun", "did you mean finetune?", "qlora-ext --help"]),
        ("xyz", ["expected one of finetune, generate, chat", "qlora-ext --help"]),
        ("--versoin", ["did you mean --version?", "qlora-ext --help"]),
        ("", ["expected a command", "qlora-ext --help"]),
    ],
)
def test_misspelt_options(refused: Any, typed: str, parts: list[str]) -> None:
    sentence = refused(*shlex.split(typed))
    for part in parts:
        assert part in sentence, sentence


@pytest.mark.parametrize(
    "typed",
    ["finetune --wandb-entity x", "finetune --deepspeed x", "finetune --lora-r 8", "train", "serve", "xyz", "export"],
)
def test_nothing_is_suggested_that_is_not_alike(refused: Any, typed: str) -> None:
    assert "did you mean" not in refused(*shlex.split(typed))


def test_help_and_version_as_commands(capfd: pytest.CaptureFixture[str]) -> None:
    for typed, same in ((["help"], ["--help"]), (["help", "merge"], ["merge", "--help"]), (["version"], ["--version"]),
                        (["version", "--json"], ["--version"])):  # fmt: skip
        printed = []
        for arguments in (typed, same):
            with pytest.raises(SystemExit) as stop:
                main(arguments)
            assert not stop.value.code
            printed.append(capfd.readouterr().out)
        assert printed[0] == printed[1]
        assert printed[0]


def test_a_value_may_look_like_an_option(refused: Any, tmp_path: pathlib.Path) -> None:
    assert "no such directory" in refused("generate", "--adapter", tmp_path / "no", "--prompt=--what")


@pytest.mark.parametrize("width", [40, 200])
def test_the_bar_keeps_its_counts(width: int, tmp_path: pathlib.Path) -> None:

    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=width, color_system=None)
    progress = ProgressCallback(console, tmp_path / "metrics.jsonl", {"step": 0})
    state = TrainerState(max_steps=10_000, num_input_tokens_seen=0)
    progress.on_train_begin(None, state, None)
    progress._bar.refresh()
    assert "0/10000" in shown.getvalue()
    assert "nan" not in shown.getvalue()
    state.global_step, state.num_input_tokens_seen = 4321, 10**6
    state.log_history.append({"step": 4321, "loss": 12.3456})
    progress.on_log(None, state, None)
    progress._bar.refresh()
    progress.close()
    last = [line for line in shown.getvalue().replace("\r", "\n").splitlines() if "/10000" in line][-1]
    assert "4321/10000" in last
    assert "loss 12.346" in last
    assert ("tokens/s" in last) == (width > 100)


def test_the_line_to_try_is_one_for_a_shell(
    paths: Paths, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    run = tmp_path / "a run of $HOME, 'quoted'"
    arguments = ["--model", paths["model"], "--data", paths["data"], "--output", run, *SMALL]
    out = here("finetune", *arguments, "--epochs", "0.5")
    (line,) = [line for line in out.splitlines() if line.startswith("try it: ")]
    command = shlex.split(line.removeprefix("try it: "))
    assert command[:4] == ["qlora-ext", "generate", "--adapter", str(run / "adapter")]
    assert here(*command[1:]).strip()
    metrics = json.loads((run / "adapter" / "qlora_run.json").read_text())["metrics"]
    rows = int(next(line for line in out.splitlines() if line.startswith("rows ")).split()[1])
    assert metrics["steps"] == -(-rows // 2 // 2)  # half of the batches of two


def test_copying_a_4bit_model_is_reported(paths: Paths, tmp_path: pathlib.Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert "already" not in here("quantize", "--model", paths["model"], "--output", first)
    assert f"note: {first} is 4-bit already; its 4-bit weights are copied as they are" in here(
        "quantize", "--model", first, "--output", second, "--block-size", "128"
    )
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
