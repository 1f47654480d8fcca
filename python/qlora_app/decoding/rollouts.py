"""Answers for reinforcement learning, sampled from the model that is being trained."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from qlora_ext.output_head import causal_lm

from ..special_tokens import prompt_tokens
from .answers import finished
from .batch import BatchDecoder
from .compiled import BREAK_EVEN_TOKENS
from .requests import DecodeRequest
from .sampling import Sampling

_CAPACITY_STEP = 256  # tokens by which the capacity grows


class Rollouts:
    """A ``rollout_func`` for TRL's ``GRPOTrainer``, which samples by batched decoding.

    It reads the trained weights in place: nothing is merged or copied, and each answer comes from the adapter as it is
    at that step. The prompt of a group is read once. Temperature, ``top_p``, ``top_k``, ``min_p`` and the
    number of tokens are those of the trainer's ``GRPOConfig``. Seeds come from torch's default generator, so a run that
    is resumed from a checkpoint samples the same answers.

    The log-probabilities returned are those by which the tokens were drawn. docs/compile.md says where they have the
    bits of the training forward. TRL corrects nothing by them: while each batch of answers is used for one step, it
    compares the training forward's log-probabilities with themselves.

    Args:
        sequences: answers that are written at once.
        encode: makes token ids of a prompt. By default the tokenizer encodes a text, without the special tokens that
            end it, and its chat template formats messages.
        compiled: whether to compile the decoding, as for ``BatchDecoder``. By default it is compiled on the CPU if the
            run is long enough to save more time than compiling takes, and on CUDA always.
        progress: called with a message before and after a compilation.
        reproducible: as for ``BatchDecoder``.

    Example:
        >>> from qlora_app.decoding import Rollouts
        >>> def trainer(model, tokenizer, reward, data):
        ...     from trl import GRPOTrainer
        ...     return GRPOTrainer(model=model, reward_funcs=reward, train_dataset=data, processing_class=tokenizer,
        ...                        rollout_func=Rollouts())
    """

    def __init__(
        self,
        sequences: int = 16,
        encode: Callable[[Any], list[int]] | None = None,
        compiled: bool | None = None,
        progress: Callable[[str], object] | None = None,
        reproducible: bool = False,
    ) -> None:
        self._sequences, self._encode, self._compiled, self._progress = sequences, encode, compiled, progress
        self._reproducible = reproducible
        self._engine: BatchDecoder | None = None
        self._model: Callable[[], Any] = lambda: None

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        """One answer for each prompt, which is a text or a list of messages.

        Returns:
            ``prompt_ids``, ``completion_ids`` and ``logprobs``: a list per prompt.
        """
        args, tokenizer = trainer.args, trainer.processing_class
        sampling = Sampling(
            max_new_tokens=args.max_completion_length,
            temperature=args.temperature,
            top_p=args.top_p,
            top_k=args.top_k or 0,
            min_p=args.min_p or 0.0,
            stop_tokens=tuple(trainer.eos_token_ids),
        )
        encode = self._encode or functools.partial(_encoded, tokenizer)
        done = self.answers(trainer, [encode(prompt) for prompt in prompts], sampling)
        return {
            "prompt_ids": [request.prompt for request in done],
            "completion_ids": [request.tokens for request in done],
            "logprobs": [request.logprobs for request in done],
        }

    def answers(self, trainer: Any, prompts: Sequence[list[int]], sampling: Sampling) -> list[DecodeRequest]:
        """One finished request for each prompt of token ids, by the model that ``trainer`` trains.

        If ``sampling`` has a seed, it is that of the first prompt, and the others count up from it.

        Raises:
            ValueError: ``sampling.max_new_tokens`` is None.
            FloatingPointError: the model computed NaN.
        """
        if sampling.max_new_tokens is None:
            raise ValueError("sampling: expected a number of max_new_tokens, got None")
        model = trainer.model
        training = model.training
        model.eval()
        try:
            engine = self._engine_for(trainer, max(map(len, prompts)) + sampling.max_new_tokens)
            each = sampling.for_each(len(prompts))
            return finished(engine, [engine.submit(*both) for both in zip(prompts, each, strict=True)])
        finally:
            model.train(training)

    def _engine_for(self, trainer: Any, tokens: int) -> BatchDecoder:
        """A decoder with room for ``tokens`` tokens per sequence."""
        if self._engine is None or self._model() is not trainer.model or self._engine.capacity < tokens:
            compiled = self._compiled
            on_cpu = trainer.model.device.type == "cpu"
            if compiled is None and on_cpu and not self._pays(trainer.args):
                compiled = False
            capacity = -(-tokens // _CAPACITY_STEP) * _CAPACITY_STEP
            positions = getattr(causal_lm(trainer.model).config, "max_position_embeddings", None) or capacity
            capacity = max(min(capacity, positions), tokens)
            self._engine = BatchDecoder(
                trainer.model, self._sequences, capacity, compiled, self._progress, self._reproducible
            )
            self._model = weakref.ref(trainer.model)
        return self._engine

    def _pays(self, args: Any) -> bool:
        """Whether compiled steps of decoding save more time in the whole run than compiling takes."""
        answers = max(args.max_steps, 0) * args.per_device_train_batch_size * args.gradient_accumulation_steps
        steps: int = answers * args.max_completion_length // self._sequences
        return steps >= BREAK_EVEN_TOKENS


def _encoded(tokenizer: Any, prompt: Any) -> list[int]:
    if isinstance(prompt, str):
        return prompt_tokens(tokenizer, prompt)
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    return prompt_tokens(tokenizer, text, formatted=True)
