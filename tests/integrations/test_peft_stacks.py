"""The stack of adapters that a layer retains between calls with ``adapter_names`` is never that of earlier adapters."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.utils.hotswap import hotswap_adapter
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils import swap_tensors

from adapted_models import BASE, counting_fused_calls
from qlora_ext.integrations.peft import stacks
from test_peft_mixed import IDS, NAMES, adapted_layers, mixture, of_samples, one_model, several

X = torch.linspace(-1, 1, 5 * 64).reshape(5, 64)


def layer_of(model: Any) -> Any:
    return model.base_model.model[0]


def mixed(model: Any, names: Sequence[str] = NAMES) -> Tensor:
    with torch.no_grad():
        y: Tensor = model(X, adapter_names=names)
    return y


def fresh(model: Any, names: Sequence[str] = NAMES) -> Tensor:
    """The same without a stack of an earlier call."""
    layer_of(model).forget_stack()
    return mixed(model, names)


@pytest.fixture
def stacked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of adapters that are stacked from now on."""
    calls: list[int] = []
    stack = stacks.stack_adapters
    monkeypatch.setattr(stacks, "stack_adapters", lambda a, *args: calls.append(len(a)) or stack(a, *args))
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_adapters_are_cast_and_stacked_once(dtype: torch.dtype, stacked: list[int]) -> None:
    model = several(dtype)
    names = ["default", *(f"adapter{i}" for i in range(15))]
    for name in names[1:]:
        model.add_adapter(name, LoraConfig(r=3, init_lora_weights=False, target_modules="all-linear"))

    def counts(**options: Any) -> tuple[int, ...]:
        with profile(activities=[ProfilerActivity.CPU]) as profiled, torch.no_grad():
            model(input_ids=IDS[:1].expand(16, -1), **options)
        found = {event.key: event.count for event in profiled.key_averages()}
        return tuple(found.get(f"aten::{name}", 0) for name in ("_to_copy", "to", "cat"))

    counts(adapter_names=names)
    layers = len(adapted_layers(model))
    assert stacked == [16] * layers
    casts, conversions, cats = counts()
    several_casts, several_conversions, several_cats = counts(adapter_names=names)
    assert several_casts <= casts
    assert several_conversions <= conversions + 2 * layers
    assert several_cats <= cats
    counts(adapter_names=[BASE, *names[:0:-1]])  # fewer adapters in another order
    assert stacked == [16] * layers


def of(name: str, matrix: str = "lora_B") -> Callable[[Any], nn.Parameter]:
    return lambda model: getattr(layer_of(model), matrix)[name].weight


def write_last(model: Any) -> None:
    with torch.no_grad():
        of("wide")(model)[-1, -1] += 1


def write_in_inference_mode(model: Any) -> None:
    with torch.inference_mode():
        of("few", "lora_A")(model)[-1, -1] += 1


def step(optimizer: Any, name: str, **options: Any) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        model.set_adapter(name)
        chosen = [of(name, matrix)(model) for matrix in ("lora_A", "lora_B")]
        model(X).square().mean().backward()
        optimizer(chosen, lr=1e-6, **options).step()
        model.set_adapter("one")

    return change


def step_after_a_call(model: Any) -> None:
    """Of an optimizer that writes as fused ones do, and so little that few values change."""
    model(X).square().mean().backward()
    mixed(model)
    of("default", "lora_A")(model).data[-1, -1] += 1


def load(model: Any) -> None:
    model.load_state_dict({key: t + 1 if "few" in key else t for key, t in model.state_dict().items()})


def assign(model: Any) -> None:
    parameter = of("wide", "lora_A")(model)
    for _ in range(3):  # the second new tensor may have the address of the first
        parameter.data = parameter.data * 2


def assign_a_view(model: Any) -> None:
    """Of the same memory."""
    parameter = of("wide", "lora_A")(model)
    parameter.data = parameter.data.view(64, -1).T


def replace(model: Any) -> None:
    layer_of(model).lora_A["few"].weight = nn.Parameter(of("few", "lora_A")(model).detach() + 1)


def replace_in_the_same_memory(model: Any) -> None:
    """Until the new parameter has the version that the earlier one had."""
    earlier = of("wide")(model)
    parameter = layer_of(model).lora_B["wide"].weight = nn.Parameter(earlier.data, requires_grad=False)
    assert parameter._version < earlier._version
    while parameter._version < earlier._version:
        parameter[-1, -1].add_(1)


def move(model: Any) -> None:
    of("wide")(model).data.share_memory_()
    of("wide")(model).data.mul_(2.0)


def swap(model: Any) -> None:
    swap_tensors(of("wide")(model), nn.Parameter(of("wide")(model).detach() + 1))


def set_memory(model: Any) -> None:
    with torch.no_grad():
        of("few")(model).set_(torch.ones_like(of("few")(model)))


def add_again(model: Any) -> None:
    model.delete_adapter("few")
    model.add_adapter("few", LoraConfig(r=7, target_modules=["0"], init_lora_weights=False))


def scale(model: Any) -> None:
    layer_of(model).set_scale("wide", 3.0)


def scale_by_a_tensor(model: Any) -> None:
    layer_of(model).scaling["wide"] = torch.tensor(0.25)
    mixed(model)
    layer_of(model).scaling["wide"].fill_(4.0)


CHANGES: dict[str, Callable[[Any], object]] = {
    "last value": write_last,
    "inference mode": write_in_inference_mode,
    "SGD": step(torch.optim.SGD, "wide"),
    "AdamW": step(torch.optim.AdamW, "few", foreach=True),
    "fused AdamW": step(torch.optim.AdamW, "wide", fused=True),
    "step after a call": step_after_a_call,
    "load_state_dict": load,
    "data": assign,
    "view of data": assign_a_view,
    "write to data": lambda model: of("wide")(model).data.mul_(2.0),
    "parameter": replace,
    "parameter in the same memory": replace_in_the_same_memory,
    "moved memory": move,
    "swap_tensors": swap,
    "set_": set_memory,
    "re-added": add_again,
    "scaling": scale,
    "scaling tensor": scale_by_a_tensor,
    "scalings": lambda model: setattr(layer_of(model), "scaling", dict.fromkeys(layer_of(model).scaling, 3.0)),
    "dtype of adapters": lambda model: layer_of(model).lora_B["wide"].bfloat16(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_adapters_are_stacked_again(change: str) -> None:
    model = one_model()
    before = mixed(model)
    assert torch.equal(mixed(model), before)
    CHANGES[change](model)
    after = mixed(model)
    assert not torch.equal(after, before)
    assert torch.equal(after, fresh(model))


def add_bias(layer: Any) -> None:
    layer.lora_B["wide"].bias = nn.Parameter(torch.ones(48))


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def replace_forward(layer: Any) -> None:
    module = layer.lora_A["wide"]
    module.forward = lambda x: 2 * nn.functional.linear(x, module.weight)


FOR_THE_CODE_OF_PEFT: dict[str, Callable[[Any], object]] = {
    "hook": lambda layer: layer.lora_B["wide"].register_forward_hook(lambda *args: 2 * args[2]),
    "hook in a new dict": lambda layer: setattr(layer.lora_A["few"], "_forward_hooks", {7: lambda *args: 2 * args[2]}),
    "hook before": lambda layer: layer.lora_dropout["wide"].register_forward_pre_hook(lambda _, args: (2 * args[0],)),
    "hook on the base": lambda layer: layer.base_layer.register_forward_hook(lambda *args: 2 * args[2]),
    "forward": replace_forward,
    "bias": add_bias,
    "class": lambda layer: setattr(layer.lora_A["wide"], "__class__", Doubled),
    "dropout": lambda layer: layer.lora_dropout["few"].train(),
}


@pytest.mark.parametrize("change", FOR_THE_CODE_OF_PEFT)
def test_what_the_operator_lacks_runs_as_in_peft(change: str) -> None:
    model = one_model()
    layer = layer_of(model)
    layer.lora_dropout["few"] = nn.Dropout(0.5).eval()
    before = mixed(model)
    FOR_THE_CODE_OF_PEFT[change](layer)
    with counting_fused_calls() as calls:
        after = mixed(model)
    assert "fused" not in calls
    assert not torch.allclose(after, before, atol=1e-3)


def test_other_adapters_are_stacked_if_one_is_missing(stacked: list[int]) -> None:
    model = one_model()
    batches = [["wide", "few", *[BASE] * 3], NAMES, NAMES[::-1], ["one", *NAMES[1:]], ["few"] * 5]
    found = [mixed(model, names) for names in batches]
    assert stacked == [2, 3, 4]
    assert all(torch.equal(y, fresh(model, names)) for y, names in zip(found, batches, strict=True))


def test_switched_off_and_merged_adapters() -> None:
    model = one_model()
    before = mixed(model)
    with model.disable_adapter():
        assert torch.equal(model(X, adapter_names=NAMES), layer_of(model).base_layer(X))
    assert torch.equal(mixed(model), before)
    model.merge_adapter(["wide"])
    with pytest.raises(ValueError, match="merged adapters"):
        mixed(model)
    model.unmerge_adapter()
    assert torch.equal(mixed(model), before)


def test_hot_swapped_adapters(tmp_path: Path) -> None:
    """Also if only the last values differ: PEFT writes to the data of parameters."""
    model = one_model()
    other = copy.deepcopy(model)
    write_in_inference_mode(other)
    other.save_pretrained(tmp_path, selected_adapters=["few"])
    mixed(model)
    hotswap_adapter(model, tmp_path / "few", adapter_name="few")
    assert torch.equal(mixed(model), mixed(other))


def test_other_dtypes_of_the_layer_and_autocast() -> None:
    model = one_model()
    before = mixed(model)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = mixed(model)
        assert narrow.dtype == torch.bfloat16
        assert torch.equal(narrow, fresh(model))
    assert torch.equal(mixed(model), before)
    model.bfloat16()
    assert torch.equal(mixed(model), fresh(model))


def test_functional_calls_use_their_own_parameters() -> None:
    model = one_model()
    before = mixed(model)
    key = next(key for key, _ in model.named_parameters() if "lora_B.wide" in key)
    for other in (torch.zeros(48, 17), nn.Parameter(torch.ones(48, 17))):
        with torch.no_grad():
            called = torch.func.functional_call(model, {key: other}, (X,), {"adapter_names": NAMES})
        rows = [torch.equal(a, b) for a, b in zip(called, before, strict=True)]
        assert rows == [name != "wide" for name in NAMES]
    assert torch.equal(mixed(model), before)
    wide = one_model()
    with torch.no_grad():
        of("wide")(wide).fill_(1.0)
    assert torch.equal(called, mixed(wide))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_stacks_of_their_own(copied: Callable[[Any], Any]) -> None:
    model = one_model()
    before = mixed(model)
    other = copied(layer_of(model))
    assert other._retained is None
    with torch.no_grad():
        other.lora_B["wide"].weight.mul_(2)
        assert not torch.equal(other(X, adapter_names=NAMES), before)
    assert torch.equal(mixed(model), before)


def test_inference_tensors_are_stacked_in_each_call(stacked: list[int]) -> None:
    """They have no versions."""
    with torch.inference_mode():
        model = one_model()
    before = mixed(model)
    with torch.inference_mode():
        of("wide")(model)[-1, -1] += 1
    assert not torch.equal(mixed(model), before)
    assert layer_of(model)._retained is None
    assert stacked == [3, 3]


def test_gradients_reach_the_adapters_after_calls_without() -> None:
    model = one_model()
    with torch.inference_mode():
        before = model(X, adapter_names=NAMES)
    of("wide")(model).requires_grad_()
    x = X.clone().requires_grad_()
    y = model(x, adapter_names=NAMES)
    assert torch.equal(y, before)
    y.sum().backward()
    assert x.grad is not None
    assert of("wide")(model).grad is not None
    assert layer_of(model)._retained is None


@pytest.mark.parametrize("end", ["training", "deletion", "of the model"])
def test_stacks_are_freed(end: str) -> None:
    model = one_model()
    mixed(model)
    memory = weakref.ref(layer_of(model)._retained)
    with torch.no_grad():
        model(X)
    assert memory() is not None
    if end == "training":
        model(X)
    elif end == "deletion":
        model.delete_adapter("one")
    else:
        del model
        gc.collect()
    assert memory() is None


def test_stacks_of_experts(stacked: list[int]) -> None:
    model = mixture()
    before = of_samples(model, NAMES)
    calls = len(stacked)
    assert torch.equal(of_samples(model, NAMES), before)
    assert calls == len(stacked) > 0
    for name, parameter in model.named_parameters():
        if "experts" in name and "lora_B.wide" in name:
            with torch.no_grad():
                parameter[-1, -1].add_(1)
    after = of_samples(model, NAMES)
    for module in model.modules():
        if isinstance(module, stacks.StacksAdapters):
            module.forget_stack()
    assert not torch.equal(after, before)
    assert torch.equal(after, of_samples(model, NAMES))


def test_fake_tensors_leave_no_stack() -> None:
    model = one_model()
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert mixed(model).shape == (5, 48)
    assert layer_of(model)._retained is None
    before = mixed(model)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert mixed(model).shape == (5, 48)
    assert torch.equal(mixed(model), before)
