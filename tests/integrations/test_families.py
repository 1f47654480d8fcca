"""Checks docs/families.md by running transformers families through every step, compared with dense models.

By default, one family of each kind and those that once failed; all of them in the campaign.
"""

from __future__ import annotations

import peft
import pytest
import transformers

import families
from families import Row

DEFAULT = [
    "causal/bloom",  # reads weights in a branch of a setting that is off
    "causal/falcon",  # linear layers with their own class
    "causal/gemma3n_text",  # clamps weights in place
    "causal/git",  # a head named like inner layers
    "causal/inkling2_text",  # files with different names of weights
    "causal/jamba",  # reads the weight of one projection of its mixer and calls the others
    "causal/lara_mini",  # files with fused weights
    "causal/llama",
    "causal/mamba",  # passes weights to a kernel
    "causal/qwen3_5_moe_text",  # gated delta nets, which call their output projection
    "causal/qwen3_5_text",
    "causal/qwen3_next",
    "causal/rwkv",  # rescales weights in place
    "encoder/bert",
    "encoder/gte",  # files with fused weights
    "encoder/jina_embeddings_v3",
    "encoder/nomic_bert",
    "encoder-decoder/t5",  # casts to the dtype of a weight
    "speech/wavlm",  # passes weights to torch's attention
    "speech/whisper",
    "vision/vit",
    "vision-language/llava",
    "vision-language/qwen3_vl_moe",  # files in which the shape determines whether weights are transposed
]


def known(names: list[str]) -> list[str]:
    """The families that the installed transformers has."""
    return [name for name in names if name in families.families()]


@pytest.fixture(scope="module")
def table() -> dict[str, Row]:
    return {result.name: result for result in families.rows(known(DEFAULT))}


@pytest.mark.slow
@pytest.mark.parametrize("name", DEFAULT)
def test_every_step_works(name: str, table: dict[str, Row]) -> None:
    if name not in table:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    result = table[name]
    assert not result.built, result.built
    assert not result.faults, result.faults
    page = families.PAGE.read_text()
    if f"\n{transformers.__version__} and PEFT {peft.__version__}. " in page:
        assert families.line(result) in page.splitlines()


@pytest.mark.slow
@pytest.mark.campaign
def test_every_family_works() -> None:
    results = families.rows(families.families())
    assert {result.name: result.faults for result in results if result.faults} == {}
    built = sum(not result.built for result in results)
    assert built > 0.5 * len(results), f"{built} of {len(results)} families have a tiny model"
