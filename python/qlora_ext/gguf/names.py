"""How the conversion to GGUF names a model's weights and moves their rows.

transformers' tensor processors undo what the conversion did to some weights, and the gguf package has the names. Both
are applied to one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .rows import Rows, find_rows

# Architectures that transformers does not read, whose conversion permutes rows as that of another one does.
_CONVERTED_AS = {"granite": "llama", "smollm3": "llama"}


class Names:
    """The names and rows of a transformers model in a GGUF file.

    Args:
        architecture: llama.cpp's name.
        model: a transformers model; it may be on the meta device.

    Attributes:
        of_model: the model's names, by the names in the file.

    Raises:
        NotImplementedError: the architecture's tensor names are unknown.
    """

    def __init__(self, architecture: str, model: Any) -> None:
        try:
            from transformers import modeling_gguf_pytorch_utils as reading
        except ImportError as error:
            raise NotImplementedError(str(error)) from error
        from . import gpt_oss

        self._model = model
        processors = {**reading.TENSOR_PROCESSORS, gpt_oss.ARCHITECTURE: gpt_oss.Processor}
        processor = processors.get(_CONVERTED_AS.get(architecture, architecture), reading.TensorProcessor)
        self._processor = processor(config=model.config.to_dict())
        self.of_model = self._names_of(architecture)

    def places_of(self, name: str, shape: tuple[int, ...]) -> dict[str, Rows | None]:
        """The weights that come from the file's tensor ``name``, and its rows in them.

        None instead of rows if transformers changes the values.
        """
        if len(shape) < 2:
            return dict.fromkeys(self.process(name, np.ones(shape, np.int8), {}))
        return find_rows(lambda values: self.process(name, values, {}), shape)

    def process(self, name: str, values: Any, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """Adds the model's weights that come from the tensor ``name``, which has these ``values``, to ``found``."""
        # The values may be placeholders. Processors create tensors on the default device, which is meta while
        # transformers creates a model.
        with np.errstate(all="ignore"), torch.device("cpu"):
            processed = self._processor.process(
                weights=values,
                name=name,
                tensor_key_mapping=self.of_model,
                parsed_parameters={"tensors": found},
            )
        if processed.name in self.of_model:
            found[self.of_model[processed.name]] = torch.from_numpy(np.array(processed.weights))
        return found

    def _names_of(self, architecture: str) -> dict[str, str]:
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
