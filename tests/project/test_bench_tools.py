"""What compares results, makes tables and pictures of them, and computes how near a kernel is to its ceiling."""

from __future__ import annotations

import json
import pathlib
import re
import subprocess
import sys
from typing import Any

import pytest
import torch

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from bench.lib import pictures, reordering, report, results_files, tables


def spread(median: float, width: float = 0.02) -> dict[str, float]:
    return {"median": median, "low": median * (1 - width), "high": median * (1 + width)}


def section(ours: dict[str, float], tokens_per_second: float = 100.0, peers: float = 50.0) -> dict[str, Any]:
    rows = [
        {"op": "forward", "N x K": "8x8", "M": 1, "kernel": "few", "torch us": 10, "ours": ours, "bitsandbytes": ours},
        {"base": "qlora_ext", "tokens/s": tokens_per_second},
        {"base": "bitsandbytes", "tokens/s": peers},
    ]
    return {"title": "", "notes": [], "machine": {}, "rows": rows}


def compared(path: pathlib.Path, old: dict[str, Any], new: dict[str, Any]) -> tuple[int, str]:
    for name, content in (("old", old), ("new", new)):
        (path / f"{name}.json").write_text(json.dumps({"machine": "a", "sections": {"linear": content}}))
    command = [sys.executable, "-m", "bench.lib.compare", str(path / "old.json"), str(path / "new.json")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return run.returncode, run.stdout + run.stderr


@pytest.mark.parametrize(
    ("new", "status", "message"),
    [
        (section(spread(0.5)), 0, "2 figures: 0 better, 0 worse"),
        (section(spread(0.51)), 0, "0 better, 0 worse"),  # within the measurement noise
        (section(spread(0.55)), 1, "WORSE   0.91  linear: forward, 8x8, 1: ours: 0.5"),
        (section(spread(0.45)), 0, "better   1.11  linear"),
        (section(spread(0.55, width=0.2)), 0, "0 better, 0 worse"),  # the ranges overlap
        (section(spread(0.5), tokens_per_second=80), 1, "WORSE   0.80  linear: qlora_ext: tokens/s: 100 -> 80"),
        (section(spread(0.5), peers=20), 0, "0 better, 0 worse"),  # a change of a peer is not a regression
    ],
    ids=["same", "noise", "worse", "better", "wide", "tokens", "peer"],
)
def test_compare(tmp_path: pathlib.Path, new: dict[str, Any], status: int, message: str) -> None:
    found, output = compared(tmp_path, section(spread(0.5)), new)
    assert message in output
    assert found == status


def test_files_without_a_common_figure_are_no_success(tmp_path: pathlib.Path) -> None:
    empty = {**section(spread(0.5)), "rows": []}
    assert compared(tmp_path, section(spread(0.5)), empty) == (2, "the files have no figure in common\n")


@pytest.mark.parametrize("path", tables.PAGES, ids=lambda path: path.name)
def test_pages_have_the_figures_of_the_results(path: pathlib.Path) -> None:
    page = path.read_text()
    assert tables.written(page, tables.PAGES[path]) == page, "run python -m bench.lib.tables"


def test_a_table_without_its_marks_is_an_error() -> None:
    with pytest.raises(ValueError, match="expected the marks of the table 'steps' once, found them 0 times"):
        tables.written("no marks here", tables.PAGES[tables.README])


def test_formats_are_shown_once_they_are_measured(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results_files, "RESULTS", tmp_path)
    assert tables.formats_by_machine() == {}
    row = {"format": "MXFP4", "shape": "4096x4096", "operator": "forward", "M": 1, "us": 1.0}
    rows = [{**row, "M": m, "dequantize": spread(0.3), "NF4": spread(1.05)} for m in (1, 8)]
    content = {**section(spread(0.5)), "rows": rows}
    results_files.write_section(tmp_path / "amd_26_2.json", tables.FORMATS, content)
    ((name, make),) = tables.formats_by_machine().items()
    assert name == "formats on amd_26_2"
    heading, _, line = make().splitlines()
    assert heading == "| format | forward, 1 token | forward, 8 tokens |"
    assert line == "| MXFP4 | 1.05 (0.30) | 1.05 (0.30) |"


def test_reordering_changes_the_weights_and_not_the_outputs() -> None:
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 32}
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**sizes, num_attention_heads=6, num_key_value_heads=2)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).double().eval()
    ids = torch.randint(0, 32, (2, 9))
    before = {name: p.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        expected = model(ids).logits
        reordered = reordering.reorder(model)(ids).logits
    torch.testing.assert_close(reordered, expected, atol=1e-6, rtol=1e-4)  # transformers' norms round to float32
    assert expected.std() > 1e-3
    layers = {name: p for name, p in model.named_parameters() if "proj" in name}
    assert len(layers) == 14
    assert not [name for name, p in layers.items() if torch.equal(p, before[name])]


def texts_of(svg: str) -> list[str]:
    return re.findall(r"<text [^>]*>([^<]*)</text>", svg)


@pytest.mark.parametrize("name", pictures.tracked())
def test_a_picture_shows_the_results(name: str, tmp_path: pathlib.Path) -> None:
    """Another version of matplotlib may round lines differently, but gives the same texts and as many shapes."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    drawn, size = pictures.tracked()[name]
    pictures.save(drawn, tmp_path / f"{name}.svg", size)
    new, old = ((folder / f"{name}.svg").read_text() for folder in (tmp_path, pictures.FOLDER))
    assert texts_of(old) == texts_of(new), "run python -m bench.lib.pictures"
    assert texts_of(old)
    assert old.count("<path ") == new.count("<path ")
    assert "prefers-color-scheme:dark" in old


def test_readme_has_the_losses_of_the_default_job() -> None:
    (row,) = results_files.sections("amd_25_17")["troubleshooting_default"]["rows"]
    expected = f"{row['held-out loss before']:.2f} to {row['held-out loss after']:.2f}"
    assert expected in tables.README.read_text().replace("\n", " ")


def test_no_picture_is_left_over() -> None:
    assert {path.stem for path in pictures.FOLDER.iterdir()} == set(pictures.tracked())


def test_results_are_one_file_per_machine() -> None:
    assert not [path for path in results_files.RESULTS.rglob("*") if path.suffix != ".json" or path.is_dir()]
    assert set(results_files.machines()) == set(results_files.MACHINES)


def test_evidence_is_ordered_by_model() -> None:
    models = [model for model, _, _ in results_files.evidence_cells()]
    assert list(dict.fromkeys(models)) == [*results_files.MODELS]
    assert models == sorted(models, key=[*results_files.MODELS].index)


def test_writing_a_section_keeps_the_others(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "amd_0_0.json"
    for name in ("step", "codec", "step"):
        results_files.write_section(path, name, section(spread(0.5)))
    assert results_files.sections(path) == {"codec": section(spread(0.5)), "step": section(spread(0.5))}


def test_points_under_the_ceiling() -> None:
    row = {"op": "forward", "N x K": "1000x2000", "M": 10, "torch us": 100, "ours": spread(0.5)}
    ours, torch = sorted(results_files.points({"rows": [row]}), key=lambda point: point.contender)
    assert (ours.contender, torch.contender) == ("ours", "torch")
    assert ours.flops == pytest.approx(2 * 10 * 1000 * 2000 / 50e-6)
    assert torch.flops == pytest.approx(ours.flops / 2)
    assert ours.intensity == pytest.approx(4e7 / (2e6 * 4.127 / 8 + 2 * 10 * 3000))
    ceiling = results_files.Ceiling(bandwidth=1e9, flops=1e10)
    assert (ceiling.at(2.0), ceiling.at(20.0)) == (2e9, 1e10)


def test_a_report_has_a_table_and_a_picture_for_each_section(tmp_path: pathlib.Path) -> None:
    machine = {"date": "2026-01-01", "threads": 2, "gpu": None}
    rows = [{"op": "forward", "N x K": "8x8", "M": 1, "torch us": 10, "ours": spread(0.5), "loop": {"all": 3}}]
    found = {"linear_bfloat16": {"title": "Layers", "notes": ["A note."], "machine": machine, "rows": rows}}
    page = report.markdown("amd_26_2", found, {"linear_bfloat16": "amd_26_2/linear_bfloat16.svg"})
    assert (
        page
        == """# Measured on an AMD EPYC (Zen 5)

## Layers {#linear_bfloat16}

A note.

date 2026-01-01, threads 2.

![Layers](amd_26_2/linear_bfloat16.svg)

| op | N x K | M | torch us | ours | loop: all |
|---|---|---|---|---|---|
| forward | 8x8 | 1 | 10 | 0.5 (0.49 to 0.51) | 3 |
"""
    )
