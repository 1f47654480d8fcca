"""Suggestions for unknown options and commands: corrects misspellings and translates names of other tools."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

# Below this similarity, a suggestion misleads more often than it helps. One of few values may be less similar.
_LIKENESS, _LIKENESS_OF_CHOICES = 0.75, 0.5

# Our option -> what Hugging Face's Trainer, PEFT, TRL, axolotl, LLaMA-Factory, LitGPT, MLX-LM, Unsloth and llama.cpp
# call it, without dashes in front. A name may stand for several options; a command has at most one of them.
_OPTIONS = {
    "--model": "model-name-or-path model-name model-id model-path base-model checkpoint-dir "
    "pretrained-model-name-or-path hf-model hf-path",
    "--data": "dataset dataset-name dataset-path dataset-dir datasets data-path data-dir data-files train-file "
    "train-data train-dataset training-data",
    "--split": "dataset-split dataset-train-split train-split",
    "--output": "output-dir output-path out out-dir save-dir save-path save-directory export-dir outfile mlx-path",
    "--overwrite": "overwrite-output-dir",
    "--resume": "resume-from-checkpoint auto-resume-from-checkpoints",
    "--adapter": "adapter-path adapter-dir adapter-name-or-path adapter-model adapters lora lora-path lora-dir "
    "lora-model-dir peft-model peft-model-id checkpoint",
    "--init-adapter": "adapter-path adapter-name-or-path lora-model-dir resume-adapter-file init-lora",
    "--seq-len": "max-length max-seq-length max-seq-len max-sequence-length sequence-len sequence-length cutoff-len "
    "model-max-length context-length ctx-size train-max-seq-length",
    "--eval-size": "val-size val-set-size eval-set-size test-size data-val-split-fraction",
    "--rank": "r lora-r lora-rank lora-dim",
    "--alpha": "lora-alpha lora-scale",
    "--dropout": "lora-dropout",
    "--target-modules": "lora-target-modules lora-target lora-target-linear lora-modules lora-keys",
    "--modules-to-save": "lora-modules-to-save additional-target unfrozen-parameters",
    "--layers": "layers-to-transform lora-layers lora-layers-to-transform peft-layers-to-transform num-layers",
    "--rslora": "use-rslora peft-use-rslora lora-use-rslora",
    "--dora": "use-dora peft-use-dora lora-use-dora",
    "--method": "stage fine-tune-type finetuning-type train-type train-mode rl",
    "--beta": "dpo-beta kto-beta pref-beta rl-beta",
    "--max-steps": "iters max-iters num-iters steps num-steps train-steps train-max-steps",
    "--epochs": "num-train-epochs num-epochs train-epochs n-epochs train-epochs",
    "--batch-size": "per-device-train-batch-size per-device-batch-size per-gpu-train-batch-size micro-batch-size "
    "train-batch-size train-micro-batch-size",
    "--grad-accum": "gradient-accumulation-steps gradient-accumulation grad-accumulation-steps grad-accum-steps "
    "accumulate-grad-batches accumulation-steps",
    "--lr": "learning-rate optimizer-lr",
    "--lr-schedule": "lr-scheduler-type lr-scheduler lr-schedule-type lr-decay scheduler scheduler-type",
    "--warmup-steps": "lr-warmup-steps num-warmup-steps warmup train-lr-warmup-steps",
    "--warmup-ratio": "lr-warmup-ratio warmup-fraction",
    "--weight-decay": "wd adam-weight-decay optimizer-weight-decay",
    "--max-grad-norm": "gradient-clipping gradient-clip-val grad-clip clip-grad-norm clip-grad max-norm train-max-norm",
    "--neftune-alpha": "neftune-noise-alpha noise-alpha neftune",
    "--no-packing": "packing no-pack sample-packing neat-packing pack",
    "--optimizer": "optim optimizer-name",
    "--seed": "random-state random-seed data-seed sampling-seed",
    "--save-steps": "save-every save-interval steps-per-save train-save-interval saves-per-epoch",
    "--eval-steps": "eval-every eval-interval steps-per-eval evaluation-steps evals-per-epoch val-check-interval",
    "--report-to": "tracker trackers logger loggers log-with",
    "--config": "config-file config-path yaml",
    "--help-all": "help-verbose full-help helpfull",
    "--dtype": "torch-dtype compute-dtype bnb-4bit-compute-dtype precision mixed-precision bf16 fp16 fp32 tf32",
    "--device": "device-map use-cpu no-cuda gpu n-gpu-layers",
    "--grad-checkpointing": "gradient-checkpointing use-gradient-checkpointing activation-checkpointing "
    "checkpoint-activations grad-checkpoint",
    "--max-memory": "max-memory-mb gpu-memory-utilization",
    "--max-new-tokens": "max-tokens max-length max-gen-tokens n-predict num-predict max-output-tokens",
    "--temperature": "temp",
    "--prompt": "text input instruction question message",
    "--system": "system-prompt system-message default-system",
    "--4bit": "load-in-4bit quantize-4bit q4",
    "--block-size": "blocksize group-size q-group-size quant-block-size",
    "--format": "quant-type quant-method quantization-method",
    "--calibrate": "calibration calibration-data calib-data imatrix",
    "--base": "base-model base-model-name-or-path reference ref-model",
    "--tokens": "num-tokens max-tokens limit",
    "--memory": "gpu-memory vram",
    "--context": "max-model-len num-ctx",
    "--sequences": "max-num-seqs parallel",
}
_COMMANDS = {
    "finetune": "train training sft dpo kto grpo orpo fine-tune fine-tuning tune lora qlora finetune-lora",
    "check": "eval evaluate evaluation test validate verify perplexity",
    "generate": "infer inference predict complete completion ask answer",
    "chat": "talk interactive repl",
    "serve": "server api api-server http openai",
    "merge": "fuse merge-lora merge-adapter merge-and-unload",
    "export": "deploy gguf ollama save-pretrained-gguf",
    "quantize": "quant quantise convert compress bnb",
    "adapters": "list ls loras checkpoints",
    "plan": "estimate estimate-memory memory vram",
    "run": "exec launch",
    "info": "env environment doctor system",
    "completion": "completions complete-shell autocomplete install-completion show-completion",
}
_VALUES = {"dpo": "orpo simpo cpo ipo"}  # of --method: other methods that learn from the same data


def _key(name: str) -> str:
    """A name in normal form: without leading dashes, underscores, dots and capitals."""
    return name.lstrip("-").lower().replace("_", "-").replace(".", "-")


def _likeness(one: str, other: str) -> float:
    if sorted(one) == sorted(other):
        return 1.0  # transposed letters, which the ratio underrates in short words
    return difflib.SequenceMatcher(None, one, other).ratio()


def _words(name: str) -> list[str]:
    """The words and numbers in a name: llama, 3, 8 and b for llama-3-8b."""
    return re.findall("[a-z]+|[0-9]+", name.lower())


def _nearest(typed: str, known: Iterable[str], elsewhere: dict[str, str], likeness: float = _LIKENESS) -> str | None:
    names, key = list(known), _key(typed)
    by_key = {_key(name): name for name in names}
    if key in by_key:
        return by_key[key]
    for name in names:
        if key in elsewhere.get(name, "").split():
            return name
    best = max(by_key, key=lambda other: _likeness(key, other), default="")
    return by_key[best] if best and _likeness(key, best) >= likeness else None


def option(typed: str, known: Iterable[str]) -> str:
    """The end of an error message that suggests one of the options ``known``; empty if none is similar to ``typed``."""
    found = _nearest(typed, known, _OPTIONS)
    return f"; did you mean {found}?" if found else ""


def command(typed: str, known: Iterable[str]) -> str:
    """The same as ``option``, for commands."""
    found = _nearest(typed, known, _COMMANDS)
    return f"; did you mean {found}?" if found else ""


def value(typed: str, known: Iterable[str]) -> str:
    """The same as ``option``, for the values of an option."""
    return _completion(typed, known, _LIKENESS_OF_CHOICES)


def model(typed: str, known: Iterable[str]) -> str:
    """The same as ``option``, for the names of models, of which ``known`` are a few."""
    return _completion(typed, known, _LIKENESS)


def _completion(typed: str, known: Iterable[str], likeness: float) -> str:
    """The shortest name that continues what was typed, or else one that is similar to it."""
    names, begin = list(known), _words(typed)
    longer = [name for name in names if begin and _words(name)[: len(begin)] == begin]
    found = min(longer, key=len) if longer else _nearest(typed, names, _VALUES, likeness)
    return f"; did you mean {found}?" if found else ""
