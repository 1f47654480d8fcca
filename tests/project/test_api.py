"""docs/api.md lists exactly the public names."""

from __future__ import annotations

import importlib
import pathlib
import re

import pytest

for library in ("transformers", "peft", "bitsandbytes"):
    pytest.importorskip(library, reason=f"{library} is not installed")

import qlora_ext

PACKAGE = pathlib.Path(qlora_ext.__file__).parent
PAGE = pathlib.Path(__file__).parents[2] / "docs" / "api.md"


def sections() -> dict[str, list[str]]:
    """The names in each module's table."""
    found: dict[str, list[str]] = {}
    for title, body in re.findall(r"^## `([\w.]+)`\n(.*?)(?=^## |\Z)", PAGE.read_text(), flags=re.M | re.S):
        rows = re.findall(r"^\| (`.*?) \| \S.* \|$", body, flags=re.M)
        found[title] = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    return found


def test_every_module_with_public_names_has_a_section() -> None:
    public = {
        ".".join(("qlora_ext", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
        for path in (*PACKAGE.glob("*.py"), *PACKAGE.rglob("__init__.py"))
        if re.search(r"^__all__ = ", path.read_text(), flags=re.M)
    }
    assert set(sections()) == public - {"qlora_app"}  # its interface is the command


@pytest.mark.parametrize("module", sections())
def test_a_section_lists_the_names_of_its_module(module: str) -> None:
    listed = sections()[module]
    assert sorted(listed) == sorted(importlib.import_module(module).__all__)
    assert all(hasattr(importlib.import_module(module), name) for name in listed)
