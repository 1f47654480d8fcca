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
    """The least efficiency, where the smallest product has many multiply-adds per thread."""
    for model, layers in thread_table.MODELS.items():
        for m in (8, 64, 512, 4096):
            for threads in THREADS:
                efficiency = thread_table.efficiency(op, threads, m, layers, *VECTORS[vectors])
                case = (model, m, threads)
                assert efficiency <= 1.01, case  # the cut may be 1% above the best, also for one thread
                millions = m * min(n * k for n, k, _ in layers) / threads / 1e6
                if threads <= 2:
                    least = 0.9
                elif op == "linear_nf4_dlora" or millions < 32:
                    continue
                elif threads <= 64 and threads & (threads - 1) == 0:
                    least = 0.9
                else:
                    least = 0.85 if millions >= 64 else 0.65
                assert efficiency >= least, case


@pytest.mark.parametrize("vectors", VECTORS)
def test_tasks_fit_their_scratch(vectors: str) -> None:
    lanes, accumulators = VECTORS[vectors]
    for threads in THREADS:
        for m in (1, 17, 255, 257, 1000, 1024, 4096):
            for n, k in ((1, 64), (500, 330), (2000, 576), (11008, 4096)):
                forward = _C.task_grid("linear_nf4", threads, m, n, k, lanes, accumulators)
                dx = _C.task_grid("linear_nf4_dx", threads, m, n, k, lanes, accumulators)
                assert max(forward["tokens"], dx["tokens"]) <= 256
                assert forward["rows"] * min(-(-m // (2 * lanes)) * 2 * lanes, 256) <= 180 * 1024
                assert dx["rows"] <= (2048 if m <= 64 else 512)


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
