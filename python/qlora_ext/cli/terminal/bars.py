"""The bars on stderr that show how far a command has come."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def counted(what: str, now: str = "") -> Iterator[Callable[..., None]]:
    """A bar with the name of what is done, which the function that it yields moves.

    That takes how many are done, of how many and, optionally, what is ``now`` at hand.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    at_hand = TextColumn("{task.fields[now]}")
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), at_hand)
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None, now=now)
        yield lambda done, of, now="": bar.update(task, completed=done, total=of, now=now)
