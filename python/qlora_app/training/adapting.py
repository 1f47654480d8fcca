"""The adapter of a run: chooses its layers by the options of ``finetune`` and adds it to the 4-bit base."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import UserError, first_line
from ..models import validate_model
from ..models.adapter_files import find
from ..models.adapter_files import load as load_adapter
from ..models.sources import ModelSource
from ..options import flag
from .settings import BASE_FORMAT, Settings, layer_numbers, named_modules

if TYPE_CHECKING:
    from collections.abc import Iterable

# Options that the adapter of --init-adapter determines.
OWN = ("rank", "alpha", "target_modules", "layers", "modules_to_save", "rslora", "dora")


def _ends_with(module: str, name: str) -> bool:
    return module == name or module.endswith("." + name)


def _linears(model: Any) -> list[str]:
    """The last parts of the names of the linear layers of ``model``, without its output head, as in "all-linear"."""
    import torch

    head = model.get_output_embeddings()
    linears = (name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head)
    return sorted({name.rpartition(".")[2] for name in linears})


def targets_of(model: Any, targets: str, layers: str = "") -> str | list[str]:
    """The value of PEFT's ``target_modules`` for ``--target-modules``.

    Args:
        layers: the value of ``--layers``. If it is not empty, the names are listed, because PEFT selects layers only
            among listed names.

    Raises:
        UserError: no layer has one of the names.
    """
    if targets == "all-linear":
        return _linears(model) if layers else targets
    modules = [name for name, _ in model.named_modules()]
    names = named_modules(targets)
    for name in names:
        if not any(_ends_with(module, name) for module in modules):
            raise UserError(
                f"--target-modules {name}: no layer of the model has that name; it has {', '.join(_linears(model))}"
            )
    if not names:
        raise UserError(f"--target-modules: expected the name of a layer, one of {', '.join(_linears(model))}")
    return names


def _check_layers(model: Any, layers: str) -> None:
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    if count is not None and (beyond := [number for number in layer_numbers(layers) if number >= count]):
        raise UserError(f"--layers {layers}: expected layers from 0 to {count - 1}, got {beyond[0]}")


def check_saved(model: Any, names: Iterable[str]) -> None:
    """Rejects modules of ``--modules-to-save`` that cannot be trained in full."""
    import torch

    for name in names:
        found = [module for path, module in model.named_modules() if path and _ends_with(path, name)]
        if not found:
            raise UserError(f"--modules-to-save {name}: no module of the model has that name")
        head = model.get_output_embeddings()
        if any(isinstance(m, torch.nn.Linear) and m is not head for module in found for m in module.modules()):
            raise UserError(
                f"--modules-to-save {name}: its linear layers are 4-bit, and their weights are frozen; "
                "name it in --target-modules"
            )


def check_chunked_loss(model: Any) -> None:
    """Rejects --chunked-loss for a model whose output head does not allow it.

    Args:
        model: with its adapter.
    """
    from qlora_ext.output_head import has_plain_head

    head = model.get_base_model().get_output_embeddings()
    if head is not None and any(parameter.requires_grad for parameter in head.parameters()):
        raise UserError("--chunked-loss: the output head is trained too (--modules-to-save), which needs all logits")
    if not has_plain_head(model.get_base_model()):
        kind = model.config.get_text_config().model_type
        raise UserError(f"--chunked-loss: {kind} changes its logits after the head, which is not supported")


def add_adapter(model: Any, source: ModelSource, settings: Settings, force: bool) -> Any:
    """``model``, the base from ``source``, with a new adapter, or the one of ``--init-adapter``.

    Args:
        force: accept an adapter of ``--init-adapter`` that was trained on another base.

    Raises:
        UserError: an option does not fit the model, or the adapter's files are damaged.
    """
    from transformers import set_seed

    from qlora_ext.integrations.peft import set_dropout, set_merge_aware

    set_seed(settings.seed)
    if settings.init_adapter:
        adapted = load_adapter(model, find(settings.init_adapter, "--init-adapter"), force, trainable=True)
        set_dropout(adapted, "default", settings.dropout)
    else:
        adapted = _new_adapter(model, settings)
    adapted.peft_config["default"].base_model_name_or_path = source.path
    if settings.merge_aware:
        try:
            set_merge_aware(adapted, code=None if settings.merge_aware == BASE_FORMAT else settings.merge_aware)
        except ValueError as error:
            raise UserError(f"--merge-aware {settings.merge_aware}: {first_line(error)}") from error
    return adapted


def _new_adapter(model: Any, settings: Settings) -> Any:
    from peft import get_peft_model

    from ..models.lora_config import lora_config

    config = lora_config(
        model,
        settings.rank,
        targets_of(model, settings.target_modules, settings.layers),
        named_modules(settings.modules_to_save),
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        use_rslora=settings.rslora,
        use_dora=settings.dora,
        layers_to_transform=layer_numbers(settings.layers) or None,
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        option = flag("modules_to_save" if "modules_to_save" in str(error) else "target_modules")
        value = settings.modules_to_save if "save" in option else settings.target_modules
        raise UserError(f"{option} {value}: {first_line(error)}") from error


def _largest_rank(model: Any, targets: str) -> int | None:
    """The largest rank of the linear layers of ``--target-modules``; None if there are none."""
    import torch

    names = _linears(model) if targets == "all-linear" else named_modules(targets)
    layers = (module for path, module in model.named_modules() if any(_ends_with(path, name) for name in names))
    sizes = (min(m.in_features, m.out_features) for m in layers if isinstance(m, torch.nn.Linear))
    return max(sizes, default=None)


def check_without_weights(source: ModelSource, config: Any, settings: Settings) -> int | None:
    """Rejects options that contradict the model's configuration, before the weights are read.

    Returns:
        The largest rank of the layers with an adapter, if it is known.

    Raises:
        UserError: an option contradicts the configuration.
    """
    validate_model.check_room(source, config)
    model = validate_model.skeleton(source, config)
    targets_of(model, settings.target_modules, settings.layers)
    _check_layers(model, settings.layers)
    check_saved(model, named_modules(settings.modules_to_save))
    return _largest_rank(model, settings.target_modules)
