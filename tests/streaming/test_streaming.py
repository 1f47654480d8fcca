"""Streamed models compute the same bits as resident ones, from the checkpoint's files, with memory for two blocks."""

from __future__ import annotations

import copy
import pathlib
import weakref
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import torch as safetensors
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import qlora_ext
from forms import MODULE_FORMS as FORMS
from forms import random_weight
from qlora_ext.adapters import stack_adapters
from qlora_ext.nn import Experts4bit, ExpertsLora, Linear4bit
from qlora_ext.sizes import parse_size
from qlora_ext.streaming import chunk_mlp, stream, streaming_of
from qlora_ext.streaming.schedule import upcoming
from qlora_ext.streaming.streaming import Streaming
from qlora_ext.weight import Weight4bit
from streamed_models import LAYERS, adapted, assert_same, checkpointed, load, save, trained
from tiny_experts import Experts, routing
from tiny_models import make, same_state, token_ids


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "checkpointed", "reentrant"])
def test_training_is_bit_equal(llama: pathlib.Path, checkpointing: bool | None) -> None:
    runs = []
    for streamed in (False, True):
        model = load(llama)
        if streamed:
            assert stream(model, source="disk") is model
            assert len(streaming_of(model).slots) == 2
        model = adapted(model)
        if checkpointing is not None:
            checkpointed(model, checkpointing)
        runs.append(trained(model))
    assert_same(*runs)


def test_the_ring_has_as_many_blocks_as_are_allowed(llama: pathlib.Path) -> None:
    expected = trained(adapted(load(llama)), steps=2)
    least = streaming_of(stream(load(llama), source="disk"))
    block = least.ring_bytes // 2
    packed = sum(part.nbytes for streamed in least.blocks for part in streamed.parts)
    complete = load(llama)
    rest = sum(t.nbytes for t in (*complete.parameters(), *complete.buffers())) - packed
    for slots in (2, 3, LAYERS):
        model = stream(load(llama), resident=rest + slots * block + 4096, source="disk")
        assert len(streaming_of(model).slots) == slots
        assert_same(trained(adapted(model), steps=2), expected)
    assert streaming_of(model).fills == LAYERS  # if all fit, each is read once


@pytest.mark.parametrize("family", ["qwen2", "phi3", "gpt2"])
def test_other_families_are_bit_equal(family: str, tmp_path: pathlib.Path) -> None:
    path = save(family, tmp_path)
    assert_same(trained(adapted(stream(load(path), source="disk"))), trained(adapted(load(path))))


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3-MoE", "DeepSeek-V3", "GPT-OSS"])
def test_experts_with_adapters_are_bit_equal(family: str, tmp_path: pathlib.Path) -> None:
    path = save(family, tmp_path)
    experts = [n for n, m in load(path).named_modules() if isinstance(m, qlora_ext.nn.Experts4bit)]
    targets = [f"{'.'.join(experts[0].split('.')[-2:])}.{w}" for w in ("gate_up_proj", "down_proj")]
    runs = []
    for streamed in (True, False):
        model = load(path)
        if streamed:
            stream(model, source="disk")
        runs.append(trained(adapted(model, target_modules=["q_proj", "o_proj"], target_parameters=targets)))
    assert_same(*runs)


def test_blocks_are_read_once_a_pass_and_once_less_at_each_turn(llama: pathlib.Path) -> None:
    model = adapted(stream(load(llama), source="disk"))
    checkpointed(model, False)
    trained(model, steps=1)
    streaming = streaming_of(model)
    before = streaming.fills
    trained(model, steps=4)
    # In a forward and in a backward pass, two blocks are already in memory.
    assert streaming.fills - before == 4 * 2 * (LAYERS - 2)


def test_the_order_of_use() -> None:
    assert list(upcoming(1, 4, backward=False, training=True)) == [1, 2, 3, 0]
    assert list(upcoming(2, 4, backward=False, training=True)) == [2, 3, 1, 0]
    assert list(upcoming(2, 4, backward=True, training=True)) == [2, 1, 0, 3]
    assert list(upcoming(3, 4, backward=False, training=False)) == [3, 0, 1, 2]


def test_generation_evaluation_and_merging_in_between(llama: pathlib.Path) -> None:
    def run(model: Any) -> list[Any]:
        model = adapted(model, dropout=0.0)
        found: list[Any] = [trained(model, steps=1)[0]]
        model.eval()
        with torch.no_grad():
            found.append(model(input_ids=token_ids()).logits)
        found.append(model.generate(input_ids=token_ids(), max_new_tokens=4, do_sample=False))
        model.merge_adapter()
        with torch.inference_mode():
            found.append(model(input_ids=token_ids()).logits.clone())
        model.unmerge_adapter()
        found.append(trained(model.train(), steps=1)[0])
        found.append(qlora_ext.fingerprint.fingerprint(model))
        return [*found, model.merge_and_unload().state_dict()]

    streamed, resident = run(stream(load(llama), source="disk")), run(load(llama))
    for a, b in zip(streamed[:-1], resident[:-1], strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    assert [name for name, t in resident[-1].items() if not torch.equal(t, streamed[-1][name])] == []


def test_adapters_made_before_are_streamed_too(llama: pathlib.Path) -> None:
    assert_same(trained(stream(adapted(load(llama)), source="disk")), trained(adapted(load(llama))))


def test_under_autocast(llama: pathlib.Path) -> None:
    def run(model: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return trained(adapted(model))

    assert_same(run(stream(load(llama), source="disk")), run(load(llama)))


def test_a_compiled_layer(llama: pathlib.Path) -> None:
    model, expected = adapted(stream(load(llama), source="disk")), trained(adapted(load(llama)), steps=2)
    layer = model.get_base_model().model.layers[1]
    layer.forward = torch.compile(layer.forward, backend="aot_eager")
    losses, _ = trained(model, steps=2)
    assert losses == pytest.approx(expected[0], abs=1e-2)


def test_the_packed_state_stays_where_it_is(llama: pathlib.Path) -> None:
    model = stream(load(llama), source="disk")
    before = [(n, t.data_ptr()) for n, t in model.named_parameters() if t.dtype == torch.uint8]
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in load(llama).named_parameters()]
    model.model.layers.float()
    assert [(n, t.data_ptr()) for n, t in model.named_parameters() if t.dtype == torch.uint8] == before
    assert model.model.layers[0].self_attn.q_proj.compute_dtype == torch.float32
    assert model.model.layers[0].input_layernorm.weight.dtype == torch.float32


def test_saving_an_adapter_holds_one_weight_at_a_time(
    llama: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(stream(load(llama), source="disk"))
    read_part, alive, most = Streaming.read_part, weakref.WeakSet(), 0

    def counted(self: Streaming, part: Any) -> torch.Tensor:
        nonlocal most
        alive.add(copied := read_part(self, part))
        most = max(most, len(alive))
        return copied

    monkeypatch.setattr(Streaming, "read_part", counted)
    model.save_pretrained(tmp_path)
    assert 0 < most <= 2 * 4  # a weight has four tensors, and is evicted when the next one is in memory


def test_streamed_models_are_saved_and_copied(llama: pathlib.Path, tmp_path: pathlib.Path) -> None:
    model = stream(load(llama), source="disk")
    model.save_pretrained(tmp_path)
    assert same_state(load(tmp_path), load(llama))
    twin = copy.deepcopy(model)
    assert streaming_of(twin) is None
    assert torch.equal(twin(token_ids()).logits, model(token_ids()).logits)


@pytest.mark.usefixtures("native_bfloat16")
def test_a_loaded_state_is_used_in_the_computation(llama: pathlib.Path) -> None:
    model = stream(load(llama), source="disk")
    model(token_ids())
    torch.manual_seed(5)
    other = qlora_ext.quantize_model(AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16))
    model.load_state_dict(other.state_dict())
    assert torch.equal(model(token_ids()).logits, other(token_ids()).logits)


def test_a_lent_tensor_that_is_used_after_its_loan_gives_no_wrong_gradient(llama: pathlib.Path) -> None:
    layers = stream(load(llama), source="disk").model.layers
    q_proj = layers[0].self_attn.q_proj
    with q_proj.residency.lend(q_proj, "weight") as (lent, *_):
        pass
    saved = torch.ones(32, requires_grad=True) * lent.view_as(lent)  # a view without a mark of the loan
    for layer in layers:
        layer.self_attn.q_proj(torch.randn(3, 64).bfloat16())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.sum().backward()


def test_nothing_is_copied_from_the_mapping(llama: pathlib.Path) -> None:
    """After a pass, this process has no pages of the files in memory."""
    model = adapted(stream(load(llama), source="disk"))
    trained(model, steps=1)
    mapped = resident = 0
    with open("/proc/self/smaps") as file:
        of_it = False
        for line in file:
            fields = line.split()
            if "-" in fields[0] and not fields[0].endswith(":"):
                of_it = str(llama) in line
            elif of_it and fields[0] == "Rss:":
                mapped, resident = mapped + 1, resident + int(fields[1])
    assert mapped > 0
    assert resident <= mapped * 64  # headers, and the readahead around them


def test_models_that_cannot_be_streamed_are_rejected(llama: pathlib.Path) -> None:
    with pytest.raises(TypeError, match="model: expected an nn.Module, got str"):
        stream("model")
    with pytest.raises(ValueError, match="found none"):
        stream(torch.nn.Linear(4, 4), source="disk")
    with pytest.raises(ValueError, match="source: expected 'ram' or 'disk', got 'tape'"):
        stream(load(llama), source="tape")
    with pytest.raises(ValueError, match="resident: expected a size such as 24GB"):
        stream(load(llama), resident="lots", source="disk")
    with pytest.raises(ValueError, match="is in memory"):
        stream(qlora_ext.quantize_model(make()), source="disk")
    with pytest.raises(ValueError, match="one that is not streamed"):
        stream(stream(load(llama), source="disk"), source="disk")
    with pytest.raises(ValueError, match="device: expected 'cpu' or 'cuda'"):
        stream(load(llama), source="disk", device="meta")
    with pytest.warns(UserWarning, match="resident: 1000 bytes are less than"):
        stream(load(llama), resident=1000, source="disk")


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_other_owners_of_weights_are_rejected(llama: pathlib.Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(ValueError, match=f"{name} is in use"):
        stream(load(llama), source="disk")


def test_from_ram_on_the_cpu_nothing_moves(llama: pathlib.Path) -> None:
    model = load(llama)
    before = model.model.layers[0].mlp.up_proj.weight.data_ptr()
    assert stream(model, resident="1GB", source="ram") is model
    assert model.model.layers[0].mlp.up_proj.weight.data_ptr() == before


@pytest.mark.parametrize(
    ("text", "size"), [("6GB", 6 * 10**9), ("1.5 GiB", 3 * 2**29), (4096, 4096), ("7e9", 7 * 10**9)]
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size("resident", text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "6 parsecs", 0, True, float("nan"), float("inf"), None])
def test_no_sizes(text: Any) -> None:
    with pytest.raises(ValueError, match="resident: expected a size"):
        parse_size("resident", text)


def test_an_adapter_saved_over_a_streamed_base_loads_over_a_resident_one(
    llama: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    model = adapted(stream(load(llama), source="disk"))
    trained(model, steps=1)
    model.save_pretrained(tmp_path)
    resident = PeftModel.from_pretrained(load(llama), tmp_path)
    assert torch.equal(resident.eval()(token_ids()).logits, model.eval()(token_ids()).logits)


def test_by_the_configuration(llama: pathlib.Path, tmp_path: pathlib.Path) -> None:
    config = qlora_ext.QLoRAConfig(stream="disk", resident="1GB")
    model = AutoModelForCausalLM.from_pretrained(llama, quantization_config=config, device_map="cpu")
    assert len(streaming_of(model).blocks) == LAYERS
    assert torch.equal(model(token_ids()).logits, load(llama)(token_ids()).logits)
    model.save_pretrained(tmp_path)
    assert "stream" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("device_map", [None, "auto", "cpu", {"": "cpu"}], ids=str)
def test_any_one_device_is_right(llama: pathlib.Path, device_map: Any) -> None:
    config = qlora_ext.QLoRAConfig(stream="disk")
    model = AutoModelForCausalLM.from_pretrained(llama, quantization_config=config, device_map=device_map)
    assert streaming_of(model) is not None


def test_the_configuration_rejects_invalid_values(llama: pathlib.Path, tmp_path: pathlib.Path) -> None:
    config = qlora_ext.QLoRAConfig
    with pytest.raises(ValueError, match="stream: expected 'ram', 'disk' or None, got 'tape'"):
        config(stream="tape")
    with pytest.raises(ValueError, match="resident: expected with stream="):
        config(resident="1GB")
    with pytest.raises(ValueError, match="resident: expected a size"):
        config(stream="disk", resident="much")
    make().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="stream: 'disk' needs a 4-bit model saved by qlora_ext"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config(stream="disk"))
    with pytest.raises(ValueError, match="device_map: expected one device"):
        AutoModelForCausalLM.from_pretrained(llama, quantization_config=config(stream="disk"), device_map="balanced")


def test_the_mlp_in_chunks_of_tokens(llama: pathlib.Path) -> None:
    ids = torch.randint(3, 128, (2, 24))

    def run(tokens: int | None) -> tuple[float, dict[str, torch.Tensor], int]:
        model = adapted(load(llama), dropout=0.0)
        if tokens is not None:
            assert chunk_mlp(model, tokens) is model
        kept: dict[int, int] = {}

        def keep(t: torch.Tensor) -> torch.Tensor:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return loss.item(), gradients, sum(kept.values())

    complete, gradients, kept = run(None)
    for tokens in (24, 100):  # as many chunks as tokens, or more, have no effect
        assert run(tokens)[0] == complete
    loss, others, less = run(5)
    assert loss == pytest.approx(complete, rel=1e-3)
    assert all(torch.allclose(g, others[name], rtol=0.1, atol=2e-3) for name, g in gradients.items())
    assert kept - less > LAYERS * 3 * ids.numel() * 192 * 2  # gate, up and their product


def test_models_that_cannot_be_chunked(llama: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="tokens: expected a positive integer, got 0"):
        chunk_mlp(load(llama), 0)
    with pytest.raises(ValueError, match="expected one with dense MLPs"):
        chunk_mlp(torch.nn.Linear(2, 2), 4)


@pytest.mark.parametrize("family", ["Mixtral", "GPT-OSS"])
def test_of_few_tokens_only_the_experts_that_they_go_to_are_read(family: str, tmp_path: pathlib.Path) -> None:
    path = save(family, tmp_path)
    model, expected = stream(load(path), source="disk"), load(path)
    streaming = streaming_of(model)
    assert all(0 < block.shared < block.nbytes for block in streaming.blocks)
    ids = token_ids()
    with torch.no_grad():
        for tokens in (ids[:1, :1], ids[:1, 3:4], ids, ids[:1, :1]):  # alternating numbers of chunks
            assert torch.equal(model(tokens).logits, expected(tokens).logits)
        model(ids[:1, :1])
        assert {slot.size for slot in streaming.slots} == {block.shared for block in streaming.blocks}
    found = model.generate(input_ids=ids[:1], max_new_tokens=4, do_sample=False)
    assert torch.equal(found, expected.generate(input_ids=ids[:1], max_new_tokens=4, do_sample=False))


def test_adapters_learn_from_a_single_token_as_well(tmp_path: pathlib.Path) -> None:
    path = save("Mixtral", tmp_path)
    runs = []
    for streamed in (True, False):
        model = stream(load(path), source="disk") if streamed else load(path)
        targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        model = adapted(model, dropout=0.0, target_modules=["q_proj"], target_parameters=targets)
        model(input_ids=token_ids()[:1, :1]).logits.float().square().mean().backward()
        runs.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all((g is None and runs[1][name] is None) or torch.equal(g, runs[1][name]) for name, g in runs[0].items())


class Layered(nn.Module):
    """Linear layers, or experts, in a module list."""

    def __init__(self, weights: list[Weight4bit]) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for w4 in weights:
            if w4.shape[0] == 5:
                layer = Experts4bit(Experts(inner=64), torch.float64, **w4.form.keywords)
                layer.set_packed("gate_up_proj", w4)
                layer.set_packed("down_proj", random_weight(w4.form, (5, 64, 64)))
            else:
                layer = Linear4bit(64, 64, False, torch.float64, **w4.form.keywords)
                layer.set_weight(w4)
            self.layers.append(layer)

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x, *more)
        return x


def from_disk(model: nn.Module, path: pathlib.Path) -> nn.Module:
    """``model`` with its state mapped from a file, and streamed from there."""
    safetensors.save_file(model.state_dict(), path)
    model.load_state_dict(safetensors.load_file(path), assign=True)
    return stream(model, source="disk")


def two_adapters(tokens: int) -> dict[str, ExpertsLora]:
    """Adapters of which each token uses one."""
    a, b = (
        [torch.randn(5, *shape).double() for shape in shapes] for shapes in (((2, 64), (3, 64)), ((128, 2), (128, 3)))
    )
    return {"gate_up_proj": ExpertsLora(stack_adapters(a, b), None, adapter_of_row=torch.arange(tokens) % 2)}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("experts", [False, True], ids=["linear", "experts"])
def test_a_streamed_model_has_the_same_bits(name: str, experts: bool, tmp_path: pathlib.Path) -> None:
    shape = (5, 128, 64) if experts else (64, 64)
    weights = [random_weight(FORMS[name], shape, seed) for seed in range(4)]
    resident = Layered(weights)
    streamed = from_disk(Layered(weights), tmp_path / "state.safetensors")
    assert len(streaming_of(streamed).slots) == 2
    for tokens in (1, 7):
        more = (*routing(tokens), two_adapters(tokens)) if experts else ()
        x = torch.randn(tokens, 64, dtype=torch.float64, requires_grad=True)
        y, expected = streamed(x, *more), resident(x, *more)
        assert torch.equal(y, expected)
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.autograd.grad(expected.sum(), x)[0])
    for layer, w4 in zip(streamed.layers, weights, strict=True):
        read = layer.packed_weight("gate_up_proj" if experts else "weight")
        assert read.form == w4.form
        assert all(torch.equal(t, w4.tensors[key]) for key, t in read.tensors.items())
