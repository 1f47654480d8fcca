"""The layout of the tree: allowed includes, and the places of intrinsics, assembly, launches and tables."""

from __future__ import annotations

import ast
import functools
import graphlib
import pathlib
import re

import pytest

from cpu_sources import PROCESSORS, SETS

ROOT = pathlib.Path(__file__).parents[2]
SOURCES = [p for d in ("cpp", "cuda") for p in (ROOT / d).rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"}]

CPU_GROUND = ("cpp/cpu/shared/", "cpp/cpu/isa/", "cpp/cpu/kernels.h")
CPU_CONTRACTS = ("cpp/cpu/kernels.h", "cpp/cpu/dispatch.h", "cpp/cpu/tuning.h")
CPU_FOLDERS = ("codec", "verdict", "few_tokens", "many_tokens", "many_tokens_tiles", "float64")

CPU_PARTS = ("cpp/cpu/parts/", *(f"cpp/cpu/{name}/" for name in CPU_FOLDERS))

# Folders of CUDA code, each named for the oldest architecture that runs it, and what its files may include of others.
# sm75 launches a kernel of sm80 that it has a tile for.
CUDA_FOLDERS = {
    "generic": ("generic",),
    "sm75": ("generic", "sm75", "sm80"),
    "sm80": ("generic", "sm80"),
    "sm90": ("generic", "sm80", "sm90"),
    "sm100": ("generic", "sm80", "sm90", "sm100"),
}
CUDA_LAUNCH = tuple(f"cuda/launch/{name}.h" for name in ("cluster", "device", "launch", "types", "workspace"))


def up_to(arch: str, folder: str) -> list[str]:
    """What ``arch`` in ``folder`` may include of it."""
    return [f"{folder}/{older}/" for older in CUDA_FOLDERS[arch]]


# Folder, or beginning of a file's name -> what its files may include of ours. Includes point one way.
MAY_INCLUDE = {
    "cpp/format": ("cpp/format",),
    "cpp/cpu/shared/": ("cpp/format", "cpp/cpu/shared/", "cpp/cpu/kernels.h"),
    "cpp/cpu/isa/": ("cpp/format", "cpp/cpu/shared/", "cpp/cpu/isa/"),
    "cpp/cpu/codec/": ("cpp/format", *CPU_GROUND, "cpp/cpu/codec/"),
    "cpp/cpu/verdict/": ("cpp/format", *CPU_GROUND, *CPU_CONTRACTS, "cpp/cpu/codec/", "cpp/cpu/verdict/"),
    "cpp/cpu/few_tokens/": (
        "cpp/format",
        *CPU_GROUND,
        *CPU_CONTRACTS,
        "cpp/cpu/codec/",
        "cpp/cpu/verdict/",
        "cpp/cpu/few_tokens/",
    ),
    "cpp/cpu/many_tokens/": (
        "cpp/format",
        *CPU_GROUND,
        *CPU_CONTRACTS,
        "cpp/cpu/codec/",
        "cpp/cpu/verdict/",
        "cpp/cpu/many_tokens/",
    ),
    "cpp/cpu/many_tokens_tiles/": (
        "cpp/format",
        *CPU_GROUND,
        *CPU_CONTRACTS,
        "cpp/cpu/codec/",
        "cpp/cpu/many_tokens/",
        "cpp/cpu/many_tokens_tiles/",
    ),
    "cpp/cpu/float64/": ("cpp/format", *CPU_GROUND, *CPU_CONTRACTS, "cpp/cpu/codec/", "cpp/cpu/float64/"),
    "cpp/cpu/kernels.h": ("cpp/format",),
    "cpp/cpu/check.h": ("cpp/cpu/kernels.h",),
    "cpp/cpu/tuning.h": ("cpp/format", "cpp/cpu/isa/isa.h"),
    "cpp/cpu/adapters": ("cpp/format", "cpp/cpu/shared/", "cpp/cpu/kernels.h", "cpp/cpu/adapters.h"),
    "cpp/cpu/dispatch": ("cpp/format", "cpp/cpu/isa/isa.h", "cpp/cpu/adapters.h", *CPU_CONTRACTS),
    "cpp/cpu/parts/": ("cpp/format", *CPU_GROUND, *CPU_CONTRACTS, *CPU_PARTS),
    "cpp/cpu/isa_": ("cpp/cpu/dispatch.h", "cpp/cpu/float64/", "cpp/cpu/parts/parts.h"),
    "cpp/ops": ("cpp/format", "cpp/cpu", "cpp/ops"),
    "cpp/runtime": ("cpp/format/portable.h",),
    "cpp/bindings": ("cpp/format", "cpp/cpu", "cuda/tuning/", "build_info.h"),
    "cuda/ptx": ("cpp/format", "cuda/ptx"),
    **{f"cuda/tile/{arch}/": ("cpp/format", "cuda/ptx", *up_to(arch, "cuda/tile")) for arch in CUDA_FOLDERS},
    **{
        f"cuda/kernels/{arch}/": (
            "cpp/format",
            "cuda/ptx",
            *up_to(arch, "cuda/tile"),
            *up_to(arch, "cuda/kernels"),
            "cuda/tuning/codec.h",
        )
        for arch in CUDA_FOLDERS
    },
    **{
        f"cuda/launch/{arch}/": (
            "cpp/format",
            *up_to(arch, "cuda/tile"),
            *up_to(arch, "cuda/kernels"),
            *up_to(arch, "cuda/launch"),
            *CUDA_LAUNCH,
            "cuda/tuning/",
        )
        for arch in CUDA_FOLDERS
    },
    "cuda/launch/registry.cpp": ("cuda/launch/", "cuda/tuning/"),
    "cuda/launch/device.cpp": ("cuda/launch/", "cuda/tuning/"),  # asks kernels of an architecture
    "cuda/launch/": ("cpp/format", *CUDA_LAUNCH, "cuda/tuning/"),
    "cuda/tuning/": ("cpp/format", "cuda/tuning/"),
    "cuda/ops.cpp": ("cpp/format", "cpp/ops", "cuda/launch/", "cuda/tuning/"),
}


def relative(path: pathlib.Path) -> str:
    return path.relative_to(ROOT).as_posix()


def offenders(pattern: str, allowed: str) -> list[str]:
    """Sources outside `allowed` with a matching line of code (not a comment)."""
    found = []
    for path in SOURCES:
        code = re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(), flags=re.S)
        if re.search(pattern, code) and not re.match(allowed, relative(path)):
            found.append(relative(path))
    return found


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_includes_point_one_way(path: pathlib.Path) -> None:
    folder = next(f for f in MAY_INCLUDE if relative(path).startswith(f))
    for include in re.findall(r'#include "([^"]+)"', path.read_text()):
        assert include.startswith(MAY_INCLUDE[folder]), f"{relative(path)} includes {include}"


def test_includes_make_no_circle() -> None:
    of = {relative(p): re.findall(r'#include "(c[^"]+)"', p.read_text()) for p in SOURCES}
    done: set[str] = set()

    def visit(path: str, above: tuple[str, ...]) -> None:
        assert path not in above, " -> ".join([*above[above.index(path) :], path])
        if path not in done:
            for include in of.get(path, []):
                visit(include, (*above, path))
            done.add(path)

    for path in of:
        visit(path, ())


def test_fragments_see_no_standard_library() -> None:
    """The linker may keep the copy of its template that was compiled for a newer processor."""
    for path in (ROOT / "cpp/cpu").rglob("*.h"):
        if path.parent.name not in {"shared", "parts", *CPU_FOLDERS} and path.parent.parent.name != "isa":
            continue
        for include in re.findall(r"#include <([^>]+)>", path.read_text()):
            assert include in {"cstdint", "cstring", "immintrin.h", "arm_neon.h"}, (
                f"{relative(path)} includes <{include}>"
            )


def test_functions_of_the_format_are_always_inlined() -> None:
    for path in (ROOT / "cpp/format").glob("*.h"):
        if path.name in ("print_kernels.h", "code_name.h"):  # not compiled for an instruction set
            continue
        plain = re.findall(r"^(?:inline |constexpr )+(?!constexpr)[\w:<> ]+\w\(.*$", path.read_text(), re.M)
        assert plain == [], f"{relative(path)}: not QLORA_INLINE"


def test_the_format_knows_no_kernels() -> None:
    """Not by an include, which another test sees, and not by declaring a function of theirs."""
    declared = r"\bnamespace (qlora::)?(cpu|cuda)\b|\b(cpu|cuda)::"
    assert offenders(declared, r"(?!cpp/format/)") == []


def test_every_instruction_set_has_the_same_vocabularies() -> None:
    folders = sorted(p for p in (ROOT / "cpp/cpu/isa").iterdir() if p.is_dir())
    assert [folder.name for folder in folders] == sorted(SETS)
    for folder in folders:
        assert {"codec.h", "stream.h", "panel.h"} <= {p.name for p in folder.glob("*.h")}, folder.name
        assert (ROOT / f"cpp/cpu/isa_{folder.name}.cpp").is_file()


def test_folders_of_cuda_code_are_in_the_table() -> None:
    for folder in ("tile", "kernels", "launch"):
        found = {p.name for p in (ROOT / "cuda" / folder).iterdir() if p.is_dir()}
        assert found <= set(CUDA_FOLDERS), folder


def test_the_choice_of_a_cuda_kernel_needs_no_cuda() -> None:
    assert [
        p for p in (ROOT / "cuda/tuning").iterdir() if re.search(r"#include [<\"]cuda[_.]|cudaError", p.read_text())
    ] == []


def test_torch_is_seen_by_the_operators_only() -> None:
    assert offenders(r"#include *<(torch|ATen|c10)/", r"cpp/ops/|cuda/ops\.cpp") == []


def test_intrinsics_stand_in_the_vocabulary_headers_only() -> None:
    intrinsics = {
        "x86_64": r"\b_mm(256|512)?_\w+|immintrin",
        "aarch64": r"\bv[a-z0-9]+q?(_\w+)?_[usf](8|16|32|64)\b|arm_neon",
    }
    for processor, sets in PROCESSORS.items():
        assert offenders(intrinsics[processor], rf"cpp/cpu/isa/({'|'.join(sets)})/") == []


def test_assembly_stands_in_ptx_and_the_vocabularies_only() -> None:
    assert offenders(r"\basm\b", r"cuda/ptx/|cpp/cpu/isa/") == []


def test_compilers_and_systems_are_told_apart_in_one_header() -> None:
    """Elsewhere the code is for all of them, but for what asks the processor and what Linux and Windows lack."""
    elsewhere = r"cpp/format/portable\.h|cpp/cpu/isa/isa\.cpp|cpp/runtime/"
    assert (
        offenders(r"__attribute__|__declspec|_overflow\(|\b(_WIN32|__APPLE__|__linux__|_MSC_VER|__GNUC__)\b", elsewhere)
        == []
    )


def test_kernels_are_launched_in_launch_only() -> None:
    assert offenders(r"<<<|cudaLaunchKernel", r"cuda/launch/") == []


def test_a_cuda_graph_can_capture_every_operator() -> None:
    """No code waits for the device, copies to or from the host, or allocates memory other than by torch's allocator."""
    waits = r"\bcu(da)?(Device|Stream|Event|Ctx)?Synchronize|\bcuda(Stream|Event)\w+\("
    memory = r"\bcuda(Malloc|Free|Host|MemGetInfo|Memcpy)\w*|\bcudaMemset\("
    assert offenders(rf"{waits}|{memory}", r"$^") == []
    assert offenders(r"<<<[^>]", r"$^") == []  # these two are allowed, and take the stream
    launches = [
        (relative(path), launch)
        for path in SOURCES
        for launch in re.findall(r"\blaunch_(?:kernel|cluster)\((.*?)\);", path.read_text(), flags=re.S)
    ]
    assert launches
    assert [launch for launch in launches if not re.search(r"\b(call\.)?stream\b", launch[1])] == []


def test_the_nf4_values_are_typed_once() -> None:
    digits = r"0?\.6961928|0?\.5250730|0?\.7229568|0?\.1609302"
    assert offenders(digits, r"cpp/format/codes\.h") == []
    typed = [
        p for d in ("python", "tests", "bench") for p in (ROOT / d).rglob("*.py") if re.search(digits, p.read_text())
    ]
    assert [relative(p) for p in typed if p != pathlib.Path(__file__)] == ["tests/lib/reference.py"]


def test_nothing_ends_the_process() -> None:
    assert offenders(r"\b(std::)?(exit|abort|_Exit|quick_exit)\s*\(", r"$^") == []


def test_files_stay_short() -> None:
    suffixes = {".py", ".h", ".cpp", ".cu"}
    folders = [ROOT / folder for folder in ("python", "tests", "bench")]
    code = [*SOURCES, *(p for folder in folders for p in folder.rglob("*") if p.suffix in suffixes)]
    assert ROOT / "tests/cudasim/src/core/parser.cpp" in code
    assert {relative(p): n for p in code if (n := len(p.read_text().splitlines())) > 500} == {}


PYTHON = ROOT / "python"
LIBRARY, APPLICATION = PYTHON / "qlora_ext", PYTHON / "qlora_app"
MODULES = sorted([*LIBRARY.rglob("*.py"), *APPLICATION.rglob("*.py")])

# Subpackage -> the only other subpackages or files that may import from it. The application may import all of the
# library that is public.
IMPORTED_BY = {
    "qlora_app/commands/": ("qlora_app/main.py", "qlora_app/__init__.py"),
    "qlora_app/evaluation/": ("qlora_app/commands/", "qlora_app/__init__.py"),
    "qlora_app/exporting/": ("qlora_app/commands/", "qlora_app/__init__.py"),
    "qlora_app/gguf/": ("qlora_app/exporting/",),
    "qlora_app/training/": (
        "qlora_app/commands/",
        "qlora_app/evaluation/",
        "qlora_app/exporting/",
        "qlora_app/__init__.py",
    ),
    "qlora_app/quantization/": ("qlora_app/commands/", "qlora_app/exporting/"),
    "qlora_app/serving/": ("qlora_app/commands/",),
    "qlora_app/generation/": ("qlora_app/commands/", "qlora_app/training/"),
    "qlora_app/data/": (
        "qlora_app/commands/",
        "qlora_app/evaluation/",
        "qlora_app/exporting/",
        "qlora_app/training/",
        "qlora_app/quantization/",
        "qlora_app/generation/",
        "qlora_app/serving/",
    ),
    "qlora_app/models/": (
        "qlora_app/commands/",
        "qlora_app/evaluation/",
        "qlora_app/exporting/",
        "qlora_app/training/",
        "qlora_app/generation/",
        "qlora_app/data/",
        "qlora_app/planning/",
    ),
    "qlora_app/terminal/": (
        "qlora_app/commands/",
        "qlora_app/evaluation/",
        "qlora_app/exporting/",
        "qlora_app/training/",
        "qlora_app/quantization/",
    ),
    "qlora_app/outputs/": (
        "qlora_app/commands/",
        "qlora_app/evaluation/",
        "qlora_app/exporting/",
        "qlora_app/training/",
        "qlora_app/quantization/",
        "qlora_app/data/",
        "qlora_app/models/",
        "qlora_app/terminal/",
    ),
    "qlora_app/planning/": ("qlora_app/commands/", "qlora_app/training/", "qlora_app/__init__.py"),
    "qlora_app/decoding/": (
        "qlora_app/commands/",
        "qlora_app/evaluation/",
        "qlora_app/generation/",
        "qlora_app/models/",
        "qlora_app/training/",
        "qlora_app/serving/",
        "qlora_app/__init__.py",
    ),
    "qlora_app/": (),
    "qlora_ext/gguf/": ("qlora_app/", "qlora_ext/__init__.py"),
    "qlora_ext/checkpoints/": ("qlora_ext/merging/", "qlora_ext/integrations/", "qlora_ext/gguf/", "qlora_app/"),
    "qlora_ext/merging/": ("qlora_ext/integrations/", "qlora_ext/__init__.py", "qlora_app/"),
    "qlora_ext/integrations/": ("qlora_ext/gguf/", "qlora_ext/__init__.py", "qlora_app/"),
    "qlora_ext/fidelity/": ("qlora_ext/__init__.py", "qlora_app/"),
    "qlora_ext/calibration/": (
        "qlora_ext/nn/",
        "qlora_ext/streaming/",
        "qlora_ext/fidelity/",
        "qlora_ext/integrations/",
        "qlora_ext/__init__.py",
        "qlora_app/",
    ),
    "qlora_ext/streaming/": ("qlora_ext/integrations/", "qlora_ext/__init__.py", "qlora_app/"),
    "qlora_ext/nn/": (
        "qlora_ext/streaming/",
        "qlora_ext/fingerprint.py",
        "qlora_ext/fidelity/",
        "qlora_ext/merging/",
        "qlora_ext/integrations/",
        "qlora_ext/gguf/",
        "qlora_ext/__init__.py",
        "qlora_app/",
    ),
}


@functools.cache
def imports_of(path: pathlib.Path) -> set[pathlib.Path]:
    """The modules of the package that ``path`` imports, anywhere in the file.

    Imports inside functions and for annotations count too: they exist to defer optional or slow libraries, not our own
    modules, and would hide circular imports.
    """
    found: set[pathlib.Path | None] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = path.parents[node.level - 1] if node.level else PYTHON
            base = base.joinpath(*(node.module or "").split("."))
            found |= {module_at(base / alias.name) or module_at(base) for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {module_at(PYTHON.joinpath(*alias.name.split("."))) for alias in node.names}
    return {module for module in found if module is not None} - {path}


def module_at(path: pathlib.Path) -> pathlib.Path | None:
    files = (path.with_name(f"{path.name}.py"), path.with_name(f"{path.name}.pyi"), path / "__init__.py")
    return next((file for file in files if file.is_file()), None)


def test_python_imports_go_in_no_circle() -> None:
    graph = {path: imports_of(path) for path in MODULES}
    assert sum(map(len, graph.values())) > 100  # already visited
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(relative(path) for path in error.args[1]))


@pytest.mark.parametrize("folder", IMPORTED_BY)
def test_python_imports_point_one_way(folder: str) -> None:
    names = {path: path.relative_to(PYTHON).as_posix() for path in MODULES}
    inside = {path for path, name in names.items() if name.startswith(folder)}
    allowed = (folder, *IMPORTED_BY[folder])
    assert {n for path, n in names.items() if imports_of(path) & inside and not n.startswith(allowed)} == set()


def test_helpers_import_nothing_else_of_ours() -> None:
    shared = ("atomic", "digest", "dtype_names", "sizes", "untrusted", "version")  # with the application
    ground = {path for path in MODULES if path.parent == LIBRARY / "_internal"}
    ground |= {LIBRARY / f"{name}.py" for name in shared}
    upwards = {relative(path): imports_of(path) - ground - {LIBRARY / "_C.pyi"} for path in ground}
    assert {name: found for name, found in upwards.items() if found} == {}


def imported_names(path: pathlib.Path) -> list[tuple[str, str]]:
    """What ``path`` imports, anywhere in the file: the names it uses, and the full names of these."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.asname or alias.name.partition(".")[0], alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = path.parents[node.level - 1].relative_to(PYTHON).parts if node.level else ()
            module = ".".join([*package, *filter(None, [node.module])])
            found += [(alias.asname or alias.name, f"{module}.{alias.name}") for alias in node.names]
    return found


@pytest.mark.parametrize("path", [path for path in MODULES if LIBRARY in path.parents], ids=relative)
def test_the_library_does_not_know_the_application(path: pathlib.Path) -> None:
    """It neither imports a module of it, nor has the name of one in a string."""
    values = [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
    names = [value for value in values if isinstance(value, str) and " " not in value.strip()]
    names += [full for _, full in imported_names(path)]
    assert [name for name in names if "qlora_app" in name] == []


@pytest.mark.parametrize("path", [path for path in MODULES if APPLICATION in path.parents], ids=relative)
def test_the_application_uses_public_names_of_the_library(path: pathlib.Path) -> None:
    """No module, and nothing in a module, whose name begins with an underscore."""
    of_library = {name: full for name, full in imported_names(path) if full.partition(".")[0] == "qlora_ext"}
    used = [*of_library.values()]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and ast.unparse(node).partition(".")[0] in of_library:
            used.append(ast.unparse(node))
    assert [name for name in used if re.search(r"\._(?!_)", name)] == []


def test_benches_use_the_faces_of_the_command_only() -> None:
    """Its entry point, the names in the ``__init__`` of models and data, the loss, how exports calibrate, and tasks.

    Decoding and planning are no parts of the command.
    """
    faces = {f"qlora_app.{name}" for name in ("main", "models", "models.loss", "data", "exporting.calibrated")}
    faces |= {"qlora_app", *(f"qlora_app.evaluation.{name}" for name in ("answering", "reasoning_gym_tasks", "tasks"))}
    for path in sorted((ROOT / "bench").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and re.match(
                r"qlora_ext\._|qlora_app(?!\.(decoding|planning)\b)", node.module or ""
            ):
                names = {alias.name for alias in node.names}
                folder = PYTHON.joinpath(*str(node.module).split("."))
                modules = {name for name in names - {"decoding", "planning"} if module_at(folder / name)}
                assert node.module in faces, f"{relative(path)}: {node.module}"
                assert not modules, f"{relative(path)}: {modules}"


def test_the_list_of_patches_is_complete() -> None:
    patches = LIBRARY / "integrations" / "_patches.py"
    listed = re.findall(r'Patch\(\s*"([^"]+)"', patches.read_text())
    code = "".join(path.read_text() for path in MODULES if path != patches)
    assert sorted(re.findall(r'\bextend\(\s*"([^"]+)"', code)) == sorted(listed)
