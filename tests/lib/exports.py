"""What the tests of ``export`` share: bases with adapters, readers of every format, and each target exported once."""

from __future__ import annotations

import dataclasses
import pathlib
import re
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

import qlora_ext
from commands import Paths, here

Refused = Callable[..., str]
Exported = Callable[[str], "Written"]
IDS = torch.arange(40, 72).view(2, 16)
CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class Target:
    """What is tested of a target.

    Attributes:
        base: of the adapter that is exported: "run" is a finished run on a directory, "gguf" an adapter on a file.
        logits: the largest relative error of the logits that its reader computes.
        weights: the largest error of the weights, or of the update, that the report states.
        library: reads the result.
        is_4bit: whether the weights are rounded to 4 bits.
    """

    base: str
    logits: float
    weights: float
    library: str = "gguf"
    is_4bit: bool = False


TARGETS = {
    "dense": Target("run", 0.01, 2e-3, "transformers"),
    "nf4": Target("run", 0.2, 0.2, "transformers", True),
    "bitsandbytes": Target("run", 0.2, 0.2, "bitsandbytes", True),
    "compressed-tensors:int4": Target("run", 0.2, 0.2, "compressed_tensors", True),
    "compressed-tensors:nvfp4": Target("run", 0.2, 0.2, "compressed_tensors", True),
    "compressed-tensors:mxfp4": Target("run", 0.25, 0.25, "compressed_tensors", True),
    "gguf-adapter": Target("gguf", 1e-4, 1e-6),
    "gguf-adapter:f16": Target("gguf", 1e-3, 1e-3),
    "gguf:f16": Target("gguf", 2e-3, 3e-3),
    "gguf:bf16": Target("gguf", 0.01, 0.01),
    "gguf:q8_0": Target("gguf", 0.02, 0.02),
    **{f"gguf:{kind}": Target("gguf", 0.25, 0.25, is_4bit=True) for kind in ("q4_0", "q4_1", "iq4_nl", "mxfp4")},
    **{to: Target("gguf", 0.25, 0.25, is_4bit=True) for to in ("gguf", "gguf:same", "ollama")},
    "ollama:iq4_nl": Target("gguf", 0.2, 0.2, is_4bit=True),
    "ollama:adapter": Target("gguf", 1e-4, 1e-6),
}


@dataclasses.dataclass(frozen=True)
class Written:
    """A result of ``export``, what the command printed, the adapter and its base."""

    path: pathlib.Path
    printed: str
    adapter: pathlib.Path
    base: pathlib.Path

    @property
    def file(self) -> pathlib.Path:
        """The GGUF file, also inside a directory for Ollama."""
        return self.path if self.path.is_file() else next(self.path.glob("*.gguf"))


def output_of(to: str, directory: pathlib.Path) -> pathlib.Path:
    return directory / (f"{to.replace(':', '-')}.gguf" if to.startswith("gguf") else to.replace(":", "-"))


def loaded(base: pathlib.Path, served: str | None = None) -> Any:
    """The base as ``finetune`` loads it, in 4 bits, with float32 for what is not."""
    from qlora_app.models import Loader, resolve
    from qlora_ext.form import Form

    return Loader(resolve(str(base)), Form(), torch.float32, CPU, torch.float32, served=served).while_loading()


def dense(path: pathlib.Path) -> Any:
    """The model in a directory or a file, in float32, as our commands read it."""
    from qlora_app.models import load_dense, resolve

    return load_dense(resolve(str(path)), torch.float32, CPU)


def read(path: pathlib.Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model in a directory or a file, as transformers reads it with the library of its format."""
    from transformers import AutoModelForCausalLM

    if path.is_file():
        return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)


def ours(path: pathlib.Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model in a directory with its 4-bit layers, as transformers reads it with qlora_ext."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, quantization_config=qlora_ext.QLoRAConfig(), dtype=dtype)


def read_gguf(path: pathlib.Path, **options: Any) -> Any:
    """The model in a file of any architecture, as the package reads it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    return qlora_ext.gguf.GGUFWeights(path, skeleton).load(dtype=torch.float32, **options).eval()


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(ids).logits.float()
    return found


def adapt(
    directory: pathlib.Path,
    base: pathlib.Path,
    model: Any = None,
    size: float = 1.0,
    noise: float = 0.02,
    **options: Any,
) -> Any:
    """Saves an adapter that is not the identity. Returns the PEFT model.

    Args:
        model: the one at ``base``; None loads it in 4 bits.
        size: the factor of each B.
        noise: the standard deviation by which weights that are trained in full change.
        options: of LoRA.
    """
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    config = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **options}
    config = LoraConfig(task_type="CAUSAL_LM", **config)
    peft = get_peft_model(loaded(base) if model is None else model, config).eval()
    for name, p in peft.named_parameters():
        if ".lora_B" in name or ".lora_embedding_B" in name:
            p.data.mul_(size)
        elif ".modules_to_save." in name or "trainable_tokens" in name:
            p.data.add_(noise * torch.randn(p.shape).to(p.dtype))
    peft.peft_config["default"].base_model_name_or_path = str(base)
    peft.save_pretrained(directory)
    return peft


def write_base(path: pathlib.Path, *kinds: str, **sizes: Any) -> pathlib.Path:
    """A GGUF file of a Llama that reads any text, whose matrices have these types in turn."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from gguf_files import WIDE, WITH_BYTES, write

    torch.manual_seed(0)
    config = LlamaConfig(**{**WIDE, **WITH_BYTES, **sizes})
    write(AutoModelForCausalLM.from_config(config, dtype=torch.float32), path, "llama", kinds=kinds)
    return path


def contents(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, tuple[str, bytes]]]:
    """The metadata of a GGUF file without our version, and the type and bytes of each tensor."""
    import gguf

    reader = gguf.GGUFReader(path)
    values = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert values.pop("qlora_ext.version", "1")
    return values, {t.name: (t.tensor_type.name, t.data.tobytes()) for t in reader.tensors}


def matrices_of(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The metadata of a GGUF file, and its tensors, of which those in blocks are decoded."""
    import gguf

    reader = gguf.GGUFReader(path)
    values = {name: field.contents() for name, field in reader.fields.items()}
    decoded = {
        t.name: t.data if t.data.dtype.kind == "f" else gguf.dequantize(t.data, t.tensor_type) for t in reader.tensors
    }
    return values, {name: torch.from_numpy(data.copy()) for name, data in decoded.items()}


def with_adapter_file(base: pathlib.Path, adapter: pathlib.Path, path: pathlib.Path) -> pathlib.Path:
    """A copy of a GGUF file to whose weights alpha / rank · B · A is added, which is what llama.cpp does."""
    from transformers import AutoConfig

    from gguf_files import write

    (values, matrices), (_, weights) = matrices_of(adapter), matrices_of(base)
    for name in weights:
        if f"{name}.lora_a" in matrices:
            a, b = matrices.pop(f"{name}.lora_a"), matrices.pop(f"{name}.lora_b")
            weights[name] = weights[name] + values["adapter.lora.alpha"] / b.shape[1] * (b @ a)
    assert matrices == {}
    config = AutoConfig.from_pretrained(base.parent, gguf_file=base.name)
    nothing = types.SimpleNamespace(config=config, state_dict=dict)
    merged = {name: tensor.float().numpy() for name, tensor in weights.items()}
    write(nothing, path, values["general.architecture"], more=merged, kinds=["F32"])
    return path


def share(printed: str, words: str = "layers, which hold") -> float:
    """The share of the adapter's update that the report states, in percent."""
    found = re.search(rf"{words} ([\d.]+)% of the adapter's update", printed)
    assert found, printed
    return float(found[1])


def retained(printed: str) -> float:
    """The share of the update that codes retain whose scales do not change, in percent."""
    return share(printed, "the codes retain")


@pytest.fixture(scope="session")
def gguf_adapter(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """An adapter on a GGUF file with 4-bit and dense matrices, beside a text on which its exports are checked."""
    root = tmp_path_factory.mktemp("gguf_adapter")
    (root / "text.txt").write_text("some text that is long enough for a check. " * 30)
    base = write_base(root / "base.gguf", "Q4_0", "Q4_1", "F16", "MXFP4", "Q8_0")
    adapt(root / "adapter", base, read(base), size=0.3)
    return root / "adapter"


@pytest.fixture(scope="session")
def exported(
    paths: Paths, finished_run: pathlib.Path, gguf_adapter: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> Exported:
    """Exports to a target once, with its check. Tests only read the result."""
    made: dict[str, Written] = {}

    def export(to: str) -> Written:
        target = TARGETS[to]
        pytest.importorskip(target.library, reason=f"{target.library} is not installed")
        if to not in made:
            adapter, base, data = finished_run / "adapter", paths["model"], []
            if target.base == "gguf":
                adapter, base = gguf_adapter, gguf_adapter.parent / "base.gguf"
                data = ["--data", gguf_adapter.parent / "text.txt"]
            path = output_of(to, tmp_path_factory.mktemp("exported"))
            printed = here("export", "--adapter", adapter, "--to", to, "--output", path, *data)
            made[to] = Written(path, printed, adapter, base)
        return made[to]

    return export
