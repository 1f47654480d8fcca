"""The encoders of 4-bit formats, which compute the scales, offsets and codes of a weight.

A format with an encoder of its own gives the bits that its library gives for a float32 weight:

    mxfp4    OCP Microscaling Formats 1.0, section 6.3: a power of two per block
    nvfp4    compressed-tensors: an E4M3 scale per block, and the largest magnitude of the weight at its largest value
    int4     compressed-tensors: the largest magnitude at 7.5, rounded to even
    q4_0, q4_1, q4_k, iq4_nl    ggml's reference quantizers

All others place the largest magnitude of a block, or its least and largest values, at the ends of their code, and round
to the nearest value.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import formats
from ._internal.scale_tables import E4M3_MAX, e4m3_table, e8m0_table
from .form import FLOAT_DTYPES, Form
from .ops import packed_shape

Tensors = dict[str, Tensor]

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
        largest = max(map(abs, formats.code_values(form.code)))
        scales = (_blocks(w, form).abs().amax(1) / largest).to(FLOAT_DTYPES[form.scales])
        return {"packed": _nearest(w, scales.float(), form), "absmax": scales}
    if form.offsets is None and form.scales == formats.TABLE8:
        return _by_table(w, form)
    if form.scales in FLOAT_DTYPES and form.offsets in FLOAT_DTYPES:
        return _by_least_and_largest(w, form)
    if form.scales in FLOAT_DTYPES and (form.code, form.offsets) == ("uint4", formats.ZERO_POINT8):
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
    if len(flat) % 2:
        zero = min(range(16), key=[abs(value) for value in formats.code_values(form.code)].__getitem__)
        flat = torch.cat([flat, flat.new_full((1,), zero)])
    return (flat[0::2] << 4 | flat[1::2]).view(packed_shape(w.shape))


def _nearest(w: Tensor, scales: Tensor, form: Form) -> Tensor:
    packed: Tensor = torch.ops.qlora.encode_nf4(w.detach().contiguous(), scales, form.block_size, code=form.code)
    return packed


def _inverse(scales: Tensor) -> Tensor:
    return torch.where(scales == 0, 0.0, 1.0 / scales)


def _by_largest_magnitude(w: Tensor, form: Form) -> Tensors:
    packed, absmax = torch.ops.qlora.quantize_nf4(w.detach(), form.block_size, form.code)
    if not form.double_quant:
        return {"packed": packed, "absmax": absmax}
    absmax, nested_absmax, nested_offset = torch.ops.qlora.quantize_absmax(absmax, form.nested_block_size)
    return {"packed": packed, "absmax": absmax, "nested_absmax": nested_absmax, "nested_offset": nested_offset}


def _by_least_and_largest(w: Tensor, form: Form) -> Tensors:
    assert form.offsets is not None
    least, largest = torch.aminmax(_blocks(w, form), dim=1)
    values = formats.code_values(form.code)
    scales = ((largest - least) / (max(values) - min(values))).to(FLOAT_DTYPES[form.scales])
    offsets = (least - scales.float() * min(values)).to(FLOAT_DTYPES[form.offsets])
    above = _blocks(w, form) - offsets.float()[:, None]
    packed = _nearest(above.view(-1)[: w.numel()].view(w.shape), scales.float(), form)
    return {"packed": packed, "absmax": scales, "block_offsets": offsets}


def _by_zero_points(w: Tensor, form: Form) -> Tensors:
    """The zero point is the code of 0, which is always exact (compressed-tensors, GPTQ)."""
    blocks = _blocks(w, form)
    least, largest = blocks.amin(1).clamp_max(0), blocks.amax(1).clamp_min(0)
    scales = ((largest - least) / 15).to(FLOAT_DTYPES[form.scales])
    zero_points = (-least * _inverse(scales.float())).round().clamp(0, 15)
    packed = _packed(blocks, w, form, _rounded(0, 15), scales.float(), zero_points)
    return {"packed": packed, "absmax": scales, "block_offsets": zero_points.to(torch.uint8)}


def _rounded(low: int, high: int) -> Callable[..., Tensor]:
    """Encodes to the integers from ``low`` on: of a tie, to the even one."""

    def encode(x: Tensor, scale: Tensor, zero_point: Tensor | float = 0.0) -> Tensor:
        q = torch.where(scale == 0, 0.0, x / scale)
        return (q + zero_point).round().clamp(low, high) - low

    return encode


def _int4(w: Tensor, form: Form) -> Tensors:
    blocks = _blocks(w, form)
    scales = (blocks.abs().amax(1) / 7.5).to(FLOAT_DTYPES[form.scales])
    return {"packed": _packed(blocks, w, form, _rounded(-8, 7), scales.float()), "absmax": scales}


def _by_table(w: Tensor, form: Form) -> Tensors:
    """E8M0 scales; for blocks of 16, E4M3 scales with a factor for the weight."""
    blocks = _blocks(w, form)
    largest_value = torch.tensor(max(map(abs, formats.code_values(form.code))), dtype=torch.float32, device=w.device)
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
        packed = _nearest(w, decoded, form)
    return {"packed": packed, "absmax": codes, "scale_table": table}


def _e2m1(x: Tensor, scale: Tensor) -> Tensor:
    boundaries = torch.tensor(_E2M1_BOUNDARIES, dtype=torch.float32, device=x.device)
    boundaries[1::2] = torch.nextafter(boundaries[1::2], torch.zeros_like(boundaries[1::2]))
    q = torch.where(scale == 0, 0.0, x / scale)
    return torch.bucketize(q.abs(), boundaries, out_int32=True) + 8 * q.signbit()


def _signed_largest(blocks: Tensor) -> Tensor:
    """The element of the largest magnitude of each block, with its sign."""
    return blocks.gather(1, blocks.abs().argmax(1, keepdim=True)).squeeze(1)


def _q4_0(w: Tensor, form: Form) -> Tensors:
    blocks = _blocks(w, form)
    scales = _signed_largest(blocks) / -8

    def encode(x: Tensor, inverse: Tensor) -> Tensor:
        return (x * inverse + 8.5).trunc().clamp(0, 15)

    return {"packed": _packed(blocks, w, form, encode, _inverse(scales)), "absmax": scales.half()}


def _q4_1(w: Tensor, form: Form) -> Tensors:
    blocks = _blocks(w, form)
    least, largest = torch.aminmax(blocks, dim=1)
    scales = (largest - least) / 15

    def encode(x: Tensor, least: Tensor, inverse: Tensor) -> Tensor:
        return ((x - least) * inverse + 0.5).trunc().clamp(0, 15)

    packed = _packed(blocks, w, form, encode, least, _inverse(scales))
    return {"packed": packed, "absmax": scales.half(), "block_offsets": least.half()}


# The steps in which Q4_K's scales are searched: the largest code is at 15 - 1 to 15 + 1 instead of 15.
_Q4_K_STEPS = [step / 10 - 1 for step in range(21)]
_Q4_K_LARGEST = 63  # of the codes of scales and offsets


def _q4_k(w: Tensor, form: Form) -> Tensors:
    blocks = _blocks(w, form)
    scales, depths = _searched_scales_and_depths(blocks)
    scale_codes, scale_units = _six_bits(scales, form)
    depth_codes, depth_units = _six_bits(depths, form)
    found, depth = (
        scale_codes.float() * _repeated(scale_units, form, blocks),
        depth_codes.float() * _repeated(depth_units, form, blocks),
    )

    def encode(x: Tensor, scale: Tensor, depth: Tensor) -> Tensor:
        return torch.where(scale == 0, 0.0, (x + depth) / scale).round().clamp(0, 15)

    return {
        "packed": _packed(blocks, w, form, encode, found, depth),
        "absmax": scale_codes,
        "nested_absmax": scale_units,
        "scale_table": torch.arange(256, dtype=torch.float32, device=w.device),
        "block_offsets": depth_codes,
        "offset_scale": depth_units,
    }


def _searched_scales_and_depths(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The scale s and the depth m of each block with the least weighted error of s · code - m, m >= 0."""
    weights = blocks.square().mean(1, keepdim=True).sqrt() + blocks.abs()
    least, largest = blocks.amin(1, keepdim=True).clamp_max(0), blocks.amax(1, keepdim=True)
    reach = largest - least
    sum_w, sum_x = weights.sum(1, keepdim=True), (weights * blocks).sum(1, keepdim=True)

    def codes_for(last: float) -> Tensor:
        return (torch.where(reach == 0, 0.0, last / reach) * (blocks - least)).round().clamp(0, 15)

    def error_of(scale: Tensor, low: Tensor, codes: Tensor) -> Tensor:
        return (weights * (scale * codes + low - blocks).square()).sum(1, keepdim=True)

    best = reach / 15, least
    error = error_of(*best, codes_for(15.0))
    for step in _Q4_K_STEPS:
        codes = codes_for(15.0 + step)
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
    return best[0].squeeze(1), -best[1].squeeze(1)


def _six_bits(values: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """Codes of 6 bits for values of at least 0, and their unit for each nested block: a float16, as float32."""
    missing = -len(values) % form.nested_block_size
    largest = torch.nn.functional.pad(values, (0, missing)).view(-1, form.nested_block_size).amax(1)
    inverse = _inverse(largest) * _Q4_K_LARGEST
    codes = (values * _repeated(inverse, form, values)).round().clamp(0, _Q4_K_LARGEST)
    return codes.to(torch.uint8), (largest / _Q4_K_LARGEST).half().float()


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


def _nearest_above(q: Tensor, values: Tensor) -> Tensor:
    """The codes of the nearest of ascending values. A tie goes to the greater one, as in ggml."""
    high = torch.bucketize(q, values, right=True).clamp(1, len(values) - 1)
    low = high - 1
    return torch.where(q - values[low] < values[high] - q, low, high)


# By code, scales and offsets.
_OWN: dict[tuple[str, str, str | None], Callable[[Tensor, Form], Tensors]] = {
    ("int4", formats.BFLOAT16, None): _int4,
    ("int4", formats.FLOAT16, None): _q4_0,
    ("uint4", formats.FLOAT16, formats.FLOAT16): _q4_1,
    ("uint4", formats.NESTED_TABLE8, formats.SCALED8): _q4_k,
    ("iq4_nl", formats.FLOAT16, None): _iq4_nl,
}
