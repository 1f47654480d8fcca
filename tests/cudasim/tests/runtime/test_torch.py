"""PyTorch's own operators on the simulated device."""

import io

import pytest
import torch
import torch.nn.functional as F


def test_device():
    assert torch.cuda.is_available()
    assert torch.cuda.device_count() == 1
    p = torch.cuda.get_device_properties(0)
    assert (p.major, p.minor, p.multi_processor_count) == (9, 0, 132)
    assert p.shared_memory_per_block_optin == 227 * 1024


def test_fresh_memory_is_poisoned():
    assert torch.empty(100, device="cuda").isnan().all()
    assert (torch.empty(100, device="cuda", dtype=torch.int32) == -1).all()


def test_out_of_memory():
    with pytest.raises(RuntimeError, match="out of memory"):
        torch.empty(1 << 44, device="cuda")


def test_elementwise_and_casts():
    x = torch.ones(4, device="cuda") + 1
    assert x.is_cuda
    assert x.tolist() == [2, 2, 2, 2]
    assert x.to(torch.bfloat16).sum().item() == 8
    assert x.half().dtype == torch.half
    assert x.half().is_cuda


def test_views_share_memory():
    x = torch.zeros(4, 6, device="cuda")
    x[1:3, ::2].add_(1)
    x.t()[0] += 10
    assert x.sum().item() == 6 + 40
    assert x.view(-1)[6].item() == 11


def test_copies():
    x = torch.arange(12.0).reshape(3, 4)
    assert torch.equal(x.t().cuda().cpu(), x.t())
    y = torch.zeros(4, 3, device="cuda", dtype=torch.half)
    y.copy_(x.t())
    assert torch.equal(y.cpu(), x.t().half())
    assert torch.equal(x.pin_memory().to("cuda", non_blocking=True).cpu(), x)


def test_out_argument_is_resized():
    out = torch.empty(0, device="cuda")
    torch.add(torch.ones(5, device="cuda"), 1, out=out)
    assert out.tolist() == [2] * 5
    assert out.is_cuda


def test_mixed_devices_are_refused():
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(3, device="cuda") + torch.ones(3)
    assert (torch.ones(3, device="cuda") + torch.tensor(1.0)).tolist() == [2, 2, 2]


def test_indexing():
    x = torch.arange(10, device="cuda")
    assert x[torch.tensor([1, 2])].tolist() == [1, 2]
    x[x > 7] = 0
    assert x.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 0]
    assert torch.topk(x.float(), 2).indices.tolist() == [7, 6]


def test_random_numbers_follow_the_cuda_seed():
    torch.manual_seed(1)
    a, b = torch.randn(10, device="cuda"), torch.randn(10, device="cuda")
    torch.manual_seed(1)
    assert torch.equal(a, torch.randn(10, device="cuda"))
    assert not torch.equal(a, b)
    state = torch.cuda.get_rng_state()
    c = torch.rand(10, device="cuda")
    torch.cuda.set_rng_state(state)
    assert torch.equal(c, torch.rand(10, device="cuda"))
    g = torch.Generator("cuda").manual_seed(3)
    assert torch.randperm(8, device="cuda", generator=g).sort().values.tolist() == list(range(8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.half])
def test_linear_and_gradients(dtype):
    x, w, b = torch.randn(6, 8).to(dtype), torch.randn(4, 8).to(dtype), torch.randn(4).to(dtype)
    on_cpu = [t.clone().requires_grad_() for t in (x, w, b)]
    on_gpu = [t.cuda().requires_grad_() for t in (x, w, b)]
    for args in (on_cpu, on_gpu):
        F.linear(*args).float().square().sum().backward()
    for c, g in zip(on_cpu, on_gpu, strict=True):
        assert g.grad.is_cuda
        torch.testing.assert_close(g.grad.cpu(), c.grad)


def test_training_a_small_network():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1),
        torch.nn.BatchNorm2d(8),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(8 * 64, 10),
    ).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x, y = torch.randn(4, 3, 8, 8, device="cuda"), torch.tensor([1, 2, 3, 4]).cuda()
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_attention():
    q = torch.randn(2, 4, 16, 32)
    expected = F.scaled_dot_product_attention(q, q, q, is_causal=True)
    torch.testing.assert_close(
        F.scaled_dot_product_attention(q.cuda(), q.cuda(), q.cuda(), is_causal=True).cpu(), expected
    )


def test_norms_and_their_gradients():
    x, w = torch.randn(4, 6, 8), torch.randn(8)
    for norm in (F.rms_norm, F.layer_norm):
        on_cpu, on_gpu = [t.clone().requires_grad_() for t in (x, w)], [t.cuda().requires_grad_() for t in (x, w)]
        for a, b in (on_cpu, on_gpu):
            norm(a, (8,), b).square().sum().backward()
        for c, g in zip(on_cpu, on_gpu, strict=True):
            torch.testing.assert_close(g.grad.cpu(), c.grad)


def test_autocast_streams_events_serialization():
    a = torch.randn(8, 8, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert (a @ a).dtype == torch.bfloat16
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    with torch.cuda.stream(torch.cuda.Stream()):
        b = a * 2
    end.record()
    torch.cuda.synchronize()
    assert start.elapsed_time(end) >= 0
    assert torch.equal(b, a + a)
    file = io.BytesIO()
    torch.save(a, file)
    file.seek(0)
    assert torch.load(file).is_cuda


def test_kernel_without_ptx_is_named():
    with pytest.raises(RuntimeError, match="spin_kernel.*no PTX.*compute_90"):
        torch.cuda._sleep(10)
