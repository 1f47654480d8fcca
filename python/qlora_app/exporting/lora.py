"""Checks of LoRA adapters and their bases that several targets share. They read no weights."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from qlora_ext.gguf.file import ARCHITECTURES, read_header

from ..errors import UserError, reading
from ..models import validate_model
from ..models.adapter_files import check_files, config_of
from ..models.sources import ModelSource

if TYPE_CHECKING:
    from qlora_ext.integrations.peft.experts import LoraExperts4bit
    from qlora_ext.nn import Experts4bit

# Of the names in an adapter's file.
PREFIX = "base_model.model."
_MATRIX = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
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


def ranks_of(target: str, adapter: pathlib.Path, model: Any, experts: Collection[str] = ()) -> dict[str, int]:
    """The linear layers with an adapter, and their ranks.

    Args:
        experts: names of modules with stacked weights that may have adapters, too.

    Raises:
        UserError: the adapter has other weights than pairs of A and B, or their shapes do not fit ``model``.
    """
    found = validate_model.shapes(adapter / "adapter_model.safetensors")
    matches = {name: _MATRIX.fullmatch(name) for name in found}
    others = [name for name, match in matches.items() if match is None or match[1].endswith(".base_layer")]
    others += [name for name, match in matches.items() if match and match[1].endswith(".experts")]
    others = [name for name in others if not _of_experts(matches[name], experts)]
    if others:
        raise UserError(
            f"{target}: the adapter {adapter} has weights other than those of LoRA on linear layers, which that "
            f"target cannot hold: {validate_model.named(others)}; use --to dense"
        )
    state, ranks = model.state_dict(), {}
    for layer in {match[1]: None for match in matches.values() if match and not _of_experts(match, experts)}:
        a, b = (found.get(f"base_model.model.{layer}.lora_{side}.weight", []) for side in "AB")
        weight = state.get(f"{layer}.weight")
        expected = [] if weight is None else list(weight.shape)
        if len(a) != 2 or len(b) != 2 or [b[0], a[1]] != expected or a[0] != b[1]:
            raise UserError(f"the adapter {adapter} does not fit its base: {layer} has A {a} and B {b} on {expected}")
        ranks[layer] = a[0]
    return ranks


def _of_experts(match: re.Match[str] | None, experts: Collection[str]) -> bool:
    return match is not None and match[1].replace(".base_layer", "") in experts


def adapted_experts(
    adapter: pathlib.Path, quantized: Any, experts: Mapping[str, Experts4bit]
) -> dict[str, tuple[str, LoraExperts4bit]]:
    """The layers of the adapter on experts, and their names in its file, by the names of the stacks.

    They have no memory for their weights.

    Only PEFT knows which of a module's weights have which of the nested adapters in the file.

    Args:
        quantized: the 4-bit model on the meta device, which gets the adapter.

    Raises:
        UserError: the adapter does not fit its base.
    """
    from peft import LoraConfig, inject_adapter_in_model

    from qlora_ext.integrations.peft.experts import LoraExperts4bit

    stored = validate_model.shapes(adapter / "adapter_model.safetensors")
    if not any(name.split(".lora_")[0].replace(".base_layer", "").removeprefix(PREFIX) in experts for name in stored):
        return {}
    with reading("configuration", str(adapter)):
        config = LoraConfig.from_pretrained(str(adapter))
        config.inference_mode = True
        inject_adapter_in_model(config, quantized, low_cpu_mem_usage=True)
    found: dict[str, tuple[str, LoraExperts4bit]] = {}
    for name, layer in quantized.named_modules():
        if isinstance(layer, LoraExperts4bit):
            for side, module in (("A", layer.lora_A), ("B", layer.lora_B)):
                expected, given = [*module["default"].weight.shape], stored.get(f"{PREFIX}{name}.lora_{side}.weight")
                if given != expected:
                    raise UserError(
                        f"the adapter {adapter} does not fit its base: {name} has {side} {given}, expected {expected}"
                    )
            found[f"{name.replace('.base_layer', '')}.{layer.parameter_name}"] = name, layer
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
