"""Experts4bit quantizes every expert separately, and computes the same as the layer with the decoded experts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import qlora_ext
from qlora_ext.adapters import stack_adapters
from qlora_ext.nn import Experts4bit, ExpertsLora, quantize_model
from tiny_experts import Experts, routing


class Transposed(Experts):
    has_bias, is_transposed = True, True


class Ungated(Experts):
    has_gate = False


NESTED = ("nested_absmax", "nested_offset")
KINDS = [Experts, Transposed, Ungated]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("block_size", "double_quant"), [(64, True), (64, False), (32, True)])
def test_every_expert_is_quantized_by_itself(kind: type[Experts], block_size: int, double_quant: bool) -> None:
    dense = kind()
    module = Experts4bit.from_experts(dense, block_size=block_size, double_quant=double_quant)
    for name in module.packed_shapes:
        assert getattr(module, name).packed.dtype == torch.uint8
        for e, w in enumerate(getattr(dense, name)):
            w4 = qlora_ext.quantize_nf4(w.T if dense.is_transposed else w, block_size, double_quant)
            assert torch.equal(getattr(module, name).packed[e], w4.packed)
            assert torch.equal(getattr(module, f"{name}_absmax")[e], w4.absmax)
            if double_quant:
                assert torch.equal(getattr(module, f"{name}_nested_offset")[e], w4.nested_offset)
            decoded = w4.dequantize().T if dense.is_transposed else w4.dequantize()
            assert torch.equal(module.dequantize(name)[e], decoded)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 2, 5])
def test_forward_and_backward_are_those_of_the_decoded_experts(kind: type[Experts], k: int) -> None:
    module = Experts4bit.from_experts(kind())
    dense = module.to_experts()
    assert type(dense) is kind
    index, weights = routing(k=k)
    x = torch.randn(11, 64)
    out, grads = [], []
    for layer in (module, dense):
        leaves = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
        y = layer(leaves[0], index, leaves[1])
        y.square().sum().backward()
        out.append(y.detach())
        grads.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(out[0], out[1], rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_an_expert_without_tokens_and_an_expert_that_does_not_exist() -> None:
    module = Experts4bit.from_experts(Transposed())
    index = torch.tensor([[0, 5], [3, 0], [5, 5]])
    weights = torch.rand(3, 2)
    x = torch.randn(3, 64)
    torch.testing.assert_close(module(x, index, weights), module.to_experts()(x, index, weights), rtol=1e-4, atol=1e-4)
    assert module(x[:0], index[:0], weights[:0]).shape == (0, 64)
    invalid = torch.tensor([[0, -1], [3, 0], [-7, 2**40]])
    expected = module(x, index, weights)
    for call in (module, torch.compile(module, backend="aot_eager", fullgraph=True)):
        assert torch.equal(call(x, invalid, weights), expected)
    assert torch.equal(expected[2], torch.zeros(64))
    with pytest.raises(TypeError, match=r"top_k_index: expected integer expert numbers, got torch\.float32"):
        module(x, weights, weights)


def test_weights_of_all_experts() -> None:
    module = Experts4bit.from_experts(Experts())
    every = torch.rand(11, 5)
    index = every.topk(2).indices
    x = torch.randn(11, 64)
    assert torch.equal(module(x, index, every), module(x, index, every.gather(1, index)))


def test_gradients_of_biases() -> None:
    module = Experts4bit.from_experts(Transposed())
    dense = module.to_experts()
    index, weights = routing()
    x = torch.randn(11, 64)
    for layer in (module, dense):
        for name in ("gate_up_proj_bias", "down_proj_bias"):
            getattr(layer, name).requires_grad_()
        layer(x, index, weights).square().sum().backward()
    for name in ("gate_up_proj_bias", "down_proj_bias"):
        torch.testing.assert_close(getattr(module, name).grad, getattr(dense, name).grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_and_autocast(dtype: torch.dtype) -> None:
    module = Experts4bit.from_experts(Experts(dtype=dtype))
    index, weights = routing()
    x = torch.randn(11, 64)
    exact = Experts4bit.from_experts(module.to_experts(torch.float32))(x, index, weights)
    y = module(x.to(dtype), index, weights)
    assert y.dtype == dtype
    assert (y.float() - exact).norm() < 0.02 * exact.norm()
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x, index, weights).dtype == torch.float32
    assert module.float()(x, index, weights).dtype == torch.float32


def test_activations_reach_both_products(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def spy(call):
        return lambda *args, **kwargs: given.append((*args, *kwargs.values())[-1]) or call(*args, **kwargs)

    for name in ("call_linear", "merged_linear_nf4"):
        monkeypatch.setattr(f"qlora_ext.nn.experts.{name}", spy(getattr(qlora_ext.nn.experts, name)))
    experts = Experts4bit.from_experts(Experts(), activations="int8")
    _, n, k = experts.packed_shapes["down_proj"]
    merged = ExpertsLora(torch.zeros(4, 2, k), torch.zeros(4, n, 2), merged=experts.packed_weight("down_proj"))
    x, chosen = torch.randn(6, 64), routing(6)
    experts(x, *chosen)
    experts(x, *chosen, lora={"down_proj": merged})
    assert given == ["int8"] * 4
    assert experts.extra_repr().endswith("activations=int8")


def test_quantize_model_finds_experts() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(64, 5)
            self.experts = Experts()

    model = Block()
    dense = model.experts
    quantize_model(model, skip=["gate"])
    assert isinstance(model.experts, Experts4bit)
    assert type(model.gate) is nn.Linear
    assert dense.down_proj.numel() == 0  # freed
    assert isinstance(quantize_model(Experts()), Experts4bit)
    assert type(quantize_model(Block(), skip=["experts"]).experts) is Experts


def test_modules_that_are_not_supported_experts() -> None:
    with pytest.raises(TypeError, match="3-D parameters gate_up_proj"):
        Experts4bit(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="down_proj: expected an even number of in_features, got 3"):
        Experts4bit(Experts(inner=3))


BAD_STACKS = [
    ("x", torch.zeros(7, 1, 64), r"x: expected shape \[any, any\] \(rows, features\), got \[7, 1, 64\]"),
    (
        "offsets",
        torch.tensor([2, 2, 9]),
        "expected ascending row numbers up to (7, got 9|0, got 2) for expert",
    ),
    ("offsets", torch.tensor([2, 2]), r"offsets: expected shape \[3\] \(experts\), got \[2\]"),
    ("offsets", torch.tensor([2.0, 2.0, 6.0]), "offsets: expected Long, got Float"),
    ("offsets", torch.tensor([2, 2, 6]).to_sparse(), "offsets: expected a dense tensor, got a torch.sparse_coo tensor"),
    (
        "offsets",
        torch.tensor([2, 1, 6]),
        "offsets: expected ascending row numbers up to (7, got 1|0, got 2) for expert",
    ),
    ("packed", torch.zeros((), dtype=torch.uint8), r"out_features = 32 this needs 1024 packed bytes per expert"),
    ("packed", torch.zeros(3, 31, 32, dtype=torch.uint8), "this needs 1024 packed bytes per expert, got packed"),
    ("packed", None, "packed: expected a tensor, got None"),
    ("absmax", None, "absmax: expected a tensor, got None"),
    ("offsets", torch.tensor([2, 2, 6], device="meta"), "offsets: expected on the device of x"),
    ("absmax", torch.zeros(2, 32, dtype=torch.uint8), "absmax: expected 3 slices, one per expert"),
    ("nested_absmax", torch.zeros(()), "nested_absmax: expected 3 slices"),
    ("nested_offset", torch.zeros(1), "nested_offset: expected 3 slices"),
    ("nested_offset", torch.zeros(1).expand(3), "nested_offset: expected a contiguous tensor"),
    ("packed", torch.zeros(1, dtype=torch.uint8).expand(3, 32, 32), "packed: expected a contiguous tensor"),
    ("out_features", -1, "out_features: expected sizes of 0 or more, got -1"),
    ("out_features", 32 + 2**58, r"out_features: expected at most 2\^48 elements"),
    ("bias", torch.zeros(3, 31), r"bias: expected shape \[3, 32\]"),
    ("lora_a", torch.zeros(4, 64), r"lora_a: expected shape \[3, any, 64\]"),
    ("lora_b", torch.zeros(3, 32, 5), r"lora_b: expected shape \[3, 32, 4\]"),
    ("lora_b", None, "lora_b: expected with lora_a, got None"),
    ("lora_a", torch.zeros(3, 4, 64, device="meta"), "lora_a: expected on the device of x"),
]


@pytest.mark.parametrize("rows", [7, 0])
@pytest.mark.parametrize(("name", "value", "text"), BAD_STACKS, ids=[f"{b[0]}-{i}" for i, b in enumerate(BAD_STACKS)])
def test_a_wrong_argument_of_the_stack_is_named(name: str, value: object, text: str, rows: int) -> None:
    """The arguments are checked even if no expert has rows."""
    w4 = [qlora_ext.quantize_nf4(torch.randn(32, 64)) for _ in range(3)]
    good = {key: torch.stack([getattr(w, key) for w in w4]) for key in ("packed", "absmax", *NESTED)}
    good |= {"x": torch.randn(rows, 64), "offsets": torch.tensor([2, 2, 6]).clamp(max=rows), "bias": None}
    good |= {"block_size": 64, "nested_block_size": 256, "out_features": 32, "scaling": 0.5}
    good |= {"lora_a": torch.zeros(3, 4, 64), "lora_b": torch.zeros(3, 32, 4)}
    operator = torch.ops.qlora.grouped_linear_nf4
    assert operator(**good).shape == (rows, 32)
    if (
        rows == 0
        and name == "offsets"
        and isinstance(value, torch.Tensor)
        and value.dtype == torch.int64
        and not value.is_meta
    ):
        text = "offsets: expected (ascending row numbers up to 0|a dense|shape)"
    with pytest.raises(ValueError, match=text):
        operator(**{**good, name: value})


def test_wrong_arguments_of_the_gradients_are_named() -> None:
    a, b, offsets = torch.zeros(3, 4, 64), torch.zeros(3, 32, 4), torch.tensor([2, 2, 6])
    dlora = torch.ops.qlora.grouped_linear_nf4_dlora
    for dy, x, rows, la, lb, text in (
        (torch.zeros(6, 32), torch.zeros(7, 64), offsets, a, b, r"dy: expected the leading dimensions of x \[7, 64\]"),
        (torch.zeros(7, 32), torch.zeros(7, 64), offsets[:2], a, b, r"offsets: expected shape \[3\]"),
        (torch.zeros(7, 32), torch.zeros(7, 64), offsets, a[0], b, r"lora_a: expected shape \[4, any, 64\]"),
        (torch.zeros(7, 32), torch.zeros(7, 64), offsets, a, b[:2], r"lora_b: expected shape \[3, 32, 4\]"),
    ):
        with pytest.raises(ValueError, match=text):
            dlora(dy, x, rows, la, lb, 0.5)
    packed = torch.zeros(3, 32, 32, dtype=torch.uint8), torch.zeros(3, 32)
    with pytest.raises(ValueError, match="in_features = 65 this needs 1040 packed bytes per expert"):
        torch.ops.qlora.grouped_linear_nf4_dx(
            torch.zeros(7, 32), offsets, *packed, None, None, 64, 256, 65, None, None, 0.5
        )


def test_on_the_meta_device_there_are_shapes() -> None:
    module = Experts4bit.from_experts(Experts()).to("meta")
    index, weights = (t.to("meta") for t in routing())
    y = module(torch.empty(11, 64, device="meta"), index, weights)
    assert (y.shape, y.device.type) == ((11, 64), "meta")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_token_has_the_bits_of_its_adapter_alone(kind: type[Experts], dtype: torch.dtype) -> None:
    module = Experts4bit.from_experts(kind(dtype=dtype))
    x = torch.randn(11, 64, dtype=dtype)
    index, weights = routing()
    index[3, 1], index[5] = 5, -1  # no expert
    of_token = torch.tensor([0, 1, 2, -1, 1, 1, 0, 2, 2, -1, 0])
    factors: dict[str, list[tuple[Tensor, Tensor]]] = {
        name: [(torch.randn(5, r, k) / k**0.5, torch.randn(5, n, r)) for r in (3, 0, 5)]
        for name, (_, n, k) in module.packed_shapes.items()
    }

    def together(of_token: Tensor) -> dict[str, ExpertsLora]:
        stacks = {
            name: stack_adapters(*zip(*pairs, strict=True), scaling=[0.5, 1, 2]) for name, pairs in factors.items()
        }
        return {name: ExpertsLora(stack, None, adapter_of_row=of_token) for name, stack in stacks.items()}

    def alone(adapter: int) -> dict[str, ExpertsLora] | None:
        if adapter < 0:
            return None
        return {name: ExpertsLora(*pairs[adapter], [0.5, 1.0, 2.0][adapter]) for name, pairs in factors.items()}

    y = module(x, index, weights, together(of_token))
    for adapter in range(-1, 3):
        assert torch.equal(y[of_token == adapter], module(x, index, weights, alone(adapter))[of_token == adapter])
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, index, weights, together(of_token)), y)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(x, index, weights, together(of_token * 0))[0], module(x, index, weights, alone(0))[0])


def test_several_adapters_that_do_not_fit_are_named() -> None:
    module = Experts4bit.from_experts(Experts())
    x, routed = torch.randn(11, 64), routing()
    stack = stack_adapters([torch.randn(5, 2, 64)], [torch.randn(5, 96, 2)])
    of_token = torch.zeros(11, dtype=torch.int32)
    for lora, error, message in (
        (ExpertsLora(stack, torch.randn(5, 96, 2), adapter_of_row=of_token), TypeError, "lora: expected .* b None"),
        (ExpertsLora(torch.randn(5, 2, 64), None), TypeError, "lora: expected tensors a and b"),
        (ExpertsLora(stack, None), TypeError, "adapter_of_row: expected a tensor with several adapters, got NoneType"),
        (ExpertsLora(stack, None, adapter_of_row=of_token[:4]), ValueError, "adapter_of_row: expected the leading"),
        (
            ExpertsLora(stack, None, adapter_of_row=of_token + 1),
            ValueError,
            "adapter_of_row: expected -1 .* to 0, got 1",
        ),
        (ExpertsLora(stack, None, 2.0, adapter_of_row=of_token), ValueError, "scaling: expected 1.0"),
        (
            ExpertsLora(stack.lora_a, stack.lora_b, adapter_of_row=of_token),
            TypeError,
            "lora: expected .* adapter_of_row",
        ),
    ):
        with pytest.raises(error, match=message):
            module(x, *routed, {"gate_up_proj": lora})
