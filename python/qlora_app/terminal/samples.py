"""Shows a prompt and a model's completion in a frame."""

from __future__ import annotations

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from qlora_ext.untrusted import printable

_SHOWN = 300  # only the last characters of a prompt are shown


def show_sample(console: Console, title: str, prompt: str, answer: str) -> None:
    text = Text(printable(prompt.strip()[-_SHOWN:], lines=True), style="dim")
    text.append("\n" + printable(answer.strip(), lines=True), style="not dim")
    console.print(Panel(text, title=title, title_align="left"))
