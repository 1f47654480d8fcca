"""Decoding of many sequences at once: continuous batching over the slots of a cache."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from qlora_ext.formats import is_integer
from qlora_ext.nn import layers_of
from qlora_ext.output_head import causal_lm
from qlora_ext.untrusted import first_line

from ..vocabulary import vocabulary_size
from .compiled import load_decoding
from .fixed import BASE, active_adapters
from .graphs import StepGraphs
from .mixed import MixedStep, load_mixed
from .packages import Code, CompilationError, not_plain, obstacle
from .prompts import PromptReader
from .requests import DecodeRequest, OnToken, token_ids
from .sampling import Sampling, draw, score
from .step import SPAN_STEP, CompiledStep, DecodeStep, EagerStep, new_caches

_USUAL_CAPACITY = 2048
_SCORED = 256  # tokens of a prompt that get logits [tokens, V] at once
# Of the self-test: far above rounding, far below the effect of a wrong position or mask.
_TOLERANCE, _TOLERANCE_16_BITS = 1e-3, 0.1
_TESTED_PAIRS = 4


def _rejected(why: str) -> ValueError:
    return ValueError(f"model: batches of it cannot be decoded: {why}")


class BatchDecoder:
    """Writes many sequences at once, one token per sequence and step.

    A prompt is read alone, without padding, when a slot is free, either whole or in parts between steps. All running
    sequences share each step, so the weights are read once per step.

    Args:
        model: a causal language model of transformers, with full attention or sliding windows, 4-bit or dense, with or
            without adapters, in evaluation mode. Its weights may change between steps, also by an optimizer.
        sequences: the number of slots.
        capacity: the most tokens of a sequence, prompt included. None: 2048, or fewer if the model has fewer
            positions. The caches, [``sequences``, H, ``capacity``, D] per layer, are allocated once.
        compiled: whether to decode with compiled code, as ``compile_decoding`` does, and on CUDA by CUDA graphs. None:
            where possible.
        progress: called with a message before and after a compilation.
        reproducible: whether every step computes all slots, also idle ones. The kernels, which depend on the number of
            rows, are then always the same, and so are the bits of a sequence, whatever else runs. If sequences have
            adapters, give each one a name.
        prompt_part: longer prompts are read in parts of this many tokens. A step ends after as many tokens of prompts,
            so that other sequences do not wait for long ones. None: a step reads whole prompts into all free slots.

    Attributes:
        compiled: whether the model's code is compiled. It computes with the adapters that are active when the decoder
            is made or, if the model has several plain LoRA adapters then, with any mixture. Other steps run the model's
            own forward. On CUDA, whether steps are captured in CUDA graphs; if adapters are switched, they are captured
            again.
        not_compiled: the reason why nothing is compiled; None if it is.
        steps: the number of steps with running sequences so far.

    Raises:
        ValueError: the model cannot be decoded in batches, or an argument is wrong.
        CompilationError: ``compiled`` is True, and the model cannot be compiled.

    Example:
        >>> from qlora_app.decoding import BatchDecoder, Sampling
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
        prompt_part: int | None = None,
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
        if prompt_part is not None and (not is_integer(prompt_part) or prompt_part < 1):
            raise ValueError(f"prompt_part: expected an integer from 1 on or None, got {prompt_part!r}")
        if not is_integer(self.capacity) or not 2 <= self.capacity <= most:
            raise ValueError(
                f"capacity: expected 2 to {most} tokens, the model's positions, for a prompt and its max_new_tokens, "
                f"got {capacity!r}"
            )
        self.steps = 0
        self._waiting: deque[DecodeRequest] = deque()
        self._running: list[DecodeRequest] = []  # the one at index i has slot i
        self._part = prompt_part
        self._readers: dict[DecodeRequest, PromptReader] = {}  # of waiting ones whose prompts have been read in part
        self._stepping = threading.Lock()
        self._require_evaluation()
        self._layer = next((m for m in self._lm.modules() if isinstance(m, BaseTunerLayer)), None)
        self._prompts: Code | None = None
        self._mixed: MixedStep | None = None
        self._graphs: StepGraphs | None = None
        self._obstacle: str | None = None
        try:
            # The self-test takes two slots.
            self._caches = new_caches(self._lm, -(-self.capacity // SPAN_STEP) * SPAN_STEP, max(sequences, 2))
            self._steps: list[DecodeStep] = [EagerStep(model, self._caches)]  # the first that can runs
            self._test()
        except ValueError:
            raise
        except Exception as error:  # models may raise any exception
            raise _rejected(first_line(error)) from error
        try:
            self._compile(compiled, progress)
        except CompilationError as error:
            if compiled:
                raise
            self._obstacle = str(error)

    def _compile(self, wanted: bool | None, progress: Callable[[str], object] | None) -> None:
        """Puts the steps that are no forward of the model before the eager one, and tests them.

        Raises:
            CompilationError: the model cannot be compiled.
        """
        if wanted is False:
            raise CompilationError("compiled is False")
        if self._lm.device.type == "cuda":
            self._capture()
            return
        why = obstacle(self._model)
        if why is not None:
            raise CompilationError(why)
        prompts = load_decoding(self._model, progress=progress)
        self._steps.insert(0, CompiledStep(self._model, self._caches, progress))
        self._prompts = prompts
        self._test()
        self._compile_mixed(wanted, progress)

    def _capture(self) -> None:
        """Puts CUDA graphs before the eager step.

        Raises:
            CompilationError: they cannot compute steps of the model.
        """
        graphs = StepGraphs(self._lm, self._caches, self.reproducible)
        if graphs.obstacle is not None:
            raise CompilationError(graphs.obstacle)
        self._steps.insert(0, graphs)
        try:
            difference = self._error()
            if graphs.failure is not None:
                raise CompilationError(f"its step cannot be captured: {graphs.failure}")
            if difference is not None:
                raise CompilationError(f"a replay of its step differs from its forward by {difference:.2g} of the norm")
        except Exception as error:  # models may raise any exception
            self._steps.remove(graphs)
            raise CompilationError(first_line(error)) from error
        graphs.clear()  # those of two rows may never be used again
        self._graphs = graphs

    def _compile_mixed(self, wanted: bool | None, progress: Callable[[str], object] | None) -> None:
        """Adds the step for sequences with different adapters, unless PEFT's code has to compute these."""
        try:
            self._mixed = load_mixed(self._model, self._caches, progress) if len(self._active()) == 1 else None
        except CompilationError:
            if wanted:
                raise
        if self._mixed is not None:
            self._steps.insert(-1, self._mixed)
            self._test([*self._model.peft_config][-2:])

    @property
    def compiled(self) -> bool:
        return self.not_compiled is None

    @property
    def not_compiled(self) -> str | None:
        return self._obstacle if self._graphs is None else self._graphs.failure

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
    ) -> DecodeRequest:
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
        ids = token_ids(prompt)
        vocabulary = vocabulary_size(self._lm)
        if not ids:
            raise ValueError("prompt: expected at least one token, got none")
        if min(ids) < 0 or max(ids) >= vocabulary:
            raise ValueError(f"prompt: expected token ids from 0 to {vocabulary - 1}, got {min(ids)} to {max(ids)}")
        sampling = Sampling() if sampling is None else sampling
        if not isinstance(sampling, Sampling):
            raise ValueError(f"sampling: expected a Sampling, got {sampling!r}")
        room = self.capacity - len(ids)
        most = max(room, 1) if sampling.max_new_tokens is None else sampling.max_new_tokens
        if room < most:
            raise ValueError(
                f"capacity: expected a prompt and max_new_tokens of together at most {self.capacity} tokens, got "
                f"{len(ids)} and {most}"
            )
        self._check_adapter(adapter)
        if sampling.seed is None:
            sampling = dataclasses.replace(
                sampling, seed=int(torch.randint(1 << 62, (), dtype=torch.int64, device="cpu"))
            )
        if sampling.stop_tokens is None:
            sampling = dataclasses.replace(sampling, stop_tokens=self.end_tokens)
        request = DecodeRequest(ids, sampling, most, adapter, on_token)
        self._waiting.append(request)
        return request

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """The end-of-sequence ids of the model's generation config."""
        found = getattr(self._lm, "generation_config", self._lm.config).eos_token_id
        return () if found is None else tuple(found) if isinstance(found, (list, tuple)) else (found,)

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
        """Calls ``step`` until all sequences have ended. Weights and active adapters must not change meanwhile."""
        left = self.step()
        while left:
            left = self._advance(weights_may_differ=False)

    def step(self) -> bool:
        """Writes a token of every running sequence, then reads prompts into free slots and writes their first tokens.

        A prompt that several sequences start with is read once, and copied to the slots of the others.

        Returns:
            Whether sequences are left.

        Raises:
            RuntimeError: another call of ``step`` has not returned yet.
            ValueError: the model is in training mode.
        """
        return self._advance(weights_may_differ=True)

    @torch.no_grad()
    def _advance(self, weights_may_differ: bool) -> bool:
        """The work of ``step``. ``weights_may_differ``: from those by which running sequences' prompts were read."""
        if not self._stepping.acquire(blocking=False):
            raise RuntimeError("step: expected one call at a time, got a second one")
        try:
            self._require_evaluation()
            if weights_may_differ:
                for request in self._running:
                    request.prompt_logits = None
            for request in list(self._waiting):  # cancelled ones must not wait for a free slot
                if request.end_if_cancelled():
                    self._waiting.remove(request)
                    self._readers.pop(request, None)
            self._drop_ended()
            if self._running:
                self._continue(self._running, self._read_tokens(self._running))
                self.steps += 1
            left = self._part or math.inf
            while left > 0 and self._waiting and len(self._running) < self.sequences:
                left -= self._start(self._waiting.popleft())
            return bool(self._running or self._waiting)
        finally:
            self._stepping.release()

    def _require_evaluation(self) -> None:
        if self._lm.training:
            raise ValueError("model: expected evaluation mode, got training mode; call model.eval()")

    def _start(self, request: DecodeRequest) -> int:
        """Reads the next part of a prompt, for which there is a slot. Returns its number of tokens."""
        reader = self._readers.pop(request, None) or PromptReader(request.prompt, self._caches)
        first, logits = reader.count, None
        if not self._has_ended(request):
            try:
                logits = self._copied(request, reader)
                if logits is None:
                    options = self._forward_options([request.adapter])
                    if self._mixed is not None:
                        self._mixed.renew(options)
                    logits = self._read_part(request, reader, options)
            except Exception as error:  # for example, no memory for a long prompt
                request.fail(error)
        if logits is None or request.done:  # it failed
            return reader.count - first
        if not reader.done:  # prompts with a slot take turns, so that short ones do not wait for long ones
            self._readers[request] = reader
            self._waiting.insert(self.sequences - len(self._running) - 1, request)
        elif not request.end_without_tokens():
            reader.store(self._caches, len(self._running))
            if not request.sampling.prompt_logprobs:  # whose logits are never those of compiled code
                request.prompt_logits = logits
            self._running.append(request)
            self._continue([request], logits)
        return reader.count - first

    def _read_part(self, request: DecodeRequest, reader: PromptReader, options: dict[str, Any]) -> Tensor:
        """Reads the next part of a prompt, and has the request record its log-probabilities if it wants them."""
        if not request.sampling.prompt_logprobs:
            return self._read(reader, options, self._part)
        first = reader.count + 1
        logits = self._read(reader, options, min(self._part or _SCORED, _SCORED), every=True)
        scored = request.prompt[first : reader.count + 1]
        request.add_prompt(score(logits[: len(scored)], scored, request.sampling))
        return logits[-1:]

    def _copied(self, request: DecodeRequest, reader: PromptReader) -> Tensor | None:
        """The logits after a prompt that a running sequence has too, whose keys and values the reader takes."""
        if request.sampling.prompt_logprobs:
            return None
        for slot, other in enumerate(self._running):
            if other.prompt_logits is not None and (other.prompt, other.adapter) == (request.prompt, request.adapter):
                reader.take(self._caches, slot)
                return other.prompt_logits
        return None

    def _has_ended(self, request: DecodeRequest) -> bool:
        """Whether a sequence has ended, for example because its adapter was deleted."""
        if not request.end_if_cancelled():
            try:
                self._check_adapter(request.adapter)
            except ValueError as error:
                request.fail(error)
        return request.done

    def _continue(self, requests: Sequence[DecodeRequest], logits: Tensor) -> None:
        """Adds a token to each sequence, and drops those that have ended."""
        samplings, numbers = [request.sampling for request in requests], [request.numbers for request in requests]
        drawn = draw(logits, samplings, numbers, [request.allowed() for request in requests])
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
            ended.prompt_logits = None
            last = self._running.pop()
            if last is not ended:
                self._running[slot] = last
                for cache in self._caches:
                    cache[slot, :, : last.read] = cache[len(self._running), :, : last.read]

    def _active(self) -> list[str]:
        """The names of the active adapters."""
        return [] if self._layer is None else active_adapters(self._layer)

    def _forward_options(self, adapters: Sequence[str | None], idle: int = 0) -> dict[str, Any]:
        """The adapters of sequences as an option of PEFT's forward; none if all use the active ones."""
        active = self._active()
        if all(adapter is None for adapter in adapters):
            return {}
        usual = active[0] if active else BASE
        names = [usual if adapter is None else adapter for adapter in adapters]
        # Compiled steps and those with names differ in rounding, so reproducible ones always have names.
        always = self.reproducible and self._layer is not None
        return {} if set(names) == {usual} and not always else {"adapter_names": names + [usual] * idle}

    def _read_tokens(self, requests: Sequence[DecodeRequest]) -> Tensor:
        """The logits [B, V] after each sequence's last token, which is read into the caches."""
        idle = self.sequences - len(requests) if self.reproducible else 0
        options = self._forward_options([request.adapter for request in requests], idle)
        tokens = [request.tokens[-1] for request in requests] + [0] * idle
        positions = [request.read for request in requests] + [0] * idle
        return self._step(tokens, positions, options)[: len(requests)]

    def _step(self, tokens: list[int], positions: list[int], options: dict[str, Any]) -> Tensor:
        found = (step(tokens, positions, options) for step in self._steps)
        return next(logits for logits in found if logits is not None)

    def _read(
        self, reader: PromptReader, options: dict[str, Any], most: int | None = None, every: bool = False
    ) -> Tensor:
        """Reads at most ``most`` more tokens of a prompt. Returns the logits of ``PromptReader.read``."""
        forward = functools.partial(self._model if options else self._lm, **options)
        return reader.read(self._lm, None if options else self._prompts, forward, most, every)

    def _test(self, adapters: Sequence[str | None] = (None, None)) -> None:
        """Raises a ValueError if a step for two sequences ignores positions or masks of single ones."""
        error = self._error(adapters)
        if error is not None:
            raise _rejected(
                "its logits of a sequence in a batch differ from those of the sequence alone by "
                f"{error:.2g} of their norm"
            )

    @torch.no_grad()
    def _error(self, adapters: Sequence[str | None] = (None, None)) -> float | None:
        """How far steps of two sequences are from the model's own forward; None if they agree.

        A wrong position or mask changes the logits of every pair. Those of a single pair may also differ by rounding:
        after some tokens, such as special ones, SmolLM2 amplifies the rounding of 16 bits to most of the logits' norm.
        """
        dtypes = {self._caches[0].dtype, *(layer.compute_dtype for _, layer in layers_of(self._lm))}
        tolerance = _TOLERANCE if dtypes == {torch.float32} else _TOLERANCE_16_BITS
        errors: list[float] = []
        while len(errors) < _TESTED_PAIRS:
            errors.append(self._step_error(adapters, torch.Generator().manual_seed(len(errors))))
            if errors[-1] < tolerance:
                return None
        return min(errors)

    def _step_error(self, adapters: Sequence[str | None], generator: torch.Generator) -> float:
        """How far the logits of a step of two random sequences are from those of each alone, relative to their norm."""
        vocabulary = vocabulary_size(self._lm)
        tokens = torch.randint(vocabulary, (8,), generator=generator, dtype=torch.int64, device="cpu").tolist()
        prompts = [tokens[:3], tokens[3:]]
        of_each = [self._forward_options([adapter]) for adapter in adapters]
        whole, begun = ([PromptReader(prompt[:end], self._caches) for prompt in prompts] for end in (None, -1))
        expected = torch.cat([self._read(*each) for each in zip(whole, of_each, strict=True)]).double()
        for slot, reader in enumerate(begun):
            for most in (1, None):
                self._read(reader, of_each[slot], most)
            reader.store(self._caches, slot)
        last, positions = [prompt[-1] for prompt in prompts], [len(prompt) - 1 for prompt in prompts]
        for _ in range(2):  # a CUDA graph of the first is captured and replayed by the second
            logits = self._step(last, positions, self._forward_options(adapters))
        for cache in self._caches:
            cache[:2].zero_()
        if not bool(expected.isfinite().all()):
            return 0.0  # requests tell of this
        return float((logits.double() - expected).norm() / expected.norm())
