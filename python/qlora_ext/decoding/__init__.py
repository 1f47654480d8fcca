"""Decoding: prepares a model for inference, and compiles code that reads a prompt or writes one token per call.

Compiled code skips the Python code of a model's layers, which takes most of the time per token of a small 4-bit model.

Example:
    >>> from qlora_ext.decoding import compile_decoding, prepare_to_answer
    >>> def answer(model, tokenizer, prompt):
    ...     compile_decoding(prepare_to_answer(model))
    ...     ids = tokenizer(prompt, return_tensors="pt").input_ids
    ...     return tokenizer.decode(model.generate(ids, max_new_tokens=200)[0])
"""

from .compiled import BREAK_EVEN_TOKENS, CompilationError, Decoder, compile_decoding, obstacle
from .prepare import prepare_to_answer

__all__ = ["BREAK_EVEN_TOKENS", "CompilationError", "Decoder", "compile_decoding", "obstacle", "prepare_to_answer"]
