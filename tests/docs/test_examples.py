"""Every program in examples/ runs on a tiny model, and the notebook from top to bottom.

The programs run in this process, so that torch and transformers are imported once. finetune_fsdp2.py needs several
processes; tests/integrations/test_distributed.py runs it.
"""

from __future__ import annotations

import json
import pathlib
import runpy
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

for library in ("transformers", "peft", "trl", "datasets", "bitsandbytes", "matplotlib"):
    pytest.importorskip(library, reason=f"{library} is not installed")

from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

import tiny_models

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
PAIRS = [{"prompt": f"What is {i} + 1?", "completion": f"It is {i + 1}."} for i in range(8)]
PREFERENCES = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": "No idea."} for row in PAIRS]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A directory with a dense model, a mixture of experts and data of each kind."""
    directory = tmp_path_factory.mktemp("examples")
    tiny_models.save_tiny_llama(directory / "llama", seed=0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=4, vocab_size=257, eos_token_id=256)
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(directory / "mixtral")
    AutoTokenizer.from_pretrained(directory / "llama").save_pretrained(directory / "mixtral")
    for name, rows in (("pairs", PAIRS), ("preferences", PREFERENCES)):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = [{"prompt": row["prompt"]} for row in PAIRS]
    (directory / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    (directory / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    return directory


@pytest.fixture(autouse=True)
def _undisturbed(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> Iterator[None]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    yield
    torch.set_grad_enabled(True)


def run(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: object) -> dict[str, Any]:
    """Runs an example as a program; gives the names that it defined."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    return runpy.run_path(str(EXAMPLES / name), run_name="__main__")


TRAINED = {
    "finetune.py": ("llama", "--data", "pairs.jsonl"),
    "sft_trl.py": ("llama", "--data", "pairs.jsonl"),
    "dpo_trl.py": ("llama", "--data", "preferences.jsonl"),
    "grpo_trl.py": ("llama", "--data", "prompts.jsonl", "--new-tokens", "24"),
    "moe.py": ("mixtral", "--text", "text.txt", "--length", "32"),
    "stream.py": ("llama", "--text", "text.txt", "--length", "32"),
}


@pytest.mark.parametrize("name", TRAINED)
def test_an_example_trains_an_adapter(
    name: str, files: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file

    model, *options = TRAINED[name]
    options = [str(files / option) if "." in option else option for option in options]
    run(monkeypatch, name, "--model", files / model, "--output", tmp_path, "--steps", 2, *options)
    written = next(tmp_path.rglob("adapter_model.safetensors"))
    trained = [tensor for key, tensor in load_file(written).items() if "lora_B" in key]
    assert trained
    assert any(tensor.abs().max() > 0 for tensor in trained)  # they begin at zero


def test_adopt(files: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, "adopt.py", "--model", files / "llama")
    out = capsys.readouterr().out
    assert "layers adopted: 14; left to bitsandbytes: 0" in out
    assert "next token" in out


def test_operator_learns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, "operators.py")
    errors = [float(line.rpartition(" ")[2]) for line in capsys.readouterr().out.splitlines() if "error" in line]
    assert errors[-1] < 0.05 * errors[0]


def test_the_notebook_runs_from_top_to_bottom(monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown: list[int] = []

    def show() -> None:
        shown.append(len(plt.get_fignums()))
        plt.close("all")

    monkeypatch.setattr(plt, "show", show)
    cells = json.loads((EXAMPLES / "notebook.ipynb").read_text())["cells"]
    names: dict[str, Any] = {}
    with_picture = 0
    for cell in (cell for cell in cells if cell["cell_type"] == "code"):
        shown.clear()
        exec("".join(cell["source"]), names)
        stored = sum("image/png" in output.get("data", {}) for output in cell["outputs"])
        assert sum(shown) == stored  # what the site prints is what the cell draws
        with_picture += stored
    assert with_picture == 3
    assert names["losses"][-1] < 0.5 * names["losses"][0]


def test_every_example_is_tried() -> None:
    tried = {*TRAINED, "adopt.py", "operators.py", "finetune_fsdp2.py"}
    assert {path.name for path in EXAMPLES.glob("*.py")} == tried


def test_no_example_hides_a_module_of_python() -> None:
    """Python looks for modules beside a script first."""
    assert {path.stem for path in EXAMPLES.glob("*.py")}.isdisjoint(sys.stdlib_module_names)
