"""Confidence intervals and the paired test, against published and hand-computed figures."""

from __future__ import annotations

from fractions import Fraction
from math import comb

import pytest

from qlora_app.evaluation import mcnemar, wilson


@pytest.mark.parametrize(
    ("correct", "questions", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_intervals_of_newcombe_1998(correct: int, questions: int, low: float, high: float) -> None:
    found = wilson(correct, questions)
    assert found == pytest.approx((low, high), abs=5e-5)
    flipped = wilson(questions - correct, questions)
    assert flipped == pytest.approx((1 - found[1], 1 - found[0]))


@pytest.mark.parametrize(
    ("first", "second", "p"),
    [(0, 0, 1.0), (3, 3, 1.0), (5, 1, 14 / 64), (0, 5, 2 / 32), (0, 6, 2 / 64), (10, 2, 2 * (1 + 12 + 66) / 4096)],
)
def test_mcnemar_gives_hand_computed_values(first: int, second: int, p: float) -> None:
    assert mcnemar(first, second) == pytest.approx(p, rel=1e-12)
    assert mcnemar(second, first) == mcnemar(first, second)


def test_mcnemar_is_exact_for_many_questions() -> None:
    exact = Fraction(2 * sum(comb(1000, i) for i in range(401)), 2**1000)
    assert mcnemar(400, 600) == pytest.approx(float(exact), rel=1e-12)


@pytest.mark.parametrize(("arguments", "name"), [((0, 0), "questions"), ((3, 2), "correct"), ((-1, 2), "correct")])
def test_wilson_rejects_numbers_out_of_range(arguments: tuple[int, int], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected "):
        wilson(*arguments)


def test_mcnemar_rejects_negative_counts() -> None:
    with pytest.raises(ValueError, match="^only_second: expected 0 or more, got -1"):
        mcnemar(0, -1)
