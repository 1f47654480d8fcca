"""Several adapters per call over experts on CUDA: the results of the CPU, and the bits of calls with one adapter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from adapter_samples import ExpertBatch, expert_batch

pytestmark = pytest.mark.cuda
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# Rows per expert (an int: of all, a quarter of which belong to no expert), n, k, dtype and ranks: few and many tokens
# on tensor cores, an odd rank that these cannot load in pairs, rows that need the kernels for any shape, and float32.
SHAPES = [
    (9, 72, 192, BF16, (4, 0, 16, 40)),
    ([0, 70, 1, 0, 33], 136, 128, FP16, (16, 3, 8)),
    (11, 37, 102, BF16, (5, 0, 40)),
    ([3, 0, 14], 40, 96, FP32, (5, 0, 40)),
]
DROPOUT = [{}, {"dropout_p": 0.4}, {"dropout_p": 0.4, "seeds": [11, 22, 33, 44]}]


def sample(counts: Any, n: int, k: int, dtype: torch.dtype, ranks: tuple[int, ...], **options: Any) -> ExpertBatch:
    seeds = {"seeds": options["seeds"][: len(ranks)]} if "seeds" in options else {}
    return expert_batch(counts, n, k, ranks, dtype, **{**options, **seeds})


def results(b: ExpertBatch, device: str) -> dict[str, Tensor]:
    """The outputs of all operators. The gradients are computed from given low-rank products, and without them."""

    def run(name: str, **more: Tensor) -> Any:
        given = {**b.arguments(name, dy=None if name.startswith("_with") else b.dy()), **more}
        tensors = {key: t.to(device) if isinstance(t, Tensor) else t for key, t in given.items()}
        return getattr(torch.ops.qlora, b.operator + name)(**tensors)

    (y, h), (dx, g) = run("_with_h"), run("_dx_with_g")
    da, db = run("_dlora")
    given_da, given_db = run("_dlora", h=h, g=g)
    named = {"y": y, "h": h, "dx": dx, "g": g, "da": da, "db": db, "given_da": given_da, "given_db": given_db}
    return {name: t.cpu() for name, t in named.items()}


@pytest.mark.parametrize("dropout", DROPOUT, ids=["", "one seed", "seeds"])
@pytest.mark.parametrize(("counts", "n", "k", "dtype", "ranks"), SHAPES)
def test_results_are_those_of_the_cpu(
    counts: Any, n: int, k: int, dtype: torch.dtype, ranks: tuple[int, ...], dropout: dict[str, Any]
) -> None:
    b = sample(counts, n, k, dtype, ranks, **dropout)
    tolerance = 1e-5 if dtype == FP32 else 2e-2
    expected = results(b, "cpu")
    for name, got in results(b, "cuda").items():
        want = expected[name]
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * float(want.abs().max()), msg=name)


@pytest.mark.parametrize("dropout", DROPOUT[::2], ids=["", "seeds"])
@pytest.mark.parametrize(("counts", "n", "k", "dtype", "ranks"), SHAPES)
def test_rows_have_the_bits_of_their_adapter_alone(
    counts: Any, n: int, k: int, dtype: torch.dtype, ranks: tuple[int, ...], dropout: dict[str, Any]
) -> None:
    sample(counts, n, k, dtype, ranks, device="cuda", **dropout).check(gradients=False)


def test_decoded_weights_give_the_bits_of_an_adapter_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_CUDA_KERNEL", "gemm")
    sample([9, 0, 30], 136, 192, BF16, (4, 0, 40), device="cuda", dropout_p=0.4).check(gradients=False)


@pytest.mark.parametrize("offsets", [[2**40, -3, 5], [-(2**62), 9, 4]], ids=str)
def test_wrong_offsets_touch_no_other_memory(offsets: list[int]) -> None:
    """The device cannot reject them. The simulator detects every access out of bounds."""
    b = sample([6, 0, 11], 40, 64, BF16, (4, 8), device="cuda")
    taken_for = torch.tensor(offsets).cummax(0).values.clamp(0, len(b.x)).tolist()
    for name in ("", "_dx", "_dlora"):
        arguments = b.arguments(name, dy=b.dy())
        found = [
            getattr(torch.ops.qlora, b.operator + name)(**{**arguments, "offsets": torch.tensor(ends, device="cuda")})
            for ends in (offsets, taken_for)
        ]
        assert all(map(torch.equal, *map(list, found)))


def test_values_that_are_not_finite_stay_with_their_adapter_and_expert() -> None:
    b = sample([12, 0, 20], 72, 128, BF16, (4, 16, 8), device="cuda", unassigned=0)
    clean, dy = b.run(""), b.dy()
    clean_dx = b.run("_dx", dy=dy)
    b.lora_a[1][2, 3, 5] = b.lora_b[1][2, 7, 3] = torch.inf
    bad = (b.of_row == 1) & (torch.arange(32, device="cuda") >= 12)
    assert bad.any()
    for got, before in ((b.run(""), clean), (b.run("_dx", dy=dy), clean_dx)):
        assert not got[bad].isfinite().all(1).any()
        assert torch.equal(got[~bad], before[~bad])


def test_numbers_of_adapters_that_do_not_exist_give_nan() -> None:
    b = sample([12, 0, 8], 40, 64, BF16, (4, 8), device="cuda", unassigned=0)
    b.of_row[3], b.of_row[5], b.of_row[13] = 2, -7, 2**30
    bad = torch.zeros(20, dtype=torch.bool, device="cuda")
    bad[[3, 5, 13]] = True
    for name, dy in (("_with_h", None), ("_dx_with_g", b.dy())):
        for t in b.run(name, dy=dy):
            assert torch.equal(t.isnan().all(1), bad)
            assert t[~bad].isfinite().all()
    assert all(t.isfinite().all() for t in b.run("_dlora", dy=b.dy()))


def test_no_rows_and_only_rows_without_adapter() -> None:
    empty = sample([0, 0], 40, 64, BF16, (4, 8), device="cuda", unassigned=0)
    assert empty.run("").shape == (0, 40)
    assert not any(t.any() for t in empty.run("_dlora", dy=empty.dy()))
    b = sample([3, 5], 40, 64, BF16, (4, 8), device="cuda")
    b.of_row.fill_(-1)
    torch.testing.assert_close(b.run(""), b.run("", -1))
    assert not any(t.any() for t in b.run("_dlora", dy=b.dy()))


def test_fake_tensors_have_the_shapes() -> None:
    b = sample(8, 40, 64, BF16, (4, 8), device="cuda")
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = [t.shape for t in b.run("_with_h")]
    assert fake == [t.shape for t in b.run("_with_h")]


def test_a_captured_graph_takes_other_adapters_and_experts_at_each_replay() -> None:
    b = sample([4, 0, 5], 72, 128, BF16, (4, 16, 8), device="cuda")
    dy = b.dy()
    arguments = [(name, b.arguments(name, dy=dy)) for name in ("_with_h", "_dx_with_g", "_dlora")]

    def step() -> list[Tensor]:
        return [t for name, given in arguments for t in getattr(torch.ops.qlora, b.operator + name)(**given)]

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for ends in ([1, 7, 9], [0, 2, 6]):
        b.of_row.copy_((b.of_row + 2) % 4 - 1)
        b.g.offsets.copy_(torch.tensor(ends))
        graph.replay()
        for ours, want in zip(captured, step(), strict=True):
            assert torch.equal(ours, want)
