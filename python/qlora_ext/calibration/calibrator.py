"""``Calibration``: the settings of a calibration; ``Calibrator``: applies them while layers are quantized."""

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
from ..formats import NF4
from ..untrusted import FileError, printable
from ..weight import Weight4bit
from . import self_text
from .init_lora import InitLora, LowRank, keep_initial_lora, weighted
from .learning import DISTILLED, learn
from .moments import ExpertMoments, Gathering, Moments
from .stages import Stack, forward, stacks_of, without_cache
from .store import Store, StoredLayer
from .weighted_encoding import Encoded, Feedback, encode

# The second moments of one layer's inputs are K² floats. Layers of a block share one run up to this many bytes.
_TOGETHER_BYTES = 2 << 30
_REPORT = "_qlora_calibration"


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """How one weight was encoded.

    Attributes:
        name: of the module, followed by the name of the weight if the module has several.
        method: "feedback", "scales", "absmax", or "distilled" if the codes were learnt after that.
        error, absmax_error: relative error of the outputs on the calibration's tokens, and the same if it were plain.
        tokens: number of tokens that reached the layer.
        note: why the layer is plain, if it could not be calibrated; else empty.
    """

    name: str
    method: str
    error: float
    absmax_error: float
    tokens: int
    note: str = ""


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
        distill: after calibrating a block, learn the codes of its linear layers, so that its outputs become those of
            the dense model. Each batch is a step of the optimizer, so batches should be small.
        directory: stores finished layers, so that an interrupted calibration can resume.
        progress: called with the number of finished weights, the number of all weights, and the last layer's name.

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
    directory: str | os.PathLike[str] | None = None
    progress: Callable[[int, int, str], None] | None = None

    def __post_init__(self) -> None:
        if self.method not in ("feedback", "scales"):
            raise ValueError(f"method: expected 'feedback' or 'scales', got {self.method!r}")
        if isinstance(self.inputs, str) and self.inputs != "self":
            raise ValueError(f"inputs: expected 'self', token ids or batches of inputs, got {self.inputs!r}")
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping: expected a fraction above 0 and at most 1, got {self.damping}")
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
            key |= {"distill": True, "batch_size": self.batch_size}
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


def calibration_of(model: nn.Module) -> list[LayerReport]:
    """How each weight of ``model`` was encoded; empty if ``quantize_model`` got no calibration.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32))
        >>> model = qlora_ext.quantize_model(model, calibration=[torch.randn(512, 64)])
        >>> all(layer.error < layer.absmax_error for layer in qlora_ext.calibration.calibration_of(model))
        True
    """
    return list(getattr(model, _REPORT, ()))


class Calibrator:
    """Refines layers while they are quantized, in the order of the model.

    As in GPTQ, the layers of a block are calibrated on the outputs of the preceding quantized blocks. Only one block's
    inputs and second moments are in memory.

    Args:
        model: dense.
        layers: the layers that will be quantized, by name, in the order of the calls of ``refine``.
        calibration: the settings.
        form, compute_dtype: of the 4-bit layers.
        init_lora: also compute initial adapters; experts get none.
        on_learnt: gets the names and weights that replace some results of ``refine`` with ``distill``.

    Raises:
        ValueError: there is nothing to quantize, the form has more than 4 bits, or ``init_lora`` has more than one
            iteration.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        calibration: Calibration,
        form: Form,
        compute_dtype: torch.dtype | None,
        init_lora: InitLora | None = None,
        on_learnt: Callable[[str, Weight4bit], object] | None = None,
    ) -> None:
        if not layers:
            raise ValueError("calibration: expected a model with dense layers to quantize, found none")
        if form.bits > 4:
            raise ValueError(f"calibration: expected a form of 4 bits, got {form}, whose error is small without it")
        if init_lora is not None and calibration.distill:
            raise ValueError("init_lora: expected none with distill, which changes the weights that it would fit")
        if init_lora is not None and init_lora.iterations > 1:
            raise ValueError("iterations: expected 1 with a calibration, which does not refit weights to adapters")
        self._init_lora, self._on_learnt = init_lora, on_learnt
        self._initial = keep_initial_lora(model)
        self.model, self.settings = model, calibration
        self.report: list[LayerReport] = []
        vars(model)[_REPORT] = self.report
        self._layers = dict(layers)
        given = calibration.given_batches()
        self._store = None
        if calibration.directory is not None:
            self._store = Store(
                calibration.directory, calibration.key(model, layers, form, compute_dtype, given, init_lora)
            )
        self._batches = given or calibration.written_batches(model, self._store)
        self._moments: dict[tuple[str, str], Moments | ExpertMoments] = {}
        self._feedback: tuple[Moments, Feedback] | None = None
        self._stacks = {name: Stack(name, blocks) for name, blocks in stacks_of(model, layers).items()}
        self._watch()
        self._groups = self._groups_of(list(layers))
        self._group: list[str] = []
        self._stored: dict[tuple[str, str], StoredLayer] | None = None  # of the group, if an earlier run finished it
        self._saved: list[tuple[str, str]] = []  # of the group
        self._learning: dict[str, tuple[Tensor, Weight4bit]] = {}  # of the group: dense and calibrated weights

    def _watch(self) -> None:
        """Runs the dense model once, to record how its blocks are called."""
        handles = [handle for stack in self._stacks.values() for handle in stack.watch()]
        try:
            self._run_model(lambda: None)
        finally:
            for handle in handles:
                handle.remove()
        for stack in self._stacks.values():
            stack.finish_watching(len(self._batches), self.settings.distill)

    @torch.no_grad()
    def _run_model(self, before_batch: Callable[[], None]) -> None:
        with without_cache(self.model):
            for batch in self._batches:
                before_batch()
                forward(self.model, batch)

    def _place(self, name: str) -> tuple[Stack, int] | None:
        """The stack and the number of the block that contains the layer ``name``; None if no chained stack does."""
        for stack in self._stacks.values():
            if stack.chained and name.startswith(f"{stack.name}."):
                return stack, int(name.removeprefix(f"{stack.name}.").split(".")[0])
        return None

    def _groups_of(self, names: Sequence[str]) -> dict[str, list[str]]:
        """For each layer, the layers whose moments are gathered in the same run: one block's, as memory permits."""
        groups: dict[str, list[str]] = {}
        group: list[str] = []
        size, place = 0, None
        for name in names:
            bytes_ = _moments_bytes(self._layers[name])
            if self._place(name) != place or size + bytes_ > _TOGETHER_BYTES:
                group, size, place = [], 0, self._place(name)
            group.append(name)
            size += bytes_
            groups[name] = group
        return groups

    def _enter_group(self, name: str) -> None:
        """Starts the group of the layer ``name``. Finished groups come from the store, others gather moments.

        An unfinished group is repeated from its start, because all its moments come from a run with the group dense.
        """
        self.finish()
        self._group = self._groups[name]
        self._stored = None if self._store is None else self._store.finished(self._group[0])
        place = self._place(name)
        if self.settings.distill and place is not None:
            stack, block = place
            with without_cache(self.model):
                while stack.dense_at <= block:
                    stack.advance_dense()
        if self._stored is None:
            self._gather(name)

    def finish(self) -> None:
        """Marks the current group as finished in the store."""
        if self._learning:
            self._learn()
        if self._store is not None and self._saved:
            self._store.finish(self._group[0], self._saved)
        self._saved = []

    def _learn(self) -> None:
        """Learns the codes of the current group, whose modules have their calibrated weights now."""
        place = self._place(self._group[0])
        assert place is not None
        stack, weights = place[0], {n: (self.model.get_submodule(n), *both) for n, both in self._learning.items()}
        self._learning = {}
        with without_cache(self.model):
            found = learn(weights, stack.losses([_token_mask(batch) for batch in self._batches]))
        for name, w4 in found.items():
            if self._on_learnt is not None:
                self._on_learnt(name, w4)
            i = next(i for i, report in enumerate(self.report) if report.name == name)
            self.report[i] = dataclasses.replace(self.report[i], method=DISTILLED)
            if self._store is not None:
                self._store.save(name, "weight", w4, None, dataclasses.asdict(self.report[i]))

    def _gather(self, name: str) -> None:
        gathering = Gathering({other: self._layers[other] for other in self._group}, map(_token_mask, self._batches))
        place = self._place(name)
        try:
            if place is None:
                self._run_model(gathering.next_batch)
            else:
                stack, block = place
                with without_cache(self.model):
                    while stack.at < block:
                        stack.advance()
                    stack.run(gathering.next_batch)
        finally:
            gathering.stop()
        self._moments = gathering.found

    def refine(self, name: str, weight: str, w: Tensor, plain: Weight4bit) -> Weight4bit:
        """The calibrated weight ``weight`` of the layer ``name``.

        Args:
            w: the dense weight, [N, K] or a stack of such matrices [E, N, K].
            plain: ``w`` quantized without calibration. The result has the same form.
        """
        if self._groups[name] is not self._group:
            self._enter_group(name)
        if self._stored is not None:
            w4, initial, report = self._from_store(name, weight, plain)
        else:
            moments = self._moments.pop((name, weight), None)
            w4, report = self._encoded(name, w, plain, moments)
            initial = self._initial_lora(w, w4, moments) if weight == "weight" else None
            if weight != "weight":
                report = dataclasses.replace(report, name=f"{name}.{weight}")
            if self._store is not None:
                self._store.save(name, weight, w4, initial, vars(report))
                self._saved.append((name, weight))
            if self.settings.distill and w.ndim == 2 and self._place(name) is not None:
                self._learning[name] = w.detach().clone(), w4
        if initial is not None:
            self._initial[name] = initial
        self.report.append(report)
        self._layers.pop(name, None)
        if self.settings.progress is not None:
            done = len(self.report)
            self.settings.progress(done, done + len(self._layers), name)
        return w4

    def _from_store(self, name: str, weight: str, plain: Weight4bit) -> tuple[Weight4bit, LowRank | None, LayerReport]:
        assert self._store is not None
        assert self._stored is not None
        stored = self._stored.pop((name, weight), None)
        w4 = None if stored is None else stored.in_form_of(plain)
        if stored is None or w4 is None:
            raise FileError(
                f"directory: {printable(self._store.path)} has no {name}/{weight} in this model's form; "
                "delete that directory to start over"
            )
        lora = (
            None if stored.initial is None else (stored.initial[0].to(plain.device), stored.initial[1].to(plain.device))
        )
        return w4, lora, LayerReport(**stored.report)

    def _initial_lora(self, w: Tensor, w4: Weight4bit, moments: Moments | ExpertMoments | None) -> LowRank | None:
        if self._init_lora is None:
            return None
        known = self._feedback is not None and self._feedback[0] is moments
        return weighted(w, w4, self._feedback[1] if self._feedback and known else None, self._init_lora)

    def _encoded(
        self, name: str, w: Tensor, plain: Weight4bit, moments: Moments | ExpertMoments | None
    ) -> tuple[Weight4bit, LayerReport]:
        if moments is None:
            return plain, LayerReport(name, "absmax", 0.0, 0.0, 0, "no token reached it")
        if isinstance(moments, Moments):
            return self._matrix(name, w, plain, moments)
        parts = [self._matrix(name, w[e], plain.matrix(e), moments.of(e)) for e in range(len(w))]
        methods = [report.method for _, report in parts]
        others = [f"{methods.count(m)} experts by {m}" for m in ("scales", "absmax") if m in methods]
        report = LayerReport(
            name,
            max(set(methods), key=methods.count),
            max(report.error for _, report in parts),
            max(report.absmax_error for _, report in parts),
            moments.all.tokens,
            "; ".join(others),
        )
        return Weight4bit.stack([w4 for w4, _ in parts]), report

    def _matrix(self, name: str, w: Tensor, plain: Weight4bit, moments: Moments) -> tuple[Weight4bit, LayerReport]:
        mean = moments.mean
        try:
            if self._feedback is None or self._feedback[0] is not moments:
                with_factor = self.settings.method == "feedback"
                self._feedback = moments, Feedback.of(mean, self.settings.damping, with_factor)
        except ValueError as error:
            return plain, LayerReport(name, "absmax", 0.0, 0.0, moments.tokens, str(error))
        feedback = self._feedback[1]
        encoded = encode(w, mean, feedback, plain)
        return encoded.weight, LayerReport(
            name, encoded.method, encoded.error, encoded.absmax_error, moments.tokens, self._note(encoded, feedback)
        )

    def _note(self, encoded: Encoded, feedback: Feedback) -> str:
        if feedback.factor is None and self.settings.method == "feedback":
            return "its inputs' second moments cannot be factorized"
        plain = "plain NF4" if encoded.weight.code == NF4 else "the format's own recipe"
        return f"{plain} was the best on its inputs" if encoded.method == "absmax" else ""


def _token_mask(batch: Any) -> Tensor | None:
    """Which tokens of a batch are not padding, bool [B, T]; None if the batch has no attention mask."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None


def _moments_bytes(layer: nn.Module) -> int:
    """An upper bound for the size of the second moments of the inputs of ``layer``."""
    matrices = [p for p in layer.parameters(recurse=False) if p.ndim >= 2]
    return sum(4 * max(p.shape[-2:]) ** 2 * (p.shape[0] if p.ndim == 3 else 1) for p in matrices)
