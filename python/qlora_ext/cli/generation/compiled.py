"""``--compile``: whether a model decodes by compiled code, and what is said where it cannot."""

from __future__ import annotations

import sys
from typing import Any

from ...decoding import BREAK_EVEN_TOKENS as BREAK_EVEN_TOKENS
from ...decoding import CompilationError, Decoder, compile_decoding
from ..errors import UserError


def decode_compiled(model: Any, mode: str, pays: bool) -> Decoder | None:
    """Has ``model`` decode by compiled code from now on, where the user wants that and it can be done.

    Args:
        mode: "auto" compiles where a package is kept or it ``pays``, and does without where that fails; "always"
            compiles; "never" does not.

    Returns:
        What decodes now, or None: the model is as it was.

    Raises:
        UserError: "always", and it cannot be done.
    """
    if mode == "never":
        return None
    try:
        return compile_decoding(model, mode == "always" or pays, lambda text: print(text, file=sys.stderr))
    except CompilationError as error:
        if mode == "always":
            raise UserError(f"--compile always: this model cannot be compiled: {error}") from error
        if pays:
            print(f"not compiled ({error}); answers are slower", file=sys.stderr)
        return None
