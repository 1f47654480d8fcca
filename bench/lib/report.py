"""Collects all results of a machine into one JSON file and one report with pictures.

    python -m bench.lib.report [--results DIRECTORY] MACHINE       (a folder of bench/results, such as amd_26_2)

Writes MACHINE.json, which bench/lib/compare.py reads, and MACHINE.md next to the folder. Rows of the linear layer get
their share of the machine's limits, if bench/ceiling.py has measured them. The counters of bench/cuda_counters.py,
which do not depend on a machine, come last.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from . import pictures
from . import results_files as files

ORDER = ("step", "decode", "linear", "codec", "ragged", "streaming", "ceiling")


def _rank(name: str) -> tuple[int, str]:
    return next((i for i, start in enumerate(ORDER) if name.startswith(start)), len(ORDER)), name


def _with_shares(section: files.Section, ceiling: files.Ceiling) -> list[files.Row]:
    """The rows, each with the share of the machine's limit that ours reaches."""
    ours = {(p.op, p.shape, p.tokens): p for p in files.points(section) if p.contender == "ours"}
    rows = []
    for row in section["rows"]:
        point = ours[row["op"], row["N x K"], row["M"]]
        rows.append({**row, "of the ceiling": f"{point.flops / ceiling.at(point.intensity):.0%}"})
    return rows


def _pictures(machine: Path, found: dict[str, files.Section], ceiling: files.Ceiling | None) -> list[str]:
    lines = []
    for name, section in found.items():
        if not name.startswith("linear_bfloat16"):
            continue
        pictures.save(pictures.ratios(section), machine / f"{name}_ratios.svg", (9, 5.2), "light")
        lines += [f"![time over torch's by tokens]({machine.name}/{name}_ratios.svg)", ""]
        if ceiling is not None:
            pictures.save(pictures.roofline(section, ceiling), machine / f"{name}_roofline.svg", (9, 4.6), "light")
            lines += [f"![roofline]({machine.name}/{name}_roofline.svg)", ""]
    return lines


def write(machine: Path) -> None:
    """The report of a folder of results."""
    found = files.sections(machine)
    if not found:
        raise SystemExit(f"{machine}: no results there")
    names = sorted(found, key=_rank)
    ceiling = files.ceiling(found)
    merged = {"machine": machine.name, "sections": {name: found[name] for name in names}}
    machine.with_suffix(".json").write_text(json.dumps(merged, indent=1) + "\n")
    lines = [f"# Measured on an {files.MACHINES.get(machine.name, machine.name)}", ""]
    if ceiling is not None:
        flops, bandwidth = ceiling.flops / 1e12, ceiling.bandwidth / 1e9
        lines += [f"Its ceiling, measured: {flops:.2f} Tflop/s (a bf16 product of torch's), {bandwidth:.0f} GB/s.", ""]
    lines += _pictures(machine, found, ceiling)
    for name in names:
        section = found[name]
        rows = section["rows"]
        if ceiling is not None and name.startswith("linear_bfloat16"):
            rows = _with_shares(section, ceiling)
        facts = ", ".join(f"{key} {section['machine'][key]}" for key in ("date", "threads", "isa", "torch", "load"))
        lines += [f"## {section['title']}", "", *section["notes"], "", f"{facts}.", "", *files.table(rows), ""]
    if (counters := machine.parent / "cuda_counters.json").exists():
        section = json.loads(counters.read_text())
        lines += ["## CUDA, counted under the kernel simulator", "", *section["notes"], ""]
        lines += [*files.table(section["rows"]), ""]
    machine.with_suffix(".md").write_text("\n".join(lines))
    print(f"written: {machine.with_suffix('.json')}, {machine.with_suffix('.md')}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=files.RESULTS, help="default: bench/results")
    parser.add_argument("machine", help="a folder in it")
    arguments = parser.parse_args()
    write(arguments.results.resolve() / arguments.machine)


if __name__ == "__main__":
    main()
