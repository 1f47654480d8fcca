"""Public functions and classes have an example in their docstring, and every example gives the result it shows.

Examples assume ``import torch, qlora_app, qlora_ext`` and ``from torch import nn``; those of ``integrations.peft`` also
assume a ``model``, LoRA over a small 4-bit Llama.
"""

from __future__ import annotations

import doctest
import importlib
import inspect
import io
import multiprocessing
import tempfile
from typing import Any

import pytest
import torch
from torch import nn

for library in ("transformers", "peft", "bitsandbytes"):
    pytest.importorskip(library, reason=f"{library} is not installed")

from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import qlora_app
import qlora_ext

MODULES = [
    "qlora_ext",
    *(f"qlora_ext.{name}" for name in ("nn", "calibration", "fidelity", "streaming", "gguf")),
    *(f"qlora_ext.integrations.{name}" for name in ("bitsandbytes", "peft", "transformers")),
    *("qlora_app", "qlora_app.decoding", "qlora_app.evaluation", "qlora_app.planning"),
]
# Objects that users do not construct; the function that returns them has the example.
WITHOUT = {
    *("Streaming", "Calibrator", "LayerReport", "Encoded", "Feedback", "CurvePoint", "LayerCost", "ModelCheck"),
    *("Comparison", "Sensitivity", "MergeError", "IncompleteAdapterWarning", "QLoRAQuantizer", "DenseModules"),
    *("LoraLinear4bit", "Coverage", "Decoder", "CompilationError", "Header", "TensorInfo", "Streamed", "Switched"),
    # Functions that only the integrations and the command use.
    *("Conv1D4bit", "attach", "write_base", "check_something_is_4bit", "report_coverage", "finished_weights"),
    "losses_of",  # the example of ``compare`` calls it
}


def public() -> dict[str, Any]:
    """The functions and classes of the public modules, by their full names."""
    found: dict[int, tuple[str, Any]] = {}
    for name in MODULES:
        module = importlib.import_module(name)
        for attribute in module.__all__:
            value = getattr(module, attribute)
            if (inspect.isfunction(value) or inspect.isclass(value)) and value.__module__.startswith("qlora_"):
                found.setdefault(id(value), (f"{name}.{attribute}", value))
    return dict(found.values())


PUBLIC = public()
TESTS = {
    name: test
    for name, value in PUBLIC.items()
    for test in doctest.DocTestFinder(recurse=False).find(
        value, name, module=False, globs={"torch": torch, "nn": nn, "qlora_app": qlora_app, "qlora_ext": qlora_ext}
    )
    if test.examples
}


def adapted() -> nn.Module:
    """LoRA on all linear layers of a 4-bit Llama of two layers."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = qlora_ext.quantize_model(LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=128)))
    return get_peft_model(model, LoraConfig(target_modules="all-linear"))


def failures_of(name: str) -> str:
    """The difference of the printed and the shown output of ``name``'s example, empty if they agree."""
    torch.manual_seed(0)
    if name.startswith("qlora_ext.integrations.peft."):
        TESTS[name].globs["model"] = adapted()
    out = io.StringIO()
    doctest.DocTestRunner(verbose=False).run(TESTS[name], out=out.write)
    return out.getvalue()


def _send(connection: Any, name: str) -> None:
    connection.send(failures_of(name))


@pytest.mark.parametrize("name", TESTS)
def test_an_example_gives_the_result_it_shows(name: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    if not name.endswith("take_over_bitsandbytes"):
        assert failures_of(name) == ""
        return
    receiver, sender = multiprocessing.Pipe(duplex=False)  # a separate process, because its effects cannot be undone
    child = multiprocessing.get_context("fork").Process(target=_send, args=(sender, name))
    child.start()
    assert receiver.poll(120)
    assert receiver.recv() == ""
    child.join()


def test_every_public_function_and_class_has_an_example() -> None:
    names = {name: name.rpartition(".")[2] for name in PUBLIC}
    assert {short for name, short in names.items() if name not in TESTS} == WITHOUT
