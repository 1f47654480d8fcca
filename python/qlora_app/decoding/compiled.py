"""Compiled decoding: one token or a prompt per call, without the Python code of a model's layers.

The model's own forward over caches of fixed size is exported and compiled by AOTInductor twice: for one token, and for
the tokens of a prompt. The package contains only code and gets the weights when it is loaded, so one package serves
every adapter of the same shape. It is stored in the user's cache directory. Long prompts run eagerly.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from qlora_ext.output_head import causal_lm

from .packages import Code, CompilationError, Function, load_code, obstacle
from .step import (
    CACHE,
    MAX_CACHE,
    Step,
    attention_by,
    head_computed_by,
    new_caches,
    require_plain_attention,
    visible_tokens,
)

# From about this many tokens on, compiled decoding saves more time than compiling takes. For SmolLM2-135M's shapes on
# one core with AVX2, compiling takes 145 s, and each token 37 ms less.
BREAK_EVEN_TOKENS = 4000
CACHE_STEP = 64  # the capacity of caches, all of which attention reads, is a multiple of this many tokens
MAX_PROMPT = 512  # tokens of a compiled prompt; the Python code of a longer one takes a small part of its time

# The codes in a package.
TOKEN, PROMPT = "token", "prompt"


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention in float32. For one token these are sums that compile to a few loops: torch's own is far slower.

    Args:
        query: [1, H, T, D].
        key, value: [1, G, L, D], where G divides H.
        attention_mask: bool [1, 1, T, L], True for visible keys.

    Returns:
        [1, T, H, D] in query's dtype, the layout of transformers.
    """
    require_plain_attention(kwargs)
    _, heads, tokens, size = query.shape
    groups = key.shape[1]
    if tokens > 1:
        q, k, v = query.float(), key.float(), value.float()
        grouped = heads > groups
        out = nn.functional.scaled_dot_product_attention(q, k, v, attention_mask, scale=scaling, enable_gqa=grouped)
        return out.transpose(1, 2).to(query.dtype), None
    q = query.float().reshape(1, groups, heads // groups, 1, size) * (size**-0.5 if scaling is None else scaling)
    # as_strided forces Inductor to materialize q. Otherwise it recomputes q, including the sines and cosines of its
    # rotation, inside the loop over the keys.
    q = q.as_strided(q.shape, q.stride())
    scores = (q * key.float()[:, :, None]).sum(-1)  # [1, G, H / G, L]
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, -torch.inf)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    # Dividing at the end takes D divisions instead of L.
    y = (weights[..., None] * value.float()[:, :, None]).sum(-2) / weights.sum(-1, keepdim=True)
    return y.reshape(1, 1, heads, value.shape[3]).to(query.dtype), None


_ATTENTION = "qlora_ext_decoding"
AttentionInterface.register(_ATTENTION, _attend)


def _sums_in_float32(head: Any, x: Tensor) -> Tensor:
    """The output head for one token: a loop that is memory-bound, unlike torch's matmul."""
    logits = (x.float()[..., None, :] * head.weight.float()).sum(-1)
    y: Tensor = (logits if head.bias is None else logits + head.bias.float()).to(x.dtype)
    return y


class _OneSequence(nn.Module):
    """``Step`` of a single sequence, whose attention reads the whole capacity.

    From tokens [1, T] at consecutive positions [T] to the last one's logits [1, 1, V].
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.step = Step(model)

    def forward(self, tokens: Tensor, positions: Tensor, caches: list[Tensor]) -> Tensor:
        last = {"logits_to_keep": 1} if tokens.shape[1] > 1 else {}
        visible = visible_tokens(caches[0].shape[2], positions[None])
        logits: Tensor = self.step(tokens, positions[None], visible, caches, **last)
        return logits[:, None]


def keeps_last_logits(lm: Any) -> bool:
    """Whether the model can compute the logits of the last token alone."""
    return "logits_to_keep" in inspect.signature(lm.forward).parameters


@contextlib.contextmanager
def _functions(lm: Any, step: _OneSequence) -> Iterator[dict[str, Function]]:
    """``TOKEN`` and ``PROMPT`` of a model, to compile."""
    caches = new_caches(lm, CACHE_STEP)
    capacity = torch.export.Dim("room", min=2, max=MAX_CACHE)
    some = torch.export.Dim("tokens", min=2, max=MAX_PROMPT)
    functions: dict[str, Function] = {}
    for name, tokens in ((TOKEN, 1), (PROMPT, 8)):
        if name == PROMPT and not keeps_last_logits(lm):
            continue
        dynamic = ({1: some}, {0: some}) if tokens > 1 else (None, None)
        shapes = (*dynamic, [{2: capacity} for _ in caches])
        functions[name] = Function(step, (_integers([[0] * tokens]), _integers(range(tokens)), caches), shapes)
    with attention_by(lm, _ATTENTION), head_computed_by(lm, _sums_in_float32):
        yield functions


def load_decoding(model: Any, missing: bool = True, progress: Callable[[str], object] | None = None) -> Code | None:
    """The code of ``TOKEN`` and ``PROMPT`` for a model. The arguments are those of ``compile_decoding``."""
    lm = causal_lm(model)
    step = _OneSequence(lm)
    return load_code(model, step, _functions(lm, step), missing, progress)


def _integers(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device="cpu")


def _positions(first: int, end: int) -> Tensor:
    return torch.arange(first, end, dtype=torch.int64, device="cpu")


class Decoder:
    """Replaces a model's forward: reads single tokens and prompts with a package, and calls the original otherwise.

    The model keeps its ``DynamicCache``, whose tensors become views of the written part of larger caches. A decoder has
    one set of these caches. A conversation that continues after another one has begun gets new ones.

    Attributes:
        steps: the number of single tokens read so far.
        prompts: the number of prompts of several tokens read so far.
    """

    def __init__(self, lm: Any, code: Code) -> None:
        self.steps = self.prompts = 0
        self._code = code
        self._caches = new_caches(lm, CACHE_STEP)
        self._owner: Callable[[], DynamicCache | None] = lambda: None
        self._eager: Callable[..., Any] = lm.forward

        @functools.wraps(self._eager)  # transformers reads the signature
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._forward(*args, **kwargs)

        lm.forward = forward

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        tokens, cache = kwargs.get("input_ids"), kwargs.get(CACHE)
        if args or tokens is None or not isinstance(cache, DynamicCache) or not self._serves(tokens, cache, kwargs):
            return self._eager(*args, **kwargs)
        return CausalLMOutputWithPast(logits=self._read(tokens, cache), **{CACHE: cache})

    def _serves(self, tokens: Tensor, cache: DynamicCache, options: dict[str, Any]) -> bool:
        """Whether the package computes what a call asks for: the last logits of tokens that see all before them.

        It also has to ask for the adapters that were active when the model was compiled.
        """
        if tokens.dim() != 2 or tokens.shape[0] != 1 or 2 * len(cache.layers) != len(self._caches):
            return False
        if not self._code.is_current(fully=not self._holds(cache)):
            return False
        count, length = tokens.shape[1], cache.get_seq_length()
        if count != 1 and not (PROMPT in self._code and 1 < count <= MAX_PROMPT and options.get("logits_to_keep") == 1):
            return False
        if options.get("output_attentions") or options.get("output_hidden_states"):
            return False
        mask, positions = options.get("attention_mask"), options.get("position_ids")
        if mask is not None and (mask.shape != (1, length + count) or not bool(mask.all())):
            return False
        return positions is None or bool((positions == _positions(length, length + count)).all())

    def _read(self, tokens: Tensor, cache: Any) -> Tensor:
        length, count = cache.get_seq_length(), tokens.shape[1]
        end, layers = length + count, cache.layers
        if not self._holds(cache) or end > self._caches[0].shape[2]:
            self._take_over(cache, length, end)
        if count == 1:
            self.steps += 1
        else:
            self.prompts += 1
        run = self._code[TOKEN if count == 1 else PROMPT]
        logits = run([tokens, _positions(length, end), *self._caches])[0]
        for layer, keys, values in zip(layers, self._caches[: len(layers)], self._caches[len(layers) :], strict=True):
            if not layer.is_initialized:
                layer.update(keys[:, :, :0], values[:, :, :0])
            layer.keys, layer.values = keys[:, :, :end], values[:, :, :end]
        return logits

    def _holds(self, cache: DynamicCache) -> bool:
        """Whether the decoder's caches contain this cache."""
        first: Any = cache.layers[0]
        if not first.is_initialized or self._owner() is not cache:
            return False
        same: bool = first.keys.data_ptr() == self._caches[0].data_ptr()
        return same

    def _take_over(self, cache: DynamicCache, length: int, end: int) -> None:
        """Copies ``length`` tokens of a cache into caches for ``end`` tokens. Attention reads their whole capacity."""
        layers = cache.layers
        capacity = -(-end // CACHE_STEP) * CACHE_STEP
        if self._owner() not in (None, cache) or self._caches[0].shape[2] != capacity:
            self._caches = [t.new_zeros((1, t.shape[1], capacity, t.shape[3])) for t in self._caches]
        if length:
            written = [layer.keys for layer in layers] + [layer.values for layer in layers]
            for ours, theirs in zip(self._caches, written, strict=True):
                ours[:, :, :length] = theirs
        self._owner = weakref.ref(cache)


def compile_decoding(
    model: Any, missing: bool = True, progress: Callable[[str], object] | None = None
) -> Decoder | None:
    """Makes ``model`` decode with compiled code from now on.

    The code comes from the user's cache (``$XDG_CACHE_HOME`` or ``~/.cache``). If it is not there, it is compiled now,
    which takes about two minutes, and stored there. One package serves every adapter of the same shape.

    Args:
        model: a causal language model of transformers on the CPU, 4-bit or dense, with or without a LoRA adapter. It is
            put into evaluation mode.
        missing: whether to compile if the cache has no code for the model.
        progress: called with a message before and after the compilation.

    Returns:
        The decoder, or None if the cache has no code for the model and ``missing`` is False. The model is then
        unchanged.

    Raises:
        CompilationError: the model cannot be compiled (``obstacle``), or the compiler failed.

    Example:
        >>> from qlora_app.decoding import compile_decoding, prepare_to_answer
        >>> from transformers import AutoModelForCausalLM
        >>> def load(directory):
        ...     model = AutoModelForCausalLM.from_pretrained(directory)
        ...     compile_decoding(prepare_to_answer(model))
        ...     return model
    """
    why = obstacle(model)
    if why is not None:
        raise CompilationError(why)
    lm = causal_lm(model).eval()
    code = load_decoding(model, missing, progress)
    return None if code is None else Decoder(lm, code)
