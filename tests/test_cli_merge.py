"""``qlora-ext merge --4bit`` and ``quantize --format bitsandbytes``, on the run that test_cli makes."""

from __future__ import annotations

import json
import math
import pathlib
import re

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("peft", reason="PEFT is not installed")

from test_cli import Paths, here, paths, whole_run

__all__ = ["paths", "whole_run"]  # fixtures


def test_merge_to_4bit_tells_what_it_costs(
    paths: Paths, whole_run: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    losses = {}
    for kind, options in {"dense": [], "4bit": ["--4bit"]}.items():
        output = paths["root"] / f"merged_{kind}"
        here("merge", "--adapter", whole_run, "--output", output, "--dtype", "float32", "--evaluate", *options)
        told = capfd.readouterr().out
        numbers = re.search(r"held-out loss: ([\d.]+) unmerged, ([\d.]+) merged", told)
        assert numbers
        losses[kind] = [float(number) for number in numbers.groups()]
    assert losses["dense"][0] == losses["4bit"][0]
    assert abs(losses["dense"][1] - losses["dense"][0]) < 2e-4
    assert 0 < abs(losses["4bit"][1] - losses["4bit"][0]) < 0.05
    metrics = json.loads((whole_run / "adapter" / "qlora_run.json").read_text())["metrics"]
    assert abs(math.log(metrics["perplexity_after"]) - losses["dense"][0]) < 0.01  # the run's own, in bfloat16

    error = json.loads((output / "merge_error.json").read_text())
    assert len(error["by_layer"]) == 14
    assert f"{error['total']:.2%} of the merged weights' norm" in told
    assert f"at most {max(error['by_layer'].values()):.2%} in " in told
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.config.quantization_config.quant_method == "qlora_ext"


def test_quantize_for_bitsandbytes(paths: Paths) -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import AutoModelForCausalLM

    here("quantize", "--model", paths["model"], "--output", paths["root"] / "bnb", "--format", "bitsandbytes")
    model = AutoModelForCausalLM.from_pretrained(paths["root"] / "bnb")
    assert sum(isinstance(m, bnb.nn.Linear4bit) for m in model.modules()) == 14
