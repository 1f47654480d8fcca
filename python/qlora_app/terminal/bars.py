"""Progress bars on stderr."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def counted(what: str, now: str = "") -> Iterator[Callable[..., None]]:
    """Shows a progress bar, and yields a function that updates it.

    The function takes the number of finished items, the total, and optionally the current item.

    Args:
        what: the title of the bar.
        now: the first item.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    at_hand = TextColumn("{task.fields[now]}")
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), at_hand)
    console = Console(stderr=True)
    both = sys.stdout.isatty()  # or else what is printed meanwhile would not reach the file that is stdout
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal, redirect_stdout=both
    ) as bar:
        task = bar.add_task(what, total=None, now=now)
        yield lambda done, of, now="": bar.update(task, completed=done, total=of, now=now)
