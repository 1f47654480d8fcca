"""Packages of compiled code: which models can be compiled, and how a package is made, named and loaded.

A package contains only code and gets the weights when it is loaded, so one package serves every adapter of the same
shape. It is stored in the user's cache directory (``cache.py``).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import pathlib
import platform
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._inductor.package.package import package_aoti
from torch._ops import OpOverload
from torch.export.pt2_archive._package import load_pt2
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from qlora_ext.nn import Packed4bit, layers_of
from qlora_ext.ops import link_compiled_code
from qlora_ext.output_head import causal_lm
from qlora_ext.untrusted import first_line
from qlora_ext.version import VERSION

from ..tensor_state import TensorState
from .cache import directory, is_complete, written
from .fixed import FixedAdapters

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


_PATHS = ("_name_or_path", "_commit_hash")  # of a model's config; compiled code does not depend on them

_OPTIONS = {
    # The package contains no weights, not even as constants in the code, so it serves every adapter of the same shape.
    "aot_inductor.package": True,
    "aot_inductor.package_constants_in_so": False,
    "always_keep_tensor_constants": True,
    "aot_inductor.custom_ops_to_c_shims": {
        torch.ops.qlora.linear_nf4.default: [_c_declaration(torch.ops.qlora.linear_nf4.default)]
    },
}


def attention_windows(config: Any) -> dict[str, int | None]:
    """The kinds of attention in a model, by transformers' names, each with how many tokens it sees; None for all."""
    window: int | None = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"]
    return {kind: window if kind == "sliding_attention" else None for kind in dict.fromkeys(kinds)}


def not_plain(model: Any) -> str | None:
    """The reason why the state of a sequence is not keys and values of all its tokens; None if it is that."""
    lm = causal_lm(model)
    if any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values()):
        return "the adapter is a prompt"
    if lm.config.get_text_config() is not lm.config or lm.config.is_encoder_decoder:
        return "it is not a plain text decoder"
    try:
        layers = DynamicCache(config=lm.config).layers
    except Exception as error:  # of configurations without the number of layers, for example
        return f"transformers cannot make a cache for it: {first_line(error)}"
    if not {type(layer) for layer in layers} <= {DynamicLayer, DynamicSlidingWindowLayer}:
        return "its cache holds more than keys and values"
    other = [kind for kind in attention_windows(lm.config) if kind not in ("full_attention", "sliding_attention")]
    return f"it has {other[0]}" if other else None


def not_traceable(model: Any) -> str | None:
    """The reason why one run of the model's code may not show what every run computes; None if there is none."""
    lm = causal_lm(model)
    if not type(lm).__module__.startswith("transformers."):
        return "its code comes with the model"
    why = not_plain(model)
    if why is None and any(attention_windows(lm.config).values()):
        why = "its attention has a sliding window"
    if why is None and any(getattr(module, "merge_aware", None) for module in lm.modules()):
        why = "the adapter is merge-aware"
    return why


def obstacle(model: Any) -> str | None:
    """The reason why decoding with ``model`` cannot be compiled; None if it can be tried.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=128))
        >>> qlora_app.decoding.obstacle(model.to("meta"))
        'it is compiled for the CPU only'
    """
    if causal_lm(model).device.type != "cpu":
        return "it is compiled for the CPU only"
    why = not_traceable(model)
    if why is not None:
        return why
    if not any(shutil.which(name) for name in ("g++", "clang++", os.environ.get("CXX", "c++"))):
        return "there is no C++ compiler"
    return None


def state_of(step: nn.Module) -> dict[str, Tensor]:
    """All tensors of a model, by their names in files. Shared tensors appear under each of their names."""
    state = {**dict(step.named_parameters(remove_duplicate=False)), **dict(step.named_buffers(remove_duplicate=False))}
    for name, layer in step.named_modules(remove_duplicate=False):
        if isinstance(layer, Packed4bit):
            state |= {f"{name}.{part}": t for part, t in layer.packed_state().items()}
    return state


def _without_paths(config: Any) -> Any:
    """A config's values without the directory that the model came from, at any depth."""
    if isinstance(config, dict):
        return {name: _without_paths(value) for name, value in config.items() if name not in _PATHS}
    return [_without_paths(value) for value in config] if isinstance(config, list) else config


def digest(model: Any, step: nn.Module) -> str:
    """A digest of everything that compiled code depends on: the model except its weights, software and processor.

    Args:
        step: the module that is compiled.
    """
    import peft
    import transformers

    lm = causal_lm(model)
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    flags = [line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")] if cpuinfo.is_file() else []
    facts = [
        type(step).__name__,
        [file.read_text() for file in sorted(pathlib.Path(__file__).parent.glob("*.py"))],
        {module.__name__: module.__version__ for module in (torch, transformers, peft)},
        VERSION,
        str(_OPTIONS["aot_inductor.custom_ops_to_c_shims"]),  # the arguments of C functions follow from the schema
        [sys.version, platform.machine(), *flags[:1]],
        torch.get_num_threads(),  # Inductor writes it into the code
        _without_paths(json.loads(lm.config.to_json_string(use_diff=False))),
        lm.config._attn_implementation,
        repr(model),
        [str(getattr(module, "scaling", "")) for module in lm.modules()],
        [str(getattr(module, "active_adapters", "")) for module in lm.modules()],
        [(name, str(t.dtype), list(t.shape), list(t.stride())) for name, t in state_of(step).items()],
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses the warnings about torch's own internals during an export."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


@contextlib.contextmanager
def _exposed(step: nn.Module) -> Iterator[None]:
    """Has all 4-bit layers expose their tensors, so that a package knows them by their names in files."""
    layers = [layer for _, layer in layers_of(step) if not layer.is_exposed]
    before = [(entries, dict(entries)) for layer in layers for entries in (layer._parameters, layer._buffers)]
    for layer in layers:
        layer.expose()
    try:
        yield
    finally:
        for entries, earlier in before:
            entries.clear()
            entries.update(earlier)  # type: ignore[arg-type]


class CompilationError(RuntimeError):
    """Decoding with a model cannot be compiled; the message is the reason. The model is unchanged."""


class Function(NamedTuple):
    """A function to compile: a module, examples of its arguments, and which of their sizes are dynamic."""

    step: nn.Module
    arguments: tuple[Any, ...]
    dynamic_shapes: Any


def compile_package(functions: dict[str, Function], package: pathlib.Path) -> None:
    """Compiles functions, and writes the package atomically."""
    compiled: dict[str, Any] = {}
    with torch.no_grad(), _quiet(), written(package) as path:
        for name, (step, arguments, dynamic_shapes) in functions.items():
            with _exposed(step):
                exported = torch.export.export(step, arguments, dynamic_shapes=dynamic_shapes, strict=False)
                compiled[name] = torch._inductor.aot_compile(exported.module(), arguments, options=_OPTIONS)
        package_aoti(str(path), compiled)


class Code:
    """The functions of a package, which compute with the tensors of a model: those of ``state_of(step)``.

    Its active adapters and their scalings are a part of the code.
    """

    def __init__(self, package: pathlib.Path, step: nn.Module) -> None:
        link_compiled_code()
        self._runners = load_pt2(str(package)).aoti_runners
        # The package has only pointers to the weights.
        state = state_of(step)
        self._weights = {name: {k: state[k] for k in code.get_constant_fqns()} for name, code in self._runners.items()}
        for name, code in self._runners.items():
            code.load_constants(self._weights[name], check_full_update=True, user_managed=True)
        self._state = TensorState(step, [id(t) for weights in self._weights.values() for t in weights.values()])
        self._adapters = FixedAdapters(step)
        self._layers = [(layer, layer.activations) for _, layer in layers_of(step)]

    def __contains__(self, name: str) -> bool:
        return name in self._runners

    def __getitem__(self, name: str) -> Callable[[list[Tensor]], list[Tensor]]:
        run = self._runners[name].loader.run

        def function(arguments: list[Tensor]) -> list[Tensor]:
            with torch._C._AutoDispatchBelowAutograd():  # skips the Python autograd layer of our operators
                results: list[Tensor] = run(arguments)
            return results

        return function

    def is_current(self, fully: bool = True) -> bool:
        """Whether the functions compute what the model does now.

        Args:
            fully: look at all adapters and weights, which may have moved. Otherwise only at the first adapter.
        """
        return self._adapters.serve(fully) and (not fully or (self._computes_alike() and self._state.is_current()))

    def _computes_alike(self) -> bool:
        return all(layer.activations == activations for layer, activations in self._layers)


def load_code(
    model: Any,
    step: nn.Module,
    functions: contextlib.AbstractContextManager[dict[str, Function]],
    missing: bool = True,
    progress: Callable[[str], object] | None = None,
) -> Code | None:
    """The code of functions of ``model``, from a package in the user's cache.

    Args:
        step: the module that is compiled, or has the tensors of those.
        functions: gives the functions, if they have to be compiled.
        missing: whether to compile if there is no package.
        progress: called with a message before and after the compilation.

    Returns:
        None if the package is missing and is not to be compiled.

    Raises:
        CompilationError: the compiler failed.
    """
    report = progress or (lambda text: None)
    try:
        package = directory() / f"{digest(model, step)}.pt2"
        if is_complete(package):
            with contextlib.suppress(Exception):  # a package that cannot be loaded is compiled again
                return Code(package, step)
        if not missing:
            return None
        report("compiling the model, once for all adapters of this shape ...")
        start = time.perf_counter()
        with functions as found:
            compile_package(found, package)
        report(f"compiled in {time.perf_counter() - start:.0f} s")
        return Code(package, step)
    except Exception as error:  # compilers may raise any exception
        raise CompilationError(first_line(error)) from error
