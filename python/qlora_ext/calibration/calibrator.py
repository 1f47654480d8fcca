"""``Calibrator``: calibrates layers while they are quantized."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..form import Form
from ..formats import NF4
from ..sizes import parse_size
from ..untrusted import FileError, printable
from ..weight import Weight4bit
from .init_lora import InitLora, LowRank, keep_initial_lora, weighted
from .learning import BLOCK, BYTES_PER_WEIGHT, DISTILLED, MODEL, Schedule, learn
from .moments import ExpertMoments, Gathering, Moments
from .predictions import Predictions, head_of
from .settings import Calibration
from .stages import Stack, forward, stacks_of, without_cache
from .store import Store, StoredLayer
from .weighted_encoding import Encoded, Feedback, encode

# The second moments of one layer's inputs are K² floats. Layers of a block share one run up to this many bytes.
_TOGETHER_BYTES = 2 << 30
_REPORT = "_qlora_calibration"
_TOGETHER = "all layers"  # the group of the store with the codes that were learnt for the whole model


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
        self._head = head_of(model)
        self._together = self._learns_together()
        self._moments: dict[tuple[str, str], Moments | ExpertMoments] = {}
        self._feedback: tuple[Moments, Feedback] | None = None
        self._stacks = {name: Stack(name, blocks) for name, blocks in stacks_of(model, layers).items()}
        self._watch()
        self._groups = self._groups_of(list(layers))
        self._group: list[str] = []
        self._stored: dict[tuple[str, str], StoredLayer] | None = None  # of the group, if an earlier run finished it
        self._saved: list[tuple[str, str]] = []  # of the group
        # Dense and calibrated weights of the group, or of all layers if they are learnt together.
        self._learning: dict[str, tuple[Tensor, Weight4bit]] = {}
        self._predictions = None
        if self._together:
            with without_cache(model):
                self._predictions = Predictions(model, self._batches, [_token_mask(batch) for batch in self._batches])

    def _learns_together(self) -> bool:
        """Whether the layers are learnt together, as the model and the memory permit."""
        if not self.settings.distill or self._head is None:
            return False
        parameters = [p for layer in self._layers.values() for p in layer.parameters(recurse=False)]
        weights = sum(p.numel() for p in parameters if p.ndim == 2)  # those of experts, [E, N, K], are not learnt
        return BYTES_PER_WEIGHT * weights <= parse_size("distill_memory", self.settings.distill_memory)

    def _learns(self, name: str) -> bool:
        """Whether the codes of the layer ``name`` will be learnt."""
        if self._together:
            return self._layers[name] is not self._head
        return self._stored is None and self._place(name) is not None

    def _watch(self) -> None:
        """Runs the dense model once, to record how its blocks are called."""
        handles = [handle for stack in self._stacks.values() for handle in stack.watch()]
        try:
            self._run_model(lambda: None)
        finally:
            for handle in handles:
                handle.remove()
        for stack in self._stacks.values():
            stack.finish_watching(len(self._batches), self.settings.distill and not self._together)

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
        self._finish_group()
        self._group = self._groups[name]
        self._stored = None if self._store is None else self._store.finished(self._group[0])
        place = self._place(name)
        if self.settings.distill and not self._together and place is not None:
            stack, block = place
            with without_cache(self.model):
                while stack.dense_at <= block:
                    stack.advance_dense()
        if self._stored is None:
            self._gather(name)

    def _finish_group(self) -> None:
        """Marks the current group as finished in the store."""
        if self._learning and not self._together:
            self._learn_block()
        if self._store is not None and self._saved:
            self._store.finish(self._group[0], self._saved)
        self._saved = []

    def finish(self) -> None:
        """Ends the last group. With ``distill``, learns the codes of all layers if they are learnt together."""
        self._finish_group()
        if self._learning:
            self._learn_together()

    def _learn_block(self) -> None:
        """Learns the codes of the current group, whose modules have their calibrated weights now."""
        place = self._place(self._group[0])
        assert place is not None
        losses = place[0].losses([_token_mask(batch) for batch in self._batches])
        for name, w4 in self._learnt(self._group[0], losses, BLOCK).items():
            report = self._take(name, w4)
            if self._store is not None:
                self._store.save(name, "weight", w4, None, dataclasses.asdict(report))

    def _learn_together(self) -> None:
        """Learns the codes of all layers, or takes them from the store."""
        assert self._predictions is not None
        stored = None if self._store is None else self._store.finished(_TOGETHER)
        if stored is not None:
            for (name, weight), layer in stored.items():
                self._take(name, self._in_form_of(self._learning[name][1], name, weight, layer))
            self._learning = {}
            return
        found = self._learnt(_TOGETHER, self._predictions.losses(self.model), MODEL)
        for name, w4 in found.items():
            report = self._take(name, w4)
            if self._store is not None:
                self._store.save(name, _TOGETHER, w4, None, dataclasses.asdict(report))
        if self._store is not None and found:
            self._store.finish(_TOGETHER, [(name, _TOGETHER) for name in found])

    def _learnt(self, group: str, losses: Sequence[Callable[[], Tensor]], schedule: Schedule) -> dict[str, Weight4bit]:
        weights = {name: (self.model.get_submodule(name), *both) for name, both in self._learning.items()}
        self._learning = {}
        progress = None if self._store is None else self._store.progress(group)
        with without_cache(self.model):
            return learn(weights, losses, schedule, lambda at, of: self._tell(f"learning, step {at} of {of}"), progress)

    def _take(self, name: str, w4: Weight4bit) -> LayerReport:
        """Replaces the weight of the layer ``name`` by a learnt one."""
        if self._on_learnt is not None:
            self._on_learnt(name, w4)
        i = next(i for i, report in enumerate(self.report) if report.name == name)
        self.report[i] = dataclasses.replace(self.report[i], method=DISTILLED)
        return self.report[i]

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
        if self.settings.distill and w.ndim == 2 and report.tokens > 0 and self._learns(name):
            self._learning[name] = w.detach().clone(), w4
        if initial is not None:
            self._initial[name] = initial
        self.report.append(report)
        self._layers.pop(name, None)
        self._tell(name)
        return w4

    def _tell(self, now: str) -> None:
        if self.settings.progress is not None:
            done = len(self.report)
            self.settings.progress(done, done + len(self._layers), now)

    def _from_store(self, name: str, weight: str, plain: Weight4bit) -> tuple[Weight4bit, LowRank | None, LayerReport]:
        assert self._store is not None
        assert self._stored is not None
        stored = self._stored.pop((name, weight), None)
        w4 = self._in_form_of(plain, name, weight, stored)
        assert stored is not None
        lora = (
            None if stored.initial is None else (stored.initial[0].to(plain.device), stored.initial[1].to(plain.device))
        )
        return w4, lora, LayerReport(**stored.report)

    def _in_form_of(self, plain: Weight4bit, name: str, weight: str, stored: StoredLayer | None) -> Weight4bit:
        assert self._store is not None
        w4 = None if stored is None else stored.in_form_of(plain)
        if w4 is None:
            raise FileError(
                f"directory: {printable(self._store.path)} has no {name}/{weight} in this model's form; "
                "delete that directory to start over"
            )
        return w4

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
