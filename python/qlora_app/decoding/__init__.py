"""Decoding: compiled code that reads a prompt or writes one token per call, and the decoding of many sequences at once.

Compiled code skips the Python code of a model's layers, which takes most of the time per token of a small 4-bit model.

Example:
    >>> from qlora_app.decoding import compile_decoding, prepare_to_answer
    >>> def answer(model, tokenizer, prompt):
    ...     compile_decoding(prepare_to_answer(model))
    ...     ids = tokenizer(prompt, return_tensors="pt").input_ids
    ...     return tokenizer.decode(model.generate(ids, max_new_tokens=200)[0])
"""

from .answers import generate
from .batch import BatchDecoder
from .compiled import BREAK_EVEN_TOKENS, Decoder, compile_decoding
from .packages import CompilationError, obstacle
from .prepare import prepare_to_answer
from .requests import DecodeRequest
from .rollouts import Rollouts
from .sampling import Sampling

Request = DecodeRequest  # its earlier name

__all__ = [
    "BREAK_EVEN_TOKENS",
    "BatchDecoder",
    "CompilationError",
    "DecodeRequest",
    "Decoder",
    "Request",
    "Rollouts",
    "Sampling",
    "compile_decoding",
    "generate",
    "obstacle",
    "prepare_to_answer",
]
