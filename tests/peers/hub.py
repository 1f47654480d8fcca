"""A cache of the model hub, with small models of random weights under the names that other libraries' tests load."""

from __future__ import annotations

import pathlib

import torch
from transformers import AutoModel, BertConfig, GPT2Config, OPTConfig, PreTrainedConfig
from transformers.utils import logging

_OPT = {"vocab_size": 1000, "hidden_size": 64, "ffn_dim": 128, "num_attention_heads": 4, "word_embed_proj_dim": 64}
_GPT2 = {"vocab_size": 1000, "bos_token_id": 0, "eos_token_id": 0, "n_embd": 64, "n_head": 4, "n_layer": 2}
_BERT = {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
# Tests count the layers of the first two.
MODELS: dict[str, PreTrainedConfig] = {
    "peft-internal-testing/opt-125m": OPTConfig(num_hidden_layers=12, **_OPT),
    "peft-internal-testing/tiny-random-OPTForCausalLM": OPTConfig(num_hidden_layers=5, **_OPT),
    "peft-internal-testing/tiny-random-gpt2": GPT2Config(**_GPT2),
    "gpt2": GPT2Config(**_GPT2),
    "bert-base-uncased": BertConfig(num_attention_heads=4, **_BERT),
}
_COMMIT = "0" * 40


def make(cache: pathlib.Path) -> None:
    """Writes the models into ``cache``, as huggingface_hub does."""
    logging.disable_progress_bar()
    for name, config in MODELS.items():
        directory = cache / f"models--{name.replace('/', '--')}"
        torch.manual_seed(0)
        AutoModel.from_config(config).save_pretrained(directory / "snapshots" / _COMMIT)
        (directory / "refs").mkdir(exist_ok=True)
        (directory / "refs" / "main").write_text(_COMMIT)
