"""torch.compile and torch.export of models: transformers' blocks with PEFT's adapters on 4-bit layers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

import qlora_ext
import tiny_models
from graphs import CountingBackend, largest_error

# Batch and length. torch specializes on size 1 and compiles it separately.
SHAPES = [(2, 5), (3, 7), (4, 6), (2, 12), (5, 9)]


@pytest.fixture(autouse=True)
def _options() -> Iterator[None]:
    """No graphs of other tests; and activation checkpointing of blocks that set a global variable during the forward.

    Every block of transformers since 5.25 does, by the decorator ``use_kernelized_func`` of kernels 0.19.
    """
    torch.compiler.reset()
    with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True):
        yield


def adapted(layers: int = 1, **lora: Any) -> Any:
    """A tiny Llama in 4 bits with LoRA on all layers, in training mode, with dropout and nonzero B."""
    config = tiny_models.CONFIGS["llama"]()
    config.num_hidden_layers = layers
    model = qlora_ext.quantize_model(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "lora_dropout": 0.1, **lora}
    model = get_peft_model(model, LoraConfig(**options)).train()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.05)
    return model


class Block:
    """One step of a decoder layer under activation checkpointing: y and every gradient."""

    def __init__(self) -> None:
        model = adapted().base_model.model.model
        self.layer, self.rotary = model.layers[0], model.rotary_emb
        self.trained = [p for p in self.layer.parameters() if p.requires_grad]

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return checkpoint(self.layer, x, position_embeddings=(cos, sin), use_reentrant=False)

    def step(self, forward: Any, x: Tensor) -> list[Tensor]:
        cos, sin = self.rotary(x, torch.arange(x.shape[1])[None].expand(x.shape[0], -1))
        x = x.clone().requires_grad_()
        torch.manual_seed(3)
        y = forward(x, cos, sin)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *self.trained])]


def test_a_checkpointed_block_compiles_twice_for_any_shape() -> None:
    block, backend = Block(), CountingBackend()
    compiled = torch.compile(block.forward, fullgraph=True, backend=backend)
    for batch, length in SHAPES:
        x = torch.randn(batch, length, 64)
        assert largest_error(block.step(compiled, x), block.step(block.forward, x)) < 1e-6
    assert (backend.forward, backend.backward) == (2, 2)  # one graph for the first shape, one for all others


def test_a_compiled_block_has_the_dropout_of_eager() -> None:
    """Without dropout the block computes a different result, so the comparisons above cover dropout."""
    block = Block()
    x = torch.randn(2, 5, 64)
    dropped = block.step(block.forward, x)
    block.layer.eval()
    assert largest_error(block.step(block.forward, x), dropped) > 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_block_under_autocast(dtype: torch.dtype) -> None:
    block = Block()

    def forward(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=dtype):
            return block.forward(x, cos, sin)

    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 5, 64)
    assert largest_error(block.step(compiled, x), block.step(forward, x)) < 1e-6


@torch._inductor.config.patch(fallback_random=True)  # eager's random numbers: the same dropout
def test_inductor_compiles_the_block_as_one_graph() -> None:
    block = Block()
    compiled = torch.compile(block.forward, fullgraph=True)
    x = torch.randn(2, 5, 64)
    assert largest_error(block.step(compiled, x), block.step(block.forward, x)) < 1e-5


def test_the_layers_of_a_model_share_their_graphs() -> None:
    """With regional compilation, all layers share one compilation."""
    model, backend = adapted(layers=10), CountingBackend()
    ids = tiny_models.token_ids(2, 5)
    expected = language_step(model, model, ids)
    for layer in model.base_model.model.model.layers:
        layer.compile(fullgraph=True, backend=backend)
    assert largest_error(language_step(model, model, ids), expected) < 1e-6
    assert backend.forward <= 2
    assert backend.backward <= 2


def language_step(model: Any, forward: Any, ids: Tensor) -> list[Tensor]:
    """The loss and all gradients of one training step."""
    torch.manual_seed(3)
    loss = forward(input_ids=ids, labels=ids, use_cache=False).loss
    return [loss.detach(), *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])]


def test_a_checkpointed_language_model_compiles_twice_for_any_shape() -> None:
    model, backend = adapted(), CountingBackend()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # A hook that calls requires_grad_() on the embedding's output, for reentrant checkpointing: torch cannot trace it.
    model.base_model.model.disable_input_require_grads()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for batch, length in SHAPES:
        ids = tiny_models.token_ids(batch, length)
        assert largest_error(language_step(model, compiled, ids), language_step(model, model, ids)) < 1e-6
    assert (backend.forward, backend.backward) == (2, 2)


def test_generation_with_a_static_cache_gives_the_same_tokens() -> None:
    model = qlora_ext.quantize_model(tiny_models.make("llama", torch.float32))
    ids = tiny_models.token_ids(2, 6)
    expected = model.generate(ids, max_new_tokens=8, do_sample=False)
    model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    tokens = model.generate(ids, max_new_tokens=8, do_sample=False, cache_implementation="static")
    assert torch.equal(tokens, expected)


def test_several_adapters_and_none_compile_in_one_graph() -> None:
    model = adapted(lora_dropout=0.0)
    model.add_adapter("second", LoraConfig(r=2, target_modules="all-linear"))
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 64)
    for adapters in (["default"], ["second"], ["default", "second"]):
        model.base_model.set_adapter(adapters)
        assert torch.equal(compiled(x), layer(x))
    with model.disable_adapter():
        assert torch.equal(compiled(x), layer(x))


def test_dora_breaks_the_graph_and_stays_right() -> None:
    layer = adapted(lora_dropout=0.0, use_dora=True).base_model.model.model.layers[0].mlp.up_proj
    x = torch.randn(2, 3, 64)
    assert largest_error([torch.compile(layer, backend="aot_eager")(x)], [layer(x)]) < 1e-6


class Logits(nn.Module):
    """Maps token ids to logits, without the output classes of its library."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False).logits


def exported_model(model: Logits, strict: bool) -> torch.export.ExportedProgram:
    """Any batch size and, if strict, any length: without strict, torch 2.11 cannot export a Llama so, 4-bit or not."""
    sizes = {0: torch.export.Dim("batch"), **({1: torch.export.Dim("length", max=64)} if strict else {})}
    return torch.export.export(model, (tiny_models.token_ids(2, 6),), dynamic_shapes=(sizes,), strict=strict)


@pytest.mark.parametrize("strict", [True, False])
def test_a_language_model_with_adapters_exports(strict: bool, tmp_path) -> None:
    model = Logits(adapted()).eval()
    torch.export.save(exported_model(model, strict), tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for shape in [(3, 6), (5, 6), *(SHAPES if strict else [])]:
        ids = tiny_models.token_ids(*shape)
        assert torch.equal(loaded(ids), model(ids))


RUN_PACKAGE = """
import sys, torch
torch.ops.load_library(sys.argv[1])
model = torch._inductor.aoti_load_package(sys.argv[2])
results = [model(ids) for ids in torch.load(sys.argv[3])]
assert "qlora_ext" not in sys.modules
torch.save(results, sys.argv[3])
"""


def test_a_language_model_becomes_an_aotinductor_package(tmp_path) -> None:
    """The package gives the same logits in a process with torch and libqlora_cpu.so, but without qlora_ext's Python."""
    model = Logits(adapted()).eval()
    with torch.no_grad():
        package = torch._inductor.aoti_compile_and_package(
            exported_model(model, strict=True),
            package_path=str(tmp_path / "model.pt2"),
            inductor_configs={"aot_inductor.compile_wrapper_opt_level": "O0"},  # its speed is irrelevant here
        )
        samples = [tiny_models.token_ids(*shape) for shape in SHAPES]
        expected = [model(ids) for ids in samples]
        here = torch._inductor.aoti_load_package(package)
        assert largest_error([here(ids) for ids in samples], expected) < 1e-5
    library = next(path for path in torch.ops.loaded_libraries if path.endswith("libqlora_cpu.so"))
    data = tmp_path / "data.pt"
    torch.save(samples, data)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", RUN_PACKAGE, library, package, str(data)], check=True, env=environment)
    assert largest_error(torch.load(data), expected) < 1e-5
