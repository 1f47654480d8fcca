"""Decoding through a compiled model: one token a call, without the Python of a model's layers.

The model's own forward is exported as it decodes one token over caches of fixed size, and compiled by AOTInductor. The
package holds code alone, and is given the weights when it is loaded: one serves every adapter of the same shape, and is
kept in the user's cache directory for the next run. Prompts run eagerly, as does what cannot be compiled.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import pathlib
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer
from transformers.masking_utils import sdpa_mask
from transformers.modeling_outputs import CausalLMOutputWithPast

from .._internal.untrusted import first_line
from .._internal.version import VERSION
from .._library import link_compiled_code
from .cache import clean, directory, is_whole, written

# As transformers calls a model's cache: the newer of its two names, where it knows that.
_CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
PAYS_FROM = 1000  # tokens: compiling takes about as long as eager decoding takes for so many more than compiled
_ROOM = 256  # tokens by which caches grow
_MOST_ROOM = 1 << 30
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


_OPTIONS = {
    # Code alone: one package serves every adapter of the same shape, and no weight is written into it as a number.
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
    """Attention of one token, in float32: sums that are compiled to a few loops, where torch's own takes far longer.

    Args:
        query: [1, H, 1, D]; key, value: [1, G, L, D], where G divides H.
        attention_mask: bool [1, 1, 1, L], True where there is something to see.

    Returns: [1, 1, H, D] in query's dtype, as transformers has it.
    """
    if any(kwargs.get(name) is not None for name in ("softcap", "s_aux", "position_bias")):
        raise NotImplementedError("its attention is not the plain one")
    _, heads, _, size = query.shape
    groups = key.shape[1]
    q = query.float().reshape(1, groups, heads // groups, 1, size) * (size**-0.5 if scaling is None else scaling)
    # Inductor computes a view of this kind in memory. Otherwise it has all that q is made of, the sines and cosines of
    # its rotation among it, in the loop over the keys.
    q = q.as_strided(q.shape, q.stride())
    scores = (q * key.float()[:, :, None]).sum(-1)  # [1, G, H / G, L]
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, -torch.inf)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    # Divided at the end: D divisions instead of L.
    y = (weights[..., None] * value.float()[:, :, None]).sum(-2) / weights.sum(-1, keepdim=True)
    return y.reshape(1, 1, heads, value.shape[3]).to(query.dtype), None


_ATTENTION = "qlora_ext_one_token"
AttentionInterface.register(_ATTENTION, _attend)
AttentionMaskInterface.register(_ATTENTION, sdpa_mask)


@contextlib.contextmanager
def _attention_of_one_token(lm: Any) -> Iterator[None]:
    """In place of torch's; a model that was given another one keeps it."""
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
    """The dense output head as sums, in float32: a loop as fast as memory, which torch's product is not."""
    head: Any = lm.get_output_embeddings()
    is_plain = type(head) is nn.Linear and "forward" not in vars(head)
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
    """A layer of a static cache that is ``position`` tokens long (int64 [1])."""

    def __init__(self, keys: Tensor, values: Tensor, position: Tensor) -> None:
        super().__init__(keys.shape[2])
        self.keys, self.values, self.position = keys, values, position
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self.position, key_states)
        self.values.index_copy_(2, self.position, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, *_: Any, **__: Any) -> tuple[int, int]:
        return self.keys.shape[2], 0

    def get_seq_length(self, *_: Any, **__: Any) -> Tensor:
        return self.position[0]


class _Step(nn.Module):
    """One token [1, 1] at ``position`` [1] in, its logits [1, 1, V] out; keys and values are written to the caches.

    The caches, [1, H, L, D] each, are one list: keys of all layers, then values.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, token: Tensor, position: Tensor, caches: list[Tensor]) -> Tensor:
        half = len(caches) // 2
        cache = StaticCache(self.model.config, max_cache_len=caches[0].shape[2])
        cache.layers = [_Slots(*pair, position) for pair in zip(caches[:half], caches[half:], strict=True)]
        out = self.model(input_ids=token, position_ids=position[None], use_cache=True, **{_CACHE: cache})
        logits: Tensor = out.logits
        return logits


def causal_lm(model: Any) -> Any:
    """The language model inside of PEFT's wrapper, or ``model`` itself."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def obstacle(model: Any) -> str | None:
    """Why decoding with ``model`` is not compiled, in words; None where it can be tried.

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
        return "it is more than a decoder of text"
    if any(type(layer) is not DynamicLayer for layer in DynamicCache(config=lm.config).layers):
        return "its cache is more than keys and values"
    if any(getattr(module, "merge_aware", None) for module in lm.modules()):
        return "the adapter runs as merged"
    if not any(shutil.which(name) for name in ("g++", "clang++", os.environ.get("CXX", "c++"))):
        return "there is no C++ compiler"
    return None


def _state(step: _Step) -> dict[str, Tensor]:
    """Every tensor of the model, by each of its names."""
    return {**dict(step.named_parameters(remove_duplicate=False)), **dict(step.named_buffers(remove_duplicate=False))}


def _digest(model: Any, state: dict[str, Tensor]) -> str:
    """What compiled code depends on: the model's structure and numbers (not its weights), software and processor."""
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
        torch.get_num_threads(),  # in the code that Inductor writes
        lm.config.to_json_string(use_diff=False),
        repr(model),
        [str(getattr(module, "scaling", "")) for module in lm.modules()],
        [str(getattr(module, "active_adapters", "")) for module in lm.modules()],
        [(name, str(t.dtype), list(t.shape), list(t.stride())) for name, t in state.items()],
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch warns of its own internals while it exports."""
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
    """Writes the package of a model that decodes, whole or not at all."""
    caches = _new_caches(lm, _ROOM)
    arguments = _integers([[0]]), _integers([1]), caches
    room = torch.export.Dim("room", min=2, max=_MOST_ROOM)
    shapes = None, None, [{2: room} for _ in caches]
    with torch.no_grad(), _quiet(), written(package) as path:
        with _attention_of_one_token(lm), _head_of_one_token(lm):
            exported = torch.export.export(step, arguments, dynamic_shapes=shapes, strict=False)
        # A copy of the options: torch adds to them.
        torch._inductor.aoti_compile_and_package(exported, package_path=str(path), inductor_configs={**_OPTIONS})


def _integers(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device="cpu")


def _new_caches(lm: Any, room: int) -> list[Tensor]:
    """Keys of all layers, then values, each [1, H, ``room``, D], as the model itself makes them."""
    cache = DynamicCache(config=lm.config)
    with torch.no_grad():
        lm(input_ids=_integers([[0]]), use_cache=True, **{_CACHE: cache})
    made = [layer.keys for layer in cache.layers] + [layer.values for layer in cache.layers]
    return [t.new_zeros((1, t.shape[1], room, t.shape[3])) for t in made]


class Decoder:
    """Takes the place of a model's forward: decodes by a package, and leaves everything else to that forward.

    The model keeps its ``DynamicCache``, whose tensors become the written part of caches with room for more. There is
    one set of these: a conversation loses them to the next.
    """

    def __init__(self, lm: Any, state: dict[str, Tensor], package: pathlib.Path) -> None:
        self.steps = 0  # decoded so far
        link_compiled_code()
        loaded = torch._inductor.aoti_load_package(str(package))
        weights = {name: state[name] for name in loaded.get_constant_fqns()}
        loaded.load_constants(weights, check_full_update=True, user_managed=True)
        self._weights = weights  # which the package only points to
        self._run = loaded.loader.run
        self._caches: list[Tensor] = []
        self._eager: Callable[..., Any] = lm.forward

        @functools.wraps(self._eager)  # transformers reads the signature
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._forward(*args, **kwargs)

        lm.forward = forward

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        token, cache = kwargs.get("input_ids"), kwargs.get(_CACHE)
        if args or token is None or token.shape != (1, 1) or not isinstance(cache, DynamicCache):
            return self._eager(*args, **kwargs)
        length = cache.get_seq_length()
        if length == 0 or kwargs.get("output_attentions") or kwargs.get("output_hidden_states"):
            return self._eager(*args, **kwargs)
        return CausalLMOutputWithPast(logits=self._decode(token, cache, length), **{_CACHE: cache})

    def _decode(self, token: Tensor, cache: DynamicCache, length: int) -> Tensor:
        layers = cache.layers
        held = bool(self._caches) and layers[0].keys.data_ptr() == self._caches[0].data_ptr()
        if not held or length == self._caches[0].shape[2]:
            self._take_over([layer.keys for layer in layers] + [layer.values for layer in layers], length)
        with torch._C._AutoDispatchBelowAutograd():  # there are no gradients, but our operators' are Python
            logits: Tensor = self._run([token, _integers([length]), *self._caches])[0]
        for layer, keys, values in zip(layers, self._caches[: len(layers)], self._caches[len(layers) :], strict=True):
            layer.keys, layer.values = keys[:, :, : length + 1], values[:, :, : length + 1]
        self.steps += 1
        return logits

    def _take_over(self, written: list[Tensor], length: int) -> None:
        """Copies what a cache holds to caches with room for more. Attention goes over all of the room."""
        room = (length // _ROOM + 1) * _ROOM
        if not self._caches or self._caches[0].shape[2] != room:
            self._caches = [t.new_zeros((1, t.shape[1], room, t.shape[3])) for t in written]
        for ours, theirs in zip(self._caches, written, strict=True):
            ours[:, :, :length] = theirs


class CompilationError(RuntimeError):
    """The decoding of a model cannot be compiled: its text says why. The model is as it was."""


def compile_decoding(
    model: Any, missing: bool = True, progress: Callable[[str], object] | None = None
) -> Decoder | None:
    """Has ``model`` decode by compiled code from now on. Its tokens stay those of the eager model.

    The code comes from the user's cache (``$XDG_CACHE_HOME`` or ``~/.cache``), or is compiled now, which takes a minute
    or so, and kept there. One package serves every adapter of the same shape.

    Args:
        model: a causal language model of transformers on the CPU, in 4 bits or dense, with a LoRA adapter or without.
            It is put into evaluation mode.
        missing: whether to compile what the cache does not have.
        progress: is called with a sentence before and after code is compiled.

    Returns:
        What decodes now, or None: the cache has no code for the model and ``missing`` is False. The model is as it was.

    Raises:
        CompilationError: the model is of a kind that is not compiled (``obstacle``), or the compiler failed.

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
    tell = progress or (lambda text: None)
    try:
        package = directory() / f"{_digest(model, state)}.pt2"
        clean(package.parent)
        if is_whole(package):
            with contextlib.suppress(Exception):  # a package that cannot be loaded is compiled again
                return Decoder(lm, state, package)
        if not missing:
            return None
        tell("compiling the model, once for all adapters of this shape ...")
        start = time.perf_counter()
        _compile(lm, step, package)
        tell(f"compiled in {time.perf_counter() - start:.0f} s")
        return Decoder(lm, state, package)
    except Exception as error:  # compilers fail in any way whatever
        raise CompilationError(first_line(error)) from error
