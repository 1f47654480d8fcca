"""The operators over experts on CUDA: offsets on the device, graphs, full layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reference
from accuracy import assert_accurate, given, sums
from cuda_cases import on_newer
from forms import WIDE_FORMS
from grouped_samples import OPS, GroupedSample, grouped_sample
from qlora_ext.nn import Experts4bit, ExpertsLora
from samples import to_f64

pytestmark = pytest.mark.cuda


def results(s: GroupedSample, dy: Tensor, offsets: Tensor | None = None) -> list[Tensor]:
    return [s.forward(offsets), s.dx(dy, offsets), *s.dlora(dy, offsets)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [128, 95])
@pytest.mark.parametrize(
    ("wrong", "taken_for"),
    [
        ([5, 3, 9, 40], [5, 5, 9, 20]),
        ([-7, 2**40, -(2**62), 4], [0, 20, 20, 20]),
        ([-(2**63), 2**63 - 1, 0, 7], [0, 20, 20, 20]),
        ([9, 8, 7, 6], [9, 9, 9, 9]),
    ],
)
def test_wrong_offsets_touch_no_other_memory(
    wrong: list[int], taken_for: list[int], k: int, dtype: torch.dtype
) -> None:
    """The device cannot reject them. The simulator detects every access out of bounds."""
    s = grouped_sample([2, 3, 0, 15], 40, k, 4, dtype, "cuda", dropout_p=0.2, unassigned=0)
    dy = s.dy()
    assert len(s.x) == 20
    a, b = (torch.tensor(offsets, device="cuda") for offsets in (wrong, taken_for))
    assert all(map(torch.equal, results(s, dy, a), results(s, dy, b)))


@pytest.mark.parametrize("rank", [6, 34])
def test_low_rank_products_of_many_rows(rank: int) -> None:
    """So many rows that the products are computed in tiles of 32 tokens, or of 16 for more than 16 ranks."""
    n, k = 8, 64
    s = grouped_sample([1500, 0, 31, 1569], n, k, rank, torch.bfloat16, "cuda", dropout_p=0.2)
    dy = s.dy()
    _, h = OPS.grouped_linear_nf4_with_h(s.x, s.offsets, *s.args())
    _, g = OPS.grouped_linear_nf4_dx_with_g(dy, s.offsets, *s.dx_args())
    x = to_f64(s.x) * reference.dropout_mask(s.x.shape, s.dropout_p, s.seed)
    for e, rows in s.parts():
        for got, of, factor in ((h, x, to_f64(s.lora_a[e]).T), (g, to_f64(dy), to_f64(s.lora_b[e]))):
            expected = sums([(given(of[rows]), given(s.scaling * factor), 1.0)], 0.0, torch.bfloat16)
            assert_accurate(got[rows], expected)
    assert not h[s.unassigned()].any()
    assert not g[s.unassigned()].any()


@on_newer
@pytest.mark.parametrize(
    ("counts", "k", "rank", "kernel", "options"),
    [
        ([130, 0, 5], 328, 12, "gemm", {"dropout_p": 0.3}),
        ([0, 260, 1], 320, None, "gemm:panel=256", {"dtype": torch.float16, "bias": False, "block_size": 32}),
        ([40, 33], 256, 5, "gemm:panel=256", {"dropout_p": 1.0, "form": WIDE_FORMS["q6_k"]}),
    ],
)
def test_decoded_once_they_have_the_bits_of_dense_layers(
    counts: list[int],
    k: int,
    rank: int | None,
    kernel: str,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tiles of tokens and columns that are not full, sums that end within a stage, experts without tokens."""
    s = grouped_sample(counts, 264, k, rank, device="cuda", **{"dtype": torch.bfloat16} | options)
    dy = s.dy()
    monkeypatch.setenv("QLORA_CUDA_KERNEL", kernel)
    y, dx = s.forward(), s.dx(dy)
    for e, rows in s.parts():
        dense = s.of_expert(e, s.x)
        assert torch.equal(y[rows], OPS.linear_nf4(*dense.args)[rows])
        assert torch.equal(dx[rows], OPS.linear_nf4_dx(*dense.dx_args(dy))[rows])
    assert not y[s.unassigned()].any()
    assert not dx[s.unassigned()].any()
    if rank is not None:
        assert torch.equal(s.forward(with_h=True)[0], y)
        assert torch.equal(s.dx(dy, with_g=True)[0], dx)


def test_offsets_are_where_x_is() -> None:
    s = grouped_sample([2, 3], 16, 64, 4, torch.bfloat16, "cuda")
    dy, on_cpu = s.dy(), s.offsets.cpu()
    with pytest.raises(ValueError, match=r"offsets: expected on the device of x \(cuda:0\), got cpu"):
        s.forward(on_cpu)
    with pytest.raises(ValueError, match=r"offsets: expected on the device of dy \(cuda:0\), got cpu"):
        s.dx(dy, on_cpu)
    with pytest.raises(ValueError, match=r"offsets: expected on the device of x \(cuda:0\), got cpu"):
        s.dlora(dy, on_cpu)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_captured_graph_takes_other_rows_at_each_replay(dtype: torch.dtype) -> None:
    s = grouped_sample([4, 0, 9, 7], 40, 128, 8, dtype, "cuda", dropout_p=0.2)
    dy = s.dy()
    results(s, dy)  # one-time work is done before
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(s, dy)
    for counts in ([4, 0, 9, 7], [0, 20, 0, 0], [1, 1, 1, 20], [0, 0, 0, 0]):
        s.offsets.copy_(torch.tensor(counts).cumsum(0))
        s.x.copy_(s.x.roll(1, 0))
        graph.replay()
        assert all(map(torch.equal, captured, results(s, dy)))


# Small layers in transformers' layouts: gated by SiLU without biases; transposed, with biases, clamped.


def initialized(experts: nn.Module) -> nn.Module:
    for p in experts.parameters():
        nn.init.normal_(p, std=0.15)
    return experts


def qwen3_moe(dtype: torch.dtype) -> nn.Module:
    modeling = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe", reason="transformers is too old")
    from transformers import Qwen3MoeConfig

    config = Qwen3MoeConfig(hidden_size=64, moe_intermediate_size=48, num_experts=16, num_experts_per_tok=4)
    return initialized(modeling.Qwen3MoeExperts(config)).to(dtype)


def gpt_oss(dtype: torch.dtype) -> nn.Module:
    modeling = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss", reason="transformers is too old")
    from transformers import GptOssConfig

    config = GptOssConfig(hidden_size=64, intermediate_size=72, num_local_experts=6, num_experts_per_tok=2)
    return initialized(modeling.GptOssExperts(config)).to(dtype)


def test_a_captured_layer_routes_anew_at_each_replay() -> None:
    module = Experts4bit.from_experts(qwen3_moe(torch.bfloat16)).to("cuda")
    experts = module.packed_shapes["down_proj"][0]
    x = torch.randn(9, 64, device="cuda", dtype=torch.bfloat16)
    scores = torch.randn(9, experts, device="cuda")

    def run() -> Tensor:
        weights, index = scores.softmax(-1).topk(2, dim=-1)
        return module(x, index, weights.to(x.dtype))

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        captured = run()
    for _ in range(2):
        x.copy_(torch.randn(9, 64))
        scores.copy_(torch.randn(9, experts))
        graph.replay()
        assert torch.equal(captured, run())


def adapters(module: Experts4bit, rank: int) -> list[Tensor]:
    """A and B for each stacked weight."""
    shapes = module.packed_shapes.values()
    pairs = ((torch.randn(e, rank, k) / k**0.5, torch.randn(e, n, rank) * 0.1) for e, n, k in shapes)
    return [t for pair in pairs for t in pair]


def backward(y: Tensor, leaves: list[Tensor], module: nn.Module) -> list[Tensor]:
    """y, and the gradients of its sum of squares for the leaves and the biases."""
    biases = [p for name, p in module.named_parameters() if name.endswith("bias")]
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), [*leaves, *biases])]


def as_leaves(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().requires_grad_() for t in tensors]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer", [qwen3_moe, gpt_oss])
def test_a_step_of_training_is_that_of_the_dense_layer(layer, dtype: torch.dtype) -> None:
    """The results of transformers' code on the CPU in float64, with adapters merged into the decoded weights."""
    module = Experts4bit.from_experts(layer(torch.float32))
    dense = module.to_experts().double()
    module.to("cuda", dtype)
    for m in (module, dense):
        for name, p in m.named_parameters():
            p.requires_grad_(name.endswith("bias"))

    experts = module.packed_shapes["down_proj"][0]
    scores = torch.randn(23, experts) + torch.linspace(0, 4, experts)  # some experts have no tokens, some many
    weights, index = scores.softmax(-1).topk(2, dim=-1)
    assert len(index.unique()) < experts
    given = (torch.randn(23, 64), weights, *adapters(module, 8))

    x, routing, *factors = leaves = as_leaves(*(t.to("cuda", dtype) for t in given))
    (first, second), scaling = module.packed_shapes, 0.5
    lora = {first: ExpertsLora(*factors[:2], scaling), second: ExpertsLora(*factors[2:], scaling)}
    y = module(x, index.to("cuda"), routing, lora)
    got = backward(y, leaves, module)

    x, routing, *factors = leaves = as_leaves(*(t.double() for t in given))
    merged = {}
    for name, a, b in zip((first, second), factors[::2], factors[1::2], strict=True):
        delta = scaling * b @ a
        merged[name] = getattr(dense, name) + (delta.transpose(1, 2) if module.is_transposed else delta)
    expected = backward(torch.func.functional_call(dense, merged, (x, index, routing)), leaves, dense)

    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for a, b in zip(got, expected, strict=True):
        assert a.is_cuda
        assert a.dtype == dtype
        assert (a.cpu().double() - b).norm() <= tolerance * b.norm()
