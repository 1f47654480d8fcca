"""KL divergence of a model from its teacher (Hinton et al., 2015), without the logits of all tokens in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from .output_head import causal_lm, has_plain_head

FORWARD, REVERSE, MIX = "forward", "reverse", "mix"
# Maximum number of logits per chunk. Computing their divergence takes several times their memory.
_LOGITS = 1 << 21


class Targets(Protocol):
    """What the teacher says about M tokens."""

    def compared(self, student: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        """The log-probabilities of the teacher and the student for the same events, float32 [m, events].

        Args:
            student: the student's log-probabilities of all tokens of the vocabulary [m, V].
            part: selects these m tokens.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Logits:
    """Logits of M tokens, which are computed for some of them at a time.

    Attributes:
        hidden: [M, K], or if there is no ``head``, the logits themselves.
        head: the output head of the model, which is frozen.
        vocabulary: number of tokens that are compared. The head may have further rows, which belong to no token.
    """

    hidden: Tensor
    head: Callable[[Tensor], Tensor] | None
    vocabulary: int

    @classmethod
    def of(cls, model: Any, inputs: dict[str, Tensor], learnt: Tensor, vocabulary: int) -> Logits:
        """Those that predict the ``learnt`` tokens.

        Args:
            inputs: input_ids and position_ids, each [B, T].
            learnt: which of the tokens from the second one on, bool [B, T - 1].
        """
        base = causal_lm(model)
        head = base.get_output_embeddings()
        if has_plain_head(base) and not any(p.requires_grad for p in head.parameters()):
            hidden = base.base_model(**inputs, use_cache=False).last_hidden_state
            return cls(hidden[:, :-1][learnt], head, vocabulary)
        return cls(model(**inputs, use_cache=False).logits[:, :-1][learnt], None, vocabulary)

    def logprobs(self, hidden: Tensor) -> Tensor:
        """The log-probabilities of the vocabulary for some rows of ``hidden``, float32."""
        logits = hidden if self.head is None else self.head(hidden)
        return logits[:, : self.vocabulary].float().log_softmax(1)

    def compared(self, student: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        return self.logprobs(self.hidden[part]), student


@dataclasses.dataclass(frozen=True)
class TopK:
    """The teacher's log-probabilities of its k most likely tokens, and of all the others together.

    Attributes:
        ids: of the k tokens, int64 [M, k].
        logprobs: float32 [M, k + 1]; the last column is that of all other tokens.
    """

    ids: Tensor
    logprobs: Tensor

    @classmethod
    def of(cls, logits: Logits, k: int) -> TopK:
        """The k most likely tokens by ``logits``, k < vocabulary."""
        found: list[tuple[Tensor, Tensor]] = []
        for part in _parts(len(logits.hidden), logits.vocabulary):
            logprobs = logits.logprobs(logits.hidden[part])
            ids = logprobs.topk(k, 1).indices
            found.append((ids, _grouped(logprobs, ids)))
        return cls(torch.cat([ids for ids, _ in found]), torch.cat([logprobs for _, logprobs in found]))

    def compared(self, student: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        return self.logprobs[part], _grouped(student, self.ids[part])


def _grouped(logprobs: Tensor, ids: Tensor) -> Tensor:
    """The log-probabilities of the tokens ``ids`` [m, k], and of all others together: [m, k + 1]."""
    others = logprobs.scatter(1, ids, -torch.inf).logsumexp(1, keepdim=True)
    return torch.cat([logprobs.gather(1, ids), others], 1)


def _parts(tokens: int, vocabulary: int) -> list[slice]:
    rows = max(1, _LOGITS // vocabulary)
    return [slice(begin, begin + rows) for begin in range(0, tokens, rows)]


def divergence(teacher: Tensor, student: Tensor, kind: str) -> Tensor:
    """The sum over tokens of the KL divergence between log-probabilities [M, events].

    Args:
        kind: "forward" is KL(teacher ‖ student), "reverse" KL(student ‖ teacher), and "mix" the mean of both.
    """

    def kl(p: Tensor, q: Tensor) -> Tensor:
        return functional.kl_div(q, p, reduction="sum", log_target=True)

    if kind == MIX:
        return (kl(teacher, student) + kl(student, teacher)) / 2
    return kl(student, teacher) if kind == REVERSE else kl(teacher, student)


class _ChunkedDivergence(torch.autograd.Function):
    """The forward also computes the gradient of ``hidden``, so that no logits are kept for the backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, student: Logits, teacher: Targets, kind: str) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden if wanted else hidden[:0])
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for part in _parts(len(hidden), student.vocabulary):
            rows = hidden[part].detach().requires_grad_(wanted)
            with torch.set_grad_enabled(wanted):
                lost = divergence(*teacher.compared(student.logprobs(rows), part), kind)
            total += lost.detach()
            if wanted:
                (gradient[part],) = torch.autograd.grad(lost, rows)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad, None, None, None


def summed_divergence(student: Logits, teacher: Targets, kind: str) -> Tensor:
    """The ``divergence`` of all tokens, float32, computed for some tokens at a time. Gradients reach the student's
    ``hidden``."""
    return _ChunkedDivergence.apply(student.hidden, student, teacher, kind)  # type: ignore[no-any-return,no-untyped-call]
