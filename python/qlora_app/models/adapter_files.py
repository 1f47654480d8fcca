"""Finds, reads and checks adapter directories (PEFT's files, and ``finetune``'s ``qlora_run.json``), and loads them."""

from __future__ import annotations

import contextlib
import pathlib
import warnings
from collections.abc import Iterator
from typing import Any

from qlora_ext.untrusted import FileError, Schema, check, compiled_pattern, excerpt, printable, read_json

from ..errors import UserError, first_line, path_named
from ..outputs.ownership import RECORD as RECORD
from ..outputs.ownership import SWEEP, read_marker
from . import validate_model
from .sources import ModelSource, resolve

_METRICS: Schema = {"steps?": int, "perplexity_before?": float, "perplexity_after?": float}
RECORD_SCHEMA: Schema = {
    "model?": str,
    "date?": str,
    "settings?": {"block_size?": int, "activations?": str},
    "metrics?": _METRICS,
}
CONFIG_SCHEMA: Schema = {
    "peft_type?": str,
    "base_model_name_or_path?": str,
    "r?": int,
    "lora_alpha?": float,
    "alpha_pattern?": dict,
}
_PATTERNS = ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern")
_MAX_ALPHA = 1e6  # as in finetune; far larger ones overflow


def find(name: str, option: str = "--adapter") -> pathlib.Path:
    """The adapter directory that ``option`` names, or the one inside the run that it names."""
    directory = path_named(name, option)
    for path in (directory, directory / "adapter"):
        if (path / "adapter_config.json").is_file():
            if not (path / "adapter_model.safetensors").is_file():
                raise UserError(f"{option} {name}: there is no adapter_model.safetensors in {path}")
            return path
    if directory.is_file():
        raise UserError(f"{option} {name}: expected a directory with an adapter of PEFT, got a file")
    if not directory.is_dir():
        raise UserError(f"{option} {name}: no such directory")
    if (directory / SWEEP).is_file():
        raise UserError(f"{option} {name}: a sweep of several adapters; name the directory of one of them")
    raise UserError(f"{option} {name}: there is no adapter_config.json in that directory")


def record_of(adapter: pathlib.Path) -> dict[str, Any]:
    """The record that ``finetune`` wrote; empty for an adapter of other software.

    For a checkpoint, it consists of the initial settings of the run.
    """
    path = adapter / RECORD
    if path.is_file():
        record: dict[str, Any] = read_json(path, RECORD_SCHEMA)
        return record
    settings = adapter.parent / "settings.json"
    if adapter.name.startswith("checkpoint-") and settings.is_file():
        begun: dict[str, Any] = read_json(settings, {"model?": str, "block_size?": int})
        # What --activations auto was is in the run's record.
        begun |= {k: v for k, v in read_marker(adapter.parent).items() if k == "activations"}
        return {"model": begun.get("model"), "settings": begun}
    return {}


def config_of(adapter: pathlib.Path) -> dict[str, Any]:
    """PEFT's configuration of the adapter.

    Raises:
        FileError: it is damaged; a factor is not finite or very large; or a regular expression may take very long.
    """
    path = adapter / "adapter_config.json"
    config: dict[str, Any] = read_json(path, CONFIG_SCHEMA)
    alphas = {"lora_alpha": config.get("lora_alpha") or 0.0}
    alphas |= {f"alpha_pattern.{key}": alpha for key, alpha in (config.get("alpha_pattern") or {}).items()}
    for name, alpha in alphas.items():
        check(alpha, float, printable(path), name)
        if not abs(alpha) <= _MAX_ALPHA:
            raise FileError(
                f"{printable(path)}: expected {excerpt(name)} to be a number of at most {_MAX_ALPHA:g}, got {alpha}"
            )
    for name in _PATTERNS:  # PEFT compiles a text, the elements of layers_pattern, and the keys of an object
        found = config.get(name) or ()
        if isinstance(found, str | dict) or name == "layers_pattern":
            for pattern in found if isinstance(found, list | dict | tuple) else [found]:
                check(pattern, str, printable(path), name)
                compiled_pattern(pattern, f"{printable(path)}: {name}")
    return config


def base_of(adapter: pathlib.Path, model: str | None, trust_remote_code: bool = False) -> ModelSource:
    """The base model: ``model``, or the one that the adapter records.

    Raises:
        UserError: neither names a base; or ``trust_remote_code`` is set for a base that only the adapter names, which
            may be untrusted.
    """
    if model is not None:
        return resolve(model, trust_remote_code)
    name = record_of(adapter).get("model") or config_of(adapter).get("base_model_name_or_path")
    if not name:
        raise UserError(f"--adapter {adapter}: the adapter does not name its base model; name it with --model")
    if trust_remote_code:
        raise UserError(
            f"--trust-remote-code: the adapter names {excerpt(name)} as its base; confirm the model with --model"
        )
    return resolve(name, trusted=False)


def check_files(adapter: pathlib.Path) -> list[str]:
    """Checks the adapter's files without its base, and returns the names of its weights.

    Raises:
        UserError: its files are damaged, or it names no layers.
    """
    path = adapter / "adapter_config.json"
    config = config_of(adapter)
    takes_layers = config.get("peft_type") == "LORA" or "target_modules" in config  # prompt tuning has none
    if takes_layers and not (config.get("target_modules") or config.get("target_parameters")):
        raise UserError(f"{printable(path)}: expected target_modules (the layers with an adapter) in it, found none")
    if config.get("megatron_config"):
        raise UserError(
            f"{printable(path)}: expected an adapter without megatron_config, Megatron's layers are not supported"
        )
    names = validate_model.shapes(adapter / "adapter_model.safetensors")
    if not names:
        raise UserError(f"the adapter {adapter} is incomplete: its adapter_model.safetensors has no weights")
    return list(names)


def _check_base_retained(model: Any, adapter: pathlib.Path) -> None:
    """Rejects an adapter that would overwrite weights of the 4-bit base."""
    from qlora_ext.nn import layers_of

    def plain(name: str) -> str:  # without PEFT's additions
        return name.removeprefix("base_model.model.").replace(".base_layer", "")

    packed = {plain(f"{layer}.{name}") for layer, module in layers_of(model) for name in module.state_dict()}
    base = [name for name in check_files(adapter) if plain(name) in packed]
    if base:
        named = validate_model.named(base)
        raise UserError(f"the adapter {adapter} would overwrite {len(base)} weights of its base: {named}")


def _cast_saved(model: Any) -> None:
    """Casts the modules that an adapter replaces in full to the dtype in which the replaced modules compute."""
    from peft.utils import ModulesToSaveWrapper

    from qlora_ext.nn.dense_16bit import Dense16bit

    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            replaced = module.original_module
            floats = (p.dtype for p in replaced.parameters() if p.is_floating_point())
            module.modules_to_save.to(replaced.compute_dtype if isinstance(replaced, Dense16bit) else next(floats))


@contextlib.contextmanager
def complete_adapter() -> Iterator[None]:
    """Turns the warning about an incomplete or unfitting adapter into an error.

    Raises:
        UserError: weights are missing or do not fit; the message counts them and names some.
    """
    from qlora_ext.integrations.peft import IncompleteAdapterWarning

    with warnings.catch_warnings():
        warnings.simplefilter("error", IncompleteAdapterWarning)
        try:
            yield
        except IncompleteAdapterWarning as warning:
            raise UserError(first_line(warning)) from warning


def load(model: Any, adapter: pathlib.Path, force: bool, trainable: bool = False, name: str = "default") -> Any:
    """Loads the adapter onto its 4-bit base, which may have other adapters.

    Args:
        name: PEFT's name for the adapter.

    Raises:
        UserError: the adapter was trained on another base (unless ``force``), or its files are damaged or incomplete.
    """
    import safetensors
    from peft import PeftModel

    from qlora_ext.integrations.peft import check_base

    try:
        check_base(model, adapter, "ignore" if force else "refuse")
    except FileError:
        raise
    except ValueError as error:
        raise UserError(f"{first_line(error)}; add --force to use it anyway") from error
    _check_base_retained(model, adapter)
    try:
        with complete_adapter():  # on the meta device first, so that a rank of 10^9 in a damaged file allocates nothing
            options = {"adapter_name": name, "is_trainable": trainable, "low_cpu_mem_usage": True}
            if isinstance(model, PeftModel):
                model.load_adapter(str(adapter), **options)
                adapted = model
            else:
                adapted = PeftModel.from_pretrained(model, str(adapter), **options)
    except safetensors.SafetensorError as error:
        raise UserError(
            f"{adapter / 'adapter_model.safetensors'} is truncated or damaged: {first_line(error)}"
        ) from error
    except UserError:
        raise
    except Exception as error:
        # PEFT does not check its files. Damaged ones raise arbitrary exceptions, intact ones raise none.
        raise UserError(
            f"the adapter {adapter} does not fit {model.config.name_or_path}: {first_line(error)}"
        ) from error
    _cast_saved(adapted)
    return adapted
