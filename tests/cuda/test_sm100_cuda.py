"""Blackwell's kernels on a simulated B200, also in runs that simulate another card: results of every tile, with all
checks of the simulator, and the passes over shared memory that cuda/tuning/sm100.h counts on."""

from __future__ import annotations

import itertools
import json
import os
import sys
from pathlib import Path

from cuda_cases import BF16, DX, F16, FORWARD, case
from cuda_profiles import Recorder, cases_printed, needs_counters, simulated

pytestmark = needs_counters

# (operator, tokens, splits, multicast, m, n, k, rank, dtype): tails of tokens and outputs, all rings of stages, h and g
# of any rank.
CASES = [
    (FORWARD, 64, 3, 1, 33, 150, 832, 5, BF16),
    (FORWARD, 64, 1, 1, 64, 128, 640, None, F16),
    (FORWARD, 128, 1, 2, 100, 300, 576, 130, F16),
    (FORWARD, 256, 2, 1, 130, 129, 704, 16, BF16),
    (DX, 64, 3, 1, 33, 840, 192, 5, BF16),
    (DX, 64, 1, 1, 64, 648, 128, None, F16),
    (DX, 128, 1, 2, 100, 328, 320, 130, F16),
    (DX, 256, 2, 1, 130, 712, 64, 16, BF16),
]
TOKENS = [64, 128, 256]
STAGES = 4, 8  # of 64 terms, of one tile: the difference of their counters is that of four stages
SCALES = {FORWARD: 4, DX: 4 + 64 + 4}  # passes over shared memory: of the map from codes, and of dX's scales


def run_cases(profile: Path) -> None:
    from operator_results import RESULTS, call, check_samples

    record = Recorder(profile)
    for op, tokens, splits, multicast, *shape, dtype in CASES:
        os.environ["QLORA_CUDA_KERNEL"] = f"sm100:tokens={tokens},splits={splits},multicast={multicast}"
        check_samples(RESULTS[op], case(op, *shape, dtype, dropout_p=0.2).sample, entries=250)
    for tokens in TOKENS:
        os.environ["QLORA_CUDA_KERNEL"] = f"sm100:tokens={tokens},splits=1,multicast=1"
        for op in SCALES:
            for stages in STAGES:
                shape = (128, 64 * stages) if op == FORWARD else (64 * stages, 128)
                sample = case(op, tokens, *shape, None, bias=False).sample()
                record(f"{op} {tokens} {stages}", call, op, *sample)
    print(json.dumps(record.cases))


def test_results_and_passes_over_shared_memory(tmp_path: Path) -> None:
    profile = tmp_path / "launches.jsonl"
    environment = {"QLORA_CUDA_KERNEL": "sm100", "CUDASIM_CHECK": "race,init,fence,grid"}
    found = cases_printed(simulated(__file__, "100", profile, **environment))
    for op, tokens in itertools.product(SCALES, TOKENS):
        (short,), (long,) = (found[f"{op} {tokens} {stages}"] for stages in STAGES)
        assert "sm100" in short["kernel"]
        numbers = {name: value for name, value in long.items() if isinstance(value, int)}
        stage = {name: (value - short[name]) / (STAGES[1] - STAGES[0]) for name, value in numbers.items()}
        # Lookups of pairs, packed bytes and scales, without bank conflicts
        passes = 256 + 32 + SCALES[op]
        assert stage["shared_wavefronts"] == stage["shared_wavefronts_ideal"] == passes
        # x, which is read once; and what TMA writes: x and packed bytes
        assert stage["tcgen05_wavefronts"] == tokens
        assert stage["async_sectors_received"] * 32 == 128 * (tokens + 32)
        assert stage["tcgen05_flops"] == 2 * tokens * 128 * 64
        assert stage["warp_instructions"] / 4 < 1.3 * passes  # four schedulers


if __name__ == "__main__":
    run_cases(Path(sys.argv[1]))
