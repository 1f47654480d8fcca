"""Only the modules listed here rename or delete files. Each of them states its rules."""

from __future__ import annotations

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[2]
# Calls that delete, rename or truncate a file or directory, and directories that delete themselves.
DANGEROUS = {
    "rmtree", "unlink", "rmdir", "removedirs", "rename", "renames", "truncate", "ftruncate", "TemporaryDirectory",
    "mkdtemp", "write_text", "write_bytes",
}  # fmt: skip
# Dangerous only as functions of a module, because lists and strings have methods with these names.
OF_MODULES = {"remove": ("os",), "replace": ("os",), "move": ("shutil",), "copyfile": ("shutil",), "copy": ("shutil",),
              "copy2": ("shutil",), "copytree": ("shutil",)}  # fmt: skip
# Where such calls may stand.
PLACES = {
    "python/qlora_app/outputs/files.py": "the rule for all deletions is at its top",
    "python/qlora_app/outputs/lock.py": "a file that was checked to be a lock file",
    "python/qlora_app/decoding/cache.py": "a directory of its own among temporary files, and a staged file",
    "python/qlora_app/evaluation/sandbox.py": "a directory of its own among the system's temporary files",
    "python/qlora_app/gguf/tokenizer.py": "a directory of its own among the system's temporary files",
    "python/qlora_app/training/save.py": "the card of an adapter in a staged directory",
    "python/qlora_ext/atomic.py": "a file with an unpredictable name, which this process made",
    "python/qlora_ext/calibration/store.py": "a staged file, which atomic.py made",
    "python/qlora_ext/integrations/transformers/deferred.py": "a staged file, which atomic.py made",
    "python/qlora_ext/integrations/peft/base_file.py": "a staged file, which atomic.py made",
    "python/qlora_ext/integrations/transformers/model_card.py": "README.md in a model directory without one",
    **dict.fromkeys(
        (f"scripts/packaging/{name}.py" for name in ("check", "glibc", "release", "wheels")),
        "builds, in directories with a marker",
    ),
}


def dangerous(tree: ast.AST) -> set[str]:
    """The dangerous functions that code names, to call or to pass on."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in ("os", "shutil", "tempfile", "pathlib"):
            found |= {alias.name for alias in node.names} & (DANGEROUS | set(OF_MODULES))
        elif isinstance(node, ast.Attribute) and node.attr in DANGEROUS:
            found.add(node.attr)
        elif isinstance(node, ast.Attribute) and node.attr in OF_MODULES and isinstance(node.value, ast.Name):
            found |= {node.attr} if node.value.id in OF_MODULES[node.attr] else set()
        if isinstance(node, ast.Call):
            found |= called(node)
    return found


def called(call: ast.Call) -> set[str]:
    """Calls that are dangerous by their arguments: ``path.replace(target)``, ``open(path, "w")``."""
    positional = [argument for argument in call.args if not isinstance(argument, ast.Starred)]
    if isinstance(call.func, ast.Attribute) and call.func.attr == "replace" and len(call.args) == 1:
        copied = isinstance(call.func.value, ast.Name) and call.func.value.id == "dataclasses"
        return set() if copied else {"replace"}
    name = call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")
    modes = [*positional, *(keyword.value for keyword in call.keywords if keyword.arg == "mode")]
    texts = [mode.value for mode in modes if isinstance(mode, ast.Constant) and isinstance(mode.value, str)]
    writes = any(len(text) < 4 and set(text) & set("wx+a") and set(text) <= set("rwxabt+") for text in texts)
    return {"open"} if name == "open" and writes else set()


def sources() -> list[pathlib.Path]:
    found = [p for folder in ("python", "scripts", "examples", "_build_backend") for p in (ROOT / folder).rglob("*")]
    scripts = [p for p in found if p.is_file() and p.suffix == "" and b"python" in p.read_bytes()[:40]]
    return sorted([*(p for p in found if p.suffix == ".py"), *scripts])


def test_every_call_that_deletes_is_in_a_place_for_it() -> None:
    found = {path.relative_to(ROOT).as_posix(): dangerous(ast.parse(path.read_text())) for path in sources()}
    assert len(found) > 100
    assert {name for name, calls in found.items() if calls} == set(PLACES)


@pytest.mark.parametrize(
    "code",
    [
        "shutil.rmtree(path)", "from shutil import rmtree as gone", "path.unlink()", "map(os.unlink, paths)",
        "os.remove(path)", "os.replace(a, b)", "path.replace(other)", "path.rename(other)", "a.rmdir()",
        "open(path, 'w')", "path.open(mode='wb')", "tempfile.TemporaryDirectory()", "path.write_text('')",
    ],
)  # fmt: skip
def test_it_finds(code: str) -> None:
    assert dangerous(ast.parse(code))


@pytest.mark.parametrize(
    "code",
    ["names.remove(x)", "text.replace('a', 'b')", "dataclasses.replace(settings, seed=1)", "open(path, 'rb')",
     "path.open()", "when.replace(tzinfo=None)"],
)  # fmt: skip
def test_it_does_not_find(code: str) -> None:
    assert not dangerous(ast.parse(code))
