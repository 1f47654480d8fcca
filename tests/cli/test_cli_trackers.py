"""``--report-to``: experiment trackers, through transformers' Trainer."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest

from commands import SMALL, Paths, adapter_bytes, here


def test_tensorboard_gets_the_metrics(paths: Paths, tmp_path: pathlib.Path, refused: Any) -> None:
    loading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = tmp_path / "run"
    options = ["--model", paths["model"], "--data", paths["data"], "--output", run, *SMALL, "--max-steps", "3"]
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


def test_an_unknown_or_missing_tracker_is_rejected(
    refused: Any, paths: Paths, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--model", paths["model"], "--data", paths["data"], "--output", tmp_path / "run"]
    from transformers.integrations import integration_utils

    monkeypatch.setattr(integration_utils, "get_available_reporting_integrations", lambda: ["tensorboard"])
    sentence = refused("finetune", *options, "--report-to", "tensorboard,wandb")
    assert "--report-to wandb: wandb is not installed; install it with: pip install wandb" in sentence
    assert not (tmp_path / "run").exists()
