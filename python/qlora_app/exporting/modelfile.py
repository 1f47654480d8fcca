"""The Modelfile of an exported model, from which ``ollama create`` makes a model of Ollama."""

from __future__ import annotations

import pathlib
from typing import Any

from qlora_ext.untrusted import excerpt

from ..errors import UserError
from ..models.sources import ModelSource
from . import chat_template

_LIMIT = 2**31  # of the numbers in files
# The parameters of Ollama and of llama.cpp, by their names in a generation configuration of transformers.
SAMPLING = {
    "temperature": ("temperature", "temp"),
    "top_k": ("top_k", "top_k"),
    "top_p": ("top_p", "top_p"),
    "min_p": ("min_p", "min_p"),
    "repetition_penalty": ("repeat_penalty", "penalty_repeat"),
}


def generation_config(source: ModelSource) -> Any:
    """The model's generation configuration; None for a GGUF file, and for a model without one."""
    from transformers import GenerationConfig

    if source.gguf_file is not None:
        return None
    try:
        return GenerationConfig.from_pretrained(source.path)
    except OSError:
        return None


def sampling(generation: Any) -> dict[str, int | float]:
    """The parameters with which a generation configuration samples, by transformers' names; empty if it does not.

    Raises:
        UserError: one of them is not a finite number.
    """
    if generation is None or not generation.do_sample:
        return {}
    found: dict[str, int | float] = {}
    for name in SAMPLING:
        value = getattr(generation, name, None)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < _LIMIT:
            raise UserError(f"generation_config.json: expected a number as {name}, got {excerpt(value)}")
        found[name] = int(value) if name == "top_k" else float(value)
    return found


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
    lines += [f"PARAMETER {SAMPLING[key][0]} {value}" for key, value in sampling(generation).items()]
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
