"""The configuration and model card of a saved 4-bit model say that it needs qlora_ext."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

import qlora_ext
from qlora_ext.nn import quantize_model
from tiny_models import make, same_state


def load(path: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, **options)


@pytest.mark.parametrize("how", ["from_pretrained", "quantize_model"])
def test_a_saved_model_names_its_requirements(tmp_path: Path, how: str) -> None:
    make().save_pretrained(tmp_path / "dense")
    if how == "from_pretrained":
        model = load(tmp_path / "dense", quantization_config=qlora_ext.QLoRAConfig())
    else:
        model = quantize_model(load(tmp_path / "dense"))
    model.save_pretrained(tmp_path / "4bit")
    written = json.loads((tmp_path / "4bit" / "config.json").read_text())["quantization_config"]
    assert written["needs"] == "import qlora_ext"
    assert "import qlora_ext" in (tmp_path / "4bit" / "README.md").read_text()
    again = load(tmp_path / "4bit")
    assert same_state(again, model)
    again.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"] == written


def test_no_card_where_there_is_nothing_to_say(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path / "dense")
    model = load(tmp_path / "dense", quantization_config=qlora_ext.QLoRAConfig())
    model.save_pretrained(tmp_path / "worker", is_main_process=False)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "README.md").write_text("of its owner")
    model.save_pretrained(tmp_path / "own")
    model.dequantize().save_pretrained(tmp_path / "dense again")
    assert [path.parent.name for path in tmp_path.rglob("README.md")] == ["own"]
    assert (tmp_path / "own" / "README.md").read_text() == "of its owner"


def test_bitsandbytes_form_needs_nothing_of_ours(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from qlora_ext.integrations.bitsandbytes import save_pretrained

    save_pretrained(quantize_model(make()), tmp_path / "theirs")
    assert "needs" not in (tmp_path / "theirs" / "config.json").read_text()
    assert not (tmp_path / "theirs" / "README.md").exists()
