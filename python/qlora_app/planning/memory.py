"""The memory of a training step by purpose, measured by running the step on fake tensors."""

from __future__ import annotations

import copy
import dataclasses
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlora_ext.dtype_names import AUTO, dtype_named
from qlora_ext.dtypes import computing_dtype_named, layers_dtype
from qlora_ext.form import Form
from qlora_ext.integrations.transformers.modules import empty_layer, packed_weights
from qlora_ext.nn import TiedLinear4bit, multiply_in_bfloat16, places_in, quantize_model, set_compute_dtype, tied_heads
from qlora_ext.streaming import chunk_mlp, dense_mlps
from qlora_ext.weight import Weight4bit

from ..models.lora_config import lora_config
from ..models.loss import head_loss

# Bytes of optimizer state per byte and per value of the trainable parameters. There are two moments, in the parameter's
# dtype, which is float32 except for modules that are trained in full. 8-bit moments have one scale per 256 values.
_STATE = {
    "adamw_torch": (2.0, 0.0),
    "adamw_8bit": (0.0, 2 + 2 * 4 / 256),
    "paged_adamw_8bit": (0.0, 0.0),
    "paged_adamw_32bit": (0.0, 0.0),
}
OPTIMIZERS = tuple(_STATE)
_SAVED_LIKE = {"paged_adamw_8bit": "adamw_8bit", "paged_adamw_32bit": "adamw_torch"}  # a file holds the state of both
_VALUES = "trainable values"  # the key of a count; all other keys are bytes
_SHARDED = ("base weights", "scales", "other weights", "adapters", "gradients", "optimizer state")
_UNSHARDED = ("activations", "logits", "workspace")
# The share of a layer's backward workspace that fragmentation adds to glibc's heap; docs/memory.md has the measurement.
# Returning freed memory to the system immediately would avoid it, but cost a fifth of the speed.
_RETAINED = 0.7
# Bytes that the process of a run allocates after planning: the Trainer, the plotting library, kernels created lazily.
_LATER_BYTES = 0.2e9
# Numbers of layers at which memory is measured. It is linear in the number of layers from the first on.
FEW, MORE = 4, 8


@dataclasses.dataclass(frozen=True)
class Job:
    """A planned run: the model's configuration, and the options of ``finetune`` that affect memory.

    Attributes:
        config: a configuration of transformers.
        target_modules: as in PEFT.
        dtype: bfloat16, float16, float32, or auto for the default of the device.
        devices: number of devices that share the weights with FSDP2.
        stream: where the frozen layers are stored: none, ram or disk.
        host: whether the run is on the CPU.
        form: of the 4-bit weights, if the checkpoint has them in another format; None for NF4 with ``block_size``.
        forms: instead of ``form``, the forms of those weights that are packed, by their names; others stay dense.
        teacher_bytes: of the weights of a teacher, which are on the device during the steps.

    The other fields are the options of ``finetune`` with the same names.

    Example:
        >>> job = qlora_app.planning.Job(qlora_app.planning.families.config("llama-3-8b"), seq_len=2048)
    """

    config: Any
    rank: int = 16
    target_modules: str | list[str] = "all-linear"
    seq_len: int = 512
    batch_size: int = 1
    dtype: str = AUTO
    optimizer: str = "adamw_torch"
    block_size: int = 64
    modules_to_save: tuple[str, ...] = ()
    grad_checkpointing: bool = False
    chunked_loss: bool = False
    devices: int = 1
    mlp_chunk: int = 0
    offload_checkpoints: bool = False
    stream: str = "none"
    host: bool = False
    form: Form | None = None
    forms: Mapping[str, Form] | None = None
    teacher_bytes: float = 0.0

    @property
    def compute(self) -> torch.dtype:
        """The dtype in which the model computes."""
        return computing_dtype_named(self.dtype, self.device)

    @property
    def device(self) -> torch.device:
        """The device that computes."""
        return torch.device("cpu" if self.host else "cuda")

    @property
    def stored(self) -> torch.dtype:
        """The dtype of the weights that are read. Large dense weights keep it (``nn.set_compute_dtype``)."""
        return dtype_named(self.dtype)


def process_bytes() -> float:
    """The memory of a run on the CPU in addition to its ``split``: Python and the libraries that are loaded now."""
    import psutil

    return float(psutil.Process().memory_info().rss) + _LATER_BYTES


def _stored(t: torch.Tensor) -> Iterable[torch.Tensor]:
    """The tensors that have the memory of ``t``."""
    return t.tensors.values() if isinstance(t, Weight4bit) else (t,)


class _Live(TorchDispatchMode):
    """Counts the bytes of all live storages by the phase that created them, and records the split at the peaks.

    During the backward, activations are freed and gradients are created, layer by layer. The peak is at its beginning
    or its end, depending on the number of layers, so two peaks are recorded: one in each half.
    """

    def __init__(self, parameters: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.phase = "activations"
        self.bytes: dict[str, int] = {}
        self.peaks: tuple[dict[str, int], dict[str, int]] = ({}, {})
        self._middle, self._gradients = parameters // 2, 0
        self._storages: dict[int, tuple[Any, str, int]] = {}
        self._ignored: set[int] = set()

    def ignore(self, tensors: Any) -> None:
        """Excludes storages that exist before the step, because they are counted elsewhere."""
        self._ignored |= {part.untyped_storage()._cdata for t in tensors for part in _stored(t)}

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages or key in self._ignored:
            return
        self._storages[key] = (weakref.ref(storage, lambda _: self._drop(key)), self.phase, storage.nbytes())
        self.bytes[self.phase] = self.bytes.get(self.phase, 0) + storage.nbytes()
        peak = self.peaks[self._gradients > self._middle]
        if sum(self.bytes.values()) > sum(peak.values()):
            peak.update(self.bytes)

    def _drop(self, key: int) -> None:
        _, phase, size = self._storages.pop(key)
        self.bytes[phase] -= size

    def is_gradient(self, parameter: torch.Tensor) -> None:
        """Counts a parameter's gradient as "gradients" instead of in the phase that created it."""
        assert parameter.grad is not None
        self._gradients += 1
        key = parameter.grad.untyped_storage()._cdata
        if key in self._storages:
            reference, phase, size = self._storages[key]
            self._storages[key] = (reference, "gradients", size)
            self.bytes[phase] -= size
            self.bytes["gradients"] = self.bytes.get("gradients", 0) + size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                for part in _stored(leaf):
                    self._add(part)
        return out


def build(job: Job, layers: int) -> Any:
    """The 4-bit model with adapters and that many layers, on the meta device."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(job.config)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    config.use_cache = False
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=job.stored)
        if job.forms is not None:
            _take_forms(model, job.forms, job.compute)
        else:
            quantize_model(model, **(job.form or Form(block_size=job.block_size)).keywords)
        if job.stored != job.compute:
            set_compute_dtype(model, job.compute)
        if layers_dtype(job.stored, job.compute, job.device) != job.compute:
            multiply_in_bfloat16(model)
        config = lora_config(model, job.rank, job.target_modules, list(job.modules_to_save))
        model = get_peft_model(model, config)
    if job.grad_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if job.mlp_chunk and dense_mlps(model):
        chunk_mlp(model, job.mlp_chunk)
    return model.train()


def _take_forms(model: Any, forms: Mapping[str, Form], compute_dtype: torch.dtype) -> None:
    """Replaces the modules whose weights have one of ``forms`` by empty 4-bit ones."""
    at = places_in(model)
    heads: dict[Any, Any] = {**tied_heads(model)}
    for module, places in at.items():
        name = places[0][2]
        found = {weight: forms.get(f"{name}.{weight}") for weight in packed_weights(module)}
        if found and all(found.values()):
            layer: Any = empty_layer(module, compute_dtype, Form())
            layer.take_forms(found)
            new: dict[Any, Any] = {module: layer}
            new |= {head: TiedLinear4bit(layer, head.bias) for head in heads.get(module, ())}
            for old, replacement in new.items():
                for parent, child, _ in at[old]:
                    setattr(parent, child, replacement)


def trains_head(job: Job) -> bool:
    """Whether ``modules_to_save`` includes the output head, whose gradient needs all logits at once."""
    if not job.modules_to_save:
        return False
    head = build(job, FEW).get_base_model().get_output_embeddings()
    return head is not None and any(parameter.requires_grad for parameter in head.parameters())


def _static(model: Any) -> dict[str, float]:
    bytes_: dict[str, float] = dict.fromkeys(("base weights", "scales", "other weights", "adapters", _VALUES), 0.0)
    for tensor in {id(t): t for t in (*model.parameters(), *model.buffers())}.values():
        if isinstance(tensor, Weight4bit):
            bytes_["base weights"] += tensor.packed.nbytes
            bytes_["scales"] += tensor.nbytes - tensor.packed.nbytes
        else:
            bytes_["adapters" if tensor.requires_grad else "other weights"] += tensor.nbytes
            bytes_[_VALUES] += tensor.numel() if tensor.requires_grad else 0
    return bytes_


def _step(model: Any, job: Job) -> tuple[dict[str, int], dict[str, int]]:
    """The splits at the two peaks of one forward and backward pass, without the parameters."""
    trainable = sum(parameter.requires_grad for parameter in model.parameters())
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        ids = torch.zeros((job.batch_size, job.seq_len), dtype=torch.int64, device="cpu")
        tracker = _Live(trainable)
        tracker.ignore([*model.parameters(), *model.buffers(), ids])
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(tracker.is_gradient)
        with tracker:
            base = model.get_base_model()
            hidden = base.base_model(input_ids=ids, use_cache=False).last_hidden_state
            tracker.phase = "logits"
            loss = head_loss(base.get_output_embeddings(), hidden.flatten(0, 1), ids.flatten(), job.chunked_loss)
            del hidden
            tracker.phase = "workspace"
            loss.backward()
    return tracker.peaks


# A search asks for jobs that differ only in fields without an effect on the step.
_measured: dict[tuple[str, tuple[torch.dtype, torch.dtype], int], list[dict[str, float]]] = {}


def _measure(job: Job, layers: int) -> list[dict[str, float]]:
    same = dataclasses.replace(job, dtype="", host=False, optimizer="", devices=1, offload_checkpoints=False, stream="",
                               teacher_bytes=0.0)  # fmt: skip
    key = repr(same), (job.stored, job.compute), layers
    if key not in _measured:
        model = build(job, layers)
        static = _static(model)
        _measured[key] = [{**static, **peak} for peak in _step(model, job)]
    return _measured[key]


def _line(few: dict[str, float], more: dict[str, float], layers: int) -> dict[str, float]:
    ahead = (layers - FEW) / (MORE - FEW)
    return {key: few.get(key, 0) + (more.get(key, 0) - few.get(key, 0)) * ahead for key in {**few, **more}}


def static_split(job: Job) -> dict[str, float]:
    """The split before the first step: weights, adapters and optimizer state."""
    layers = job.config.get_text_config().num_hidden_layers
    if layers <= MORE or job.forms is not None:
        return split(job, [_static(build(job, layers))])
    return split(job, [_line(_static(build(job, FEW)), _static(build(job, MORE)), layers)])


def peaks(job: Job) -> list[dict[str, float]]:
    """The splits at the two peaks of a training step on one device, without optimizer state."""
    layers = job.config.get_text_config().num_hidden_layers
    if layers <= MORE:
        return _measure(job, layers)
    found = [_line(*pair, layers) for pair in zip(_measure(job, FEW), _measure(job, MORE), strict=True)]
    if job.forms is None:
        return found
    static = _static(build(job, layers))  # the layers of a file may differ in form
    return [{**top, **static} for top in found]


def checkpoint_bytes(job: Job) -> float:
    """Bytes of checkpointed layer inputs that ``offload_checkpoints`` moves to the host: all layers but two."""
    text = job.config.get_text_config()
    tokens = job.batch_size * job.seq_len
    return float(max(text.num_hidden_layers - 2, 0) * tokens * text.hidden_size * job.compute.itemsize)


def _offloaded(job: Job, activations: float) -> float:
    """The activations that remain on the device with ``offload_checkpoints``: at least two layer inputs."""
    layers = job.config.get_text_config().num_hidden_layers
    two = 2 * checkpoint_bytes(job) / max(layers - 2, 1)
    left: float = max(activations - checkpoint_bytes(job), min(activations, two))
    return left


def split(job: Job, measured: list[dict[str, float]]) -> dict[str, float]:
    """Bytes per device, by purpose, at the peak of a training step.

    Weights, adapters, gradients and optimizer state are divided by ``devices`` (FSDP2 shards them); the batch is that
    of one device. All tokens count as learnt. On the CPU, the overhead of its allocator is included (``malloc``). The
    memory of the CUDA context and of Python (``process_bytes``) is not.

    Args:
        measured: the ``peaks`` of the job, or of one that differs only in its optimizer and number of devices.
    """
    splits = []
    for top in measured:
        parts = {key: top.get(key, 0.0) / (job.devices if key in _SHARDED else 1) for key in (*_SHARDED, *_UNSHARDED)}
        per_byte, per_value = _STATE[job.optimizer]
        state = (top["adapters"] * per_byte + top.get(_VALUES, 0.0) * per_value) / job.devices
        if job.grad_checkpointing and job.offload_checkpoints:
            parts["activations"] = _offloaded(job, parts["activations"])
        parts["optimizer state"] = state
        if job.teacher_bytes:
            parts["teacher"] = job.teacher_bytes
        if job.host:
            parts["malloc"] = _RETAINED * parts["workspace"]
        splits.append(parts)
    return max(splits, key=lambda parts: sum(parts.values()))


def disk_bytes(job: Job, measured: list[dict[str, float]]) -> float:
    """Bytes on disk of a finished run: its adapter, and two checkpoints, which also have the optimizer's state.

    Args:
        measured: the ``peaks`` of the job.
    """
    per_byte, per_value = _STATE[_SAVED_LIKE.get(job.optimizer, job.optimizer)]
    adapter = measured[0]["adapters"]
    return 3 * adapter + 2 * (adapter * per_byte + measured[0].get(_VALUES, 0.0) * per_value)


def peak_memory(job: Job) -> dict[str, float]:
    """Bytes per device, by purpose, at the peak of a training step.

    The memory of Python and of the CUDA context is not included. For a run that streams its layers, pass the result to
    ``place``.

    Example:
        >>> planning = qlora_app.planning
        >>> config = planning.families.config_of_sizes("hidden=64,intermediate=128,layers=2,heads=4,vocab=512")
        >>> parts = planning.peak_memory(planning.Job(config, seq_len=128))
        >>> parts["base weights"] < parts["activations"]
        True
    """
    return split(job, peaks(job))
