"""Text that a model writes itself, for calibration without data.

LLM-QAT (Liu et al., 2023) showed that a model's own samples work as well as data. Each sequence begins with a random
token, so that sequences differ.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .finite_logits import require_finite


@torch.no_grad()
def write(model: Any, sequences: int, length: int, seed: int) -> Tensor:
    """Samples int64 [sequences, length] from ``model`` at temperature 1.

    The same model, device and seed give the same tokens. The global random state does not change.

    Raises:
        TypeError: ``model`` cannot generate text. NotFiniteError: it computes NaN or infinity.
    """
    from transformers import LogitsProcessorList

    can_generate = getattr(model, "can_generate", None)
    if can_generate is None or not can_generate() or getattr(model.config, "is_encoder_decoder", False):
        raise TypeError(
            f"calibration: {type(model).__name__} cannot generate text; pass token ids [B, T], or batches of its inputs"
        )
    device = model.device
    text_config = model.config.get_text_config()
    special = {i for i in _flat(text_config.bos_token_id, text_config.eos_token_id, text_config.pad_token_id)}
    generator = torch.Generator().manual_seed(seed)
    form: dict[str, Any] = {"dtype": torch.int64, "device": "cpu"}
    ordinary = torch.tensor([i for i in range(text_config.vocab_size) if i not in special], **form)
    first = ordinary[torch.randint(len(ordinary), (sequences, 1), generator=generator, **form)]
    bos = _flat(text_config.bos_token_id)[:1]
    start = torch.cat([torch.full((sequences, len(bos)), bos[0] if bos else 0, **form), first], dim=1).to(device)
    was_training = model.training
    model.eval()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        ids: Tensor = model.generate(
            input_ids=start,
            attention_mask=torch.ones_like(start),
            min_new_tokens=length - start.shape[1],
            max_new_tokens=length - start.shape[1],
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            use_cache=True,
            logits_processor=LogitsProcessorList([require_finite]),
            pad_token_id=(_flat(text_config.pad_token_id, text_config.eos_token_id) or [0])[0],
        )
    model.train(was_training)
    return ids


def _flat(*token_ids: Any) -> list[int]:
    return [i for t in token_ids if t is not None for i in (t if isinstance(t, (list, tuple)) else [t])]
