"""A sequence that a ``BatchDecoder`` writes: what was asked for, and what has been written so far."""

from __future__ import annotations

import math
import operator
import random
from collections.abc import Callable, Iterable

from torch import Tensor

from .sampling import Drawn, Sampling

OnToken = Callable[["DecodeRequest", int], object]


def token_ids(prompt: Iterable[int] | Tensor) -> list[int]:
    """A prompt as a list.

    Raises:
        ValueError: ``prompt`` is something else than integers in one dimension.
    """
    try:
        return [operator.index(token) for token in (prompt.tolist() if isinstance(prompt, Tensor) else prompt)]
    except TypeError as error:
        raise ValueError(f"prompt: expected token ids, a list or a tensor of one dimension, got {prompt!r}") from error


class DecodeRequest:
    """A prompt and its continuation, from ``BatchDecoder.submit``.

    Attributes:
        prompt: the token ids of the prompt.
        sampling: the options, with the seed that is used.
        adapter: the name of the adapter; None for the model's active ones.
        tokens: the token ids written so far. If ``finish_reason`` is "stop", the last one is the stop token.
        logprobs: the log-probability of each token (a float32 value): log_softmax(logits / temperature), before
            ``top_k``, ``top_p`` and ``min_p``. With temperature 0, it is that of temperature 1.
        top_logprobs: for each token, the most likely ones with their log-probabilities, if ``sampling`` asks for them.
        prompt_logprobs, prompt_top_logprobs: the same for all tokens of the prompt but the first, if ``sampling`` asks
            for them. They are complete when the sequence has a token or has ended.
        finish_reason: None until the end, then "stop" (a stop token), "length" (``max_new_tokens``), "cancelled", or
            "error".
        error: the reason for "error": the exception of ``on_token``, or what failed while the model computed.

    Example:
        >>> from qlora_app.decoding import BatchDecoder, Sampling
        >>> def ask(model, prompt):
        ...     engine = BatchDecoder(model)
        ...     request = engine.submit(prompt, Sampling(seed=1), on_token=lambda request, token: print(token))
        ...     while not request.done:
        ...         engine.step()
        ...     return request.tokens
    """

    def __init__(
        self, prompt: list[int], sampling: Sampling, most: int, adapter: str | None, on_token: OnToken | None
    ) -> None:
        assert sampling.seed is not None
        self.prompt, self.sampling, self.adapter = prompt, sampling, adapter
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.top_logprobs: list[list[tuple[int, float]]] = []
        self.prompt_logprobs: list[float] = []
        self.prompt_top_logprobs: list[list[tuple[int, float]]] = []
        self.finish_reason: str | None = None
        self.error: Exception | None = None
        self.numbers = random.Random(sampling.seed)
        self.prompt_logits: Tensor | None = None  # [1, V], while others with the same prompt may use them
        self._on_token = on_token
        self._most = most
        self._stops = frozenset(sampling.stop_tokens or ())
        self._cancelled = False

    @property
    def done(self) -> bool:
        """Whether the sequence has ended."""
        return self.finish_reason is not None

    def cancel(self) -> None:
        """Ends the sequence at the next step. Any thread may call it."""
        self._cancelled = True

    @property
    def read(self) -> int:
        """How many tokens are in the caches while it runs: all but the last one."""
        return len(self.prompt) + len(self.tokens) - 1

    def end_if_cancelled(self) -> bool:
        """Ends the sequence if ``cancel`` was called. Returns whether it has ended."""
        if self._cancelled and not self.done:
            self.finish_reason = "cancelled"
        return self.done

    def fail(self, error: Exception) -> None:
        self.error = error
        self.finish_reason = "error"

    def add_prompt(self, scored: Iterable[Drawn]) -> None:
        """Appends log-probabilities of the prompt's next tokens."""
        for each in scored:
            if self._is_number(each.logprob, len(self.prompt_logprobs) + 1):
                self.prompt_logprobs.append(each.logprob)
                self.prompt_top_logprobs.append(each.top)

    def end_without_tokens(self) -> bool:
        """Ends the sequence if it writes no tokens. Returns whether it has ended."""
        if self._most == 0:
            self.finish_reason = "length"
        return self.done

    def allowed(self) -> Tensor | None:
        """Which tokens may come next; None: all. An exception of ``allowed_tokens`` ends the sequence."""
        if self.sampling.allowed_tokens is None:
            return None
        try:
            return self.sampling.allowed_tokens(self.tokens)
        except Exception as error:
            self.fail(error)
            return None

    def _is_number(self, logprob: float, tokens: int) -> bool:
        if math.isnan(logprob):
            self.fail(FloatingPointError(f"the model's logits after {tokens} tokens are not numbers"))
        return not self.done

    def add(self, drawn: Drawn) -> None:
        """Appends a token, and ends the sequence if it is the last one."""
        if self.done or not self._is_number(drawn.logprob, self.read + 1):  # ``allowed_tokens`` may have failed
            return
        self.tokens.append(drawn.token)
        self.logprobs.append(drawn.logprob)
        if self.sampling.top_logprobs:
            self.top_logprobs.append(drawn.top)
        if drawn.token in self._stops:
            self.finish_reason = "stop"
        elif len(self.tokens) == self._most:
            self.finish_reason = "length"

    def report(self) -> None:
        """Calls ``on_token`` with the last token. Its exception ends the sequence."""
        if self._on_token is None or self.error is not None:
            return
        try:
            self._on_token(self, self.tokens[-1])
        except Exception as error:
            self.fail(error)
