"""Finds the packed weights in the headers of a checkpoint's files, and rejects what belongs to none."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from ....checkpoints import LOAD_ORIGINAL, Format, Settings
from ....untrusted import excerpt, printable
from .headers import Header, Names, map_tensors
from .operations import module_of
from .stored_weights import Matrix

_EXPERTS = (".experts.", ".switch_mlp.")  # in names; the latter is MLX'
_SCALES = ("weight_scale", "scales", "weight_scale_inv", "scale")
_CACHE_SCALES = ("q_scale", "k_scale", "v_scale")  # of 8-bit keys and values, which are not applied
_SCALE_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U8": torch.uint8,
}
# Dtypes of safetensors that hold codes, not values.
_CODES = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "U8", "I8", "I16", "I32", "U32")

Formats = Sequence[tuple[Format, Settings]]


def find_matrices(formats: Formats, names: Names, headers: Mapping[str, Header]) -> dict[str, Matrix]:
    """The packed weights of the files, by the names that dense ones would have.

    Raises:
        ValueError: a weight of the model lacks a tensor, or has codes of another dtype; or there are no such weights.
    """
    _check_one_by_one(formats, headers)
    found: dict[str, Matrix] = {}
    errors: dict[str, str] = {}
    for kind, settings in formats:
        for dense, tensors in _groups(kind, settings, headers).items():
            if dense in found:
                continue
            matrix = Matrix(_where(headers, next(iter(tensors.values())), dense), kind, settings, tensors)
            problem = _problem(matrix, dense, headers)
            if problem is None and kind.codes in tensors and headers[tensors[kind.codes]].dtype in kind.code_dtypes:
                found[dense] = dataclasses.replace(matrix, settings=_with_scales(matrix, headers))
            elif problem is not None and names.place(dense)[0] is not None:
                errors.setdefault(dense, f"{matrix.where}: {problem}")
    for dense, message in errors.items():
        if dense not in found:
            raise ValueError(message)
    if not found:
        file = next((header.file for header in headers.values()), "the checkpoint")
        expected = " or ".join(dict.fromkeys(kind.name for kind, _ in formats))
        raise ValueError(f"{printable(file)}: expected packed weights of the format {expected}, found none")
    return found


def _groups(kind: Format, settings: Settings, headers: Mapping[str, Header]) -> dict[str, dict[str, str]]:
    """The tensors that have a name of the format, by that name, for each name of a dense weight."""
    names, groups = kind.tensors(settings), dict[str, dict[str, str]]()
    for key in headers:
        dense, tensor = kind.parse(key)
        if tensor in names:
            groups.setdefault(dense, {})[tensor] = key
    return groups


def _problem(matrix: Matrix, dense: str, headers: Mapping[str, Header]) -> str | None:
    """What is wrong with tensors that have names of a format; None if they are a weight of it, or a dense one."""
    kind, tensors = matrix.format, matrix.tensors
    required = [name for name, is_required in kind.tensors(matrix.settings).items() if is_required]
    absent = [name for name in required if name not in tensors]
    if kind.codes not in tensors:
        is_part = dense not in headers and len(absent) < len(required)
        return _lacks(matrix, kind.codes) if is_part else None
    key = tensors[kind.codes]
    if dense in headers and key != dense:
        return f"expected a dense weight or the tensor {kind.codes} of {kind.name}, got both"
    if headers[key].dtype not in kind.code_dtypes:
        is_dense = key == dense and not any(name in tensors for name in required if name != kind.codes)
        return None if is_dense else f"expected {kind.codes} to be codes of {kind.name}, got {headers[key].dtype}"
    return _lacks(matrix, absent[0]) if absent else None


def _lacks(matrix: Matrix, name: str) -> str:
    found = ", ".join(sorted(matrix.tensors))
    return f"expected the tensor {name} of {matrix.format.name} too, found {found}"


def _with_scales(matrix: Matrix, headers: Mapping[str, Header]) -> Settings:
    """The settings of a weight, with the dtype and the shape of the scales in the files."""
    settings, tensors = matrix.settings, matrix.tensors
    settings = settings.layers.get(module_of(next(iter(tensors.values()))), settings)
    scale = next((headers[tensors[name]] for name in _SCALES if name in tensors), None)
    if scale is None:
        return settings
    dtype = _SCALE_DTYPES.get(scale.dtype, settings.scale_dtype)
    return dataclasses.replace(settings, scale_dtype=dtype, scale_shape=scale.shape)


def _where(headers: Mapping[str, Header], key: str, name: str) -> str:
    return f"{printable(headers[key].file)}: {excerpt(name, 200)}"


def _check_one_by_one(formats: Formats, headers: Mapping[str, Header]) -> None:
    """Rejects experts whose codes are in one tensor, such as ``experts.gate_up_proj``: the format has matrices.

    Raises:
        ValueError: there is such a tensor.
    """
    dtypes = {dtype for kind, _ in formats if not kind.has_stacks for dtype in kind.code_dtypes}
    for key, header in headers.items():
        if header.dtype in dtypes and len(header.shape) == 3 and any(name in key for name in _EXPERTS):
            raise ValueError(
                f"{_where(headers, key, key)}: expected the {formats[0][0].name} weights of each expert in tensors of "
                f"their own, such as experts.0.up_proj, got those of {header.shape[0]} experts in one tensor, which is "
                f"not supported; {LOAD_ORIGINAL}"
            )


def check_surplus(stored: Mapping[str, Matrix], names: Names, headers: Mapping[str, Header]) -> None:
    """Rejects tensors of modules with packed weights that belong to neither the format nor the model.

    GPTQ's writers give every module a bias of zeros, which are saved again.

    Raises:
        ValueError: there is such a tensor.
    """
    used = {key for matrix in stored.values() for key in matrix.tensors.values()}
    modules = {module_of(dense): matrix for dense, matrix in stored.items()}
    biases: dict[str, Header] = {}
    for key, header in headers.items():
        module, _, tensor = key.rpartition(".")
        if module not in modules or key in used or tensor in _CACHE_SCALES or names.place(key)[0] is not None:
            continue
        if tensor == "bias":
            biases[key] = header
        else:
            kind, settings = modules[module].format, modules[module].settings
            raise ValueError(
                f"{printable(header.file)}: expected only the tensors {', '.join(kind.tensors(settings))} of "
                f"{kind.name} for {excerpt(module, 200)}, got {excerpt(key, 200)} too"
            )
    for key, bias in map_tensors(biases).items():
        if bool((bias != 0).any()):
            where = _where(headers, key, key)
            raise ValueError(f"{where}: expected zeros, because the model's layer has no bias, got other values")


def check_values(names: Names, rest: Mapping[str, Header]) -> None:
    """Rejects tensors with codes where the model has values.

    Args:
        rest: the headers of the tensors that belong to no packed weight.

    Raises:
        ValueError: there is such a tensor.
    """
    for key, header in rest.items():
        target, _ = names.place(key)
        if header.dtype in _CODES and target is not None and names.has_values(target):
            raise ValueError(
                f"{_where(rest, key, key)}: expected values, or codes with the tensors of the format in the "
                f"checkpoint's quantization_config, got {header.dtype} {list(header.shape)}"
            )
