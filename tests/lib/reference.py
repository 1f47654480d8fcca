"""The oracle: the packed format and the fused layer in plain numpy, written from the specification alone.

The format is computed in float32 exactly as specified; products are in float64. The oracle shares no code with the
package, so that a mistake in one is found by the other.
"""

from __future__ import annotations

import numpy as np
import torch

F32 = np.float32

NF4 = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    dtype=F32,
)
# An artificial code: its values are unordered, exceed [-1, 1], and contain two zeros.
SHUFFLED = np.array(
    [0.75, -2.5, 0.0, 3.0, -0.25, 1.5, -1.0, 2.0, -0.5, 0.25, -1.75, 2.5, 1.0, -0.0, 0.5, -1.25], dtype=F32
)
_E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
_FP4 = [0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 1 / 2, 1 / 6, 1 / 4]
CODES = {
    "nf4": NF4,
    "fp4": np.array(_FP4 + [0.0 - v for v in _FP4], F32),  # bitsandbytes': both zeros are positive
    "e2m1": np.array(_E2M1 + [-v for v in _E2M1], F32),
    "int4": np.arange(-8, 8, dtype=F32),
    "uint4": np.arange(16, dtype=F32),
    "iq4_nl": np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], F32),
    "shuffled": SHUFFLED,
}
# The values of the codes of more than 4 bits, by code.
WIDE_CODES = {
    f"{sign}int{bits}": np.arange(1 << bits, dtype=F32) - (0 if sign else 1 << bits - 1)
    for bits in (5, 6, 8)
    for sign in ("", "u")
} | {
    name: torch.arange(256, dtype=torch.uint8).view(dtype).float().numpy()
    for name, dtype in (("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2))
}
# Codes whose tables have every property on which encoding depends: ascending or not, symmetric or not, with duplicates
# or without. Tests that take long run with these.
CODE_KINDS = ("nf4", "int4", "shuffled")
BLOCK_SIZES = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


def midpoints(values: np.ndarray) -> np.ndarray:
    return (values[:-1] + values[1:]) * F32(0.5)


def dynamic_map() -> np.ndarray:
    """Signed dynamic 8-bit map with 7 exponent bits (Dettmers et al., 2022), computed with torch's float32 linspace."""
    positive = []
    for e in range(7):
        parts = 2**e
        step = float(F32(F32(1) - F32(0.1)) / F32(parts))
        start = float(F32(0.1))
        edges = np.array(
            [start + step * i if i < (parts + 1) // 2 else 1.0 - step * (parts - i) for i in range(parts + 1)], F32
        )
        positive += list((edges[:-1] + edges[1:]) / F32(2) * F32(10.0 ** (e - 6)))
    values = np.array([*positive, *(-v for v in positive), 0.0, 1.0], dtype=F32)
    return np.sort(values)


DYNAMIC8 = dynamic_map()


def inverse(absmax: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return F32(1) / np.where(absmax < F32(1e-38), F32(1e-38), absmax).astype(F32)


def pad_to_blocks(flat: np.ndarray, block: int) -> np.ndarray:
    blocks = -(-flat.size // block)
    out = np.zeros(blocks * block, dtype=F32)
    out[: flat.size] = flat
    return out.reshape(blocks, block)


def block_absmax(rows: np.ndarray) -> np.ndarray:
    if rows.size == 0:
        return np.zeros(rows.shape[0], F32)
    largest = np.abs(rows).max(axis=1)
    return np.where(np.isfinite(rows).all(axis=1), largest, F32("nan")).astype(F32)


def ranked(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct values in ascending order, and the lowest code of each."""
    return np.unique(table, return_index=True)


def encode(q: np.ndarray, table: np.ndarray) -> np.ndarray:
    """The code of the nearest value. A tie goes to the lower value, NaN to the lowest."""
    values, codes = ranked(table)
    ranks = np.searchsorted(midpoints(values), q, side="left")
    return codes[np.where(np.isnan(q), 0, ranks)].astype(np.uint8)


def pack(codes: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Packs two codes per byte. The code of zero pads an odd count."""
    if codes.size % 2:
        codes = np.append(codes, encode(np.zeros(1, F32), table))
    return (codes[0::2] << 4 | codes[1::2]).astype(np.uint8)


def largest(table: np.ndarray) -> np.float32:
    return np.abs(table).max()


def quantize_nf4(w: np.ndarray, block: int = 64, table: np.ndarray = NF4) -> tuple[np.ndarray, np.ndarray]:
    """w (any shape, values exact in float32) -> packed bytes (flat), scales: of NF4 the largest magnitudes."""
    flat = np.asarray(w, dtype=F32).reshape(-1)
    rows = pad_to_blocks(flat, block)
    absmax = block_absmax(rows) / largest(table)
    with np.errstate(invalid="ignore", over="ignore"):
        q = rows * inverse(absmax)[:, None]
    return pack(encode(q.reshape(-1)[: flat.size], table), table), absmax


def unpack(packed: np.ndarray, numel: int, bits: int = 4) -> np.ndarray:
    flat = packed.reshape(-1)
    if bits == 8:
        return flat[:numel]
    if bits > 4:  # units of 32 codes: nibbles, then the upper bits
        units = flat.reshape(-1, 4 * bits)
        upper = np.unpackbits(units[:, 16:], axis=1, bitorder="little").reshape(-1, bits - 4)
        low = unpack(np.ascontiguousarray(units[:, :16]), numel)
        return (low + 16 * (upper @ (1 << np.arange(bits - 4)))).astype(np.uint8)
    return np.stack([flat >> 4, flat & 15], axis=1).reshape(-1)[:numel]


def dequantize_nf4(
    packed: np.ndarray, absmax: np.ndarray, numel: int, block: int = 64, table: np.ndarray = NF4
) -> np.ndarray:
    """float32, flat."""
    return table[unpack(packed, numel)] * np.repeat(absmax.astype(F32), block)[:numel]


def inverse_scale(scale: np.ndarray) -> np.ndarray:
    scale = np.asarray(scale, F32)
    nothing = np.abs(scale) < F32(1e-38)
    return np.where(nothing, F32(0), F32(1) / np.where(nothing, F32(1), scale)).astype(F32)


def _lane_sums(x: np.ndarray) -> np.ndarray:
    """The sum of each row: sequentially over 16 lanes, then by adding halves of the lanes."""
    lanes = np.zeros((len(x), 16), F32)
    for part in np.split(x, x.shape[1] // 16, axis=1):
        lanes = lanes + part
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes[:, 0]


def search_absmax_nf4(w: np.ndarray, importance: np.ndarray, block: int = 64, table: np.ndarray = NF4) -> np.ndarray:
    """The scale of each block of w [N, K] among the candidates, by the weighted error of its codes."""
    rows = pad_to_blocks(w.astype(F32).reshape(-1), block)
    weights = pad_to_blocks(np.tile(importance.astype(F32), w.shape[0]), block)
    absmax = block_absmax(rows) / largest(table)
    rows = np.where((absmax > 0)[:, None], rows, F32(0))

    def values(scale):
        with np.errstate(over="ignore"):
            q = rows * inverse_scale(scale)[:, None]
        return q, table[encode(q.reshape(-1), table)].reshape(q.shape)

    def error(scale):
        q, v = values(scale)
        return _lane_sums((q - v) * (q - v) * weights) * scale * scale

    best = np.where(absmax > 0, absmax, F32(0))
    least = error(best)

    def consider(scale, allowed):
        nonlocal best, least
        found = error(scale)
        better = allowed & (found < least)
        best, least = np.where(better, scale, best), np.where(better, found, least)

    for step in range(26):
        consider(np.where(absmax > 0, absmax, F32(0)) * (F32(1.06) - F32(0.02) * F32(step)), absmax > 0)
    for _ in range(2):
        _, v = values(best)
        products, squares = _lane_sums(v * weights * rows), _lane_sums(v * weights * v)
        scale = np.where(squares > 0, products / np.where(squares > 0, squares, F32(1)), F32(0)).astype(F32)
        consider(scale, (absmax > 0) & (scale > 0))
    return np.where(absmax > 0, best, absmax).astype(F32)


def encode_nf4(w: np.ndarray, absmax: np.ndarray, block: int = 64, table: np.ndarray = NF4) -> np.ndarray:
    """Packed bytes (flat) of w under given scales."""
    flat = w.astype(F32).reshape(-1)
    with np.errstate(over="ignore"):
        return pack(encode(flat * np.repeat(inverse_scale(absmax), block)[: flat.size], table), table)


def stochastic_bounds(first: int, count: int, seed: int, table: np.ndarray = NF4) -> np.ndarray:
    """[count, values - 1]: the thresholds between adjacent values, for elements from ``first`` on."""
    u32 = np.uint32
    index = np.arange(first, first + count, dtype=np.uint64)
    low, high = index.astype(u32), (index >> np.uint64(32)).astype(u32)
    with np.errstate(over="ignore"):
        x = low * u32(0x9E3779B1) + high * u32(0x85EBCA77)
        seed_high = u32(seed >> 32 & 0xFFFFFFFF)
        x ^= u32(seed & 0xFFFFFFFF) + seed_high * u32(0xC2B2AE3D)
        behind = (seed_high ^ (seed_high >> u32(16))) * u32(0x85EBCA6B)
        behind = (behind ^ (behind >> u32(13))) * u32(0xC2B2AE35)
        behind ^= behind >> u32(16)
        x = (x ^ (x >> u32(16))) * u32(0x85EBCA6B) + behind
        x = (x ^ (x >> u32(13))) * u32(0xC2B2AE35)
        x ^= x >> u32(16)
    threshold = ((x >> u32(16)).astype(F32) + F32(0.5)) * F32(2**-16)
    values, _ = ranked(table)
    return values[:-1] + threshold[:, None] * (values[1:] - values[:-1])


def encode_nf4_stochastic(
    w: np.ndarray, absmax: np.ndarray, block: int, seed: int, first: int = 0, table: np.ndarray = NF4
) -> np.ndarray:
    """Packed bytes (flat) of w under given scales, each weight rounded stochastically with its own random number.

    ``first`` is the index of w's first element in a larger tensor.
    """
    flat = w.astype(F32).reshape(-1)
    with np.errstate(over="ignore", invalid="ignore"):
        q = flat * np.repeat(inverse_scale(absmax), block)[: flat.size]
    ranks = (q[:, None] > stochastic_bounds(first, flat.size, seed, table)).sum(1)
    return pack(ranked(table)[1][ranks].astype(np.uint8), table)


def merge_lora_nf4(
    w: np.ndarray,
    offsets: np.ndarray,
    absmax: np.ndarray,
    block: int,
    lora_a: np.ndarray,
    lora_b: np.ndarray,
    scaling: float,
    seed: int,
    table: np.ndarray = NF4,
) -> np.ndarray:
    """Packed bytes (flat) of w + (scaling · B) · A, less each element's offset, rounded stochastically.

    The products are summed in the order of the ranks, each rounded once with the sum, as a fused multiply-add does.
    """
    update = np.zeros_like(w)
    scaled = lora_b * F32(scaling)
    for b, a in zip(scaled.T, lora_a, strict=True):
        # The product of two float32 is exact in float64. The sum is rounded to odd first, so that the second rounding,
        # to float32, is right.
        product, before = np.multiply.outer(b.astype(np.float64), a.astype(np.float64)), update.astype(np.float64)
        total = product + before
        part = total - product
        error = (product - (total - part)) + (before - part)
        bits, away = total.view(np.int64), (error > 0) == (total > 0)
        odd = np.where((error != 0) & (bits % 2 == 0), bits + np.where(away, 1, -1), bits)
        update = odd.view(np.float64).astype(F32)
    return encode_nf4_stochastic((w + update) - offsets, absmax, block, seed, table=table)


def encode_with_feedback(w, absmax, feedback, order, block: int = 64, table: np.ndarray = NF4) -> np.ndarray:
    """Codes [N, K] of w by GPTQ (Frantar et al., 2022, algorithm 1), column by column, in float32."""
    n, k = w.shape
    scales = np.repeat(absmax.astype(F32), block)[: n * k].reshape(n, k)
    left = w.astype(F32)[:, order].copy()
    codes = np.zeros((n, k), np.uint8)
    for place, column in enumerate(order):
        scale = scales[:, column]
        codes[:, column] = encode(left[:, place] * inverse_scale(scale), table)
        rounded = table[codes[:, column]] * scale
        error = (left[:, place] - rounded) * (F32(1) / feedback[place, place])
        left[:, place + 1 :] -= error[:, None] * feedback[place, place + 1 :]
    return codes


def bfloat16_bits(x: np.ndarray) -> np.ndarray:
    """uint16: float32 rounded to nearest even. A NaN becomes quiet, and keeps its sign and the top of its payload."""
    u = np.asarray(x, dtype=F32).view(np.uint32).astype(np.uint64)
    rounded = (u + np.uint64(0x7FFF) + (u >> np.uint64(16) & np.uint64(1))) >> np.uint64(16)
    return np.where(np.isnan(x), u >> np.uint64(16) | np.uint64(0x40), rounded).astype(np.uint16)


def float16_bits(x: np.ndarray) -> np.ndarray:
    """uint16: float32 rounded to nearest even."""
    with np.errstate(over="ignore", under="ignore"):
        return np.asarray(x, dtype=F32).astype(np.float16).view(np.uint16)


def mean_in_order(x: np.ndarray) -> np.float32:
    """The mean of absmax in the summation order of the format (see cpp/format/dynamic8.h)."""
    total = 0.0
    for first in range(0, x.size, 65536):
        chunk = np.zeros(65536)
        part = x[first : first + 65536].astype(np.float64)
        chunk[: part.size] = part
        partial = np.zeros(1024)
        for row in chunk.reshape(64, 1024):
            partial = partial + row
        while partial.size > 1:
            half = partial.size // 2
            partial = partial[:half] + partial[half:]
        total += float(partial[0])
    return F32(total / x.size) if x.size else F32(0)


def quantize_absmax(absmax: np.ndarray, nested_block: int = 256) -> tuple[np.ndarray, np.ndarray, np.float32]:
    """absmax -> codes, nested_absmax, nested_offset."""
    offset = mean_in_order(absmax)
    with np.errstate(invalid="ignore"):
        centred = (absmax - offset).astype(F32)
        rows = pad_to_blocks(centred, nested_block)
        nested = block_absmax(rows)
        q = rows * inverse(nested)[:, None]
    return encode(q.reshape(-1)[: absmax.size], DYNAMIC8), nested, offset


def dequantize_absmax(codes: np.ndarray, nested: np.ndarray, offset: np.float32, nested_block: int = 256) -> np.ndarray:
    product = (DYNAMIC8[codes] * np.repeat(nested, nested_block)[: codes.size]).astype(F32)
    return (product + F32(offset)).astype(F32)


def philox4x32_10(seed: int, group: np.ndarray) -> np.ndarray:
    """uint32 [groups, 4] (Salmon et al., 2011): the random bits of elements 4*group .. 4*group+3."""
    group = np.asarray(group, dtype=np.uint64)
    mask = np.uint64(0xFFFFFFFF)
    c = [group & mask, group >> np.uint64(32), np.zeros_like(group), np.zeros_like(group)]
    k0, k1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(10):
        p0, p1 = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [
            (p1 >> np.uint64(32)) ^ c[1] ^ np.uint64(k0),
            p1 & mask,
            (p0 >> np.uint64(32)) ^ c[3] ^ np.uint64(k1),
            p0 & mask,
        ]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack(c, axis=1).astype(np.uint32)


def dropout_mask(shape: tuple[int, int], p: float, seed: int) -> np.ndarray:
    """The factors of x on the LoRA branch, [M, K] float64: 0 or 1/(1-p)."""
    numel = shape[0] * shape[1]
    if p == 0.0:
        return np.ones(shape)
    bits = philox4x32_10(seed, np.arange(-(-numel // 4))).reshape(-1)[:numel].astype(np.uint64)
    keep = bits >= np.uint64(int(p * 4294967296.0 + 0.5))
    return np.where(keep, 1.0 / (1.0 - p) if p < 1.0 else 0.0, 0.0).reshape(shape)


INT8_SEGMENT = 64


def int8_code(table: np.ndarray) -> tuple[np.ndarray, float]:
    """The integers c in -127..127 of a code's values, and what one is in them: value ~ c / per_one.

    Exact with the least power of two that makes all values integers, if there is one. Otherwise the multiplier in steps
    of a half that fits the values best, among those with no larger error than half a step of 1/127.
    """
    values, most = table.astype(np.float64), float(largest(table))

    def nearest(x: np.ndarray) -> np.ndarray:
        return np.trunc(x + np.copysign(0.5, x))

    powers = 2.0 ** (np.arange(8) - np.floor(np.log2(most)))
    exact = [p for p in powers if most * p <= 127 and np.array_equal(values * p, nearest(values * p))]
    if exact:
        return nearest(values * exact[0]), exact[0]
    multipliers = 127 - 0.5 * np.arange(127)
    in_ones = np.multiply.outer(multipliers, values / most)
    errors = np.abs(in_ones - nearest(in_ones)) / multipliers[:, None]
    fits = errors.max(1) <= 0.5 / 127 * (1 + 1e-9)
    per_one = multipliers[np.argmin(np.where(fits, np.square(errors).sum(1), np.inf))] / most
    return nearest(values * per_one), per_one


def round_to_int8(x: np.ndarray, size: int = INT8_SEGMENT) -> tuple[np.ndarray, np.ndarray]:
    """q [M, K] in -127..127 and the unit of each element, float32, of x [M, K], whose values float32 holds.

    Each row is rounded in segments of ``size``, the last of which may be shorter.
    """
    x = np.asarray(x, F32)
    q, units = np.zeros_like(x), np.zeros_like(x)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        for first in range(0, x.shape[1], size):
            part = x[:, first : first + size]
            a = np.abs(part).max(1, keepdims=True)
            factor = np.where(a < F32(2.0**-100), F32(2.0**60), F32(1))
            unit = a * factor / F32(127) / factor
            rounded = np.rint(part * factor * np.where(a > 0, F32(127) / (a * factor), F32(0)))
            rounded = np.where(np.isinf(a), np.isinf(part) * np.sign(part), rounded)
            q[:, first : first + size] = np.where(np.isnan(a), F32(0), rounded)
            units[:, first : first + size] = unit
    return q, units


def _fractions(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x [M, S] as multiples of a 32767th of the largest magnitude of each row, and those largest [M, 1].

    Rows whose largest is below 2^-48 or above 2^62 are zeros.
    """
    most = np.abs(x).max(1, keepdims=True)
    fits = (most >= F32(2.0**-48)) & (most <= F32(2.0**62))
    inverse = np.divide(F32(32767), most, where=fits, out=np.zeros_like(most))
    return np.where(fits, np.rint(np.where(fits, x, F32(0)) * inverse), F32(0)).astype(np.int64), most


def _product_of_fractions(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b + 2**14) >> 15


def round_products_to_int8(x: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What `round_to_int8` gives of ``x * scale``, of x [M, K] and scale [K], by fractions of 15 bits.

    Segments whose largest product of fractions is below 2^12 are those of `round_to_int8`.
    """
    x, scale = np.asarray(x, F32), np.asarray(scale, F32)
    with np.errstate(invalid="ignore", over="ignore"):
        q, units = round_to_int8(x * scale)
    for first in range(0, x.shape[1], INT8_SEGMENT):
        here = slice(first, first + INT8_SEGMENT)
        (of_x, most_x), (of_scale, most_scale) = _fractions(x[:, here]), _fractions(scale[None, here])
        products = _product_of_fractions(of_x, of_scale)
        most = np.abs(products).max(1, keepdims=True)
        factor = np.where(most < 2**12, 0, 127 * 2**15 // np.maximum(most, 1))
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            unit = most_x * (most_scale * F32(2.0**30 / 32767.0**2)) / factor.astype(F32)
        q[:, here] = np.where(factor > 0, _product_of_fractions(products, factor).astype(F32), q[:, here])
        units[:, here] = np.where(factor > 0, unit, units[:, here])
    return q, units


def linear(x, w, bias=None, lora_a=None, lora_b=None, scaling=1.0, dropout_p=0.0, seed=0):
    """float64 y [M, N] of x [M, K] and the decoded w [N, K]."""
    y = x @ w.T
    if lora_a is not None:
        y = y + scaling * ((x * dropout_mask(x.shape, dropout_p, seed)) @ lora_a.T) @ lora_b.T
    return y if bias is None else y + bias


def linear_dx(dy, w, lora_a=None, lora_b=None, scaling=1.0, dropout_p=0.0, seed=0):
    """float64 dx [M, K] of dy [M, N]."""
    dx = dy @ w
    if lora_a is not None:
        dx = dx + dropout_mask(dx.shape, dropout_p, seed) * (scaling * (dy @ lora_b) @ lora_a)
    return dx


def linear_dlora(dy, x, lora_a, lora_b, scaling=1.0, dropout_p=0.0, seed=0):
    """float64 (da [R, K], db [N, R])."""
    dropped = x * dropout_mask(x.shape, dropout_p, seed)
    return scaling * (dy @ lora_b).T @ dropped, scaling * dy.T @ (dropped @ lora_a.T)
