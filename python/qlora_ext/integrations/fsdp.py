"""FSDP2 (``torch.distributed.fsdp.fully_shard``) shards and gathers packed weights and scales without casting them.

This module is imported automatically with torch's FSDP2. ``_patches`` lists what it changes there.
"""

from __future__ import annotations

import sys
import types
from typing import Any

import torch
import torch.distributed.fsdp._fully_shard._fsdp_param as fsdp_param
from torch import Tensor, nn

from ..nn import Packed4bit, layers_of
from ._patches import extend


@extend("torch.distributed.fsdp._fully_shard._fsdp_state:FSDPState.__init__")
def init_state(original: Any, self: Any) -> None:
    # ``fully_shard`` creates its state, which is not told the modules, before it reads the names of the parameters.
    # Users may have imported ``fully_shard`` itself before this module, so it cannot be replaced.
    caller = sys._getframe(2)
    for module in caller.f_locals.get("modules", ()):
        for _, layer in layers_of(module):
            layer.expose()
    original(self)


@extend("torch.distributed.fsdp._fully_shard._fsdp_param:FSDPParam.init_dtype_attrs")
def init_dtype_attrs(original: Any, self: Any, mp_policy: Any) -> None:
    owner = self._module_info
    if isinstance(owner.module, Packed4bit) and owner.module.residency is not None:
        raise ValueError(
            "fully_shard: expected a model that is not streamed (qlora_ext.streaming); FSDP2 can keep weights in host "
            "memory itself: fully_shard(offload_policy=CPUOffloadPolicy())"
        )
    original(self, mp_policy)
    is_packed = isinstance(owner.module, Packed4bit) and owner.param_name in owner.module.packed_state()
    if is_packed:
        owner.module.is_gathered = True
    if is_packed or not self.orig_dtype.is_floating_point:
        self.param_dtype = None  # gathered in its own dtype


if torch.__version__ < "2.13":  # compared as versions
    # A separate namespace, because all code shares torch.nn.
    fsdp_param.nn = types.SimpleNamespace(**vars(nn))  # type: ignore[assignment, attr-defined]

    @extend("torch.distributed.fsdp._fully_shard._fsdp_param:nn.Parameter")
    def parameter(original: Any, data: Tensor, requires_grad: bool | None = None) -> nn.Parameter:
        """``nn.Parameter``, which by default has a gradient where ``data`` can have one."""
        return nn.Parameter(data, data.is_floating_point() if requires_grad is None else requires_grad)
