"""Limits answers to JSON of a schema, by the grammars of llguidance."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qlora_ext.untrusted import excerpt

from ..errors import first_line
from .errors import invalid

_PARAM = "response_format"
_SPACES = r"[ \n\t]{0,16}"  # between tokens of JSON; without a limit, some models write spaces for ever


class JSONGrammar:
    """The tokens that may come next in one answer, for ``Sampling.allowed_tokens``."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def copy(self) -> JSONGrammar:
        """The grammar of another answer."""
        return JSONGrammar(self._matcher.deep_copy())

    def __call__(self, written: Sequence[int]) -> Tensor:
        if written:
            self._matcher.consume_token(written[-1])
        allowed = bytearray(self._matcher.compute_logit_bias())
        if self._matcher.is_error():
            raise RuntimeError(self._matcher.get_error())
        return torch.frombuffer(allowed, dtype=torch.uint8) > 0


class JSONGrammars:
    """The grammars for one tokenizer.

    Args:
        vocabulary: the number of tokens that the model knows.
        end_tokens: those that end an answer.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, end_tokens: Sequence[int]) -> None:
        if importlib.util.find_spec("llguidance") is None:
            raise invalid(_PARAM, "needs the package llguidance, which is not installed on the server")
        if not end_tokens:
            raise invalid(_PARAM, "not supported with this model, which has no token that ends an answer")
        from llguidance import hf

        try:
            self._tokenizer = hf.from_tokenizer(tokenizer, vocabulary, list(end_tokens))
        except Exception as error:  # of many kinds, for tokenizers of other kinds
            raise invalid(_PARAM, f"not supported with this model's tokenizer ({first_line(error)})") from error

    def grammar(self, schema: dict[str, Any]) -> JSONGrammar:
        """The grammar of a JSON schema.

        Raises:
            APIError: the schema is wrong, or has keywords that the library does not support.
        """
        from llguidance import LLMatcher

        grammar = LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": _SPACES})
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise invalid(_PARAM, f"this JSON schema is not supported: {excerpt(matcher.get_error(), 400)}")
        return JSONGrammar(matcher)
