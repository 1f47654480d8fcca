"""Models of GGUF files: weights that are stored in 4 bits keep their bits, others are those that transformers reads."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import pytest
import torch

gguf = pytest.importorskip("gguf", reason="the command's libraries are not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

import qlora_ext
from gguf_files import WIDE, four_bit_file, write
from qlora_ext.gguf import GGUFWeights, blocks
from qlora_ext.gguf.rows import find_rows

__all__ = ["four_bit_file"]  # a fixture

CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**WIDE),
    "qwen3moe": lambda: Qwen3MoeConfig(
        **WIDE, head_dim=64, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=768
    ),
}


def made(family: str, path: pathlib.Path, **options: Any) -> Any:
    """A file with a tiny model of the family, and the reader of its weights."""
    torch.manual_seed(0)
    config = CONFIGS[family]()
    write(AutoModelForCausalLM.from_config(config, dtype=torch.float32), path, family, **options)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path.parent, gguf_file=path.name))
    return GGUFWeights(path, skeleton)


def decoded(w4: Any) -> torch.Tensor:
    if len(w4.shape) == 2:
        return w4.dequantize(torch.float32)
    return torch.stack([w4.matrix(e).dequantize(torch.float32) for e in range(w4.shape[0])])


def dense(path: pathlib.Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model as transformers reads it."""
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)


@pytest.mark.parametrize("kind", blocks.KINDS)
@pytest.mark.parametrize("family", CONFIGS)
def test_every_weight_is_read_as_transformers_reads_it(family: str, kind: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.gguf"
    weights = made(family, path, kinds=[kind])
    found = 0
    for name, value in dense(path).state_dict().items():
        assert torch.equal(weights.decode(name), value), name
        assert torch.equal(weights.decode(name, torch.bfloat16), value.bfloat16()), name
        if value.ndim > 1:
            found += 1
            w4 = weights.stored(name)
            assert torch.equal(decoded(w4), value), name
    assert found == 16


def test_rows() -> None:
    def processed(function: Any, shape: tuple[int, ...] = (8, 64)) -> Any:
        return find_rows(lambda values: {"w": torch.from_numpy(np.array(function(values)))}, shape)["w"]

    same = processed(lambda v: v)
    assert (same.numbers, same.stack, same.transposed) == (slice(0, 8), (8,), False)
    swapped = processed(lambda v: np.concatenate(np.split(v, 2)[::-1]))
    assert (swapped.numbers.tolist(), swapped.stack) == ([4, 5, 6, 7, 0, 1, 2, 3], (8,))
    assert processed(lambda v: v.T).transposed
    assert processed(lambda v: v[:, None]).stack == (8, 1)
    lower = processed(lambda v: np.concatenate((np.zeros_like(v), v)))
    assert (lower.numbers, lower.stack) == (slice(8, 16), (16,))
    stack = processed(lambda v: np.concatenate((v, np.zeros_like(v)), axis=1), (2, 4, 64))
    assert (stack.numbers.tolist(), stack.stack) == ([0, 1, 2, 3, 8, 9, 10, 11], (2, 8))
    needs_all = processed(lambda v: v.reshape(2, 4, 64)[::-1].reshape(8, 64))
    assert needs_all.numbers.tolist() == [4, 5, 6, 7, 0, 1, 2, 3]
    for function in (
        lambda v: v - 1,
        lambda v: np.log(-v),
        lambda v: v * 2,
        lambda v: v[:, ::-1],
        lambda v: v[:4],
        lambda v: np.concatenate((v[:4], v[:4])),
        lambda v: v.astype(np.float32),
        lambda v: v.reshape(4, -1),
    ):
        with np.errstate(all="ignore"):
            assert processed(function) is None
