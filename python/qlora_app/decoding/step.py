"""The step of decoding: tokens of sequences go in, keys and values into caches, and logits come out.

All steps have one layout of caches, [slots, H, capacity, D] per layer. A step of B sequences uses the first B slots:

    slot 0   [ t t t t t t t t n . . . | . . . . ]    t: tokens of the sequence
    slot 1   [ t t t n . . . . . . . . | . . . . ]    n: the token of this step
    slot 2   [ t t t t t t n . . . . . | . . . . ]
               <-------- span ------->   capacity

Attention reads the span: the longest sequence, rounded up. A step of a batch is a ``DecodeStep``: the model's own
forward (``EagerStep``), compiled code (``CompiledStep``, and ``MixedStep`` in ``mixed.py``), or CUDA graphs
(``graphs.py``). ``compiled.py`` has the step of a single sequence.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import AttentionInterface, DynamicCache, StaticCache
from transformers.cache_utils import StaticLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from qlora_ext.nn import Linear16bit
from qlora_ext.output_head import causal_lm

from .packages import Function, attention_windows, load_code

# The keyword of transformers for a model's KV cache: "cache" in newer versions.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
MAX_CACHE = 1 << 30
SPAN_STEP = 64  # a multiple of the vectors of every processor, so that the order of attention's sums is always the same
STEP = "step"
# Of a product. With fewer, torch on x86-64 adds in another order than for a whole sequence, as in training.
_LEAST_ROWS = 4
SEQUENCES = Dim("sequences", min=2, max=1 << 16)


def require_plain_attention(options: dict[str, Any]) -> None:
    """Raises a NotImplementedError if transformers' ``options`` ask for more than scaled dot-product attention."""
    if any(options.get(name) is not None for name in ("softcap", "s_aux", "position_bias")):
        raise NotImplementedError("its attention is not plain scaled dot-product attention")


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one token per sequence. The heads that share keys become rows of one product.

    Args:
        query: [B, H, 1, D].
        key, value: [B, G, L, D], where G divides H.
        attention_mask: bool [B, 1, 1, L], True for visible keys.

    Returns:
        [B, 1, H, D], the layout of transformers.
    """
    require_plain_attention(kwargs)
    batch, heads, _, size = query.shape
    groups = key.shape[1]
    count = heads // groups
    rows = nn.functional.pad(query.reshape(batch, groups, count, size), (0, 0, 0, max(_LEAST_ROWS - count, 0)))
    y = nn.functional.scaled_dot_product_attention(rows, key, value, attention_mask, scale=scaling)[:, :, :count]
    return y.reshape(batch, 1, heads, value.shape[3]), None


_ATTENTION = "qlora_ext_batch"
AttentionInterface.register(_ATTENTION, _attend)


@contextlib.contextmanager
def attention_by(lm: Any, name: str) -> Iterator[None]:
    """Replaces torch's SDPA by the implementation ``name``. Other attention implementations are kept."""
    usual = lm.config._attn_implementation
    if usual != "sdpa":
        yield
        return
    lm.set_attn_implementation(name)
    try:
        yield
    finally:
        lm.set_attn_implementation(usual)


@contextlib.contextmanager
def head_computed_by(
    lm: Any, forward: Callable[[Any, Tensor], Tensor], dtypes: Sequence[torch.dtype] | None = None
) -> Iterator[None]:
    """Replaces the forward of a plain dense output head by ``forward(head, x)``. Other heads are kept.

    Args:
        dtypes: of the weights of the heads that are replaced; None for all.
    """
    head: Any = lm.get_output_embeddings()
    is_plain = type(head) in (nn.Linear, Linear16bit) and "forward" not in vars(head)
    if not is_plain or (dtypes is not None and head.weight.dtype not in dtypes):
        yield
        return
    head.forward = functools.partial(forward, head)
    try:
        yield
    finally:
        del head.forward


def new_caches(lm: Any, capacity: int, sequences: int = 1) -> list[Tensor]:
    """Keys of all layers, then values, each [``sequences``, H, ``capacity``, D], as the model itself makes them."""
    cache = DynamicCache(config=lm.config)
    with torch.no_grad():
        lm(input_ids=torch.zeros((1, 1), dtype=torch.int64, device=lm.device), use_cache=True, **{CACHE: cache})
    made = [layer.keys for layer in cache.layers] + [layer.values for layer in cache.layers]
    return [t.new_zeros((sequences, t.shape[1], capacity, t.shape[3])) for t in made]


class _Slots(StaticLayer):  # type: ignore[misc,unused-ignore]
    """A layer's keys and values. Row b gets its tokens at ``positions[b]``, and attention reads ``span`` tokens."""

    def __init__(self, keys: Tensor, values: Tensor, rows: Tensor, positions: Tensor, span: int) -> None:
        super().__init__(span)
        self.keys, self.values, self.rows, self.positions = keys, values, rows, positions.to(keys.device)
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys[self.rows, :, self.positions] = key_states.transpose(1, 2)
        self.values[self.rows, :, self.positions] = value_states.transpose(1, 2)
        return self.keys[:, :, : self.max_cache_len], self.values[:, :, : self.max_cache_len]

    def get_mask_sizes(self, *_: Any, **__: Any) -> tuple[int, int]:
        return self.max_cache_len, 0

    def get_seq_length(self, *_: Any, **__: Any) -> Tensor:
        return self.positions[0, 0]


class Step(nn.Module):
    """From tokens of each sequence to the logits [B, V] of the next ones. Writes to the caches."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, tokens: Tensor, positions: Tensor, visible: Tensor, caches: list[Tensor], **options: Any
    ) -> Tensor:
        """Reads tokens of each sequence.

        Args:
            tokens, positions: int64 [B, T]. A position is the number of tokens before.
            visible: bool [B, T, span]: the tokens that attention sees, which include those at the row's positions.
            caches: each [B, H, capacity, D]: the keys of all layers, then the values.
            options: for the model's forward.
        """
        half, span, config = len(caches) // 2, visible.shape[2], self.model.config
        rows = torch.arange(tokens.shape[0], dtype=torch.int64, device=tokens.device)[:, None]
        cache = StaticCache(config, max_cache_len=span)
        pairs = zip(caches[:half], caches[half:], strict=True)
        cache.layers = [_Slots(keys, values, rows.to(keys.device), positions, span) for keys, values in pairs]
        windows = attention_windows(config)
        masks = {kind: self._mask(visible, positions, window, caches[0].dtype) for kind, window in windows.items()}
        mask = masks if len(masks) > 1 else masks.popitem()[1]
        options |= {"attention_mask": mask, "position_ids": positions, "use_cache": True, CACHE: cache}
        logits: Tensor = self.model(input_ids=tokens, **options).logits
        return logits[:, -1]

    def _mask(self, visible: Tensor, positions: Tensor, window: int | None, dtype: torch.dtype) -> Tensor:
        """The mask [B, 1, T, span] of attention that sees the last ``window`` visible tokens, or all."""
        if window is not None:
            visible = visible & ~visible_tokens(visible.shape[2], positions - window)
        mask = visible[:, None]
        if self.model.config._attn_implementation != "eager":
            return mask
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)  # added to the scores


class DecodeStep(Protocol):
    """A way to compute a step of a batch."""

    def __call__(self, tokens: list[int], positions: list[int], options: dict[str, Any]) -> Tensor | None:
        """Reads a token of each of the first sequences.

        Args:
            options: of the model's forward: ``adapter_names``, or none if all sequences use the active adapters.

        Returns:
            The logits [B, V], or None if this way does not compute what the model does now.
        """


def step_inputs(
    tokens: list[int], positions: list[int], caches: Sequence[Tensor], device: torch.device | str = "cpu"
) -> list[Any]:
    """The arguments of ``Step`` for one token per sequence: int64 [B, 1], int64 [B, 1], bool [B, 1, span], caches."""
    span = -(-(max(positions) + 1) // SPAN_STEP) * SPAN_STEP
    read, at = (torch.tensor(each, dtype=torch.int64, device=device)[:, None] for each in (tokens, positions))
    return [read, at, visible_tokens(span, at), [cache[: len(tokens)] for cache in caches]]


def visible_tokens(span: int, positions: Tensor) -> Tensor:
    """The tokens of a span that tokens at ``positions`` see: those before, and themselves."""
    return torch.arange(span, dtype=torch.int64, device=positions.device) <= positions[..., None]


class EagerStep:
    """Steps by the model's own forward."""

    def __init__(self, model: Any, caches: Sequence[Tensor]) -> None:
        self._model, self._lm, self._caches = model, causal_lm(model), caches

    def __call__(self, tokens: list[int], positions: list[int], options: dict[str, Any]) -> Tensor:
        return self.compute(*step_inputs(tokens, positions, self._caches, self._lm.device), **options)

    def compute(self, *arguments: Any, **options: Any) -> Tensor:
        """``Step`` with one token per sequence, on the CPU with attention whose sums have the order of training."""
        step = Step(self._model if options else self._lm)
        with attention_by(self._lm, _ATTENTION) if self._lm.device.type == "cpu" else contextlib.nullcontext():
            logits: Tensor = step(*arguments, **options)
        return logits


class CompiledStep:
    """Steps by compiled code, for the adapters that were active when it was loaded."""

    def __init__(self, model: Any, caches: Sequence[Tensor], progress: Callable[[str], object] | None = None) -> None:
        lm, self._caches = causal_lm(model), caches
        step = Step(lm)
        code = load_code(model, step, compiled_as(lm, STEP, step), progress=progress)
        assert code is not None
        self._code = code

    def __call__(self, tokens: list[int], positions: list[int], options: dict[str, Any]) -> Tensor | None:
        if options or not self._code.is_current():
            return None
        *read, caches = step_inputs(tokens, positions, self._caches)
        return self._code[STEP]([*read, *caches])[0]


def _linear_dense(head: Any, x: Tensor) -> Tensor:
    """A dense output head of 16 bits in float32: torch's product takes several times longer."""
    bias = None if head.bias is None else head.bias.float()
    y: Tensor = torch.ops.qlora.linear_dense(x.float(), head.weight, bias).to(x.dtype)
    return y


@contextlib.contextmanager
def compiled_as(
    lm: Any, name: str, step: nn.Module, more: Sequence[Any] = (), shapes: Sequence[Any] = ()
) -> Iterator[dict[str, Function]]:
    """A step of one token per sequence to compile, with the output head and the attention of batches.

    Args:
        more, shapes: examples of arguments that ``step`` has beside those of ``Step``, and their dynamic sizes.
    """
    caches = new_caches(lm, 4 * SPAN_STEP, 3)  # another size than that of visible, so that both stay dynamic
    span, capacity = (Dim(name, min=2, max=MAX_CACHE) for name in ("span", "room"))
    usual = ({0: SEQUENCES}, {0: SEQUENCES}, {0: SEQUENCES, 2: span}, [{0: SEQUENCES, 2: capacity} for _ in caches])
    arguments = step_inputs([0, 1, 2], [0, 1, 2], caches)
    with attention_by(lm, _ATTENTION), head_computed_by(lm, _linear_dense, (torch.bfloat16, torch.float16)):
        yield {name: Function(step, (*arguments, *more), (*usual, *shapes))}
