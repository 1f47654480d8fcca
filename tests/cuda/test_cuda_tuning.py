"""The configurations of cuda/tuning for any card. The headers are plain C++, and a small host program prints them."""

from __future__ import annotations

from typing import Any

import pytest

from host_programs import needs_compiler, printed_by

pytestmark = needs_compiler


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return printed_by("tests/cuda/print_tuning.cpp", tmp_path_factory.mktemp("tuning"))


def ceil(a: int, b: int) -> int:
    return -(-a // b)


def test_splits_of_the_forward_cover_the_sum(chosen: dict) -> None:
    for slots, tiles, segments, tokens, each in chosen["forward"]:
        assert each >= 1, (slots, tiles, segments, tokens)
        assert each % 2 == 0
        if each < segments:  # split: each part has more work than its tables
            assert each >= 16


def time_over_ideal(slots: int, tiles: int, segments: int, splits: int, each: int) -> float:
    """The time of the waves of CTAs, in segments per slot, relative to evenly distributed work."""
    return ceil(tiles * splits, slots) * each / (tiles * segments / slots)


@pytest.mark.parametrize(
    ("slots", "tiles", "limit"),
    [
        (108, 112, 1.5),  # A100, 14336 rows: one CTA per tile takes two waves, 1.93
        (132, 148, 1.4),  # H100, 64 tokens, 18944 rows: 1.78
        (132, 86, 1.2),  # H100, 64 tokens, 11008 rows: 1.53
    ],
)
def test_waves_are_counted(chosen: dict, slots: int, tiles: int, limit: float) -> None:
    for found_slots, found_tiles, segments, _, each in chosen["forward"]:
        if (found_slots, found_tiles) == (slots, tiles) and segments >= 172:
            assert time_over_ideal(slots, tiles, segments, ceil(segments, each), each) < limit


def test_splits_of_dx_cover_the_sum(chosen: dict) -> None:
    for n, k, m, slots, tokens, columns, splits, rows in chosen["dx"]:
        assert rows % 64 == 0
        assert splits * rows >= n > (splits - 1) * rows, (n, k, m)
        tiles = ceil(m, tokens) * ceil(k, columns)
        if splits > 1:
            assert ceil(tiles * splits, slots) * rows < ceil(tiles, slots) * n, (n, k, m, slots)


def test_crossovers(chosen: dict) -> None:
    never = 2**63 - 1
    expected = {75: 17, 80: 256, 86: never, 87: never, 89: never, 90: 128, 100: 64, 103: 64, 110: 512}
    expected |= {120: never, 121: never}
    for arch, (regular, exact, ragged) in chosen["crossover"].items():
        assert regular == expected[int(arch)]
        assert exact == 65
        assert ragged == (17 if arch == "75" else 65)  # bfloat16 stands for both 16-bit types


def test_panels_stay_in_half_of_l2(chosen: dict) -> None:
    for l2, m, inner, columns, sums, panel in chosen["panel"]:
        assert 1 <= panel <= columns
        if panel < columns:
            assert panel % 256 == 0
            a_column = 2 * inner + 4 * m * sums
            assert panel * a_column <= max(l2 << 19, 512 * a_column) + 256 * a_column, (l2, m, inner, columns, sums)


def test_panels_of_the_gemm_have_full_waves(chosen: dict) -> None:
    """The panels take no more waves of tiles than any others that stay in half of L2, or than those of 1024 columns."""
    for sms, l2, m, inner, columns, panel, waves in chosen["gemm"]:
        case = (sms, l2, m, inner, columns)

        def waves_of(of: int, case: tuple[int, ...] = case) -> int:
            sms, _, m, _, columns = case
            parts = [of] * (columns // of) + [columns % of]
            return sum(ceil(ceil(m, 128) * ceil(part, 256), sms) for part in parts)

        assert 1 <= panel <= columns, case
        assert panel == columns or panel % 256 == 0, case
        most = max(ceil((l2 << 19) // (2 * inner), 256) * 256, 1024)
        assert panel <= most, case
        assert waves == waves_of(panel), case
        launches = 180 / inner  # the cost of a panel, in waves
        best = min(waves_of(p) + ceil(columns, p) * launches for p in (*range(256, min(most, columns), 256), panel))
        assert waves + ceil(columns, panel) * launches <= best * 1.0001, case


def test_feedback_shares_factors_where_every_sm_has_rows(chosen: dict) -> None:
    for sms, n, warps in chosen["feedback"]:
        assert warps in (2, 4, 8)  # a stripe of 4 rows per warp fills full words of codes
        assert warps == 2 or n > sms * 4 * warps / 2, (sms, n)
        assert warps == 8 or n <= sms * 4 * warps, (sms, n)


def test_splits_of_hopper_cover_the_sum_and_fit_the_device(chosen: dict) -> None:
    for what, fits, m, outputs, stages, tokens, splits, each, clusters, multicast in chosen["sm90"]:
        case = (what, fits, m, outputs, stages)
        assert splits * each >= stages > (splits - 1) * each, case
        assert 1 <= clusters <= ceil(m, tokens) * ceil(outputs, 128 * multicast), case
        assert clusters <= fits[splits * multicast - 1], case


def test_hopper_is_full_or_the_sum_short(chosen: dict) -> None:
    """Most multiprocessors have work in every wave but the last, and in one wave, if there is enough."""
    for what, fits, m, outputs, stages, tokens, splits, _, clusters, multicast in chosen["sm90"]:
        tiles = ceil(m, tokens) * ceil(outputs, 128 * multicast)
        if fits[7] and (tiles > clusters or (stages >= 32 and tiles * 8 >= fits[0])):
            assert clusters * splits * multicast >= 0.65 * fits[0], (what, fits, m, outputs, stages, tokens, splits)


def test_few_tiles_of_hopper_take_no_longer_than_in_one_wave(chosen: dict) -> None:
    """A second wave doubles the time of the same splits. It is only worth it for long sums that more CTAs share. The
    driver says how many clusters fit: a card's GPCs may lack the multiprocessors that their total suggests."""
    second = 0
    for what, fits, m, outputs, stages, tokens, splits, each, _, multicast in chosen["sm90"]:
        tiles = ceil(m, tokens) * ceil(outputs, 128)
        if tiles > 32 or fits[0] != 132 or fits[7] == 0:
            continue
        waves = ceil(ceil(m, tokens) * ceil(outputs, 128 * multicast), fits[splits * multicast - 1])
        one_wave = min(ceil(stages, s) for s in range(1, 9) if tiles <= fits[s - 1])
        assert waves == 1 or (stages > 100 and waves * each <= one_wave), (what, fits, m, outputs, stages, splits)
        second += waves > 1
    assert second < 20


def test_on_hopper_a_weight_is_decoded_for_as_many_tokens_as_there_are(chosen: dict) -> None:
    most = {"forward": 128, "dx": 256}
    for what, _, m, outputs, *_, tokens, _, _, _, _ in chosen["sm90"]:
        if m >= 1000 and outputs >= 4096:
            assert tokens == most[what]


def test_hopper_shares_tokens_where_l2_is_the_bound(chosen: dict) -> None:
    """Pairs of tiles take no more waves than the same tiles alone, unless there are many, and serve large problems."""
    shared = 0
    for what, fits, m, outputs, stages, tokens, splits, _, _, multicast in chosen["sm90"]:
        case = (what, fits, m, outputs, stages)
        assert multicast in (1, 2), case
        if multicast == 2:
            alone = ceil(ceil(m, tokens) * ceil(outputs, 128), fits[splits - 1])
            pairs = ceil(ceil(m, tokens) * ceil(outputs, 256), fits[2 * splits - 1])
            assert pairs <= alone or alone > 4, case
            assert tokens >= 128, case
            shared += 1
        elif fits[1] and m >= 1000 and outputs >= 4096 and stages >= 32:
            assert fits[1] * 2 < fits[0], case  # pairs would leave SMs idle
    assert shared > 50
