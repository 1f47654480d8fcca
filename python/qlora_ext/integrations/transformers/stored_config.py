"""Finds the ``quantization_config`` of checkpoints that have it elsewhere, and checks the index of their files."""

from __future__ import annotations

import pathlib
from typing import Any

from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from ...untrusted import FileError, check, excerpt, printable, read_json

_MLX_FIELD = "quantization"
_MLX = {"bits", "group_size", "mode"}
_AWQ = {"w_bit": "bits", "q_group_size": "group_size"}


def find_config(config: Any) -> dict[str, Any] | None:
    """The quantization_config of the checkpoint to which a model's ``config`` belongs; None if there is none.

    Libraries write it into ``quantization_config`` of ``config.json``, which transformers reads. Older versions of
    compressed-tensors name it ``compression_config``, and MLX ``quantization``. ModelOpt, AutoGPTQ and AutoAWQ write a
    file of their own, which may be the only place that has it. MLX' configuration does not name the method, so that
    the result has one more field.

    Raises:
        ValueError: such a file is damaged.
    """
    for part in (config, config.get_text_config(decoder=True)):
        saved: dict[str, Any] | None = getattr(part, "quantization_config", None)
        of_mlx = getattr(part, _MLX_FIELD, None) if saved is None else saved
        if isinstance(of_mlx, dict) and "quant_method" not in of_mlx and not _MLX.isdisjoint(of_mlx):
            return {**of_mlx, "quant_method": "mlx"}
        if saved is not None:
            return saved
    older = getattr(config, "compression_config", None)
    if older is not None:
        check(older, {}, "compression_config")
        return {**older, "quant_method": "compressed-tensors"}
    fields = _read(config, "hf_quant_config.json", {"quantization": {"quant_algo?": str}})
    if fields is not None and fields["quantization"].get("quant_algo"):
        return {**fields, "quant_method": "modelopt"}
    fields = _read(config, "quantize_config.json", {"quant_method?": str, "bits": int})
    if fields is not None:
        return {**fields, "quant_method": fields.get("quant_method") or "gptq"}
    fields = _read(config, "quant_config.json", {"w_bit": int})
    if fields is not None:
        return {_AWQ.get(name, name): value for name, value in fields.items()} | {"quant_method": "awq"}
    return None


def forget_mlx(config: Any) -> None:
    """Removes MLX' own field from the ``config`` of a model that is no longer saved in its format."""
    for part in (config, config.get_text_config(decoder=True)):
        vars(part).pop(_MLX_FIELD, None)


def check_index(config: Any) -> None:
    """Checks the index of a checkpoint's files in a directory, which transformers trusts.

    Raises:
        ValueError: the index is damaged.
    """
    directory = pathlib.Path(getattr(config, "_name_or_path", "") or "")
    index = directory / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file() and not (directory / SAFE_WEIGHTS_NAME).is_file():
        files = read_json(index, {"metadata": dict, "weight_map": dict})["weight_map"]
        for key, file in files.items():
            if not isinstance(file, str):
                raise FileError(
                    f"{printable(index)}: expected the name of a file for {excerpt(key, 200)}, got {excerpt(file)}"
                )
        if not files:
            raise FileError(f"{printable(index)}: expected the names of the checkpoint's tensors, found none")


def _read(config: Any, name: str, schema: Any) -> dict[str, Any] | None:
    """The file ``name`` beside ``config.json``, in a directory or on the hub; None if there is none."""
    path = getattr(config, "_name_or_path", "")
    if not path:
        return None
    file = cached_file(
        path,
        name,
        revision=getattr(config, "_commit_hash", None),
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    fields: dict[str, Any] | None = None if file is None else read_json(file, schema)
    return fields
