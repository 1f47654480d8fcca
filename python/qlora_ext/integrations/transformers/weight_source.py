"""``Source``: where a model's 4-bit weights come from if its checkpoint already has them."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ...form import Form


def _retain(*tensors: Tensor) -> None:
    """Releases nothing."""


class Source(abc.ABC):
    """The packed weights of a checkpoint, which a model takes over bit for bit, or quantizes anew.

    ``QLoRAConfig._source`` hands one to ``QLoRAQuantizer``, which calls, in this order:

    1. ``forms``, before transformers reads a weight. Each module whose weights are all named becomes a 4-bit module of
       their forms. The others stay dense, or are quantized to the configuration's form if ``quantizes_rest``.
    2. ``conversions``, for transformers' conversions between the checkpoint's tensors and the model's.

    A weight then reaches its module in one of two ways. A source whose checkpoint transformers opens itself puts an
    operation into ``conversions`` that fills the module (``weight_operations.fill``). A source that passes a
    ``state_dict`` to ``from_pretrained`` puts values there that are ``Weight4bit`` once they are read, and ``Quantize``
    takes them as they are; its model is not ``pre_quantized``, so that transformers reads one weight at a time. For a
    GGUF file, transformers asks the quantizer for such values (``values``).

    3. ``loaded``, when all weights have been read. A source whose model is saved in the format of this package is then
       dropped.
    4. ``saved_config``, ``prepare_saving`` and ``state_dict`` when the model is saved. The defaults save it in the
       format of this package.

    Attributes:
        name: of the checkpoint's format, for messages.
        quantizes_rest: whether weights that ``forms`` does not name are quantized if the configuration covers them.
        release: called with tensors of the files after their last use.
        error: the first error while weights were read, to be raised when transformers, which would hide it, is done.
    """

    name: str
    quantizes_rest = False
    release: Callable[..., None] = staticmethod(_retain)
    error: ValueError | None = None

    @abc.abstractmethod
    def forms(self, model: nn.Module, files: Sequence[str]) -> dict[str, Form]:
        """The forms of the 4-bit weights, by the names of the weights in ``model``.

        Args:
            model: dense and on the meta device.
            files: of the checkpoint; empty if its tensors were passed to ``from_pretrained``.

        Raises:
            ValueError: a weight cannot be used as it is; the message names the file and the tensor.
        """

    def conversions(self, conversions: list[Any]) -> list[Any]:
        """``conversions`` with those that read this source's weights."""
        return conversions

    def values(self) -> dict[str, Any]:
        """The values that transformers reads instead of those of the GGUF file, by their names in the model."""
        raise NotImplementedError(f"{self.name} checkpoints are not read from GGUF files")

    def loaded(self, model: nn.Module) -> None:  # noqa: B027  # does nothing by default
        """Called with the model when all weights have been read."""

    @property
    def saved_config(self) -> Mapping[str, Any] | None:
        """The ``quantization_config`` of a saved model; None if it is saved in the format of this package."""
        return None

    def prepare_saving(self, conversions: list[Any]) -> list[Any]:
        """Those of ``conversions`` that saving reverses after ``state_dict``; used if ``saved_config`` is not None."""
        return conversions

    def state_dict(self, model: nn.Module) -> dict[str, Tensor] | None:
        """The tensors of a saved model, by the names that they have after loading; None if ``saved_config`` is."""
        return None
