"""FSDP2 (``torch.distributed.fsdp.fully_shard``): packed weights and scales are sharded and gathered as they are.

This module is imported by itself as soon as torch's FSDP2 is, and mends how that treats one parameter: under a
``MixedPrecisionPolicy`` it would cast float32 scales to the policy's dtype and, before torch 2.13, packed bytes too,
which it could not even shard (https://github.com/pytorch/pytorch/issues/177844).
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
import torch.distributed.fsdp._fully_shard._fsdp_param as fsdp_param
from torch import Tensor, nn

from ..nn import Packed4bit

_init_dtype_attrs = fsdp_param.FSDPParam.init_dtype_attrs


@functools.wraps(_init_dtype_attrs)
def init_dtype_attrs(self: Any, mp_policy: Any) -> None:
    _init_dtype_attrs(self, mp_policy)
    owner = self._module_info
    is_packed = isinstance(owner.module, Packed4bit) and owner.param_name in owner.module.packed_state()
    if is_packed or not self.orig_dtype.is_floating_point:
        self.param_dtype = None  # gathered in the dtype that it is stored in


fsdp_param.FSDPParam.init_dtype_attrs = init_dtype_attrs  # type: ignore[method-assign]


def parameter(data: Tensor, requires_grad: bool | None = None) -> nn.Parameter:
    """``nn.Parameter``, which by default has a gradient where ``data`` can have one."""
    return nn.Parameter(data, data.is_floating_point() if requires_grad is None else requires_grad)


if torch.__version__ < "2.13":  # compared as versions
    fsdp_param.nn = types.SimpleNamespace(**{**vars(nn), "Parameter": parameter})  # type: ignore[assignment, attr-defined]
