"""Fixtures of the tests of the command."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _short_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts on which models are compared have short rows, which a model writes in a quarter of the time."""
    monkeypatch.setattr("qlora_ext.cli.data.held_out.LENGTH", 64)
