"""Estimates the speed of CPU kernels on other processors: counts instructions, and cycles with llvm-mca.

    python bench/cpu_static.py aarch64|x86_64 [--peer FILE.s FUNCTION WEIGHTS NAME]...

The inner loops of `cpu_loops.cpp` are compiled with GCC and the flags of their instruction set, and read from the
assembly. `--peer` reads another library's loop from its assembly (-S): the loop with the most vector instructions in
the functions that match the regular expression FUNCTION, which processes WEIGHTS weights per iteration.
"""

from __future__ import annotations

import argparse
import pathlib
import platform
import re
import subprocess
import tempfile
from collections.abc import Iterator
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[1]
MCA = "llvm-mca-19"
ITERATIONS = 200


class Processor(NamedTuple):
    models: tuple[str, ...]  # of llvm-mca
    options: tuple[str, ...]
    vector: str  # what vector instructions begin with
    branch: str  # a jump to a label that ends a loop
    comment: str


PROCESSORS = {
    "aarch64": Processor(
        ("neoverse-n1", "neoverse-n2", "neoverse-v1", "neoverse-v2"),
        ("-mattr=+bf16,+i8mm",),
        r"(fml|sml|smull|smmla|bf|sdot|tbl|zip|uzp|fmul|ushr|ushll|shll?\s)",
        r"(?:b\.?\w+|cbn?z|tbn?z)\s.*?(\.L\w+)$",
        "//",
    ),
    "x86_64": Processor(("alderlake",), (), r"v(pmadd|pdp|pshufb|fmadd|punpck|perm|cvt)", r"j\w+\s+(\.L\w+)$", "#"),
}

# Function in cpu_loops.cpp, instruction set, weights per iteration, tokens, description.
ARM_LOOPS = [
    ("few_tokens_int_1", "neon", 64, 1, "decode and multiply, int16"),
    ("few_tokens_int_2", "neon", 64, 2, "the same"),
    ("few_tokens_float_1", "neon", 64, 1, "decode and multiply, float32"),
    ("few_tokens_float_4", "neon", 64, 4, "the same"),
    ("few_tokens_bf16_1", "neon_bf16", 64, 1, "decode and multiply, bfloat16"),
    ("few_tokens_bf16_6", "neon_bf16", 64, 6, "the same"),
    *((f"few_tokens_matrix_{i}", "neon_i8mm", 128, i, "two rows, by matrices of bytes") for i in (1, 2, 4, 6)),
    *((f"few_tokens_int8_{i}", "neon_dotprod", 512, i, "eight rows, int8 by SDOT") for i in (1, 2, 4, 8)),
    *((f"few_tokens_int8_{i}", "neon_i8mm", 512, i, "eight rows, int8 by SMMLA") for i in (1, 2, 4, 8)),
    ("decode_float", "neon", 32, 0, "many tokens: decode to a panel of float32"),
    ("multiply_float", "neon", 6, 16, "many tokens: multiply float32"),
    ("decode_bf16", "neon_bf16", 32, 0, "many tokens: decode to a panel of bfloat16, table of a scale included"),
    ("multiply_bf16", "neon_bf16", 12, 16, "many tokens: multiply bfloat16"),
    ("multiply_int8", "neon_dotprod", 12, 16, "many tokens: multiply int8 by SDOT, before sums are scaled"),
    ("multiply_int8", "neon_i8mm", 32, 16, "many tokens: multiply int8 by SMMLA, before sums are scaled"),
    ("dequantize_float", "neon", 32, 0, "dequantize to float32"),
    ("dequantize_16", "neon", 32, 0, "dequantize to bfloat16 or float16"),
]
X86_LOOPS = [
    (name, isa, weights, tokens, what)
    for name, weights, tokens, what in (
        ("few_tokens_int_1", 64, 1, "decode and multiply, int16"),
        ("few_tokens_int_4", 64, 4, "the same"),
        ("few_tokens_int_8", 64, 8, "the same"),
        ("multiply_int", 12, 16, "many tokens: multiply int16"),
    )
    for isa in ("avx2", "avx_vnni")
]
LOOPS = {"aarch64": ARM_LOOPS, "x86_64": X86_LOOPS}


def compiler(machine: str) -> str:
    return "g++" if platform.machine() == machine else f"{machine.replace('_', '-')}-linux-gnu-g++"


def flags(isa: str) -> list[str]:
    """GCC's flags for an instruction set, from cpp/cpu/sources.cmake."""
    text = (ROOT / "cpp/cpu/sources.cmake").read_text()
    found = re.findall(rf"(?:set\(|APPEND )_{isa} ([-$][^)]*)\)", text)
    return [flag for word in " ".join(found).split() for flag in (flags(word[3:-1]) if word[0] == "$" else [word])]


def compiled(isa: str, machine: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder, "loops.s")
        command = [compiler(machine), "-std=c++20", "-O3", "-DNDEBUG", "-fPIC", "-ffp-contract=off", f"-I{ROOT}", "-S"]
        command += [f"-DQLORA_ISA={isa}", *flags(isa), str(ROOT / "bench/cpu_loops.cpp"), "-o", str(out)]
        subprocess.run(command, check=True)
        return out.read_text()


def loops(assembly: str, processor: Processor) -> Iterator[tuple[str, list[str]]]:
    """Each innermost loop: the name of its function, and its instructions."""
    function, lines, labels, last = "", [], {}, -1
    for raw in assembly.splitlines():
        label = re.match(r"([^\s:]+):", raw)
        if label:
            if label[1].startswith("."):
                labels[label[1]] = len(lines)
            else:
                function, lines, labels, last = label[1], [], {}, -1
            continue
        line = raw.split(processor.comment)[0].strip()
        if not line or line.startswith("."):
            continue
        lines.append(line)
        branch = re.match(processor.branch, line)
        if branch and branch[1] in labels:
            start = labels[branch[1]]
            if start > last:
                yield function, lines[start:]
            last = max(last, start)


def inner_loop(assembly: str, function: str, processor: Processor) -> list[str]:
    """The loop with the most vector instructions in the matching functions; the shortest of several."""
    found = [body for name, body in loops(assembly, processor) if re.search(function, name)]
    if not found:
        raise SystemExit(f"no loop in a function that matches {function}")
    vectors = [sum(1 for line in body if re.match(processor.vector, line)) for body in found]
    return min((b for b, v in zip(found, vectors, strict=True) if v == max(vectors)), key=len)


def cycles(body: list[str], model: str, machine: str) -> tuple[float, float]:
    """Cycles per iteration: simulated for consecutive iterations, and the bound by the execution units."""
    lines = [re.sub(r"^(adrp\s+\w+,).*", r"\1 0", line) for line in body]
    lines = [re.sub(r"#?:\w+:[\w.+]+", "0", re.sub(r"\.L\w+$", ".Lloop", line)) for line in lines]
    command = [MCA, f"-march={machine.replace('_', '-')}", f"-mcpu={model}", f"-iterations={ITERATIONS}"]
    text = ".Lloop:\n" + "\n".join(lines) + "\n"
    run = subprocess.run(
        [*command, *PROCESSORS[machine].options], input=text, check=True, capture_output=True, text=True
    )
    total, bound = re.search(r"Total Cycles:\s+(\d+)", run.stdout), re.search(r"RThroughput:\s+([\d.]+)", run.stdout)
    assert total is not None, run.stdout
    assert bound is not None, run.stdout
    return int(total[1]) / ITERATIONS, float(bound[1])


def row(name: str, what: str, body: list[str], weights: int, tokens: int, machine: str) -> str:
    work = weights * max(tokens, 1)
    cells = [name, what, str(tokens or ""), f"{len(body)} / {weights}", f"{len(body) / work:.2f}"]
    for model in PROCESSORS[machine].models:
        total, bound = cycles(body, model, machine)
        cells.append(f"{total / work:.3f} ({bound / work:.3f})")
    return "| " + " | ".join(cells) + " |"


def symbol(name: str) -> str:
    """A pattern for the symbol that contains the loop: the function itself, or the template that it calls."""
    kind, _, tokens = name.removeprefix("few_tokens_").partition("_")
    if kind == "int8":
        return rf"few_tokens_int8.*multiplyI.*Li1ELi{tokens}E"
    if name.startswith("few_tokens"):
        return rf"accumulateILi{tokens}E.*{kind.capitalize()}Products"
    functions = {"decode": "decode_rows", "multiply": "multiply_tile"}
    words = {"float": "WordF32", "bf16": "WordBf16"}
    kind, _, word = name.partition("_")
    called = rf"{functions[kind]}.*{words[word]}" if kind in functions and word in words else rf"{name}_tile"
    return rf"^{name}$|{called}"


def version(command: str, pattern: str) -> str:
    out = subprocess.run([command, "--version"], check=True, capture_output=True, text=True).stdout
    found = re.search(pattern, out)
    return found[0] if found else out.splitlines()[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("machine", choices=PROCESSORS)
    parser.add_argument("--peer", nargs=4, action="append", default=[], metavar=("FILE", "FUNCTION", "WEIGHTS", "NAME"))
    args = parser.parse_args()
    processor, table = PROCESSORS[args.machine], LOOPS[args.machine]
    compiled_by, mca = version(compiler(args.machine), r".*"), version(MCA, "LLVM version [0-9.]+")
    print(f"Inner loops as {compiled_by} compiles them; cycles by llvm-mca, {mca}.")
    print("A loop over tokens counts each weight once per token.")
    print("Cycles: simulated (bound by the units alone).\n")
    columns = ("loop", "what it does", "tokens", "instructions / weights", "per weight", *processor.models)
    print("| " + " | ".join(columns) + " |")
    print("|" + " --- |" * len(columns))
    assembly = {isa: compiled(isa, args.machine) for isa in dict.fromkeys(isa for _, isa, *_ in table)}
    for name, isa, weights, tokens, what in table:
        body = inner_loop(assembly[isa], symbol(name), processor)
        print(row(f"{isa}: {name}", what, body, weights, tokens, args.machine))
    for file, function, weights, name in args.peer:
        body = inner_loop(pathlib.Path(file).read_text(), function, processor)
        print(row(name, "", body, int(weights), 0, args.machine))


if __name__ == "__main__":
    main()
