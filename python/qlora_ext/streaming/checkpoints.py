"""Checkpointed layer inputs kept in host memory: what grows with the number of layers leaves the device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..nn.model import Model


class _Kept:
    """A tensor in pinned host memory, on its way there or back."""

    def __init__(self, device: torch.device, tensor: Tensor) -> None:
        self.device, self.host = device, tensor
        self.back: Tensor | None = None  # on the device again, with ``arrived``
        self.arrived: Any = None


class _Offload:
    """Saved-tensor hooks that keep what is saved on the host, by copies on a stream of their own.

    A backward pass asks in the reverse order: while one input is used, the one before it is fetched.
    """

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._kept: list[_Kept] = []

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
        tensor.record_stream(stream)  # whose memory is not used for anything else before
        kept = _Kept(tensor.device, host)
        self._kept.append(kept)
        return kept

    def unpack(self, kept: Any) -> Tensor:
        if not isinstance(kept, _Kept):
            tensor: Tensor = kept
            return tensor
        if kept in self._kept:
            del self._kept[self._kept.index(kept) :]  # and what a pass without a backward has left behind it
        self._fetch(kept)
        compute = torch.cuda.current_stream(kept.device)
        compute.wait_event(kept.arrived)
        back = kept.back
        assert back is not None
        back.record_stream(compute)
        kept.back = None
        if self._kept:
            self._fetch(self._kept[-1])
        return back

    def _fetch(self, kept: _Kept) -> None:
        if kept.back is not None:
            return
        stream = self._stream(kept.device)
        with torch.cuda.stream(stream):
            kept.back = kept.host.to(kept.device, non_blocking=True)
            kept.arrived = stream.record_event()


def offload_checkpoints(model: Model) -> Model:
    """Moves the inputs of gradient-checkpointed layers to pinned host memory between the forward and the backward.

    The device holds one layer's input and the one that is being prefetched; the host holds layers x tokens x hidden
    size elements. The results are the same bits. On the CPU nothing changes.

    Args:
        model: of transformers, perhaps with adapters, after ``gradient_checkpointing_enable``.

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
    # Within the layer the checkpoint has hooks of its own: what comes to these is what goes into the layer.
    with torch.autograd.graph.saved_tensors_hooks(offload.pack, offload.unpack):
        return checkpoint(*args, **kwargs)
