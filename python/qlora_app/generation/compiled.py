"""``--compile``: decides whether a model decodes with compiled code, and reports if it cannot."""

from __future__ import annotations

import sys
from typing import Any

from ..decoding import BREAK_EVEN_TOKENS as BREAK_EVEN_TOKENS
from ..decoding import CompilationError, Decoder, compile_decoding
from ..errors import UserError


def decode_compiled(model: Any, mode: str, worthwhile: bool) -> Decoder | None:
    """Makes ``model`` decode with compiled code from now on, if the user wants that and it is possible.

    Args:
        mode: "always"; "never"; or "auto": if a package is cached or compiling is ``worthwhile``, and without an error
            if that fails.
        worthwhile: whether answers may be long enough for compiling to save time.

    Returns:
        The decoder, or None if the model is unchanged.

    Raises:
        UserError: compiling fails with "always".
    """
    if mode == "never":
        return None
    try:
        return compile_decoding(model, mode == "always" or worthwhile, lambda text: print(text, file=sys.stderr))
    except CompilationError as error:
        if mode == "always":
            raise UserError(f"--compile always: this model cannot be compiled: {error}") from error
        if worthwhile:
            print(f"not compiled ({error}); answers are slower", file=sys.stderr)
        return None
