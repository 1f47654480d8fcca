"""The tokenizer of a GGUF file, from one of transformers.

llama.cpp knows two kinds of BPE: on bytes, with a pre-tokenizer that it implements itself and the file names; and
SentencePiece's, which merges by the score of each token. The gguf package reads merges, special tokens and the chat
template. For a pre-tokenizer without a name here, llama.cpp's own converter makes the tokenizer, if it is installed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any

import gguf
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..special_tokens import special_tokens

try:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
except ImportError:  # older versions lack the table
    GGUF_PRE_TOKENIZER_SPLITS = {}

_CONVERTER = "convert_hf_to_gguf.py"
_PREFIX = "tokenizer."
_SPACE = "\u2581"  # SentencePiece's
# Pre-tokenizers without a regular expression of their own, by the types of their parts.
_WITHOUT_SPLIT = {("ByteLevel",): "gpt-2", ("Digits", "ByteLevel"): "smollm"}


@dataclasses.dataclass(frozen=True)
class GGUFTokenizer:
    """The metadata of a tokenizer: key, value, type, and type of an array's elements."""

    values: tuple[tuple[str, Any, gguf.GGUFValueType, gguf.GGUFValueType | None], ...]

    def add_to(self, writer: gguf.GGUFWriter) -> None:
        for value in self.values:
            writer.add_key_value(*value)

    @property
    def nbytes(self) -> int:
        """About their size in the file."""
        total = 0
        for key, value, *_ in self.values:
            items = value if isinstance(value, (list, tuple)) else [value]
            total += len(key) + sum(8 + (len(item.encode()) if isinstance(item, str) else 0) for item in items)
        return total


@contextlib.contextmanager
def _saved(tokenizer: Any, config: Any) -> Iterator[pathlib.Path]:
    """A temporary directory with a tokenizer and a configuration, for libraries that read files.

    The configuration names a class of transformers, so that llama.cpp's converter runs no code of the model.
    """
    text = config.get_text_config()
    fields = json.loads(text.to_json_string(use_diff=False))
    fields["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[text.model_type]]
    for name in ("auto_map", "quantization_config"):
        fields.pop(name, None)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        (pathlib.Path(folder) / "config.json").write_text(json.dumps(fields))
        yield pathlib.Path(folder)


def convert(tokenizer: Any, config: Any, count: int) -> GGUFTokenizer:
    """The tokenizer for a file whose embeddings have ``count`` rows.

    Args:
        tokenizer: of transformers.
        config: the model's configuration, which may name special tokens that the tokenizer lacks.

    Raises:
        ValueError: llama.cpp has no such tokenizer, or it is not known which one it is.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = {} if backend is None else json.loads(backend.to_str())
    if parts.get("model", {}).get("type") == "BPE":
        sentencepiece = bool(parts["model"].get("byte_fallback"))
        name = "default" if sentencepiece else _pre_tokenizer(parts)
        if name is not None:
            return _own(tokenizer, config, count, parts, None if sentencepiece else name)
    converter = shutil.which(_CONVERTER)
    if converter is None:
        raise ValueError(
            "expected a tokenizer with BPE and a pre-tokenizer that is known here, got another one; put llama.cpp's "
            f"{_CONVERTER} on PATH, which knows more of them"
        )
    return _by_converter(converter, tokenizer, config, count)


def _own(tokenizer: Any, config: Any, count: int, parts: dict[str, Any], pre_tokenizer: str | None) -> GGUFTokenizer:
    writer = gguf.GGUFWriter(None, "")
    tokens, types = _tokens(tokenizer, count, pre_tokenizer is None)
    writer.add_tokenizer_model("llama" if pre_tokenizer is None else "gpt2")
    writer.add_tokenizer_pre(pre_tokenizer or "default")
    writer.add_token_list(tokens)
    if pre_tokenizer is None:
        writer.add_token_scores(_scores(tokens, parts["model"]["merges"]))
        writer.add_add_space_prefix(_adds_space(parts))
    writer.add_token_types(types)
    with _saved(tokenizer, config) as folder:
        vocabulary = gguf.SpecialVocab(folder, load_merges=pre_tokenizer is not None, n_vocab=count)
    vocabulary.add_special_token.update(_adds(tokenizer))
    vocabulary.add_to_gguf(writer, quiet=True)
    return GGUFTokenizer(
        tuple(
            (key, value.value, value.type, value.sub_type)
            for key, value in writer.kv_data[0].items()
            if key.startswith(_PREFIX)
        )
    )


def _pre_tokenizer(parts: dict[str, Any]) -> str | None:
    """llama.cpp's name of the pre-tokenizer of a BPE on bytes; None if it has none that is known here."""
    found = parts.get("pre_tokenizer") or {}
    steps = found.get("pretokenizers", [found])
    last = steps[-1]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if last.get("use_regex", True):
        if any(step["type"] == "Digits" and not step.get("individual_digits") for step in steps):
            return None
        return _WITHOUT_SPLIT.get(tuple(step["type"] for step in steps))
    if (
        len(steps) != 2
        or steps[0]["type"] != "Split"
        or steps[0].get("behavior") != "Isolated"
        or steps[0].get("invert")
    ):
        return None
    split = steps[0]["pattern"].get("Regex")
    names = [name for name, regex in GGUF_PRE_TOKENIZER_SPLITS.items() if regex == split]
    if "llama-bpe" in names:  # with it, llama.cpp takes a word that is a token as it is
        return "llama-bpe" if parts["model"].get("ignore_merges") else "dbrx"
    return names[0] if names else None


def _tokens(tokenizer: Any, count: int, sentencepiece: bool) -> tuple[list[str], list[gguf.TokenType]]:
    """The text and the type of each token, and of the rows of the embeddings that belong to none."""
    text = {number: token for token, number in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens, types = [], []
    for number in range(count):
        token, kind = text.get(number, f"[PAD{number}]"), gguf.TokenType.NORMAL
        if number not in text:
            kind = gguf.TokenType.UNUSED
        elif sentencepiece and number == tokenizer.unk_token_id:
            kind = gguf.TokenType.UNKNOWN
        elif number in added:
            kind = gguf.TokenType.CONTROL if added[number].special else gguf.TokenType.USER_DEFINED
            if not added[number].special:  # llama.cpp finds it in the text, in which spaces are spaces
                token = token.replace(_SPACE, " ")
        elif sentencepiece and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            kind = gguf.TokenType.BYTE
        tokens.append(token)
        types.append(kind)
    return tokens, types


def _scores(tokens: list[str], merges: list[Any]) -> list[float]:
    """Scores by which SentencePiece merges in the order of ``merges``."""
    rank: dict[str, int] = {}
    for merge in merges:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        rank.setdefault(left + right, len(rank))
    return [-float(rank.get(token, len(rank))) for token in tokens]


def _adds_space(parts: dict[str, Any]) -> bool:
    """Whether a text begins with a space."""
    normalizer, splitter = parts.get("normalizer") or {}, parts.get("pre_tokenizer") or {}
    steps = [*normalizer.get("normalizers", [normalizer]), *splitter.get("pretokenizers", [splitter])]
    return any(
        step.get("type") == "Prepend" or (step.get("type") == "Metaspace" and step.get("prepend_scheme") != "never")
        for step in steps
    )


def _adds(tokenizer: Any) -> dict[str, bool]:
    """Whether a text begins and ends with special tokens."""
    beginning, end = special_tokens(tokenizer)
    return {"bos": beginning[:1] == [tokenizer.bos_token_id], "eos": end[-1:] == [tokenizer.eos_token_id]}


def _by_converter(converter: str, tokenizer: Any, config: Any, count: int) -> GGUFTokenizer:
    """What llama.cpp's converter makes of a tokenizer."""
    with _saved(tokenizer, config) as folder:
        path = folder / "tokenizer.gguf"
        command = [converter, str(folder), "--vocab-only", "--outtype", "f16", "--outfile", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not path.is_file():
            lines = done.stderr.strip().splitlines()
            raise ValueError(f"{converter} cannot convert the tokenizer: {lines[-1] if lines else done.returncode}")
        fields = gguf.GGUFReader(path).fields
        found = len(fields[gguf.Keys.Tokenizer.LIST].data) if gguf.Keys.Tokenizer.LIST in fields else 0
        if found != count:
            raise ValueError(f"{converter} made {found} tokens, expected one for each of the {count} embeddings")
        return GGUFTokenizer(
            tuple(
                (name, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)
                for name, field in fields.items()
                if name.startswith(_PREFIX)
            )
        )
