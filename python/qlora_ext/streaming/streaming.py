"""``stream``: loads the frozen base of a model block by block, from host memory or from its files."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import warnings
from collections.abc import Container, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .._internal.shared_buffers import PackedTensors, set_owner
from ..nn import Experts4bit, Packed4bit, layers_of
from ..nn.model import Model
from ..sizes import parse_size
from .blocks import Block, Part, blocks_of
from .ring import CopyingFiller, Filler, ReadingFiller, Slot, StagingFiller
from .schedule import upcoming
from .sources import FileSource, PinnedSource

SOURCES = ("ram", "disk")
_MIN_SLOTS = 2  # double buffering: one slot is used while the other is filled


class Streaming:
    """The streaming state of one model: its blocks, and the ring of slots that they share. Created by ``stream``.

    It is the ``residency`` of the model's streamed modules, see ``nn.residency.Residency``.

    Several threads may use the model at once. An operator holds a lock while it uses weights on loan, so no thread
    refills a slot that another thread reads.

    Attributes:
        blocks: the streamed blocks, in the order of the forward pass.
        device: the device that computes.
        slots: the buffers of the ring.
        fills: number of blocks that were requested since the start.
    """

    def __init__(
        self, model: nn.Module, blocks: list[Block], source: FileSource | PinnedSource, device: torch.device, slots: int
    ) -> None:
        self.blocks, self.device, self.fills = blocks, device, 0
        self._model, self._source = model, source
        self._index = {module: i for i, block in enumerate(blocks) for module in block.modules}
        size = max(block.nbytes for block in blocks)
        with torch.inference_mode(False):
            self.slots = [Slot(torch.empty(size, dtype=torch.uint8, device=device)) for _ in range(slots)]
        self._filler: Filler
        if isinstance(source, PinnedSource):
            self._filler = CopyingFiller(source, device)
        elif device.type == "cuda":
            self._filler = StagingFiller(source, device, size)
        else:
            self._filler = ReadingFiller(source)
        self._at: int | None = None
        self._last: dict[int, int] = {}  # the block that each thread used last; the latest thread comes last
        self._shared_until = 0  # while ``fills`` is below it, threads compete, and each keeps its slot
        self._sparse_blocks: set[int] = set()  # blocks whose last use needed single experts only
        self._lock = threading.RLock()
        self._process = os.getpid()

    @property
    def block_bytes(self) -> int:
        """The total size of all blocks."""
        return sum(block.nbytes for block in self.blocks)

    @property
    def ring_bytes(self) -> int:
        """The size of the ring on the device."""
        return sum(slot.memory.nbytes for slot in self.slots)

    def check(self) -> None:
        """Raises a FileError if the files of the blocks have changed."""
        self._source.check()

    @contextlib.contextmanager
    def lend(self, module: Packed4bit, weight: str) -> Iterator[PackedTensors]:
        """The packed tensors of a weight on ``device``, valid inside the ``with`` statement. Other threads wait.

        Raises:
            FileError: the files cannot be read, or have changed. RuntimeError: this process was forked from the one
                that streams the model.
        """
        self._check_process()
        index = self._index[module]
        with self._lock:
            if isinstance(module, Experts4bit):
                self._sparse_blocks.discard(index)
            slot = self._use(index)
            if slot.views is None:
                with torch.inference_mode(False):
                    slot.views = self._views(index, slot)
            yield slot.views[module, weight]

    def _check_process(self) -> None:
        # A forked process lacks the reading thread, and the thread that may have held the lock.
        if os.getpid() != self._process:
            raise RuntimeError(
                "a streamed model was used in a process forked from the one that streams it; load it in the new "
                "process, as multiprocessing's start method 'spawn' does"
            )

    def _views(self, index: int, slot: Slot) -> dict[tuple[Packed4bit, str], PackedTensors]:
        views = self.blocks[index].views(slot.memory)
        for (module, weight), tensors in views.items():
            set_owner(tensors[0], functools.partial(self.lend, module, weight))
        return views

    def _use(self, index: int) -> Slot:
        """The slot that contains block ``index``. Requests the blocks that are needed next."""
        resident = self._resident()
        slot = resident.get(index)
        if index == self._at and slot is not None and slot.size >= self._size(index) and self._is_current(slot):
            self._filler.wait(slot)
            return slot
        if self._at is not None and self._at in resident:
            self._filler.retire(resident[self._at])
        self._at = index
        with torch.inference_mode(False), torch.no_grad():  # tensors made here outlive the caller's inference mode
            return self._switch(index)

    def _switch(self, index: int) -> Slot:
        """Requests block ``index`` and, after it, the blocks that are needed next."""
        # True also for the recomputation of activations.
        backward = torch._C._current_graph_task_id() != -1
        resident = self._resident()
        order = [*upcoming(index, len(self.blocks), backward, self._model.training)]
        wanted = [*dict.fromkeys([index, *self._of_other_threads(index, resident), *order])][: len(self.slots)]
        needed_slots = {resident[number] for number in wanted if number in resident}
        free = (slot for slot in self.slots if slot not in needed_slots)
        for number in wanted:
            if number not in resident:
                resident[number] = next(free)
                self._fill(resident[number], number)
            elif resident[number].size < self._size(number) or (
                number == index and not self._is_current(resident[number])
            ):
                self._fill(resident[number], number)
        try:
            self._filler.wait(resident[index])
        except BaseException:
            for slot in self.slots:  # the next use reads all requested blocks again
                slot.block = None
            raise
        return resident[index]

    def _of_other_threads(self, index: int, resident: Container[int]) -> list[int]:
        """The blocks in the ring that competing threads are using, the most recently used first.

        If the block that a thread has just used is gone, another thread has taken its slot. From then on, for two
        passes, the threads' own blocks get slots before any prefetch. Otherwise every operator would read the same
        blocks again.
        """
        thread = threading.get_ident()
        if self._last.pop(thread, None) == index and index not in resident:
            self._shared_until = self.fills + 2 * len(self.blocks)
        others = [block for block in reversed(self._last.values()) if block in resident]
        self._last[thread] = index
        while len(self._last) > len(self.slots):
            del self._last[next(iter(self._last))]
        return others if self.fills < self._shared_until else []

    def _resident(self) -> dict[int, Slot]:
        return {self._numbers[id(slot.block)]: slot for slot in self.slots if slot.block is not None}

    @functools.cached_property
    def _numbers(self) -> dict[int, int]:
        return {id(block): number for number, block in enumerate(self.blocks)}

    def _fill(self, slot: Slot, number: int) -> None:
        block = self.blocks[number]
        slot.block, slot.size, slot.state, slot.views = block, self._size(number), block.state, None
        torch.autograd.graph.increment_version(slot.memory)  # a backward that saved a view of it then raises an error
        if slot.size:
            self._filler.fill(slot, block, slot.size)
        self.fills += 1

    def _size(self, number: int) -> int:
        """The number of bytes of a block that are loaded into the ring."""
        block = self.blocks[number]
        return block.shared if number in self._sparse_blocks else block.nbytes

    @staticmethod
    def _is_current(slot: Slot) -> bool:
        """Whether the modules' tensors have not changed since they were read into ``slot``."""
        return slot.block is not None and slot.state == slot.block.state

    def read_experts(self, module: Packed4bit, weight: str, experts: list[int]) -> PackedTensors:
        """Stacked copies of some experts' packed tensors on ``device``.

        From now on, the block's stacks of experts are not loaded into the ring, until a use needs all experts.
        """
        self._check_process()
        with self._lock:
            self._sparse_blocks.add(self._index[module])
        found: dict[str, Tensor] = {}
        for part in self._parts_of(module, weight):
            size = part.nbytes // part.shape[0]
            copy = torch.empty(len(experts), size, dtype=torch.uint8, device="cpu")
            for row, expert in zip(copy, experts, strict=True):
                self._source.read_part(part, row.numpy().data, expert * size)
            found[part.tensor] = copy.view(part.dtype).view(len(experts), *part.shape[1:]).to(self.device)
        return PackedTensors(**found)

    def read(self, module: Packed4bit, weight: str) -> PackedTensors:
        """Permanent copies of a weight's packed tensors on ``device``."""
        parts = self._parts_of(module, weight)
        return PackedTensors(**{part.tensor: self.read_part(part).to(self.device) for part in parts})

    def _parts_of(self, module: Packed4bit, weight: str) -> list[Part]:
        return [part for part in self._parts[module] if part.weight == weight]

    def read_part(self, part: Part) -> Tensor:
        """A copy of one tensor, on the host."""
        copy = torch.empty(part.nbytes, dtype=torch.uint8, device="cpu")
        self._source.read_part(part, copy.numpy().data)
        return copy.view(part.dtype).view(part.shape)

    def parts_by_address(self) -> dict[int, Part]:
        """All parts, by the address of their modules' tensors."""
        return {part.host_tensor.data_ptr(): part for parts in self._parts.values() for part in parts}

    @functools.cached_property
    def _parts(self) -> dict[Packed4bit, list[Part]]:
        parts: dict[Packed4bit, list[Part]] = {}
        for block in self.blocks:
            for part in block.parts:
                parts.setdefault(part.module, []).append(part)
        return parts

    def __deepcopy__(self, memo: Any) -> None:
        """None: a copy of the model has its own weights and is not streamed."""

    def __reduce__(self) -> Any:
        return type(None), ()


class _LeftToStreaming:
    """The names of the streamed tensors, which DistributedDataParallel must ignore.

    Each process reads its own weights, and on CUDA they are on another device than the rest of the model. The names are
    determined at each iteration, because adapters rename modules. Each name is also listed with the prefix of PEFT's
    wrapper, because the wrapper forwards the attribute to the model inside it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __iter__(self) -> Iterator[str]:
        for path, layer in layers_of(self.model):
            if isinstance(layer.residency, Streaming):
                for tensor in layer.packed_state():
                    name = f"{path}.{tensor}" if path else tensor
                    yield from (name, f"base_model.model.{name}")


def streaming_of(model: nn.Module) -> Streaming | None:
    """The streaming state of ``model``, or of the model that it wraps; None if it is not streamed.

    Example:
        >>> print(qlora_ext.streaming.streaming_of(nn.Linear(4, 4)))
        None
    """
    residencies = (layer.residency for _, layer in layers_of(model))
    return next((r for r in residencies if isinstance(r, Streaming)), None)


def state_of(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The items of ``model.state_dict()``, sorted by name. Streamed weights are read one at a time.

    Example:
        >>> [name for name, tensor in qlora_ext.streaming.state_of(nn.Linear(4, 4))]
        ['bias', 'weight']
    """
    streaming = streaming_of(model)
    parts_by_address = {} if streaming is None else streaming.parts_by_address()
    for name, tensor in sorted(model.state_dict().items()):
        part = parts_by_address.get(tensor.data_ptr()) if isinstance(tensor, Tensor) else None
        yield name, tensor if streaming is None or part is None else streaming.read_part(part)


def _make_resident(model: nn.Module, streamed: set[int], device: torch.device) -> int:
    """Copies all tensors except ``streamed`` (ids) to ``device`` and out of mapped files. Returns their size."""
    moved: dict[int, Tensor] = {}

    def own(tensor: Tensor) -> Tensor:
        key = tensor.data_ptr() if tensor.numel() else id(tensor)
        if key not in moved or moved[key].shape != tensor.shape:
            moved[key] = tensor.to(device, copy=True) if tensor.device != device or device.type == "cpu" else tensor
        return moved[key]

    for module in model.modules():
        for p in module._parameters.values():
            if p is not None and id(p) not in streamed and not p.is_meta:
                streamed.add(id(p))  # once, even if several modules share it
                p.data = own(p.data)
        for name, buffer in module._buffers.items():
            if buffer is not None and id(buffer) not in streamed and not buffer.is_meta:
                module._buffers[name] = own(buffer)
    return sum(tensor.nbytes for tensor in moved.values())


def _default_device(model: nn.Module, streamed: set[int]) -> torch.device:
    others = (p.device for p in model.parameters() if id(p) not in streamed)
    return next(others, torch.device("cpu"))


def stream(
    model: Model, resident: str | int | None = None, source: str = "ram", device: torch.device | str | None = None
) -> Model:
    """Keeps the frozen 4-bit weights of a model's blocks off the device, and loads each just before it is used.

    Results are bit for bit the same. Embeddings, heads, norms, biases and adapters stay on the device. The blocks, such
    as decoder layers, share a ring of buffers there. While one block computes, the next ones are prefetched: in forward
    order, and in reverse order during the backward. The fused operators read the ring directly. With gradient
    checkpointing, a block is loaded once for its recomputation and backward. Call this before or after adding adapters.

    Several threads may use the model at once. They take turns at each layer and share the ring, so nothing is
    prefetched; running one pass after the other is faster.

    Args:
        model: a model with 4-bit layers, from ``QLoRAConfig`` or ``quantize_model``, entirely on one device.
        resident: the memory that the model's weights may use on the device, such as "6GB" or a number of bytes. The
            ring has as many buffers as fit in addition to the weights that are not streamed, but at least two. None
            means two. The host's page cache may hold more of the files, and frees that memory when others need it.
        source: the location of the blocks. "ram": pinned host memory (on the CPU, the model does not change). "disk":
            the safetensors files from which the model was loaded; they are not kept in memory.
        device: the computing device; the default is the device of the embeddings.

    Returns:
        ``model``, changed in place.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``. ValueError: it has no 4-bit layer or is already streamed; an
            argument is invalid; with "disk", the weights are not mapped from files; or the weights are sharded (FSDP2
            has its own ``CPUOffloadPolicy``) or offloaded by accelerate.

    Example:
        >>> import tempfile
        >>> from transformers import AutoModelForCausalLM
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
        >>> model = qlora_ext.quantize_model(LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=128)))
        >>> directory = tempfile.mkdtemp()
        >>> model.save_pretrained(directory)
        >>> model = AutoModelForCausalLM.from_pretrained(directory, device_map="cpu")
        >>> model = qlora_ext.streaming.stream(model, source="disk")
        >>> model(torch.randint(0, 128, (1, 16))).logits.shape
        torch.Size([1, 16, 128])
        >>> streaming = qlora_ext.streaming.streaming_of(model)
        >>> len(streaming.blocks), len(streaming.slots)
        (2, 2)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if source not in SOURCES:
        raise ValueError(f"source: expected 'ram' or 'disk', got {source!r}")
    allowed = None if resident is None else parse_size("resident", resident)
    if streaming_of(model) is not None:
        raise ValueError("model: expected one that is not streamed, got one that already is")
    blocks = blocks_of(model)
    if not blocks:
        raise ValueError("model: expected 4-bit layers (see qlora_ext.quantize_model), found none")
    _refuse_others(model)
    streamed = {id(part.module._parameters[part.weight]) for block in blocks for part in block.parts}
    where = torch.device(device) if device is not None else _default_device(model, streamed)
    if where.type == "cuda" and where.index is None:
        where = torch.device("cuda", torch.cuda.current_device())
    if where.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected 'cpu' or 'cuda', got {where}")
    if source == "ram" and where.type == "cpu":
        return model  # the blocks are already in the memory where they are used
    files = FileSource(blocks) if source == "disk" else None
    rest = _make_resident(model, streamed, where)
    largest = max(block.nbytes for block in blocks)
    slots = _slots(allowed, rest, largest, len(blocks))
    streaming = Streaming(model, blocks, files or PinnedSource(blocks), where, slots)
    for block in blocks:
        for module in block.modules:
            module.residency = streaming
    vars(model)["_ddp_params_and_buffers_to_ignore"] = _LeftToStreaming(model)
    return model


def _refuse_others(model: nn.Module) -> None:
    for name in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() in ("1", "true", "yes", "on"):  # by `accelerate launch`
            raise ValueError(f"stream: {name} is in use, which also keeps weights in host memory; use one of the two")
    for name, layer in layers_of(model):
        if layer.is_sharded:
            raise ValueError(
                f"model: {name} is sharded by FSDP2, which can keep weights in host memory itself "
                "(fully_shard(offload_policy=CPUOffloadPolicy())); stream an unsharded model"
            )
        if hasattr(layer, "_hf_hook"):
            raise ValueError(
                f"model: {name} is dispatched by accelerate (device_map over several devices); load it on the CPU"
            )
        if any(t.is_meta for t in layer.packed_state().values()):
            raise ValueError(f"model: {name} is on the meta device; load its weights first")


def _slots(allowed: int | None, rest: int, largest: int, blocks: int) -> int:
    least = rest + _MIN_SLOTS * largest
    if allowed is not None and allowed < least:
        warnings.warn(
            f"resident: {allowed} bytes are less than the minimum of {least} ({rest} that are not streamed, and two "
            "blocks); keeping two blocks",
            stacklevel=3,
        )
    if allowed is None:
        return min(_MIN_SLOTS, blocks)
    return min(blocks, max(_MIN_SLOTS, (allowed - rest) // largest))
