"""One token for each sequence of a batch whose lengths differ: the step that ``BatchDecoder`` repeats.

Each sequence has a slot in caches [slots, H, capacity, D]. A step of B sequences uses the first B slots:

    slot 0   [ t t t t t t t t n . . . | . . . . ]    t: tokens of the sequence
    slot 1   [ t t t n . . . . . . . . | . . . . ]    n: the token of this step
    slot 2   [ t t t t t t n . . . . . | . . . . ]
               <-------- span ------->   capacity

Attention reads the span: the longest sequence, rounded up.
"""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import AttentionInterface, StaticCache
from transformers.cache_utils import StaticLayer

from . import compiled
from .compiled import CACHE, MAX_CACHE, attention_over_caches, head_computed_by, new_caches, require_plain_attention
from .packages import Code, Function, causal_lm, compile_package, digest, load_code, state_of

SPAN_STEP = 64  # a multiple of the vectors of every processor, so that the order of attention's sums is always the same
STEP = "step"
# Of a product. With fewer, torch on x86-64 adds in another order than for a whole sequence, as in training.
_LEAST_ROWS = 4
_MAX_SEQUENCES = 1 << 16


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


class _Rows(StaticLayer):  # type: ignore[misc,unused-ignore]
    """A layer's keys and values. Row b gets its token at ``positions[b]``, and attention reads ``span`` tokens."""

    def __init__(self, keys: Tensor, values: Tensor, positions: Tensor, span: int) -> None:
        super().__init__(span)
        self.keys, self.values, self.positions = keys, values, positions.to(keys.device)
        self.rows = torch.arange(positions.shape[0], dtype=torch.int64, device=keys.device)
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys[self.rows, :, self.positions] = key_states[:, :, 0]
        self.values[self.rows, :, self.positions] = value_states[:, :, 0]
        return self.keys[:, :, : self.max_cache_len], self.values[:, :, : self.max_cache_len]

    def get_mask_sizes(self, *_: Any, **__: Any) -> tuple[int, int]:
        return self.max_cache_len, 0

    def get_seq_length(self, *_: Any, **__: Any) -> Tensor:
        return self.positions[0]


class BatchStep(nn.Module):
    """From one token of each sequence to the logits [B, V] of the next ones. Writes to the caches."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, tokens: Tensor, positions: Tensor, visible: Tensor, caches: list[Tensor], **options: Any
    ) -> Tensor:
        """Reads a token of each sequence.

        Args:
            tokens, positions: int64 [B]. A position is the number of tokens before.
            visible: bool [B, span]: the tokens that attention sees, which include the one at the row's position.
            caches: each [B, H, capacity, D]: the keys of all layers, then the values.
            options: for the model's forward.
        """
        half, span, config = len(caches) // 2, visible.shape[1], self.model.config
        cache = StaticCache(config, max_cache_len=span)
        pairs = zip(caches[:half], caches[half:], strict=True)
        cache.layers = [_Rows(keys, values, positions, span) for keys, values in pairs]
        mask = visible[:, None, None]
        if config._attn_implementation != "sdpa":  # "eager" adds the mask to the scores
            dtype = caches[0].dtype
            mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
        options |= {"attention_mask": mask, "position_ids": positions[:, None], "use_cache": True, CACHE: cache}
        lm = causal_lm(self.model)
        with attention_over_caches(lm, _ATTENTION) if lm.device.type == "cpu" else contextlib.nullcontext():
            logits: Tensor = self.model(input_ids=tokens[:, None], **options).logits
        return logits[:, -1]


def _linear_dense(head: Any, x: Tensor) -> Tensor:
    """A dense output head of 16 bits in float32: torch's product takes several times longer."""
    bias = None if head.bias is None else head.bias.float()
    y: Tensor = torch.ops.qlora.linear_dense(x.float(), head.weight, bias).to(x.dtype)
    return y


def step_arguments(lm: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Examples of the arguments of ``BatchStep``, and which of their sizes are dynamic."""
    tokens, positions = (torch.tensor([0, 1, 2], dtype=torch.int64, device="cpu") for _ in range(2))
    visible = torch.ones((3, SPAN_STEP), dtype=torch.bool, device="cpu")
    caches = new_caches(lm, 4 * SPAN_STEP, 3)  # another size than that of visible, so that both stay dynamic
    sequences = Dim("sequences", min=2, max=_MAX_SEQUENCES)
    span, capacity = (Dim(name, min=2, max=MAX_CACHE) for name in ("span", "room"))
    shapes = ({0: sequences}, {0: sequences}, {0: sequences, 1: span}, [{0: sequences, 2: capacity} for _ in caches])
    return (tokens, positions, visible, caches), shapes


def compile_step(
    lm: Any, name: str, step: nn.Module, arguments: tuple[Any, ...], shapes: tuple[Any, ...], package: pathlib.Path
) -> None:
    """Compiles a step of ``lm`` with the output head of batches."""
    with head_computed_by(lm, _linear_dense, (torch.bfloat16, torch.float16)):
        compile_package({name: Function(step, arguments, shapes)}, package)


def load_step(model: Any, progress: Callable[[str], object] | None = None) -> Code:
    """The code of ``STEP`` for a model, which is compiled if it is not in the user's cache.

    Raises:
        CompilationError: the compiler failed.
    """
    lm = causal_lm(model)
    step = BatchStep(lm)
    name = digest(model, state_of(step), [__file__, compiled.__file__])
    code = load_code(
        name, step, lambda package: compile_step(lm, STEP, step, *step_arguments(lm), package), progress=progress
    )
    assert code is not None
    return code
