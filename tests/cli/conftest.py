"""Fixtures of the tests of the command."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from exports import exported, gguf_adapter

__all__ = ["exported", "gguf_adapter"]  # fixtures


class ModuleOfTests(pytest.Module):
    """Is skipped where a library is missing without which most commands do nothing."""

    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        for library in ("transformers", "peft", "gguf"):
            pytest.importorskip(library, reason=f"{library} is not installed")
        return super().collect()


def pytest_pycollect_makemodule(module_path: pathlib.Path, parent: pytest.Collector) -> pytest.Module:
    module: pytest.Module = ModuleOfTests.from_parent(parent, path=module_path)
    return module


@pytest.fixture(autouse=True)
def _short_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts on which models are compared have short rows, which a model writes in a quarter of the time."""
    monkeypatch.setattr("qlora_app.data.held_out.LENGTH", 64)


@pytest.fixture(scope="module")
def tokenizer(paths: Any) -> Any:
    """Of a served model: one token per byte."""
    from transformers import AutoTokenizer

    import chat_templates

    tokenizer = AutoTokenizer.from_pretrained(paths["model"])
    tokenizer.chat_template = chat_templates.PLAIN
    return tokenizer


@pytest.fixture(scope="module")
def shared(tokenizer: Any) -> Iterator[Any]:
    from openai_server import ANSWER, MODELS, FakeDecoder, running

    decoder = FakeDecoder(lambda prompt: tokenizer(ANSWER)["input_ids"])
    with running(decoder, tokenizer, MODELS) as server:
        yield server


@pytest.fixture
def server(shared: Any) -> Any:
    shared.decoder.requests.clear()
    return shared
