"""Low-rank approximation of a matrix."""

from __future__ import annotations

import torch
from torch import Tensor

# Parameters of the randomized SVD (Halko, Martinsson and Tropp, 2011). The singular values of rounding errors decay
# slowly, which needs many power iterations.
_OVERSAMPLING = 16
_POWER_ITERATIONS = 6


def low_rank_approximation(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best rank-R approximation B · A of ``matrix`` [N, K] (Eckart-Young), as A [R, K] and B [N, R].

    It is computed with random projections from a fixed seed, so the result is deterministic. If N or K is less than R,
    the surplus rows of A and columns of B are zero.
    """
    found = min(rank, *matrix.shape)
    devices = [] if matrix.device.type == "cpu" else [matrix.device]
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(matrix, min(found + _OVERSAMPLING, *matrix.shape), niter=_POWER_ITERATIONS)
    root = s[:found].sqrt()
    a, b = matrix.new_zeros(rank, matrix.shape[1]), matrix.new_zeros(matrix.shape[0], rank)
    a[:found], b[:, :found] = root[:, None] * v[:, :found].T, u[:, :found] * root
    return a, b
