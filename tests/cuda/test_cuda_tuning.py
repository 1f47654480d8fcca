"""The configurations of cuda/tuning for any card. The headers are plain C++, and a small host program prints them."""

from __future__ import annotations

import bisect
from typing import Any

import pytest

from host_programs import built, needs_compiler, printed_by

pytestmark = needs_compiler


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return printed_by(built("tests/cuda/print_tuning.cpp", tmp_path_factory.mktemp("tuning")))


def ceil(a: int, b: int) -> int:
    return -(-a // b)


def test_splits_of_the_forward_cover_the_sum(chosen: dict) -> None:
    for slots, tiles, segments, tokens, each, _ in chosen["forward"]:
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
    for found_slots, found_tiles, segments, _, each, _ in chosen["forward"]:
        if (found_slots, found_tiles) == (slots, tiles) and segments >= 172:
            assert time_over_ideal(slots, tiles, segments, ceil(segments, each), each) < limit


def test_a_stream_fills_the_device_where_tiles_do_not(chosen: dict) -> None:
    """Runs are equal, up to the segments of a line of w, and no longer than the waves of CTAs that they replace."""
    streams = set()
    for slots, tiles, segments, _, each, run in chosen["forward"]:
        case = (slots, tiles, segments)
        if run:
            assert run % 4 == 0, case
            assert run >= 16, case  # each CTA has more work than its tables
            assert run * slots >= tiles * segments > (run - 4) * slots, case
            assert run < ceil(tiles * ceil(segments, each), slots) * each, case
            streams.add(case)
    assert (108, 112, 64) in streams  # A100, 14336 x 4096: 69% of its time is useful with two CTAs per tile


def test_splits_of_dx_cover_the_sum(chosen: dict) -> None:
    for n, k, m, slots, tokens, columns, splits, rows in chosen["dx"]:
        assert rows % 64 == 0
        assert splits * rows >= n > (splits - 1) * rows, (n, k, m)
        tiles = ceil(m, tokens) * ceil(k, columns)
        if splits > 1:
            assert ceil(tiles * splits, slots) * rows < ceil(tiles, slots) * n, (n, k, m, slots)


def test_crossovers(chosen: dict) -> None:
    never = 2**63 - 1
    expected = {75: 17, 80: never, 86: never, 87: never, 89: never, 90: 128, 100: 64, 103: 64, 110: 512}
    expected |= {120: never, 121: never}
    for arch, (regular, exact, ragged) in chosen["crossover"].items():
        assert regular == expected[int(arch)]
        assert exact == 65
        assert ragged == (17 if arch == "75" else 65)  # bfloat16 stands for both 16-bit types


# Of each card: SMs, and data sheets' rates per nanosecond in flops of 16 bits and of float32, and in bytes.
RATES = {
    "sm75": (40, 65e3, 8.1e3, 320),
    "sm80": (108, 312e3, 19.5e3, 2039),
    "sm86": (82, 71e3, 35.6e3, 936),
    "sm89": (128, 165e3, 82.6e3, 1008),
    "sm90": (132, 989e3, 67e3, 3350),
    "sm100": (148, 2250e3, 80e3, 8000),
    "sm120": (170, 209e3, 105e3, 1792),
}


# The same of devices as the driver describes them, by their data sheets. That of GB10 states no dense rate.
QUERIED = {
    "A100": (312e3, 19.5e3, 2039),
    "A10": (None, 31.2e3, 600),
    "L4": (None, 30.3e3, 300),
    "RTX 4090": (165e3, 82.6e3, 1008),
    "GB10": (None, None, 273),
}


def test_rates_are_those_of_the_device(chosen: dict) -> None:
    """A card that is known by its architecture alone has the data sheet's rates of one card of that architecture."""
    for card, (_, *rates) in RATES.items():
        assert chosen["rates"][card] == rates, card
    for card, rates in QUERIED.items():
        for got, expected in zip(chosen["rates"][card], rates, strict=True):
            assert expected is None or got == pytest.approx(expected, rel=0.04), card
    assert chosen["rates"]["GB10"][0] < 0.3 * chosen["rates"]["sm120"][0]  # 48 SMs, not 170


def split(columns: int, panel: int) -> list[tuple[int, int]]:
    """The first column of each panel, and its number of columns."""
    return [(first, min(panel, columns - first)) for first in range(0, columns, panel)]


def library_time(card: str, m: int, inner: int, columns: int, sums: int, element: int, l2: int, panel: int) -> float:
    """Nanoseconds: the waves of each panel, the launches, and what panels outside of L2 move in memory."""
    sms, half_flops, float_flops, bandwidth = RATES[card]
    parts, rows, tiles = split(columns, panel), ceil(m, 128), ((64, 77), (128, 128), (256, 256))
    each = sum(min(ceil(rows * ceil(part, width), sms) * cost for width, cost in tiles) for _, part in parts)
    multiplied = each * 128 * 2 * inner * sms / (0.75 * (float_flops if element == 4 else half_flops))
    a_column = element * inner + 4 * m * sums
    memory = 4 * m * columns * sums + (2 * columns * a_column if panel * a_column > l2 // 2 else 0)
    return multiplied + memory / (0.9 * bandwidth) + len(parts) * 2500 * (2 + sums)


def test_on_a_b200_sums_are_split_where_panels_would_leave_l2(chosen: dict) -> None:
    """Of a bfloat16 layer without LoRA and bias."""
    split = 0
    for m, n, k, l2, splits, panel, _, time, *_ in chosen["b200"]:

        def time_of(splits: int, panel: int, case: tuple[int, ...] = (m, n, k, l2)) -> float:
            m, n, k, l2 = case
            if splits == 1:
                return library_time("sm100", m, k, n, 0, 2, l2, panel)
            part = ceil(ceil(k, splits), 256) * 256
            launches = 2500 * len(range(0, n, panel))  # one rounds the sums of all parts
            return splits * (library_time("sm100", m, part, n, 1, 2, l2, panel) - launches) + launches

        case = (m, n, k, splits, panel)
        assert time == pytest.approx(time_of(splits, panel), abs=1), case
        whole = min(time_of(1, each) for each in range(256, widest(n, 2 * k, l2) + 1, 256))
        assert time <= whole + 1, case
        if splits > 1:
            assert panel * (2 * ceil(k, splits) + 4 * m) <= l2 // 2, case
            split += 1
    assert split > 1


def tcgen05_time(m: int, outputs: int, terms: int, scales: int, tile: list[int]) -> float:
    """Nanoseconds: waves of tiles, whose stages of 64 terms take as long as passes over shared memory, or as L2."""
    tokens, splits, multicast, clusters = tile
    lookups, packed, x = 128 * 64 / 2 * 8 / 128, 2 * 128 * 32 / 128, 2 * tokens * 128 / 128
    others = 128 * 33 if scales == 4 else 64 * (64 + 32)
    from_l2 = (tokens * 128 // multicast + others) * clusters * splits * multicast // 6400
    stage = max(lookups + packed + x + scales, from_l2)
    one = ceil(ceil(terms, 64), splits) * stage + 2500 + 1000 * (splits > 1)
    waves = ceil(ceil(m, tokens) * ceil(outputs, 128 * multicast), clusters)
    return max((waves * one + 1500 * (multicast > 1)) / 1.85, 0.52 * outputs * terms / 7200)


def test_a_b200_runs_the_kernel_that_takes_the_least_time(chosen: dict) -> None:
    times, kernels = {}, set()
    for m, n, k, _, _, _, kernel, library, fused, forward, of_dx, dx in chosen["b200"]:
        for op, (*tile, own), sizes, scales, choice in (
            ("forward", forward, (m, n, k), 4, (kernel, library, fused)),
            ("dx", dx, (m, k, n), 72, of_dx),
        ):
            case = (op, m, n, k)
            assert own == pytest.approx(tcgen05_time(*sizes, scales, tile), abs=1), case
            for tokens in (64, 128, 256):
                alone = [tokens, 1, 1, min(148, ceil(m, tokens) * ceil(sizes[1], 128))]
                assert own <= tcgen05_time(*sizes, scales, alone) + 1, case
            name, library_ns, fused_ns = choice
            library_ns += 0.52 * n * k / 7200
            times[case] = own
            if m < 17:
                assert name == "tensor_cores", case
            else:
                assert (name == "sm100") == (own < min(library_ns - 2500, fused_ns)), case
                kernels.add((op, name))
    assert kernels == {(op, name) for op in ("forward", "dx") for name in ("sm100", "library")}
    # Besides a launch, in microseconds
    assert {m: round(times["forward", m, 4096, 4096] / 1000) for m in (64, 128, 256)} == {64: 6, 128: 7, 256: 9}
    assert {m: round(times["dx", m, 4096, 4096] / 1000) for m in (64, 128, 256)} == {64: 6, 128: 7, 256: 10}


def units_time(whole: int, cut: int, parts: int, stages: int, sms: int) -> int:
    """When the last of these units ends, in stages, if each SM takes the next one when it is free: whole tiles, and
    then the parts of the others, each of which takes two stages more. The last CTA of a tile reads a part in two."""
    waves, busy = divmod(whole, sms)
    start = waves * stages + (stages if busy else 0)
    if cut == 0:
        return start
    part = ceil(stages, parts) + 2
    ended = lambda time: (sms - busy) * (time // part) + busy * max((time - stages) // part, 0)  # noqa: E731
    last = bisect.bisect_left(range((cut * parts + 1) * part + stages), cut * parts, key=ended)
    return max(waves * stages + last, start) + 2 * parts


def panels_stages(card: str, m: int, inner: int, columns: int, whole: int, parts: int, panel: int) -> int:
    tokens = ceil(m, 128)
    total = 0
    for first, part in split(columns, panel):
        before = min(max(whole - first, 0), part)
        tiles = tokens * ceil(before, 256), tokens * ceil(part - before, 256)
        total += units_time(*tiles, parts, ceil(inner, 32), RATES[card][0])
    return total


def gemm_time(card: str, m: int, inner: int, columns: int, whole: int, parts: int, l2: int, panel: int) -> float:
    """Nanoseconds: units, launches, and panels outside of L2, which are read while others are multiplied."""
    sms, flops, _, bandwidth = RATES[card]
    units = panels_stages(card, m, inner, columns, whole, parts, panel) * 2 * 128 * 256 * 32 * sms / (0.8 * flops)
    memory = 2 * inner * columns / (0.9 * bandwidth) if panel * 2 * inner > l2 // 2 else 0.0
    return max(units, memory) + memory + len(split(columns, panel)) * 5000


def widest(columns: int, column_bytes: int, l2: int) -> int:
    return min(max(256, max(l2 // 2, 128 << 20) // column_bytes // 256 * 256), columns)


def test_panels_of_the_library_take_the_least_time(chosen: dict) -> None:
    """They fill waves of tiles, and only leave L2 where that costs less than idle SMs."""
    outside = 0
    for *case, panel in chosen["panel"]:
        _, m, inner, columns, sums, element, l2 = case
        assert 1 <= panel <= columns, case
        assert panel == columns or panel % 256 == 0, case
        a_column = element * inner + 4 * m * sums
        most = widest(columns, a_column, l2)
        assert panel <= most, case
        best = min(library_time(*case, each) for each in (*range(256, most, 256), most))
        assert library_time(*case, panel) <= best * 1.0001, case
        outside += panel * a_column > l2 // 2 and panel > 256
    assert 0 < outside < len(chosen["panel"]) / 2


def test_panels_of_our_gemm_take_the_least_time(chosen: dict) -> None:
    for *case, panel, stages, time in chosen["gemm"]:
        _, _, inner, columns, _, _, l2 = case
        assert panel == columns or panel % 256 == 0, case
        most = widest(columns, 2 * inner, l2)
        assert 1 <= panel <= most, case
        assert stages == panels_stages(*case[:-1], panel), case
        assert time == pytest.approx(gemm_time(*case, panel), abs=1), case
        assert time <= 1.0001 * min(gemm_time(*case, each) for each in (*range(256, most, 256), most)) + 1, case


def test_sums_are_cut_where_whole_tiles_would_leave_sms_idle(chosen: dict) -> None:
    cut = 0
    for card, m, inner, columns, whole, parts, *_ in chosen["gemm"]:
        if card in ("sm75", "sm100"):
            continue
        case, stages = (card, m, inner, columns), ceil(inner, 32)
        assert (parts == 1) == (whole == columns), case
        time = panels_stages(*case, whole, parts, columns)
        assert time <= panels_stages(*case, columns, 1, columns), case
        if parts > 1:
            assert whole % 256 == 0, case
            assert stages >= 8 * parts, case
            assert (parts - 1) * ceil(stages, parts) < stages, case  # no part is empty
            others = range(2, min(16, stages // 8) + 1)
            assert time <= 1.06 * min(panels_stages(*case, whole, p, columns) for p in others), case
            cut += 1
    assert cut > 50


def test_cuts_do_not_depend_on_the_number_of_sms(chosen: dict) -> None:
    cuts: dict[tuple[int, ...], set[tuple[int, int]]] = {}
    for *case, whole, parts in chosen["cuts"]:
        cuts.setdefault(tuple(case), set()).add((whole, parts))
    assert all(len(found) == 1 for found in cuts.values()), cuts
    assert len(set.union(*cuts.values())) > 5


def test_cut_sums_on_an_a100(chosen: dict) -> None:
    """Microseconds by the model, besides LoRA's low-rank product and reading the packed weight, which all take: our
    GEMM, with whole tiles alone, and the library."""
    assert {(m, n, k): times for m, n, k, *times in chosen["a100"]} == {
        (256, 4096, 4096): [70, 139, 92],
        (1024, 4096, 4096): [178, 242, 217],
        (256, 14336, 4096): [223, 301, 321],
        (256, 4096, 14336): [212, 476, 359],
    }


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
    """Two waves of short parts may end before one wave of long parts: 32 tiles of 112 stages take 2 x 16 stages in 16
    clusters of 7, but 38 in clusters of 3, of which 42 fit and 10 are idle. Then they have to gain more than the start
    of a second tile. The driver says how many clusters fit: a card's GPCs may lack the multiprocessors that their total
    suggests."""
    start = {"forward": 4, "dx": 5.5}  # stages of 64 tokens in the time in which a tile starts and is stored
    second = 0
    for what, fits, m, outputs, stages, tokens, splits, each, _, multicast in chosen["sm90"]:
        tiles = ceil(m, tokens) * ceil(outputs, 128)
        if tiles > 32 or fits[0] != 132 or fits[7] == 0:
            continue
        waves = ceil(ceil(m, tokens) * ceil(outputs, 128 * multicast), fits[splits * multicast - 1])
        one_wave = min(ceil(stages, s) for s in range(1, 9) if tiles <= fits[s - 1])
        case = (what, fits, m, outputs, stages, splits)
        assert waves == 1 or waves * (each + start[what]) <= one_wave + start[what], case
        second += waves > 1
    assert second < 10


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
            shared += 1
        elif fits[1] and m >= 1000 and outputs >= 4096 and stages >= 32:
            assert fits[1] * 2 < fits[0], case  # pairs would leave SMs idle
    assert shared > 50
