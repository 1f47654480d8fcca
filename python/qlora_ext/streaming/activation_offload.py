"""Moves the inputs of checkpointed layers to host memory, so that device memory does not grow with the layers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..nn.model import Model


class _HostCopy:
    """A copy of a tensor in pinned host memory, and its way back to the device."""

    def __init__(self, device: torch.device, tensor: Tensor) -> None:
        self.device, self.host = device, tensor
        self.back: Tensor | None = None  # the copy on the device, complete at the event ``arrived``
        self.arrived: Any = None


class _Offload:
    """Saved-tensor hooks that store tensors in host memory, with copies on a separate stream.

    The backward needs them in reverse order, so while one tensor is used, the previous one is prefetched.
    """

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._saved: list[_HostCopy] = []

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        return self._streams.setdefault(device, torch.cuda.Stream(device))

    def pack(self, tensor: Tensor) -> Any:
        if tensor.device.type != "cuda" or not tensor.is_floating_point() or tensor.numel() == 0:
            return tensor
        stream, compute = self._stream(tensor.device), torch.cuda.current_stream(tensor.device)
        stream.wait_stream(compute)
        host = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu", pin_memory=True)
        with torch.cuda.stream(stream):
            host.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)  # the allocator must not reuse the memory before the copy is done
        copy = _HostCopy(tensor.device, host)
        self._saved.append(copy)
        return copy

    def unpack(self, copy: Any) -> Tensor:
        if not isinstance(copy, _HostCopy):
            tensor: Tensor = copy
            return tensor
        if copy in self._saved:
            del self._saved[self._saved.index(copy) :]  # also drops copies from a forward that had no backward
        self._fetch(copy)
        compute = torch.cuda.current_stream(copy.device)
        compute.wait_event(copy.arrived)
        back = copy.back
        assert back is not None
        back.record_stream(compute)
        copy.back = None
        if self._saved:
            self._fetch(self._saved[-1])
        return back

    def _fetch(self, copy: _HostCopy) -> None:
        if copy.back is not None:
            return
        stream = self._stream(copy.device)
        with torch.cuda.stream(stream):
            copy.back = copy.host.to(copy.device, non_blocking=True)
            copy.arrived = stream.record_event()


def offload_checkpoints(model: Model) -> Model:
    """Moves the inputs of gradient-checkpointed layers to pinned host memory between the forward and the backward.

    The device holds the input of one layer and the one that is being prefetched. The host holds layers x tokens x
    hidden size elements. Results are bit for bit the same. On the CPU, this function has no effect.

    Args:
        model: a transformers model, with or without adapters, after ``gradient_checkpointing_enable``.

    Returns:
        ``model``, changed in place.

    Raises:
        ValueError: no layer of the model is checkpointed.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=128))
        >>> model.gradient_checkpointing_enable()
        >>> model = qlora_ext.streaming.offload_checkpoints(model)
    """
    checkpointed = (m for m in model.modules() if getattr(m, "gradient_checkpointing", False))
    layers: list[Any] = [m for m in checkpointed if hasattr(m, "_gradient_checkpointing_func")]
    if not layers:
        raise ValueError("model: expected one with gradient checkpointing (gradient_checkpointing_enable), found none")
    offload = _Offload()
    for layer in layers:
        layer._gradient_checkpointing_func = functools.partial(_offloaded, layer._gradient_checkpointing_func, offload)
    return model


def _offloaded(checkpoint: Callable[..., Any], offload: _Offload, *args: Any, **kwargs: Any) -> Any:
    # Inside the layer, the checkpoint's own hooks apply, so these hooks see only the layer's inputs.
    with torch.autograd.graph.saved_tensors_hooks(offload.pack, offload.unpack):
        return checkpoint(*args, **kwargs)
