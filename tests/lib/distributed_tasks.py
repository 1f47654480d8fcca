"""The tasks of the ranks in test_distributed.py, written as a user would: with torch.distributed alone."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import os
import pathlib
import sys
import time
import warnings
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

from qlora_ext import QLoRAConfig
from qlora_ext.fingerprint import fingerprint
from qlora_ext.form import Form
from qlora_ext.integrations.peft import check_base, set_merge_aware, write_base
from qlora_ext.nn import Linear4bit, Packed4bit, layers_of, quantize_model
from qlora_ext.streaming import stream

sys.path.append(str(pathlib.Path(__file__).parents[2] / "examples"))
from finetune_fsdp2 import train_on

BATCH = 4  # total rows, for any number of processes


@dataclasses.dataclass(frozen=True)
class Setup:
    """A model and the options of its training.

    Attributes:
        merge_aware: the format for which it is trained merge-aware.
        checkpoint: of the model, in a 4-bit format of another library: a directory, or a GGUF file.
    """

    dtype: torch.dtype = torch.float32
    double_quant: bool = True
    tied: bool = False
    quantized_head: bool = False
    experts: bool = False
    embeddings: bool = False
    checkpointing: bool = False
    reshard_after_forward: bool | int | None = None
    mixed_precision: torch.dtype | None = None
    cpu_offload: bool = False
    mesh: tuple[int, ...] | None = None
    dropout: float = 0.0
    seed: int = 0
    merge_aware: str = ""
    checkpoint: pathlib.Path | None = None


def read_model(setup: Setup) -> Any:
    """The model of ``setup.checkpoint``."""
    assert setup.checkpoint is not None
    is_file = setup.checkpoint.is_file()
    where = setup.checkpoint.parent if is_file else setup.checkpoint
    model = AutoModelForCausalLM.from_pretrained(
        where,
        gguf_file=setup.checkpoint.name if is_file else None,
        quantization_config=QLoRAConfig(),
        dtype=setup.dtype,
        device_map="cpu",
    )
    model.config.use_cache = False
    return model


def build_model(setup: Setup) -> Any:
    torch.manual_seed(setup.seed)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 90,  # neither a multiple of 4 processes nor of a block
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 99,
        "max_position_embeddings": 64,
        "tie_word_embeddings": setup.tied,
        "use_cache": False,
    }
    config = MixtralConfig(**sizes, num_local_experts=4) if setup.experts else LlamaConfig(**sizes, attention_bias=True)
    model = AutoModelForCausalLM.from_config(config, dtype=setup.dtype)
    skip = () if setup.quantized_head else ("lm_head",)
    quantize_model(model, skip, double_quant=setup.double_quant, embeddings=setup.embeddings)
    return model


def make_model(setup: Setup) -> Any:
    model = build_model(setup) if setup.checkpoint is None else read_model(setup)
    experts = [
        name for name, _ in model.named_parameters() if name.endswith(("experts.gate_up_proj", "experts.down_proj"))
    ]
    torch.manual_seed(setup.seed)
    lora = LoraConfig(
        r=4,
        lora_alpha=8,
        lora_dropout=setup.dropout,
        target_modules="all-linear",
        target_parameters=experts if setup.checkpoint is not None else None,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, lora)
    if setup.merge_aware:
        set_merge_aware(model, code=setup.merge_aware)
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
    return {f"{path}.{name}": t for path, layer in layers_of(model) for name, t in layer.packed_state().items()}


def full_tensor(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def digest(tensors: dict[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name, t in sorted(tensors.items()):
        t = full_tensor(t.detach())
        found.update(f"{name} {t.dtype} {list(t.shape)}".encode())
        found.update(t.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def adapters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def local(t: Tensor) -> Tensor:
    return t.to_local() if isinstance(t, DTensor) else t


def local_bytes(tensors: dict[str, Tensor]) -> int:
    return sum(local(t).nbytes for t in tensors.values())


def check_computed_on(model: nn.Module, expected: dict[str, Tensor]) -> None:
    """Makes every 4-bit layer assert that its weight has exactly the bits of ``expected``."""

    def check(layer: Packed4bit, path: str) -> None:
        for name, t in layer.packed_state().items():
            bits = expected[f"{path}.{name}"]
            assert t.dtype == bits.dtype, f"{path}.{name}: {t.dtype}"
            assert torch.equal(t.detach(), bits), f"{path}.{name}"

    for path, layer in layers_of(model):
        layer.register_forward_pre_hook(lambda module, _, path=path: check(module, path))


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> list[float]:
    """Losses over the full batch, of which this rank computes its part."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    ids = torch.randint(0, 99, (BATCH, 12), generator=torch.Generator().manual_seed(1)).chunk(world)[rank]
    losses = []
    for _ in range(steps):
        loss = train_on(model, optimizer, ids)
        if world > 1:
            dist.all_reduce(loss)
            loss /= world
        losses.append(loss.item())
    return losses


def alone(setup: Setup, steps: int = 3) -> list[float]:
    """The losses of one process that computes the full batch."""
    model = make_model(setup)
    return train(model, make_optimizer(model), steps)


def fsdp2(setup: Setup) -> dict[str, Any]:
    model = make_model(setup)
    before = copy.deepcopy(packed_state(model))
    shard(model, setup)
    gathered = digest(packed_state(model))
    if not setup.merge_aware:  # it computes with other weights, and not over hooks
        check_computed_on(model, before)
    losses = train(model, make_optimizer(model))
    return {
        "losses": losses,
        "packed": {digest(before), gathered, digest(packed_state(model))},
        "held": local_bytes(packed_state(model)),
        "total": local_bytes(before),
        "adapters": digest(adapters(model)),
    }


def ddp(setup: Setup) -> dict[str, Any]:
    model = make_model(setup)
    before = copy.deepcopy(packed_state(model))
    check_computed_on(model, before)
    losses = train(DistributedDataParallel(model), make_optimizer(model))
    return {
        "losses": losses,
        "packed": {digest(before), digest(packed_state(model))},
        "adapters": digest(adapters(model)),
    }


def streamed_ddp(path: pathlib.Path, streamed: bool) -> dict[str, Any]:
    """Trains a saved 4-bit model with DDP, optionally streaming its layers from the files."""
    model = AutoModelForCausalLM.from_pretrained(path, device_map="cpu")
    if streamed:
        stream(model, source="disk")
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).train()
    versions = {name: t._version for name, t in packed_state(model).items()}
    wrapped = DistributedDataParallel(model)
    losses = train(wrapped, make_optimizer(model))
    return {
        "losses": losses,
        "adapters": digest(adapters(model)),
        "ignored": set(wrapped.parameters_to_ignore) & set(model.state_dict()),
        "packed": set(packed_state(model)),
        "written": [name for name, t in packed_state(model).items() if t._version != versions[name]],
    }


class Odd(nn.Module):
    """Layers whose bytes take all values, of sizes that are not divisible by the number of processes."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        unit = form.row_unit  # which some rows are padded to
        sizes = [(-(-k // unit) * unit, n) for k, n in ((128, 33), (33, 7), (7, 1))]
        self.layers = nn.ModuleList(Linear4bit(k, n, **form.keywords) for k, n in sizes)
        generator = torch.Generator().manual_seed(0)
        for layer in self.layers:
            for t in layer.packed_state().values():
                if t.dtype == torch.uint8:
                    t.data = torch.arange(t.numel()).mul(37).remainder(256).to(torch.uint8).reshape(t.shape)
                else:
                    t.data = (torch.rand(t.shape, generator=generator) * 0.1 + 0.0123456789).to(t.dtype)
        self.adapter = nn.Linear(128, 128, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.adapter(x)
        for layer in self.layers:
            x = layer(nn.functional.pad(x, (0, layer.in_features - x.shape[-1])))
        return x


def odd_bytes(form: Form, mixed: bool) -> dict[str, Any]:
    model = Odd(form)
    expected = copy.deepcopy(packed_state(model))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if mixed else MixedPrecisionPolicy()
    for layer in model.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    check_computed_on(model, expected)
    model(torch.randn(3, 128)).float().sum().backward()
    assert model.adapter.weight.grad is not None
    return {
        "packed": {digest(expected), digest(packed_state(model))},
        "weight": {tuple(bytes_.tolist()) for bytes_ in [local(model.layers[0].weight).unique()]},
    }


def casts_after_sharding(setup: Setup) -> tuple[set[str], bool]:
    """Checks that a sharded model that changes its dtype keeps its bits and computes in the new dtype."""
    model = make_model(setup)
    before = copy.deepcopy(packed_state(model))
    shard(model, setup)
    model.to(torch.bfloat16)
    check_computed_on(model, before)
    logits = model(input_ids=torch.arange(8)[None]).logits
    return {digest(before), digest(packed_state(model))}, logits.dtype == torch.bfloat16


def checkpointed_dropout(setup: Setup) -> bool:
    """Checks that a checkpointed layer that is gathered again in the backward repeats the dropout of its forward."""
    ids = torch.arange(24).view(2, 12)
    gradients = set()
    for checkpointing in (False, True):
        model = make_model(dataclasses.replace(setup, checkpointing=checkpointing, dropout=0.5))
        shard(model, setup)
        torch.manual_seed(dist.get_rank())
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.add(digest({name: p.grad for name, p in adapters(model).items()}))
    return len(gradients) == 1


def from_meta(setup: Setup) -> dict[str, Any]:
    """Builds and shards a model on the meta device, then fills it from the first rank's state dict."""
    source = make_model(setup)
    with torch.device("meta"):
        model = make_model(setup)
    shard(model, setup)
    model.to_empty(device="cpu")
    for name, buffer in model.named_buffers():
        if name not in source.state_dict():  # rotary frequencies are not in a checkpoint
            buffer.copy_(source.get_buffer(name))
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, source.state_dict() if dist.get_rank() == 0 else {}, options=options)
    check_computed_on(model, packed_state(source))
    return {"losses": train(model, make_optimizer(model)), "packed": {digest(packed_state(m)) for m in (source, model)}}


def save_checkpoint(setup: Setup, directory: str, steps: int) -> dict[str, Any]:
    model = make_model(setup)
    shard(model, setup)
    optimizer = make_optimizer(model)
    losses = train(model, optimizer, steps)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=directory)
    return {"losses": losses, "packed": digest(packed_state(model)), "adapters": digest(adapters(model))}


def resume_checkpoint(setup: Setup, directory: str, steps: int) -> dict[str, Any]:
    model = make_model(setup)
    shard(model, setup)
    optimizer = make_optimizer(model)
    fresh = digest(packed_state(model))
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=directory)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    loaded = {"packed": digest(packed_state(model)), "adapters": digest(adapters(model))}
    return {"fresh": fresh, **loaded, "losses": train(model, optimizer, steps)}


def full_state(setup: Setup) -> str:
    """Loads a state dict gathered on the first rank into a model of one process, and from there into a sharded one."""
    model = make_model(setup)
    before = digest(model.state_dict())
    shard(model, setup)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    if dist.get_rank() == 0:
        single = make_model(dataclasses.replace(setup, seed=1))
        assert digest(single.state_dict()) != before
        single.load_state_dict(state, strict=True)
        assert digest(single.state_dict()) == before
    other = make_model(dataclasses.replace(setup, seed=1))
    shard(other, setup)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(other, state, options=options)
    assert digest(other.state_dict()) == before
    train(other, make_optimizer(other), 1)
    return before


def save_adapter(setup: Setup, directory: str) -> list[str]:
    """Saves the adapters of a sharded model with PEFT, and compares the fingerprint of the base."""
    model = make_model(setup)
    expected = fingerprint(model)
    shard(model, setup)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    state = get_model_state_dict(model, options=options)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        model.save_pretrained(directory, state_dict=state, is_main_process=dist.get_rank() == 0)
    write_base(model, directory)
    assert fingerprint(model) == expected
    dist.barrier()
    with torch.no_grad():
        logits = model(input_ids=torch.arange(8)[None]).logits
        single = PeftModel.from_pretrained(make_model(setup).unload(), directory)
        assert check_base(single, directory) is True
        torch.testing.assert_close(single(input_ids=torch.arange(8)[None]).logits, logits)
    return [str(w.message) for w in warned]


def fails_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise ValueError("rank 1 had enough")


def hangs_on_rank_1() -> None:
    if dist.get_rank() == 1:
        time.sleep(3600)


def accelerate_prepares(setup: Setup, config: dict[str, Any]) -> dict[str, Any]:
    """Applies accelerate's FSDP2 by calling its parts, because accelerate itself uses it only on accelerators."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_apply_ac, fsdp2_prepare_model

    rank, world = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world,
        "LOCAL_WORLD_SIZE": world,
        "OMP_NUM_THREADS": "1",
    }
    options = {
        key.removeprefix("fsdp_"): value for key, value in config["fsdp_config"].items() if key != "fsdp_version"
    }
    layer = options.pop("transformer_layer_cls_to_wrap")
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        transformer_cls_names_to_wrap=[layer],
        cpu_offload=options.pop("offload_params"),
        **{key: value.lower() if key == "auto_wrap_policy" else value for key, value in options.items()},
    )
    accelerator = Accelerator(cpu=True)
    accelerator.state.fsdp_plugin = plugin
    plugin.set_mixed_precision(config["mixed_precision"])
    model = make_model(setup)
    before = copy.deepcopy(packed_state(model))
    if plugin.activation_checkpointing:
        model = fsdp2_apply_ac(accelerator, model)
    model = fsdp2_prepare_model(accelerator, model)
    losses = train(model, make_optimizer(model))
    wrapper = "_checkpoint_wrapped_module."  # accelerate's checkpointing wraps layers
    packed = {name.replace(wrapper, ""): t for name, t in packed_state(model).items()}
    return {
        "losses": losses,
        "packed": {digest(before), digest(packed)},
        "held": local_bytes(packed),
        "total": local_bytes(before),
        "sharded_modules": sum(isinstance(m, FSDPModule) for m in model.modules()),
    }
