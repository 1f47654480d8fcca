"""The comparison of scripts/peers, and its table of expected failures."""

import importlib.util
import re
import sys
from typing import Any

import pytest
import yaml

from test_layout import ROOT

# By its path, because bench/run.py has the same name.
_spec = importlib.util.spec_from_file_location("peers_run", ROOT / "tests/peers/run.py")
assert _spec is not None
assert _spec.loader is not None
run: Any = importlib.util.module_from_spec(_spec)
sys.modules["peers_run"] = run
_spec.loader.exec_module(run)

ROWS = [{"reason": "packed", "match": "uint8", "tests": ["a", "b"]}, {"reason": "shape", "match": "shape", "tests": []}]


def _failed(why: str) -> dict[str, Any]:
    return {"outcome": "failed", "why": why}


PASSED = {"outcome": "passed", "why": ""}


@pytest.mark.parametrize(
    ("found", "unexpected"),
    [
        ({"a": _failed("got uint8"), "b": _failed("got uint8"), "c": PASSED}, []),
        ({"a": _failed("got uint8"), "b": PASSED, "c": PASSED}, ["unexpected pass: b"]),
        ({"a": _failed("got uint8"), "b": _failed("shape"), "c": PASSED}, ["unexpected failure: b: shape"]),
        ({"a": _failed("got uint8"), "b": _failed("uint8"), "c": _failed("new\nline")}, ["unexpected failure: c: new"]),
        ({"a": _failed("got uint8"), "b": _failed("uint8")}, ["unexpected failure: c: did not run"]),
    ],
)
def test_the_results_must_be_those_that_are_expected(found: Any, unexpected: list[str]) -> None:
    assert run.compare(ROWS, ["a", "b", "c"], found, recorded=True)[0] == unexpected


def test_recording_moves_failures_to_the_rows_that_match_and_to_new_ones() -> None:
    found = {"a": _failed("uint8"), "b": _failed("shape"), "c": _failed("new (error)")}
    unexpected, rows = run.compare(ROWS, ["a", "b", "c"], found, recorded=True)
    assert len(unexpected) == 2
    assert [(row["reason"], row["tests"]) for row in rows] == [("packed", ["a"]), ("shape", ["b"]), ("", ["c"])]
    assert run.compare(rows[:2], ["a", "b"], found, recorded=True) == ([], rows[:2])
    assert run.compare(rows[:2], ["b"], found, recorded=True)[0] == ["listed, but left out: a"]
    assert run.compare(rows, ["a", "b", "c"], found, recorded=True)[0] == ["unexpected failure: c: new (error)"]


def test_another_sample_may_fail_for_known_reasons() -> None:
    assert run.compare(ROWS, ["d"], {"d": _failed("uint8")}, recorded=False)[0] == []
    assert run.compare(ROWS, ["d"], {"d": _failed("other")}, recorded=False)[0] == ["unexpected failure: d: other"]


def test_every_row_has_a_reason() -> None:
    suites = yaml.safe_load(run.EXPECTED.read_text())
    for row in (row for suite in suites.values() for row in suite["rows"]):
        assert row["reason"]
        assert re.compile(row["match"])
        assert row["tests"]
