"""TRL's GRPO (Shao et al., 2024): samples several answers per prompt, and learns from their rewards.

The answers come from ``decoding.Rollouts``, with the adapter as it is at that step.
"""

from __future__ import annotations

import asyncio
import inspect
import warnings
from collections.abc import Awaitable, Iterator, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from qlora_ext.untrusted import excerpt

from ..data import formatted_tokens
from ..decoding import Rollouts, Sampling
from ..errors import UserError, first_line
from .reward_function import Reward
from .trainer import RunTrainer

if TYPE_CHECKING:
    from .run import Run
    from .settings import Settings

_LARGEST = torch.finfo(torch.float32).max  # of a reward: TRL computes in float32


def _columns(row: Any) -> dict[str, Any]:
    return {"prompt": row["prompt"], **row["columns"]}


class CheckedReward:
    """A reward function whose exceptions and results are checked.

    Raises:
        UserError: it lacks parameters, raised an exception, or did not return one finite number per answer.
    """

    def __init__(self, reward: Reward) -> None:
        self._reward = reward
        self.__name__ = getattr(reward, "__name__", type(reward).__name__)  # TRL logs by it

    def __call__(self, completions: list[str], **columns: Any) -> list[float]:
        returned = self._returned({"completions": [*completions], **columns})
        try:
            if isinstance(returned, str | Mapping | Set):  # its elements are not the rewards in their order
                raise TypeError
            rewards = [float(reward) for reward in returned]
        except (TypeError, ValueError, RuntimeError, OverflowError):  # torch raises a RuntimeError
            rewards = []
        if len(rewards) != len(completions) or not all(abs(reward) <= _LARGEST for reward in rewards):
            raise UserError(
                f"--reward: expected {len(completions)} finite numbers from {self.__name__}, one per answer, got "
                f"{excerpt(returned)}"
            )
        return rewards

    def _returned(self, arguments: dict[str, Any]) -> Any:
        """What the function returns for keyword ``arguments``; if that is awaitable, its result."""
        self._check_parameters(arguments)
        try:
            with torch.no_grad():
                returned: Any = self._reward(**arguments)
                if inspect.isawaitable(returned):
                    with ThreadPoolExecutor(1) as thread:  # in a notebook, this thread has a running event loop
                        returned = thread.submit(asyncio.run, _awaited(returned)).result()
                return [*returned] if isinstance(returned, Iterator) else returned
        except (Exception, SystemExit) as error:  # the user's code may raise any exception
            raise UserError(f"--reward: {self.__name__} raised {type(error).__name__}: {first_line(error)}") from error

    def _check_parameters(self, arguments: dict[str, Any]) -> None:
        try:
            signature = inspect.signature(self._reward)
        except (TypeError, ValueError):  # a function that is not written in Python
            return
        try:
            signature.bind(**arguments)
        except TypeError as error:
            raise UserError(
                f"--reward: expected {self.__name__} to take the keyword arguments {', '.join(arguments)} (**columns "
                f"takes those that it does not need), got {self.__name__}{signature}: {first_line(error)}"
            ) from error


async def _awaited(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


class RewardTrainer(RunTrainer, GRPOTrainer):  # type: ignore[misc,unused-ignore]
    """Trains on prompts that ``data.split_prompts`` has encoded."""

    kind = GRPOConfig

    def __init__(self, run: Run) -> None:
        tokenizer = run.tokenizer
        self._rewards = [CheckedReward(reward) for reward in run.rewards]
        self._rollouts = Rollouts(encode=lambda text: formatted_tokens(tokenizer, text), progress=run.report)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # TRL says that rollout_func is experimental
            super().__init__(
                run,
                reward_funcs=[*self._rewards],  # TRL adds them up
                train_dataset=Dataset.from_list([_columns(row) for row in run.parts.train]),
                processing_class=tokenizer,
                rollout_func=self._rollouts,
            )

    @classmethod
    def more_arguments(cls, settings: Settings) -> dict[str, Any]:
        return {
            "beta": settings.beta,
            "num_generations": settings.generations,
            "max_completion_length": settings.max_new_tokens,
            "temperature": settings.temperature,
            "disable_dropout": True,  # answers are sampled without it
        }

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        return GRPOTrainer._get_train_sampler(self, dataset)  # a prompt occurs once per answer

    def measure(self) -> dict[str, Any]:
        """The mean reward of an answer to each held-out prompt, added up over the functions.

        The seeds are the same at each measurement.
        """
        prompts = [row["prompt_ids"] for row in self.held_out]
        sampling = Sampling(
            max_new_tokens=self.args.max_completion_length,
            temperature=self.args.temperature,
            seed=0,
            stop_tokens=self.eos_token_ids,
        )
        answers = self._rollouts.answers(self, prompts, sampling)
        texts = self.processing_class.batch_decode([a.tokens for a in answers], skip_special_tokens=True)
        rows = [_columns(row) for row in self.held_out]
        columns = {key: [row.get(key) for row in rows] for key in rows[0] if key != "prompt"}
        arguments = {
            "prompts": [row["prompt"] for row in rows],
            "completions": texts,
            "completion_ids": [a.tokens for a in answers],
            "trainer_state": self.state,
            "log_extra": _ignore,
            "log_metric": _ignore,
            **columns,
        }
        total = sum(sum(reward(**arguments)) for reward in self._rewards)
        return {"step": self.state.global_step, "eval_reward": total / len(rows)}


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Takes what a reward function logs during a measurement."""
