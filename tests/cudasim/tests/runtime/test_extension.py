"""A PyTorch extension's kernels, run by the interpreter, with their faults."""

import pytest
import torch


def test_add(ops):
    a, b = torch.randn(1000), torch.randn(1000)
    assert torch.equal(ops.add(a.cuda(), b.cuda()).cpu(), a + b)


def test_out_of_bounds_write_is_caught(ops):
    a = torch.ones(1000, device="cuda")
    with pytest.raises(RuntimeError, match="illegal memory access.*add_kernel"):
        ops.add(a, a, checked=False)


def test_fault_does_not_poison_the_process(ops):
    a = torch.ones(100, device="cuda")
    with pytest.raises(RuntimeError):
        ops.add(a, a, checked=False)
    torch.cuda.synchronize()
    assert torch.equal(ops.add(a, a), 2 * a)


def test_exact_fit_needs_no_bounds_check(ops):
    a = torch.ones(256, device="cuda")
    assert torch.equal(ops.add(a, a, checked=False), 2 * a)


def test_shared_memory_sum(ops):
    x = torch.arange(1000, dtype=torch.float32)
    assert ops.sum(x.cuda()).item() == x.sum().item()


def test_bfloat16(ops):
    x = torch.randn(999).bfloat16()
    expected = torch.nn.functional.silu(x.float()).bfloat16()
    torch.testing.assert_close(ops.silu(x.cuda()).cpu(), expected, rtol=0.01, atol=0.01)


def test_tensor_cores(ops):
    a, b = torch.randn(16, 16).bfloat16(), torch.randn(16, 8).bfloat16()
    out = ops.mma(a.cuda(), b.t().contiguous().cuda())
    torch.testing.assert_close(out.cpu(), a.float() @ b.float(), rtol=1e-5, atol=1e-5)


def test_large_dynamic_shared_memory(ops):
    x = torch.arange(20000, dtype=torch.float32)  # 80 kB
    assert torch.equal(ops.reverse(x.cuda()).cpu(), x.flip(0))


def test_large_dynamic_shared_memory_needs_opt_in(ops):
    with pytest.raises(RuntimeError, match="invalid argument.*80000 bytes of dynamic shared memory"):
        ops.reverse(torch.zeros(20000, device="cuda"), opt_in=False)


def test_too_much_shared_memory(ops):
    with pytest.raises(RuntimeError, match="invalid argument"):
        ops.reverse(torch.zeros(70000, device="cuda"))


def test_device_variables(ops):
    before, out = ops.count(torch.zeros(1, device="cuda"), 2.0)
    assert out[:4].tolist() == [2, 4, 6, 8]
    after, _ = ops.count(out, 1.0)
    assert after == before + 1


def test_launch_bounds(ops):
    assert ops.bounded(torch.zeros(1, device="cuda"), 128)[-1].item() == 127
    with pytest.raises(RuntimeError, match="launch bound of 128"):
        ops.bounded(torch.zeros(1, device="cuda"), 160)


def test_occupancy(ops):
    assert ops.occupancy(1024, 0) == 2
    assert ops.occupancy(256, 0) == 8
    assert ops.occupancy(256, 100 * 1024) == 2
    assert ops.occupancy(256, 200 * 1024) == 1
    assert ops.occupancy(256, 220 * 1024) == 0


def test_printf_and_assert(ops, capfd):
    ops.check_below_three(torch.tensor([1.0, 2.0], device="cuda"))
    assert "thread 1 has 2" in capfd.readouterr().out
    with pytest.raises(RuntimeError, match="device-side assert triggered.*in.threadIdx.x. < 3"):
        ops.check_below_three(torch.tensor([1.0, 5.0], device="cuda"))


def test_active_clusters(ops):
    # As on an H100 of whose GPCs one has 14 SMs. test_launcher.py has another one.
    assert [ops.active_clusters(size) for size in (1, 4, 8)] == [132, 31, 15]


def test_clusters(ops):
    like = torch.zeros(1, device="cuda")
    assert ops.cluster(like, 4, 3).tolist() == [10, 10, 10]
    with pytest.raises(RuntimeError, match="cluster"):
        ops.cluster(like, 16, 1)


def test_dependent_launch(ops, monkeypatch):
    monkeypatch.setenv("CUDASIM_CHECK", "race,grid")  # each launch reads it
    x = torch.ones(64, device="cuda")
    assert torch.equal(ops.dependent(ops.add(x, x), waits=True), 2 * x)
    with pytest.raises(RuntimeError, match="race between launches: read.*add_kernel.*may still run"):
        ops.dependent(ops.add(x, x), waits=False)
    # Other work in between is an ordinary operation, which ends before the launch starts.
    assert torch.equal(ops.dependent(ops.add(x, x).mul_(2), waits=False), 4 * x)


def test_dependent_launch_in_a_graph(ops, monkeypatch):
    monkeypatch.setenv("CUDASIM_CHECK", "race,grid")
    x = torch.ones(64, device="cuda")
    for waits in (True, False):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = ops.dependent(ops.add(x, x), waits=waits)
        if waits:
            graph.replay()
            assert torch.equal(out, 2 * x)
        else:
            with pytest.raises(RuntimeError, match="race between launches"):
                graph.replay()


def test_cooperative_grid(ops):
    like = torch.zeros(1, device="cuda")
    assert ops.grid(like, 20).tolist() == [20] * 20
    with pytest.raises(RuntimeError, match="too many blocks in cooperative launch"):
        ops.grid(like, 10000)


def test_tensor_map(ops):
    x = torch.arange(20 * 64, dtype=torch.float32).reshape(20, 64)
    assert torch.equal(ops.tile(x.cuda(), 16, 8).cpu(), x[8:16, 16:32])
    edge = ops.tile(x.cuda(), 56, 16).cpu()  # what lies outside reads as zero
    assert torch.equal(edge[:4, :8], x[16:, 56:])
    assert edge[4:].eq(0).all()
    assert edge[:, 8:].eq(0).all()


def test_autograd_through_the_extension(ops):
    class Silu(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return ops.silu(x)

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            s = torch.sigmoid(x.float())
            return (grad.float() * (s + x.float() * s * (1 - s))).to(x.dtype)

    x = torch.randn(64, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(16, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    torch.nn.functional.linear(Silu.apply(x), w).float().pow(2).mean().backward()

    x2, w2 = (t.detach().cpu().float().requires_grad_() for t in (x, w))
    torch.nn.functional.linear(torch.nn.functional.silu(x2), w2).pow(2).mean().backward()
    torch.testing.assert_close(x.grad.float().cpu(), x2.grad, rtol=0.1, atol=0.02)
    torch.testing.assert_close(w.grad.float().cpu(), w2.grad, rtol=0.1, atol=0.02)
