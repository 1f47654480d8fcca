"""docs/api.md lists exactly the public names."""

from __future__ import annotations

import importlib
import pathlib
import re

import pytest

for library in ("transformers", "peft", "bitsandbytes"):
    pytest.importorskip(library, reason=f"{library} is not installed")

import qlora_app
import qlora_ext

PACKAGES = [pathlib.Path(str(package.__file__)).parent for package in (qlora_ext, qlora_app)]
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
        ".".join((package.name, *path.relative_to(package).with_suffix("").parts)).removesuffix(".__init__")
        for package in PACKAGES
        for path in (*package.glob("*.py"), *package.rglob("__init__.py"))
        if re.search(r"^__all__ = ", path.read_text(), flags=re.M)
    }
    assert set(sections()) == public


@pytest.mark.parametrize("module", sections())
def test_a_section_lists_the_names_of_its_module(module: str) -> None:
    listed = sections()[module]
    assert sorted(listed) == sorted(importlib.import_module(module).__all__)
    assert all(hasattr(importlib.import_module(module), name) for name in listed)


@pytest.mark.parametrize("name", ["finetune", "export", "plan", "decoding", "planning"])
def test_names_of_the_application_say_where_they_are(name: str) -> None:
    with pytest.raises(ImportError, match=rf"^qlora_ext\.{name} moved: from qlora_app import {name}$"):
        getattr(qlora_ext, name)
    with pytest.raises(ImportError, match=f"from qlora_app import {name}"):
        exec(f"from qlora_ext import {name}")
    assert hasattr(qlora_app, name)
