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

from .._internal.lending import Loan, PackedTensors, mark_lent
from .._internal.sizes import parse_size
from ..nn import Experts4bit, Packed4bit, layers_of, scale_names
from ..nn.model import Model
from .blocks import Block, Part, blocks_of
from .ring import CopyingFiller, Filler, ReadingFiller, Slot, StagingFiller
from .schedule import upcoming
from .sources import FileSource, PinnedSource

SOURCES = ("ram", "disk")
_FEWEST = 2  # slots: one is computed with while the other is filled


class Streaming:
    """The blocks of one model, and the ring's slots that they share; made by ``stream``.

    Several threads may use the model at once. An operator holds a lock while it uses borrowed weights, so no thread
    refills a slot that another thread reads.

    Attributes:
        blocks: what is streamed, in the order of the forward pass.
        device: that computes.
        slots: of the ring.
        fills: how many blocks have been requested since the start.
    """

    def __init__(
        self, model: nn.Module, blocks: list[Block], source: FileSource | PinnedSource, device: torch.device, slots: int
    ) -> None:
        self.blocks, self.device, self.fills = blocks, device, 0
        self._model, self._source = model, source
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
        self._shared_until = 0  # in fills: so long threads compete, and each keeps a slot
        self._apart: set[int] = set()  # blocks of which single experts are read, as they were when last used
        self._lock = threading.RLock()
        self._process = os.getpid()

    @property
    def block_bytes(self) -> int:
        """Bytes that all blocks take together, wherever they are."""
        return sum(block.nbytes for block in self.blocks)

    @property
    def ring_bytes(self) -> int:
        return sum(slot.memory.nbytes for slot in self.slots)

    def check(self) -> None:
        """Raises a FileError where the files that the blocks are read from have changed."""
        self._source.check()

    @contextlib.contextmanager
    def lend(self, index: int, module: Packed4bit, weight: str) -> Iterator[PackedTensors]:
        """The packed tensors of a weight, on ``device``, for the duration of the context. Other threads wait for its
        end.

        Raises:
            FileError: they cannot be read, or have changed. RuntimeError: this process was forked from the one that
                streams the model.
        """
        self._check_process()
        with self._lock:
            if isinstance(module, Experts4bit):
                self._apart.discard(index)
            slot = self._use(index)
            if slot.lent is None:
                with torch.inference_mode(False):
                    slot.lent = self._views(index, slot)
            yield slot.lent[module, weight]

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
            mark_lent(tensors[0], functools.partial(self.lend, index, module, weight))
        return views

    def _use(self, index: int) -> Slot:
        """The slot with block ``index`` in it, once more of those needed next are on their way."""
        held = self._held()
        slot = held.get(index)
        if index == self._at and slot is not None and slot.size >= self._size(index) and self._is_current(slot):
            self._filler.wait(slot)
            return slot
        if self._at is not None and self._at in held:
            self._filler.retire(held[self._at])
        self._at = index
        with torch.inference_mode(False), torch.no_grad():  # what is made here outlives the call
            return self._switch(index)

    def _switch(self, index: int) -> Slot:
        """Has block ``index`` come in and, behind it, those that are needed next."""
        # Recomputed activations ask within a backward pass, too.
        backward = torch._C._current_graph_task_id() != -1
        held = self._held()
        order = [*upcoming(index, len(self.blocks), backward, self._model.training)]
        wanted = [*dict.fromkeys([index, *self._of_other_threads(index, held), *order])][: len(self.slots)]
        kept = {held[number] for number in wanted if number in held}
        free = (slot for slot in self.slots if slot not in kept)
        for number in wanted:
            if number not in held:
                held[number] = next(free)
                self._fill(held[number], number)
            elif held[number].size < self._size(number) or (number == index and not self._is_current(held[number])):
                self._fill(held[number], number)
        try:
            self._filler.wait(held[index])
        except BaseException:
            for slot in self.slots:  # who asks again has it read again, and what was asked for with it
                slot.block = None
            raise
        return held[index]

    def _of_other_threads(self, index: int, held: Container[int]) -> list[int]:
        """The blocks in the ring that competing threads are using, the most recently used first.

        If the block that a thread has just used is gone, another thread has taken its slot. From then on, for two
        passes, the threads' own blocks get slots before any prefetch. Otherwise every operator would read the same
        blocks again.
        """
        thread = threading.get_ident()
        if self._last.pop(thread, None) == index and index not in held:
            self._shared_until = self.fills + 2 * len(self.blocks)
        others = [block for block in reversed(self._last.values()) if block in held]
        self._last[thread] = index
        while len(self._last) > len(self.slots):
            del self._last[next(iter(self._last))]
        return others if self.fills < self._shared_until else []

    def _held(self) -> dict[int, Slot]:
        return {self._numbers[id(slot.block)]: slot for slot in self.slots if slot.block is not None}

    @functools.cached_property
    def _numbers(self) -> dict[int, int]:
        return {id(block): number for number, block in enumerate(self.blocks)}

    def _fill(self, slot: Slot, number: int) -> None:
        block = self.blocks[number]
        slot.block, slot.size, slot.state, slot.lent = block, self._size(number), block.state, None
        torch.autograd.graph.increment_version(slot.memory)  # whoever has kept a tensor of it learns so in the backward
        if slot.size:
            self._filler.fill(slot, block, slot.size)
        self.fills += 1

    def _size(self, number: int) -> int:
        """Bytes of a block that come into the ring."""
        block = self.blocks[number]
        return block.shared if number in self._apart else block.nbytes

    @staticmethod
    def _is_current(slot: Slot) -> bool:
        """Whether the modules still have the tensors that were read into ``slot``; asked when they are used."""
        return slot.block is not None and slot.state == slot.block.state

    def read_experts(self, index: int, module: Packed4bit, weight: str, experts: list[int]) -> dict[str, Tensor]:
        """Copies of some experts' packed tensors, stacked, on ``device``, by the names of their attributes.

        From here on the block's stacks do not come into the ring, until they are asked for as a whole.
        """
        self._check_process()
        with self._lock:
            self._apart.add(index)
        names = (weight, *scale_names(weight).values())
        found: dict[str, Tensor] = {}
        for part in self._parts[module]:
            if part.name not in names:
                continue
            size = part.nbytes // part.shape[0]
            copy = torch.empty(len(experts), size, dtype=torch.uint8, device="cpu")
            for row, expert in zip(copy, experts, strict=True):
                self._source.read_part(part, row.numpy().data, expert * size)
            found[part.name] = copy.view(part.dtype).view(len(experts), *part.shape[1:]).to(self.device)
        return found

    def read(self, module: Packed4bit, weight: str) -> dict[str, Tensor]:
        """Copies of a weight's packed tensors on ``device``, which stay, by the names of their attributes."""
        names = (weight, *scale_names(weight).values())
        parts = (part for part in self._parts[module] if part.name in names)
        return {part.name: self.read_part(part).to(self.device) for part in parts}

    def read_part(self, part: Part) -> Tensor:
        """A copy of one tensor, on the host."""
        copy = torch.empty(part.nbytes, dtype=torch.uint8, device="cpu")
        self._source.read_part(part, copy.numpy().data)
        return copy.view(part.dtype).view(part.shape)

    def homes(self) -> dict[int, Part]:
        """All parts by the address at which their modules keep them."""
        return {part.home.data_ptr(): part for parts in self._parts.values() for part in parts}

    @functools.cached_property
    def _parts(self) -> dict[Packed4bit, list[Part]]:
        parts: dict[Packed4bit, list[Part]] = {}
        for block in self.blocks:
            for part in block.parts:
                parts.setdefault(part.module, []).append(part)
        return parts


class _Residency:
    """Provides the packed weights of a module in block ``index``; see ``nn.packed.Residency``."""

    def __init__(self, streaming: Streaming, index: int, module: Packed4bit) -> None:
        self.streaming, self._index, self._module = streaming, index, module

    @property
    def device(self) -> torch.device:
        return self.streaming.device

    def lend(self, weight: str) -> Loan:
        return self.streaming.lend(self._index, self._module, weight)

    def read(self, weight: str) -> dict[str, Tensor]:
        return self.streaming.read(self._module, weight)

    def read_experts(self, weight: str, experts: list[int]) -> dict[str, Tensor]:
        return self.streaming.read_experts(self._index, self._module, weight, experts)

    def check(self) -> None:
        self.streaming.check()

    def __deepcopy__(self, memo: Any) -> None:
        """A copy of the model is not streamed: its weights are its own."""

    def __reduce__(self) -> Any:
        return type(None), ()


class _LeftToStreaming:
    """The names of the streamed tensors, for DistributedDataParallel, which leaves them alone then.

    Every process reads its own, and on CUDA they are not where the rest of the model is. The names are found when they
    are asked for, since adapters rename modules, and are given once more as PEFT's wrapper has them, of which
    DistributedDataParallel asks the same and which passes the question on.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __iter__(self) -> Iterator[str]:
        for path, layer in layers_of(self.model):
            if isinstance(layer.residency, _Residency):
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
    return next((r.streaming for r in residencies if isinstance(r, _Residency)), None)


def state_of(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The items of ``model.state_dict()``, sorted by name. Streamed weights are read as they are asked for.

    Example:
        >>> [name for name, tensor in qlora_ext.streaming.state_of(nn.Linear(4, 4))]
        ['bias', 'weight']
    """
    streaming = streaming_of(model)
    homes = {} if streaming is None else streaming.homes()
    for name, tensor in sorted(model.state_dict().items()):
        part = homes.get(tensor.data_ptr()) if isinstance(tensor, Tensor) else None
        yield name, tensor if streaming is None or part is None else streaming.read_part(part)


def _make_resident(model: nn.Module, streamed: set[int], device: torch.device) -> int:
    """Moves all but the tensors ``streamed``, by id, to ``device``, out of mapped files; returns their bytes."""
    moved: dict[int, Tensor] = {}

    def own(tensor: Tensor) -> Tensor:
        key = tensor.data_ptr() if tensor.numel() else id(tensor)
        if key not in moved or moved[key].shape != tensor.shape:
            moved[key] = tensor.to(device, copy=True) if tensor.device != device or device.type == "cpu" else tensor
        return moved[key]

    for module in model.modules():
        for p in module._parameters.values():
            if p is not None and id(p) not in streamed and not p.is_meta:
                streamed.add(id(p))  # once, though several modules may have it
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

    The results are the same bits. Embeddings, heads, norms, biases and adapters stay on the device. The blocks, such as
    a decoder's layers, share a ring of buffers there. The next blocks are prefetched during the computation of one, in
    forward order, and in reverse in the backward. The fused operators read the ring directly. With gradient
    checkpointing a block is loaded once for its recomputation and backward. Call it before or after adding adapters.

    Several threads may use the model at once and get the same answers, but they take turns at each layer and share the
    ring, so nothing is prefetched; one pass after the other is faster.

    Args:
        model: with 4-bit layers, by ``QLoRAConfig`` or ``quantize_model``, whole on one device or on the CPU.
        resident: the memory that the model's weights may take on the device, such as "6GB" or a number of bytes. The
            ring has as many buffers as fit besides the weights that are not streamed, but at least two. None: two. The
            host's page cache may hold more of the files, and gives that memory up when others need it.
        source: where the blocks are stored. "ram": in pinned host memory (on the CPU they stay in place). "disk": in
            the safetensors files that the model was loaded from; none of them stay in memory.
        device: the computing device; by default that of the embeddings.

    Returns:
        ``model``, changed in place.

    Raises:
        TypeError: ``model`` is no ``nn.Module``. ValueError: it has no 4-bit layer or is streamed already, an argument
            is none of the above, the weights are not mapped from files for "disk", or they are sharded (FSDP2 has its
            own ``CPUOffloadPolicy``) or offloaded by accelerate.

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
    streamed = {id(getattr(part.module, part.name)) for block in blocks for part in block.parts}
    where = torch.device(device) if device is not None else _default_device(model, streamed)
    if where.type == "cuda" and where.index is None:
        where = torch.device("cuda", torch.cuda.current_device())
    if where.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected 'cpu' or 'cuda', got {where}")
    if source == "ram" and where.type == "cpu":
        return model  # they are at home where they are used
    files = FileSource(blocks) if source == "disk" else None
    rest = _make_resident(model, streamed, where)
    largest = max(block.nbytes for block in blocks)
    slots = _slots(allowed, rest, largest, len(blocks))
    streaming = Streaming(model, blocks, files or PinnedSource(blocks), where, slots)
    for i, block in enumerate(blocks):
        for module in block.modules:
            module.residency = _Residency(streaming, i, module)
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
    least = rest + _FEWEST * largest
    if allowed is not None and allowed < least:
        warnings.warn(
            f"resident: {allowed} bytes are less than the minimum of {least} ({rest} that are not streamed, and two "
            "blocks); keeping two blocks",
            stacklevel=3,
        )
    if allowed is None:
        return min(_FEWEST, blocks)
    return min(blocks, max(_FEWEST, (allowed - rest) // largest))
