"""Help in two lengths, shell completion, plain text where no terminal reads it."""

from __future__ import annotations

import shutil
import subprocess
from typing import Any

import pytest

from qlora_app.commands.completion import SHELLS
from qlora_app.main import main

COMMANDS = tuple(main.__globals__["_parser"]()._subparsers._group_actions[0].choices)
SCREEN = 45  # lines of 80 columns


def shown(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    try:
        status: Any = main(list(arguments))
    except SystemExit as stop:
        status = stop.code
    assert not status
    return capfd.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_a_screen(command: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = shown(capfd, command, "--help").splitlines()
    assert len(lines) <= SCREEN
    assert max(map(len, lines[: lines.index("")])) <= 80


@pytest.mark.parametrize("command", ["finetune", "quantize", "plan"])
def test_all_options_are_in_the_long_help(command: str, capfd: pytest.CaptureFixture[str]) -> None:
    parser: Any = main.__globals__["_parser"]()
    options = parser._subparsers._group_actions[0].choices[command]._option_string_actions
    short, whole = shown(capfd, command, "--help"), shown(capfd, command, "--help-all")
    assert all(option in whole for option in options)
    hidden = [option for option in options if f"  {option}" not in short]
    assert f"shows {len(hidden)} more options" in short
    assert shown(capfd, command, "--help") == short


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_scripts(shell: str, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    script = shown(capfd, "completion", shell)
    assert "qlora-ext" in script
    assert "finetune" in script
    assert "grad-checkpointing" in script


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_completes(capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    script = shown(capfd, "completion", "bash")

    def completed(*words: str) -> list[str]:
        asked = (
            "COMP_WORDS=(" + " ".join(words) + f'); COMP_CWORD={len(words) - 1}; _shtab_qlora_ext "" "{words[-1]}"; '
        )
        done = subprocess.run(["bash", "-c", script + asked + 'echo "${COMPREPLY[@]}"'], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    assert completed("qlora-ext", "fine") == ["finetune"]
    assert "--grad-checkpointing" in completed("qlora-ext", "finetune", "--grad")
    assert completed("qlora-ext", "finetune", "--method", "dp") == ["dpo"]


def test_output_to_a_pipe_has_no_colours(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    tiny = "hidden=64,intermediate=128,layers=2,heads=4"
    for arguments in (
        ["--help"],
        ["finetune", "--help-all"],
        ["info"],
        ["plan", "--sizes", tiny],
    ):
        assert "\x1b" not in shown(capfd, *arguments)
