"""Adds the pages that are made from other files to the site, and points links between files of the repository to them.

Pages in docs/ link to files as they lie in the repository, so that they can be read there, too. On the site:

- bench/results/MACHINE.json is results/MACHINE.html, with tables and pictures (bench/lib/report.py);
- examples/NAME is examples/NAME.html, with the program;
- README.md, CONTRIBUTING.md, CHANGELOG.md, LICENSE and cpp/cpu/README.md are pages, too;
- each module in docs/api.md has a page in reference/, with the docstring of each of its names.

A link to another file of the repository is a warning, which fails the build.
"""

from __future__ import annotations

import ast
import functools
import json
import logging
import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
from bench.lib import pictures, report
from bench.lib import results_files as results
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
log = logging.getLogger("mkdocs.hooks")
PICTURES = ROOT / "build" / "site-pictures"
LANGUAGES = {".py": "python", ".yaml": "yaml"}
# Pages by the file of the repository that they show.
WHOLE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "LICENSE": "license.md",
    "cpp/cpu/README.md": "cpu_kernels.md",
    "tests/cudasim/README.md": "kernel_simulator.md",
}
SECTION = re.compile(r"^## `([\w.]+)`\n(.*?)(?=^## |\Z)", re.M | re.S)
ROW = re.compile(r"^\| ((?:`\w+`(?:, )?)+) \| (\S.*) \|$", re.M)
LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s]+)(\))")


def on_config(config: MkDocsConfig) -> None:
    """The parts of the navigation whose pages are made here."""
    assert config.nav is not None
    made = {
        "Recipes": [{path.name: f"examples/{path.stem}.md"} for path in _examples()],
        "Benchmarks": [{_machine(path): f"results/{path.stem}.md"} for path in _results()],
        "Reference": [{module: f"reference/{module}.md"} for module in _modules()],
    }
    for entry in config.nav:
        for title, pages in entry.items():
            if title in made:
                pages += made[title]


def on_files(files: Files, config: MkDocsConfig) -> None:
    made = {page: _whole(source) for source, page in WHOLE.items() if page != "index.md"}
    made |= {f"examples/{path.stem}.md": _example(path) for path in _examples()}
    made |= {f"reference/{module}.md": _reference(module, body) for module, body in _modules().items()}
    for path in _results():
        page, drawn = _result(path)
        made[f"results/{path.stem}.md"] = page
        for picture in drawn:
            made_of = PICTURES / picture
            files.append(File.generated(config, f"results/{picture}", abs_src_path=str(made_of)))
    for uri, content in made.items():
        files.append(File.generated(config, uri, content=content))


def on_page_markdown(markdown: str, page: Page, files: Files, **kwargs: Any) -> str:
    """Points links to files of the repository to the pages that show them. Code blocks stay as they are."""
    uri = page.file.src_uri
    source = next((source for source, whole in WHOLE.items() if whole == uri and uri != "index.md"), f"docs/{uri}")
    if page.file.generated_by and source == f"docs/{uri}":
        return markdown  # made above, with the site's own links

    def pointed(found: re.Match[str]) -> str:
        target, mark, anchor = found[2].partition("#")
        if not target or re.match(r"[a-z]+:", target):
            return found[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        shown = _page_of(path)
        if shown is None:
            log.warning(f"{source}: no page of the site shows {path}")
            return found[0]
        relative = posixpath.relpath(shown, posixpath.dirname(uri) or ".")
        return f"{found[1]}{relative}{mark}{anchor}{found[3]}"

    if uri == "api.md":
        markdown = _with_links(markdown)
    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.M | re.S)
    return "".join(part if part.startswith("```") else LINK.sub(pointed, part) for part in parts)


def _page_of(path: str) -> str | None:
    """The page or picture of the site for a file of the repository."""
    if path in WHOLE:
        return WHOLE[path]
    if path == "examples":
        return "recipes.md"
    folder, _, name = path.rpartition("/")
    if folder == "bench/results" and (ROOT / path).exists():
        return f"results/{Path(name).stem}.md"
    if folder == "examples" and (ROOT / path).exists():
        return f"examples/{Path(name).stem}.md"
    return path.removeprefix("docs/") if path.startswith("docs/") else None


def _whole(source: str) -> str:
    text = (ROOT / source).read_text()
    return f"# License\n\n```text\n{text}```\n" if source == "LICENSE" else text


def _examples() -> list[Path]:
    return sorted(path for path in (ROOT / "examples").iterdir() if path.suffix in {*LANGUAGES, ".ipynb"})


def _example(path: Path) -> str:
    if path.suffix == ".ipynb":
        return _notebook(path)
    code, does = path.read_text(), ""
    if path.suffix == ".py":
        does = (ast.get_docstring(ast.parse(code)) or "").partition("\n\n")[0] + "\n\n"
    return f"# {path.name}\n\n{does}```{LANGUAGES[path.suffix]}\n{code}```\n"


def _notebook(path: Path) -> str:
    """The cells, and the texts and pictures that they put out."""
    lines = []
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            lines += [source, ""]
            continue
        lines += ["```python", source, "```", ""]
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                lines += [
                    f'<img alt="{_first_line(source)}" src="data:image/png;base64,{data["image/png"].strip()}">',
                    "",
                ]
            elif text := "".join(output.get("text", data.get("text/plain", ""))):
                lines += ["```text", text.rstrip(), "```", ""]
    return "\n".join(lines)


def _first_line(source: str) -> str:
    return source.partition("\n")[0].lstrip("# ").replace('"', "'")


def _results() -> list[Path]:
    return sorted(results.RESULTS.glob("*.json"))


def _machine(path: Path) -> str:
    return results.MACHINES.get(path.stem) or report.title(path.stem)


def _result(path: Path) -> tuple[str, list[str]]:
    """The page of a machine, and its pictures, drawn again only where the results are newer."""
    found, drawn = results.sections(path), {}
    for name, picture in pictures.of_machine(found).items():
        target = PICTURES / path.stem / f"{name}.svg"
        if not target.exists() or target.stat().st_mtime < path.stat().st_mtime:
            pictures.save(picture.draw, target, picture.size)
        drawn[name] = f"{path.stem}/{name}.svg"
    page = report.markdown(path.stem, found, drawn)
    return f"---\nsearch:\n  exclude: true\n---\n{page}", list(drawn.values())


def _modules() -> dict[str, str]:
    """The sections of docs/api.md, by module."""
    return dict(SECTION.findall((ROOT / "docs" / "api.md").read_text()))


@functools.cache
def _package(name: str) -> griffe.Object:
    return griffe.load(name, search_paths=[ROOT / "python"])


def _documented(module: str, name: str) -> griffe.Object:
    package, _, path = f"{module}.{name}".partition(".")
    found = _package(package)[path]
    if found.is_alias:
        found = found.final_target
    # A function that its package imports from a module of the same name stands behind that.
    return found.members[name] if found.is_module and name in found.members else found


def _anchor(module: str, name: str) -> str:
    found = _documented(module, name)
    return found.path if found.is_function and found.path.endswith(f".{name}.{name}") else f"{module}.{name}"


def _with_links(markdown: str) -> str:
    """The page of all public names, each with a link to its description."""

    def section(found: re.Match[str]) -> str:
        module = found[1]

        def row(names: re.Match[str]) -> str:
            linked = [f"[`{n}`](reference/{module}.md#{_anchor(module, n)})" for n in re.findall(r"`(\w+)`", names[1])]
            return f"| {', '.join(linked)} | {names[2]} |"

        return f"## `{module}`\n{ROW.sub(row, found[2])}"

    return SECTION.sub(section, markdown)


def _reference(module: str, body: str) -> str:
    """Each name of a module: what its docstring says or, of modules and constants, its line in docs/api.md."""
    modules = _modules()
    lines = [f"# {module}", ""]
    for names, what in ROW.findall(body):
        what = re.sub(r"\[([^\]]*)\]\((\w+\.md\S*)\)", r"[\1](../\2)", what)
        sentence = f"{what[0].upper()}{what[1:]}."
        for name in re.findall(r"`(\w+)`", names):
            found, anchor = _documented(module, name), _anchor(module, name)
            heading = f"### {name} {{#{anchor}}}"
            if anchor in modules:
                lines += [heading, "", f"{sentence} [Its names]({anchor}.md).", ""]
            elif found.has_docstring:
                options = ["    options:", "      inherited_members: true"] if name == "NF4Weight" else []
                lines += [f"::: {anchor}", *options, ""]
            elif found.is_attribute or found.is_module:
                lines += [heading, "", sentence, ""]
            else:
                log.warning(f"{anchor} is public and has no docstring")
    return "\n".join(lines)
