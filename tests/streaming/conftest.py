"""Models to stream, saved once."""

from __future__ import annotations

import pathlib

import pytest


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    from streamed_models import save

    return save("llama", tmp_path_factory.mktemp("llama"))
