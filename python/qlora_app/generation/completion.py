"""The completion of a prompt of tokens."""

from __future__ import annotations

from typing import Any


def complete(
    model: Any,
    tokenizer: Any,
    prompt: list[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    streamer: Any = None,
) -> str:
    """The model's completion of the token ids ``prompt``. With temperature 0, it draws no random numbers.

    Args:
        streamer: a streamer of transformers, which gets each token when it is generated.

    Raises:
        UserError: the model computes NaN or infinity.
    """
    import torch
    from transformers import LogitsProcessorList

    from qlora_ext.calibration.finite_logits import require_finite

    was_training = model.training
    model.eval()
    ids = torch.tensor([prompt], dtype=torch.int64, device=model.device)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {"do_sample": False}
    with torch.no_grad():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            use_cache=True,
            streamer=streamer,
            logits_processor=LogitsProcessorList([require_finite]),
            **sampling,
        )
    model.train(was_training)
    text: str = tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True)
    return text
