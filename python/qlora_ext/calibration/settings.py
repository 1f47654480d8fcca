"""``Calibration``: the settings of a calibration."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import digest
from .._library import build_info
from ..form import Form
from ..sizes import parse_size
from . import self_text
from .init_lora import InitLora
from .store import Store


@dataclasses.dataclass(frozen=True)
class Calibration:
    """The settings of a calibration.

    Attributes:
        inputs: "self" (the model writes its own text), token ids int64 [B, T], or batches of the model's inputs, each a
            tensor, a tuple or a mapping for the model's forward. Tokens that the "attention_mask" [B, T] of a mapping
            excludes do not count.
        method: "feedback" (weighted scales and GPTQ's error feedback) or "scales" (weighted scales alone).
        tokens, length: number of tokens that the model writes, in total and per sequence.
        seed: of that text.
        damping: added to the diagonal of the second moments, as a fraction of its mean.
        batch_size: number of sequences that run at a time.
        distill: after calibrating, learn the codes of the linear layers: in a language model of transformers those of
            all layers together, so that its predictions become the dense model's (KL divergence), and in other models
            block by block, so that each block's outputs do. Each batch is a step of the optimizer, so batches should
            be small.
        distill_memory: bytes, or a size such as "8GB". Layers are learnt together if that takes at most so much memory,
            32 bytes per weight and what one batch needs, else block by block.
        directory: stores finished layers, so that an interrupted calibration can resume.
        progress: called with the number of finished weights, the number of all weights, and the last layer's name, or
            with ``distill`` the step of learning.

    Raises:
        TypeError, ValueError: an attribute is invalid.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=128))
        >>> calibration = qlora_ext.Calibration(tokens=256, length=32)  # on text that the model writes
        >>> model = qlora_ext.quantize_model(model, calibration=calibration)
        >>> len(qlora_ext.calibration.calibration_of(model))
        14
    """

    inputs: Any = "self"
    method: str = "feedback"
    tokens: int = 12288
    length: int = 512
    seed: int = 0
    damping: float = 0.01
    batch_size: int = 8
    distill: bool = False
    distill_memory: int | float | str = "8GB"
    directory: str | os.PathLike[str] | None = None
    progress: Callable[[int, int, str], None] | None = None

    def __post_init__(self) -> None:
        if self.method not in ("feedback", "scales"):
            raise ValueError(f"method: expected 'feedback' or 'scales', got {self.method!r}")
        if isinstance(self.inputs, str) and self.inputs != "self":
            raise ValueError(f"inputs: expected 'self', token ids or batches of inputs, got {self.inputs!r}")
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping: expected a fraction above 0 and at most 1, got {self.damping}")
        parse_size("distill_memory", self.distill_memory)
        for name in ("tokens", "length", "batch_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a number of 1 or more, got {value!r}")
        if self.length < 8 or self.tokens < self.length:
            raise ValueError(
                f"length: expected 8 or more tokens per sequence, and at most tokens, got length={self.length}, "
                f"tokens={self.tokens}"
            )

    def key(
        self,
        model: nn.Module,
        layers: Iterable[str],
        form: Form,
        compute_dtype: torch.dtype | None,
        given: Sequence[Any] | None,
        init_lora: InitLora | None,
    ) -> dict[str, Any]:
        """The settings that identify stored results of this calibration: model, text and method.

        Args:
            layers: names of the calibrated layers.
            form, compute_dtype: of the 4-bit layers.
            given: the result of ``given_batches``.
        """
        weights, inputs = hashlib.sha256(), hashlib.sha256()
        digest.update(weights, [list(layers), model.state_dict()])
        digest.update(inputs, given)
        key = {name: getattr(self, name) for name in ("method", "tokens", "length", "seed", "damping")}
        key |= {"inputs": inputs.hexdigest() if given else "self", "weights": weights.hexdigest()}
        key |= {name: str(value) for name, value in {**form.keywords, "compute_dtype": compute_dtype}.items()}
        key["version"] = build_info()["version"]
        if self.distill:
            memory = parse_size("distill_memory", self.distill_memory)
            key |= {"distill": True, "batch_size": self.batch_size, "distill_memory": memory}
        return key if init_lora is None else {**key, "init_lora": vars(init_lora)}

    @classmethod
    def of(cls, calibration: Any) -> Calibration:
        """``calibration`` itself if it is a ``Calibration``, else one with these ``inputs``."""
        return calibration if isinstance(calibration, Calibration) else cls(calibration)

    def given_batches(self) -> list[Any] | None:
        """``inputs`` as a list of batches; None for "self".

        Raises:
            TypeError, ValueError: ``inputs`` are not batches, or empty.
        """
        inputs = self.inputs
        if isinstance(inputs, str):
            return None
        if isinstance(inputs, Tensor):
            if inputs.ndim < 2 or inputs.numel() == 0:
                raise ValueError(f"inputs: expected token ids [B, T], got a tensor of shape {list(inputs.shape)}")
            return list(inputs.split(self.batch_size))
        if not isinstance(inputs, Iterable) or isinstance(inputs, Mapping):
            raise TypeError(f"inputs: expected 'self', token ids or batches of inputs, got {type(inputs).__name__}")
        batches = list(inputs)
        if not batches:
            raise ValueError("inputs: expected at least one batch, got none")
        return batches

    def written_batches(self, model: Any, store: Store | None) -> list[Tensor]:
        """A text that ``model`` writes, as a list of batches. A stored text is reused."""
        text = None if store is None else store.tokens()
        if text is None:
            text = self_text.write(model, max(1, self.tokens // self.length), self.length, self.seed)
            if store is not None:
                store.save_tokens(text)
        return list(text.to(model.device).split(self.batch_size))
