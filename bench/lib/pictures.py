"""The pictures of README and docs, from bench/results alone: one SVG each, for light and dark pages.

python -m bench.lib.pictures        (after new results; writes docs/pictures/)
"""

from __future__ import annotations

import functools
import io
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from . import results_files as files

FOLDER = files.RESULTS.parents[1] / "docs" / "pictures"
# What the page's theme decides, by name: the colour to draw with, and what it becomes in light and in dark.
THEMED = {
    "text": ("#010101", "#1f2328", "#e6edf3"),
    "grid": ("#020202", "#d1d9e0", "#3d444d"),
    "page": ("#030303", "#ffffff", "#0d1117"),
}
FONTS = "DejaVu Sans, Verdana, sans-serif"
# One colour per contender, in all pictures; readable on both pages and by the colour-blind (Okabe and Ito, 2008).
COLOURS = {
    "qlora_ext, the file's": "#e69f00",  # before the name that it begins with
    "qlora_ext": "#d55e00",
    "bitsandbytes": "#0072b2",
    "dense LoRA": "#009e73",
    "full fine-tuning": "#999999",
    "torch": "#999999",
}
STEPS = ("intel_6_167", "amd_26_2", "intel_6_207_avx512_bf16", "amd_25_17", "amd_25_17_avx2", "amd_25_1")
NAMES = {"ours": "qlora_ext", "torch + LoRA": "dense LoRA"}
TRAINING = ("ours", "torch", "torch + LoRA", "torch + float32 LoRA", "bitsandbytes")  # the others are for inference
ROOFED = tuple(name for name in TRAINING if name != "torch + float32 LoRA")
Draw = Callable[[Any], None]


def colour(contender: str) -> str:
    contender = NAMES.get(contender, contender)
    return next((c for name, c in COLOURS.items() if contender.startswith(name)), "#cc79a7")


def save(draw: Draw, path: Path, size: tuple[float, float]) -> None:
    """One SVG for light and dark pages. Text stays text, so that it can be read, found and checked."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    text, grid, page = (THEMED[name][0] for name in ("text", "grid", "page"))
    style: dict[str, Any] = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), text)
    style |= {"axes.edgecolor": grid, "grid.color": grid, "figure.facecolor": page}
    style |= {"axes.facecolor": page, "legend.facecolor": page, "legend.edgecolor": "none"}
    style |= {"svg.hashsalt": path.name, "axes.spines.top": False, "axes.spines.right": False, "font.size": 10}
    style |= {"svg.fonttype": "none", "font.family": "DejaVu Sans"}
    path.parent.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(style):
        figure = plt.figure(figsize=size, layout="constrained")
        draw(figure)
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata={"Date": None})
        plt.close(figure)
    path.write_text(_themed(written.getvalue()))


def _themed(svg: str) -> str:
    """The picture with variables in the place of the theme's colours."""
    for name, (drawn, _, _) in THEMED.items():
        svg = svg.replace(drawn, f"var(--{name})")
    svg = re.sub(r"'DejaVu Sans'(, [^;\"]*)?", FONTS, svg)
    light, dark = (";".join(f"--{name}:{colours[i]}" for name, colours in THEMED.items()) for i in (1, 2))
    rules = f"<style>svg{{{light}}}@media(prefers-color-scheme:dark){{svg{{{dark}}}}}</style>"
    head, mark, rest = svg.partition(" <defs>")  # the first one, right after the metadata
    if not mark:
        raise ValueError("matplotlib's SVG has no <defs>, before which the colours go")
    return "\n".join(line.rstrip() for line in f"{head} {rules}\n{mark}{rest}".splitlines()) + "\n"


def steps(figure: Any) -> None:
    """Tokens per second of a training step, by machine and contender."""
    measured = {machine: files.sections(machine)["step_2_threads"] for machine in STEPS}
    axes = figure.subplots()
    named: set[str] = set()
    for place, section in enumerate(measured.values()):
        rows = section["rows"]
        for i, row in enumerate(rows):
            at = place + (i - (len(rows) - 1) / 2) * 0.8 / len(rows)
            name = "bitsandbytes + PEFT" if row["base"] == "bitsandbytes" else row["base"]
            label = None if row["base"] in named else name
            named.add(row["base"])
            bar = axes.bar(at, row["tokens/s"], 0.74 / len(rows), color=colour(row["base"]), label=label)
            axes.bar_label(bar, fmt="%.0f", padding=2, fontsize=9)
    axes.set_xticks(range(len(measured)), [_wrapped(files.MACHINES.get(m, m)) for m in measured])
    axes.set_ylabel("tokens per second, more is better")
    axes.margins(y=0.1)
    axes.set_title("A training step of SmolLM2-135M on two cores", loc="left")
    axes.legend(ncols=4, loc="upper left", bbox_to_anchor=(0, -0.22), frameon=False)


def _wrapped(name: str) -> str:
    return name.replace(" (", "\n(").replace(", ", ",\n").replace(" as ", "\nas ")


def ratios(section: files.Section) -> Draw:
    """Time over that of torch's dense product by the number of tokens, a column per shape, a row per operator."""

    def draw(figure: Any) -> None:
        rows = section["rows"]
        operators, shapes = (list(dict.fromkeys(row[key] for row in rows)) for key in ("op", "N x K"))
        grid = figure.subplots(len(operators), len(shapes), sharex=True, sharey=True, squeeze=False)
        for line, operator in zip(grid, operators, strict=True):
            for axes, shape in zip(line, shapes, strict=True):
                of_it = [row for row in rows if (row["op"], row["N x K"]) == (operator, shape)]
                _ratios_of(axes, of_it)
                axes.set_title(f"{operator}, {shape}", loc="left", fontsize=10)
        for line in grid:
            line[0].set_ylabel("time over torch's")
        for axes in grid[-1]:
            axes.set_xlabel("tokens")
        handles = {line.get_label(): line for axes in grid.flat for line in axes.get_lines()}
        handles = {label: line for label, line in handles.items() if not label.startswith("_")}
        figure.legend(handles.values(), handles, ncols=3, loc="outside lower left", frameon=False)

    return draw


def _ratios_of(axes: Any, rows: list[files.Row]) -> None:
    for name in [name for name in TRAINING if name in rows[0]]:
        present = [row for row in rows if isinstance(row.get(name), dict)]
        ours = name == "ours"
        style = {"color": colour(name), "linewidth": 2.5 if ours else 1.2, "marker": "o", "markersize": 4}
        if name == "torch + float32 LoRA":
            style["linestyle"] = ":"
        axes.plot([r["M"] for r in present], [r[name]["median"] for r in present], label=NAMES.get(name, name), **style)
    axes.axhline(1, color="#999999", linewidth=1)
    axes.set(xscale="log", xticks=[r["M"] for r in rows], ylim=(0, 2.2))
    axes.set_xticks([r["M"] for r in rows], [str(r["M"]) for r in rows], minor=False)
    axes.minorticks_off()
    axes.grid(alpha=0.6)


def roofline(section: files.Section, ceiling: files.Ceiling) -> Draw:
    """Operations per second by operations per byte, under what the machine was measured to reach."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        found = [p for p in files.points(section) if p.op == "forward" and p.contender in ROOFED]
        low, high = (f(p.intensity for p in found) for f in (min, max))
        line = [low / 1.5, ceiling.flops / ceiling.bandwidth, high * 1.5]
        axes.plot(line, [ceiling.at(x) / 1e9 for x in line], color="#999999", linewidth=1.5)
        axes.annotate(
            f"{ceiling.flops / 1e12:.2f} Tflop/s: torch's fastest bf16 product",
            (line[2], ceiling.flops * 1.08 / 1e9), ha="right", va="bottom", fontsize=9,
        )  # fmt: skip
        axes.annotate(
            f"{ceiling.bandwidth / 1e9:.0f} GB/s: reading memory",
            (line[0] * 0.95, ceiling.at(line[0]) * 2.4 / 1e9), fontsize=9,
        )  # fmt: skip
        for contender in dict.fromkeys(p.contender for p in found):
            of_it = [p for p in found if p.contender == contender]
            size = 36 if contender == "ours" else 16
            axes.scatter(
                [p.intensity for p in of_it], [p.flops / 1e9 for p in of_it], size,
                color=colour(contender), label=NAMES.get(contender, contender), zorder=3 if contender == "ours" else 2,
            )  # fmt: skip
        axes.set(xscale="log", yscale="log", ylabel="Gflop/s")
        axes.set_xlabel("operations per byte of 4-bit weights, x and y (the same count for all contenders)")
        axes.set_title("The linear layer under the machine's measured roof, forward", loc="left")
        axes.grid(alpha=0.6)
        axes.legend(loc="lower right", fontsize=9)

    return draw


def quality(figure: Any) -> None:
    """What 4 bits cost SmolLM2-135M by their encoding, in nats per token."""
    _losses(figure, files.sections("intel_6_85")["fidelity_losses"]["rows"], "SmolLM2-135M")


def _losses(figure: Any, rows: list[files.Row], model: str) -> None:
    texts = [key.removesuffix(": increase") for key in rows[0] if key.endswith(": increase")]
    encoders = [row for row in rows if row["encoder"] != "dense"]
    axes = figure.subplots()
    for i, text in enumerate(texts):
        values = [row[f"{text}: increase"].split(" ± ") for row in encoders]
        at = [place + (i - 0.5) * 0.38 for place in range(len(encoders))]
        height, error = ([float(value[part]) for value in values] for part in (0, 1))
        axes.barh(at, height, 0.36, xerr=error, label=text, color=("#0072b2", "#56b4e9")[i], ecolor="#999999")
    axes.set_yticks(range(len(encoders)), [row["encoder"] for row in encoders])
    axes.invert_yaxis()
    axes.set_xlabel("loss above the dense model's, nats per token, with its standard error")
    axes.set_title(f"What 4 bits cost {model}", loc="left")
    axes.legend(frameon=False, loc="lower right")
    axes.grid(axis="x", alpha=0.6)


def evidence(figure: Any) -> None:
    """Whether a 4-bit base trains as well as a 16-bit one: a mark per seed, after training, by base.

    Recipes that ran with a single seed are left to the table.
    """
    cells = [(model, begun, after) for model, begun, after in files.evidence_cells() if len(after) > 1]
    bases = [f"{files.MODELS.get(m, m)}, {row['base']}\n{row['weights MB']:.0f} MB" for m, row, _ in cells]
    for axes, quantity, label in zip(
        figure.subplots(1, 2, sharey=True),
        (lambda row: row["loss of answers"], lambda row: 100 * files.right_answers(row) / _questions(row)),
        ("loss of held-out answers, nats per token", "right answers to held-out questions, %"),
        strict=True,
    ):
        for place, (_, begun, after) in enumerate(cells):
            values = [quantity(row) for row in after]
            shade = "#009e73" if begun["base"] == "dense" else "#d55e00"
            axes.plot(values, [place] * len(values), "o", color=shade, alpha=0.7)
            axes.plot([sum(values) / len(values)] * 2, [place - 0.3, place + 0.3], color=shade, linewidth=2)
        axes.set_yticks(range(len(cells)), bases)
        axes.set_xlabel(label)
        axes.grid(axis="x", alpha=0.6)
    figure.axes[0].invert_yaxis()
    figure.suptitle("16-bit and 4-bit bases after the same training; line: mean of the seeds", x=0.01, ha="left")


def _questions(row: files.Row) -> int:
    return len(files.EVIDENCE) * int(row["questions"])


def memory(figure: Any) -> None:
    """Where the memory of a QLoRA run goes by model size, as the planner predicts it."""
    rows = files.sections(files.PLANNER)["memory_stack"]["rows"]
    parts = [key for key in rows[0] if key not in ("model", "how")]
    axes = figure.subplots()
    left = [0.0] * len(rows)
    palette = ("#d55e00", "#e69f00", "#0072b2", "#009e73", "#56b4e9")
    for part, shade in zip(parts, palette, strict=True):
        sizes = [row[part] for row in rows]
        axes.barh(range(len(rows)), sizes, left=left, label=part, color=shade)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    for place, total in enumerate(left):
        axes.text(total, place, f" {total:.1f}", va="center", fontsize=9)
    for card in (8, 16, 24, 48):
        axes.axvline(card, color="#999999", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(rows)), [f"{row['model']}, {row['how']}" for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 10 * math.ceil(max(left) * 1.08 / 10))
    axes.set_xlabel("GB on the GPU, by the planner; dotted: cards of 8, 16, 24 and 48 GB")
    axes.set_title("QLoRA, rank 16, 2,048 tokens per step, checkpointing, chunked loss", loc="left")
    axes.legend(ncols=4, fontsize=9, loc="upper left", bbox_to_anchor=(0, -0.16), frameon=False)


def sensitivity(figure: Any) -> None:
    """The loss of SmolLM2-135M by size, with the costliest layers in 16 bits."""
    rows = files.sections("intel_6_85")["sensitivity"]["rows"]
    texts = [key.removesuffix(": loss above dense") for key in rows[0] if key.endswith(": loss above dense")]
    axes = figure.subplots()
    for i, text in enumerate(texts):
        for order in dict.fromkeys(row["by"] for row in rows):
            of_it = [row for row in rows if row["by"] == order]
            values = [row[f"{text}: loss above dense"].split(" ± ") for row in of_it]
            means, errors = ([float(value[part]) for value in values] for part in (0, 1))
            style = {"fmt": "o-" if order == "estimated loss" else "s:", "color": ("#0072b2", "#d55e00")[i]}
            sizes = [float(row["MB"]) for row in of_it]
            axes.errorbar(sizes, means, yerr=errors, capsize=3, label=f"{text}, by {order}", **style)
    axes.set(xlabel="MB", ylabel="loss above dense, nats per token", ylim=(0, None))
    axes.set_title("SmolLM2-135M with its costliest layers in 16 bits", loc="left")
    axes.grid(alpha=0.6)
    axes.legend(fontsize=9, frameon=False)


def formats(rows: list[files.Row]) -> Draw:
    """The error of the weights by block size, of bench/fidelity.py."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for name in dict.fromkeys(row["format"] for row in rows):
            of_it = [row for row in rows if row["format"] == name]
            axes.plot([r["block size"] for r in of_it], [r["the model's"] for r in of_it], marker="o", label=name)
        axes.set_xscale("log", base=2)
        axes.set(xlabel="block size", ylabel="relative error of the weights")
        axes.grid(alpha=0.6)
        axes.legend(frameon=False)

    return draw


class Picture(NamedTuple):
    draw: Draw
    size: tuple[float, float]


def of_machine(found: dict[str, files.Section]) -> dict[str, Picture]:
    """What can be drawn of one machine's sections, by the name of the section it belongs to."""
    drawn = {}
    roof = files.ceiling(found)
    for name, section in found.items():
        if name.startswith("linear_bfloat16"):
            drawn[name] = Picture(ratios(section), (9, 5.2))
            if roof is not None:
                drawn[f"{name}_roofline"] = Picture(roofline(section, roof), (9, 4.6))
        elif name.startswith("fidelity_errors"):
            drawn[name] = Picture(formats(section["rows"]), (8, 4.2))
        elif name.startswith("fidelity_losses"):
            model = "SmolLM2-135M" if name == "fidelity_losses" else "the byte-level model"
            drawn[name] = Picture(functools.partial(_losses, rows=section["rows"], model=model), (9, 3.6))
    return drawn


def tracked() -> dict[str, Picture]:
    """The pictures in docs/pictures, by name."""
    best = of_machine(files.sections("amd_26_2"))
    return {
        "steps": Picture(steps, (10, 4.4)),
        "ratios": best["linear_bfloat16_2_threads"],
        "roofline": best["linear_bfloat16_2_threads_roofline"],
        "quality": Picture(quality, (9, 3.6)),
        "evidence": Picture(evidence, (9, 7.5)),
        "memory": Picture(memory, (9, 4.2)),
        "sensitivity": Picture(sensitivity, (8, 4.2)),
    }


def main() -> None:
    for name, picture in tracked().items():
        save(picture.draw, FOLDER / f"{name}.svg", picture.size)
        print(f"drawn: {FOLDER.name}/{name}.svg")


if __name__ == "__main__":
    main()
