"""The encoders of formats, which compute the scales, offsets and codes of a weight.

A format with an encoder of its own gives the bits that its library gives for a float32 weight, except the last two:

    mxfp4    OCP Microscaling Formats 1.0, section 6.3: a power of two per block
    nvfp4    compressed-tensors: an E4M3 scale per block, and the largest magnitude of the weight at its largest value
    int4, int8    compressed-tensors: the largest magnitude at 7.5 or 127.5, rounded to even
    q4_0, q4_1, q4_k, q5_0, q5_1, q5_k, q8_0, iq4_nl    ggml's reference quantizers
    q6_k, iq4_xs    a search for scales like ggml's, which need not find the same bits

All others place the largest magnitude of a block, or its least and largest values, at the ends of their code, and round
to the nearest value. Codes of more than 4 bits are encoded by torch; the operators that encode have 4 bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from . import formats
from ._internal import bit_planes
from ._internal.scale_tables import E4M3_MAX, e4m3_table, e8m0_table
from .form import FLOAT_DTYPES, Form
from .ops import packed_shape

Tensors = dict[str, Tensor]

_UNSIGNED = ("uint4", "uint5", "uint6", "uint8")
_FLOATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
# Stochastic rounding leaves a weight on its code that is so near to it, in steps between codes: decoding, and the
# division by the scale, are rounded.
_ON_A_CODE = 2**-12
_CODES_AT_ONCE = 1 << 22  # limits the memory for temporary tensors
_E8M0_LARGEST = 254
_E4M3_SMALLEST_BLOCK = 0.125  # compressed-tensors' scale for a block whose own would be 0
# The magnitudes between which those of E2M1 change: a tie goes to the even code, so every other boundary belongs to the
# code above it, and the number below is the boundary.
_E2M1_BOUNDARIES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


def tensors_of(w: Tensor, form: Form) -> Tensors:
    """The tensors of ``w`` in ``form``, by their names in ``Weight4bit``.

    Raises:
        ValueError: there is no encoder for that form.
    """
    own = _OWN.get((form.code, form.scales, form.offsets))
    if own is not None:
        return own(w, form)
    if form.offsets is None and form.scales in (formats.FLOAT32, formats.NESTED8):
        return _by_largest_magnitude(w, form)
    if form.offsets is None and form.scales in FLOAT_DTYPES:
        scales = (_blocks(w, form).abs().amax(1) / _largest(form)).to(FLOAT_DTYPES[form.scales])
        return {"packed": encoded(w, scales.float(), form), "absmax": scales}
    if form.offsets is None and form.scales == formats.TABLE8:
        return _by_table(w, form)
    if form.scales in FLOAT_DTYPES and form.offsets in FLOAT_DTYPES:
        return _by_least_and_largest(w, form)
    if form.scales in FLOAT_DTYPES and form.code in _UNSIGNED and form.offsets == formats.ZERO_POINT8:
        return _by_zero_points(w, form)
    raise ValueError(
        f"form: there is no recipe to quantize to {form}; expected a format that qlora_ext.quantize names. Weights of "
        "other forms come from checkpoints"
    )


def _blocks(w: Tensor, form: Form) -> Tensor:
    """The blocks of ``w``, float32 [blocks, block_size]. The last one is filled with its last element."""
    flat = w.detach().reshape(-1).float()
    missing = -len(flat) % form.block_size
    if missing:
        flat = torch.cat([flat, flat[-1:].expand(missing)])
    return flat.view(-1, form.block_size)


def _packed(blocks: Tensor, w: Tensor, form: Form, encode: Callable[..., Tensor], *per_block: Tensor) -> Tensor:
    """The packed codes of ``w``: ``encode(blocks, *per_block)`` for some blocks at a time, with a column per block."""
    codes = torch.empty(blocks.shape, dtype=torch.uint8, device=blocks.device)
    step = max(1, _CODES_AT_ONCE // form.block_size)
    for i in range(0, len(blocks), step):
        codes[i : i + step] = encode(blocks[i : i + step], *(t[i : i + step, None] for t in per_block)).to(torch.uint8)
    flat = codes.view(-1)[: w.numel()]
    if form.bits == 4 and len(flat) % 2:
        zero = min(range(16), key=[abs(value) for value in formats.code_values(form.code)].__getitem__)
        flat = torch.cat([flat, flat.new_full((1,), zero)])
    return bit_planes.pack(flat, form.bits).view(packed_shape(w.shape, form.bits))


def encoded(w: Tensor, scales: Tensor, form: Form, seed: int | None = None) -> Tensor:
    """The packed codes of ``w`` under the float32 ``scales`` of its blocks; the offsets of ``form`` are not subtracted.

    Args:
        seed: of stochastic rounding. None rounds to the nearest values.
    """
    w = w.detach().contiguous()
    packed: Tensor
    if form.bits == 4 and seed is None:
        packed = torch.ops.qlora.encode_nf4(w, scales, form.block_size, code=form.code)
    elif form.bits == 4:
        packed = torch.ops.qlora.encode_nf4_stochastic(w, scales, form.block_size, seed, form.code)
    else:
        generator = None if seed is None else torch.Generator("cpu").manual_seed(seed)

        def encode(x: Tensor, scale: Tensor) -> Tensor:
            q = _quotients(x, scale)
            drawn = None
            if generator is not None:
                drawn = torch.rand(q.shape, generator=generator, dtype=torch.float32, device="cpu").to(q.device)
                drawn = drawn.clamp(_ON_A_CODE, 1 - _ON_A_CODE)
            return (_float_codes if form.code in _FLOATS else _integer_codes)(q, form, drawn)

        packed = _packed(_blocks(w, form), w, form, encode, scales)
    return packed


def _quotients(x: Tensor, scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 0.0, x / scale)


def _integer_codes(q: Tensor, form: Form, drawn: Tensor | None = None) -> Tensor:
    """The codes of integers: of a tie, the even one, or rounded by numbers ``drawn`` from [0, 1)."""
    low, high = _ends(form)
    return (q.round() if drawn is None else (q + drawn).floor()).clamp(low, high) - low


def _float_codes(q: Tensor, form: Form, drawn: Tensor | None) -> Tensor:
    """The same for the codes of FP8."""
    dtype = _FLOATS[form.code]
    q = q.clamp(*_ends(form))
    if drawn is None:
        return q.to(dtype).view(torch.uint8)
    size = q.abs()
    code = size.to(dtype).view(torch.uint8)
    code = code - (code.view(dtype).float() > size).to(torch.uint8)
    below, above = code.view(dtype).float(), (code + 1).view(dtype).float()  # above the largest is NaN or infinity
    return code + (drawn * (above - below) < size - below) + (q.signbit() * 128)


def _ends(form: Form) -> tuple[float, float]:
    """The least and the largest finite value of the code."""
    values = [value for value in formats.code_values(form.code) if math.isfinite(value)]
    return min(values), max(values)


def _largest(form: Form) -> float:
    """The value for the largest magnitude of a block. Integers of more than 4 bits have it with both signs."""
    low, high = _ends(form)
    return high if form.bits > 4 else max(-low, high)


def _inverse(scales: Tensor) -> Tensor:
    return torch.where(scales == 0, 0.0, 1.0 / scales)


def _by_largest_magnitude(w: Tensor, form: Form) -> Tensors:
    if form.bits == 4:
        packed, absmax = torch.ops.qlora.quantize_nf4(w.detach(), form.block_size, form.code)
    else:
        absmax = _blocks(w, form).abs().amax(1) / _largest(form)
        packed = encoded(w, absmax, form)
    if not form.double_quant:
        return {"packed": packed, "absmax": absmax}
    absmax, nested_absmax, nested_offset = torch.ops.qlora.quantize_absmax(absmax, form.nested_block_size)
    return {"packed": packed, "absmax": absmax, "nested_absmax": nested_absmax, "nested_offset": nested_offset}


def _by_least_and_largest(w: Tensor, form: Form) -> Tensors:
    assert form.offsets is not None
    least, largest = torch.aminmax(_blocks(w, form), dim=1)
    low, high = _ends(form)
    scales = ((largest - least) / (high - low)).to(FLOAT_DTYPES[form.scales])
    offsets = (least - scales.float() * low).to(FLOAT_DTYPES[form.offsets])
    above = _blocks(w, form) - offsets.float()[:, None]
    packed = encoded(above.view(-1)[: w.numel()].view(w.shape), scales.float(), form)
    return {"packed": packed, "absmax": scales, "block_offsets": offsets}


def _by_zero_points(w: Tensor, form: Form) -> Tensors:
    """The zero point is the code of 0, which is always exact (compressed-tensors, GPTQ)."""
    blocks = _blocks(w, form)
    least, largest = blocks.amin(1).clamp_max(0), blocks.amax(1).clamp_min(0)
    _, last = _ends(form)
    scales = ((largest - least) / last).to(FLOAT_DTYPES[form.scales])
    zero_points = (-least * _inverse(scales.float())).round().clamp(0, last)

    def encode(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        return _integer_codes(_quotients(x, scale) + zero_point, form)

    packed = _packed(blocks, w, form, encode, scales.float(), zero_points)
    return {"packed": packed, "absmax": scales, "block_offsets": zero_points.to(torch.uint8)}


def _symmetric(w: Tensor, form: Form) -> Tensors:
    blocks, (low, high) = _blocks(w, form), _ends(form)
    scales = (blocks.abs().amax(1) / ((high - low) / 2)).to(FLOAT_DTYPES[form.scales])

    def encode(x: Tensor, scale: Tensor) -> Tensor:
        return _integer_codes(_quotients(x, scale), form)

    return {"packed": _packed(blocks, w, form, encode, scales.float()), "absmax": scales}


def _by_table(w: Tensor, form: Form) -> Tensors:
    """E8M0 scales; for blocks of 16, E4M3 scales with a factor for the weight."""
    blocks = _blocks(w, form)
    largest_value = torch.tensor(_largest(form), dtype=torch.float32, device=w.device)
    largest = blocks.abs().amax(1)
    if form.block_size == 16:
        of_all = largest.amax() if len(largest) else largest.new_zeros(())
        factor = (E4M3_MAX * largest_value / of_all).clamp_max(torch.finfo(torch.float32).max)
        factor = torch.where(of_all > 0, factor, 1.0)
        scales = (largest / largest_value * factor).clamp_max(E4M3_MAX).to(torch.float8_e4m3fn)
        codes = torch.where(scales.float() == 0, _E4M3_SMALLEST_BLOCK, scales.float()).to(torch.float8_e4m3fn)
        codes, table = codes.view(torch.uint8), e4m3_table(w.device) / factor
    else:
        exponents = largest.view(torch.int32) >> 23  # of a float32, like the codes, biased by 127
        codes = (exponents - (largest_value.view(torch.int32) >> 23) + 127).clamp(0, _E8M0_LARGEST).to(torch.uint8)
        table = e8m0_table(w.device)
    decoded = table[codes.long()]
    if form.code == "e2m1":
        packed = _packed(blocks, w, form, _e2m1, decoded)
    else:
        packed = encoded(w, decoded, form)
    return {"packed": packed, "absmax": codes, "scale_table": table}


def _e2m1(x: Tensor, scale: Tensor) -> Tensor:
    boundaries = torch.tensor(_E2M1_BOUNDARIES, dtype=torch.float32, device=x.device)
    boundaries[1::2] = torch.nextafter(boundaries[1::2], torch.zeros_like(boundaries[1::2]))
    q = _quotients(x, scale)
    return torch.bucketize(q.abs(), boundaries, out_int32=True) + 8 * q.signbit()


def _signed_largest(blocks: Tensor) -> Tensor:
    """The element of the largest magnitude of each block, with its sign."""
    return blocks.gather(1, blocks.abs().argmax(1, keepdim=True)).squeeze(1)


def _q_0(w: Tensor, form: Form) -> Tensors:
    """Q4_0 and Q5_0."""
    blocks, (low, _) = _blocks(w, form), _ends(form)
    scales = _signed_largest(blocks) / low

    def encode(x: Tensor, inverse: Tensor) -> Tensor:
        return (x * inverse + (0.5 - low)).trunc().clamp(0, 2**form.bits - 1)

    return {"packed": _packed(blocks, w, form, encode, _inverse(scales)), "absmax": scales.half()}


def _q8_0(w: Tensor, form: Form) -> Tensors:
    blocks = _blocks(w, form)
    scales = blocks.abs().amax(1) / 127

    def encode(x: Tensor, inverse: Tensor) -> Tensor:
        q = x * inverse
        size, whole = q.abs(), q.abs().floor()
        return 128 + torch.copysign(whole + (size - whole >= 0.5), q)  # of a tie, away from 0

    return {"packed": _packed(blocks, w, form, encode, _inverse(scales)), "absmax": scales.half()}


def _q_1(w: Tensor, form: Form) -> Tensors:
    """Q4_1 and Q5_1."""
    blocks, last = _blocks(w, form), 2**form.bits - 1
    least, largest = torch.aminmax(blocks, dim=1)
    scales = (largest - least) / last

    def encode(x: Tensor, least: Tensor, inverse: Tensor) -> Tensor:
        return ((x - least) * inverse + 0.5).trunc().clamp(0, last)

    packed = _packed(blocks, w, form, encode, least, _inverse(scales))
    return {"packed": packed, "absmax": scales.half(), "block_offsets": least.half()}


# The steps in which the scales of Q4_K and Q5_K are searched, by bits: the largest code is at 15 - 1 to 15 + 1 instead
# of 15, and at 31 - 0.5 to 31 + 1 instead of 31.
_DEPTH_STEPS = {4: [step / 10 - 1 for step in range(21)], 5: [step / 10 - 0.5 for step in range(16)]}
_LARGEST_OF_6_BITS = 63  # of the codes of scales and offsets


def _q_k(w: Tensor, form: Form) -> Tensors:
    """Q4_K and Q5_K."""
    blocks, last = _blocks(w, form), 2**form.bits - 1
    scales, depths = _in_parts(lambda part: _searched_scales_and_depths(part, last, _DEPTH_STEPS[form.bits]), blocks)
    scale_codes, scale_units = _six_bits(scales, form)
    depth_codes, depth_units = _six_bits(depths, form)
    found, depth = (
        scale_codes.float() * _repeated(scale_units, form, blocks),
        depth_codes.float() * _repeated(depth_units, form, blocks),
    )

    def encode(x: Tensor, scale: Tensor, depth: Tensor) -> Tensor:
        return _integer_codes(_quotients(x + depth, scale), form)

    return {
        "packed": _packed(blocks, w, form, encode, found, depth),
        "absmax": scale_codes,
        "nested_absmax": scale_units,
        "scale_table": torch.arange(256, dtype=torch.float32, device=w.device),
        "block_offsets": depth_codes,
        "offset_scale": depth_units,
    }


def _in_parts(search: Callable[[Tensor], Tensor], blocks: Tensor) -> Tensor:
    """What ``search`` finds for each block, [..., blocks], for some blocks at a time."""
    return torch.cat([search(part) for part in blocks.split(max(1, _CODES_AT_ONCE // blocks.shape[1]))], -1)


def _searched_scales_and_depths(blocks: Tensor, last: int, steps: list[float]) -> Tensor:
    """The scale s and the depth m of each block with the least weighted error of s · code - m, m >= 0, code <= last."""
    weights = blocks.square().mean(1, keepdim=True).sqrt() + blocks.abs()
    least, largest = blocks.amin(1, keepdim=True).clamp_max(0), blocks.amax(1, keepdim=True)
    reach = largest - least
    sum_w, sum_x = weights.sum(1, keepdim=True), (weights * blocks).sum(1, keepdim=True)

    def codes_for(largest: float) -> Tensor:
        return (torch.where(reach == 0, 0.0, largest / reach) * (blocks - least)).round().clamp(0, last)

    def error_of(scale: Tensor, low: Tensor, codes: Tensor) -> Tensor:
        return (weights * (scale * codes + low - blocks).square()).sum(1, keepdim=True)

    best = reach / last, least
    error = error_of(*best, codes_for(last))
    for step in steps:
        codes = codes_for(last + step)
        weighted = weights * codes
        sum_l, sum_l2 = weighted.sum(1, keepdim=True), (weighted * codes).sum(1, keepdim=True)
        sum_xl = (weighted * blocks).sum(1, keepdim=True)
        determinant = sum_w * sum_l2 - sum_l.square()
        low = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        scale = torch.where(low > 0, sum_xl / sum_l2, (sum_w * sum_xl - sum_x * sum_l) / determinant)
        low = low.clamp_max(0)
        found = error_of(scale, low, codes)
        better = (determinant > 0) & (found < error)
        best = torch.where(better, scale, best[0]), torch.where(better, low, best[1])
        error = torch.where(better, found, error)
    return torch.stack([best[0].squeeze(1), -best[1].squeeze(1)])


def _six_bits(values: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """Codes of 6 bits for values of at least 0, and their unit for each nested block: a float16, as float32."""
    missing = -len(values) % form.nested_block_size
    largest = torch.nn.functional.pad(values, (0, missing)).view(-1, form.nested_block_size).amax(1)
    inverse = _inverse(largest) * _LARGEST_OF_6_BITS
    codes = (values * _repeated(inverse, form, values)).round().clamp(0, _LARGEST_OF_6_BITS)
    return codes.to(torch.uint8), (largest / _LARGEST_OF_6_BITS).half().float()


def _repeated(nested: Tensor, form: Form, blocks: Tensor) -> Tensor:
    """For each block, the value of its nested block."""
    return nested.repeat_interleave(form.nested_block_size)[: len(blocks)]


def _iq4_nl(w: Tensor, form: Form) -> Tensors:
    """Codes for the largest magnitude at one end, and then the scale with the least squared error, weighted by w²."""
    values = torch.tensor(formats.code_values(form.code), dtype=torch.float32, device=w.device)
    blocks = _blocks(w, form)
    first = _signed_largest(blocks) / values[0]
    packed = _packed(blocks, w, form, lambda x, inverse: _nearest_above(x * inverse, values), _inverse(first))
    codes = torch.stack([packed >> 4, packed & 15], -1).view(-1)[: w.numel()]
    found = _blocks(values[codes.long()], form)
    products, squares = (blocks.pow(2) * found * blocks).sum(1), (blocks.pow(2) * found.pow(2)).sum(1)
    return {"packed": packed, "absmax": torch.where(squares == 0, 0.0, products / squares).half()}


# The least code of scales, which the largest magnitude of a nested block gets: Q6_K's have 8 bits, and IQ4_XS' have 6.
# And the steps in which scales are searched: what the largest magnitude of a block is at, less the code's least value.
_SIGNED = {"int6": (-128, [step / 10 for step in range(-9, 10)]), "iq4_nl": (-32, [*range(-7, 8)])}


def _nested_signed(w: Tensor, form: Form) -> Tensors:
    """Q6_K and IQ4_XS: scales of both signs, with the least squared error weighted by w², times float16."""
    values = torch.tensor(formats.code_values(form.code), dtype=torch.float32, device=w.device)
    blocks, (low, steps) = _blocks(w, form), _SIGNED[form.code]
    scales = _in_parts(lambda part: _searched_scales(part, values, steps), blocks)
    nested = torch.nn.functional.pad(scales, (0, -len(scales) % form.nested_block_size)).view(
        -1, form.nested_block_size
    )
    units = _signed_largest(nested) / low
    codes = (scales * _repeated(_inverse(units), form, scales)).round().clamp(low, -low - 1)
    units = units.half().float()
    found = codes * _repeated(units, form, scales)
    table = torch.arange(256, dtype=torch.float32, device=w.device)
    return {
        "packed": _packed(blocks, w, form, lambda x, inverse: _nearest_above(x * inverse, values), _inverse(found)),
        # As in GGUF files: the bytes of int8, and unsigned codes less 32.
        "absmax": codes.to(torch.int8).view(torch.uint8) if low == -128 else (codes - low).to(torch.uint8),
        "nested_absmax": units,
        "scale_table": torch.where(table < 128, table, table - 256) if low == -128 else table + low,
    }


def _searched_scales(blocks: Tensor, values: Tensor, steps: list[float]) -> Tensor:
    """The scale of each block with the least squared error, weighted by w²."""
    largest = _signed_largest(blocks)
    blocks = blocks * _inverse(largest)[:, None]  # at most 1, so that no power overflows
    scale = gain = torch.zeros_like(largest)
    for step in steps:
        found = values[_nearest_above(blocks * (values[0] + step), values)]
        products, squares = (found * blocks.pow(3)).sum(1), (found * blocks).square().sum(1)
        better = products.square() > gain * squares
        scale = torch.where(better, products / squares, scale)
        gain = torch.where(better, products.square() / squares, gain)
    return scale * largest


def _nearest_above(q: Tensor, values: Tensor) -> Tensor:
    """The codes of the nearest of ascending values. A tie goes to the greater one, as in ggml."""
    high = torch.bucketize(q, values, right=True).clamp(1, len(values) - 1)
    low = high - 1
    return torch.where(q - values[low] < values[high] - q, low, high)


# By code, scales and offsets.
_OWN: dict[tuple[str, str, str | None], Callable[[Tensor, Form], Tensors]] = {
    ("int4", formats.BFLOAT16, None): _symmetric,
    ("int8", formats.BFLOAT16, None): _symmetric,
    ("int4", formats.FLOAT16, None): _q_0,
    ("int5", formats.FLOAT16, None): _q_0,
    ("int8", formats.FLOAT16, None): _q8_0,
    ("uint4", formats.FLOAT16, formats.FLOAT16): _q_1,
    ("uint5", formats.FLOAT16, formats.FLOAT16): _q_1,
    ("uint4", formats.NESTED_TABLE8, formats.SCALED8): _q_k,
    ("uint5", formats.NESTED_TABLE8, formats.SCALED8): _q_k,
    ("int6", formats.NESTED_TABLE8, None): _nested_signed,
    ("iq4_nl", formats.FLOAT16, None): _iq4_nl,
    ("iq4_nl", formats.NESTED_TABLE8, None): _nested_signed,
}
