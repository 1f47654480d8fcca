"""A driver that refuses clusters, as on parts of a card: the operators count on it only until it has refused one.
The kernel simulator imitates such drivers, each in a process of its own, because a device's clusters are queried once.
"""

from __future__ import annotations

import os
import re

import pytest
import torch

from cuda_cases import CAPABILITY, DX, FORWARD, case
from operator_results import RESULTS, check_samples
from own_process import run_file

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif("CUDASIM_TORCH_LIBRARY" not in os.environ, reason="the kernel simulator's driver can refuse"),
    pytest.mark.skipif(CAPABILITY[0] < 9, reason="the device has no clusters"),
]
# (m, n, k), whose sums are split: few tokens, mma.sync, and on Hopper wgmma.
SHAPES = [(3, 136, 2048), (20, 136, 2048), (40, 136, 1024)]


def run_shapes() -> None:
    for op, m, n, k in [*((FORWARD, *shape) for shape in SHAPES), (DX, 40, 1032, 64)]:
        check_samples(RESULTS[op], case(op, m, n, k, 8).sample, 0)
    torch.cuda.synchronize()  # no error of a refused launch remains


@pytest.mark.parametrize("clusters", ["refused", "unknown"])
def test_results_without_clusters(clusters: str) -> None:
    environment = {**os.environ, "QLORA_PRINT_KERNELS": "1", "CUDASIM_CLUSTERS": clusters}
    printed = run_file(__file__, environment=environment).stderr
    ran = re.findall(r"^qlora: (\w+) cuda m=(\d+) .* -> (\w+) .*splits=(\d+).*$", printed, flags=re.M)
    splits = {(operator, int(m), kernel): int(s) for operator, m, kernel, s in ran}  # the last try of each
    assert splits["linear_nf4", 3, "few_tokens"] > 1  # by tickets
    assert splits["linear_nf4", 20, "tensor_cores"] > 1
    if CAPABILITY == (9, 0):
        assert splits["linear_nf4", 40, "sm90"] == splits["linear_nf4_dx", 40, "sm90"] == 1


if __name__ == "__main__":
    run_shapes()
