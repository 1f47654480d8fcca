"""``QLoRAConfig`` in diffusers: models and pipelines quantized as they load, saved, reloaded, and trained by LoRA."""

from __future__ import annotations

import copy
import json
import pathlib
import re
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny, DiTTransformer2DModel, FluxTransformer2DModel
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file, save_file

import qlora_ext
from qlora_ext import QLoRAConfig
from qlora_ext.integrations.diffusers.quantizer import DiffusersQLoRAQuantizer
from qlora_ext.integrations.peft import LoraLinear4bit
from qlora_ext.nn import Embedding4bit, Linear4bit
from qlora_ext.streaming.streaming import streaming_of
from tiny_diffusers import KINDS, inputs, make, output
from tiny_models import same_state

LAYERS = {
    "flux": 30,
    "sd3": 32,
    "unet": 50,
    "wan": 24,
}  # every nn.Linear except modules that the model keeps in float32
FORMS = {"float32": (torch.float32, True), "bfloat16": (torch.bfloat16, False), "float16": (torch.float16, True)}
WEIGHTS = "diffusion_pytorch_model.safetensors"
LAYER = "transformer_blocks.0.attn.to_q"  # of Flux


def layers(model: Any) -> dict[str, Linear4bit]:
    return {name: m for name, m in model.named_modules() if isinstance(m, Linear4bit)}


def save_dense(directory: pathlib.Path, kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """Saves a dense model, and returns it."""
    model = make(kind, dtype)
    model.save_pretrained(directory)
    return model


@pytest.mark.usefixtures("native_bfloat16")
@pytest.mark.parametrize(("dtype", "double_quant"), FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_quantized_while_it_loads_and_reloads_to_the_bit(
    kind: str, dtype: torch.dtype, double_quant: bool, tmp_path: pathlib.Path
) -> None:
    dense = save_dense(tmp_path / "dense", kind, dtype)
    config = QLoRAConfig(double_quant=double_quant)
    model = type(dense).from_pretrained(tmp_path / "dense", torch_dtype=dtype, quantization_config=config)
    assert len(layers(model)) == LAYERS[kind]
    assert config.skip_modules is None  # the caller's configuration is not changed
    assert model.dtype == dtype
    assert model.num_parameters() == dense.num_parameters()
    for name, layer in layers(model).items():
        w4 = qlora_ext.quantize_nf4(dense.get_submodule(name).weight, double_quant=double_quant)
        assert torch.equal(layer.weight.packed, w4.packed)
        assert not layer.weight.requires_grad
    y = output(model, kind, dtype)
    expected = output(copy.deepcopy(model).dequantize(), kind, dtype)
    assert (y - expected).norm() / expected.norm() < {torch.float32: 1e-5}.get(dtype, 0.02)

    plain = type(dense).from_pretrained(tmp_path / "dense", torch_dtype=dtype)
    quantized = qlora_ext.quantize_model(plain, double_quant=double_quant)
    assert same_state(quantized, model)
    for how, m in (("loaded", model), ("quantized", quantized)):
        m.save_pretrained(tmp_path / how)
        saved = json.loads((tmp_path / how / "config.json").read_text())["quantization_config"]
        assert saved["quant_method"] == "qlora_ext"
        assert saved["needs"] == "import qlora_ext"
        again = type(dense).from_pretrained(tmp_path / how, torch_dtype=dtype)
        assert same_state(model, again)
        assert torch.equal(output(again, kind, dtype), y)


def test_dense_weights_are_freed_one_by_one(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_dense(tmp_path, "flux")
    read: list[weakref.ref[torch.Tensor]] = []
    quantize = DiffusersQLoRAQuantizer._quantize

    def watched(self: Any, module: Any, name: str, weight: torch.Tensor) -> None:
        assert sum(ref() is not None for ref in read) <= 1  # the tensor that diffusers' loop still references
        read.append(weakref.ref(weight))
        quantize(self, module, name, weight)

    monkeypatch.setattr(DiffusersQLoRAQuantizer, "_quantize", watched)
    FluxTransformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16, quantization_config=QLoRAConfig())
    assert len(read) == LAYERS["flux"]


def test_a_model_of_which_a_part_was_quantized_is_saved_with_a_configuration(tmp_path: pathlib.Path) -> None:
    model = make("flux")
    qlora_ext.quantize_model(model.transformer_blocks)
    model.save_pretrained(tmp_path)
    again = FluxTransformer2DModel.from_pretrained(tmp_path)
    assert layers(again).keys() == layers(model).keys()
    assert same_state(model, again)


def test_a_model_is_saved_as_it_is_now(tmp_path: pathlib.Path) -> None:
    model = qlora_ext.quantize_model(make("flux"))
    model.set_submodule(LAYER, layers(model)[LAYER].to_linear())  # a layer that is dense after dequantizing
    clone = copy.deepcopy(model)
    packed = clone.x_embedder.weight.packed
    packed.copy_(~packed)
    clone.save_pretrained(tmp_path / "clone")
    again = FluxTransformer2DModel.from_pretrained(tmp_path / "clone")
    assert len(layers(again)) == LAYERS["flux"] - 1
    assert same_state(clone, again)
    assert not same_state(model, again)
    for name, layer in layers(model).items():
        model.set_submodule(name, layer.to_linear())
    model.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    assert same_state(model, FluxTransformer2DModel.from_pretrained(tmp_path / "dense"))


def test_modules_kept_in_float32_stay_dense(tmp_path: pathlib.Path) -> None:
    dense = save_dense(tmp_path, "wan", torch.bfloat16)
    for model in (
        type(dense).from_pretrained(tmp_path, torch_dtype=torch.bfloat16, quantization_config=QLoRAConfig()),
        qlora_ext.quantize_model(type(dense).from_pretrained(tmp_path, torch_dtype=torch.bfloat16)),
    ):
        embedder = model.condition_embedder.time_embedder
        assert {type(m) for m in embedder.children()} == {torch.nn.Linear, torch.nn.SiLU}
        assert {p.dtype for p in embedder.parameters()} == {torch.float32}
        assert torch.isfinite(output(model, "wan", torch.bfloat16)).all()


def test_code_that_reads_the_dtype_of_a_weight_gets_that_of_the_decoded_values() -> None:
    from diffusers.models.embeddings import ImageProjection

    model = qlora_ext.quantize_model(torch.nn.Sequential(ImageProjection(64, 64, 2)))
    assert type(model[0].image_embeds) is Linear4bit
    x = torch.randn(2, 64)
    y = model(x)
    model[0].image_embeds = model[0].image_embeds.to_linear()
    torch.testing.assert_close(y, model(x), rtol=1e-5, atol=1e-5)


SKIPS: dict[str, tuple[QLoRAConfig, int]] = {
    "the last part of a name": (QLoRAConfig(skip_modules=["to_q"]), 28),
    "a name at two depths": (QLoRAConfig(skip_modules=["proj_out"]), 28),
    "a regular expression": (QLoRAConfig(skip_modules=["^proj_out$"]), 29),
    "a whole stack": (QLoRAConfig(skip_modules=["single_transformer_blocks"]), 24),
    "other blocks": (QLoRAConfig(block_size=128, nested_block_size=64), 30),
    "a compute dtype": (QLoRAConfig(compute_dtype="bfloat16"), 30),
    "int8 activations": (QLoRAConfig(activations="int8"), 30),
}


@pytest.mark.parametrize(("config", "count"), SKIPS.values(), ids=SKIPS)
def test_arguments_of_the_configuration_hold_after_a_reload(
    config: QLoRAConfig, count: int, tmp_path: pathlib.Path
) -> None:
    save_dense(tmp_path / "dense", "flux")
    model = FluxTransformer2DModel.from_pretrained(tmp_path / "dense", quantization_config=config)
    assert len(layers(model)) == count
    model.save_pretrained(tmp_path / "4bit")
    again = FluxTransformer2DModel.from_pretrained(tmp_path / "4bit")
    for name, layer in layers(again).items():
        assert (layer.block_size, layer.activations) == (config.block_size, config.activations)
        assert layer.form == layers(model)[name].form
    assert torch.equal(output(model, "flux"), output(again, "flux"))
    assert model.dtype == torch.float32


def test_embeddings_are_quantized_where_asked(tmp_path: pathlib.Path) -> None:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 4, "num_layers": 1, "sample_size": 8}
    DiTTransformer2DModel(**sizes, out_channels=8, num_embeds_ada_norm=10).save_pretrained(tmp_path / "dense")
    model = DiTTransformer2DModel.from_pretrained(tmp_path / "dense", quantization_config=QLoRAConfig(embeddings=True))
    model.save_pretrained(tmp_path / "4bit")
    again = DiTTransformer2DModel.from_pretrained(tmp_path / "4bit")
    assert sum(isinstance(m, Embedding4bit) for m in again.modules()) == 1
    assert same_state(model, again)


@pytest.mark.usefixtures("native_bfloat16")
def test_shards_are_read_and_written(tmp_path: pathlib.Path) -> None:
    make("wan", torch.bfloat16).save_pretrained(tmp_path / "dense", max_shard_size="30KB")
    kind = type(make("wan"))
    model = kind.from_pretrained(tmp_path / "dense", torch_dtype=torch.bfloat16, quantization_config=QLoRAConfig())
    model.save_pretrained(tmp_path / "4bit", max_shard_size="10KB")
    assert len(list((tmp_path / "4bit").glob("*.safetensors"))) > 3
    assert same_state(model, kind.from_pretrained(tmp_path / "4bit", torch_dtype=torch.bfloat16))


def test_a_single_file_is_quantized_while_it_loads(tmp_path: pathlib.Path) -> None:
    dense = save_dense(tmp_path / "transformer", "sd3")
    model = type(dense).from_single_file(
        str(tmp_path / "transformer" / WEIGHTS),
        config=str(tmp_path),
        subfolder="transformer",
        quantization_config=QLoRAConfig(),
    )
    assert same_state(model, qlora_ext.quantize_model(dense))


def test_a_model_is_dense_again_after_dequantize(tmp_path: pathlib.Path) -> None:
    save_dense(tmp_path / "dense", "sd3")
    model = type(make("sd3")).from_pretrained(tmp_path / "dense", quantization_config=QLoRAConfig())
    y = output(model, "sd3")
    dense = model.dequantize()
    assert not layers(dense)
    assert not dense.is_quantized
    torch.testing.assert_close(output(dense, "sd3"), y, rtol=1e-5, atol=1e-5)
    dense.save_pretrained(tmp_path / "again")
    assert same_state(dense, type(dense).from_pretrained(tmp_path / "again"))


@pytest.mark.parametrize("is_loaded", [False, True])
def test_a_cast_changes_the_compute_dtype_and_no_packed_bit(is_loaded: bool, tmp_path: pathlib.Path) -> None:
    model = qlora_ext.quantize_model(make("unet"))
    if is_loaded:
        model.save_pretrained(tmp_path)
        model = type(model).from_pretrained(tmp_path)
    before = {name: layer.packed_state() for name, layer in copy.deepcopy(layers(model)).items()}
    memory = {name: layer.weight.data_ptr() for name, layer in layers(model).items()}
    for cast in (lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.float()):
        cast(model)
        for name, layer in layers(model).items():
            assert layer.compute_dtype == model.dtype
            assert all(torch.equal(t, before[name][key]) for key, t in layer.packed_state().items())
            assert layer.weight.data_ptr() == memory[name]
        assert torch.isfinite(output(model, "unet", model.dtype)).all()


def test_a_model_with_float32_scales_and_adapters_returns_its_own_dtype(tmp_path: pathlib.Path) -> None:
    save_dense(tmp_path, "flux", torch.bfloat16)
    model = FluxTransformer2DModel.from_pretrained(
        tmp_path,
        torch_dtype=torch.bfloat16,
        quantization_config=QLoRAConfig(double_quant=False, compute_dtype="float32"),
    )
    model.save_pretrained(tmp_path / "4bit")
    for m in (model, FluxTransformer2DModel.from_pretrained(tmp_path / "4bit", torch_dtype=torch.bfloat16)):
        assert layers(m)[LAYER].compute_dtype == torch.float32
        assert m.dtype == torch.bfloat16
        m.add_adapter(LoraConfig(r=4, target_modules="all-linear"))
        assert {p.dtype for p in m.parameters() if p.requires_grad} == {torch.float32}
        assert m.dtype == torch.bfloat16


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
def test_a_device_map_of_one_device(device_map: Any, tmp_path: pathlib.Path) -> None:
    dense = save_dense(tmp_path, "flux")
    model = FluxTransformer2DModel.from_pretrained(tmp_path, quantization_config=QLoRAConfig(), device_map=device_map)
    assert same_state(model, qlora_ext.quantize_model(dense))


def test_streaming_from_disk_computes_the_same(tmp_path: pathlib.Path) -> None:
    model = qlora_ext.quantize_model(make("flux"))
    model.save_pretrained(tmp_path)
    streamed = FluxTransformer2DModel.from_pretrained(tmp_path, quantization_config=QLoRAConfig(stream="disk"))
    assert streaming_of(streamed) is not None
    assert torch.equal(output(streamed, "flux"), output(model, "flux"))


@pytest.mark.parametrize("kind", KINDS)
def test_fused_projections_are_dense_with_the_decoded_weights(kind: str) -> None:
    model = qlora_ext.quantize_model(make(kind))
    dense = copy.deepcopy(model).dequantize()
    for m in (model, dense):
        m.fuse_qkv_projections()
    fused = {name: m for name, m in dense.named_modules() if name.endswith(("to_qkv", "to_kv", "to_added_qkv"))}
    assert fused
    for name, expected in fused.items():
        found = model.get_submodule(name)
        assert type(found) is torch.nn.Linear
        assert torch.equal(found.weight, expected.weight)
    torch.testing.assert_close(output(model, kind), output(dense, kind), rtol=1e-5, atol=1e-5)


def test_group_offloading_computes_the_same() -> None:
    try:
        make("sd3").enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    except AttributeError:
        pytest.skip("this diffusers offloads groups of layers to an accelerator only")
    model = qlora_ext.quantize_model(make("sd3"))
    y = output(model, "sd3")
    model.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    assert torch.equal(output(model, "sd3"), y)


@pytest.mark.slow
def test_a_compiled_model_computes_the_same() -> None:
    model = qlora_ext.quantize_model(make("sd3"))
    y = output(model, "sd3")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(output(compiled, "sd3"), y, rtol=1e-5, atol=1e-5)


Break = Callable[[dict[str, torch.Tensor]], object]
BROKEN: dict[str, tuple[str, Break, str]] = {
    "NaN in a dense weight": (
        "dense",
        lambda state: state[f"{LAYER}.weight"].__setitem__((3, 4), float("nan")),
        rf"{LAYER}\.weight: expected finite values, got nan at index \[3, 4\]",
    ),
    "no dense weight": (
        "dense",
        lambda state: state.pop(f"{LAYER}.weight"),
        rf"{LAYER}\.weight: the checkpoint does not",
    ),
    "no packed weight": (
        "4bit",
        lambda state: state.pop(f"{LAYER}.weight"),
        rf"{LAYER}\.weight: the checkpoint does not",
    ),
    "no scales": (
        "4bit",
        lambda state: state.pop(f"{LAYER}.nested_absmax"),
        rf"{LAYER}\.nested_absmax: the checkpoint does not",
    ),
    "half of a packed weight": (
        "4bit",
        lambda state: state.update({f"{LAYER}.weight": state[f"{LAYER}.weight"][:32].clone()}),
        rf"{LAYER}\.weight: expected torch.uint8 \[64, 32\]",
    ),
    "scales of another kind": (
        "4bit",
        lambda state: state.update({f"{LAYER}.absmax": state[f"{LAYER}.absmax"].float()}),
        rf"{LAYER}\.absmax: expected torch.uint8",
    ),
}


@pytest.mark.parametrize(("kind", "damage", "message"), BROKEN.values(), ids=BROKEN)
def test_incomplete_checkpoints_are_rejected(kind: str, damage: Break, message: str, tmp_path: pathlib.Path) -> None:
    dense = save_dense(tmp_path / "dense", "flux")
    if kind == "4bit":
        qlora_ext.quantize_model(dense).save_pretrained(tmp_path / "4bit")
    state = load_file(tmp_path / kind / WEIGHTS)
    damage(state)
    save_file(state, tmp_path / kind / WEIGHTS, {"format": "pt"})
    config = QLoRAConfig() if kind == "dense" else None
    with pytest.raises(ValueError, match=message):
        FluxTransformer2DModel.from_pretrained(tmp_path / kind, quantization_config=config)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "float8": ({"torch_dtype": torch.float8_e4m3fn}, "dtype: expected float32, bfloat16 or float16"),
    "float64": ({"torch_dtype": torch.float64}, "dtype: expected float32, bfloat16 or float16"),
    "disk": ({"device_map": {"": "disk"}, "offload_folder": "x"}, "device_map: expected no layers on disk"),
    "streaming a dense file": (
        {"quantization_config": QLoRAConfig(stream="disk")},
        "stream: 'disk' needs a 4-bit model",
    ),
    "streaming to two": (
        {"quantization_config": QLoRAConfig(stream="ram"), "device_map": {"x_embedder": 0, "": "cpu"}},
        "device_map: expected one device for a streamed model",
    ),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_unsupported_options_have_clear_errors(options: dict[str, Any], message: str, tmp_path: pathlib.Path) -> None:
    save_dense(tmp_path, "flux")
    with pytest.raises(ValueError, match=message):
        FluxTransformer2DModel.from_pretrained(tmp_path, **{"quantization_config": QLoRAConfig(), **options})


def test_a_model_without_linear_layers_stays_dense_with_a_warning(tmp_path: pathlib.Path) -> None:
    widths = (16, 16, 16, 16)
    AutoencoderTiny(encoder_block_out_channels=widths, decoder_block_out_channels=widths).save_pretrained(
        tmp_path / "a"
    )
    with pytest.warns(UserWarning, match="AutoencoderTiny stays dense"):
        model = AutoencoderTiny.from_pretrained(tmp_path / "a", quantization_config=QLoRAConfig())
    model.save_pretrained(tmp_path / "b")
    assert same_state(model, AutoencoderTiny.from_pretrained(tmp_path / "b"))


@pytest.mark.parametrize("kind", KINDS)
def test_lora_trains_through_add_adapter_and_through_peft(kind: str, tmp_path: pathlib.Path) -> None:
    dense = save_dense(tmp_path / "dense", kind)

    def load() -> Any:
        return type(dense).from_pretrained(tmp_path / "dense", quantization_config=QLoRAConfig())

    config = LoraConfig(r=4, target_modules=["to_q", "to_v"])
    for library in ("diffusers", "peft"):
        model = load()
        reference = copy.deepcopy(model).dequantize()
        losses: dict[str, list[float]] = {}
        for name, m in (("4bit", model), ("dense", reference)):
            torch.manual_seed(0)
            m.requires_grad_(False)
            if library == "diffusers":
                m.add_adapter(config)
                m.enable_gradient_checkpointing()
            else:
                m = get_peft_model(m, config)
            m.train()
            parameters = [p for p in m.parameters() if p.requires_grad]
            optimizer = torch.optim.SGD(parameters, lr=0.05)
            losses[name] = []
            for _ in range(3):
                loss = m(**inputs(kind))[0].square().mean()
                loss.backward()
                assert all(p.grad is not None for p in parameters)
                optimizer.step()
                optimizer.zero_grad()
                losses[name].append(loss.item())
        assert any(isinstance(m, LoraLinear4bit) for m in model.modules())
        assert losses["4bit"][-1] < losses["4bit"][0]
        assert losses["4bit"] == pytest.approx(losses["dense"], rel=1e-4)
        if library == "peft":
            adapted = get_peft_model(load(), config)
            adapted.save_pretrained(tmp_path / "adapter")
            again = PeftModel.from_pretrained(load(), tmp_path / "adapter")
            assert torch.equal(output(again, kind), output(adapted.eval(), kind))
            merged = adapted.merge_and_unload()
            assert not layers(merged)
            merged.save_pretrained(tmp_path / "merged")
            assert same_state(merged, type(dense).from_pretrained(tmp_path / "merged"))


def test_prepare_model_for_kbit_training_turns_checkpointing_on() -> None:
    model = prepare_model_for_kbit_training(qlora_ext.quantize_model(make("flux")))
    assert model.is_gradient_checkpointing
    assert not any(p.requires_grad for p in model.parameters())


def test_a_model_with_an_adapter_is_not_saved_under_names_that_cannot_be_loaded(tmp_path: pathlib.Path) -> None:
    model = qlora_ext.quantize_model(make("flux"))
    model.add_adapter(LoraConfig(r=4, target_modules=["to_q"]))
    with pytest.raises(ValueError, match="expected a 4-bit model without adapters"):
        model.save_pretrained(tmp_path / "4bit")
    assert not (tmp_path / "4bit").exists()
    model.save_lora_adapter(tmp_path / "adapter")
    model.unload_lora()
    model.save_pretrained(tmp_path / "4bit")
    assert same_state(model, FluxTransformer2DModel.from_pretrained(tmp_path / "4bit"))


def test_a_checkpoint_of_a_newer_format_is_refused(tmp_path: pathlib.Path) -> None:
    qlora_ext.quantize_model(make("flux")).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["format_version"] = 99
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="this checkpoint needs a newer version of qlora_ext"):
        FluxTransformer2DModel.from_pretrained(tmp_path)


DOCUMENT = pathlib.Path(__file__).parents[2] / "docs" / "diffusers.md"


def test_the_example_of_the_documentation_runs(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_dense(tmp_path / "model" / "transformer", "flux", torch.bfloat16)
    blocks = re.findall(r"```py\n(.*?)```", DOCUMENT.read_text(), flags=re.S)
    code = "".join(block for block in blocks if "FluxTransformer2DModel" in block or "transformer." in block)
    assert code.count("black-forest-labs/FLUX.1-dev") == 1
    monkeypatch.chdir(tmp_path)
    batch = inputs("flux", torch.bfloat16)
    del batch["return_dict"]
    names = {"batches": [(batch, torch.zeros(1, 16, 64, dtype=torch.bfloat16))]}
    exec(code.replace("black-forest-labs/FLUX.1-dev", str(tmp_path / "model")), names)
    again: Any = names["again"]
    assert len(layers(again)) == LAYERS["flux"]
    assert (tmp_path / "lora" / "pytorch_lora_weights.safetensors").is_file()
