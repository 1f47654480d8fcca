"""Repacks codes between the layouts of checkpoints and ours, without loss.

Ours, row-major [N, K/2], has element 2i in the high nibble of byte i. Words are int32, little-endian::

    lo first     byte i of a row: element 2i low, 2i+1 high
    words        nibble i of a word (bits 4i..4i+3): element i of eight neighbours, which is lo first as bytes
    GPTQ         words [K/8, N]: a word has eight neighbours along K
    AWQ          words [K, N/8]: a word has eight neighbours along N, in the order 0 2 4 6 1 3 5 7

A word of 8-bit codes has four neighbours, which are our bytes. Codes of other widths are a stream of bits, the lowest
of the first code first.

``from_...`` and ``to_...`` are inverses. The functions for codes work in chunks that stay in a core's cache, because
fresh memory for temporaries of a weight's size costs several times the arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._internal import bit_planes

_CHUNK = 1 << 18  # bytes
_AWQ_WORDS = 32  # columns of words per chunk
_LOW = 0x0F0F0F0F  # the low nibbles of a word's bytes


def swap(packed: Tensor) -> Tensor:
    """The uint8 tensor ``packed`` with the nibbles of each byte swapped: lo first to ours, and back."""
    out = torch.empty(packed.shape, dtype=torch.uint8, device=packed.device)
    for source, target in zip(packed.reshape(-1).split(_CHUNK), out.view(-1).split(_CHUNK), strict=True):
        torch.bitwise_left_shift(source, 4, out=target)
        target |= source >> 4
    return out


def _viewed(t: Tensor, dtype: torch.dtype) -> Tensor:
    """The bytes of ``t`` as another dtype along its last dimension, whatever its strides."""
    return t.reshape(-1).view(dtype).view(*t.shape[:-1], -1)


def from_words(words: Tensor, bits: int = 4) -> Tensor:
    """Packed codes [..., W*32/bits] of the int32 words [..., W]."""
    codes = _viewed(words, torch.uint8)
    return swap(codes) if bits == 4 else codes.clone()


def to_words(packed: Tensor, bits: int = 4) -> Tensor:
    """The inverse of ``from_words``."""
    return _viewed(swap(packed) if bits == 4 else packed, torch.int32)


def from_gptq(words: Tensor, bits: int = 4) -> Tensor:
    """Packed codes [N, K*bits/8] of the int32 words [K*bits/32, N]."""
    out = torch.empty((words.shape[1], words.shape[0] * 4), dtype=torch.uint8, device=words.device)
    rows = max(_CHUNK // out.shape[1], 1)
    for source, target in zip(words.split(rows, 1), out.split(rows), strict=True):
        target.copy_(from_words(source.t(), bits))
    return out


def to_gptq(packed: Tensor, bits: int = 4) -> Tensor:
    """The inverse of ``from_gptq``."""
    out = torch.empty((packed.shape[1] // 4, packed.shape[0]), dtype=torch.int32, device=packed.device)
    rows = max(_CHUNK // packed.shape[1], 1)
    for source, target in zip(packed.split(rows), out.split(rows, 1), strict=True):
        target.copy_(to_words(source, bits).t())
    return out


def from_stream(words: Tensor, bits: int) -> Tensor:
    """The codes of the words [R, W] of a stream of bits, one per byte: uint8 [R, W*32/bits]."""
    shifts = torch.arange(8, dtype=torch.uint8, device=words.device)
    stream = (_viewed(words, torch.uint8).unsqueeze(-1) >> shifts & 1).view(len(words), -1, bits)
    return (stream << shifts[:bits]).sum(-1, dtype=torch.uint8)


def to_stream(codes: Tensor, bits: int) -> Tensor:
    """The inverse of ``from_stream``."""
    shifts = torch.arange(8, dtype=torch.uint8, device=codes.device)
    stream = (codes.unsqueeze(-1) >> shifts[:bits] & 1).view(len(codes), -1, 8)
    return _viewed((stream << shifts).sum(-1, dtype=torch.uint8), torch.int32)


def select_columns(packed: Tensor, columns: Tensor, bits: int = 4) -> Tensor:
    """Packed codes of the columns ``columns`` [K] of those of ``packed`` [N, K*bits/8]."""
    out = torch.empty_like(packed)
    rows = max(_CHUNK // packed.shape[1], 1)
    for source, target in zip(packed.split(rows), out.split(rows), strict=True):
        target.copy_(bit_planes.pack(bit_planes.unpack(source, bits).index_select(1, columns), bits))
    return out


# An AWQ word's byte 2p + a has element 4a + p of the eight in its low nibble (h = 0) and 4a + 2 + p in its high one
# (h = 1). So a column of words is [a, h, p, K/2] in our layout, where a byte joins two of its words, and [K/2, p, a]
# for each h in AWQ's.


def from_awq(words: Tensor) -> Tensor:
    """Packed codes [N, K/2] of the int32 words [K, N/8]."""
    rows, columns = words.shape
    out = torch.empty((columns, 2, 2, 2, rows // 2), dtype=torch.uint8, device=words.device)
    for source, target in zip(words.split(_AWQ_WORDS, 1), out.split(_AWQ_WORDS), strict=True):
        lines = source.t().contiguous()
        even, odd = lines[:, 0::2], lines[:, 1::2]
        low = (even & _LOW) << 4 | odd & _LOW
        high = even & ~_LOW | odd >> 4 & _LOW
        for h, pairs in enumerate((low, high)):
            target[:, :, h] = _viewed(pairs, torch.uint8).view(-1, rows // 2, 2, 2).permute(0, 3, 2, 1)
    return out.view(columns * 8, rows // 2)


def to_awq(packed: Tensor) -> Tensor:
    """The inverse of ``from_awq``."""
    columns, pairs = packed.shape[0] // 8, packed.shape[1]
    out = torch.empty((pairs * 2, columns), dtype=torch.int32, device=packed.device)
    sources = packed.reshape(columns, 2, 2, 2, pairs).split(_AWQ_WORDS)
    for source, target in zip(sources, out.split(_AWQ_WORDS, 1), strict=True):
        low, high = (_viewed(source[:, :, h].permute(0, 3, 2, 1).flatten(1), torch.int32).t() for h in range(2))
        target[0::2] = low >> 4 & _LOW | high & ~_LOW
        target[1::2] = low & _LOW | (high & _LOW) << 4
    return out


def values_of(words: Tensor, bits: int = 4) -> Tensor:
    """The codes [..., W*32/bits] of int32 words [..., W], one per byte of a uint8 tensor."""
    return bit_planes.from_fields(_viewed(words, torch.uint8), bits)


def words_of(values: Tensor, bits: int = 4) -> Tensor:
    """The inverse of ``values_of``."""
    return _viewed(bit_planes.to_fields(values, bits), torch.int32)


def awq_values_of(words: Tensor) -> Tensor:
    """``values_of`` for words in AWQ's order."""
    return values_of(words).view(len(words), -1, 2, 2, 2).permute(0, 1, 3, 4, 2).reshape(len(words), -1)


def awq_words_of(values: Tensor) -> Tensor:
    """The inverse of ``awq_values_of``."""
    return words_of(values.reshape(len(values), -1, 2, 2, 2).permute(0, 1, 4, 2, 3).reshape(len(values), -1))
