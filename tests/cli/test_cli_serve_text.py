"""The text of an answer while its tokens arrive, for tokenizers that split characters."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qlora_app.serving.text import AnswerText

LETTERS = "ab 世😀é\ufffd\n"


def by_bytes() -> Any:
    """GPT-2's kind: tokens of one or two bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [("a", "b"), ("Ġ", "a"), ("ä", "¸"), ("ĸ", "ð"), ("Ģ", "a")]  # two are of parts of different characters
    vocabulary = {token: i for i, token in enumerate([*letters, *(a + b for a, b in pairs), "<end>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def by_words() -> Any:
    """Llama's kind: words begin with a space, which a decoder drops at the beginning; other characters are bytes."""
    words = ["▁", "a", "b", "▁a", "ab", "\n", "<end>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {token: i for i, token in enumerate(words)}
    merges = [("▁", "a"), ("a", "b")]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


TOKENIZERS = {"bytes": by_bytes(), "words": by_words()}


def pushed(tokenizer: Any, prompt: list[int], tokens: list[int], stops: list[str]) -> tuple[list[str], bool]:
    """The parts of the text, and whether it was stopped."""
    text = AnswerText(tokenizer, prompt, stops)
    parts = []
    for token in tokens:
        parts.append(text.push(token))
        if text.stopped:
            return parts, True
    return [*parts, text.finish()], text.stopped


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(
    text=st.text(LETTERS, max_size=30), prompt=st.text("ab 世", min_size=1, max_size=6),
    stops=st.lists(st.text(LETTERS, min_size=1, max_size=4), max_size=4),
)  # fmt: skip
def test_parts_are_the_text_up_to_a_stop_string(kind: str, text: str, prompt: str, stops: list[str]) -> None:
    tokenizer = TOKENIZERS[kind]
    before = tokenizer(prompt)["input_ids"]
    both = tokenizer(prompt + text)["input_ids"]
    if both[: len(before)] != before:  # a token spans both
        before = both[:1]
    tokens = both[len(before) :]
    whole = tokenizer.decode(both)[len(tokenizer.decode(before)) :]
    parts, stopped = pushed(tokenizer, before, tokens, stops)
    shown = "".join(parts)
    places = [whole.find(stop) for stop in stops if stop in whole]
    assert stopped == bool(places)
    # The first stop string that is complete ends the answer: the earliest of those that the last token completed.
    assert not stopped or any(whole[len(shown) :].startswith(stop) for stop in stops)
    assert shown == whole if not stopped else not any(stop in shown for stop in stops)
    if "\ufffd" not in text + prompt:
        assert not any("\ufffd" in part for part in parts)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_bytes_that_are_no_text(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    name = {"bytes": "ð", "words": "<0xF0>"}[kind]
    junk = [tokenizer.convert_tokens_to_ids(name)] * 100
    end = tokenizer("a")["input_ids"]
    before = tokenizer("b")["input_ids"]
    parts, _ = pushed(tokenizer, before, [*junk, *end], [])
    assert "".join(parts) == tokenizer.decode([*before, *junk, *end])[1:]
    assert sum(bool(part) for part in parts) > 2  # they do not wait for the end


def test_special_tokens_have_no_text() -> None:
    tokenizer = TOKENIZERS["words"]
    end = tokenizer.eos_token_id
    ids = tokenizer("b a a")["input_ids"]
    parts, _ = pushed(tokenizer, ids[:2], [end, *ids[2:3], end, end, *ids[3:], end], [])
    assert "".join(parts) == tokenizer.decode(ids)[1:]
