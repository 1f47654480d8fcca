"""A program that asks llama.cpp, for tests whose own interpreter may lack llama-cpp-python.

It reads a request as JSON from its standard input, and writes the answer there in which the logits are in a file.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def answer(request: dict[str, Any]) -> dict[str, Any]:
    import numpy as np
    from llama_cpp import Llama

    model = Llama(
        request["model"], n_ctx=request.get("n_ctx", 64), n_threads=1, n_batch=64, logits_all=True, verbose=False,
        lora_path=request.get("lora"),
    )  # fmt: skip
    found: dict[str, Any] = {}
    if "ids" in request:
        model.eval(request["ids"])
        np.save(request["logits"], model.scores[: len(request["ids"])])
    if "texts" in request:
        found["tokens"] = [model.tokenize(text.encode(), special=True) for text in request["texts"]]
    if "prompts" in request:
        found["continued"] = []
        for prompt in request["prompts"]:
            model.reset()
            tokens = []
            for token in model.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0):
                tokens.append(token)
                if len(tokens) == request["count"]:
                    break
            found["continued"].append(tokens)
    return found


if __name__ == "__main__":
    import llama_cpp  # noqa: F401

    line = sys.stdin.read()
    print(json.dumps(answer(json.loads(line)) if line else {}))
