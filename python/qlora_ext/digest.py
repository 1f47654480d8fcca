"""The bytes of tensors, and digests of them, which identify weights and inputs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def update(digest: hashlib._Hash, value: Any) -> None:
    """Adds ``value`` to a digest: dtype, shape and bytes of a tensor, and each item of a mapping or list in order."""
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype} {list(value.shape)};".encode())
        digest.update(bytes_of(value))
    elif isinstance(value, Mapping):
        for key, item in value.items():
            digest.update(f"{key}:".encode())
            update(digest, item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            update(digest, item)
    else:
        digest.update(f"{value!r};".encode())
