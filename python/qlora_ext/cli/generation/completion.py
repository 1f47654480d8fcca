"""A prompt of tokens, and the text with which a model goes on."""

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
    """How the model goes on after the token ids ``prompt``. Without temperature it draws no random number.

    Args:
        streamer: one of transformers', which gets every token as soon as it is there.
    """
    import torch

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
            **sampling,
        )
    model.train(was_training)
    text: str = tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True)
    return text
