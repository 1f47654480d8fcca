"""Compiled decoding: one token or a prompt per call, without the Python code of a model's layers.

The model's own forward over caches of fixed size is exported and compiled by AOTInductor twice: for one token, and for
the tokens of a prompt. The package contains only code and gets the weights when it is loaded, so one package serves
every adapter of the same shape. It is stored in the user's cache directory. Long prompts run eagerly.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import json
import os
import pathlib
import platform
import shutil
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor.package.package import package_aoti
from torch._ops import OpOverload
from torch.export.pt2_archive._package import load_pt2
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer
from transformers.masking_utils import sdpa_mask
from transformers.modeling_outputs import CausalLMOutputWithPast

from .._internal.untrusted import first_line
from .._internal.version import VERSION
from .._library import link_compiled_code
from ..nn import Linear16bit
from .cache import clean, directory, is_complete, written

# The keyword of transformers for a model's KV cache: "cache" in newer versions.
_CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
# From about this many tokens on, compiled decoding saves more time than compiling takes. For SmolLM2-135M's shapes on
# one core with AVX2, compiling takes 145 s, and each token 37 ms less.
BREAK_EVEN_TOKENS = 4000
_CACHE_STEP = 64  # the capacity of caches, all of which attention reads, is a multiple of this many tokens
_MAX_CACHE = 1 << 30
_MAX_PROMPT = 512  # tokens of a compiled prompt; the Python code of a longer one takes a small part of its time
_C_TYPES = {
    "Tensor": "AtenTensorHandle",
    "Optional[Tensor]": "const AtenTensorHandle*",
    "int": "int64_t",
    "float": "double",
    "str": "const char*",
}


def _c_declaration(operator: OpOverload) -> str:
    """Declares the operator's C function (cpp/ops/c_shims.cpp). It follows from the schema by AOTInductor's rules."""
    schema = operator._schema
    types = [_C_TYPES[str(argument.type)] for argument in schema.arguments] + ["AtenTensorHandle*"]
    name = schema.name.rpartition(":")[2]
    return f"AOTITorchError (*const aoti_torch_cpu_{name})({', '.join(types)})"


# The codes in a package.
_TOKEN, _PROMPT = "token", "prompt"

_OPTIONS = {
    # The package contains no weights, not even as constants in the code, so it serves every adapter of the same shape.
    "aot_inductor.package_constants_in_so": False,
    "always_keep_tensor_constants": True,
    "aot_inductor.custom_ops_to_c_shims": {
        torch.ops.qlora.linear_nf4.default: [_c_declaration(torch.ops.qlora.linear_nf4.default)]
    },
}


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
    if any(kwargs.get(name) is not None for name in ("softcap", "s_aux", "position_bias")):
        raise NotImplementedError("its attention is not plain scaled dot-product attention")
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


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The mask that ``_attend`` takes, which a cache of fixed size always needs."""
    mask: Tensor | None = sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})
    return mask


_ATTENTION = "qlora_ext_decoding"
AttentionInterface.register(_ATTENTION, _attend)
AttentionMaskInterface.register(_ATTENTION, _mask)


@contextlib.contextmanager
def _attention_over_caches(lm: Any) -> Iterator[None]:
    """Replaces torch's SDPA by ``_attend``. Other attention implementations are kept."""
    usual = lm.config._attn_implementation
    if usual != "sdpa":
        yield
        return
    lm.set_attn_implementation(_ATTENTION)
    try:
        yield
    finally:
        lm.set_attn_implementation(usual)


@contextlib.contextmanager
def _head_of_one_token(lm: Any) -> Iterator[None]:
    """Computes the dense output head as sums in float32: a loop that is memory-bound, unlike torch's matmul."""
    head: Any = lm.get_output_embeddings()
    is_plain = type(head) in (nn.Linear, Linear16bit) and "forward" not in vars(head)
    if not is_plain:
        yield
        return

    def forward(x: Tensor) -> Tensor:
        logits = (x.float()[..., None, :] * head.weight.float()).sum(-1)
        y: Tensor = (logits if head.bias is None else logits + head.bias.float()).to(x.dtype)
        return y

    head.forward = forward
    try:
        yield
    finally:
        del head.forward


class _Slots(StaticLayer):  # type: ignore[misc,unused-ignore]
    """A layer of a static cache, to which tokens are added at ``positions`` (int64 [T])."""

    def __init__(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        super().__init__(keys.shape[2])
        self.keys, self.values, self.positions = keys, values, positions
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self.positions, key_states)
        self.values.index_copy_(2, self.positions, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, *_: Any, **__: Any) -> tuple[int, int]:
        return self.keys.shape[2], 0

    def get_seq_length(self, *_: Any, **__: Any) -> Tensor:
        return self.positions[0]


class _Step(nn.Module):
    """From tokens [1, T] at consecutive positions [T] to the last one's logits [1, 1, V]. Writes to the caches.

    The caches, each [1, H, L, D], are one list: the keys of all layers, then the values.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, positions: Tensor, caches: list[Tensor]) -> Tensor:
        half = len(caches) // 2
        cache = StaticCache(self.model.config, max_cache_len=caches[0].shape[2])
        cache.layers = [_Slots(*pair, positions) for pair in zip(caches[:half], caches[half:], strict=True)]
        options = {"use_cache": True, _CACHE: cache}
        if tokens.shape[1] > 1:
            options["logits_to_keep"] = 1
        out = self.model(input_ids=tokens, position_ids=positions[None], **options)
        logits: Tensor = out.logits
        return logits


def causal_lm(model: Any) -> Any:
    """The language model inside PEFT's wrapper, or ``model`` itself."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def obstacle(model: Any) -> str | None:
    """The reason why decoding with ``model`` cannot be compiled; None if it can be tried.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=128))
        >>> qlora_ext.decoding.obstacle(model.to("meta"))
        'it is compiled for the CPU only'
    """
    lm = causal_lm(model)
    if lm.device.type != "cpu":
        return "it is compiled for the CPU only"
    if not type(lm).__module__.startswith("transformers."):
        return "its code comes with the model"
    if any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values()):
        return "the adapter is a prompt"
    if lm.config.get_text_config() is not lm.config or lm.config.is_encoder_decoder:
        return "it is not a plain text decoder"
    if any(type(layer) is not DynamicLayer for layer in DynamicCache(config=lm.config).layers):
        return "its cache holds more than keys and values"
    if any(getattr(module, "merge_aware", None) for module in lm.modules()):
        return "the adapter is merge-aware"
    if not any(shutil.which(name) for name in ("g++", "clang++", os.environ.get("CXX", "c++"))):
        return "there is no C++ compiler"
    return None


def _keeps_last_logits(lm: Any) -> bool:
    """Whether the model can compute the logits of the last token alone."""
    return "logits_to_keep" in inspect.signature(lm.forward).parameters


def _state(step: _Step) -> dict[str, Tensor]:
    """All tensors of the model, by name. Shared tensors appear under each of their names."""
    return {**dict(step.named_parameters(remove_duplicate=False)), **dict(step.named_buffers(remove_duplicate=False))}


def _digest(model: Any, state: dict[str, Tensor]) -> str:
    """A digest of everything that compiled code depends on: the model except its weights, software and processor."""
    import peft
    import transformers

    lm = causal_lm(model)
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    flags = [line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")] if cpuinfo.is_file() else []
    facts = [
        pathlib.Path(__file__).read_text(),
        {module.__name__: module.__version__ for module in (torch, transformers, peft)},
        VERSION,
        [sys.version, platform.machine(), *flags[:1]],
        torch.get_num_threads(),  # Inductor writes it into the code
        lm.config.to_json_string(use_diff=False),
        repr(model),
        [str(getattr(module, "scaling", "")) for module in lm.modules()],
        [str(getattr(module, "active_adapters", "")) for module in lm.modules()],
        [(name, str(t.dtype), list(t.shape), list(t.stride())) for name, t in state.items()],
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses the warnings about torch's own internals during an export."""
    import logging
    import warnings

    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _compile(lm: Any, step: _Step, package: pathlib.Path) -> None:
    """Compiles the code of ``_TOKEN`` and of ``_PROMPT`` for a model, and writes the package atomically."""
    caches = _new_caches(lm, _CACHE_STEP)
    capacity = torch.export.Dim("room", min=2, max=_MAX_CACHE)
    some = torch.export.Dim("tokens", min=2, max=_MAX_PROMPT)
    compiled: dict[str, Any] = {}
    with torch.no_grad(), _quiet(), written(package) as path:
        with _attention_over_caches(lm), _head_of_one_token(lm):
            for name, tokens in ((_TOKEN, 1), (_PROMPT, 8)):
                if name == _PROMPT and not _keeps_last_logits(lm):
                    continue
                arguments = _integers([[0] * tokens]), _integers(range(tokens)), caches
                dynamic = ({1: some}, {0: some}) if tokens > 1 else (None, None)
                shapes = (*dynamic, [{2: capacity} for _ in caches])
                exported = torch.export.export(step, arguments, dynamic_shapes=shapes, strict=False)
                options = {**_OPTIONS, "aot_inductor.package": True}
                compiled[name] = torch._inductor.aot_compile(exported.module(), arguments, options=options)
        package_aoti(str(path), compiled)


def _integers(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device="cpu")


def _positions(first: int, end: int) -> Tensor:
    return torch.arange(first, end, dtype=torch.int64, device="cpu")


def _new_caches(lm: Any, capacity: int) -> list[Tensor]:
    """Keys of all layers, then values, each [1, H, ``capacity``, D], as the model itself makes them."""
    cache = DynamicCache(config=lm.config)
    with torch.no_grad():
        lm(input_ids=_integers([[0]]), use_cache=True, **{_CACHE: cache})
    made = [layer.keys for layer in cache.layers] + [layer.values for layer in cache.layers]
    return [t.new_zeros((1, t.shape[1], capacity, t.shape[3])) for t in made]


class Decoder:
    """Replaces a model's forward: reads single tokens and prompts with a package, and calls the original otherwise.

    The model keeps its ``DynamicCache``, whose tensors become views of the written part of larger caches. A decoder has
    one set of these caches. A conversation that continues after another one has begun gets new ones.

    Attributes:
        steps: the number of single tokens read so far.
        prompts: the number of prompts of several tokens read so far.
    """

    def __init__(self, lm: Any, state: dict[str, Tensor], package: pathlib.Path) -> None:
        self.steps = self.prompts = 0
        link_compiled_code()
        loaded = load_pt2(str(package)).aoti_runners
        self._weights = {}  # the package has only pointers to them
        for name, code in loaded.items():
            self._weights[name] = {fqn: state[fqn] for fqn in code.get_constant_fqns()}
            code.load_constants(self._weights[name], check_full_update=True, user_managed=True)
        self._read_token = loaded[_TOKEN].loader.run
        self._read_prompt = loaded[_PROMPT].loader.run if _PROMPT in loaded else None
        self._caches = _new_caches(lm, _CACHE_STEP)
        self._owner: Callable[[], DynamicCache | None] = lambda: None
        self._eager: Callable[..., Any] = lm.forward

        @functools.wraps(self._eager)  # transformers reads the signature
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._forward(*args, **kwargs)

        lm.forward = forward

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        tokens, cache = kwargs.get("input_ids"), kwargs.get(_CACHE)
        if args or tokens is None or not isinstance(cache, DynamicCache) or not self._serves(tokens, cache, kwargs):
            return self._eager(*args, **kwargs)
        return CausalLMOutputWithPast(logits=self._read(tokens, cache), **{_CACHE: cache})

    def _serves(self, tokens: Tensor, cache: DynamicCache, options: dict[str, Any]) -> bool:
        """Whether the package computes what a call asks for: the last logits of tokens that see all before them."""
        if tokens.dim() != 2 or tokens.shape[0] != 1 or 2 * len(cache.layers) != len(self._caches):
            return False
        count, length = tokens.shape[1], cache.get_seq_length()
        if count != 1 and not (self._read_prompt and 1 < count <= _MAX_PROMPT and options.get("logits_to_keep") == 1):
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
        run: Any = self._read_token if count == 1 else self._read_prompt
        with torch._C._AutoDispatchBelowAutograd():  # skips the Python autograd layer of our operators
            logits: Tensor = run([tokens, _positions(length, end), *self._caches])[0]
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
        capacity = -(-end // _CACHE_STEP) * _CACHE_STEP
        if self._owner() not in (None, cache) or self._caches[0].shape[2] != capacity:
            self._caches = [t.new_zeros((1, t.shape[1], capacity, t.shape[3])) for t in self._caches]
        if length:
            written = [layer.keys for layer in layers] + [layer.values for layer in layers]
            for ours, theirs in zip(self._caches, written, strict=True):
                ours[:, :, :length] = theirs
        self._owner = weakref.ref(cache)


class CompilationError(RuntimeError):
    """Decoding with a model cannot be compiled; the message is the reason. The model is unchanged."""


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
        >>> from qlora_ext.decoding import compile_decoding, prepare_to_answer
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
    step = _Step(lm)
    state = _state(step)
    report = progress or (lambda text: None)
    try:
        package = directory() / f"{_digest(model, state)}.pt2"
        clean(package.parent)
        if is_complete(package):
            with contextlib.suppress(Exception):  # a package that cannot be loaded is compiled again
                return Decoder(lm, state, package)
        if not missing:
            return None
        report("compiling the model, once for all adapters of this shape ...")
        start = time.perf_counter()
        _compile(lm, step, package)
        report(f"compiled in {time.perf_counter() - start:.0f} s")
        return Decoder(lm, state, package)
    except Exception as error:  # compilers may raise any exception
        raise CompilationError(first_line(error)) from error
