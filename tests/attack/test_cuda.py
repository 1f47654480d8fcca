"""Random problems of every operator on CUDA, in one process per campaign, so that state between launches is tested."""

from __future__ import annotations

import pytest

from campaign import assert_survived, attack, count

pytestmark = pytest.mark.cuda
SCRIPT = "cuda_problems.py"


def test_operators_agree_with_the_oracle() -> None:
    assert_survived(attack(SCRIPT, "cuda", count(12)))


@pytest.mark.campaign
def test_operators_of_many_tokens_agree_with_the_oracle() -> None:
    assert_survived(attack(SCRIPT, "cuda_many", count(4)))
