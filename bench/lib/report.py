"""Makes Markdown and pictures from all that was measured on each machine, for the documentation site or for a look.

    python -m bench.lib.report [--output build/report] [MACHINE ...]       (files of bench/results, such as amd_26_2)

The linear layer's rows gain the share of what the machine can do, where bench/ceiling.py has measured that.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from . import pictures
from . import results_files as files

ORDER = ("step", "decode", "linear", "codec", "ragged", "streaming", "ceiling")
TITLES = {
    files.SIMULATOR: "Counted under the kernel simulator",
    files.COMPILER: "The CUDA kernels as compiled",
    files.PLANNER: "Predicted by the planner",
}


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


def _flat(row: files.Row) -> files.Row:
    """With a column for each field of a nested value other than a spread."""
    flat: files.Row = {}
    for key, value in row.items():
        if isinstance(value, dict) and "median" not in value:
            flat |= {f"{key}: {name}": part for name, part in value.items()}
        else:
            flat[key] = f"`{value}`" if isinstance(value, str) and "<" in value else value  # a template's arguments
    return flat


def _facts(machine: dict[str, Any]) -> str:
    told = {key: value for key, value in machine.items() if value is not None and key != "caches"}
    return ", ".join(f"{key} {value}" for key, value in told.items()) + "."


def title(machine: str) -> str:
    return TITLES.get(machine) or f"Measured on an {files.MACHINES.get(machine, machine)}"


def markdown(machine: str, found: dict[str, files.Section], drawn: dict[str, str]) -> str:
    """A page with a heading and a table for each section; ``drawn`` has the pictures' addresses by their names."""
    ceiling = files.ceiling(found)
    lines = [f"# {title(machine)}", ""]
    if ceiling is not None:
        flops, bandwidth = ceiling.flops / 1e12, ceiling.bandwidth / 1e9
        lines += [f"Its ceiling, measured: {flops:.2f} Tflop/s (torch's bf16 matmul), {bandwidth:.0f} GB/s.", ""]
    for name in sorted(found, key=_rank):
        section = found[name]
        rows = section["rows"]
        if ceiling is not None and name.startswith("linear_bfloat16"):
            rows = _with_shares(section, ceiling)
        lines += [f"## {section['title']} {{#{name}}}", "", *section["notes"], ""]
        if section["machine"]:
            lines += [_facts(section["machine"]), ""]
        for picture in (name, f"{name}_roofline"):
            if picture in drawn:
                lines += [f"![{section['title']}]({drawn[picture]})", ""]
        lines += [*files.table([_flat(row) for row in rows]), ""]
    return "\n".join(lines)


def write(path: Path, output: Path) -> None:
    """The page and the pictures of a file of results."""
    found, machine = files.sections(path), path.stem
    drawn = {}
    for name, picture in pictures.of_machine(found).items():
        pictures.save(picture.draw, output / machine / f"{name}.svg", picture.size)
        drawn[name] = f"{machine}/{name}.svg"
    output.mkdir(parents=True, exist_ok=True)
    (output / f"{machine}.md").write_text(markdown(machine, found, drawn))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("build/report"), help="a directory (default %(default)s)")
    parser.add_argument("machines", nargs="*", metavar="MACHINE", help="default: all")
    arguments = parser.parse_args()
    names = arguments.machines or sorted(path.stem for path in files.RESULTS.glob("*.json"))
    for name in names:
        write(files.RESULTS / f"{name}.json", arguments.output)
        print(f"written: {arguments.output / name}.md")


if __name__ == "__main__":
    main()
