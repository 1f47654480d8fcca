"""Static properties of the compiled CUDA kernels: registers, shared memory, occupancy, spills, and loops in SASS.

    python bench/cuda_static.py [--arch 75 80 86 89 90 100 110 120] [--jobs N] [--launches PROFILE]

Needs nvcc, no GPU; cuobjdump is the toolkit's or PyPI's (nvidia-cuda-cuobjdump, nvidia-cuda-nvdisasm). By default, it
compiles for each architecture of the wheel, N files at a time. PROFILE is the kernel simulator's list of launches, one
JSON object per line, with the sizes of dynamic shared memory. Writes bench/results/compiler.json, and fails if a kernel
spills or uses local memory, if one of the forward on tensor cores waits for memory more often before its first product
than it must, if one reads tables in constant memory more often than it must, if warpgroups that hand registers over
start with another number of them, or if the assembler moved a load of global memory before the wait for the previous
launch, which may still write there.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from lib import cuda_steps
from lib import results_files as files

ROOT = Path(__file__).resolve().parents[1]
# Of an SM: threads, CTAs, bytes of shared memory (CUDA C++ Programming Guide, "Compute Capabilities"); registers are
# 64 K everywhere, given to warps in units of 256, and from 8.0 on, each CTA's shared memory takes 1 KB more than it
# asks for.
SM_LIMITS = {
    75: (1024, 16, 64 << 10),
    80: (2048, 32, 164 << 10),
    86: (1536, 16, 100 << 10),
    89: (1536, 24, 100 << 10),
    90: (2048, 32, 228 << 10),
    100: (2048, 32, 228 << 10),
    110: (1536, 24, 228 << 10),
    120: (1536, 24, 100 << 10),
}
CLASSES = {
    "HMMA": r"HG?MMA|UTCHMMA",
    "LDS": r"LDS\b",
    "LDG": r"LDG|LDGSTS",
    "STS": r"STS\b",
    "STG": r"STG",
    "FP32": r"FADD|FMUL|FFMA|FSETP|FSET|FMNMX|FSEL",
    "PRMT": r"PRMT",
    "SHFL": r"SHFL",
}
NOTES = [
    "CTAs per SM: how many fit by registers, threads and the shared memory shown; unknown for kernels that the "
    "profile of launches lacks. Main loop: SASS instructions of the innermost loop with both HMMA and shared loads "
    "(where there is none, with HMMA, or with most loads), and how many are of each class; a kernel without a loop "
    "is counted whole. One pass decodes a stage of the pipeline, so compare the ratios. Waits: for global loads "
    "before the first product, one after another."
]
# Times that a warp may wait for global loads, one after another, before the main loop's first product. ptxas adds one
# before 10.0, for nested blocks whose size is not a power of two.
WAITS = {"linear_nf4_few_tokens_kernel<": 2}
# Reads of constant memory at addresses that differ between lanes, in a kernel's code. They take a cycle per address,
# and ptxas sometimes repeats one for each use of its value.
CONSTANT_READS = 16
# Registers per thread at launch where setmaxnreg redistributes them (Sm90Layout::kLaunchRegisters). With fewer, warps
# would wait forever.
MOVED_REGISTERS = 168


@dataclasses.dataclass
class Kernel:
    name: str
    arch: int
    threads: int = 0
    registers: int = 0  # a thread, of those that it is launched with
    moved_registers: int = 0  # the most that a thread then has, where warpgroups hand them over
    static_shared: int = 0
    dynamic_shared: int | None = None
    stack: int = 0
    spills: int = 0
    instructions: int = 0
    waits: int = 0
    constant_reads: int = 0  # of tables, at addresses that differ between lanes
    # Loads of what the previous launch may write before a wait for it, in machine code and in PTX; None without a wait.
    early_loads: tuple[int, int] | None = None
    loop: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def occupancy(self) -> str:
        """CTAs per SM, and the share of the SM's threads that they use."""
        if self.dynamic_shared is None:
            return "unknown"
        threads, ctas, shared = SM_LIMITS[self.arch]
        warps = -(-self.threads // 32)
        per_warp = -(-self.registers * 32 // 256) * 256
        fit = min(ctas, threads // (warps * 32), 65536 // (per_warp * warps))
        asked = self.static_shared + self.dynamic_shared
        fit = min(fit, shared // max(asked + (1024 if self.arch >= 80 else 0), 1))
        return f"{fit} ({100 * fit * warps * 32 // threads}%)"


def tool(name: str) -> str:
    """The toolkit's program, or PyPI's."""
    if found := shutil.which(name):
        return found
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or [] if spec else []:
        for path in Path(folder).glob(f"*/bin/{name}"):
            return str(path)
    sys.exit(
        f"{name} was not found: install the CUDA toolkit, or pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
    )


def run(*command: str | Path) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def sources(arch: int) -> list[Path]:
    """The .cu files that are compiled for an architecture (CMakeLists.txt): sm75, sm90, sm100 for one alone."""
    own = {75: ["sm75"], 90: ["sm80", "sm90"], 100: ["sm80", "sm100"]}
    folders = ["generic", *own.get(arch, ["sm80"])]
    return sorted(source for folder in folders for source in (ROOT / "cuda" / "launch" / folder).glob("*.cu"))


def compile_kernels(source: Path, arch: int, folder: Path) -> dict[str, Kernel]:
    """Mangled name -> kernel, from ptxas' own report, the PTX's launch bounds and the SASS."""
    folder.mkdir(parents=True)
    cubin = folder / "kernels.cubin"
    flags = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-I", ROOT]
    real = f"sm_{arch}" + {"sm90": "a", "sm100": "f"}.get(source.parent.name, "")
    report = run(
        "nvcc", *flags, f"-arch={real}", "-Xptxas=-v", "-cubin", "-keep", "-keep-dir", folder, source, "-o", cubin
    )
    kernels: dict[str, Kernel] = {}
    current = None
    for line in report.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)'", line):
            current = kernels[match[1]] = Kernel(match[1], arch)
        elif current and (match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", line)):
            current.stack, current.spills = int(match[1]), int(match[2]) + int(match[3])
        elif current and (match := re.search(r"Used (\d+) registers", line)):
            current.registers = int(match[1])
            smem = re.search(r"(\d+) bytes smem", line)
            current.static_shared = int(smem[1]) if smem else 0
    ptx = next(folder.glob("*.ptx")).read_text()
    for name, threads in re.findall(r"\.entry (\w+)\([^)]*\)\s*\.maxntid (\d+)", ptx):
        kernels[name].threads = int(threads)
    in_ptx = dict(re.findall(r"\.entry (\w+)\((.*?)(?=\.entry|\Z)", ptx, flags=re.S))
    for name, text in in_ptx.items():
        kernels[name].moved_registers = max(map(int, re.findall(r"setmaxnreg\.inc\S* (\d+)", text)), default=0)
    for name, body in sass_functions(cubin).items():
        if name in kernels:
            kernels[name].early_loads = early_loads(body, in_ptx[name])
            kernels[name].instructions = sum(i.opcode != "NOP" for i in body)
            first, last = main_loop(body)
            kernels[name].loop = count_classes([i for i in body if first <= i.address <= last])
            kernels[name].waits = loads_in_a_row(before_work(body, first, last))
            kernels[name].constant_reads = sum(i.opcode == "LDC" and "c[0x3][R" in i.operands for i in body)
    return kernels


@dataclasses.dataclass
class Instruction:
    address: int
    predicated: bool
    opcode: str
    operands: str

    @property
    def target(self) -> int | None:
        """The target address of a branch."""
        match = re.search(r"0x([0-9a-f]+)", self.operands) if self.opcode.startswith("BRA") else None
        return int(match[1], 16) if match else None

    @property
    def registers(self) -> list[int]:
        return [int(r) for r in re.findall(r"\bR(\d+)", self.operands)]


def sass_functions(cubin: Path) -> dict[str, list[Instruction]]:
    functions: dict[str, list[Instruction]] = {}
    body: list[Instruction] = []
    for line in run(tool("cuobjdump"), "-sass", cubin).splitlines():
        if match := re.search(r"Function : (\S+)", line):
            body = functions[match[1]] = []
        elif match := re.search(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?([A-Z]\S*)\s*([^;]*);", line):
            body.append(Instruction(int(match[1], 16), match[2] is not None, match[3], match[4]))
    return functions


def main_loop(body: list[Instruction]) -> tuple[int, int]:
    """First and last address of the main loop, or of all instructions if there is no loop."""
    loops = [(i.target, i.address) for i in body if i.target is not None and i.target < i.address]
    if not loops:
        return body[0].address, body[-1].address
    counts = {loop: count_classes([i for i in body if loop[0] <= i.address <= loop[1]]) for loop in loops}
    for wanted in (("HMMA", "LDS"), ("HMMA",), ()):
        fit = [loop for loop in loops if all(counts[loop][name] for name in wanted)]
        inner = [a for a in fit if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in fit)]
        if inner:
            return max(inner, key=lambda a: (counts[a]["HMMA"], counts[a]["LDS"] + counts[a]["LDG"], counts[a]["all"]))
    raise AssertionError("some loop is innermost")


def before_work(body: list[Instruction], first: int, last: int) -> list[Instruction]:
    """The instructions before the first product of the main loop, which may begin with a rarely taken part."""
    start = next((i.address for i in body if first <= i.address <= last and i.opcode.startswith("HMMA")), first)
    return [i for i in body if i.address < start]


def loads_in_a_row(body: list[Instruction]) -> int:
    """The most global loads on any way through `body`, without its loops, of which each is issued after an instruction
    that uses what the one before has loaded, and is used itself: so often a warp waits for memory."""
    entered: dict[int, tuple[int, dict[int, int]]] = {}  # address -> as below, over the branches to it
    passed = 0  # loads in a row that have been waited for
    loaded: dict[int, int] = {}  # register -> loads in a row up to the one that it still waits for
    reached = True
    for i in body:
        if i.address in entered:
            more, registers = entered[i.address]
            passed = max(passed, more) if reached else more
            loaded = {r: max(loaded.get(r, 0), registers.get(r, 0)) for r in {*(loaded if reached else ()), *registers}}
            reached = True
        if not reached:
            continue
        registers = i.registers
        is_load = re.match(r"LDG?\.", i.opcode) is not None
        used = registers[1:] if is_load else registers
        passed = max([passed, *(loaded.get(r, 0) for r in used)])
        if not i.opcode.startswith(("ST", "BRA")):
            loaded.pop(registers[0] if registers else -1, None)
        if is_load:
            width = {".128": 4, ".64": 2}.get(next(iter(re.findall(r"\.(?:128|64)\b", i.opcode)), ""), 1)
            loaded.update(dict.fromkeys(range(registers[0], registers[0] + width), passed + 1))
        if i.target is not None and i.target > i.address:
            more, others = entered.get(i.target, (0, {}))
            merged = {r: max(loaded.get(r, 0), others.get(r, 0)) for r in {*loaded, *others}}
            entered[i.target] = max(passed, more), merged
        if i.opcode.startswith(("BRA", "EXIT", "RET")) and not i.predicated:
            reached = False
    return passed


@dataclasses.dataclass
class Node:
    """An instruction of a control flow graph."""

    is_load: bool  # of global memory that another launch may still write, so not with .nc
    is_wait: bool  # for the previous launch
    target: str | None  # of a branch
    goes_on: bool  # possibly, to the next instruction


def loads_before_waits(nodes: list[Node], at: dict[str, int]) -> int | None:
    """Loads that may run before the first wait; None without a wait. `at` has the place of each target. Jumps back to
    the head of a loop do not count: kernels that take one tile after another wait in each, but only the first wait
    matters."""
    if not any(node.is_wait for node in nodes):
        return None
    leads: dict[int, bool] = {}  # whether a wait follows, of what a thread reaches without one
    open_ways = [(0, False)]
    while open_ways:  # depth first: an instruction is left after those that follow it
        i, is_left = open_ways.pop()
        node = nodes[i]
        after = [i + 1] if node.goes_on and i + 1 < len(nodes) and not node.is_wait else []
        after += [at[target] for target in (node.target,) if target in at]
        if is_left:
            leads[i] = node.is_wait or any(leads[a] for a in after)
        elif i not in leads:
            leads[i] = False  # for the ends of loops, which come back to it before it is left
            open_ways += [(i, True), *((a, False) for a in after)]
    return sum(nodes[i].is_load for i, leads_to_wait in leads.items() if leads_to_wait)


def sass_nodes(body: list[Instruction]) -> tuple[list[Node], dict[str, int]]:
    nodes = []
    for i in body:
        ends = i.opcode.startswith(("BRA", "EXIT", "RET")) and not i.predicated and "," not in i.operands
        target = None if i.target is None else hex(i.target)
        is_load = i.opcode.startswith(("LDG.", "LD.")) and ".CONSTANT" not in i.opcode
        nodes.append(Node(is_load, i.opcode.startswith("ACQBULK"), target, not ends))
    return nodes, {hex(i.address): at for at, i in enumerate(body)}


def ptx_nodes(text: str) -> tuple[list[Node], dict[str, int]]:
    nodes: list[Node] = []
    at = {}
    for line in text.splitlines():
        if match := re.match(r"\s*(\$\w+):", line):
            at[match[1]] = len(nodes)
        elif match := re.match(r"\s*(@!?%p\d+ )?\s*([a-z][\w.:]*)\s*(\$\w+)?", line):
            predicate, opcode, target = match.groups()
            ends = opcode.startswith(("bra", "ret", "exit")) and not predicate
            is_load = opcode.startswith("ld.") and not re.search(r"\.(param|shared|const|local|nc)\b", opcode)
            nodes.append(Node(is_load, opcode == "griddepcontrol.wait", target, not ends))
    return nodes, at


def early_loads(body: list[Instruction], ptx: str) -> tuple[int, int] | None:
    """Loads of what the previous launch may write before a wait for it, in machine code and in PTX, whose order is that
    of the source. None without a wait."""
    sass, source = loads_before_waits(*sass_nodes(body)), loads_before_waits(*ptx_nodes(ptx))
    return None if sass is None or source is None else (sass, source)


def count_classes(body: list[Instruction]) -> dict[str, int]:
    opcodes = [i.opcode for i in body if i.opcode != "NOP"]
    counts = {name: sum(bool(re.match(p, opcode)) for opcode in opcodes) for name, p in CLASSES.items()}
    return {"all": len(opcodes)} | counts


def demangled(names: list[str]) -> dict[str, str]:
    """Without return type, parameters and the namespaces that all share."""
    lines = run("c++filt", *names).splitlines() if names else []
    short = {}
    for name, line in zip(names, lines, strict=True):
        text = re.sub(r"^void ", "", line)
        text = text[: text.rindex("(")] if text.endswith(")") else text
        text = re.sub(r"qlora::(kernels|tile)::|qlora::|\(int\)|\(bool\)", "", text)
        short[name] = text
    return short


def dynamic_shared(path: Path | None) -> dict[str, int]:
    """The largest dynamic shared memory of each kernel's launches, by mangled name."""
    found: dict[str, int] = {}
    for line in path.read_text().splitlines() if path else []:
        launch = json.loads(line)
        found[launch["mangled"]] = max(found.get(launch["mangled"], 0), launch["dynamic_shared_bytes"])
    return found


def complaints(kernels: list[Kernel], names: dict[str, str]) -> list[str]:
    """All that is wrong, a sentence for each rule that some kernels break."""

    def rule(text: str, breaking: list[tuple[Kernel, int]]) -> list[str]:
        listed = ", ".join(f"{names[k.name]} (sm_{k.arch}): {number}" for k, number in breaking)
        return [f"{text}: {listed}"] if breaking else []

    found = rule("bytes of spills and local memory", [(k, k.spills + k.stack) for k in kernels if k.spills or k.stack])
    for pattern, most in WAITS.items():
        late = [(k, k.waits) for k in kernels if re.match(pattern, names[k.name]) and k.waits > most + (k.arch < 100)]
        found += rule(f"more than {most} global loads in a row before the first product", late)
    many = [(k, k.constant_reads) for k in kernels if k.constant_reads > CONSTANT_READS]
    found += rule(f"more than {CONSTANT_READS} reads of tables in constant memory", many)
    other = [(k, k.registers) for k in kernels if k.moved_registers and k.registers != MOVED_REGISTERS]
    found += rule(f"other than {MOVED_REGISTERS} registers at launch, before setmaxnreg", other)
    moved = [(k, k.early_loads[0] - k.early_loads[1]) for k in kernels if k.early_loads]
    moved = [(k, loads) for k, loads in moved if loads > 0]
    return found + rule("loads that were moved before the wait for the previous launch", moved)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=cuda_steps.ARCHS, choices=sorted(SM_LIMITS))
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N", help="default: one per processor")
    parser.add_argument("--launches", type=Path, help="the kernel simulator's profile")
    arguments = parser.parse_args()
    dynamic = dynamic_shared(arguments.launches)
    with tempfile.TemporaryDirectory() as scratch, concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:

        def compiled(arch: int, source: Path) -> list[Kernel]:
            name = f"{source.parent.name}/{source.stem}"
            print(f"sm_{arch} {name}", flush=True)
            return list(compile_kernels(source, arch, Path(scratch) / str(arch) / name).values())

        jobs = [(arch, source) for arch in arguments.arch for source in sources(arch)]
        kernels = [kernel for found in pool.map(compiled, *zip(*jobs, strict=True)) for kernel in found]
    names = demangled(sorted({k.name for k in kernels}))
    for k in kernels:
        k.dynamic_shared = dynamic.get(k.name)

    machine = {"nvcc": run("nvcc", "--version").splitlines()[-1]}
    path = files.WRITTEN / f"{files.COMPILER}.json"
    for arch in arguments.arch:
        of_it = sorted((k for k in kernels if k.arch == arch), key=lambda k: names[k.name])
        rows = [dataclasses.asdict(k) | {"name": names[k.name], "occupancy": k.occupancy} for k in of_it]
        title = f"The CUDA kernels as compiled for sm_{arch}"
        section = {"title": title, "notes": NOTES, "machine": machine, "rows": rows}
        files.write_section(path, f"cuda_static_sm_{arch}", section)
    if found := complaints(kernels, names):
        sys.exit("\n".join(found))
    print(f"{len(kernels)} kernels, none spills or uses local memory: {path}")


if __name__ == "__main__":
    main()
