"""Compares two result files, and fails if there is a regression beyond the noise.

    python -m bench.lib.compare OLD.json NEW.json [--all]

The files are those of bench/results. Of a measured spread (median, 10th and 90th
percentile) a change counts where the two ranges do not touch and the medians differ by more than 5%; of a number
without one, such as tokens per second, where it differs by more than 15%. What peers do by themselves is left out. The
exit status is 1 where something is worse, 2 where the files have nothing in common.
"""

from __future__ import annotations

import argparse
import pathlib
import re
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from .results_files import Row, Section, median, sections, text

RANGE, NUMBER = 0.05, 0.15
OURS = "qlora_ext"
# Our results: column names, and whether larger is better. Columns in OF_A_CONTENDER count only in our own rows.
FIGURES = {r"ours / .*": True, r"ours": False, r"time over qlora_ext's": True, r"ratio": True}
OF_A_CONTENDER = {r".*tokens/s": True, r"peak GB": False, r"held-out loss after": False}
# Numeric columns that identify a row.
KEYS = ("M", "tokens per step", "block size", "bits per parameter", "learning rate", "layers", "prompt")


class Change(NamedTuple):
    """One result that is in both files. `factor` is above 1 if the new one is better."""

    section: str
    row: str
    column: str
    old: Any
    new: Any
    factor: float
    beyond_noise: bool


def _key(row: Row) -> str:
    named = (name for name, value in row.items() if name in KEYS or (isinstance(value, str) and name != "kernel"))
    return ", ".join(str(row[name]) for name in named)


def _more_is_better(row: Row, name: str) -> bool | None:
    """The direction of a column: whether larger is better; None if it is not one of our results."""
    ours = not {"base", "contender"} & row.keys() or OURS in (row.get("base") or row.get("contender"))
    rules = {**FIGURES, **OF_A_CONTENDER} if ours else FIGURES
    return next((more for pattern, more in rules.items() if re.fullmatch(pattern, name)), None)


def _change(section: str, row: str, name: str, old: Any, new: Any, more_is_better: bool) -> Change:
    factor = median(new) / median(old) if more_is_better else median(old) / median(new)
    if isinstance(old, dict) and isinstance(new, dict):
        apart = new["low"] > old["high"] or new["high"] < old["low"]
        beyond = apart and abs(factor - 1) > RANGE
    else:
        beyond = abs(factor - 1) > NUMBER
    return Change(section, row, name, old, new, factor, beyond)


def changes(old: dict[str, Section], new: dict[str, Section]) -> Iterator[Change]:
    """The changes of all our results that are in both files."""
    for section in old.keys() & new.keys():
        before = {_key(row): row for row in old[section]["rows"]}
        for row in new[section]["rows"]:
            was = before.get(_key(row), {})
            for name, value in row.items():
                more = _more_is_better(row, name)
                if more is not None and name in was and median(value) > 0 and median(was[name]) > 0:
                    yield _change(section, _key(row), name, was[name], value, more)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=pathlib.Path)
    parser.add_argument("new", type=pathlib.Path)
    parser.add_argument("--all", action="store_true", help="also print changes within the noise")
    arguments = parser.parse_args()
    found = sorted(changes(sections(arguments.old), sections(arguments.new)), key=lambda change: change.factor)
    if not found:
        print("the files have no figure in common", file=sys.stderr)
        return 2
    for c in found:
        if c.beyond_noise or arguments.all:
            verdict = "same " if not c.beyond_noise else "WORSE" if c.factor < 1 else "better"
            print(f"{verdict}  {c.factor:5.2f}  {c.section}: {c.row}: {c.column}: {text(c.old)} -> {text(c.new)}")
    worse = sum(c.beyond_noise and c.factor < 1 for c in found)
    better = sum(c.beyond_noise and c.factor > 1 for c in found)
    print(f"{len(found)} figures: {better} better, {worse} worse, the rest within the noise")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
