"""``quantize_model``: replaces the layers of a model by 4-bit ones."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import nn

from .._internal.integrate import integrate
from ..calibration import Calibration, Calibrator, InitLora
from ..calibration.init_lora import keep_initial_lora, loftq
from ..form import Form, FormKeywords
from ..formats import EXACT, check_activations
from .conversions import conversion_of
from .coverage_report import check_something_is_4bit, report_coverage
from .dense_modules import dense_modules, is_dense, paths_to
from .embedding import Embedding4bit, TiedLinear4bit, is_table
from .experts import Experts4bit, is_fused_experts
from .packed import Packed4bit

if TYPE_CHECKING:
    from typing_extensions import Unpack

Model = TypeVar("Model", bound=nn.Module)  # a function that returns its model preserves the static type

# quantize_model calls these with each model before and after it quantizes the model.
BEFORE_QUANTIZE: list[Callable[[nn.Module], None]] = []
AFTER_QUANTIZE: list[Callable[[nn.Module], None]] = []

# The places of a module in a model: its parent, its name in the parent, and its full name.
_Places = dict[nn.Module, list[tuple[nn.Module, str, str]]]


def tied_heads(
    model: nn.Module, to_be_tied: Mapping[str, str] | None = None, dense: Iterable[str] = ()
) -> dict[nn.Embedding, list[nn.Linear]]:
    """The embeddings of ``model`` that can be 4-bit, each with the linear layers that share its table.

    Embeddings whose table a module of another kind shares are left out, and so are those tied to a layer in ``dense``.

    Args:
        to_be_tied: names of parameters, and the names of the parameters to which they will be tied later.
        dense: names of layers that must stay dense.

    Example:
        >>> model = nn.ModuleDict({"embed": nn.Embedding(100, 64), "head": nn.Linear(64, 100, bias=False)})
        >>> model["head"].weight = model["embed"].weight
        >>> qlora_ext.nn.tied_heads(model)[model["embed"]] == [model["head"]]
        True
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    pairs = ((named.get(name), named.get(other)) for name, other in (to_be_tied or {}).items())
    one = {id(p): id(other) for p, other in pairs if p is not None and other is not None}
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for p in module._parameters.values():
            if p is not None:
                owners.setdefault(one.get(id(p), id(p)), []).append(module)
    heads: dict[nn.Embedding, list[nn.Linear]] = {}
    must_be_dense = {model.get_submodule(name) for name in dense}
    for module in model.modules():
        if isinstance(module, nn.Embedding) and is_table(module):
            weight = id(module.weight)
            others = [other for other in owners[one.get(weight, weight)] if other is not module]
            linear = [other for other in others if type(other) is nn.Linear]
            if len(linear) == len(others) and must_be_dense.isdisjoint(linear):
                heads[module] = linear
    return heads


def places_in(model: nn.Module) -> _Places:
    """Every place of every module inside ``model``. A shared module has several.

    Example:
        >>> shared = nn.Linear(4, 4)
        >>> [name for _, _, name in qlora_ext.nn.places_in(nn.Sequential(shared, shared))[shared]]
        ['0', '1']
    """
    places: _Places = {}
    for parent_name, parent in model.named_modules():
        for name, child in parent._modules.items():  # named_children() yields a shared module only once
            if child is not None:
                places.setdefault(child, []).append((parent, name, f"{parent_name}.{name}" if parent_name else name))
    return places


def _names_of(what: str, names: Any) -> tuple[str, ...]:
    """The module names in the argument ``what``, whose value is ``names``.

    Raises:
        TypeError: ``names`` is not an iterable of strings.
    """
    if isinstance(names, (str, torch.Tensor)) or not isinstance(names, Iterable):
        raise TypeError(f"{what}: expected names of modules, got {names!r}")
    found: tuple[str, ...] = tuple(names)
    if not all(isinstance(name, str) for name in found):
        raise TypeError(f"{what}: expected names of modules, got {found!r}")
    return found


def named_in(model: nn.Module, skip: Iterable[str], keep: Iterable[str] = ()) -> list[str]:
    """``keep``, and the full names of the modules whose last parts are in ``skip``."""
    ends = tuple(f".{name}" for name in skip)
    return [*keep, *(name for name, _ in model.named_modules(remove_duplicate=False) if f".{name}".endswith(ends))]


def to_be_quantized(
    model: nn.Module,
    skip: Iterable[str] | None = None,
    embeddings: bool = False,
    towers: bool = False,
    keep: Iterable[str] = (),
) -> dict[nn.Module, str]:
    """The modules that ``quantize_model`` replaces with these arguments, and their names, in the order of the model.

    A module in several places has the name of the first one. Heads that are tied to an embedding are not listed,
    because they follow the embedding.

    Raises:
        TypeError: ``skip`` or ``keep`` does not consist of names. ValueError: a name in ``keep`` is not in ``model``.

    Example:
        >>> model = nn.ModuleDict({"up": nn.Linear(64, 64), "lm_head": nn.Linear(64, 100)})
        >>> list(qlora_ext.nn.to_be_quantized(model).values())
        ['up']
    """
    dense_parts = dense_modules(model)
    full_names = {
        *dense_parts.always,
        *(dense_parts.heads if skip is None else ()),
        *(() if towers else dense_parts.towers),
    }
    keep, skip = _names_of("keep", keep), () if skip is None else _names_of("skip", skip)
    unknown = {*keep} - {name for name, _ in model.named_modules(remove_duplicate=False)}
    if unknown:
        raise ValueError(f"keep: expected full names of modules of the model, got {min(unknown)!r}")
    full_names |= {*keep}
    tied = {id(p) for m in model.modules() if conversion_of(m) is None for p in m.parameters(recurse=False)}
    heads = tied_heads(model, dense=dense_parts.always) if embeddings else {}

    full_names |= {*named_in(model, skip)}

    def skipped(name: str) -> bool:
        return not full_names.isdisjoint(paths_to(name))

    def chosen(module: nn.Module, at: list[tuple[nn.Module, str, str]]) -> bool:
        if not is_dense(module) or any(skipped(name) for _, _, name in at):
            return False
        if isinstance(module, nn.Embedding):
            return module in heads
        return conversion_of(module) is None or id(module.weight) not in tied

    return {module: at[0][2] for module, at in places_in(model).items() if chosen(module, at)}


def quantized(module: nn.Module, compute_dtype: torch.dtype | None = None, **form: Unpack[FormKeywords]) -> Packed4bit:
    """The 4-bit module that replaces ``module``, for which ``is_dense`` holds.

    Args:
        compute_dtype, form: as in ``Linear4bit.from_linear``.

    Example:
        >>> type(qlora_ext.nn.quantized(nn.Linear(64, 48), block_size=32)).__name__
        'Linear4bit'
    """
    if is_fused_experts(module):
        return Experts4bit.from_experts(module, compute_dtype, **form)
    if isinstance(module, nn.Embedding):
        return Embedding4bit.from_embedding(module, compute_dtype, **form)
    conversion = conversion_of(module)
    assert conversion is not None
    return conversion.from_linear(module, compute_dtype, **form)  # type: ignore[arg-type]


def _check_rows(chosen: Mapping[nn.Module, str], form: Form) -> None:
    """Raises a ValueError with the name of the first layer that has no rows of whole blocks, before one is replaced."""
    for module, name in chosen.items() if form.row_unit > 1 else ():
        empty = copy.copy(module)
        parameters = {
            key: None if p is None else nn.Parameter(p.to("meta"), False) for key, p in module._parameters.items()
        }
        empty._parameters = parameters
        try:
            quantized(empty, **form.keywords)
        except ValueError as error:
            raise ValueError(f"{name}: {error}; keep the layer dense, or choose another form") from error


def quantize_model(
    model: Model,
    skip: Iterable[str] | None = None,
    block_size: int = 64,
    double_quant: bool = True,
    embeddings: bool = False,
    towers: bool = False,
    calibration: Any = None,
    init_lora: Any = None,
    keep: Iterable[str] = (),
    compute_dtype: torch.dtype | None = None,
    activations: str = EXACT,
    **options: Any,
) -> Model:
    """Replaces the linear layers and experts of ``model`` by 4-bit ones, in place and one at a time.

    It replaces every ``nn.Linear``, every subclass of it that computes the same (``nn.conversion_of``), every
    ``Conv1D`` of transformers, and every module of fused experts (``Experts4bit``). Their hooks move to the 4-bit
    layers. Layers that bitsandbytes has quantized to NF4 are adopted with their bits (``qlora_ext.adopt``).
    ``save_pretrained`` of a transformers or diffusers model then saves it in 4 bits.

    Args:
        model: its parameters are freed as they are quantized. A module used in several places stays shared. A module
            that shares its weight with another one (an embedding) stays dense.
        skip: names of modules that stay dense, with everything inside them: full dotted names, or their last parts
            (``"lm_head"``, ``"mlp.gate"``). The default is the output heads: those named ``lm_head``, ``score``,
            ``classifier`` or ``qa_outputs``, and in a transformers model everything outside its base model.
        block_size, double_quant: as in ``quantize_nf4``; ``options`` may hold ``nested_block_size``, ``code``,
            ``scales`` and ``offsets`` too, as in ``nn.Linear4bit``.
        embeddings: replace every embedding (``nn.is_table``) by an ``Embedding4bit``. An output head that is
            tied to a table has no weight of its own and follows the table, even if ``skip`` names the head.
        towers: in a multimodal transformers model, replace layers outside the language model too: those of vision and
            audio towers, and of projectors.
        calibration: choose scales and codes for the layers' inputs. This takes time, but the weights have the same
            size. A ``qlora_ext.Calibration``, or its ``inputs``: "self", token ids [B, T], or batches of model inputs.
            ``qlora_ext.calibration.calibration_of(model)`` reports the result for each layer.
        init_lora: compute initial adapters from the quantization error of the linear layers: "svd" (optimal for the
            calibration's inputs; needs a calibration), "loftq", or a ``qlora_ext.calibration.InitLora``, which sets
            the rank. ``qlora_ext.integrations.peft.initialize_lora`` puts them into a PEFT model.
        keep: full names of additional modules that stay dense, for example the layers whose quantization costs the
            most, from ``qlora_ext.sensitivity(model).keep("5%")``. It does not change the default of ``skip``.
        compute_dtype: of the 4-bit modules; the default is each module's own dtype.
        activations: "int8" rounds the inputs and gradients of 4-bit layers to int8 on the CPU, see ``linear_nf4``.

    Layers that transformers (T5's ``wo``) or diffusers (Wan's ``time_embedder``) keep in float32 always stay dense, and
    so does the ``out_proj`` of ``nn.MultiheadAttention``, whose weight torch reads.

    Returns:
        ``model``, or its replacement if ``model`` itself is such a module.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``, ``skip`` or ``keep`` does not consist of names, or an option is
            unknown. ValueError: bitsandbytes has quantized layers to int8 or FP4; ``init_lora`` is "svd" without a
            calibration; a name in ``keep`` is not in ``model``; a block size is out of range; or a form of more than 4
            bits does not have the rows of a layer (``Form.row_unit``).

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
        >>> qlora_ext.quantize_model(model, skip=("2",))
        Sequential(
          (0): Linear4bit(in_features=64, out_features=48, bias=True, block_size=64, double_quant=True)
          (1): ReLU()
          (2): Linear(in_features=48, out_features=10, bias=True)
        )
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    skip, keep = None if skip is None else _names_of("skip", skip), _names_of("keep", keep)
    form = Form.of(block_size=block_size, double_quant=double_quant, **options)
    check_activations(activations)
    lora = None if init_lora is None else InitLora.of(init_lora)
    if lora is not None and lora.method == "svd" and calibration is None:
        raise ValueError("init_lora: expected calibration=... with 'svd', which weighs errors by the layers' inputs")
    already = {module for module in model.modules() if isinstance(module, Packed4bit)}
    integrate()
    for prepare in BEFORE_QUANTIZE:
        prepare(model)
    for module in model.modules():
        if isinstance(module, Packed4bit) and module not in already:
            module.activations = activations

    if conversion_of(model) is not None or is_fused_experts(model) or (embeddings and is_table(model)):
        for name, wanted in (("calibration", calibration), ("init_lora", lora)):
            if wanted is not None:
                raise ValueError(f"{name}: expected a model that contains layers, got a single {type(model).__name__}")
        alone = quantized(model, compute_dtype, **form.keywords)
        alone.activations = activations
        alone.take_hooks(model)
        return cast(Model, alone)
    asked = named_in(model, skip or (), keep)
    places = places_in(model)
    chosen = to_be_quantized(model, skip, embeddings, towers, keep)
    _check_rows(chosen, form)
    check_something_is_4bit(model, bool(chosen), asked)
    if already and not chosen:
        warnings.warn("model: its layers are 4-bit already and stay as they are; nothing was quantized", stacklevel=2)
    heads = tied_heads(model) if embeddings else {}
    calibrator = None
    if calibration is not None:
        # Embeddings have no activations to calibrate on.
        layers = {name: module for module, name in chosen.items() if not isinstance(module, nn.Embedding)}
        calibrator = Calibrator(
            model, layers, Calibration.of(calibration), form, compute_dtype, lora,
            lambda name, w4: model.get_submodule(name).set_packed("weight", w4),  # type: ignore[operator]
        )  # fmt: skip
    initial = keep_initial_lora(model) if lora is not None and calibrator is None else {}

    def replace(module: nn.Module, new: Packed4bit) -> None:
        for weight, dense in new.matrices_of(module).items():
            at, w4 = chosen[module], new.packed_weight(weight)
            if calibrator is not None:
                new.set_packed(weight, calibrator.refine(at, weight, dense, w4))
            elif lora is not None and weight == "weight":
                w4, initial[at] = loftq(dense, w4, new.quantize, lora)
                new.set_packed(weight, w4)
        new.activations = activations
        new.take_hooks(module)
        for parent, name, _ in places[module]:
            setattr(parent, name, new)
        for weight in new.packed_shapes:
            setattr(
                module, weight, nn.Parameter(torch.empty(0, dtype=torch.float32, device="cpu"), requires_grad=False)
            )

    for module in chosen:
        new = quantized(module, compute_dtype, **form.keywords)
        replace(module, new)
        if isinstance(new, Embedding4bit):
            for head in heads[module]:  # type: ignore[index]
                replace(head, TiedLinear4bit(new, head.bias))
    if calibrator is not None:
        calibrator.finish()
    for finish in AFTER_QUANTIZE:
        finish(model)
    report_coverage(model, asked)
    return model
