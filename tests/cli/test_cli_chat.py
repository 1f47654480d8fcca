"""``qlora-ext chat``: one answer per line in a pipe; Ctrl-C, Ctrl-D and the history on a terminal."""

from __future__ import annotations

import io
import os
import pathlib
import pty
import select
import shutil
import signal
import subprocess
import time
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import chat_templates
from commands import COMMAND, Paths, environment
from qlora_app.errors import UserError
from qlora_app.generation.conversation import Conversation
from qlora_app.main import main
from qlora_app.models.loading import Loader
from qlora_app.models.sources import resolve
from qlora_ext.form import Form


@pytest.fixture(scope="module")
def talker(paths: Paths) -> pathlib.Path:
    """The model with a chat template."""
    model = pathlib.Path(shutil.copytree(paths["model"], paths["root"] / "talker"))
    (model / "chat_template.jinja").write_text(chat_templates.PLAIN)
    return model


def talk(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], said: str, *arguments: object) -> str:
    """The output of a conversation whose input comes from a pipe."""
    monkeypatch.setattr("sys.stdin", io.StringIO(said))
    capfd.readouterr()
    assert main(["chat", *map(str, arguments), "--max-new-tokens", "8"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    return out


def test_a_line_in_is_an_answer_out(
    finished_run: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The answer is the same as that of ``generate``."""
    one = talk(monkeypatch, capfd, "count 3\n", "--adapter", finished_run)
    assert main(["generate", "--adapter", str(finished_run), "--prompt", "count 3", "--max-new-tokens", "8"]) == 0
    assert one == capfd.readouterr().out
    several = talk(
        monkeypatch, capfd, "count 3\n\ncount 3\n/reset\ncount 3\n/exit\ncount 3\n", "--adapter", finished_run
    )
    assert several.startswith(one)
    assert several.endswith(one)
    assert several.count("\n") == 3


def test_the_history_is_in_the_prompt(
    talker: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    prompts = []

    def complete(model: Any, tokenizer: Any, prompt: list[int], new: int, temperature: float, streamer: Any) -> None:
        prompts.append(tokenizer.decode(prompt))
        streamer.put(torch.tensor([prompt]))
        streamer.put(torch.tensor(tokenizer(" fine\x1b")["input_ids"]))
        streamer.end()

    monkeypatch.setattr("qlora_app.generation.conversation.complete", complete)
    printed = talk(monkeypatch, capfd, "hello\nand\n/reset\nhello\n", "--model", talker, "--system", "be brief")
    assert printed == "fine\\x1b\n" * 3
    begin = "<system>be brief</><user>hello</><assistant>"
    assert prompts == [begin, f"{begin}fine\x1b</><user>and</><assistant>", begin]


def test_the_oldest_turns_go_where_the_model_has_no_room(talker: pathlib.Path) -> None:

    model = Loader(resolve(str(talker)), Form(), torch.float32, torch.device("cpu")).while_loading()
    talk = Conversation(model, AutoTokenizer.from_pretrained(talker), "be brief", 8, 0.0)
    shown: list[str] = []
    forgotten = [talk.answer("x" * 60, shown.append) for _ in range(4)]  # of 256 tokens
    assert forgotten[:2] == [0, 0]
    assert sum(forgotten) > 0
    with pytest.raises(UserError, match="the model has room for 248"):
        talk.answer("x" * 300, shown.append)
    assert talk.answer("x", shown.append) == 0


def test_invalid_arguments_are_rejected(refused: Any, paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors are raised before the model loads."""
    monkeypatch.setattr("qlora_app.models.loading.Loader.while_loading", lambda *a: pytest.fail("the model was read"))
    monkeypatch.chdir(paths["root"])  # where no ./qlora-run is the default adapter
    assert "--adapter" in refused("chat")


def test_input_that_is_no_text(refused: Any, paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), encoding="utf-8"))
    assert "UTF-8" in refused("chat", "--model", paths["model"])
    # With an ASCII locale, Python decodes the bytes to surrogates.
    monkeypatch.setattr("sys.stdin", io.StringIO("\udcc3\n"))
    assert "standard input: the text is not utf-8 text" in refused("chat", "--model", paths["model"])
    assert "--system: the text is not" in refused("chat", "--model", paths["model"], "--system", "\udcc3")
    assert "--prompt: the text is not" in refused("generate", "--model", paths["model"], "\udcc3")


class Terminal:
    """The command on its own terminal."""

    def __init__(self, *arguments: object) -> None:
        self._end, other = pty.openpty()
        self.process = subprocess.Popen(
            [*COMMAND, *map(str, arguments)], stdin=other, stdout=other, stderr=other, env=environment(),
            start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        os.close(other)
        self.printed = ""

    def wait_for(self, text: str, after: int = 0) -> None:
        deadline = time.monotonic() + 120
        while text not in self.printed[after:]:
            assert time.monotonic() < deadline, self.printed
            if select.select([self._end], [], [], 1.0)[0]:
                try:
                    self.printed += os.read(self._end, 4096).decode(errors="replace")
                except OSError:  # the other side is closed
                    assert text in self.printed[after:], self.printed
                    return

    def type(self, text: str) -> int:
        before = len(self.printed)
        os.write(self._end, text.encode())
        return before


def test_on_a_terminal(paths: Paths) -> None:
    talk = Terminal("chat", "--model", paths["model"], "--max-new-tokens", "100000", "--compile", "never")
    talk.wait_for("> ")
    assert "/reset" in talk.printed
    at = talk.type("hello\n")
    talk.wait_for("hello\r\n", at)
    time.sleep(0.3)  # the answer is partly or completely written
    os.kill(talk.process.pid, signal.SIGINT)
    if talk.process.poll() is None:
        talk.wait_for("> ", at)
        talk.type("\x04")
    assert talk.process.wait(60) in (0, 130)  # 130 if the answer had already ended
    assert "Traceback" not in talk.printed


def test_ctrl_c_stops_an_answer_and_no_more(
    talker: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    prompts = []

    def complete(model: Any, tokenizer: Any, prompt: list[int], new: int, temperature: float, streamer: Any) -> None:
        prompts.append(tokenizer.decode(prompt))
        streamer.put(torch.tensor([prompt]))
        streamer.put(torch.tensor(tokenizer("half ")["input_ids"]))
        raise KeyboardInterrupt

    class Keyboard(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("qlora_app.generation.conversation.complete", complete)
    monkeypatch.setattr("sys.stdin", Keyboard("one\ntwo\n"))
    assert main(["chat", "--model", str(talker), "--compile", "never"]) == 0
    assert prompts[1] == "<user>one</><assistant>half</><user>two</><assistant>"
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    assert main(["chat", "--model", str(talker)]) == 130  # there is no user to ask
    assert "interrupted" in capfd.readouterr().err
