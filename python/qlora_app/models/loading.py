"""Loads the weights of a model, in 4 bits or dense."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import sys
import warnings
from typing import TYPE_CHECKING, Any

from qlora_ext.formats import NF4, READ_IN
from qlora_ext.untrusted import printable

from ..errors import UserError, first_line
from . import validate_model
from .activations import set_activations
from .pretrained import has_4bit_blocks, load_config, load_pretrained, loading
from .sources import ModelSource

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from qlora_ext.calibration import Calibration, InitLora
    from qlora_ext.form import Form
    from qlora_ext.gguf import GGUFWeights
    from qlora_ext.integrations.transformers.spill import Spill


def _gguf_weights(source: ModelSource, config: Any) -> GGUFWeights | None:
    """A reader of a GGUF file's weights; None for other sources and for architectures whose names are unknown."""
    from qlora_ext.gguf import GGUFWeights

    if source.gguf_file is None:
        return None
    skeleton = validate_model.skeleton(source, config)
    with loading("model", source, False):
        try:
            return GGUFWeights(pathlib.Path(source.path) / source.gguf_file, skeleton)
        except NotImplementedError:
            return None


def stored_forms(source: ModelSource, config: Any, requantize: bool = False) -> dict[str, Form] | None:
    """The forms of a model's packed weights, by name, if its files store some of them packed.

    None if the files have no such weights, are in our format or bitsandbytes', or cannot be read as they are.

    Args:
        requantize: as in ``Loader``.

    Raises:
        UserError: the files are damaged, or their 4-bit format is not supported.
    """
    from qlora_ext.integrations.transformers import METHOD, QLoRAConfig
    from qlora_ext.integrations.transformers.checkpoint.checkpoint_source import CheckpointSource

    if source.gguf_file is not None:
        weights = _gguf_weights(source, config) if has_4bit_blocks(source, tables=True) else None
        return (weights.forms(requantize) or None) if weights is not None else None
    saved = getattr(config, "quantization_config", None)
    if (
        saved is None
        or source.directory is None
        or saved.get("quant_method", "bitsandbytes") in (METHOD, "bitsandbytes")
    ):
        return None
    files = [str(file) for file in validate_model.weight_files(source.directory)]
    with loading("model", source, False):
        checkpoint = CheckpointSource(saved, QLoRAConfig(requantize=requantize))
        return checkpoint.forms(validate_model.skeleton(source, config), files)


def stored_layers(source: ModelSource, config: Any, requantize: bool = False) -> dict[str, Form] | None:
    """``stored_forms`` of a checkpoint; of other files without tables and output heads, and weights that become NF4."""
    from qlora_ext.integrations.transformers.modules import tables_and_heads

    forms = stored_forms(source, config, requantize)
    if forms is None or (source.gguf_file is None and not requantize):
        return forms
    others = {f"{name}.weight" for name in tables_and_heads(validate_model.skeleton(source, config))}
    return {name: form for name, form in forms.items() if name not in others and form.code != NF4} or None


def _compute_in(model: Any, dtype: torch.dtype, compute: torch.dtype, layers: torch.dtype | None) -> None:
    """Makes a model with weights in ``dtype`` compute in ``compute``, and its 4-bit layers in ``layers``.

    Weights that transformers keeps in float32 stay in float32.
    """
    from qlora_ext.dtypes import layers_dtype
    from qlora_ext.nn import layers_of, multiply_in_bfloat16, set_compute_dtype

    if compute != dtype:
        set_compute_dtype(model, compute)
    else:
        for _, layer in layers_of(model):
            layer.to(compute)
    if (layers or layers_dtype(dtype, compute, model.device)) != compute:
        multiply_in_bfloat16(model)


def _load(source: ModelSource, weights: GGUFWeights | None, shown: bool, **options: Any) -> Any:
    """Loads the model with transformers, from its files or from the ``weights`` in its GGUF file."""
    from transformers import AutoModelForCausalLM

    options |= {"output_loading_info": True}
    if weights is None:
        model, report = load_pretrained("model", source, AutoModelForCausalLM, shown, **options)
    else:
        with loading("model", source, shown):
            model, report = weights.load(**options)
        report["unexpected_keys"] = {*report["unexpected_keys"], *weights.unknown}
    validate_model.check_report(source, model, report)
    return model


def _dense(source: ModelSource, dtype: torch.dtype, shown: bool = False) -> Any:
    """The dense model in ``dtype`` on the CPU. It is complete, but its values are not checked."""
    model = _load(source, _gguf_weights(source, load_config(source)), shown, dtype=dtype)
    if source.gguf_file is not None and getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)  # transformers has decoded it, and would not save it
    return model


def _checked(
    model: Any,
    source: ModelSource,
    dtype: torch.dtype,
    compute: torch.dtype | None,
    layers: torch.dtype | None = None,
) -> Any:
    """Checks that the values of ``model`` are finite, and makes it compute in ``compute`` (None: no change)."""
    validate_model.check_finite(source, model)
    model.config.use_cache = False
    if compute is not None:
        _compute_in(model, dtype, compute, layers)
    return model


def load_dense(
    source: ModelSource, dtype: torch.dtype, device: torch.device, compute: torch.dtype | None = None
) -> Any:
    """The dense model, read in ``dtype`` and then cast to ``compute`` if given.

    Raises:
        UserError: as in ``Loader``.
    """
    validate_model.check_room(source, load_config(source))
    return _checked(_dense(source, dtype), source, dtype, compute).eval().to(device)


@dataclasses.dataclass(frozen=True)
class Loader:
    """Loads the model from ``source`` in 4 bits, with its other weights in ``dtype``, to ``device``.

    Attributes:
        form: of the 4-bit weights.
        dtype: of the weights that are read, before some of them are quantized.
        compute: the dtype in which the model computes, if it differs from ``dtype``. Dense weights are then cast to it,
            except those that ``nn.set_compute_dtype`` keeps; 4-bit weights stay those of ``dtype``.
        layers: the dtype in which 4-bit layers multiply, which is ``compute`` or bfloat16. None for the one that takes
            less time on this processor.
        embeddings: quantize embeddings too, each with the output head that is tied to it.
        rest: quantize also the layers whose weights a GGUF file does not store packed.
        requantize: as in ``QLoRAConfig``.
        served: the format for which an adapter is trained merge-aware. Dense weights are quantized to it, if possible.
        activations: a value of ``--activations``; None for those that the model was saved with.

    Both methods raise a UserError if a weight is missing, has another shape, is NaN, or is in the files but not in the
    model.
    """

    source: ModelSource
    form: Form
    dtype: torch.dtype
    device: torch.device
    compute: torch.dtype | None = None
    layers: torch.dtype | None = None
    embeddings: bool = False
    rest: bool = False
    requantize: bool = False
    served: str | None = None
    activations: str | None = None

    def while_loading(self, stream: str | None = None, resident: str | None = None, spill: Spill | None = None) -> Any:
        """Loads the model, quantizing each weight when it is read, if transformers supports that for the source.

        Args:
            stream, resident: as in ``QLoRAConfig``.
            spill: receives the quantized weights; ``device`` must then be the CPU.
        """
        from qlora_ext.integrations.transformers import QLoRAConfig
        from qlora_ext.integrations.transformers.modules import dense_modules
        from qlora_ext.integrations.transformers.spill import spilling

        model_config = load_config(self.source)
        validate_model.check_room(self.source, model_config)
        weights = _gguf_weights(self.source, model_config)
        if self.source.gguf_file is not None and weights is None:
            # transformers cannot quantize a GGUF file that it reads itself.
            self._say_that_it_decodes("the names of its tensors are unknown")
            model = _dense(self.source, self.dtype, shown=spill is not None)
            self._quantize(model)
            return self._placed(model, stream, resident)
        heads = None  # which stay dense
        if self.rest:
            stored = {} if weights is None else weights.forms()
            heads = [*dense_modules(validate_model.skeleton(self.source, model_config)).heads]
            heads = [name for name in heads if f"{name}.weight" not in stored]
        config = QLoRAConfig(
            block_size=self.form.block_size, double_quant=self.form.double_quant,
            nested_block_size=self.form.nested_block_size, embeddings=self.embeddings, stream=stream, resident=resident,
            skip_modules=heads, requantize=self.requantize,
            served=self.served if self.served in READ_IN else None,
        )  # fmt: skip
        if spill is not None:
            config = spilling(config, spill)
        return self._finished(self._quantized(config, weights, shown=spill is not None))

    def dense_first(
        self,
        calibration: Calibration | None = None,
        init_lora: InitLora | None = None,
        keep: Callable[[Any], list[str]] | None = None,
    ) -> Any:
        """Loads the dense model, and then quantizes it, which calibrations and initial adapters require.

        Args:
            calibration: chooses scales and codes.
            init_lora: computes initial adapters.
            keep: returns the names of the layers of the dense model that stay dense.
        """
        from qlora_ext.dtypes import computing_dtype
        from qlora_ext.nn import computing_in

        validate_model.check_room(self.source, load_config(self.source))
        self._say_that_it_decodes("options need the dense model")
        model = _dense(self.source, self.dtype)
        runs = calibration is not None or keep is not None
        if runs:
            model.to(self.device)
        with computing_in(model, computing_dtype(self.dtype, self.device)) if runs else contextlib.nullcontext():
            self._quantize(model, keep, calibration=calibration, init_lora=init_lora)
        return self._placed(model)

    def _say_that_it_decodes(self, why: str) -> None:
        if has_4bit_blocks(self.source):
            print(
                f"qlora-ext: the quantized weights of {printable(self.source.name)} are decoded and quantized to NF4, "
                f"because {why}",
                file=sys.stderr,
            )

    def _quantized(self, config: Any, weights: GGUFWeights | None, shown: bool) -> Any:
        """Lets transformers quantize the model while it loads it, from its files or from ``weights``."""
        options = {"dtype": self.dtype, "device_map": {"": self.device}, "quantization_config": config}
        with warnings.catch_warnings():
            # The warning says that a saved 4-bit model keeps its own form, which is intended.
            warnings.filterwarnings("ignore", "You passed `quantization_config`", UserWarning)
            model = _load(self.source, weights, shown, **options)
        if weights is not None:
            print(f"qlora-ext: {weights.summary}", file=sys.stderr)
        return model

    def _placed(self, model: Any, stream: str | None = None, resident: str | None = None) -> Any:
        """The quantized model on its device, or streamed to it, checked."""
        from qlora_ext import streaming

        if stream is not None and self.device.type != "cpu":
            streaming.stream(model, resident, "ram", self.device)
        else:
            model.to(self.device)
        return self._finished(model)

    def _finished(self, model: Any) -> Any:
        model = _checked(model, self.source, self.dtype, self.compute, self.layers)
        if self.activations is not None:
            set_activations(model, self.activations, self.device.type)
        return model

    def _quantize(self, model: Any, keep: Callable[[Any], list[str]] | None = None, **options: Any) -> None:
        from qlora_ext.nn import quantize_model

        try:
            dense = () if keep is None else keep(model)
            options |= {"embeddings": self.embeddings, "compute_dtype": self.dtype}
            quantize_model(model, keep=dense, **options, **self.form.keywords)
        except UserError:
            raise
        except ValueError as error:  # a NaN, with its index
            raise UserError(f"cannot quantize {self.source.name}: {first_line(error)}") from error
