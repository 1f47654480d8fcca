"""Checks of LoRA adapters and their bases that several targets share. They read no weights."""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING, Any

from qlora_ext.gguf.file import ARCHITECTURES, read_header

from ..errors import UserError, reading
from ..models import validate_model
from ..models.adapter_files import check_files, config_of
from ..models.sources import ModelSource

if TYPE_CHECKING:
    from peft.tuners.lora.layer import LoraLayer

# Of the names in an adapter's file.
PREFIX = "base_model.model."
# Settings of PEFT with which an adapter is more than B · A, and what they are called.
_MORE = {
    "use_dora": "DoRA",
    "modules_to_save": "modules saved in full (modules_to_save)",
    "trainable_token_indices": "trained tokens (trainable_token_indices)",
    "lora_bias": "biases (lora_bias)",
    "layer_replication": "replicated layers (layer_replication)",
    "use_qalora": "QA-LoRA",
    "kasa_config": "KaSA",
    "use_bdlora": "BD-LoRA",
    "monteclora_config": "MonteCLoRA",
}
# Those that no merged model has either.
_CONDITIONAL = {"alora_invocation_tokens": "activated LoRA", "arrow_config": "Arrow"}


def check_plain(target: str, adapter: pathlib.Path) -> None:
    """Rejects an adapter that is not plain LoRA.

    Raises:
        UserError: it is of another kind, which the message names.
    """
    config = config_of(adapter)
    kind = config.get("peft_type")
    found = [words for name, words in _MORE.items() if config.get(name)]
    if kind != "LORA" or found:
        has = found[0] if found else kind
        raise UserError(f"{target}: the adapter {adapter} has {has}, which that target cannot hold; use --to dense")
    check_mergeable(target, adapter)


def check_mergeable(target: str, adapter: pathlib.Path) -> None:
    """Rejects an adapter that cannot be merged into the weights of its base.

    Raises:
        UserError: it repeats layers, or depends on the input.
    """
    config = config_of(adapter)
    if config.get("layer_replication"):
        raise UserError(f"{target}: the adapter {adapter} has {_MORE['layer_replication']}; use --to dense")
    conditional = [words for name, words in _CONDITIONAL.items() if config.get(name)]
    if conditional:
        raise UserError(f"{target}: the adapter {adapter} is {conditional[0]}, which only PEFT runs")


def check_biases(target: str, adapter: pathlib.Path, model: Any) -> None:
    """Rejects an adapter with biases on layers that have none, because no merged model can hold them.

    Args:
        model: the dense base; it may be on the meta device.

    Raises:
        UserError: there is such a layer.
    """
    state = model.state_dict()
    for name in check_files(adapter):
        layer = name.removeprefix(PREFIX).removesuffix(".lora_B.bias")
        if layer != name.removeprefix(PREFIX) and f"{layer}.weight" in state and f"{layer}.bias" not in state:
            raise UserError(
                f"{target}: the adapter {adapter} has a bias (lora_bias) on {layer}, which has none in the model, so "
                "it cannot be merged; load it with PEFT instead, or train without lora_bias"
            )


def architecture_of(target: str, source: ModelSource, config: Any) -> str:
    """llama.cpp's name of the architecture.

    Raises:
        UserError: it is not one of those for which files are written.
    """
    if source.gguf_file is not None:
        found = read_header(pathlib.Path(source.path) / source.gguf_file).architecture
        if found in ARCHITECTURES.values():
            return found
    else:
        found = config.model_type
        if found in ARCHITECTURES:
            return ARCHITECTURES[found]
    raise UserError(
        f"{target}: {source.name} is a {found} model, expected one of {', '.join(ARCHITECTURES)}; use --to dense, and "
        "the converter of llama.cpp"
    )


def adapted_layers(target: str, adapter: pathlib.Path, quantized: Any) -> dict[str, tuple[str, LoraLayer]]:
    """The layers of an adapter, and their names in its file, by the names of the weights of the model.

    They have no memory for their weights. PEFT makes them, because only PEFT knows their ranks and scalings, and which
    of the weights of experts have which of the nested adapters in the file.

    Args:
        quantized: the 4-bit model on the meta device, which gets the adapter.

    Raises:
        UserError: the adapter has other weights than A and B of linear layers and experts, or does not fit its base.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora.layer import LoraLayer

    from qlora_ext.integrations.peft.experts import LoraExperts4bit

    stored = validate_model.shapes(adapter / "adapter_model.safetensors")
    with reading("configuration", str(adapter)):
        config = LoraConfig.from_pretrained(str(adapter))
        config.inference_mode, config.init_lora_weights = True, False
        inject_adapter_in_model(config, quantized, low_cpu_mem_usage=True)
    found: dict[str, tuple[str, LoraLayer]] = {}
    fits, modules = f"the adapter {adapter} does not fit its base", dict(quantized.named_modules())
    for name, layer in modules.items():
        parameter = getattr(layer, "parameter_name", "weight")
        if not isinstance(layer, LoraLayer) or "default" not in layer.lora_A:
            continue
        if parameter != "weight" and not isinstance(layer, LoraExperts4bit):
            continue
        for side, matrices in (("A", layer.lora_A), ("B", layer.lora_B)):
            expected, given = (
                [*matrices["default"].weight.shape],
                stored.pop(f"{PREFIX}{name}.lora_{side}.weight", None),
            )
            if given != expected:
                raise UserError(f"{fits}: {name} has {side} {given}, expected {expected}")
        found[f"{name.replace('.base_layer', '')}.{parameter}"] = name, layer
    if missing := [name for name in stored if name.removeprefix(PREFIX).rpartition(".lora_")[0] not in modules]:
        raise UserError(f"{fits}, which has no layers for {validate_model.named(missing)}")
    if stored:
        raise UserError(
            f"{target}: the adapter {adapter} has weights other than those of LoRA on linear layers, which that "
            f"target cannot hold: {validate_model.named([*stored])}; use --to dense"
        )
    return found


def tied_layer(adapter: pathlib.Path, model: Any) -> str | None:
    """The output head or the embeddings that an adapter changes, if the model ties the two; else None.

    Args:
        model: the dense base; it may be on the meta device.
    """
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not table.weight:
        return None
    names = check_files(adapter)
    for layer, module in model.named_modules():
        if module in (head, table) and any(name.startswith(f"base_model.model.{layer}.") for name in names):
            found: str = layer
            return found
    return None


def check_tied(target: str, adapter: pathlib.Path, model: Any) -> None:
    """Rejects an adapter on an output head that is tied to the embeddings, because merging it changes both.

    Args:
        target: the option and its value, for the error message.
        model: the dense base; it may be on the meta device.

    Raises:
        UserError: the adapter is on the head or on the embeddings.
    """
    layer = tied_layer(adapter, model)
    if layer is not None:
        raise UserError(
            f"{target}: the adapter {adapter} is on {layer}, and the model ties its output head to its embeddings, "
            "so that merging would change both; use --to dense, which unties them"
        )
