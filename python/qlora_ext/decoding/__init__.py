"""Decoding: a model made ready to answer, and compiled code that writes one token per call.

Compiled code skips the Python of a model's layers, which costs a small 4-bit model most of its time per token.

Example:
    >>> from qlora_ext.decoding import compile_decoding, prepare_to_answer
    >>> def answer(model, tokenizer, prompt):
    ...     compile_decoding(prepare_to_answer(model))
    ...     ids = tokenizer(prompt, return_tensors="pt").input_ids
    ...     return tokenizer.decode(model.generate(ids, max_new_tokens=200)[0])
"""

from .compiled import PAYS_FROM, CompilationError, Decoder, compile_decoding, obstacle
from .prepare import prepare_to_answer

__all__ = ["PAYS_FROM", "CompilationError", "Decoder", "compile_decoding", "obstacle", "prepare_to_answer"]
