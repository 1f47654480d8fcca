"""What cuda/tuning.h chooses, on the host: it is plain C++, so a program of a few lines prints it for any card."""

from __future__ import annotations

from typing import Any

import pytest

from host_programs import needs_compiler, printed_by

pytestmark = needs_compiler

PROGRAM = r"""
#include <cstdio>
#include "cuda/tuning.h"
using namespace qlora;
using namespace qlora::cuda;

Device card(int arch, int sms, int l2_mb) {
  Device d;
  d.arch = arch, d.sm_count = sms, d.l2_bytes = l2_mb << 20;
  return d;
}

int main() {
  const char* comma = "";
  std::printf("{\"forward\": [");
  for (int slots : {108, 132, 216, 264, 170})
    for (int tiles : {1, 8, 32, 86, 112, 128, 148, 224, 1002})
      for (int segments : {1, 9, 64, 172, 224})
        for (int tokens : {8, 64}) {
          const auto each = linear_split_segments(tiles, segments, 2, tokens, slots);
          std::printf("%s[%d, %d, %d, %d, %ld]", comma, slots, tiles, segments, tokens, long(each));
          comma = ", ";
        }
  std::printf("], \"dx\": [");
  comma = "";
  for (int n : {1, 64, 4096, 14336, 128256})
    for (int k : {64, 4096, 11008})
      for (int m : {1, 16, 64, 200})
        for (int ctas : {1, 2}) {
          const auto c = dx_config(dx_tile(m, Kernel::kTensorCores), m, n, k, ctas, card(90, 132, 50));
          std::printf("%s[%d, %d, %d, %d, %d, %d, %ld, %ld]", comma, n, k, m, 132 * ctas, c.tokens, c.columns,
                      long(c.splits), long(c.rows_per_split));
          comma = ", ";
        }
  std::printf("], \"crossover\": {");
  comma = "";
  for (int arch : {75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121}) {
    std::printf("%s\"%d\": [%ld, %ld, %ld]", comma, arch,
                long(library_crossover(DType::kBFloat16, 4096, 64, card(arch, 100, 40))),
                long(library_crossover(DType::kFloat32, 4096, 64, card(arch, 100, 40))),
                long(library_crossover(DType::kBFloat16, 4095, 64, card(arch, 100, 40))));
    comma = ", ";
  }
  std::printf("}, \"panel\": [");
  comma = "";
  for (int l2 : {40, 50, 126})
    for (int m : {100, 4096, 65536})
      for (int inner : {64, 4096, 128256})
        for (int columns : {1, 300, 4096, 28672})
          for (int sums : {0, 1}) {
            const auto panel = library_panel_columns(m, inner, columns, 256, sums, DType::kBFloat16, card(90, 132, l2));
            std::printf("%s[%d, %d, %d, %d, %d, %ld]", comma, l2, m, inner, columns, sums, long(panel));
            comma = ", ";
          }
  std::printf("], \"feedback\": [");
  comma = "";
  for (int sms : {1, 108, 132})
    for (int n : {1, 31, 1024, 4096, 14336}) {
      std::printf("%s[%d, %d, %d]", comma, sms, n, feedback_warps(n, 4, card(90, sms, 50)));
      comma = ", ";
    }
  std::printf("]}\n");
}
"""


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return printed_by(PROGRAM, tmp_path_factory.mktemp("tuning"))


def ceil(a: int, b: int) -> int:
    return -(-a // b)


def test_splits_of_the_forward_cover_the_sum(chosen: dict) -> None:
    for slots, tiles, segments, tokens, each in chosen["forward"]:
        assert each >= 1, (slots, tiles, segments, tokens)
        assert each % 2 == 0
        if each < segments:  # split: no part with less work than its tables
            assert each >= 16


def time_over_ideal(slots: int, tiles: int, segments: int, splits: int, each: int) -> float:
    """Of the waves that the CTAs come in, in segments a slot, over the work shared out evenly."""
    return ceil(tiles * splits, slots) * each / (tiles * segments / slots)


@pytest.mark.parametrize(
    ("slots", "tiles", "limit"),
    [
        (108, 112, 1.5),  # A100, 14336 rows: one CTA a tile is two waves, 1.93
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
    expected = {75: 256, 80: 256, 86: never, 87: never, 89: never, 90: 128, 100: 64, 103: 64, 110: 512}
    expected |= {120: never, 121: never}
    for arch, (regular, exact, ragged) in chosen["crossover"].items():
        assert regular == expected[int(arch)]
        assert exact == ragged == 65


def test_panels_stay_in_half_of_l2(chosen: dict) -> None:
    for l2, m, inner, columns, sums, panel in chosen["panel"]:
        assert 1 <= panel <= columns
        if panel < columns:
            assert panel % 256 == 0
            a_column = 2 * inner + 4 * m * sums
            assert panel * a_column <= max(l2 << 19, 512 * a_column) + 256 * a_column, (l2, m, inner, columns, sums)


def test_feedback_shares_factors_where_every_sm_has_rows(chosen: dict) -> None:
    for sms, n, warps in chosen["feedback"]:
        assert warps in (2, 4, 8)  # a stripe of 4 rows a warp fills whole words of codes
        assert warps == 2 or n > sms * 4 * warps / 2, (sms, n)
        assert warps == 8 or n <= sms * 4 * warps, (sms, n)
