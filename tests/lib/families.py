"""Tests every family of the installed transformers: loading in 4 bits, training, saving, generating and merging.

``python tests/lib/families.py`` runs all of them on every core and writes docs/families.md; with names such as
``causal/llama`` it prints their rows. A step that fails with dense weights too is shown as "dense".
"""

from __future__ import annotations

import concurrent.futures
import copy
import dataclasses
import os
import pathlib
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import modeling_auto as auto

import forks
from qlora_ext import QLoRAConfig
from qlora_ext.nn import Linear4bit, coverage
from tiny_configs import config_of, inputs_of
from tiny_models import same_state

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "families.md"
STEPS = ("load", "save", "train", "generate", "merge")
# Larger models take too long: their configurations have sizes that the rules of tiny_configs do not match.
_MOST_PARAMETERS = 10_000_000

# Kinds of models: the mappings that list the families of a kind, each with the class that makes their models.
KINDS: dict[str, list[tuple[str, str]]] = {
    "causal": [("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "AutoModelForCausalLM")],
    "vision-language": [
        ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "AutoModelForImageTextToText"),
        ("MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", "AutoModelForMultimodalLM"),
    ],
    "speech": [
        ("MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES", "AutoModelForSpeechSeq2Seq"),
        ("MODEL_FOR_CTC_MAPPING_NAMES", "AutoModelForCTC"),
        ("MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES", "AutoModelForAudioClassification"),
        ("MODEL_FOR_TEXT_TO_WAVEFORM_MAPPING_NAMES", "AutoModelForTextToWaveform"),
    ],
    "encoder-decoder": [("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", "AutoModelForSeq2SeqLM")],
    "encoder": [
        ("MODEL_FOR_MASKED_LM_MAPPING_NAMES", "AutoModelForMaskedLM"),
        ("MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES", "AutoModelForTextEncoding"),
        ("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES", "AutoModelForSequenceClassification"),
    ],
    "vision": [
        ("MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES", "AutoModelForImageClassification"),
        ("MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES", "AutoModelForObjectDetection"),
        ("MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES", "AutoModelForUniversalSegmentation"),
        ("MODEL_FOR_DEPTH_ESTIMATION_MAPPING_NAMES", "AutoModelForDepthEstimation"),
        ("MODEL_FOR_IMAGE_MAPPING_NAMES", "AutoModel"),
    ],
    "other": [("MODEL_MAPPING_NAMES", "AutoModel")],
}


def families() -> dict[str, str]:
    """The class of each family and kind of model, by "kind/model_type"."""
    found: dict[str, str] = {}
    placed: set[str] = set()
    for kind, mappings in KINDS.items():
        for mapping, auto_class in mappings:
            for model_type in getattr(auto, mapping, {}):
                if kind != "other" or model_type not in placed:
                    found.setdefault(f"{kind}/{model_type}", auto_class)
        placed |= {name.partition("/")[2] for name in found}
    return found


@dataclasses.dataclass
class Row:
    """The results of a family.

    Attributes:
        built: the reason why no tiny dense model of the family runs; empty if one does.
        steps: "ok", "dense" (fails with dense weights too), "-" (has no such step) or what failed, by step.
        quantized: how many of the linear weights are quantized, in percent.
        dense: what else is dense: the last parts of the names of layers.
    """

    name: str
    built: str = ""
    steps: dict[str, str] = dataclasses.field(default_factory=dict)
    quantized: float = 0.0
    dense: list[str] = dataclasses.field(default_factory=list)

    @property
    def faults(self) -> list[str]:
        return [f"{step}: {what}" for step, what in self.steps.items() if what not in ("ok", "dense", "-")]


class _Family:
    def __init__(self, name: str, directory: pathlib.Path) -> None:
        kind, _, family = name.partition("/")
        self.loader = getattr(transformers, families()[name])
        self.directory = directory
        config = config_of(family)
        torch.manual_seed(0)
        with torch.device("meta"):
            count = sum(p.numel() for p in self.loader.from_config(config).parameters())
        if count > _MOST_PARAMETERS:
            raise ValueError(f"{count / 1e6:.0f} million parameters in the tiny configuration")
        model = self.loader.from_config(config, dtype=torch.float32).eval()
        for name, p in model.named_parameters():
            if name.endswith("bias") or not p.any():
                nn.init.normal_(p, std=0.02)
        self.inputs = inputs_of(model, family, kind)
        self.output(model)
        model.save_pretrained(directory / "dense")
        if not same_state(self.load(), model):
            raise ValueError("the dense model is not read as it was saved")

    def output(self, model: Any) -> list[Tensor]:
        """The floating-point tensors in the output of ``model``."""
        transformers.set_seed(0)
        with torch.no_grad():
            return [t for t in _tensors(model(**self.inputs)) if t.is_floating_point()]

    def load(self, name: str = "dense", **options: Any) -> Any:
        return self.loader.from_pretrained(self.directory / name, dtype=torch.float32, **options).eval()

    def quantized(self) -> Any:
        return self.load(quantization_config=QLoRAConfig())

    def decoded(self) -> Any:
        """The dense model with the decoded weights."""
        model = self.load()
        decoded = self.quantized().dequantize().state_dict()
        model.load_state_dict(decoded)
        model.config._is_quantized = True  # Jamba calls a layer then, and otherwise reads its weight
        return model


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _tensors(inner)


def _close(ours: list[Tensor], theirs: list[Tensor], tolerance: float) -> str:
    """ "ok", or the largest difference of the tensors, relative to the largest entry of each."""
    if len(ours) != len(theirs):
        return f"{len(ours)} tensors instead of {len(theirs)}"
    for a, b in zip(ours, theirs, strict=True):
        finite = b.isfinite()
        if not torch.equal(finite, a.isfinite()):
            return "NaN or infinity"
        off = (a - b)[finite].abs().max().item() / max(b[finite].abs().max().item(), 1e-6) if finite.any() else 0.0
        if off > tolerance:
            return f"off by {off:.1g}"
    return "ok"


# Families whose code reads the weight of out_proj, which PEFT rejects as a target.
_WITHOUT_OUT_PROJ = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}


def _targets(model: Any) -> list[str]:
    """The full names of the layers for adapters: all linear layers except the output heads."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    linear = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]
    if model.config.model_type in _WITHOUT_OUT_PROJ:
        linear = [(name, m) for name, m in linear if not name.endswith("out_proj")]
    packed = [name for name, m in linear if isinstance(m, Linear4bit)]
    return packed or [name for name, m in linear if type(m).forward is nn.Linear.forward]


def _adapted(model: Any, targets: list[str]) -> Any:
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, lora_dropout=0.0))


def _loss(family: _Family, model: Any) -> Tensor:
    transformers.set_seed(0)  # some models draw masks from numpy, too
    tensors = [t for t in _tensors(model(**family.inputs)) if t.is_floating_point() and t.requires_grad]
    # Not a sum of squares: for a normalized output it is constant, and its gradient only rounding errors.
    waves = (torch.cos(torch.arange(t.numel(), dtype=torch.float32)) for t in tensors)
    return sum((t.float().flatten() * wave).mean() for t, wave in zip(tensors, waves, strict=True))  # type: ignore[return-value]


def _train(family: _Family, model: Any, targets: list[str]) -> tuple[Any, list[Tensor]]:
    """``model`` with adapters after one step, and the gradients of that step."""
    adapted = _adapted(model, targets).train()
    for m in adapted.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    adapters = [p for name, p in adapted.named_parameters() if "lora_" in name]
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.01, generator=torch.Generator().manual_seed(p.numel()))
    optimizer = torch.optim.SGD(adapters, lr=1e-3)
    loss = _loss(family, adapted)
    loss.backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in adapters]
    optimizer.step()
    return adapted.eval(), gradients


def _run_step(step: Callable[[], str], dense: Callable[[], Any]) -> str:
    """The verdict or error of ``step``; "dense" if ``dense``, the same step of a dense model, fails as well."""
    try:
        verdict = step()
    except Exception as error:
        verdict = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
    if verdict not in ("ok", "-"):
        try:
            dense()
        except Exception:
            return "dense"
    return verdict


def row(name: str) -> Row:
    """Runs a family of ``families()`` through all steps."""
    result = Row(name)
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = pathlib.Path(directory)
        try:
            f = _Family(name, path)
        except Exception as error:
            result.built = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"[:160]
            return result
        _steps(f, result)
    return result


def _steps(f: _Family, result: Row) -> None:
    """Fills ``result``. A step whose precondition failed is "-"."""
    model: Any = None
    decoded: Any = None
    adapted: Any = None
    targets: list[str] = []

    def load() -> str:
        nonlocal model, decoded
        try:
            model = f.quantized()
        except ValueError as error:
            if "expected linear layers that can be 4-bit" not in str(error):
                raise
            result.built = f"there is nothing to quantize ({str(error).rpartition(': ')[2]})"
            return "-"
        found = coverage(model)
        result.quantized, result.dense = 100 * found.share, sorted({n.rpartition(".")[2] for n in found.dense})
        decoded = f.decoded()
        return _close(f.output(model), f.output(decoded), 2e-3)

    def save() -> str:
        model.save_pretrained(f.directory / "4bit")
        again = f.load("4bit")
        if not same_state(again, model):
            return "the state is another"
        # Copies: the rounding of convolutions depends on the alignment of memory, which differs in a mapped file.
        outputs = [f.output(copy.deepcopy(m)) for m in (again, model)]
        return "ok" if all(map(torch.equal, *outputs)) else "the output is another"

    def train() -> str:
        nonlocal adapted
        targets.extend(_targets(model))
        adapted, ours = _train(f, f.quantized(), targets)
        _, theirs = _train(f, f.decoded(), targets)
        if any(t.any() and not o.any() for o, t in zip(ours, theirs, strict=True)):
            return "adapters without a gradient"
        return _close(ours, theirs, 2e-2)

    def generate() -> str:
        if not hasattr(decoded, "generate") or not getattr(decoded, "can_generate", lambda: False)():
            return "-"
        return "ok" if torch.equal(_generated(f, model), _generated(f, decoded)) else "another answer"

    def merge() -> str:
        before = f.output(adapted)
        merged = adapted.merge_and_unload()
        verdict = _close(f.output(merged), before, 2e-3)
        if verdict != "ok":
            return verdict
        merged.save_pretrained(f.directory / "merged")
        return "ok" if same_state(f.load("merged"), merged) else "the merged state is another"

    def dense_merge() -> None:
        dense = _train(f, f.load(), targets)[0]
        before = f.output(dense)
        merged = dense.merge_and_unload()
        if _close(f.output(merged), before, 2e-3) != "ok":  # WavLM reads weights and ignores adapters on them
            raise ValueError("a merged dense model gives other outputs")
        merged.save_pretrained(f.directory / "merged")
        if not same_state(f.load("merged"), merged):
            raise ValueError("a merged dense model is not read as it was saved")

    steps: list[tuple[str, Callable[[], str], Callable[[], Any]]] = [
        ("load", load, lambda: f.output(f.load())),
        ("save", save, lambda: f.load().save_pretrained(f.directory / "again")),
        ("train", train, lambda: _train(f, f.load(), targets or _targets(f.load()))),
        ("generate", generate, lambda: _generated(f, f.load())),
        ("merge", merge, dense_merge),
    ]
    for name, step, dense in steps:
        made = {"load": f, "merge": adapted}.get(name, decoded)
        result.steps[name] = "-" if made is None else _run_step(step, dense)


def _generated(f: _Family, model: Any) -> Tensor:
    given = {key: value for key, value in f.inputs.items() if key not in ("labels", "decoder_input_ids")}
    torch.manual_seed(0)
    out = model.generate(**given, max_new_tokens=3, do_sample=False)
    return next(iter(_tensors(out)))


def start_worker() -> None:
    """Initializes a process of the pool."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def rows(names: Iterable[str]) -> list[Row]:
    """Runs the families ``names`` on all cores, in their order."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    forks.ensure_running()
    with concurrent.futures.ProcessPoolExecutor(cores, forks.CONTEXT, start_worker) as pool:
        return list(pool.map(row, names))


def line(result: Row) -> str:
    """The row of docs/families.md."""
    name = result.name.partition("/")[2]
    dense = ", ".join(f"`{part}`" for part in result.dense) if result.quantized < 99 else ""
    return f"| {name} | {result.quantized:.0f}% | {dense} | {' | '.join(result.steps[step] for step in STEPS)} |"


def page(results: Iterable[Row]) -> str:
    """docs/families.md."""
    results = list(results)
    built = [result for result in results if not result.built]
    text = [
        "# Model families",
        "",
        "These tables show what works in 4 bits for each model family of transformers: loading, saving, training,",
        "generation and merging. Every family was tried as a tiny random model, with transformers",
        f"{transformers.__version__} and PEFT {peft.__version__}. `python tests/lib/families.py` writes this page.",
        "",
        "- **4-bit**: the share of the linear weights that `QLoRAConfig()` makes 4-bit. Output heads and towers (the",
        "  encoders of images and sounds) are not counted.",
        "- **dense**: the layers that stay dense, listed if the share is below 99%. They stay dense because",
        "  transformers keeps them in float32, torch's attention computes with their weight, or there is no",
        "  4-bit layer of their kind;",
        "  `qlora_ext.nn.coverage(model)` gives the reason for each.",
        "- **load**: the outputs of the 4-bit model equal those of a dense model with the decoded weights.",
        "- **save**: the saved model loads again with the same bits.",
        "- **train**: one LoRA step on all 4-bit layers gives the gradients of that dense model.",
        "- **generate**: greedy decoding gives the tokens of that dense model.",
        "- **merge**: the merged model gives the outputs of the adapted one. It can be saved, and loads again with the",
        "  same bits.",
        "",
        'An entry "dense" means that the same call fails with dense weights too. "-" means that there is no such step.',
        "",
    ]
    for kind in KINDS:
        of_kind = [result for result in built if result.name.startswith(f"{kind}/")]
        text += [f"## {kind[0].upper()}{kind[1:]}: {len(of_kind)} families", ""]
        text += [f"| family | 4-bit | dense | {' | '.join(STEPS)} |", f"| {' | '.join(['---'] * (3 + len(STEPS)))} |"]
        text += [*map(line, of_kind), ""]
    text += [
        "## Not covered",
        "",
        "For these families, the test found no tiny dense model that runs. Each line gives the reason.",
        "",
    ]
    text += [f"- {result.name}: {_plain(result.built)}" for result in results if result.built]
    return "\n".join(text) + "\n"


def _plain(reason: str) -> str:
    """A reason as shown on the page, without markup and without paths of this machine."""
    reason = re.sub(r" from '?/\S*", "", reason)
    return reason.replace("|", "/").replace("<", "").replace(">", "").replace("*", "")


if __name__ == "__main__":
    if sys.argv[1:]:
        for found in rows(sys.argv[1:]):
            print(found.built or line(found))
    else:
        PAGE.write_text(page(rows(families())))
