"""The divergence from a teacher, computed for some tokens at a time, equals that of all tokens at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlora_ext import divergence as module
from qlora_ext.divergence import Logits, TopK, summed_divergence

TOKENS, WIDTH, VOCABULARY = 70, 24, 500
KINDS = ["forward", "reverse", "mix"]


def logits(
    seed: int, width: int, dtype: torch.dtype, rows: int = VOCABULARY, tokens: int = TOKENS
) -> tuple[Logits, torch.nn.Linear]:
    generator = torch.Generator().manual_seed(seed)
    head = torch.nn.Linear(width, rows, bias=seed % 2 == 0)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    head = head.to(dtype).requires_grad_(False)
    hidden = torch.randn(tokens, width, generator=generator).to(dtype).requires_grad_()
    return Logits(hidden, head, min(rows, VOCABULARY)), head


def probabilities(hidden: torch.Tensor, head: torch.nn.Linear) -> torch.Tensor:
    """In float64, of the tokens of the vocabulary."""
    bias = None if head.bias is None else head.bias.double()
    return torch.nn.functional.linear(hidden.double(), head.weight.double(), bias)[:, :VOCABULARY].softmax(1)


def expected(teacher: torch.Tensor, student: torch.Tensor, kind: str) -> torch.Tensor:
    """By the definition, from probabilities [M, events] in float64."""
    forward = (teacher * (teacher / student).log()).sum()
    reverse = (student * (student / teacher).log()).sum()
    return {"forward": forward, "reverse": reverse, "mix": (forward + reverse) / 2}[kind]


@pytest.mark.parametrize("chunk", [1, 16 * VOCABULARY, TOKENS * VOCABULARY])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_have_the_divergence_of_all_tokens(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, kind: str, chunk: int
) -> None:
    monkeypatch.setattr(module, "_LOGITS", chunk)
    (teacher, teachers_head), (student, head) = logits(0, 16, dtype), logits(1, WIDTH, dtype, rows=512)
    found = summed_divergence(student, teacher, kind)
    (3 * found).backward()
    exact = student.hidden.detach().double().requires_grad_()
    wanted = expected(probabilities(teacher.hidden, teachers_head).detach(), probabilities(exact, head), kind)
    (3 * wanted).backward()
    unit = torch.finfo(dtype).eps
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(wanted.item(), rel=8 * unit)
    assert student.hidden.grad is not None
    assert exact.grad is not None
    assert (student.hidden.grad - exact.grad).norm() < 8 * unit * exact.grad.norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 7, VOCABULARY - 1])
def test_top_k_groups_all_other_tokens(kind: str, k: int) -> None:
    (teacher, teachers_head), (student, head) = logits(2, 16, torch.float32), logits(3, WIDTH, torch.float32)
    found = summed_divergence(student, TopK.of(teacher, k), kind)
    found.backward()
    exact = student.hidden.detach().double().requires_grad_()
    p, q = probabilities(teacher.hidden, teachers_head).detach(), probabilities(exact, head)
    ids = p.topk(k).indices

    def grouped(t: torch.Tensor) -> torch.Tensor:
        top = t.gather(1, ids)
        return torch.cat([top, 1 - top.sum(1, keepdim=True)], 1)

    wanted = expected(grouped(p), grouped(q), kind)
    wanted.backward()
    assert float(found) == pytest.approx(float(wanted), rel=1e-5)
    assert student.hidden.grad is not None
    assert exact.grad is not None
    assert (student.hidden.grad - exact.grad).norm() < 1e-5 * exact.grad.norm()
    whole = expected(p, q, kind)
    assert float(wanted) <= float(whole) * (1 + 1e-9)  # what is grouped can only hide differences
    assert k < VOCABULARY - 1 or float(wanted) == pytest.approx(float(whole))


def test_logits_without_a_head() -> None:
    (teacher, _), (student, head) = logits(0, 16, torch.float32), logits(1, WIDTH, torch.float32)
    all_logits = Logits(head(student.hidden), None, VOCABULARY)
    found, same = (summed_divergence(s, teacher, "forward") for s in (all_logits, student))
    gradients = [torch.autograd.grad(loss, student.hidden)[0] for loss in (found, same)]
    assert float(found) == pytest.approx(float(same), rel=1e-6)
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-6)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that was made."""

    def __init__(self) -> None:
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.found = max([self.found, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
        return out


def test_a_large_vocabulary_never_has_the_logits_of_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary, tokens = 150_000, 64
    teacher, student = (
        Logits(one.hidden, one.head, vocabulary) for one, _ in (logits(i, 4, torch.float32, vocabulary, tokens)
                                                                for i in (0, 1))
    )  # fmt: skip
    with Largest() as largest:
        summed_divergence(student, teacher, "mix").backward()
        TopK.of(teacher, 8)
    assert vocabulary < largest.found <= module._LOGITS < vocabulary * tokens
