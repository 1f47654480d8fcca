"""Copies and waits of a training step over a streamed base, logged from the CUDA runtime by a preloaded library."""

from __future__ import annotations

import collections
import ctypes
import json
import os
import pathlib
import shutil
import subprocess
import sys
from typing import Any

import pytest
import torch

from own_process import run_file
from qlora_ext.streaming import stream, streaming_of
from streamed_models import LAYERS, adapted, checkpointed, load, save

HERE = pathlib.Path(__file__).parent
STEPS = 2
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to build the library that logs"),
]


def step(path: pathlib.Path, library: str) -> None:
    """The program of the logged process."""
    model = adapted(stream(load(path), source="ram", device="cuda"))
    checkpointed(model, False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-2)
    ids = torch.arange(24).view(2, 12).cuda()

    def train() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(2):  # one-time allocations are done
        train()
    enable = ctypes.CDLL(library).api_log_enable
    fills = streaming_of(model).fills
    enable(1)
    for _ in range(STEPS):
        train()
    enable(0)
    torch.cuda.synchronize()
    print(json.dumps({"fills": streaming_of(model).fills - fills, "compute": torch.cuda.current_stream().cuda_stream}))


def test_nothing_waits_and_the_compute_stream_copies_nothing(tmp_path: pathlib.Path) -> None:
    path, library, log = save("llama", tmp_path / "llama"), tmp_path / "api_log.so", tmp_path / "log.jsonl"
    options = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-shared", "-fPIC"]
    subprocess.run(["g++", *options, HERE / "api_log.cpp", "-o", library], check=True)
    preloaded = ":".join([str(library), *filter(None, [os.environ.get("LD_PRELOAD")])])
    environment = {**os.environ, "LD_PRELOAD": preloaded, "API_LOG": str(log)}
    run = run_file(__file__, path, library, environment=environment)
    counted = json.loads(run.stdout.splitlines()[-1])
    calls: list[dict[str, Any]] = [json.loads(line) for line in log.read_text().splitlines()]
    assert counted["fills"] == STEPS * 2 * (LAYERS - 2)
    counts = collections.Counter(call["call"] for call in calls)
    orders = {"cudaEventRecordWithFlags", "cudaEventRecord", "cudaStreamWaitEvent"}
    assert set(counts) - orders <= {"cudaMemcpyAsync"}  # nothing waits, allocates or clears
    copies = [call["stream"] for call in calls if call["call"] == "cudaMemcpyAsync"]
    assert counted["compute"] not in copies
    assert len(copies) in (counted["fills"], 0)  # a simulator may execute torch's copies before they reach the runtime
    waits = collections.Counter(call["stream"] for call in calls if call["call"] == "cudaStreamWaitEvent")
    assert waits[counted["compute"]] == counted["fills"]  # the computation waits for each block,
    assert (
        sum(waits.values()) == 2 * counted["fills"]
    )  # and each block for the computation with the previous one in its slot


if __name__ == "__main__":
    step(pathlib.Path(sys.argv[1]), sys.argv[2])
