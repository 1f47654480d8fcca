"""Device memory in numbers."""

import torch


def test_current_and_peak():
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    x = torch.zeros(1000, device="cuda")
    assert torch.cuda.memory_allocated() == before + 4000 == torch.cuda.memory_reserved()
    y = x * 2 + 1  # the product lives until the sum is there
    assert torch.cuda.memory_allocated() == before + 8000
    assert torch.cuda.max_memory_allocated() == before + 12000
    del y
    torch.cuda.reset_peak_memory_stats()
    assert torch.cuda.max_memory_allocated() == before + 4000
    assert torch.cuda.memory_stats()["allocation.all.current"] >= 1


def test_peak_of_a_training_step():
    n, m = 256, 64
    w = torch.zeros(n, n, device="cuda", requires_grad=True)
    x = torch.zeros(m, n, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    (x @ w).relu().sum().backward()
    assert torch.cuda.memory_allocated() == before + 4 * n * n  # the gradient
    assert 4 * (n * n + m * n) <= torch.cuda.max_memory_allocated() - before <= 4 * (n * n + 5 * m * n)
