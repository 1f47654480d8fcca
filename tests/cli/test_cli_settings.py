"""The settings of ``finetune``: schedules, warm-up, clipping, NEFTune, no packing, rsLoRA, DoRA, modules trained in
full; and experiment trackers, through transformers' Trainer."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler
from transformers.integrations import integration_utils

from commands import SMALL, Paths, adapter_bytes, base, here, read_lines, stopped
from qlora_app.data import read_examples, split
from qlora_app.models import Loader, activations
from qlora_app.training.settings import SCHEDULES, Settings, layer_numbers
from qlora_app.training.trainer import training_arguments
from qlora_ext.nn import layers_of

STEPS = ["--max-steps", "5", "--save-steps", "3"]


def arguments_of(tmp_path: pathlib.Path, steps: int = 100, **settings: Any) -> Any:
    return training_arguments(Settings(**settings), steps, tmp_path, torch.device("cpu"))


def test_the_defaults_are_the_paper_s(tmp_path: pathlib.Path) -> None:
    made = arguments_of(tmp_path)
    assert made.lr_scheduler_type.value == "constant_with_warmup"
    assert (made.warmup_steps, made.max_grad_norm, made.weight_decay) == (3, 0.3, 0.0)
    assert made.neftune_noise_alpha is None


def test_arguments_of_the_trainer(tmp_path: pathlib.Path) -> None:
    made = arguments_of(
        tmp_path, lr_schedule="cosine", warmup_steps=7, weight_decay=0.1, max_grad_norm=0.0, neftune_alpha=5.0
    )
    assert made.lr_scheduler_type.value == "cosine"
    assert (made.warmup_steps, made.max_grad_norm, made.weight_decay) == (7, 0.0, 0.1)
    assert made.neftune_noise_alpha == 5.0
    assert arguments_of(tmp_path, warmup_ratio=0.25).warmup_steps == 25


@pytest.mark.parametrize("name", SCHEDULES)
def test_transformers_knows_the_schedules(name: str) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = get_scheduler(name, optimizer, num_warmup_steps=0 if name == "constant" else 2, num_training_steps=10)
    rates = [schedule.lr_lambdas[0](step) for step in range(10)]
    assert (rates[1] == rates[9]) == (name == "constant")
    depends = [get_scheduler(name, optimizer, 2, steps).lr_lambdas[0](5) for steps in (10, 20)]
    assert Settings(lr_schedule=name).depends_on_length == (depends[0] != depends[1])


def test_layer_numbers() -> None:
    assert layer_numbers("") == []
    assert layer_numbers("3, 0-1,1") == [0, 1, 3]


def test_a_rank_above_that_of_the_layers(paths: Paths, tmp_path: pathlib.Path) -> None:
    """The hidden size of the tiny model is 64."""
    for rank in (64, 65):
        options = ["--rank", str(rank), "--max-steps", "1"]
        assert (
            "note: --rank 65 is larger than the layers"
            in here("finetune", *base(paths), "--output", tmp_path / f"{rank}", *SMALL, *options)
        ) == (rank == 65)


# Two runs with most options.
RECIPES = {
    "rslora": "--lr-schedule cosine --warmup-steps 2 --weight-decay 0.1 --neftune-alpha 5 --no-packing --rslora "
    "--layers 1",
    "dora": "--dora --modules-to-save lm_head,norm --lr-schedule linear --max-grad-norm 0",
}


@pytest.fixture(scope="module")
def runs(paths: Paths) -> dict[str, pathlib.Path]:
    """A run of 5 steps by each of the two. Tests only read it."""
    found = {name: paths["root"] / name for name in RECIPES}
    for name, options in RECIPES.items():
        here("finetune", *base(paths), "--output", found[name], *SMALL, *STEPS, *options.split())
    return found


@pytest.mark.parametrize("name", RECIPES)
def test_a_resumed_run_has_the_same_bits(runs: dict[str, pathlib.Path], tmp_path: pathlib.Path, name: str) -> None:
    run = runs[name]
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    names = set(load_file(run / "adapter" / "adapter_model.safetensors"))
    if name == "dora":
        assert config["use_dora"]
        assert {"base_model.model.lm_head.weight", "base_model.model.model.norm.weight"} <= names
    else:
        assert (config["use_rslora"], config["layers_to_transform"]) == (True, [1])
        assert names
        assert all(".layers.1." in name for name in names)
    begun = stopped(run, tmp_path, 3)
    here("finetune", "--output", begun, "--resume")
    assert adapter_bytes(begun) == adapter_bytes(run)


def test_each_option_changes_the_adapter(paths: Paths, tmp_path: pathlib.Path) -> None:
    learnt = {}
    for options in ("", "--lr-schedule cosine", "--warmup-steps 4", "--weight-decay 0.5", "--max-grad-norm 0",
                    "--neftune-alpha 9", "--rslora"):  # fmt: skip
        run = tmp_path / (options.replace(" ", "") or "plain")
        here("finetune", *base(paths), "--output", run, *SMALL, "--max-steps", "3", *options.split())
        learnt[options] = adapter_bytes(run)
    assert len(set(learnt.values())) == len(learnt)


def test_trained_modules_and_dora_in_merge_and_generate(runs: dict[str, pathlib.Path], tmp_path: pathlib.Path) -> None:
    """Also in a dtype other than that of training, and from a checkpoint, which does not name the base."""
    run = runs["dora"]
    here("generate", "--adapter", run, "--max-new-tokens", "2", "count 3")
    here("generate", "--adapter", run / "checkpoint-3", "--max-new-tokens", "2", "count 3")
    for limit, more in ((1e-4, ["--dtype", "float32"]), (0.05, ["--4bit"])):
        printed = here("merge", "--adapter", run, "--output", tmp_path / more[0], "--evaluate", *more)
        before, after = (float(printed.split(f" {word}")[0].split()[-1]) for word in ("unmerged", "merged ("))
        assert after == pytest.approx(before, abs=limit)


def test_a_head_that_is_tied_is_trained_with_the_embeddings(paths: Paths, tmp_path: pathlib.Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(paths["model"])
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "tied")
    AutoTokenizer.from_pretrained(paths["model"]).save_pretrained(tmp_path / "tied")
    run = tmp_path / "run"
    arguments = ["--model", tmp_path / "tied", "--data", paths["data"], *SMALL, "--max-steps", "2"]
    here("finetune", *arguments, "--output", run, "--modules-to-save", "embed_tokens")
    here("merge", "--adapter", run, "--output", tmp_path / "merged", "--dtype", "float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    trained = merged.get_input_embeddings().weight
    assert torch.equal(trained, merged.get_output_embeddings().weight)
    assert not torch.equal(trained, model.get_input_embeddings().weight)


@pytest.mark.parametrize(
    ("isa", "expected"),
    [
        ("avx512_bf16", "int8"),
        ("avx_vnni", "int8"),
        ("neon_i8mm", "int8"),
        ("amx_bf16", "exact"),
        ("avx2", "exact"),
        ("scalar", "exact"),
        ("neon", "exact"),
    ],
)
def test_the_automatic_activations(isa: str, expected: str) -> None:
    chosen, why = activations._auto(isa)
    assert chosen == expected
    assert why.startswith(isa)


def test_activations(
    paths: Paths, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capfd: Any, refused: Any
) -> None:
    """What auto is at the start of a run is recorded, restored when it is resumed or answers, and told in the card."""
    computed: list[set[str]] = []
    original = Loader._finished

    def spy(self: Loader, model: Any) -> Any:
        model = original(self, model)
        computed.append({layer.activations for _, layer in layers_of(model)})
        return model

    monkeypatch.setattr(Loader, "_finished", spy)
    monkeypatch.setattr(activations, "_auto", lambda isa: ("int8", "of a test"))
    run = tmp_path / "run"
    here("finetune", *base(paths), "--output", run, *SMALL, *STEPS, "--activations", "auto")
    assert "qlora-ext: --activations auto: int8, because of a test" in capfd.readouterr().err
    assert json.loads((run / "settings.json").read_text())["activations"] == "auto"
    assert json.loads((run / "adapter" / "qlora_run.json").read_text())["settings"]["activations"] == "int8"
    assert "rounded their inputs and gradients to int8" in (run / "adapter" / "README.md").read_text()
    monkeypatch.setattr(activations, "_auto", lambda isa: ("exact", "of another processor"))
    begun = stopped(run, tmp_path, 3)
    here("finetune", "--output", begun, "--resume", "--activations", "auto")
    assert adapter_bytes(begun) == adapter_bytes(run)
    generate = ["generate", "--adapter", run, "--max-new-tokens", "1", "count 3"]
    for options in ([], ["--activations", "exact"], ["--activations", "auto"]):
        here(*generate, *options)
    assert "qlora-ext: --activations auto: exact, because of another processor" in capfd.readouterr().err
    here("generate", "--adapter", begun / "checkpoint-3", *generate[3:])
    here("merge", "--adapter", run, "--output", tmp_path / "merged")
    assert computed == [{"int8"}, {"int8"}, {"int8"}, {"exact"}, {"exact"}, {"int8"}, {"exact"}]
    record = run / "adapter" / "qlora_run.json"
    record.write_text(record.read_text().replace('"activations": "int8"', '"activations": "int4"'))
    assert "activations: expected exact, int8, auto, got int4" in refused(*generate)


def test_rows_of_their_own(paths: Paths) -> None:

    tokenizer = AutoTokenizer.from_pretrained(paths["model"])
    examples = read_examples(str(paths["data"]))
    alone = split(tokenizer, examples, 64, None, 3, 0, packing=False)
    packed = split(tokenizer, examples, 64, None, 3, 0)
    assert alone.held_out == packed.held_out
    assert len(alone.train) == len(examples) - len(alone.held_out) > len(packed.train)
    assert all(row["position_ids"] == list(range(len(row["input_ids"]))) for row in alone.train)
    assert sum(len(row["input_ids"]) for row in alone.train) == sum(len(row["input_ids"]) for row in packed.train)


def test_plan_counts_modules_that_are_trained_in_full(paths: Paths, capfd: pytest.CaptureFixture[str]) -> None:
    totals = []
    for more in ([], ["--modules-to-save", "embed_tokens"]):
        here("plan", "--model", paths["model"], "--json", "--memory", "8GB", *more)
        totals.append(json.loads(capfd.readouterr().out)["bytes"])
    trained = 257 * 64 * 2  # the embeddings, in bfloat16
    assert totals[1]["adapters"] - totals[0]["adapters"] == trained
    assert totals[1]["optimizer state"] - totals[0]["optimizer state"] == 2 * trained


def test_the_learning_rate_follows_its_schedule(paths: Paths, tmp_path: pathlib.Path) -> None:
    run = tmp_path / "run"
    options = ["--max-steps", "4", "--lr-schedule", "linear", "--warmup-steps", "2"]
    here("finetune", *base(paths), "--output", run, *SMALL, *options)
    rates = [line["learning_rate"] for line in read_lines(run / "metrics.jsonl") if "learning_rate" in line]
    assert rates == pytest.approx([0.0, 0.0015, 0.003, 0.0015])


def test_tensorboard_gets_the_metrics(paths: Paths, tmp_path: pathlib.Path) -> None:
    loading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = tmp_path / "run"
    options = [*base(paths), "--output", run, *SMALL, "--max-steps", "3"]
    here("finetune", *options, "--report-to", "tensorboard")
    (events,) = (run / "runs").glob("*/events.out.tfevents.*")
    accumulator = loading.EventAccumulator(str(events))
    accumulator.Reload()
    assert [scalar.step for scalar in accumulator.Scalars("train/loss")] == [1, 2, 3]
    # The event files are the run's own: --overwrite replaces them. The adapter does not depend on them.
    adapter = adapter_bytes(run)
    here("finetune", *options, "--overwrite")
    assert not (run / "runs").exists()
    assert adapter_bytes(run) == adapter


def test_a_missing_tracker_is_rejected(
    refused: Any, paths: Paths, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*base(paths), "--output", tmp_path / "run"]
    monkeypatch.setattr(integration_utils, "get_available_reporting_integrations", lambda: ["tensorboard"])
    sentence = refused("finetune", *options, "--report-to", "tensorboard,wandb")
    assert "--report-to wandb: wandb is not installed; install it with: pip install wandb" in sentence
    assert not (tmp_path / "run").exists()
