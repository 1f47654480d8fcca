"""FSDP2 (``torch.distributed.fsdp.fully_shard``) shards and gathers packed weights and scales without casting them.

This module is imported automatically with torch's FSDP2. ``_patches`` lists what it changes there.
"""

from __future__ import annotations

import types
from typing import Any

import torch
import torch.distributed.fsdp._fully_shard._fsdp_param as fsdp_param
from torch import Tensor, nn

from ..nn import Packed4bit, layers_of
from ._patches import extend


@extend("torch.distributed.fsdp:fully_shard")
def fully_shard(original: Any, module: nn.Module | list[nn.Module], *args: Any, **kwargs: Any) -> Any:
    modules = [module] if isinstance(module, nn.Module) else module
    layers = [layer for root in modules for _, layer in layers_of(root)]
    if any(layer.residency is not None for layer in layers):
        raise ValueError(
            "fully_shard: expected a model that is not streamed (qlora_ext.streaming); FSDP2 can keep weights in host "
            "memory itself: fully_shard(offload_policy=CPUOffloadPolicy())"
        )
    for layer in layers:
        layer.expose()
        layer.is_gathered = True
    return original(module, *args, **kwargs)


@extend("torch.distributed.fsdp._fully_shard._fsdp_param:FSDPParam.init_dtype_attrs")
def init_dtype_attrs(original: Any, self: Any, mp_policy: Any) -> None:
    original(self, mp_policy)
    owner = self._module_info
    is_packed = isinstance(owner.module, Packed4bit) and owner.param_name in owner.module.packed_state()
    if is_packed or not self.orig_dtype.is_floating_point:
        self.param_dtype = None  # gathered in its own dtype


if torch.__version__ < "2.12":  # compared as versions
    # A separate namespace, because all code shares torch.nn.
    fsdp_param.nn = types.SimpleNamespace(**vars(nn))  # type: ignore[assignment, attr-defined]

    @extend("torch.distributed.fsdp._fully_shard._fsdp_param:nn.Parameter")
    def parameter(original: Any, data: Tensor, requires_grad: bool | None = None) -> nn.Parameter:
        """``nn.Parameter``, which by default has a gradient where ``data`` can have one."""
        return nn.Parameter(data, data.is_floating_point() if requires_grad is None else requires_grad)
