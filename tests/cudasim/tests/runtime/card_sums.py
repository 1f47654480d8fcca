"""Random tiles through mma.sync and wgmma, against the arithmetic of tensor cores in numpy.

`python card_sums.py KIND...` under the simulator prints each kind whose results differ. The kinds are those of `KINDS`.
"""

from __future__ import annotations

import dataclasses
import os
import sys

import numpy as np


def float8(bits: int, exponent_bits: int) -> float:
    fraction_bits = 7 - exponent_bits
    sign, fraction = bits >> 7, bits & (1 << fraction_bits) - 1
    exponent = bits >> fraction_bits & (1 << exponent_bits) - 1
    if exponent_bits == 5 and exponent == 31:
        return (-1) ** sign * np.inf if fraction == 0 else np.nan
    if exponent_bits == 4 and bits & 0x7F == 0x7F:
        return np.nan
    value = fraction * 2.0**-fraction_bits + (exponent > 0)
    return (-1) ** sign * value * 2.0 ** (max(exponent, 1) - (1 << exponent_bits - 1) + 1)


@dataclasses.dataclass(frozen=True)
class Element:
    """A type of operands: its bits, and the least exponent of its normal numbers."""

    bits: int
    least: int

    def values(self, patterns: np.ndarray) -> np.ndarray:
        if self is F16:
            return patterns.view(np.float16).astype(np.float64)
        if self.bits == 8:
            table = np.array([float8(b, 4 if self is E4M3 else 5) for b in range(256)])
            return table[patterns]
        words = patterns.astype(np.uint32) << np.uint32(32 - self.bits)
        if self is TF32:  # the tensor core ignores the last 13 bits
            words &= np.uint32(0xFFFFE000)
        return words.view(np.float32).astype(np.float64)

    def finite(self, patterns: np.ndarray) -> np.ndarray:
        if self is E4M3:
            return patterns & 0x7F != 0x7F
        fields = {F16: 0x7C00, BF16: 0x7F80, TF32: 0x7F800000, E5M2: 0x7C}
        return patterns & fields[self] != fields[self]

    @property
    def dtype(self) -> type:
        return {8: np.uint8, 16: np.uint16, 32: np.uint32}[self.bits]


F16, BF16, TF32, E4M3, E5M2 = Element(16, -14), Element(16, -126), Element(32, -126), Element(8, -6), Element(8, -14)


@dataclasses.dataclass(frozen=True)
class Kind:
    instruction: str
    element: Element
    k: int
    half: bool = False  # float16 results

    @property
    def wgmma(self) -> bool:
        return self.instruction.startswith("wgmma")

    @property
    def rows(self) -> int:
        return 64 if self.wgmma else 16


KINDS = {
    "f16 k8": Kind("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32", F16, 8),
    "f16": Kind("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", F16, 16),
    "f16 to f16": Kind("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16", F16, 16, half=True),
    "bf16 k8": Kind("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32", BF16, 8),
    "bf16": Kind("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", BF16, 16),
    "tf32": Kind("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32", TF32, 8),
    "e4m3": Kind("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32", E4M3, 32),
    "wgmma f16": Kind("wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16", F16, 16),
    "wgmma bf16": Kind("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16", BF16, 16),
    "wgmma tf32": Kind("wgmma.mma_async.sync.aligned.m64n8k8.f32.tf32.tf32", TF32, 8),
    "wgmma e5m2": Kind("wgmma.mma_async.sync.aligned.m64n8k32.f32.e5m2.e5m2", E5M2, 32),
}


def split(x: np.ndarray, least: int) -> tuple[np.ndarray, np.ndarray]:
    """Significands below 2 and exponents. A zero has exponent -126."""
    significand, exponent = np.frexp(x)
    significand, exponent = 2 * significand, exponent - 1
    significand = np.where(exponent < least, np.ldexp(significand, exponent - least), significand)
    return significand, np.where(x == 0, -126, np.maximum(exponent, least))


def toward_zero(x: np.ndarray, fraction: int) -> np.ndarray:
    """float64 to float32 with so many bits of fraction. What reaches 2^128 is infinite."""
    y = x.astype(np.float32)
    y = np.where(np.abs(y.astype(np.float64)) > np.abs(x), np.nextafter(y, np.float32(0)), y)
    y = np.where(np.abs(x) >= 2.0**128, np.copysign(np.float32(np.inf), x), y).astype(np.float32)
    return (y.view(np.uint32) & np.uint32(0xFFFFFFFF << (23 - fraction) & 0xFFFFFFFF)).view(np.float32)


def card_sum(arch: int, kind: Kind, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """c + a @ b of an instruction: [rows, k], [k, 8] and [rows, 8].

    The figures are MMA-Sim's (arXiv 2511.10909). An addition takes the products of 16 bytes before 9.0, and all of the
    instruction since then. It cuts each term to 24 or 25 bits below the largest exponent, and rounds toward zero. FP8
    of wgmma has 13 bits.
    """
    terms = min(kind.k, 128 // kind.element.bits) if arch < 90 else kind.k
    narrow = kind.wgmma and kind.element.bits == 8
    bits = 13 if narrow else 24 if arch < 90 else 25
    (sa, ea), (sb, eb) = split(a, kind.element.least), split(b, kind.element.least)
    for k in range(0, kind.k, terms):
        step = slice(k, k + terms)
        sc, ec = split(c.astype(np.float64), -14 if kind.half else -126)
        special = c + a[:, step] @ b[step]  # infinite or NaN only if an operand is
        significand = np.concatenate([sa[:, step, None] * sb[None, step], sc[:, None]], axis=1)
        exponent = np.concatenate([ea[:, step, None] + eb[None, step], ec[:, None]], axis=1)
        largest = exponent.max(axis=1)
        total = np.trunc(np.ldexp(significand, bits + exponent - largest[:, None])).sum(axis=1)
        exact = np.ldexp(total, largest - bits)
        rounded = exact.astype(np.float16) if kind.half else toward_zero(exact, 13 if narrow else 23)
        c = np.where(np.isfinite(special), rounded, special.astype(rounded.dtype))
    return c


def random_tile(rng: np.random.Generator, kind: Kind, wild: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Patterns of a [rows, k] and b [k, 8], and c. Wild ones have any exponent, zeros, subnormals and infinities."""

    def patterns(shape: tuple[int, int]) -> np.ndarray:
        element = kind.element
        if wild:
            out = rng.integers(0, 1 << element.bits, shape, dtype=np.uint64).astype(element.dtype)
            out = np.where(element.finite(out) | (rng.random(shape) < 0.02), out, element.dtype(0))
            return np.where(rng.random(shape) < 0.1, element.dtype(0), out)
        normal = rng.standard_normal(shape).astype(np.float32)
        if element is F16:
            return normal.astype(np.float16).view(np.uint16)
        if element.bits == 8:
            return rng.integers(0x10, 0x48, shape, dtype=np.uint8) | (rng.integers(0, 2, shape, dtype=np.uint8) << 7)
        return (normal.view(np.uint32) >> np.uint32(32 - element.bits)).astype(element.dtype)

    c = rng.standard_normal((kind.rows, 8)) * 2.0 ** rng.integers(-12, 8, (kind.rows, 8))
    if wild:
        c = np.where(rng.random(c.shape) < 0.2, 0, c * 2.0 ** rng.integers(-12, 8))
    return patterns((kind.rows, kind.k)), patterns((kind.k, 8)), c.astype(np.float16 if kind.half else np.float32)


def words(patterns: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(patterns).view(np.uint32)


def registers_of_a(a: np.ndarray) -> np.ndarray:
    """[warps, 32, registers]: a lane has the word lane % 4 of its row, of the row 8 below, then of 4 words on."""
    w = words(a)
    w = w.reshape(w.shape[0] // 16, 2, 8, w.shape[1] // 4, 4)  # warp, half, row, register pair, word
    return w.transpose(0, 2, 4, 3, 1).reshape(w.shape[0], 32, -1)


def registers_of_b(b: np.ndarray) -> np.ndarray:
    w = words(b.T)
    return w.reshape(8, w.shape[1] // 4, 4).transpose(0, 2, 1).reshape(32, -1)


def registers_of_c(c: np.ndarray) -> np.ndarray:
    w = words(c).reshape(c.shape[0] // 16, 2, 8, 4, -1)  # warp, half, row, pair of columns, words of the pair
    return w.transpose(0, 2, 3, 1, 4).reshape(w.shape[0], 32, -1)


def c_of_registers(registers: np.ndarray, kind: Kind) -> np.ndarray:
    w = registers.reshape(kind.rows // 16, 8, 4, 2, -1).transpose(0, 3, 1, 2, 4)
    return np.ascontiguousarray(w).view(np.float16 if kind.half else np.float32).reshape(kind.rows, 8)


def ptx(kind: Kind) -> str:
    """A kernel of one instruction. Threads load their registers, and wgmma's b, which is in the canonical layout."""
    na = 16 * kind.k * kind.element.bits // 32 // 32
    nb, nc = 8 * kind.k * kind.element.bits // 32 // 32, 2 if kind.half else 4

    def load(pointer: str, registers: str, count: int) -> str:
        lines = [f"mad.wide.u32 %rd9, %r1, {4 * count}, {pointer};"]
        return "\n".join(lines + [f"ld.global.b32 %{registers}{i}, [%rd9+{4 * i}];" for i in range(count)])

    def group(registers: str, count: int) -> str:
        return "{" + ", ".join(f"%{registers}{i}" for i in range(count)) + "}"

    if kind.wgmma:
        transposed = ", 0" if kind.element.bits == 16 else ""
        product = f"""
  mad.wide.u32 %rd9, %r3, 256, %rd2;
  mul.wide.u32 %rd8, %r4, 4;
  add.u64 %rd9, %rd9, %rd8;
  setp.ge.u32 %p1, %r4, 64;
  @%p1 bra COPIED;
  ld.global.b32 %r6, [%rd9];
  mov.u32 %r5, tile;
  mad.lo.u32 %r5, %r4, 4, %r5;
  st.shared.b32 [%r5], %r6;
COPIED:
  fence.proxy.async.shared::cta;
  bar.sync 0;
  mov.u32 %r5, tile;
  and.b32 %r5, %r5, 0x3FFFF;
  shr.u32 %r5, %r5, 4;
  cvt.u64.u32 %rd9, %r5;
  or.b64 %rd9, %rd9, 0x{128 >> 4 << 16:x};
  wgmma.fence.sync.aligned;
  {kind.instruction} {group("c", nc)}, {group("a", na)}, %rd9, 1, 1, 1{transposed};
  wgmma.commit_group.sync.aligned;
  wgmma.wait_group.sync.aligned 0;"""
    else:
        product = (
            load("%rd2", "b", nb)
            + f"""
  {kind.instruction} {group("c", nc)}, {group("a", na)}, {group("b", nb)}, {group("c", nc)};"""
        )
    stores = "\n".join(f"  st.global.b32 [%rd9+{4 * i}], %c{i};" for i in range(nc))
    return f"""
.version 8.6
.target sm_90a
.address_size 64
.visible .entry tile(.param .u64 a, .param .u64 b, .param .u64 c)
{{
  .shared .align 1024 .b8 tile[256];
  .reg .pred %p<2>;
  .reg .b32 %r<8>, %a<8>, %b<8>, %c<8>;
  .reg .b64 %rd<10>;
  ld.param.u64 %rd1, [a];
  ld.param.u64 %rd2, [b];
  ld.param.u64 %rd3, [c];
  mov.u32 %r2, %ntid.x;
  mov.u32 %r3, %ctaid.x;
  mov.u32 %r4, %tid.x;
  mad.lo.u32 %r1, %r3, %r2, %r4;
  {load("%rd1", "a", na)}
  {load("%rd3", "c", nc)}
  {product}
  mad.wide.u32 %rd9, %r1, {4 * nc}, %rd3;
{stores}
  ret;
}}
"""


def run(kind: Kind, tiles: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> list[np.ndarray]:
    from driver import Memory, Module

    def granules(b: np.ndarray) -> np.ndarray:  # of 16 bytes along k, for each of them 8 columns
        return words(b.T).reshape(8, 2, 4).transpose(1, 0, 2)

    a = Memory(np.stack([registers_of_a(a) for a, _, _ in tiles]))
    b = Memory(np.stack([granules(b) if kind.wgmma else registers_of_b(b) for _, b, _ in tiles]))
    c = Memory(np.stack([registers_of_c(c) for _, _, c in tiles]))
    Module(ptx(kind)).launch("tile", (len(tiles), 1, 1), 2 * kind.rows if kind.wgmma else 32, a, b, c)
    return [c_of_registers(x, kind) for x in c.read()]


def main() -> None:
    arch, rng = int(os.environ["CUDASIM_ARCH"]), np.random.default_rng(7)
    np.seterr(over="ignore", invalid="ignore")
    for name in sys.argv[1:]:
        kind = KINDS[name]
        tiles = [random_tile(rng, kind, wild) for wild in (False, True) for _ in range(20)]
        differ = ordered = 0
        for (a, b, c), got in zip(tiles, run(kind, tiles), strict=True):
            x, y = kind.element.values(a), kind.element.values(b)
            want = card_sum(arch, kind, x, y, c)
            differ += int((~((want == got) | np.isnan(want) & np.isnan(got))).sum())
            nearest = (c + x @ y).astype(want.dtype)
            ordered += int((want != nearest)[np.isfinite(want)].sum())
        print(f"{name}: {differ} elements differ, {ordered} from sums that are rounded to nearest")


if __name__ == "__main__":
    main()
