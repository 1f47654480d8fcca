"""Odd arguments: each call works, with the oracle's result, or raises an exception that names an argument."""

from __future__ import annotations

import pytest

from campaign import assert_survived, attack, count


@pytest.mark.parametrize("kind", ["operators", "python"])
def test_a_call_works_or_says_why_not(kind: str) -> None:
    assert_survived(attack("argument_problems.py", kind, count(400)))
