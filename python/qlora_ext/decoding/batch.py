"""Decoding of many sequences at once: continuous batching over the slots of a cache."""

from __future__ import annotations

import dataclasses
import inspect
import operator
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import DynamicCache

from .._internal.untrusted import first_line
from .._internal.vocabulary import vocabulary_size
from ..formats import is_integer
from ..integrations.peft.fixed import FixedAdapters
from .batch_step import SPAN_STEP, STEP, BatchStep, load_step
from .compiled import CACHE, CACHE_STEP, MAX_PROMPT, PROMPT, TOKEN, keeps_last_logits, load_decoding, new_caches
from .packages import Code, CompilationError, causal_lm, not_plain, obstacle
from .requests import OnToken, Request
from .sampling import Sampling, draw

BASE = "__base__"  # PEFT's name for no adapter
_USUAL_CAPACITY = 2048
# Of the self-test: far above rounding, far below the effect of a wrong position or mask.
_TOLERANCE, _TOLERANCE_16_BITS = 1e-3, 0.1


def _ids(prompt: Iterable[int] | Tensor) -> list[int]:
    try:
        return [operator.index(token) for token in (prompt.tolist() if isinstance(prompt, Tensor) else prompt)]
    except TypeError as error:
        raise ValueError(f"prompt: expected token ids, a list or a tensor of one dimension, got {prompt!r}") from error


def _rejected(why: str) -> ValueError:
    return ValueError(f"model: batches of it cannot be decoded: {why}")


class BatchDecoder:
    """Writes many sequences at once, one token per sequence and step.

    A prompt is read alone, without padding, when a slot is free. All running sequences then share each step, so the
    weights are read once per step.

    Args:
        model: a causal language model of transformers with full attention, 4-bit or dense, with or without adapters, in
            evaluation mode. Its weights may change between steps, also by an optimizer.
        sequences: the number of slots.
        capacity: the most tokens of a sequence, prompt included. None: 2048, or fewer if the model has fewer
            positions. The caches, [``sequences``, H, ``capacity``, D] per layer, are allocated once.
        compiled: whether to decode with compiled code, as ``compile_decoding`` does. None: where possible.
        progress: called with a message before and after a compilation.
        reproducible: whether every step computes all slots, also idle ones. The kernels, which depend on the number of
            rows, are then always the same, and so are the bits of a sequence, whatever else runs.

    Attributes:
        compiled: whether the model's code is compiled. It computes with the adapters that are active when the decoder
            is made; steps with others run the model's own forward.
        steps: the number of steps with running sequences so far.

    Raises:
        ValueError: the model cannot be decoded in batches, or an argument is wrong.
        CompilationError: ``compiled`` is True, and the model cannot be compiled.

    Example:
        >>> from qlora_ext.decoding import BatchDecoder, Sampling
        >>> def answer(model, prompts):
        ...     engine = BatchDecoder(model, sequences=8)
        ...     requests = [engine.submit(ids, Sampling(temperature=0.7, seed=i)) for i, ids in enumerate(prompts)]
        ...     engine.run()
        ...     return [request.tokens for request in requests]
    """

    def __init__(
        self,
        model: Any,
        sequences: int = 16,
        capacity: int | None = None,
        compiled: bool | None = None,
        progress: Callable[[str], object] | None = None,
        reproducible: bool = False,
    ) -> None:
        self._model, self._lm = model, causal_lm(model)
        if not hasattr(self._lm, "config"):
            raise ValueError(f"model: expected a language model of transformers, got {type(model).__name__}")
        why = not_plain(model)
        if why is None and "position_ids" not in inspect.signature(self._lm.forward).parameters:
            why = "its forward takes no position_ids"
        if why is not None:
            raise _rejected(why)
        if self._lm.config._attn_implementation not in ("sdpa", "eager"):
            raise ValueError(
                "model: expected the attention implementation 'sdpa' or 'eager', "
                f"got {self._lm.config._attn_implementation!r}; call model.set_attn_implementation('sdpa')"
            )
        most = max(getattr(self._lm.config, "max_position_embeddings", None) or 0, 0) or _USUAL_CAPACITY
        self.sequences, self.reproducible = sequences, reproducible
        self.capacity = min(_USUAL_CAPACITY, most) if capacity is None else capacity
        if not is_integer(sequences) or sequences < 1:
            raise ValueError(f"sequences: expected an integer from 1 on, got {sequences!r}")
        if not is_integer(self.capacity) or not 2 <= self.capacity <= most:
            raise ValueError(
                f"capacity: expected 2 to {most} tokens, the model's positions, for a prompt and its max_new_tokens, "
                f"got {capacity!r}"
            )
        self.steps = 0
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []  # the one at index i has slot i
        self._stepping = threading.Lock()
        self._require_evaluation()
        self._layer = next((m for m in self._lm.modules() if isinstance(m, BaseTunerLayer)), None)
        self._adapters = FixedAdapters(self._lm)  # of the compiled code
        self._codes: dict[str, Code] = {}
        try:
            # The self-test takes two slots.
            self._caches = new_caches(self._lm, -(-self.capacity // SPAN_STEP) * SPAN_STEP, max(sequences, 2))
            self._test()
        except ValueError:
            raise
        except Exception as error:  # models may raise any exception
            raise _rejected(first_line(error)) from error
        self._codes = self._compiled_codes(compiled, progress)
        if self._codes:
            self._test()

    def _compiled_codes(self, wanted: bool | None, progress: Callable[[str], object] | None) -> dict[str, Code]:
        """The compiled functions by name; none if the model's own forward is to run."""
        if wanted is False:
            return {}
        why = obstacle(self._model)
        try:
            if why is not None:
                raise CompilationError(why)
            prompts, steps = load_decoding(self._model, progress=progress), load_step(self._model, progress)
        except CompilationError:
            if wanted:
                raise
            return {}
        assert prompts is not None
        return {name: code for code in (prompts, steps) for name in (TOKEN, PROMPT, STEP) if name in code}

    @property
    def compiled(self) -> bool:
        return bool(self._codes)

    @property
    def running(self) -> int:
        """The number of sequences that have a slot."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """The number of sequences that wait for a slot."""
        return len(self._waiting)

    def submit(
        self,
        prompt: Iterable[int] | Tensor,
        sampling: Sampling | None = None,
        adapter: str | None = None,
        on_token: OnToken | None = None,
    ) -> Request:
        """Adds a sequence. Any thread may call it.

        Args:
            prompt: token ids.
            sampling: how to continue. None: ``Sampling()``.
            adapter: the name of an adapter of the model, "__base__" for none. None: the active ones.
            on_token: called with the request and the token in ``step`` for each token. Its exception ends the request.

        Returns:
            The request, which ``step`` continues.

        Raises:
            ValueError: an argument is wrong, or the sequence may exceed the capacity.
        """
        ids = _ids(prompt)
        vocabulary = vocabulary_size(self._lm)
        if not ids:
            raise ValueError("prompt: expected at least one token, got none")
        if min(ids) < 0 or max(ids) >= vocabulary:
            raise ValueError(f"prompt: expected token ids from 0 to {vocabulary - 1}, got {min(ids)} to {max(ids)}")
        sampling = Sampling() if sampling is None else sampling
        if not isinstance(sampling, Sampling):
            raise ValueError(f"sampling: expected a Sampling, got {sampling!r}")
        room = self.capacity - len(ids)
        most = max(room, 0) if sampling.max_new_tokens is None else sampling.max_new_tokens
        if room < max(most, 1):
            raise ValueError(
                f"capacity: expected a prompt and max_new_tokens of together at most {self.capacity} tokens, got "
                f"{len(ids)} and {most or 1}"
            )
        self._check_adapter(adapter)
        if sampling.seed is None:
            sampling = dataclasses.replace(
                sampling, seed=int(torch.randint(1 << 62, (), dtype=torch.int64, device="cpu"))
            )
        if sampling.stop_tokens is None:
            sampling = dataclasses.replace(sampling, stop_tokens=self._end_tokens())
        request = Request(ids, sampling, most, adapter, on_token)
        self._waiting.append(request)
        return request

    def _end_tokens(self) -> Iterable[int]:
        found = getattr(self._lm, "generation_config", self._lm.config).eos_token_id
        return () if found is None else found if isinstance(found, (list, tuple)) else (found,)

    def _check_adapter(self, adapter: str | None) -> None:
        known = getattr(self._model, "peft_config", {})
        if adapter is not None and adapter not in (BASE, *known):
            raise ValueError(f"adapter: expected one of {sorted(known)}, {BASE!r} or None, got {adapter!r}")
        active = self._active()
        if adapter is not None and len(active) > 1:
            raise ValueError(
                f"adapter: expected None, because several are active ({', '.join(active)}), got {adapter!r}"
            )

    def run(self) -> None:
        """Calls ``step`` until all sequences have ended."""
        while self.step():
            pass

    @torch.no_grad()
    def step(self) -> bool:
        """Writes a token of every running sequence, then reads prompts into free slots and writes their first tokens.

        Returns:
            Whether sequences are left.

        Raises:
            RuntimeError: another call of ``step`` has not returned yet.
            ValueError: the model is in training mode.
        """
        if not self._stepping.acquire(blocking=False):
            raise RuntimeError("step: expected one call at a time, got a second one")
        try:
            self._require_evaluation()
            for request in list(self._waiting):  # cancelled ones must not wait for a free slot
                if request.end_if_cancelled():
                    self._waiting.remove(request)
            self._drop_ended()
            if self._running:
                self._continue(self._running, self._read_tokens(self._running))
                self.steps += 1
            while self._waiting and len(self._running) < self.sequences:
                self._start(self._waiting[0])
            return bool(self._running or self._waiting)
        finally:
            self._stepping.release()

    def _require_evaluation(self) -> None:
        if self._lm.training:
            raise ValueError("model: expected evaluation mode, got training mode; call model.eval()")

    def _start(self, request: Request) -> None:
        """Reads the prompt of the first request that waits."""
        logits = None
        if not self._has_ended(request):
            try:
                logits = self._read_prompt(request.prompt, len(self._running), self._forward_options([request]))
            except Exception as error:  # for example, no memory for a long prompt
                request.fail(error)
        self._waiting.popleft()
        if logits is not None:
            self._running.append(request)
            self._continue([request], logits)

    def _has_ended(self, request: Request) -> bool:
        """Whether a sequence has ended, for example because its adapter was deleted."""
        if not request.end_if_cancelled():
            try:
                self._check_adapter(request.adapter)
            except ValueError as error:
                request.fail(error)
        return request.done

    def _continue(self, requests: Sequence[Request], logits: Tensor) -> None:
        """Adds a token to each sequence, and drops those that have ended."""
        drawn = draw(logits, [request.sampling for request in requests], [request.numbers for request in requests])
        for request, each in zip(requests, drawn, strict=True):
            request.add(each)
        for request in requests:
            request.report()
        self._drop_ended()

    def _drop_ended(self) -> None:
        """Frees the slots of sequences that have ended. The last sequence moves into a slot that becomes free."""
        for slot in reversed(range(len(self._running))):
            ended = self._running[slot]
            if not self._has_ended(ended):
                continue
            if isinstance(ended.error, FloatingPointError):  # hidden tokens have weight 0, but 0 * NaN is NaN
                for cache in self._caches:
                    cache[slot].zero_()
            last = self._running.pop()
            if last is not ended:
                self._running[slot] = last
                for cache in self._caches:
                    cache[slot, :, : last.read] = cache[len(self._running), :, : last.read]

    def _code(self, name: str, options: dict[str, Any]) -> Callable[[list[Tensor]], list[Tensor]] | None:
        """The compiled function ``name``, if it computes what the model does now."""
        code = self._codes.get(name)
        if code is None or options or not self._adapters.serve(fully=name != STEP) or not code.is_current():
            return None
        return code[name]

    def _active(self) -> list[str]:
        """The names of the active adapters."""
        return [] if self._layer is None or self._layer.disable_adapters else list(self._layer.active_adapters)

    def _forward_options(self, requests: Sequence[Request], idle: int = 0) -> dict[str, Any]:
        """The adapters of sequences as an option of PEFT's forward; none if all use the active ones."""
        active = self._active()
        if all(request.adapter is None for request in requests):
            return {}
        usual = active[0] if active else BASE
        names = [usual if request.adapter is None else request.adapter for request in requests]
        return {} if set(names) == {usual} else {"adapter_names": names + [usual] * idle}

    def _read_tokens(self, requests: Sequence[Request]) -> Tensor:
        """The logits [B, V] after each sequence's last token, which is read into the caches."""
        idle = self.sequences - len(requests) if self.reproducible else 0
        options = self._forward_options(requests, idle)
        tokens = self._integers([request.tokens[-1] for request in requests] + [0] * idle)
        positions = self._integers([request.read for request in requests] + [0] * idle)
        return self._step(tokens, positions, options)[: len(requests)]

    def _step(self, tokens: Tensor, positions: Tensor, options: dict[str, Any]) -> Tensor:
        span = -(-(int(positions.max()) + 1) // SPAN_STEP) * SPAN_STEP
        visible = torch.arange(span, dtype=torch.int64, device=positions.device) <= positions[:, None]
        caches = [cache[: len(tokens)] for cache in self._caches]
        run = self._code(STEP, options)
        if run is not None:
            return run([tokens, positions, visible, *caches])[0]
        step = BatchStep(self._model if options else self._lm)
        logits: Tensor = step(tokens, positions, visible, caches, **options)
        return logits

    def _integers(self, values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._lm.device)

    def _read_prompt(self, prompt: list[int], slot: int, options: dict[str, Any]) -> Tensor:
        """The logits [1, V] after a prompt, which is read into the caches."""
        count, tokens = len(prompt), self._integers([prompt])
        run = self._code(TOKEN if count == 1 else PROMPT, options) if count <= MAX_PROMPT else None
        if run is not None:
            room = -(-count // CACHE_STEP) * CACHE_STEP
            written = [cache.new_zeros((1, cache.shape[1], room, cache.shape[3])) for cache in self._caches]
            logits = run([tokens, self._integers(range(count)), *written])[0]
        else:
            cache = DynamicCache(config=self._lm.config)
            if keeps_last_logits(self._lm):
                options = {**options, "logits_to_keep": 1}
            forward = self._model if "adapter_names" in options else self._lm
            logits = forward(input_ids=tokens, use_cache=True, **{CACHE: cache}, **options).logits
            written = [layer.keys for layer in cache.layers] + [layer.values for layer in cache.layers]
        for ours, theirs in zip(self._caches, written, strict=True):
            ours[slot, :, :count] = theirs[0, :, :count]
        return logits[:, -1]

    @torch.no_grad()
    def _test(self) -> None:
        """Compares a step of two sequences with the model's own forward.

        Raises:
            ValueError: they differ, because the model ignores positions or masks of single sequences.
        """
        vocabulary = vocabulary_size(self._lm)
        prompts = [[token % vocabulary for token in tokens] for tokens in ((5, 9, 3), (7, 5, 11, 2, 6))]
        expected = torch.cat([self._read_prompt(prompt, 0, {}) for prompt in prompts]).double()
        for slot, prompt in enumerate(prompts):
            self._read_prompt(prompt[:-1], slot, {})
        last = self._integers([prompt[-1] for prompt in prompts])
        logits = self._step(last, self._integers([len(prompt) - 1 for prompt in prompts]), {})
        for cache in self._caches:
            cache[:2].zero_()
        error = float((logits.double() - expected).norm() / expected.norm())
        tolerance = _TOLERANCE if self._caches[0].dtype == torch.float32 else _TOLERANCE_16_BITS
        if bool(expected.isfinite().all()) and not error < tolerance:
            raise _rejected(
                "its logits of a sequence in a batch differ from those of the sequence alone by "
                f"{error:.2g} of their norm"
            )


def generate(
    model: Any,
    prompts: Sequence[Iterable[int] | Tensor],
    sampling: Sampling | Sequence[Sampling] | None = None,
    adapters: Sequence[str | None] | None = None,
    *,
    sequences: int = 16,
    compiled: bool | None = None,
) -> list[Request]:
    """Continues prompts of token ids, up to ``sequences`` at once.

    Args:
        model: as for ``BatchDecoder``.
        prompts: the token ids of each prompt.
        sampling: one for each prompt, or one for all. With one for all that has a seed, prompt i gets ``seed + i``.
        adapters: an adapter's name for each prompt. None: the active ones.
        sequences, compiled: as for ``BatchDecoder``.

    Returns:
        The finished requests, in the order of the prompts.

    Raises:
        ValueError: an argument is wrong.
        Exception: the error of the first request that failed.

    Example:
        >>> from qlora_ext.decoding import Sampling, generate
        >>> def four_answers(model, prompt):
        ...     requests = generate(model, [prompt] * 4, Sampling(temperature=0.8, seed=0, max_new_tokens=100))
        ...     return [request.tokens for request in requests]
    """
    if not isinstance(prompts, Iterable):
        raise ValueError(f"prompts: expected a list of lists of token ids, got {prompts!r}")
    prompts = list(prompts)
    count = len(prompts)
    if sampling is None or isinstance(sampling, Sampling):
        one = sampling or Sampling()
        each = [one if one.seed is None else dataclasses.replace(one, seed=one.seed + i) for i in range(count)]
    elif isinstance(sampling, Sequence) and all(isinstance(one, Sampling) for one in sampling):
        each = list(sampling)
    else:
        raise ValueError(f"sampling: expected a Sampling, or a list of one for each prompt, got {sampling!r}")
    names = [None] * count if adapters is None else list(adapters)
    for name, given in (("sampling", each), ("adapters", names)):
        if len(given) != count:
            raise ValueError(f"{name}: expected one for each of {count} prompts, got {len(given)}")
    if not prompts:
        return []
    ids = [_ids(prompt) for prompt in prompts]
    most = [len(prompt) + (one.max_new_tokens or 0) for prompt, one in zip(ids, each, strict=True)]
    bounded = all(one.max_new_tokens is not None for one in each)
    engine = BatchDecoder(model, min(sequences, count), max(most) if bounded else None, compiled)
    requests = [engine.submit(*arguments) for arguments in zip(ids, each, names, strict=True)]
    engine.run()
    for request in requests:
        if request.error is not None:
            raise request.error
    return requests
