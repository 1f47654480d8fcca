"""Fine-tunes a 4-bit model over several processes with torch's FSDP2: on GPUs over NCCL, on CPUs over gloo.

    accelerate launch --config_file examples/processes.yaml examples/finetune_fsdp2.py \\
        --model DIR --data FILE.txt --output DIR

``torchrun --nproc-per-node 2 examples/finetune_fsdp2.py ...`` starts it as well. It writes the adapter, in PEFT's
format, and ``OUTPUT/state``, a distributed checkpoint with which ``--resume`` continues on any number of processes.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import warnings

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from peft import LoraConfig, get_peft_model
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer

import qlora_ext
from qlora_ext.integrations.peft import write_base


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a model directory, dense or already in 4 bits")
    parser.add_argument("--data", required=True, type=pathlib.Path, help="a text file")
    parser.add_argument("--output", required=True, type=pathlib.Path)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8, help="rows per step, over all processes")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--cpu-offload", action="store_true", help="keep the shards in host memory (GPU only)")
    parser.add_argument("--resume", action="store_true", help="continue from OUTPUT/state")
    return parser.parse_args()


def build(args: argparse.Namespace, device: torch.device) -> torch.nn.Module:
    """Every process quantizes the whole model in its host memory, and keeps its share of it."""
    config = qlora_ext.QLoRAConfig()
    model = AutoModelForCausalLM.from_pretrained(args.model, quantization_config=config, device_map="cpu")
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)  # float32 adapters, the same on every process because of the seed
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    policies = {
        "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
        "offload_policy": CPUOffloadPolicy() if args.cpu_offload else OffloadPolicy(),
        "mesh": dist.init_device_mesh(device.type, (dist.get_world_size(),)),
    }
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, **policies)
    return fully_shard(model, **policies).train()


def rows(args: argparse.Namespace) -> torch.Tensor:
    """The text as rows of tokens [B, T] in the order of the steps, repeated if it is too short."""
    ids = AutoTokenizer.from_pretrained(args.model)(args.data.read_text(), return_tensors="pt").input_ids[0]
    needed = args.steps * args.batch_size * args.seq_len
    return ids.repeat(-(-needed // len(ids)))[:needed].view(-1, args.seq_len)


def train_on(model: torch.nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> torch.Tensor:
    """One optimizer step. This process computes the rows ``ids`` [B, T]; returns their loss."""
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach().float()


def main() -> None:
    args = parse()
    torch.manual_seed(0)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    if args.batch_size % world:
        raise SystemExit(f"--batch-size: expected a multiple of the {world} processes, got {args.batch_size}")

    model = build(args, device)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=args.lr, weight_decay=0.0)
    start = 0
    if args.resume:
        model_state, optimizer_state = get_state_dict(model, optimizer)
        state = {"model": model_state, "optimizer": optimizer_state, "step": 0}
        dcp.load(state, checkpoint_id=args.output / "state")
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        start = state["step"]

    batches = rows(args).view(args.steps, world, -1, args.seq_len)
    for step in range(start, args.steps):
        mean = train_on(model, optimizer, batches[step, rank].to(device))
        dist.all_reduce(mean)
        if rank == 0:
            print(f"step {step + 1} loss {mean.item() / world:.4f}", flush=True)

    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state, "step": args.steps}
    dcp.save(state, checkpoint_id=args.output / "state")
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    adapter = get_model_state_dict(model, options=options)
    if rank == 0:
        warnings.filterwarnings("ignore", message=".*fingerprint is not recorded")  # write_base records it below
        model.save_pretrained(args.output, state_dict=adapter)
    write_base(model, args.output)  # on every rank, because the fingerprint of the base gathers its shards
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
