"""torch.compile and torch.export of the layer: one graph, the same results as eager, no recompilation per size."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.checkpoint import checkpoint

import qlora_ext
from graphs import CountingBackend, largest_error
from samples import WAYS, LinearSample, by_python, gradients, linear_sample


@pytest.fixture(autouse=True)
def _forget_graphs() -> None:
    torch.compiler.reset()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_equals_eager(way, dtype: torch.dtype) -> None:
    s = linear_sample(m=(2, 3), dtype=dtype, dropout_p=0.25, requires_grad=True)
    compiled = torch.compile(lambda: way(s), fullgraph=True, backend="aot_eager")
    results, expected = gradients(compiled, s), gradients(lambda: way(s), s)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", WAYS)
def test_autocast(way, dtype: torch.dtype, inside: bool) -> None:
    """Whether the graph enters autocast itself or is called under it."""
    s = linear_sample(m=(2, 3), dropout_p=0.25, requires_grad=True)

    def layer() -> torch.Tensor:
        return way(s)

    def under_autocast(f) -> torch.Tensor:
        with torch.autocast("cpu", dtype=dtype):
            return f()

    if inside:
        compiled = torch.compile(lambda: under_autocast(layer), fullgraph=True, backend="aot_eager")
    else:
        inner = torch.compile(layer, fullgraph=True, backend="aot_eager")
        compiled = lambda: under_autocast(inner)  # noqa: E731
    results, expected = gradients(compiled, s), gradients(lambda: under_autocast(layer), s)
    assert [t.dtype for t in results] == [dtype] + [torch.float32] * 4
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_a_dynamic_batch_does_not_recompile() -> None:
    s = linear_sample(m=6, requires_grad=True)
    backend = CountingBackend()
    compiled = torch.compile(lambda: by_python(s), fullgraph=True, dynamic=True, backend=backend)
    for m in (6, 5, 9):
        s.x = torch.randn(m, 64, requires_grad=True)
        assert largest_error(gradients(compiled, s), gradients(lambda: by_python(s), s)) == 0.0
    assert (backend.forward, backend.backward) == (1, 1)


def test_a_drawn_seed_compiles_in_one_graph() -> None:
    s = linear_sample(m=3, requires_grad=True)
    compiled = torch.compile(
        lambda: qlora_ext.linear_nf4(s.x, s.w4, s.bias, s.lora_a, s.lora_b, s.scaling, 0.5),
        fullgraph=True,
        backend="aot_eager",
    )
    torch.manual_seed(3)
    first = gradients(compiled, s)
    assert not torch.equal(compiled(), first[0])
    torch.manual_seed(3)
    assert all(torch.equal(a, b) for a, b in zip(first, gradients(compiled, s), strict=True))


def test_the_backward_of_a_checkpointed_graph_draws_the_mask_of_its_forward() -> None:
    """The code generator draws its own random numbers, so the test uses the adjoint: y is linear in x, A and B."""
    s = linear_sample(m=(2, 3), requires_grad=True)

    def layer(x: torch.Tensor) -> torch.Tensor:
        return qlora_ext.linear_nf4(x, s.w4, None, s.lora_a, s.lora_b, 1.0, 0.5)

    compiled = torch.compile(lambda x: checkpoint(layer, x, use_reentrant=False), fullgraph=True)
    y, again = compiled(s.x), compiled(s.x)
    assert not torch.equal(y, again)  # each call has its own mask
    dy = torch.randn_like(y)
    y.backward(dy)
    lora = y - qlora_ext.linear_nf4(s.x, s.w4)
    assert torch.allclose((s.x.grad * s.x).sum(), (dy * y).sum(), rtol=1e-4, atol=1e-4)
    assert torch.allclose((s.lora_a.grad * s.lora_a).sum(), (dy * lora).sum(), rtol=1e-4, atol=1e-4)
    assert torch.allclose((s.lora_b.grad * s.lora_b).sum(), (dy * lora).sum(), rtol=1e-4, atol=1e-4)


def test_a_weight_goes_in_and_out_of_a_graph() -> None:
    w, x = torch.randn(48, 64), torch.randn(3, 64)

    def f(x: torch.Tensor, w: torch.Tensor, w4: qlora_ext.NF4Weight) -> list[torch.Tensor]:
        mine = qlora_ext.quantize_nf4(w)
        return [mine.packed, mine.dequantize(), qlora_ext.dequantize_nf4(w4), qlora_ext.linear_nf4(x, w4)]

    w4 = qlora_ext.quantize_nf4(w, block_size=32)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(x, w, w4), f(x, w, w4), strict=True))


def test_a_compiled_graph_never_makes_plausible_numbers_of_a_nan() -> None:
    w = torch.randn(4, 64)
    w[2, 5] = torch.nan
    decoded = torch.compile(lambda w: qlora_ext.quantize_nf4(w).dequantize(), fullgraph=True, backend="aot_eager")(w)
    assert decoded[2].isnan().all()


def test_fake_tensors_quantize_and_run() -> None:
    with FakeTensorMode():
        model = qlora_ext.quantize_model(nn.Sequential(nn.Linear(64, 48)))
        y = model(torch.randn(2, 64))
    assert {type(t) for t in model[0].weight.tensors.values()} == {FakeTensor}
    assert model[0].weight.packed.shape == (48, 32)
    assert (y.shape, y.dtype) == ((2, 48), torch.float32)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 96)
        self.down = nn.Linear(96, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.silu(self.up(x)))


def fused_with(s: LinearSample) -> nn.Module:
    """The sample's layer as a module, including LoRA."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = qlora_ext.nn.Linear4bit(64, 48, compute_dtype=torch.float32)
            self.base.set_weight(s.w4)
            self.lora_a, self.lora_b = nn.Parameter(s.lora_a), nn.Parameter(s.lora_b)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base.fused_forward(x, self.lora_a, self.lora_b, s.scaling, s.dropout_p)

    return Layer()


@pytest.mark.parametrize("strict", [True, False])
def test_export_has_a_dynamic_batch_and_survives_saving(strict: bool, tmp_path) -> None:
    model = qlora_ext.quantize_model(Mlp()).eval()
    shapes = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(model, (torch.randn(2, 64),), dynamic_shapes=shapes, strict=strict)
    torch.export.save(exported, tmp_path / "mlp.pt2")
    loaded = torch.export.load(tmp_path / "mlp.pt2")
    stored = [t.nbytes for part in (loaded.state_dict, loaded.constants) for t in part.values()]
    assert sum(stored) == sum(t.nbytes for t in model.state_dict().values())  # four bits per weight in the file too
    for batch in (3, 7):
        x = torch.randn(batch, 64)
        assert torch.equal(loaded.module()(x), model(x))


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_dropout_is_drawn_at_every_call(strict: bool) -> None:
    s = linear_sample(m=3, dropout_p=0.5)
    model = fused_with(s)
    exported = torch.export.export(model, (s.x,), strict=strict).module()
    torch.manual_seed(1)
    first, second = exported(s.x), exported(s.x)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(model(s.x), first)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("m", [1, 16, 300])
def test_a_cuda_graph_replays_forward_and_backward(dtype: torch.dtype, m: int) -> None:
    s = linear_sample(m=m, n=96, k=128, dtype=dtype, device="cuda", dropout_p=0.25, requires_grad=True)
    dy = torch.randn(m, 96, device="cuda", dtype=dtype)

    def step() -> list[torch.Tensor]:
        y = by_python(s)
        return [y.detach(), *torch.autograd.grad(y, s.differentiable, dy)]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            captured = step()
    except RuntimeError as error:
        if "not supported" not in str(error):
            raise
        pytest.skip(f"this CUDA runtime captures no graphs: {error}".splitlines()[0])
    with torch.no_grad():
        s.x.copy_(torch.randn_like(s.x))
        s.lora_a.mul_(2.0)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))
