"""The adapter directory: PEFT's files, and beside them ``run.json``, the base it needs and how it came about."""

from __future__ import annotations

import pathlib
from typing import Any

from .errors import UserError, first_line
from .models import ModelSource, read_json, resolve

RECORD = "qlora_run.json"


def find(name: str) -> pathlib.Path:
    """The adapter directory that a user named, or that lies inside the run directory that they named."""
    directory = pathlib.Path(name).expanduser()
    for path in (directory, directory / "adapter"):
        if (path / "adapter_config.json").is_file():
            if not (path / "adapter_model.safetensors").is_file():
                raise UserError(f"--adapter {name}: there is no adapter_model.safetensors in {path}")
            return path
    if not directory.is_dir():
        raise UserError(f"--adapter {name}: no such directory")
    raise UserError(f"--adapter {name}: there is no adapter_config.json in that directory")


def record_of(adapter: pathlib.Path) -> dict[str, Any]:
    """What ``finetune`` noted down; empty for an adapter that other software trained."""
    path = adapter / RECORD
    if not path.is_file():
        return {}
    record = read_json(path)
    if not isinstance(record, dict):
        raise UserError(f"cannot read {path}: expected an object")
    return record


def base_of(adapter: pathlib.Path, model: str | None) -> ModelSource:
    """The base model: the one that the user names, or that the adapter was trained on."""
    name = (
        model
        or record_of(adapter).get("model")
        or read_json(adapter / "adapter_config.json").get("base_model_name_or_path")
    )
    if not name:
        raise UserError(f"--adapter {adapter}: it does not say which model it belongs to; name it with --model")
    return resolve(str(name))


def load(model: Any, adapter: pathlib.Path, force: bool) -> Any:
    """Puts the adapter on its 4-bit base.

    Raises:
        UserError: it was trained on another base (unless ``force``), or its files are damaged.
    """
    import safetensors
    from peft import PeftModel

    from ..integrations.peft import check_base

    try:
        check_base(model, adapter, "ignore" if force else "refuse")
    except ValueError as error:
        raise UserError(f"{first_line(error)}; add --force to use it all the same") from error
    try:
        return PeftModel.from_pretrained(model, str(adapter))
    except safetensors.SafetensorError as error:
        raise UserError(
            f"{adapter / 'adapter_model.safetensors'} is truncated or damaged: {first_line(error)}"
        ) from error
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"the adapter {adapter} does not fit {model.config.name_or_path}: {first_line(error)}"
        ) from error
