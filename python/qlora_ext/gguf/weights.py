"""Decodes the weights of a GGUF file one at a time, so that they can be quantized without a dense model in memory.

transformers decodes a whole GGUF file, and does not quantize it. Here, its tensor processors, which undo what the
conversion to GGUF did to some weights, and the gguf package's name tables are applied to one tensor at a time.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._internal.untrusted import FileError, printable
from .file import TensorInfo, read_header


class _Weight:
    """A weight that is decoded on access with ``[...]``, the way transformers reads slices of safetensors files."""

    def __init__(self, file: GGUFWeights, name: str) -> None:
        self._file, self._name = file, name

    def __getitem__(self, index: Any) -> Tensor:
        return self._file.decode(self._name)[index]


class GGUFWeights:
    """The weights of a GGUF file, by their names in a transformers model.

    Args:
        path: of a file that transformers can read.
        model: a transformers model with the file's configuration; it may be on the meta device.

    Attributes:
        unknown: the names of tensors in the file for which the model has no weight.

    Raises:
        NotImplementedError: the architecture's tensor names are unknown.
        FileError: the file is truncated or damaged. It is a ValueError.

    Example:
        >>> from transformers import AutoConfig, AutoModelForCausalLM
        >>> def load(directory, file):
        ...     config = AutoConfig.from_pretrained(directory, gguf_file=file)
        ...     with torch.device("meta"):
        ...         model = AutoModelForCausalLM.from_config(config)
        ...     weights = qlora_ext.gguf.GGUFWeights(f"{directory}/{file}", model)
        ...     return weights.load(quantization_config=qlora_ext.QLoRAConfig(), dtype=torch.bfloat16)
    """

    def __init__(self, path: str | os.PathLike[str], model: Any) -> None:
        path = pathlib.Path(path)
        try:
            from transformers import modeling_gguf_pytorch_utils as reading
        except ImportError as error:
            raise NotImplementedError(str(error)) from error
        self._path, self._model = path, model
        header = read_header(path)
        processor = reading.TENSOR_PROCESSORS.get(header.architecture, reading.TensorProcessor)
        self._processor = processor(config=model.config.to_dict())
        self._names = self._names_of(header.architecture)
        self._sources: dict[str, list[TensorInfo]] = {}  # a many-to-many relation
        self.unknown: list[str] = []
        for tensor in header.tensors:
            names = self._process(tensor, np.ones(tensor.shape, np.int8), {})
            for name in names:
                self._sources.setdefault(name, []).append(tensor)
            if not names:
                self.unknown.append(tensor.name)

    def load(self, **options: Any) -> Any:
        """Calls ``from_pretrained`` with these weights and ``options``, and returns its result."""
        weights = {name: _Weight(self, name) for name in self._sources}
        loaded = type(self._model).from_pretrained(None, config=self._model.config, state_dict=weights, **options)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.name_or_path = model.config._name_or_path = str(
            self._path.parent
        )  # as from_pretrained sets it for a GGUF file
        return loaded

    def decode(self, name: str) -> Tensor:
        """The weight ``name`` of the model, float32.

        Raises:
            FileError: the file cannot be read.
        """
        found: dict[str, Tensor] = {}
        for tensor in self._sources[name]:
            found = self._process(tensor, self._values(tensor), found)
        return found[name]

    def _values(self, tensor: TensorInfo) -> Any:
        import gguf

        kind = gguf.GGMLQuantizationType(tensor.kind)
        try:
            data = np.fromfile(self._path, np.uint8, tensor.nbytes, offset=tensor.begin)
        except OSError as error:
            raise FileError(f"cannot read {printable(self._path)}: {error.strerror}") from error
        if data.size != tensor.nbytes:
            raise FileError(f"{printable(self._path)}: truncated while it was read")
        return gguf.dequantize(data.reshape(gguf.quant_shape_to_byte_shape(tensor.shape, kind)), kind)

    def _process(self, tensor: TensorInfo, values: Any, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """Adds the model's weights that come from ``tensor``, which has these ``values``, to ``found``."""
        with np.errstate(all="ignore"):  # the values may be placeholders
            processed = self._processor.process(
                weights=values,
                name=tensor.name,
                tensor_key_mapping=self._names,
                parsed_parameters={"tensors": found},
            )
        if processed.name in self._names:
            found[self._names[processed.name]] = torch.from_numpy(np.array(processed.weights))
        return found

    def _names_of(self, architecture: str) -> dict[str, str]:
        """The model's names, by the names in the file."""
        import gguf

        number = next((number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), None)
        if number is None:
            raise NotImplementedError(f"the gguf package has no tensor names for {architecture}")
        table = gguf.get_tensor_name_map(number, self._model.config.get_text_config().num_hidden_layers)
        found: dict[str, str] = {}
        for prefix, name in self._candidates():
            name = self._processor.preprocess_name(name)
            stem, dot, kind = name.rpartition(".")
            if kind not in ("weight", "bias"):
                stem, dot, kind = name, "", ""
            in_file = table.get_name(stem)
            here: dict[str, str] = {} if in_file is None else {f"{in_file}{dot}{kind}": prefix + name}
            if in_file is None:  # the processor may know the name
                self._processor.perform_fallback_tensor_mapping(here, dot + kind, prefix, name)
            for known in here:
                found.setdefault(known, here[known])
        return found

    def _candidates(self) -> Iterator[tuple[str, str]]:
        """Pairs of prefix and rest of each weight's name, first without a prefix, then with ever longer ones.

        Some models were converted as the decoder inside them, whose weights lack the prefix.
        """
        names = list(self._model.state_dict())
        for depth in range(max(name.count(".") for name in names)):
            for name in names:
                rest = name.split(".", depth)[-1]
                if name.count(".") >= depth:
                    yield name.removesuffix(rest), rest
