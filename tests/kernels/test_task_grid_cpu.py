"""How products of many tokens are cut into tasks: the busiest of many threads has little more than its share."""

from __future__ import annotations

import importlib.util
import pathlib

import pytest

from qlora_ext import _C

ROOT = pathlib.Path(__file__).parents[2]
OPERATORS = ("linear_nf4", "linear_nf4_dx", "linear_nf4_dlora")
THREADS = (1, 2, 3, 4, 6, 7, 8, 12, 16, 24, 31, 32, 48, 63, 64, 96, 128, 192)
VECTORS = {"avx2": (8, 12), "avx512": (16, 24)}  # lanes and accumulators

_spec = importlib.util.spec_from_file_location("thread_table", ROOT / "bench" / "thread_table.py")
assert _spec is not None
assert _spec.loader is not None
thread_table = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(thread_table)


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("vectors", VECTORS)
def test_every_thread_is_busy(op: str, vectors: str) -> None:
    """Efficiency of forward and dX is at least 0.85 where a thread has 16 million multiply-adds per product."""
    for model, layers in thread_table.MODELS.items():
        for m in (8, 64, 512, 4096):
            for threads in THREADS:
                efficiency = thread_table.efficiency(op, threads, m, layers, *VECTORS[vectors])
                assert efficiency <= 1.01  # the cut may be 1% above the best, also for one thread
                work = m * min(n * k for n, k, _ in layers) / threads
                if op != "linear_nf4_dlora" and work >= 1 << 24:
                    assert efficiency >= 0.85, (model, m, threads)
                if threads <= 2:
                    assert efficiency >= 0.92, (model, m, threads)


def test_cuts_are_those_of_one_thread_only_if_there_is_one() -> None:
    one, two = (_C.task_grid("linear_nf4", threads, 128, 576, 576) for threads in (1, 2))
    assert one["tasks"] >= 1
    assert two["tasks"] >= 2
    assert two["critical_path"] < 0.55 * one["critical_path"]
    assert one["total"] >= 128 * 576
    with pytest.raises(ValueError, match="threads: expected 1 or more, got 0"):
        _C.task_grid("linear_nf4", 0, 1, 1, 1)


def test_the_table_in_the_docs() -> None:
    assert thread_table.table() in (ROOT / "docs" / "cpu_roofline.md").read_text()
