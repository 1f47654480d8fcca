"""The vocabulary of a language model."""

from __future__ import annotations

from typing import Any


def vocabulary_size(model: Any) -> int:
    """The number of rows of the model's input embeddings, which may have an adapter of PEFT."""
    embeddings = model.get_input_embeddings()
    if hasattr(embeddings, "get_base_layer"):
        embeddings = embeddings.get_base_layer()
    size: int = embeddings.num_embeddings
    return size
