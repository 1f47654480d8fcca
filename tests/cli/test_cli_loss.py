"""The loss with logits computed in chunks of tokens equals the loss over all tokens at once."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from qlora_app.models import loss as loss_module
from qlora_app.models.loss import head_loss


def problem(dtype: torch.dtype, bias: bool) -> tuple[torch.nn.Linear, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    head = torch.nn.Linear(24, 500, bias=bias).to(dtype).requires_grad_(False)
    hidden = torch.randn(70, 24).to(dtype).requires_grad_()
    return head, hidden, torch.randint(0, 500, (70,))


def value_and_gradient(head: torch.nn.Linear, hidden: torch.Tensor, labels: torch.Tensor) -> tuple[float, torch.Tensor]:
    loss = head_loss(head, hidden, labels, chunked=True)
    assert loss.dtype == torch.float32
    (3 * loss).backward()
    assert hidden.grad is not None
    return loss.item(), hidden.grad


@pytest.mark.parametrize("logits", [1, 16 * 500, 70 * 500])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_chunks_have_the_loss_of_all_tokens(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, bias: bool, logits: int
) -> None:
    monkeypatch.setattr(loss_module, "_LOGITS", logits)
    head, hidden, labels = problem(dtype, bias)
    loss, gradient = value_and_gradient(head, hidden, labels)
    exact = hidden.detach().double().requires_grad_()
    weight, offset = head.weight.double(), head.bias.double() if bias else None
    expected = functional.cross_entropy(functional.linear(exact, weight, offset), labels)
    (3 * expected).backward()
    unit = torch.finfo(dtype).eps
    assert loss == pytest.approx(float(expected), rel=4 * unit)
    assert (gradient - exact.grad).norm() < 4 * unit * exact.grad.norm()


def test_chunks_of_logits_are_at_most_of_the_given_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "_LOGITS", 8 * 500)
    head, hidden, labels = problem(torch.float32, bias=False)
    rows: list[int] = []
    linear = functional.linear

    def counted(x: torch.Tensor, *weights: torch.Tensor | None) -> torch.Tensor:
        rows.append(len(x))
        return linear(x, *weights)

    monkeypatch.setattr(functional, "linear", counted)
    value_and_gradient(head, hidden, labels)
    assert rows == [8] * 8 + [6]


def test_without_gradients() -> None:
    head, hidden, labels = problem(torch.float32, bias=True)
    with torch.no_grad():
        chunked, whole = (head_loss(head, hidden, labels, chunked) for chunked in (True, False))
    assert float(chunked) == pytest.approx(float(whole), rel=1e-6)
