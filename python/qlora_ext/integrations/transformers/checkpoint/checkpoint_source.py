"""``CheckpointSource``: 4-bit weights in safetensors files, in one of the formats of ``qlora_ext.checkpoints``."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import core_model_loading
from transformers.quantizers.quantizers_utils import get_module_from_name

from ....checkpoints import LOAD_ORIGINAL, MLX, Settings, format_of, joined, mxfp4, retained_of
from ....checkpoints.rows import alternating_rows, grouped_rows, select_rows
from ....form import Form
from ....nn import Linear4bit, Packed4bit, TiedLinear4bit, dense_modules, is_dense, layers_of, paths_to
from ....untrusted import excerpt, printable
from ....weight import Weight4bit
from ..deferred import deferred, dtype_of
from ..modules import BaseNames, check_complete, empty_layer
from ..weight_source import Source
from .decoded_weights import DecodedWeight, decoded_weights
from .expert_stacks import DenseExperts, alternates, dense_experts
from .fp8_weights import ScaledWeight, scaled_weights
from .headers import Header, Names, map_tensors, patterns_of, read_headers
from .operations import OriginalNames, PackedTensors, module_of
from .stored_weights import Matrix, StoredWeight, experts_of

# The tensor with the codes is the first of these that a format has.
_CODES = ("weight_packed", "qweight", "blocks", "weight")
_CODE_DTYPES = ("U8", "I8", "I32", "U32")
_EXPERTS = (".experts.", ".switch_mlp.")  # in names; the latter is MLX'
_SCALES = ("weight_scale", "scales")
_CACHE_SCALES = ("q_scale", "k_scale", "v_scale")  # of 8-bit keys and values, which are not applied
_SCALE_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Bytes of experts that are read before their pages are released, which takes a few milliseconds.
_RELEASED_AT_ONCE = 1 << 20
_ADVICE = "call qlora_ext.integrations.transformers.save_in_our_format(model) before saving it"


class CheckpointSource(Source):
    """The 4-bit weights of a checkpoint's safetensors files.

    Args:
        config: the checkpoint's ``quantization_config``.

    Raises:
        ValueError: the format, or one of its settings, is not supported.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.format, self.settings = format_of(config)
        self.name = self.format.name
        self._config = copy.deepcopy(dict(config))
        if isinstance(self.format, MLX):
            del self._config["quant_method"]  # which MLX does not write
        self._weights: dict[str, StoredWeight] = {}
        self._dense: dict[str, ScaledWeight | DenseExperts | DecodedWeight] = {}
        self._headers: dict[str, Header] = {}
        self._places: dict[str, str] = {}  # of tensors that transformers loads as they are: their names in the model
        self._others: dict[str, Tensor] = {}  # tensors for which the model has no place

    def __deepcopy__(self, memo: Any) -> CheckpointSource:
        return self  # transformers copies configurations; the copy must have the same source

    # Before the weights are read

    def forms(self, model: nn.Module, files: Sequence[str]) -> dict[str, Form]:
        headers, names = read_headers(files), Names(model)
        found = self._stored(headers)
        decoded = {}
        if isinstance(self.format, MLX):
            decoded = decoded_weights(model, names, found, headers, self.format, self.settings)
        packed = {dense: matrix for dense, matrix in found.items() if names.place(dense)[0] not in decoded}
        self._weights = self._placed(model, names, packed, headers)
        read = {key for matrix in found.values() for key in matrix.tensors.values()}
        rest = {key: header for key, header in headers.items() if key not in read}
        self._dense = {**decoded, **scaled_weights(names, rest), **dense_experts(model, names, rest)}
        self._check_surplus(found, headers, names)
        self._headers, self._places, others = headers, {}, {}
        read = {key for weight in self._all.values() for key in weight.names}
        for key in headers.keys() - read:
            target, pattern = names.place(key)
            if target is None:
                others[key] = headers[key]
            elif pattern is None:
                self._places[target] = key
        self._others = map_tensors(others)
        forms = {name: self._form(weight) for name, weight in self._weights.items()}
        self._check_modules(model)
        check_complete(model, {*self._all, *(names.place(key)[0] or "" for key in headers)}, [*found], files)
        for name in forms:  # a module has one block size
            siblings = [form.block_size for other, form in forms.items() if module_of(other) == module_of(name)]
            self._weights[name].block_size = min(siblings)
        return {
            name: dataclasses.replace(form, block_size=self._weights[name].block_size) for name, form in forms.items()
        }

    def _stored(self, headers: Mapping[str, Header]) -> dict[str, Matrix]:
        """The 4-bit weights of the files, by the names that dense ones would have.

        Raises:
            ValueError: a weight lacks a tensor.
        """
        if not isinstance(self.format, mxfp4.MXFP4):
            self._check_one_by_one(headers)
        names = self.format.tensors(self.settings)
        codes = next(name for name in _CODES if name in names)
        found: dict[str, Matrix] = {}
        for dense, tensors in self._groups(headers).items():
            where = f"{printable(headers[next(iter(tensors.values()))].file)}: {excerpt(dense, 200)}"
            if codes in tensors:
                key, is_dense_too = tensors[codes], dense in headers and dense not in tensors.values()
                if is_dense_too:
                    raise ValueError(f"{where}: expected a dense weight or the tensor {codes} of {self.name}, got both")
                if headers[key].dtype in _CODE_DTYPES:
                    found[dense] = Matrix(where, tensors)
                elif key != dense or (isinstance(self.format, MLX) and len(tensors) > 1):
                    raise ValueError(f"{where}: expected {codes} to be 4-bit codes, got {headers[key].dtype}")
            elif dense not in headers and any(names[tensor] for tensor in tensors):
                raise ValueError(
                    f"{where}: expected the tensor {codes} of {self.name} too, found {', '.join(sorted(tensors))}"
                )
        if not found:
            file = next((header.file for header in headers.values()), "the checkpoint")
            raise ValueError(f"{printable(file)}: expected 4-bit weights of the format {self.name}, found none")
        return found

    def _check_one_by_one(self, headers: Mapping[str, Header]) -> None:
        """Rejects experts whose codes are in one tensor, such as ``experts.gate_up_proj``: the format has matrices.

        Raises:
            ValueError: there is such a tensor.
        """
        for key, header in headers.items():
            if header.dtype in _CODE_DTYPES and len(header.shape) == 3 and any(name in key for name in _EXPERTS):
                where = f"{printable(header.file)}: {excerpt(key, 200)}"
                raise ValueError(
                    f"{where}: expected the {self.name} weights of each expert in tensors of their own, such as "
                    f"experts.0.up_proj, got those of {header.shape[0]} experts in one tensor, which is not supported; "
                    f"{LOAD_ORIGINAL}"
                )

    def _groups(self, headers: Mapping[str, Header]) -> dict[str, dict[str, str]]:
        """The tensors that have a name of the format, by that name, for each name of a dense weight."""
        names = self.format.tensors(self.settings)
        groups: dict[str, dict[str, str]] = {}
        for key in headers:
            dense, tensor = self._parse(key)
            if tensor in names:
                groups.setdefault(dense, {})[tensor] = key
        return groups

    def _parse(self, key: str) -> tuple[str, str]:
        """The name of the dense weight to which a tensor belongs, and the tensor's name in the format."""
        if isinstance(self.format, mxfp4.MXFP4):
            return mxfp4.names_of(key) or (key, "")
        module, _, tensor = key.rpartition(".")
        return f"{module}.weight", tensor

    def _placed(
        self, model: nn.Module, names: Names, stored: Mapping[str, Matrix], headers: Mapping[str, Header]
    ) -> dict[str, StoredWeight]:
        """The 4-bit weights, by their names in the model. Those for which it has no place are left to transformers.

        Raises:
            ValueError: a weight cannot be put into the model as it is.
        """
        groups: dict[str, dict[str | None, list[tuple[str, Matrix]]]] = {}
        for dense, matrix in stored.items():
            target, pattern = names.place(dense)
            if target is not None:
                groups.setdefault(target, {}).setdefault(pattern, []).append((dense, matrix))
        return {
            target: self._placed_weight(model, names, target, by_pattern, headers)
            for target, by_pattern in groups.items()
        }

    def _placed_weight(
        self,
        model: nn.Module,
        names: Names,
        target: str,
        by_pattern: Mapping[str | None, list[tuple[str, Matrix]]],
        headers: Mapping[str, Header],
    ) -> StoredWeight:
        """The weight ``target`` of the model, from the names and matrices that a converter's patterns match."""
        module, name = get_module_from_name(model, target)
        where = next(iter(by_pattern.values()))[0][1].where
        shapes = empty_layer(module, torch.float32, Form()).packed_shapes if is_dense(module) else {}
        if name not in shapes:
            raise ValueError(
                f"{where}: expected dense values, because no 4-bit layer can replace {module_of(target)}; "
                f"{LOAD_ORIGINAL}"
            )
        operations, expected = names.converter(next(iter(by_pattern)))
        if absent := [pattern for pattern in expected if pattern not in by_pattern]:
            raise ValueError(f"{where}: expected 4-bit weights with names like {', '.join(absent)} too, found none")
        patterns: list[str | None] = [*expected] or [*by_pattern]
        if surplus := [pattern for pattern in by_pattern if pattern not in patterns]:
            raise ValueError(
                f"{where}: expected one name for each weight, found names like {', '.join(map(str, surplus))} too"
            )
        if not _is_lossless(operations, len(patterns)):
            raise ValueError(
                f"{where}: expected a weight that the model takes as it is, or in a stack of experts; transformers "
                f"applies {operations} to it, which is not supported in 4 bits"
            )
        shape, is_split = shapes[name], bool(operations)
        count = shape[0] if is_split else 1
        columns: list[list[Matrix]] = []
        for pattern in patterns:
            entries = sorted(by_pattern[pattern], key=lambda entry: core_model_loading.dot_natural_key(entry[0]))
            columns.append([matrix for _, matrix in entries])
            if len(entries) != count:
                raise ValueError(
                    f"{where}: expected {count} weights of {self.name} with names like {pattern}, found {len(entries)}"
                )
        matrices = [list(parts) for parts in zip(*columns, strict=True)]
        found = StoredWeight(shape, matrices, is_split, self._settings_of(matrices, headers))
        found.alternates = len(columns) > 1 and patterns_of(patterns[0] or "") is not None and alternates(module)
        return found

    def _check_surplus(self, stored: Mapping[str, Matrix], headers: Mapping[str, Header], names: Names) -> None:
        """Rejects tensors of modules with 4-bit weights that belong to neither the format nor the model.

        GPTQ's writers give every module a bias of zeros, which are saved again.

        Raises:
            ValueError: there is such a tensor.
        """
        used = {key for matrix in stored.values() for key in matrix.tensors.values()}
        modules = {module_of(dense) for dense in stored}
        biases: dict[str, Header] = {}
        for key, header in headers.items():
            module, _, tensor = key.rpartition(".")
            if module not in modules or key in used or tensor in _CACHE_SCALES or names.place(key)[0] is not None:
                continue
            if tensor == "bias":
                biases[key] = header
            else:
                expected = ", ".join(self.format.tensors(self.settings))
                raise ValueError(
                    f"{printable(header.file)}: expected only the tensors {expected} of {self.name} for "
                    f"{excerpt(module, 200)}, got {excerpt(key, 200)} too"
                )
        for key, bias in map_tensors(biases).items():
            if bool((bias != 0).any()):
                where = f"{printable(headers[key].file)}: {excerpt(key, 200)}"
                raise ValueError(f"{where}: expected zeros, because the model's layer has no bias, got other values")

    def _settings_of(self, matrices: list[list[Matrix]], headers: Mapping[str, Header]) -> Settings:
        """The settings with the dtype of the scales in the files."""
        tensors = matrices[0][0].tensors
        settings = self.settings.layers.get(module_of(next(iter(tensors.values()))), self.settings)
        scale = next((headers[tensors[name]].dtype for name in _SCALES if name in tensors), "")
        return dataclasses.replace(settings, scale_dtype=_SCALE_DTYPES.get(scale, settings.scale_dtype))

    def _form(self, weight: StoredWeight) -> Form:
        for parts in weight.matrices:
            for matrix in parts:
                for name, is_required in self.format.tensors(self.settings).items():
                    if is_required and name not in matrix.tensors:
                        found = ", ".join(sorted(matrix.tensors))
                        raise ValueError(
                            f"{matrix.where}: expected the tensor {name} of {self.name} too, found {found}"
                        )
        try:
            return self.format.form(weight.settings, weight.stored_shape)
        except ValueError as error:
            raise ValueError(f"{weight.where}: {error}") from error

    def _check_modules(self, model: nn.Module) -> None:
        """Rejects modules that cannot take their 4-bit weights, or whose weights are missing.

        Raises:
            ValueError: there is such a module.
        """
        always = {*dense_modules(model).always}
        modules: dict[str, list[str]] = {}
        for name, weight in self._weights.items():
            module = module_of(name)
            modules.setdefault(module, []).append(name)
            if not always.isdisjoint(paths_to(module)):
                raise ValueError(
                    f"{weight.where}: expected dense values, because transformers keeps {module} in float32"
                )
        for module, names in modules.items():
            layer = empty_layer(model.get_submodule(module), torch.float32, Form())
            absent = [weight for weight in layer.packed_shapes if f"{module}.{weight}".removeprefix(".") not in names]
            if absent:
                where = self._weights[names[0]].where
                raise ValueError(f"{where}: expected {', '.join(absent)} of {module} in {self.name} too, found none")

    # While they are read

    def conversions(self, conversions: list[Any]) -> list[Any]:
        renamings = [c for c in conversions if isinstance(c, core_model_loading.WeightRenaming)]
        targets = {
            core_model_loading.apply_renamings(key, renamings): name
            for name, weight in self._all.items()
            for key in weight.names
        }
        return [PackedTensors(self, targets), *conversions]

    @property
    def _all(self) -> dict[str, StoredWeight | ScaledWeight | DenseExperts | DecodedWeight]:
        """The weights that this source reads."""
        return {**self._weights, **self._dense}

    def read(self, name: str, tensors: Sequence[Tensor], module: nn.Module) -> Weight4bit | Tensor:
        """The weight ``name`` of the model, which ``module`` has, from its tensors in the order of their names.

        Raises:
            ValueError: a tensor is invalid.
        """
        by_key = dict(zip(self._all[name].names, tensors, strict=True))
        if name in self._dense:
            dense: Tensor = getattr(module, name.rpartition(".")[2])
            return self._dense[name].read(by_key, dense.shape, dense.dtype)
        assert isinstance(module, Packed4bit)
        weight = self._weights[name]
        matrices = self._matrices(weight, by_key, module)
        first = next(matrices)
        if first[1].shape == weight.shape:
            return first[1]
        return joined.stacked(itertools.chain([first], matrices), weight.shape[0])

    def _matrices(
        self, weight: StoredWeight, by_key: Mapping[str, Tensor], module: Packed4bit
    ) -> Iterator[tuple[str, Weight4bit]]:
        """The matrices of ``weight``, one for each expert, with their places. What has been read is released."""
        done = list[Tensor]()
        limit = max(sum(t.nbytes for t in by_key.values()) // 16, _RELEASED_AT_ONCE)
        for parts, given, shape in experts_of(weight, by_key):
            matrices = [self._read(weight, matrix, given, shape, module.weight_dtype) for matrix in parts]
            if matrices[0].column_order is not None and not isinstance(module, Linear4bit):
                raise ValueError(
                    f"{parts[0].where}: expected groups of neighbouring columns in {type(module).__name__}, got an "
                    f"activation order (desc_act), which only linear layers support; {LOAD_ORIGINAL}"
                )
            w4 = joined.in_blocks_of(joined.join_rows(matrices, parts[0].where), weight.block_size)
            yield parts[0].where, select_rows(w4, alternating_rows(w4.shape[0])) if weight.alternates else w4
            done += [given[key] for matrix in parts for key in matrix.tensors.values()]
            if sum(t.nbytes for t in done) > limit:
                self.release(*done)
                done = []

    def _read(
        self,
        weight: StoredWeight,
        matrix: Matrix,
        by_key: Mapping[str, Tensor],
        shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> Weight4bit:
        tensors = {name: by_key[key] for name, key in matrix.tensors.items()}
        w4 = self.format.read(tensors, shape, dtype, weight.settings, matrix.where)
        matrix.retained = {key: t.to("cpu", copy=True) for key, t in retained_of(self.format, tensors).items()}
        return w4

    # When the model is saved

    @property
    def saved_config(self) -> Mapping[str, Any]:
        return self._config

    def prepare_saving(self, conversions: list[Any]) -> list[Any]:
        """The ``conversions`` that transformers reverses when it saves the model, and which restore our names."""
        remaining = [c for c in conversions if not isinstance(c, PackedTensors | OriginalNames)]
        renamings = [c for c in remaining if isinstance(c, core_model_loading.WeightRenaming)]
        backwards = [renaming.reverse_transform() for renaming in reversed(renamings)]
        keys = [*self._others, *(key for weight in self._all.values() for key in weight.names)]
        changed = {core_model_loading.apply_renamings(key, backwards): key for key in sorted(keys)}
        return [OriginalNames({name: key for name, key in changed.items() if name != key}), *remaining]

    def state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """As ``Source.state_dict``. The tensors that are not the model's own are deferred.

        Raises:
            ValueError: the model has a weight that the format cannot store.
        """
        names = BaseNames(model)
        state = names.select(model.state_dict())
        layers = {names[name]: module for name, module in layers_of(model)}
        own = {layer for name in self._weights if (layer := layers.get(module_of(name))) is not None}
        for name, module in layers.items():
            if module in own or (isinstance(module, TiedLinear4bit) and module.embedding in own):
                for part in module.packed_state():
                    state.pop(f"{name}.{part}".removeprefix("."), None)  # a tied head's scales are the table's
        for name, place in self._places.items():
            if name in state:
                state[name] = self._as_stored(name, state[name], self._headers[place])
        for name, weight in self._weights.items():
            if module_of(name) in layers:  # else it has been decoded
                state |= self._saved(name, weight, layers[module_of(name)])
        for name, stored in self._dense.items():
            values = state.pop(name)
            if isinstance(stored, DecodedWeight):
                tied = [other for other, t in state.items() if t.data_ptr() == values.data_ptr()]
                state = {other: t for other, t in state.items() if other not in tied}
                try:
                    state |= stored.write(values)
                except ValueError as error:
                    raise ValueError(f"{name}: {error}; {_ADVICE}") from error
            elif isinstance(stored, ScaledWeight):
                state |= deferred(self._specs(stored.names), functools.partial(_items, stored.write, values))
            else:
                parts = stored.write(values)
                state |= {key: self._as_stored(key, t, self._headers[key]) for key, t in parts.items()}
        return state | self._others

    def _specs(self, keys: Iterable[str]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """The dtypes and shapes of tensors in the checkpoint."""
        headers = {key: self._headers[key] for key in keys}
        return {key: (dtype, h.shape) for key, h in headers.items() if (dtype := dtype_of(h.dtype)) is not None}

    def _as_stored(self, name: str, t: Tensor, header: Header) -> Tensor:
        """A dense tensor in the narrower dtype that it has in the checkpoint, if that has the same values."""
        dtype = dtype_of(header.dtype)
        if dtype in (None, t.dtype) or not t.is_floating_point() or t.itemsize < dtype.itemsize or _is_sharded(t):
            return t
        if not torch.equal(t.to(dtype).to(t.dtype), t):
            return t
        return deferred({name: (dtype, t.shape)}, lambda: [(name, t.to(dtype))])[name]

    def _saved(self, name: str, weight: StoredWeight, module: Packed4bit) -> dict[str, Tensor]:
        """The tensors of a weight, which are deferred unless all ranks have to gather it."""
        attribute = name.rpartition(".")[2]
        for matrix, part in self._parts(name, weight, module.packed_weight(attribute)):
            try:
                self.format.check_scales(part, weight.settings, matrix.retained)
            except ValueError as error:
                raise ValueError(f"{name}: {error}; {_ADVICE}") from error
        write = functools.partial(self._written, name, weight, module)
        return dict(write()) if module.is_sharded else deferred(self._specs(weight.names), write)

    def _parts(self, name: str, weight: StoredWeight, w4: Weight4bit) -> Iterator[tuple[Matrix, Weight4bit]]:
        """The matrices of the checkpoint, each with its values in ``w4``.

        Raises:
            ValueError: the weight has another form than the checkpoint's.
        """
        form = self.format.form(weight.settings, weight.stored_shape)
        reordered = weight.settings.reorders and w4.form.reordered
        expected = dataclasses.replace(form, block_size=weight.block_size, reordered=reordered)
        if w4.form != expected:
            raise ValueError(f"{name}: expected {expected}, as {self.name} stores it, got {w4.form}; {_ADVICE}")
        for e, parts in enumerate(weight.matrices):
            whole = w4.matrix(e) if weight.is_split else w4
            if weight.alternates:
                whole = select_rows(whole, grouped_rows(whole.shape[0]))
            matrices = joined.split_rows(whole, len(parts))
            for matrix, part in zip(parts, matrices, strict=True):
                try:
                    yield matrix, joined.in_larger_blocks(part, form.block_size)
                except ValueError as error:
                    raise ValueError(f"{name}: {error}; {_ADVICE}") from error

    def _written(self, name: str, weight: StoredWeight, module: Packed4bit) -> Iterator[tuple[str, Tensor]]:
        w4 = module.packed_weight(name.rpartition(".")[2])
        for matrix, part in self._parts(name, weight, w4):
            tensors = self.format.write(part, weight.settings, matrix.retained)
            yield from ((key, tensors[tensor]) for tensor, key in matrix.tensors.items())


def _items(write: Callable[[Tensor], dict[str, Tensor]], t: Tensor) -> Iterable[tuple[str, Tensor]]:
    return write(t).items()


def _is_sharded(t: Tensor) -> bool:
    return hasattr(t, "full_tensor")


def _is_lossless(operations: Sequence[Any], parts: int) -> bool:
    """Whether ``operations`` only stack matrices, and join the rows of ``parts`` of them."""
    expected = [(core_model_loading.MergeModulelist, 0), (core_model_loading.Concatenate, 1)]
    found = [(type(operation), getattr(operation, "dim", None)) for operation in operations]
    return found == expected[: 0 if not operations else min(parts, 2)]
