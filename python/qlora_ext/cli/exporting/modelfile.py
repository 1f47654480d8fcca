"""The Modelfile of an exported model, from which ``ollama create`` makes a model of Ollama."""

from __future__ import annotations

import pathlib
from typing import Any

from . import chat_template

# Ollama's parameters, by their names in a generation configuration of transformers.
_SAMPLING = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}


def text(
    base: pathlib.PurePath, adapter: str | None, tokenizer: Any, generation: Any, name: str
) -> tuple[str, list[str]]:
    """The Modelfile, and sentences about what it lacks.

    Args:
        base: the GGUF file of the model: an absolute path, or a name in the directory of the Modelfile.
        adapter: the name of the adapter's file there, if any.
        generation: the model's generation configuration; None if it has none.
        name: of the model, for the sentences.
    """
    lines = [f"FROM {base}" if base.is_absolute() else f"FROM ./{base}"]
    if adapter is not None:
        lines.append(f"ADAPTER ./{adapter}")
    notes = []
    template = chat_template.fit(tokenizer)
    if template is not None:
        lines.append(f'TEMPLATE """{template.go}"""')
    elif not tokenizer.chat_template:
        notes.append(f"{name} has no chat template, so the Modelfile has no TEMPLATE: Ollama passes prompts unchanged")
    else:
        notes.append(
            f"the chat template of {name} cannot be translated, so the Modelfile has no TEMPLATE: Ollama uses its own "
            "if it recognizes the one in the GGUF file; check it with: ollama show NAME --template"
        )
    lines += [f'PARAMETER stop "{stop}"' for stop in _stops(tokenizer, generation, template) if '"' not in stop]
    if generation is not None and generation.do_sample:
        values = {ollama: getattr(generation, ours, None) for ours, ollama in _SAMPLING.items()}
        lines += [f"PARAMETER {key} {value}" for key, value in values.items() if value is not None]
    return "\n".join(lines) + "\n", notes


def _stops(tokenizer: Any, generation: Any, template: chat_template.ChatTemplate | None) -> list[str]:
    """The texts of the tokens that end an answer."""
    ids = getattr(generation, "eos_token_id", None)
    ids = [] if ids is None else [ids] if isinstance(ids, int) else [*ids]
    found = [tokenizer.convert_ids_to_tokens(i) for i in ids if 0 <= i < len(tokenizer)]
    if tokenizer.eos_token is not None:
        found.append(tokenizer.eos_token)
    if template is not None:
        found += [token for token in tokenizer.all_special_tokens if token in template.assistant[1]]
    return [*dict.fromkeys(found)]
