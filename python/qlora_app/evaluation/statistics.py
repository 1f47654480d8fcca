"""Intervals of accuracies, and a paired test between two models on the same questions."""

from __future__ import annotations

import math

LEVEL = 0.95
_Z = 1.959963984540054  # 97.5% of a normal distribution is below so many standard deviations


def wilson(correct: int, questions: int) -> tuple[float, float]:
    """The 95% confidence interval of an accuracy, Wilson's score interval (1927).

    Unlike the normal approximation, it stays within 0 and 1, and has a width also where all answers are right or wrong.

    Args:
        correct: the number of right answers, at most ``questions``.
        questions: the number of independent questions, at least 1.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> from qlora_app.evaluation import wilson
        >>> low, high = wilson(81, 263)
        >>> round(low, 4), round(high, 4)
        (0.2553, 0.3662)
    """
    if questions < 1:
        raise ValueError(f"questions: expected 1 or more, got {questions}")
    if not 0 <= correct <= questions:
        raise ValueError(f"correct: expected 0 to {questions}, got {correct}")
    share, square = correct / questions, _Z**2 / questions
    centre = (share + square / 2) / (1 + square)
    half = _Z / (1 + square) * math.sqrt((share * (1 - share) + square / 4) / questions)
    return max(0.0, centre - half), min(1.0, centre + half)


def mcnemar(only_first: int, only_second: int) -> float:
    """The two-sided p-value of McNemar's exact test (1947).

    If two models are equally good, each question that only one of them answers is answered by either with probability
    1/2. The p-value is the probability of a split at least as uneven as the observed one.

    Args:
        only_first: the number of questions that only the first model answers correctly.
        only_second: the same for the second model.

    Raises:
        ValueError: a number is negative.

    Example:
        >>> from qlora_app.evaluation import mcnemar
        >>> mcnemar(1, 5)
        0.21875
    """
    for name, count in (("only_first", only_first), ("only_second", only_second)):
        if count < 0:
            raise ValueError(f"{name}: expected 0 or more, got {count}")
    total = only_first + only_second
    ways = tail = 1  # of choosing i of total
    for i in range(min(only_first, only_second)):
        ways = ways * (total - i) // (i + 1)
        tail += ways
    return min(1.0, 2 * tail / (1 << total))
