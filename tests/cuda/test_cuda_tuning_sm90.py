"""The choices of cuda/tuning_sm90.h, printed by a small host program for any card."""

from __future__ import annotations

from typing import Any

import pytest

from host_programs import needs_compiler, printed_by

pytestmark = needs_compiler


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return printed_by("tests/cuda/print_tuning_sm90.cpp", tmp_path_factory.mktemp("tuning"))


def ceil(a: int, b: int) -> int:
    return -(-a // b)


def test_splits_cover_the_sum_and_fit_the_device(chosen: list) -> None:
    for what, sms, m, outputs, stages, tokens, splits, each, clusters in chosen:
        case = (what, sms, m, outputs, stages)
        assert splits * each >= stages > (splits - 1) * each, case
        assert 1 <= splits <= 8, case
        assert 1 <= clusters <= ceil(m, tokens) * ceil(outputs, 128), case
        assert clusters * splits <= sms, case


def test_the_device_is_full_or_the_sum_short(chosen: list) -> None:
    """Most multiprocessors have work in every wave but the last, and in a single wave if there is enough work."""
    for what, sms, m, outputs, stages, tokens, splits, _, clusters in chosen:
        tiles = ceil(m, tokens) * ceil(outputs, 128)
        if tiles > clusters or (stages >= 32 and tiles * 8 >= sms):
            assert clusters * splits >= 0.65 * sms, (what, sms, m, outputs, stages, tokens, splits)


def test_a_weight_is_decoded_for_as_many_tokens_as_there_are(chosen: list) -> None:
    most = {"forward": 128, "dx": 256}
    for what, _, m, outputs, *_, tokens, _, _, _ in chosen:
        if m >= 1000 and outputs >= 4096:
            assert tokens == most[what]
