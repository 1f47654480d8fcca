"""The report after ``qlora-ext export``: both losses, the errors of the weights, and the exit code."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import re
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch

import qlora_app
from commands import Paths, here, listing
from exports import Refused, adapt, read
from gguf_files import write
from qlora_app.exporting import export_check
from qlora_app.exporting.weights import MergedWeights
from qlora_app.main import main
from qlora_app.models.adapted import find_adapted
from qlora_app.options import BaseOptions
from qlora_app.training.evaluation import rows_of_run
from qlora_app.training.trainer import batches
from qlora_ext.fidelity import losses_of
from tiny_models import make

LOSSES = re.compile(r"loss on ([\d,]+) tokens of (.*): ([\d.]+) trained, ([\d.]+) exported ")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A text to check on, which takes less time than one that the model writes."""
    path = tmp_path_factory.mktemp("check") / "text.txt"
    path.write_text("some text that is long enough for a check. " * 30)
    return path


def report(printed: str) -> tuple[int, str, float, float]:
    """The number of tokens, the text, and both losses."""
    found = LOSSES.search(printed)
    assert found, printed
    return int(found[1].replace(",", "")), found[2], float(found[3]), float(found[4])


def weight_error(printed: str) -> float:
    found = re.search(r"relative error of the weights: ([\d.e+-]+) in all (\d+)", printed)
    assert found, printed
    return float(found[1])


def test_the_text(
    refused: Refused, finished_run: pathlib.Path, tmp_path: pathlib.Path,
    ) -> None:  # fmt: skip
    export = ["export", "--adapter", finished_run, "--to", "dense", "--output", tmp_path / "out"]
    long = tmp_path / "long.txt"
    long.write_text("a text that is long enough, " * 400)
    tokens, text, *_ = report(here(*export, "--data", long))
    assert text == str(long)
    assert tokens <= 2048
    assert report(here(*export, "--data", long, "--check", "full", "--overwrite"))[0] > 4 * tokens

    moved = tmp_path / "moved"
    shutil.copytree(finished_run, moved)
    path = moved / "adapter" / "qlora_run.json"
    record = json.loads(path.read_text())
    record["settings"]["data"] = str(tmp_path / "deleted.jsonl")
    path.write_text(json.dumps(record))
    printed = here("export", "--adapter", moved, *export[3:], "--overwrite")
    assert "deleted.jsonl: no such file or directory; the model writes the text instead" in printed
    assert report(printed)[1] == "a text that the model wrote"
    # A record that is not in a run's directory may be anybody's, and names no file to read.
    shutil.copytree(finished_run / "adapter", tmp_path / "alone")
    assert (
        report(here("export", "--adapter", tmp_path / "alone", *export[3:], "--overwrite"))[1]
        == "a text that the model wrote"
    )

    before = listing(tmp_path / "out")
    short = tmp_path / "short.txt"
    short.write_text("no")
    message = refused(*export, "--data", short, "--overwrite")
    assert "expected a text of at least 32 tokens" in message
    assert listing(tmp_path / "out") == before


def test_a_model_without_an_adapter(paths: Paths, tmp_path: pathlib.Path) -> None:
    data = ["--data", paths["data"]]
    printed = here(
        "export", "--model", paths["model"], *data, "--to", "compressed-tensors:int4", "--output", tmp_path / "int4"
    )
    _, _, trained, exported = report(printed)
    assert 0 < abs(exported - trained) < 0.05
    assert 0.01 < weight_error(printed) < 0.2
    printed = here(
        "export", "--model", tmp_path / "int4", *data, "--to", "compressed-tensors:int4", "--output", tmp_path / "two"
    )
    _, _, trained, again = report(printed)
    assert trained == again == exported
    assert weight_error(printed) == 0.0


def test_no_check(refused: Refused, finished_run: pathlib.Path, tmp_path: pathlib.Path) -> None:
    export = ["export", "--adapter", finished_run, "--to", "dense", "--check", "none"]
    printed = here(*export, "--output", tmp_path / "out")
    assert "loss" not in printed
    assert "error" not in printed
    for option in (["--max-loss-increase", "0.1"], ["--data", "self"]):
        message = refused(*export, "--output", tmp_path / "no", *option)
        assert f"{option[0]} needs a check" in message
    message = refused(*export[:-2], "--output", tmp_path / "no", "--max-loss-increase", "-1")
    assert "--max-loss-increase -1.0: expected 0 or more" in message
    assert not (tmp_path / "no").exists()


def test_few_held_out_rows_are_followed_by_others(finished_run: pathlib.Path) -> None:
    """The held-out rows have the loss that the run measured. Rows of the training follow, up to 2,048 tokens."""
    adapted = find_adapted(BaseOptions(adapter=str(finished_run), dtype="bfloat16", device="cpu"))
    assert adapted.adapter is not None
    parts, size, name = rows_of_run(adapted.adapter, adapted.tokenizer, "--check")
    measured = json.loads((adapted.adapter / "qlora_run.json").read_text())["metrics"]["perplexity_after"]
    losses = losses_of(adapted.load(), batches(parts.held_out, size, torch.device("cpu")), torch.float32)
    assert abs(losses.mean().item() - math.log(measured)) < 0.01  # the run computes in bfloat16
    few = export_check._of_run(parts, size, name, 2048)
    held_out, trained = (sum(len(row["input_ids"]) for row in rows) for rows in (parts.held_out, parts.train))
    assert few.name == f"{name} ({len(losses)} of them held out by the run)"
    assert len(few.rows) == len(parts.held_out) + len(parts.train)
    assert few.written == 2048 - held_out - trained > 0
    longer = dataclasses.replace(parts, train=[*parts.train] * 100)
    cut = export_check._of_run(longer, size, name, 2048)
    assert sum(len(row["input_ids"]) for row in cut.rows) == 2048
    assert cut.written <= 0
    whole = export_check._of_run(dataclasses.replace(parts, held_out=longer.train), size, name, 1 << 16)
    assert whole.name == f"{name} (held out by the run)"
    assert whole.rows == longer.train


Read = tuple[Any, Any, Any]
FAULTS: dict[str, tuple[Callable[[Callable[[str], Read], str], Read], str]] = {
    "no adapter": (lambda read, name: (read(name)[0], read(name)[0], None), "holds 0.0% of the adapter's update"),
    "another layer": (lambda read, name: read(name.replace("layers.0", "layers.1")), "is not the trained weight"),
    "transposed": (
        lambda read, name: (read(name)[0], read(name)[1].t() if "0.self_attn.q_proj" in name else read(name)[1], None),
        "model.layers.0.self_attn.q_proj of ",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_with_other_weights_fails(
    tmp_path: pathlib.Path,
    text: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    fault: str,
) -> None:
    base, adapter = tmp_path / "base.gguf", tmp_path / "adapter"
    write(make("llama"), base, "llama", kinds=["Q4_0", "F16"])
    adapt(adapter, base, read(base), r=2, target_modules=["q_proj", "down_proj"], lora_alpha=1)
    wrong, told = FAULTS[fault]
    intact = MergedWeights.read
    monkeypatch.setattr(MergedWeights, "read", lambda self, name: wrong(lambda other: intact(self, other), name))
    export = ["export", "--adapter", adapter, "--to", "gguf:f16", "--output", tmp_path / "out.gguf"]
    export += ["--data", text]
    assert main([*map(str, export)]) == 3
    err = capfd.readouterr().err
    assert told in err
    assert "do not serve it" in err
    monkeypatch.undo()
    here(*export, "--overwrite")


@pytest.fixture
def wrong_file(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Has files of adapters multiply the updates by a factor."""
    from qlora_app.gguf import adapter

    intact = adapter.write_adapter

    def by(factor: float) -> None:
        def write(path: Any, architecture: str, alpha: float, layers: Any) -> None:
            intact(path, architecture, factor * alpha, layers)

        monkeypatch.setattr(adapter, "write_adapter", write)

    return by


def test_a_wrong_file_fails(
    finished_run: pathlib.Path, tmp_path: pathlib.Path, text: pathlib.Path, wrong_file: Any,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    wrong_file(100)
    output = tmp_path / "out.gguf"
    export = ["export", "--adapter", str(finished_run), "--to", "gguf-adapter", "--output", str(output)]
    export += ["--data", str(text)]
    assert main(export) == 3
    out, err = capfd.readouterr()
    _, _, trained, exported = report(out)
    assert exported > trained + 0.02
    assert "relative error of the update: 99" in out
    assert err.count("\n") == 1
    assert f"the loss of {output} is " in err
    assert "more than --max-loss-increase 0.02" in err
    assert output.is_file()
    assert main([*export, "--overwrite", "--max-loss-increase", "1000"]) == 0
    options = {"adapter": finished_run, "to": "gguf-adapter", "output": output, "overwrite": True, "data": text}
    with pytest.raises(RuntimeError, match=r"the loss of .* more than max_loss_increase 0\.02; do not serve it"):
        qlora_app.export(**options)
    assert qlora_app.export(**options, max_loss_increase=1000.0) == output
    wrong_file(math.nan)
    assert main([*export, "--overwrite", "--max-loss-increase", "1000"]) == 3
    assert "is NaN" in capfd.readouterr().err


@pytest.mark.parametrize("target", ["dense", "gguf-adapter"])
def test_the_adapter_of_another_base_is_rejected_before_writing(
    refused: Refused, paths: Paths, finished_run: pathlib.Path, tmp_path: pathlib.Path, text: pathlib.Path, target: str
) -> None:
    output = tmp_path / ("out.gguf" if target == "gguf-adapter" else "out")
    export = ["export", "--adapter", finished_run, "--model", paths["other"], "--to", target, "--output", output]
    message = refused(*export)
    assert "was trained on another 4-bit base" in message
    assert "add --force" in message
    assert [*tmp_path.iterdir()] == []
    here(*export, "--force", "--max-loss-increase", "5", "--data", text)


def test_a_base_without_weights_leaves_only_the_update(
    paths: Paths, finished_run: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    shutil.copy(paths["model"] / "config.json", base)
    printed = here(
        "export", "--adapter", finished_run, "--model", base, "--to", "gguf-adapter", "--output", tmp_path / "a.gguf"
    )
    assert f"the losses are not measured, because {base} has no weights" in printed
    assert "relative error of the update: 0 in all 14 layers" in printed


def test_experts(paths: Paths, tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM

    from tiny_configs import config_of

    torch.manual_seed(0)
    base = tmp_path / "base"
    model = AutoModelForCausalLM.from_config(config_of("qwen3_moe"))
    model.save_pretrained(base)
    for file in paths["model"].glob("tokenizer*"):
        shutil.copy(file, base)
    on_experts = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}
    adapt(tmp_path / "adapter", base, model, r=2, **on_experts)
    capfd.readouterr()
    export = ["export", "--adapter", tmp_path / "adapter", "--data", "self", "--dtype", "float32", "--to", "dense"]
    here(*export, "--output", tmp_path / "out")
    printed = capfd.readouterr().out
    _, _, trained, exported = report(printed)
    assert abs(exported - trained) < 1e-3
    assert weight_error(printed) < 1e-5
    found = re.search(r"in all (\d+) layers, which hold 100\.0% of the adapter's update", printed)
    assert found
    assert int(found[1]) > sum(p.ndim == 3 for p in read(tmp_path / "out").parameters()) > 0
