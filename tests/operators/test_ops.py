"""The contract of every operator with torch: schema, fake kernel, argument checks, the same result in every mode."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import qlora_ext
from grouped_samples import KINDS, grouped_sample
from qlora_ext import _library
from samples import DEVICES, DTYPES, OPCHECKS, linear_sample, relative_error

OPS = torch.ops.qlora


def op_calls(device: str) -> dict[str, tuple]:
    s = linear_sample(m=(2, 3), device=device, dropout_p=0.25)
    seed = torch.tensor(1234, device=device)
    lora = *s.lora_args, seed
    w = torch.randn(48, 64, device=device)
    absmax = torch.rand(300, device=device)
    codes = OPS.quantize_absmax(absmax, 256)
    dy = torch.randn(2, 3, 48, device=device)
    g = dataclasses.replace(grouped_sample([2, 0, 3], device=device, dropout_p=0.3), seed_tensor=seed)
    lora_a, lora_b = torch.randn(4, 64, device=device), torch.randn(48, 4, device=device)
    h, h_of_experts = torch.randn(2, 3, 4, device=device), torch.randn(len(g.x), 4, device=device)
    return {
        "quantize_nf4": (w, 64),
        "search_absmax_nf4": (w, torch.rand(64, device=device), 64),
        "encode_nf4": (
            w,
            OPS.quantize_nf4(w, 64)[1],
            64,
            torch.eye(64, device=device),
            torch.arange(64, device=device),
        ),
        "encode_nf4_stochastic": (w, OPS.quantize_nf4(w, 64)[1], 64, 5),
        "merge_lora_nf4": s.w4.operands(lora_a, lora_b, 2.0, 5),
        "quantize_absmax": (absmax, 256),
        "dequantize_absmax": (*codes, 256),
        "dequantize_nf4": s.w4.operands([48, 64], torch.bfloat16),
        "linear_nf4": (s.x, *s.w4.operands(48, s.bias, *lora)),
        "linear_nf4_with_h": (s.x, *s.w4.operands(48, s.bias, *lora)),
        "linear_nf4_dx": (dy, *s.w4.operands(64, *lora)),
        "linear_nf4_dx_with_g": (dy, *s.w4.operands(64, *lora)),
        "linear_nf4_dlora": (dy, s.x, *lora, h, h),
        "linear_dense": (s.x, w.bfloat16(), s.bias),
        "linear_dense_dx": (dy, w.bfloat16()),
        "grouped_linear_nf4": (g.x, g.offsets, *g.args()),
        "grouped_linear_nf4_with_h": (g.x, g.offsets, *g.args()),
        "grouped_linear_nf4_dx": (g.dy(), g.offsets, *g.dx_args()),
        "grouped_linear_nf4_dx_with_g": (g.dy(), g.offsets, *g.dx_args()),
        "grouped_linear_nf4_dlora": (g.dy(), g.x, g.offsets, *g.lora_args, seed, h_of_experts, h_of_experts),
    }


OP_NAMES = sorted(op_calls("cpu"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", OP_NAMES)
def test_opcheck(name: str, device: str) -> None:
    if device == "cuda" and name.startswith("linear_dense"):
        pytest.skip("the operator is for the CPU")
    torch.library.opcheck(getattr(OPS, name).default, op_calls(device)[name], test_utils=OPCHECKS)


def test_every_operator_is_checked() -> None:
    assert sorted(_library.OPERATORS) == OP_NAMES


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("options", [{}, {"rank": None}, {"bias": False}, {"double_quant": False}])
def test_opcheck_of_every_form_of_linear(options: dict, requires_grad: bool) -> None:
    s = linear_sample(m=(2, 3), requires_grad=requires_grad, **options)
    torch.library.opcheck(OPS.linear_nf4.default, s.args, test_utils=OPCHECKS)


def test_schemas_are_those_of_the_design() -> None:
    packed = (
        "Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_offset, int block_size, "
        "int nested_block_size"
    )
    seed = "float dropout_p, SymInt seed, Tensor? seed_tensor=None"
    lora = f"Tensor? lora_a, Tensor? lora_b, float scaling, {seed}"
    grouped = f"Tensor offsets, {packed}"
    code = 'str code="nf4"'
    form = f"{code}, Tensor? scale_table=None, Tensor? block_offsets=None, Tensor? offset_scale=None"
    defaults = lora.replace("dropout_p,", "dropout_p=0.,").replace("SymInt seed,", "SymInt seed=0,")
    adapters = (
        "Tensor? adapter_of_row=None, Tensor? rank_offsets=None, Tensor? scalings=None, Tensor? seeds=None, "
        "int max_rank=0"
    )
    last = f'{form}, {adapters}, str activations="exact"'
    expected = {
        "quantize_nf4": f"(Tensor w, int block_size, {code}) -> (Tensor packed, Tensor absmax)",
        "search_absmax_nf4": f"(Tensor w, Tensor importance, int block_size, {code}) -> Tensor absmax",
        "encode_nf4": f"(Tensor w, Tensor absmax, int block_size, Tensor? feedback=None, Tensor? order=None, "
        f"{code}) -> Tensor packed",
        "encode_nf4_stochastic": f"(Tensor w, Tensor absmax, int block_size, int seed, {code}) -> Tensor packed",
        "merge_lora_nf4": f"({packed}, Tensor lora_a, Tensor lora_b, float scaling, int seed, {form}) -> Tensor merged",
        "quantize_absmax": "(Tensor absmax, int nested_block_size) -> "
        "(Tensor codes, Tensor nested_absmax, Tensor nested_offset)",
        "dequantize_absmax": "(Tensor codes, Tensor nested_absmax, Tensor nested_offset, int nested_block_size) "
        "-> Tensor",
        "dequantize_nf4": f"({packed}, SymInt[] shape, ScalarType dtype, {form}) -> Tensor",
        "linear_nf4": f"(Tensor x, {packed}, SymInt out_features, Tensor? bias, {lora}, {last}) -> Tensor",
        "linear_nf4_with_h": f"(Tensor x, {packed}, SymInt out_features, Tensor? bias, {lora}, {last}) "
        "-> (Tensor y, Tensor h)",
        "linear_nf4_dx": f"(Tensor dy, {packed}, SymInt in_features, {lora}, {last}) -> Tensor",
        "linear_nf4_dx_with_g": f"(Tensor dy, {packed}, SymInt in_features, {lora}, {last}) -> (Tensor dx, Tensor g)",
        "linear_nf4_dlora": f"(Tensor dy, Tensor x, Tensor lora_a, Tensor lora_b, float scaling, {seed}, "
        f"Tensor? h=None, Tensor? g=None, {adapters}) -> (Tensor da, Tensor db)",
        "linear_dense": "(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor",
        "linear_dense_dx": "(Tensor dy, Tensor weight) -> Tensor",
        "grouped_linear_nf4": f"(Tensor x, {grouped}, SymInt out_features, Tensor? bias, {defaults}, {last}) -> Tensor",
        "grouped_linear_nf4_dx": f"(Tensor dy, {grouped}, SymInt in_features, {defaults}, {last}) -> Tensor",
    }
    for name, schema in expected.items():
        assert str(getattr(OPS, name).default._schema) == f"qlora::{name}{schema}"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lead", [(), (1,), (0,), (7,), (2, 3), (2, 0, 3), (1, 2, 3)])
def test_any_leading_dimensions(lead: tuple[int, ...], device: str) -> None:
    s = linear_sample(m=lead, device=device)
    y = OPS.linear_nf4(*s.args)
    assert y.shape == (*lead, 48)
    assert relative_error(y, s.expected()) < 1e-6
    dx = OPS.linear_nf4_dx(*s.dx_args(y))
    assert relative_error(dx, s.expected_dx(y)) < 1e-6
    da, db = OPS.linear_nf4_dlora(y, s.x, *s.lora_args)
    for got, expected in zip((da, db), s.expected_dlora(y), strict=True):
        assert relative_error(got, expected) < 1e-5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("n", "k"), [(0, 64), (48, 0), (0, 0)])
def test_empty_weights(n: int, k: int, device: str) -> None:
    s = linear_sample(m=3, n=n, k=k, rank=2, device=device)
    y = OPS.linear_nf4(*s.args)
    assert relative_error(y, s.expected()) < 1e-6
    dx = OPS.linear_nf4_dx(*s.dx_args(y))
    assert relative_error(dx, s.expected_dx(y)) < 1e-6
    assert qlora_ext.dequantize_nf4(s.w4).shape == (n, k)


def test_seed_is_ignored_without_dropout() -> None:
    s = linear_sample(m=3)
    first = OPS.linear_nf4(*s.args)
    s.seed = 99
    assert torch.equal(OPS.linear_nf4(*s.args), first)


@pytest.mark.parametrize("device", DEVICES)
def test_everything_dropped_leaves_the_base(device: str) -> None:
    s = linear_sample(m=3, dropout_p=1.0, device=device)
    base = OPS.linear_nf4(*s.args[:9], None, None, 1.0, 0.0, 0)
    torch.testing.assert_close(OPS.linear_nf4(*s.args), base, rtol=0, atol=1e-6)


def named(name: str, device: str) -> dict[str, object]:
    arguments = getattr(OPS, name).default._schema.arguments
    return dict(zip((a.name for a in arguments), op_calls(device)[name], strict=False))


def changed(name: str, device: str = "cpu", **changes: object) -> None:
    """Calls an operator with some arguments replaced."""
    arguments = named(name, device)
    assert set(changes) <= set(arguments)
    getattr(OPS, name)(**{**arguments, **changes})


BAD = [
    ("quantize_nf4", "block_size", 48, "power of two from 16 to 4096, got 48"),
    ("quantize_nf4", "block_size", 8192, "got 8192"),
    ("quantize_nf4", "w", torch.zeros(4, 64, dtype=torch.int32), "got Int"),
    ("quantize_nf4", "w", torch.zeros(4, 64, dtype=torch.float64), "got Double"),
    ("quantize_absmax", "nested_block_size", 0, "from 1 to 1048576, got 0"),
    ("quantize_absmax", "absmax", torch.zeros(4, dtype=torch.bfloat16), "expected Float, got BFloat16"),
    ("dequantize_absmax", "codes", torch.zeros(300), "expected Byte, got Float"),
    ("dequantize_absmax", "nested_absmax", torch.zeros(3), "expected 2 elements"),
    ("dequantize_absmax", "nested_offset", torch.zeros(2), "expected 1 elements"),
    (
        "dequantize_nf4",
        "packed",
        torch.zeros(47, 32, dtype=torch.uint8),
        "expected 1536 bytes for 3072 elements, got 1504",
    ),
    ("dequantize_nf4", "packed", torch.zeros(48, 32), "expected Byte, got Float"),
    ("dequantize_nf4", "packed", torch.zeros(32, 48, dtype=torch.uint8).t(), "contiguous"),
    ("dequantize_nf4", "absmax", torch.zeros(48), "expected Byte codes|expected Byte, got Float"),
    ("dequantize_nf4", "absmax", torch.zeros(47, dtype=torch.uint8), "expected 48 elements"),
    ("dequantize_nf4", "nested_absmax", None, "nested_absmax: expected with nested_offset, got None"),
    ("dequantize_nf4", "nested_offset", None, "nested_offset: expected with nested_absmax, got None"),
    ("dequantize_nf4", "shape", [48, -64], "0 or more, got -64"),
    ("dequantize_nf4", "dtype", torch.int8, "got Char"),
    ("linear_nf4", "x", torch.zeros(3, 63), "in_features. is 63"),
    ("linear_nf4", "x", torch.zeros(()), "at least one dimension"),
    ("linear_nf4", "x", torch.zeros(3, 64, dtype=torch.int64), "got Long"),
    ("linear_nf4", "out_features", -1, "got -1"),
    ("linear_nf4", "bias", torch.zeros(47), r"expected shape \[48\]"),
    ("linear_nf4", "bias", torch.zeros(48, dtype=torch.bfloat16), "dtype of x .Float., got BFloat16"),
    ("linear_nf4", "lora_a", None, "expected with lora_b, got None"),
    ("linear_nf4", "lora_b", None, "expected with lora_a, got None"),
    ("linear_nf4", "lora_a", torch.zeros(4, 63), r"\[any, 64\]"),
    ("linear_nf4", "lora_a", torch.zeros(4, 64, dtype=torch.float16), "dtype of x"),
    ("linear_nf4", "lora_b", torch.zeros(48, 5), r"\[48, 4\]"),
    ("linear_nf4", "dropout_p", 1.5, "from 0 to 1, got 1.5"),
    ("linear_nf4", "dropout_p", float("nan"), "from 0 to 1, got"),
    ("linear_nf4_dx", "dy", torch.zeros(3, 47), "out_features. is 47"),
    ("linear_nf4_dx", "in_features", 65, "in_features = 65"),
    ("linear_nf4_dlora", "x", torch.zeros(5, 64), "leading dimensions of x"),
    ("linear_nf4_dlora", "h", torch.zeros(5, 4), r"expected 6 rows of 4 elements \(the rank\), got shape \[5, 4\]"),
    ("linear_nf4_dlora", "g", torch.zeros(2, 3, 5), r"6 rows of 4 elements \(the rank\), got shape \[2, 3, 5\]"),
    ("linear_nf4_dlora", "g", torch.zeros(()), "at least one dimension"),
    ("linear_nf4_dlora", "h", torch.zeros(2, 3, 4, dtype=torch.float16), "dtype of x .Float., got Half"),
    ("linear_nf4_with_h", "lora_a", None, "expected with lora_b, got None"),
]


@pytest.mark.parametrize(
    ("name", "argument", "value", "text"), BAD, ids=[f"{b[0]}-{b[1]}-{i}" for i, b in enumerate(BAD)]
)
def test_a_wrong_argument_is_named(name: str, argument: str, value: object, text: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=text) as error:
        changed(name, **{argument: value})
    culprit = {"dequantize_nf4-shape": "shape", "linear_nf4_dlora-x": "dy"}.get(f"{name}-{argument}", argument)
    assert str(error.value).startswith((culprit + ":", "dy:", "packed:")), error.value


@pytest.mark.cuda
@pytest.mark.parametrize("argument", ["packed", "absmax", "nested_absmax", "bias", "lora_a", "lora_b"])
def test_a_cpu_tensor_mixed_in_is_named(argument: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=f"{argument}: expected on the device of .*cuda:0.*, got cpu"):
        changed("linear_nf4", "cuda", **{argument: named("linear_nf4", "cpu")[argument]})


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_casts_the_dense_arguments_and_leaves_the_scales(device: str) -> None:
    s = linear_sample(m=3, device=device, double_quant=False)
    low = linear_sample(m=3, device=device, double_quant=False, dtype=torch.bfloat16)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = OPS.linear_nf4(*s.args)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, OPS.linear_nf4(*low.args))


def test_meta_tensors_give_shapes_alone() -> None:
    s = linear_sample(m=(2, 3))
    args = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in s.args]
    y = OPS.linear_nf4(*args)
    assert y.is_meta
    assert y.shape == (2, 3, 48)
    assert qlora_ext.quantize_nf4(torch.empty(48, 64, device="meta")).packed.shape == (48, 32)


@pytest.mark.parametrize("name", [name for name in OP_NAMES if not name.startswith("quantize")])
def test_one_meta_tensor_among_others_is_named(name: str) -> None:
    """In these modes torch calls the fake kernel, whose result is uninitialized."""
    tensors = [argument for argument, value in named(name, "cpu").items() if isinstance(value, torch.Tensor)]
    for argument in tensors:
        with pytest.raises(ValueError, match=r"\w+: expected on the device of \w+ \((cpu|meta)\), got (cpu|meta)"):
            changed(name, **{argument: named(name, "cpu")[argument].to("meta")})


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize(
    ("kind", "m", "n", "k"), [("linear", 70, 130, 200), ("experts", 55, 48, 64), ("experts", 4, 48, 64)]
)
def test_results_do_not_depend_on_the_number_of_threads(kind: str, m: int, n: int, k: int, dtype: torch.dtype) -> None:
    s = KINDS[kind](m, n, k, 5, dtype, dropout_p=0.3)
    dy, before = s.dy(), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append((s.forward(), s.dx(dy), *s.dlora(dy)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_dropout_keeps_the_share_it_says() -> None:
    n, k = 64, 4096
    w4 = qlora_ext.quantize_nf4(torch.zeros(n, k))
    y = OPS.linear_nf4(
        torch.ones(64, k), *w4.operands(n, None, torch.ones(1, k), torch.ones(n, 1), 1.0 / k, 0.3, 11, None)
    )
    assert abs(float(y.mean()) - 1.0) < 5 * np.sqrt(0.3 / 0.7 / (64 * k))


OTHER_NAMES = [(name, name.replace("nf4", "4bit")) for name in OP_NAMES if "nf4" in name]
OTHER_NAMES += [(name, name.replace("nf4", "quantized")) for name in OP_NAMES if "linear_nf4" in name]


@pytest.mark.parametrize(("name", "other"), [*OTHER_NAMES, ("dequantize_nf4", "dequantize")])
def test_operators_of_all_codes_have_a_name_that_says_so(name: str, other: str) -> None:
    operator, alias = getattr(OPS, name).default, getattr(OPS, other).default
    assert str(alias._schema) == str(operator._schema).replace(name, other, 1)
    args = op_calls("cpu")[name]
    expected, found = operator(*args), alias(*args)
    pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
    assert all(torch.equal(a, b) for a, b in pairs)


def test_the_other_names_are_differentiable_and_compile() -> None:
    s = linear_sample(m=3)
    packed = s.w4.operands()[:6]  # the arguments after the seed have defaults
    call = lambda x: OPS.linear_4bit(x, *packed, s.w4.shape[0], None, s.lora_a, s.lora_b, 1.0, 0.0, 0)  # noqa: E731
    x = s.x.detach().requires_grad_()
    (dx,) = torch.autograd.grad(call(x).sum(), [x])
    (again,) = torch.autograd.grad(torch.compile(call, fullgraph=True, backend="aot_eager")(x).sum(), [x])
    assert torch.equal(dx, again)
    assert dx.abs().sum() > 0


HAS_CUDA_KERNELS = qlora_ext.build_info()["cuda_error"] is None


@pytest.mark.skipif(HAS_CUDA_KERNELS, reason="the CUDA kernels are loaded here")
@pytest.mark.parametrize("name", OP_NAMES)
def test_without_its_cuda_library_the_error_has_the_reason(name: str) -> None:
    with pytest.raises(RuntimeError, match="qlora_ext has no CUDA kernels here: "):
        getattr(OPS, name).default._op_dk(torch._C.DispatchKey.CUDA, *op_calls("cpu")[name])
