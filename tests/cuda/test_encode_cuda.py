"""Scales for given importances and codes under given scales on CUDA have the CPU's bits."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

import reference
from codec_checks import assert_bits, free_memory
from encoding_samples import feedback_of, moments, weight
from samples import DTYPES

pytestmark = pytest.mark.cuda

OPS = torch.ops.qlora
SHAPES = [(1, 64), (3, 64), (17, 96), (5, 100), (2, 1), (33, 31), (40, 7), (2, 1024)]
ODD_SCALES = [0.0, -0.0, 1e-45, -1e-39, 1.1e-38, -2.0, 3e38, float("inf"), -float("inf"), float("nan")]
# More than the 128 columns that are rounded together: with and without a rest, of any alignment; many rows.
SEEDS = [0, -1, 2**40 + 5]
FEEDBACK_SHAPES = [(1, 64), (17, 96), (2, 1), (33, 31), (5, 130), (9, 256), (6, 293), (70, 20)]


def same(name: str, *args: object, **options: object) -> Tensor:
    """The operator's result on CUDA, checked to have the CPU's bits."""
    operator = getattr(OPS, name)
    got = operator(*(t.cuda() if isinstance(t, Tensor) else t for t in args), **options)
    expected = operator(*args, **options)
    assert got.is_cuda
    assert got.shape == expected.shape
    assert_bits(got, expected, f"{name} of {tuple(args[0].shape)}, {args[2:]}, {options}")
    return got


search = functools.partial(same, "search_absmax_nf4")
encode = functools.partial(same, "encode_nf4")
encode_stochastic = functools.partial(same, "encode_nf4_stochastic")


def scales(w: Tensor, block: int, code: str = "nf4") -> Tensor:
    """Scales larger and smaller than the blocks' magnitudes, negative and zero."""
    absmax: Tensor = OPS.quantize_nf4(w, block, code)[1] * torch.linspace(0.3, 1.3, -(-w.numel() // block))
    absmax[0] *= -1
    absmax[-1] = 0 if absmax.numel() > 1 else absmax[-1]
    return absmax


def near(points: Tensor, ulps: int) -> Tensor:
    """[len(points), 2 ulps + 1]: each float32 (nonzero) with its neighbours."""
    return (points.view(torch.int32)[:, None] + torch.arange(-ulps, ulps + 1, dtype=torch.int32)).view(torch.float32)


def with_specials(w: Tensor) -> Tensor:
    """Rows and blocks of zeros, of the largest and the smallest numbers, and with NaN or infinity."""
    w = w.clone()
    w[0], w[1] = 0.0, -0.0
    w[2], w[3] = torch.finfo(w.dtype).max, torch.finfo(w.dtype).smallest_normal * torch.finfo(w.dtype).eps
    w[4] *= torch.tensor(1e-38)
    for row, value in enumerate((float("nan"), float("inf"), -float("inf"))):
        w[5 + row, 3 + 40 * row] = value
    return w


@pytest.mark.parametrize("code", reference.CODE_KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scales(dtype: torch.dtype, code: str) -> None:
    for n, k in SHAPES:
        importance = torch.rand(k) ** 4
        importance[::3] = 0
        for block in (16, 32, 64, 512):
            search(weight(n, k, dtype), importance, block, code)
    importance = torch.rand(96) ** 4
    for block in (64, 128, 4096):
        search(weight(60, 96, dtype), importance, block, code)
    search(weight(3, 64, dtype).reshape(3, 2, 32), importance[:32], 32)
    search(weight(3, 64, dtype).T, importance[:3], 32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scales_of_weights_that_are_not_finite(dtype: torch.dtype) -> None:
    w = with_specials(weight(10, 128, dtype))
    absmax = search(w, torch.rand(128), 64)
    assert absmax.isnan().tolist() == (~w.reshape(-1, 64).isfinite().all(1)).tolist()
    search(w, torch.zeros(128), 64)
    # The CPU rejects invalid importances. The CUDA operator does not check them; they affect only their own blocks.
    importance = torch.rand(128)
    good = search(w, importance, 64).cpu().view(10, 2)
    for value in (float("nan"), float("inf"), -1.0):
        importance[100] = value
        with pytest.raises(ValueError, match="importance"):
            OPS.search_absmax_nf4(w, importance, 64)
        found = OPS.search_absmax_nf4(w.cuda(), importance.cuda(), 64).cpu().view(10, 2)
        torch.testing.assert_close(found[:, 0], good[:, 0], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("code", reference.CODE_KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes(dtype: torch.dtype, code: str) -> None:
    for n, k in SHAPES:
        for block in (16, 32, 64, 512):
            w = weight(n, k, dtype)
            encode(w, scales(w, block, code), block, code=code)
    w = weight(41, 999, dtype)
    for block in (32, 256, 4096):
        encode(w, torch.rand(-(-w.numel() // block)) + 0.5, block, code=code)
    encode(w.T, torch.rand(-(-w.numel() // 64)) + 0.5, 64)


@pytest.mark.parametrize("code", reference.CODE_KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_of_weights_that_are_not_finite(dtype: torch.dtype, code: str) -> None:
    w = with_specials(weight(10, 128, dtype))
    for scale in ODD_SCALES:
        encode(w, torch.full((20,), scale), 64, code=code)
    feedback, order = feedback_of(moments(128))
    for absmax in (torch.tensor(ODD_SCALES * 2), torch.rand(20) + 0.5):
        encode(w, absmax, 64, feedback, order, code=code)


def test_codes_at_every_boundary() -> None:
    """Values just above and below the bounds of codes, and beyond the outermost codes."""
    value = OPS.dequantize_nf4(
        torch.arange(16, dtype=torch.uint8) * 17, torch.ones(1), None, None, 32, 256, [32], torch.float32
    )[::2]
    points = torch.cat([(value[1:] + value[:-1]) / 2, value[value != 0]])
    w = torch.cat([near(points, 40).reshape(-1), torch.tensor([2.0, -2.0, 1e30, -1e30])])
    encode(w, torch.ones(-(-w.numel() // 32)), 32)
    encode_stochastic(w, torch.ones(-(-w.numel() // 32)), 32, 7)


@pytest.mark.parametrize("code", reference.CODE_KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stochastic_codes(dtype: torch.dtype, code: str) -> None:
    for n, k in SHAPES:
        for block, seed in zip((16, 64, 512), SEEDS, strict=True):
            w = weight(n, k, dtype)
            encode_stochastic(w, scales(w, block, code), block, seed, code)
    w = weight(41, 999, dtype)
    for block, seed in zip((32, 256, 4096), SEEDS, strict=True):
        encode_stochastic(w, scales(w, block, code), block, seed, code)
    encode_stochastic(w.T, torch.rand(-(-w.numel() // 64)) + 0.5, 64, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stochastic_codes_of_weights_that_are_not_finite(dtype: torch.dtype) -> None:
    w = with_specials(weight(10, 128, dtype))
    for scale in ODD_SCALES:
        encode_stochastic(w, torch.full((20,), scale), 64, 0)
    assert encode_stochastic(torch.full((1, 64), float("nan"), dtype=dtype), torch.ones(1), 64, 0).eq(0).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_stochastic_codes_at_every_bound(seed: int) -> None:
    """Each weight is at one of its fifteen bounds or one step from it, where one rounding changes the code."""
    numel = 15 * 3 * 512
    bounds = torch.from_numpy(reference.stochastic_bounds(0, numel, seed))
    element = torch.arange(numel)
    w = near(bounds[element, element % 15], 1)[element, element // 15 % 3]
    encode_stochastic(w, torch.ones(numel // 64), 64, seed)


def test_stochastic_codes_keep_exact_values() -> None:
    packed, absmax = OPS.quantize_nf4(weight(16, 512).cuda(), 64)
    decoded = OPS.dequantize_nf4(packed, absmax, None, None, 64, 256, [16, 512], torch.float32)
    assert torch.equal(OPS.encode_nf4_stochastic(decoded, absmax, 64, 3), packed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_data_at_any_address(dtype: torch.dtype) -> None:
    numel = 9000
    w = weight(1, numel + 3, dtype).reshape(-1)
    absmax = torch.rand(-(-numel // 64)) + 0.5
    packed = OPS.encode_nf4(w.cuda()[3:], absmax.cuda(), 64)
    assert_bits(packed, OPS.encode_nf4(w[3:], absmax, 64), "codes")
    packed = OPS.encode_nf4_stochastic(w.cuda()[3:], absmax.cuda(), 64, 0)
    assert_bits(packed, OPS.encode_nf4_stochastic(w[3:], absmax, 64, 0), "stochastic codes")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), FEEDBACK_SHAPES)
def test_feedback(n: int, k: int, dtype: torch.dtype) -> None:
    w = weight(n, k, dtype)
    feedback, order = feedback_of(moments(k))
    for block in (32, 64, 512):
        encode(w, OPS.quantize_nf4(w, block)[1] * 0.9, block, feedback, order)


def test_feedback_in_the_columns_own_order_and_at_any_address() -> None:
    w, absmax = weight(6, 160), torch.rand(15) + 0.5
    feedback = feedback_of(moments(160))[0]
    shifted = torch.cat([torch.zeros(1), feedback.reshape(-1)]).cuda()[1:].view(160, 160)
    assert shifted.data_ptr() % 16 == 4
    packed = OPS.encode_nf4(w.cuda(), absmax.cuda(), 64, shifted, torch.arange(160, device="cuda"))
    assert_bits(packed, OPS.encode_nf4(w, absmax, 64, feedback, torch.arange(160)), "codes")


def test_entries_below_the_diagonal_are_not_read() -> None:
    w, absmax, (feedback, order) = weight(5, 150), torch.rand(12) + 0.5, feedback_of(moments(150))
    packed = encode(w, absmax, 64, feedback, order)
    filled = feedback + torch.full((150, 150), float("nan")).tril(-1)
    assert torch.equal(encode(w, absmax, 64, filled, order), packed)


def test_more_rows_than_the_device_takes_at_once() -> None:
    ctas = 4 * torch.cuda.get_device_properties("cuda").multi_processor_count  # of 256 threads with 64 registers each
    rows = 32 * ctas + 37
    encode(weight(rows, 1), torch.rand(-(-rows // 32)) + 0.5, 32, torch.ones(1, 1), torch.zeros(1).long())


def test_nothing() -> None:
    for n, k in ((0, 64), (3, 0)):
        w, absmax = torch.empty(n, k), torch.empty(0)
        search(w, torch.ones(k), 64)
        encode(w, absmax, 64)
        encode_stochastic(w, absmax, 64, 0)
        encode(w, absmax, 64, torch.eye(k), torch.arange(k))


def test_an_order_that_is_none_does_no_harm() -> None:
    """Its values are not checked, which would wait for the device. Every access stays in bounds."""
    w, absmax = weight(5, 150).cuda(), torch.ones(12, device="cuda")
    for order in (torch.zeros(150), torch.arange(150) - 7, torch.full((150,), 2**40), torch.full((150,), -(2**63))):
        packed = OPS.encode_nf4(w, absmax, 64, torch.eye(150, device="cuda"), order.long().cuda())
        assert packed.shape == (5, 75)
    packed = OPS.encode_nf4(w, absmax, 64, torch.zeros(150, 150, device="cuda"), torch.arange(150, device="cuda"))
    assert packed.shape == (5, 75)


def test_a_cuda_graph_repeats_them() -> None:
    w, importance = weight(20, 160).cuda(), torch.rand(160).cuda()
    feedback, order = (t.cuda() for t in feedback_of(moments(160)))

    def calibrate() -> list[Tensor]:
        absmax = OPS.search_absmax_nf4(w, importance, 64)
        return [
            absmax,
            OPS.encode_nf4(w, absmax, 64),
            OPS.encode_nf4_stochastic(w, absmax, 64, 5),
            OPS.encode_nf4(w, absmax, 64, feedback, order),
        ]

    calibrate()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = calibrate()
    for _ in range(2):
        w.copy_(weight(20, 160))
        feedback_now, order_now = feedback_of(moments(160))
        feedback.copy_(feedback_now)
        order.copy_(order_now)
        graph.replay()
        for got, expected in zip(captured, calibrate(), strict=True):
            assert torch.equal(got, expected)


def test_two_streams() -> None:
    feedback, order = feedback_of(moments(96))
    inputs = [(weight(9, 96), torch.rand(14) + 0.5) for _ in range(2)]
    given = [(w.cuda(), absmax.cuda(), 64, feedback.cuda(), order.cuda()) for w, absmax in inputs]
    torch.cuda.synchronize()
    results = []
    for args, stream in zip(given, [torch.cuda.Stream() for _ in inputs], strict=True):
        with torch.cuda.stream(stream):
            results.append((OPS.encode_nf4(*args), OPS.encode_nf4_stochastic(*args[:3], 0)))
    torch.cuda.synchronize()
    for (w, absmax), (packed, stochastic) in zip(inputs, results, strict=True):
        assert_bits(packed, OPS.encode_nf4(w, absmax, 64, feedback, order), "codes")
        assert_bits(stochastic, OPS.encode_nf4_stochastic(w, absmax, 64, 0), "stochastic codes")


def test_wrong_arguments_are_named() -> None:
    w, absmax = torch.zeros(4, 64, device="cuda"), torch.ones(4, device="cuda")
    eye, order = torch.eye(64, device="cuda"), torch.arange(64, device="cuda")
    for operator, args, message in (
        (OPS.search_absmax_nf4, (w, absmax, 64), "importance: expected shape"),
        (OPS.search_absmax_nf4, (w, torch.ones(64), 64), "importance: expected on the device of w"),
        (OPS.search_absmax_nf4, (w, eye[0], 48), "block_size: expected"),
        (OPS.encode_nf4, (w, absmax[1:], 64), "absmax: expected 4 elements"),
        (OPS.encode_nf4, (w, absmax.cpu(), 64), "absmax: expected on the device of w"),
        (OPS.encode_nf4, (w, absmax, 64, eye, None), "order: expected with feedback"),
        (OPS.encode_nf4, (w, absmax, 64, None, order), "feedback: expected with order"),
        (OPS.encode_nf4, (w, absmax, 64, eye[1:], order), "feedback: expected shape"),
        (OPS.encode_nf4, (w, absmax, 64, eye, order.cpu()), "order: expected on the device of w"),
        (OPS.encode_nf4, (w, absmax, 64, eye, order.int()), "order: expected Long"),
        (OPS.encode_nf4_stochastic, (w, absmax[1:], 64, 0), "absmax: expected 4 elements"),
        (OPS.encode_nf4_stochastic, (w, absmax.cpu(), 64, 0), "absmax: expected on the device of w"),
        (OPS.encode_nf4_stochastic, (w, absmax, 48, 0), "block_size: expected a power of two"),
    ):
        with pytest.raises(ValueError, match=message):
            operator(*args)


@pytest.mark.campaign
@pytest.mark.skipif(free_memory() < 9 << 30, reason="needs 9 GB of free memory")
def test_codes_of_more_than_2_to_the_31_elements() -> None:
    numel, tail = (1 << 31) + 4096 + 33, 8192 + 33
    w = torch.zeros(numel, dtype=torch.bfloat16, device="cuda")
    end = weight(1, tail, torch.bfloat16).reshape(-1)
    w[-tail:] = end
    absmax = torch.ones(-(-numel // 64), device="cuda")
    of_end = torch.rand(-(-tail // 64)) + 0.5
    absmax[-len(of_end) :] = of_end
    stochastic = reference.encode_nf4_stochastic(end.float().numpy(), of_end.numpy(), 64, 1, first=numel - tail)
    for packed, expected in (
        (OPS.encode_nf4(w, absmax, 64), OPS.encode_nf4(end, of_end, 64)),
        (OPS.encode_nf4_stochastic(w, absmax, 64, 1), stochastic),
    ):
        assert_bits(packed[(numel - tail) // 2 :], expected, "codes")
        assert packed[: (numel - tail) // 2].eq(119).all()
