"""The readers of 4-bit checkpoints get damaged tensors and configurations.

The result is the value by the format's formula, and the bytes that were read, or a ValueError of one sentence.
``QLORA_ATTACK`` multiplies the number of mutations, ``QLORA_ATTACK_SEED`` is their seed. A failure prints the seed and
the number of the mutation. More than the default are marked slow.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import reference
from campaign import SEED, count
from checkpoint_samples import SAMPLES, Sample, decode
from mutations import mutate_json
from qlora_ext.checkpoints import format_of, retained_of
from qlora_ext.form import Form
from qlora_ext.weight import Weight4bit, quantize

MUTATIONS = 40  # of each kind of weight
COUNT = count(MUTATIONS)
pytestmark = [pytest.mark.slow] if COUNT > MUTATIONS else []
DTYPES = (torch.uint8, torch.int8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.bool)


def damaged_bits(draw: random.Random, t: Tensor) -> Tensor:
    """``t`` with some bits of one to three bytes changed."""
    raw = t.reshape(-1).clone().view(torch.uint8)
    for _ in range(draw.randint(1, 3)):
        if raw.numel():
            raw[draw.randrange(raw.numel())] ^= draw.randrange(256)
    return raw.view(t.dtype).view(t.shape)


def damaged_shape(draw: random.Random, t: Tensor) -> Tensor:
    """``t`` with more, fewer or other dimensions, or another number of elements."""
    if not t.ndim:
        return t.reshape(1) if draw.random() < 0.5 else t.repeat(draw.choice((0, 2)))
    dim = draw.randrange(t.ndim)
    return draw.choice(
        (
            lambda: t.flatten(),
            lambda: t[None],
            lambda: t.narrow(dim, 0, draw.randrange(max(t.shape[dim], 1))),
            lambda: torch.cat((t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t,) * 2, dim).view(t.dtype),
            lambda: t.transpose(0, -1),
            lambda: t.movedim(dim, 0),
        )
    )()


def mutate(draw: random.Random, tensors: dict[str, Tensor]) -> None:
    """Changes the tensors of one weight."""
    name = draw.choice(sorted(tensors))
    t, kind = tensors[name], draw.randrange(8)
    if kind < 3:
        tensors[name] = damaged_bits(draw, t)
    elif kind == 3:
        tensors[name] = damaged_shape(draw, t)
    elif kind == 4:
        tensors[name] = (t.float() if t.is_floating_point() else t).to(draw.choice(DTYPES))
    elif kind == 5:
        del tensors[name]
    elif kind == 6:
        tensors[draw.choice(("pre_quant_scale", "weight", "scales", "g_idx", "", "\x1b[2J", name + "_2"))] = t
    else:
        tensors[name] = t.to("meta") if draw.random() < 0.5 else t[..., None].expand(*t.shape, 2)[..., 0]


def bits(t: Tensor) -> Tensor:
    return t.reshape(-1).clone().view(torch.uint8)


def tolerance(w4: Weight4bit) -> Any:
    """The rounding errors of each value: none, except of float32 scales with zero points."""
    if w4.block_offsets is None or w4.absmax.dtype != torch.float32:
        return 0.0
    scales = w4.absmax.abs().repeat_interleave(w4.block_size).view(w4.shape).numpy()
    return 2.0**-18 * scales + np.finfo(np.float32).tiny


def problem(sample: Sample, config: Any, shape: Any) -> str | None:
    """What is wrong with the result, or None. A ValueError of one sentence is right."""
    try:
        kind, settings = format_of(config)
        w4 = kind.read(sample.tensors, shape, torch.float32, settings, "layers.0.up_proj")
    except ValueError as error:
        text = str(error)
        return None if "\n" not in text and "\x1b" not in text and 20 < len(text) < 900 else f"message: {text!r}"
    if config == sample.config and tuple(shape) == sample.shape:
        expected = decode(sample)
        matrices = [w4.matrix(e) for e in range(len(w4.packed))] if len(w4.shape) == 3 else [w4]
        found = torch.stack([matrix.dequantize() for matrix in matrices]).view(w4.shape).numpy()
        wrong = ~np.isclose(found, expected, rtol=0, atol=tolerance(w4), equal_nan=True)
        if wrong.any():
            return f"{wrong.sum()} other values, the first {found[wrong][0]} instead of {expected[wrong][0]}"
    written = kind.write(w4, settings, retained_of(kind, sample.tensors))
    if written.keys() != sample.tensors.keys():
        return f"wrote {sorted(written)}"
    for name, t in sample.tensors.items():
        if (written[name].dtype, written[name].shape) != (t.dtype, t.shape) or not torch.equal(
            bits(written[name]), bits(t)
        ):
            return f"wrote another {name}"
    return None


def check(note: str, problem: Callable[..., str | None], *args: Any) -> None:
    note = f"QLORA_ATTACK_SEED={SEED}: mutation {note}"
    try:
        wrong = problem(*args)
    except Exception as error:
        raise AssertionError(f"{note}: {error!r}") from error
    assert wrong is None, f"{note}: {wrong}"


@pytest.mark.parametrize("name", SAMPLES)
def test_damaged_tensors(name: str) -> None:
    accepted = 0
    for i in range(COUNT):
        draw = random.Random(f"{SEED} {name} {i}")
        torch.manual_seed(i)
        sample = SAMPLES[name]()
        for _ in range(draw.randint(1, 2)):
            if sample.tensors:
                mutate(draw, sample.tensors)
        shape: Any = sample.shape
        if draw.random() < 0.1:
            shape = [size + draw.choice((-16, -1, 1, 8, 16)) for size in sample.shape]
        check(f"{i} of {name}", problem, sample, sample.config, shape)
        accepted += tuple(shape) == sample.shape
    assert accepted


@pytest.mark.parametrize("name", SAMPLES)
def test_damaged_configurations(name: str) -> None:
    torch.manual_seed(0)
    sample = SAMPLES[name]()
    data = json.dumps(sample.config).encode()
    for i in range(COUNT):
        draw = random.Random(f"{SEED} {name} config {i}")
        try:
            config = json.loads(mutate_json(draw, data))
        except (ValueError, RecursionError):
            continue  # not JSON: the file's reader rejects it
        check(f"{i} of the configuration of {name}", problem, copy.deepcopy(sample), config, sample.shape)


STATE = "w.quant_state.bitsandbytes__"


def bitsandbytes_problem(tensors: dict[str, Tensor]) -> str | None:
    """As ``problem``, for a weight that bitsandbytes saved under the name w."""
    try:
        w4 = Weight4bit.from_bitsandbytes(tensors, "w")
    except (ValueError, KeyError) as error:
        text = str(error)
        return None if "\x1b" not in text and 10 < len(text) < 900 else f"message: {text!r}"
    absmax = w4.absmax.numpy()
    if w4.nested_absmax is not None and w4.nested_offset is not None:
        nested = (w4.nested_absmax.numpy(), w4.nested_offset.numpy(), w4.nested_block_size)
        absmax = reference.dequantize_absmax(absmax, *nested)
    table = tensors["w.quant_map"].float().numpy()
    expected = reference.dequantize_nf4(w4.packed.numpy(), absmax, w4.shape.numel(), w4.block_size, table)
    if not np.array_equal(w4.dequantize(torch.float32).numpy().reshape(-1), expected, equal_nan=True):
        return "another value"
    written = w4.to_bitsandbytes("w")
    if not torch.equal(bits(written["w"]), bits(tensors["w"])):  # of any storage dtype
        return "wrote other codes"
    scales = {name for name in written if name != "w" and not name.startswith(STATE)}
    wrong = [name for name in scales if not torch.equal(bits(written[name].float()), bits(tensors[name].float()))]
    return f"wrote other {wrong}" if wrong else None


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("code", ["nf4", "fp4"])
def test_damaged_weights_of_bitsandbytes(code: str, double_quant: bool) -> None:
    w = torch.randn(8, 96)
    for i in range(COUNT):
        draw = random.Random(f"{SEED} bitsandbytes {code} {double_quant} {i}")
        w4 = quantize(w, Form.of(code=code, double_quant=double_quant, block_size=64))
        tensors = {name: t.clone() for name, t in w4.to_bitsandbytes("w").items()}
        if draw.random() < 0.5:
            text = mutate_json(draw, bytes(tensors[STATE + code].tolist()))
            tensors[STATE + code] = torch.tensor(list(text), dtype=torch.uint8)
        else:
            mutate(draw, tensors)
        check(f"{i} of bitsandbytes' {code}", bitsandbytes_problem, tensors)
