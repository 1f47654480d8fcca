"""What the ranks of test_distributed.py run: the code of a user, who knows torch.distributed and no helper of ours."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, LlamaConfig

from qlora_ext.nn import SCALES, Linear4bit, quantize_model

BATCH = 4  # rows in all, whatever the number of processes


@dataclasses.dataclass(frozen=True)
class Setup:
    """A model and the way it is trained."""

    dtype: torch.dtype = torch.float32
    double_quant: bool = True
    tied: bool = False
    quantized_head: bool = False
    checkpointing: bool = False
    reshard_after_forward: bool | int | None = None
    mixed_precision: torch.dtype | None = None
    cpu_offload: bool = False
    mesh: tuple[int, ...] | None = None
    seed: int = 0


def make_model(setup: Setup) -> Any:
    torch.manual_seed(setup.seed)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=90,  # no multiple of 4 processes, nor of a block
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=99,
        max_position_embeddings=64,
        attention_bias=True,
        tie_word_embeddings=setup.tied,
        use_cache=False,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=setup.dtype)
    quantize_model(model, skip=() if setup.quantized_head else ("lm_head",), double_quant=setup.double_quant)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    if setup.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    return model.train()


def shard(model: Any, setup: Setup) -> None:
    options: dict[str, Any] = {}
    if setup.reshard_after_forward is not None:
        options["reshard_after_forward"] = setup.reshard_after_forward
    if setup.mixed_precision is not None:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=setup.mixed_precision, reduce_dtype=torch.float32)
    if setup.cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    if setup.mesh is not None:
        names = ("replicate", "shard")[-len(setup.mesh) :]
        options["mesh"] = init_device_mesh("cpu", setup.mesh, mesh_dim_names=names)
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)


def packed_state(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{path}.{name}": getattr(layer, name)
        for path, layer in model.named_modules()
        if isinstance(layer, Linear4bit)
        for name in ("weight", *SCALES)
        if getattr(layer, name) is not None
    }


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def digest(tensors: dict[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name, t in sorted(tensors.items()):
        t = whole(t.detach())
        found.update(f"{name} {t.dtype} {list(t.shape)}".encode())
        found.update(t.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def adapters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def local_bytes(tensors: dict[str, Tensor]) -> int:
    return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors.values())


def check_computed_on(model: nn.Module, expected: dict[str, Tensor]) -> None:
    """From here on every 4-bit layer asserts that it computes on the very bits of ``expected``."""

    def check(layer: nn.Module, path: str) -> None:
        for name in ("weight", *SCALES):
            t, bits = getattr(layer, name), expected.get(f"{path}.{name}")
            assert (t is None) == (bits is None), f"{path}.{name}"
            if t is not None:
                assert t.dtype == bits.dtype, f"{path}.{name}: {t.dtype}"
                assert torch.equal(t.detach(), bits), f"{path}.{name}"

    for path, layer in model.named_modules():
        if isinstance(layer, Linear4bit):
            layer.register_forward_pre_hook(lambda module, _, path=path: check(module, path))


def train(model: nn.Module, rank: int, world: int, steps: int = 3) -> list[float]:
    """Losses over the whole batch of which this rank sees its share."""
    ids = torch.randint(0, 99, (BATCH, 12), generator=torch.Generator().manual_seed(1))
    ids = ids.chunk(world)[rank]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        optimizer.step()
        optimizer.zero_grad()
        loss = loss.detach().float()
        if world > 1:
            dist.all_reduce(loss, dist.ReduceOp.AVG if dist.get_backend() == "nccl" else dist.ReduceOp.SUM)
            loss = loss / world
        losses.append(loss.item())
    return losses


def fsdp2(setup: Setup) -> dict[str, Any]:
    rank, world = dist.get_rank(), dist.get_world_size()
    model = make_model(setup)
    before = copy.deepcopy(packed_state(model))
    total = local_bytes(before)
    before_digest = digest(before)
    shard(model, setup)
    packed = packed_state(model)
    held = {kind: local_bytes({n: t for n, t in packed.items() if n.endswith(kind)}) for kind in ("weight", "absmax")}
    gathered = digest(packed)
    check_computed_on(model, before)
    losses = train(model, rank, world)
    return {
        "losses": losses,
        "before": before_digest,
        "gathered": gathered,
        "after": digest(packed_state(model)),
        "held": held,
        "total": total,
        "adapters": digest(adapters(model)),
    }
