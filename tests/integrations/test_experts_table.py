"""The table of docs/experts.md is correct, and a training step works for each of its rows."""

from __future__ import annotations

import pathlib
import warnings

import peft
import pytest
import torch
from packaging.version import Version

from moe_families import FAMILIES, IDS, build, row
from qlora_ext.nn import quantize_model

DOCUMENT = (pathlib.Path(__file__).parents[2] / "docs" / "experts.md").read_text()
ROWS = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in DOCUMENT.splitlines() if "|" in line]
TABLE = {family: tuple(rest) for family, *rest in ROWS if family in FAMILIES}


def test_the_table_has_every_family() -> None:
    assert list(TABLE) == list(FAMILIES)


@pytest.mark.skipif(
    Version(peft.__version__) < Version("0.21"), reason="an older PEFT has a narrower meaning of all-linear"
)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_is_true(family: str) -> None:
    assert row(family) == TABLE[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_training_works(family: str) -> None:
    exclude = ["router"] if family in ("Llama 4", "Phi-3.5-MoE") else None
    config = peft.LoraConfig(target_modules="all-linear", lora_dropout=0.05, exclude_modules=exclude)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns about routers, which have no dropout
        model = peft.get_peft_model(quantize_model(build(family)), config).train()
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    gradients = [p.grad for name, p in model.named_parameters() if "lora_B" in name and p.grad is not None]
    assert gradients
    assert any(torch.any(g != 0) for g in gradients)
