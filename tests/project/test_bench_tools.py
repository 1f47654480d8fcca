"""The tools that compare results, put them into README and compare a kernel with its ceiling."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from bench.lib import readme, report, results_files


def spread(median: float, width: float = 0.02) -> dict[str, float]:
    return {"median": median, "low": median * (1 - width), "high": median * (1 + width)}


def section(ours: dict[str, float], tokens_per_second: float = 100.0, peers: float = 50.0) -> dict[str, Any]:
    rows = [
        {"op": "forward", "N x K": "8x8", "M": 1, "kernel": "few", "torch us": 10, "ours": ours, "bitsandbytes": ours},
        {"base": "qlora_ext", "tokens/s": tokens_per_second},
        {"base": "bitsandbytes", "tokens/s": peers},
    ]
    return {"title": "", "notes": [], "machine": {}, "rows": rows}


def compared(path: pathlib.Path, old: dict[str, Any], new: dict[str, Any]) -> tuple[int, str]:
    for name, content in (("old", old), ("new", new)):
        (path / f"{name}.json").write_text(json.dumps({"machine": "a", "sections": {"linear": content}}))
    command = [sys.executable, "-m", "bench.lib.compare", str(path / "old.json"), str(path / "new.json")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return run.returncode, run.stdout + run.stderr


@pytest.mark.parametrize(
    ("new", "status", "message"),
    [
        (section(spread(0.5)), 0, "2 figures: 0 better, 0 worse"),
        (section(spread(0.51)), 0, "0 better, 0 worse"),  # within the measurement noise
        (section(spread(0.55)), 1, "WORSE   0.91  linear: forward, 8x8, 1: ours: 0.5"),
        (section(spread(0.45)), 0, "better   1.11  linear"),
        (section(spread(0.55, width=0.2)), 0, "0 better, 0 worse"),  # the ranges overlap
        (section(spread(0.5), tokens_per_second=80), 1, "WORSE   0.80  linear: qlora_ext: tokens/s: 100 -> 80"),
        (section(spread(0.5), peers=20), 0, "0 better, 0 worse"),  # a change of a peer is not a regression
    ],
    ids=["same", "noise", "worse", "better", "wide", "tokens", "peer"],
)
def test_compare(tmp_path: pathlib.Path, new: dict[str, Any], status: int, message: str) -> None:
    found, output = compared(tmp_path, section(spread(0.5)), new)
    assert message in output
    assert found == status


def test_files_without_a_common_figure_are_no_success(tmp_path: pathlib.Path) -> None:
    empty = {**section(spread(0.5)), "rows": []}
    assert compared(tmp_path, section(spread(0.5)), empty) == (2, "the files have no figure in common\n")


@pytest.mark.parametrize("path", readme.PAGES, ids=lambda path: path.name)
def test_pages_have_the_figures_of_the_results(path: pathlib.Path) -> None:
    page = path.read_text()
    assert readme.written(page, readme.PAGES[path]) == page, "run python -m bench.lib.readme"


def test_a_table_without_its_marks_is_an_error() -> None:
    with pytest.raises(ValueError, match="expected the marks of the table 'steps' once, found them 0 times"):
        readme.written("no marks here", readme.PAGES[readme.README])


def test_points_under_the_ceiling() -> None:
    row = {"op": "forward", "N x K": "1000x2000", "M": 10, "torch us": 100, "ours": spread(0.5)}
    ours, torch = sorted(results_files.points({"rows": [row]}), key=lambda point: point.contender)
    assert (ours.contender, torch.contender) == ("ours", "torch")
    assert ours.flops == pytest.approx(2 * 10 * 1000 * 2000 / 50e-6)
    assert torch.flops == pytest.approx(ours.flops / 2)
    assert ours.intensity == pytest.approx(4e7 / (2e6 * 4.127 / 8 + 2 * 10 * 3000))
    ceiling = results_files.Ceiling(bandwidth=1e9, flops=1e10)
    assert (ceiling.at(2.0), ceiling.at(20.0)) == (2e9, 1e10)


@pytest.mark.parametrize("counted", [False, True])
def test_the_report_ends_in_the_cuda_counters_where_there_are_any(tmp_path: pathlib.Path, counted: bool) -> None:
    machine = tmp_path / "amd_0_0"
    machine.mkdir()
    facts = dict.fromkeys(("date", "threads", "isa", "torch", "load"), "")
    (machine / "step.json").write_text(json.dumps({**section(spread(0.5)), "machine": facts}))
    if counted:
        rows = [{"operator": "dequantize", "contender": "ours", "launches": 1}]
        content = {"notes": ["No card was involved."], "rows": rows}
        (tmp_path / "cuda_counters.json").write_text(json.dumps(content))
    report.write(machine)
    end = """## CUDA, counted under the kernel simulator

No card was involved.

| operator | contender | launches |
|---|---|---|
| dequantize | ours | 1 |
"""
    assert machine.with_suffix(".md").read_text().endswith(end) == counted
