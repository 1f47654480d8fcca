"""The nearest matrix of a low rank."""

from __future__ import annotations

import torch
from torch import Tensor

# Halko, Martinsson and Tropp (2011): so many more directions than are wanted, and turns over the matrix, find those of
# a slowly falling spectrum, which is what rounding errors have.
_MORE_DIRECTIONS = 16
_TURNS = 6


def nearest_of_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A [R, K] and B [N, R] with B · A the nearest to ``matrix`` [N, K] of all of that rank (Eckart-Young).

    Found by random projections, always the same ones. Where N or K is below R, the rest of A and B is zero.
    """
    found = min(rank, *matrix.shape)
    devices = [] if matrix.device.type == "cpu" else [matrix.device]
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(matrix, min(found + _MORE_DIRECTIONS, *matrix.shape), niter=_TURNS)
    root = s[:found].sqrt()
    a, b = matrix.new_zeros(rank, matrix.shape[1]), matrix.new_zeros(matrix.shape[0], rank)
    a[:found], b[:, :found] = root[:, None] * v[:, :found].T, u[:, :found] * root
    return a, b
