"""``CheckpointSource``: packed weights in safetensors files, in the formats of ``qlora_ext.checkpoints``."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import core_model_loading
from transformers.quantizers.quantizers_utils import get_module_from_name

from ....checkpoints import LOAD_ORIGINAL, MLX, formats_of, joined, retained_of
from ....checkpoints.rows import alternating_rows, grouped_rows, select_rows
from ....form import Form
from ....nn import Linear4bit, Packed4bit, TiedLinear4bit, dense_modules, is_dense, layers_of, paths_to
from ....weight import Weight4bit, quantize
from ..config import QLoRAConfig
from ..deferred import deferred, dtype_of
from ..modules import BaseNames, check_complete, empty_layer, tables_and_heads
from ..weight_source import Source
from .decoded_weights import DecodedWeight, decoded_weights
from .expert_stacks import DenseExperts, alternates, dense_experts
from .finding import check_surplus, check_values, find_matrices
from .headers import Header, Names, map_tensors, patterns_of, read_headers
from .operations import OriginalNames, PackedTensors, module_of
from .stored_weights import Matrix, StoredWeight, experts_of

# Bytes of experts that are read before their pages are released, which takes a few milliseconds.
_RELEASED_AT_ONCE = 1 << 20
_ADVICE = "call qlora_ext.integrations.transformers.save_in_our_format(model) before saving it"


class CheckpointSource(Source):
    """The 4-bit weights of a checkpoint's safetensors files.

    Args:
        config: the checkpoint's ``quantization_config``.
        given: if it has ``requantize``, layers get the forms that it would give to dense ones.

    Raises:
        ValueError: the format, or one of its settings, is not supported.
    """

    def __init__(self, config: Mapping[str, Any], given: QLoRAConfig | None = None) -> None:
        self._formats = formats_of(config)
        self.name = " and ".join(dict.fromkeys(kind.name for kind, _ in self._formats))
        self._config = copy.deepcopy(dict(config))
        self._given = given if given is not None and given.requantize else None
        self._requantized: dict[str, Form] = {}
        if isinstance(self._formats[0][0], MLX):
            del self._config["quant_method"]  # which MLX does not write
        self._weights: dict[str, StoredWeight] = {}
        self._dense: dict[str, DenseExperts | DecodedWeight] = {}
        self._headers: dict[str, Header] = {}
        self._places: dict[str, str] = {}  # of tensors that transformers loads as they are: their names in the model
        self._others: dict[str, Tensor] = {}  # tensors for which the model has no place

    def __deepcopy__(self, memo: Any) -> CheckpointSource:
        return self  # transformers copies configurations; the copy must have the same source

    # Before the weights are read

    def forms(self, model: nn.Module, files: Sequence[str]) -> dict[str, Form]:
        headers, names = read_headers(files), Names(model)
        found = find_matrices(self._formats, names, headers)
        decoded = decoded_weights(model, names, found, headers)
        packed = {dense: matrix for dense, matrix in found.items() if names.place(dense)[0] not in decoded}
        self._weights = self._placed(model, names, packed)
        read = {key for matrix in found.values() for key in matrix.tensors.values()}
        rest = {key: header for key, header in headers.items() if key not in read}
        check_values(names, rest)
        self._dense = {**decoded, **dense_experts(model, names, rest)}
        check_surplus(found, names, headers)
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
        self._requantized = self._forms_given(model)
        return {
            name: dataclasses.replace(form, block_size=self._weights[name].block_size) for name, form in forms.items()
        } | self._requantized

    def _forms_given(self, model: nn.Module) -> dict[str, Form]:
        """The forms of the weights that are quantized anew: those of layers that are not output heads."""
        forms: dict[str, Form] = {}
        if self._given is None:
            return forms
        others = tables_and_heads(model)
        for name in dict.fromkeys(map(module_of, self._weights)):
            if others.isdisjoint(paths_to(name)):
                shapes = empty_layer(model.get_submodule(name), torch.float32, Form()).packed_shapes
                form = self._given.form_of(name, shapes.values())
                forms |= {f"{name}.{weight}".removeprefix("."): form for weight in shapes}
        return forms

    def _placed(self, model: nn.Module, names: Names, stored: Mapping[str, Matrix]) -> dict[str, StoredWeight]:
        """The packed weights, by their names in the model. Those for which it has no place are left to transformers.

        Raises:
            ValueError: a weight cannot be put into the model as it is.
        """
        groups: dict[str, dict[str | None, list[tuple[str, Matrix]]]] = {}
        for dense, matrix in stored.items():
            target, pattern = names.place(dense)
            if target is not None:
                groups.setdefault(target, {}).setdefault(pattern, []).append((dense, matrix))
        return {target: self._placed_weight(model, names, target, by_pattern) for target, by_pattern in groups.items()}

    def _placed_weight(
        self,
        model: nn.Module,
        names: Names,
        target: str,
        by_pattern: Mapping[str | None, list[tuple[str, Matrix]]],
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
        found = StoredWeight(shape, matrices, is_split)
        found.alternates = len(columns) > 1 and patterns_of(patterns[0] or "") is not None and alternates(module)
        return found

    def _form(self, weight: StoredWeight) -> Form:
        try:
            return weight.format.form(weight.settings, weight.stored_shape)
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
    def _all(self) -> dict[str, StoredWeight | DenseExperts | DecodedWeight]:
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
        if (form := self._requantized.get(name)) is not None:
            dtype = module.weight_dtype
            matrices = ((at, quantize(w4.dequantize(torch.float32), form).replace(dtype=dtype)) for at, w4 in matrices)
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
        w4 = matrix.format.read(tensors, shape, dtype, matrix.settings, matrix.where)
        matrix.retained = {key: t.to("cpu", copy=True) for key, t in retained_of(matrix.format, tensors).items()}
        return w4

    # When the model is saved

    @property
    def saved_config(self) -> Mapping[str, Any] | None:
        return None if self._requantized else self._config

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
                matrix.format.check_scales(part, matrix.settings, matrix.retained)
            except ValueError as error:
                raise ValueError(f"{name}: {error}; {_ADVICE}") from error
        write = functools.partial(self._written, name, weight, module)
        return dict(write()) if module.is_sharded else deferred(self._specs(weight.names), write)

    def _parts(self, name: str, weight: StoredWeight, w4: Weight4bit) -> Iterator[tuple[Matrix, Weight4bit]]:
        """The matrices of the checkpoint, each with its values in ``w4``.

        Raises:
            ValueError: the weight has another form than the checkpoint's.
        """
        form = weight.format.form(weight.settings, weight.stored_shape)
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
            tensors = matrix.format.write(part, matrix.settings, matrix.retained)
            yield from ((key, tensors[tensor]) for tensor, key in matrix.tensors.items())


def _is_sharded(t: Tensor) -> bool:
    return hasattr(t, "full_tensor")


def _is_lossless(operations: Sequence[Any], parts: int) -> bool:
    """Whether ``operations`` only stack matrices, and join the rows of ``parts`` of them."""
    expected = [(core_model_loading.MergeModulelist, 0), (core_model_loading.Concatenate, 1)]
    found = [(type(operation), getattr(operation, "dim", None)) for operation in operations]
    return found == expected[: 0 if not operations else min(parts, 2)]
