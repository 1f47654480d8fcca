"""``qlora-ext run``: programs, and their child Pythons, in which bitsandbytes is taken over."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

from safetensors import safe_open

from tiny_models import save_tiny_llama

COMMAND = [sys.executable, "-c", "import sys; from qlora_app.__main__ import main; sys.exit(main())", "run"]

# The steps of frameworks with bitsandbytes: load and prepare the model, look up its layers by class and by name, add
# adapters, train, save and load again.
FRAMEWORK = """
import sys
import bitsandbytes as bnb
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

path, output = sys.argv[1:]

def load_model():
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16, bnb_4bit_quant_storage=torch.bfloat16)
    return AutoModelForCausalLM.from_pretrained(
        path, quantization_config=quantization, device_map={"": "cpu"}, dtype=torch.bfloat16)

model = load_model()
assert model.is_loaded_in_4bit and model.config.quantization_config.load_in_4bit
model = prepare_model_for_kbit_training(
    model, use_gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False})
by_class = {name.split(".")[-1] for name, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
by_name = {name.split(".")[-1] for name, m in model.named_modules() if "Linear" in type(m).__name__} - {"lm_head"}
assert by_class == by_name
model = get_peft_model(model, LoraConfig(r=4, target_modules=sorted(by_class), task_type="CAUSAL_LM"))
for name, module in model.named_modules():
    if "norm" in name:
        module.to(torch.float32)
ids = torch.arange(24).reshape(2, 12)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
losses = []
for _ in range(4):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
assert losses[-1] < losses[0]
model.save_pretrained(output)
again = PeftModel.from_pretrained(load_model(), output)
print(sorted({type(m).__module__ + "." + type(m).__name__ for m in again.modules() if "4bit" in type(m).__name__}))
"""


def run(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    variables.pop("TOKENIZERS_PARALLELISM", None)  # set by commands that ran in this process
    return subprocess.run(
        [*COMMAND, *map(str, command)], capture_output=True, text=True, env=variables, timeout=600, check=False
    )


def test_a_framework_that_knows_bitsandbytes_alone(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path / "model", 0)
    script = tmp_path / "framework.py"
    script.write_text(FRAMEWORK)
    done = run("--", sys.executable, script, tmp_path / "model", tmp_path / "adapter")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("qlora_ext: 14 linear layers in NF4 instead of bitsandbytes'") == 2
    assert done.stdout.splitlines()[-1] == str(
        [
            "qlora_ext.integrations.bitsandbytes.layers.AdoptedLinear4bit",
            "qlora_ext.integrations.peft.linear.LoraLinear4bit",
        ]
    )


CHILD = """
import os, sys
assert "qlora_ext" not in sys.modules  # a program that needs none of it starts as fast as ever
from transformers import AutoModelForCausalLM
print("qlora_ext" in sys.modules, os.environ.get("HIDDEN"), os.environ["QLORA_EXT_TAKE_OVER"])
"""


def test_children_inherit_and_the_path_keeps_its_entries(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import os\nos.environ['HIDDEN'] = 'run'\n")
    parent = f"import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', {CHILD!r}]).returncode)"
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    done = run("--", sys.executable, "-c", parent, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "True run 1\n"


def test_sitecustomize_is_the_program_s(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("NAME = 5\n")
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    done = run("--", sys.executable, "-c", "import sitecustomize; print(sitecustomize.NAME)", PYTHONPATH=path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "5\n", "")


def test_looking_for_transformers_imports_nothing() -> None:
    script = (
        "import importlib.util, sys\n"
        "print([importlib.util.find_spec(name) is not None for name in ('transformers', 'peft')])\n"
        "print({'torch', 'qlora_ext'} & set(sys.modules))\n"
        "import peft\n"
        "print('qlora_ext' in sys.modules, type(peft.__spec__.loader).__name__)"
    )
    done = run("--", sys.executable, "-c", script)
    assert done.stdout.splitlines() == ["[True, True]", "set()", "True SourceFileLoader"], done.stderr


def test_a_python_without_qlora_ext_and_with_warnings_as_errors(tmp_path: Path) -> None:
    for name in ("transformers", "peft", "qlora_ext"):
        (tmp_path / name).mkdir()
        broken = "raise ImportError('not here')" if name == "qlora_ext" else ""
        (tmp_path / name / "__init__.py").write_text(broken)
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH")]))}
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import transformers, peft; print('done')"
    done = run("--", sys.executable, "-W", "error", "-c", code, **environment)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
    assert done.stderr.count("cannot import qlora_ext: not here") == 1


def test_a_script_without_an_interpreter_line(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text('echo "ran with $1"\n')
    script.chmod(0o755)
    done = run("--", script, "an argument")
    assert (done.returncode, done.stdout) == (0, "ran with an argument\n"), done.stderr


def test_the_program_is_as_it_would_be_by_itself() -> None:
    done = run(sys.executable, "-c", "import os, sys; print(os.environ.get('TOKENIZERS_PARALLELISM')); sys.exit(7)")
    assert (done.returncode, done.stdout, done.stderr) == (7, "None\n", "")
    missing = run("--", "no-such-program")
    assert (missing.returncode, missing.stderr) == (2, "qlora-ext: no-such-program: no such program\n")
    empty = run()
    assert empty.returncode == 2
    assert "expected a command after --" in empty.stderr


def test_the_environment_variable_takes_over_with_a_manual_import() -> None:
    script = (
        "import qlora_ext; import transformers.modeling_utils; from transformers.quantizers import auto;"
        "print(auto.AUTO_QUANTIZER_MAPPING['bitsandbytes_4bit'].__module__)"
    )
    found = {}
    for value in ("1", "0", ""):
        environment = {**os.environ, "QLORA_EXT_TAKE_OVER": value}
        command = [sys.executable, "-c", script]
        found[value] = subprocess.run(
            command, capture_output=True, text=True, env=environment, check=True
        ).stdout.strip()
    theirs = "transformers.quantizers.quantizer_bnb_4bit"
    assert found == {"1": "qlora_ext.integrations.bitsandbytes.quantizer", "0": theirs, "": theirs}


@pytest.mark.slow
def test_trl_sft(tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="TRL is not installed")
    save_tiny_llama(tmp_path / "model", 0)
    (tmp_path / "data").mkdir()
    rows = [{"text": " ".join(str(i + j) for j in range(6))} for i in range(16)]
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = (
        "--load_in_4bit --use_bnb_nested_quant --use_peft --lora_r 4 --lora_target_modules all-linear --dtype bfloat16 "
        "--max_steps 2 --per_device_train_batch_size 4 --max_length 64 --report_to none --use_cpu --bf16 False"
    )
    done = run(
        "--", sys.executable, "-c", "from trl.cli import main; main()", "sft",
        "--model_name_or_path", tmp_path / "model", "--dataset_name", tmp_path / "data",
        "--output_dir", tmp_path / "run", *options.split(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "qlora_ext: 14 linear layers in NF4 instead of bitsandbytes'" in done.stderr
    with safe_open(tmp_path / "run" / "adapter_model.safetensors", "pt") as adapter:
        trained = [name for name in adapter.keys() if "lora_B" in name and adapter.get_tensor(name).any()]  # noqa: SIM118
    assert len(trained) == 14
    assert (tmp_path / "run" / "qlora_base.json").is_file()  # written only for adapters over qlora_ext's layers


LLAMA_FACTORY = """
import sys, torch
from llamafactory.hparams import FinetuningArguments, ModelArguments
from llamafactory.model import load_model, load_tokenizer
model_args = ModelArguments(model_name_or_path=sys.argv[1], quantization_bit=4, disable_gradient_checkpointing=True)
model_args.compute_dtype, model_args.model_max_length, model_args.device_map = torch.bfloat16, 64, {"": "cpu"}
finetuning_args = FinetuningArguments(finetuning_type="lora", lora_rank=4, lora_target="all", stage="sft")
tokenizer = load_tokenizer(model_args)["tokenizer"]
model = load_model(tokenizer, model_args, finetuning_args, is_trainable=True)
"""
AXOLOTL = """
import sys, torch
from axolotl.loaders.model import ModelLoader
from axolotl.utils.dict import DictDefault
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
tokenizer.pad_token = tokenizer.eos_token
cfg = DictDefault(
    base_model=sys.argv[1], base_model_config=sys.argv[1], tokenizer_config=sys.argv[1], model_config_type="llama",
    is_llama_derived_model=True, load_in_4bit=True, adapter="qlora", lora_r=4, lora_alpha=8, lora_dropout=0.0,
    lora_target_linear=True, sequence_len=64,
    torch_dtype=torch.bfloat16, bf16=True, device="cpu", device_map="cpu", context_parallel_size=1,
    tensor_parallel_size=1, attn_implementation="sdpa",
)
model, _ = ModelLoader(cfg, tokenizer).load()
"""
TRAIN = """
ids = torch.arange(24).reshape(2, 12)
model(input_ids=ids, labels=ids).loss.backward()
print({type(m).__name__ for m in model.modules() if type(m).__module__.startswith("qlora_ext")})
"""


@pytest.mark.slow
@pytest.mark.parametrize(("framework", "script"), [("llamafactory", LLAMA_FACTORY), ("axolotl", AXOLOTL)])
def test_the_loading_code_of_a_framework(framework: str, script: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(framework) is None:
        pytest.skip(f"{framework} is not installed")
    save_tiny_llama(tmp_path / "model", 0)
    (tmp_path / "script.py").write_text(script + TRAIN)
    done = run(
        "--", sys.executable, tmp_path / "script.py", tmp_path / "model", DISABLE_VERSION_CHECK="1", DO_NOT_TRACK="1"
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "qlora_ext: 14 linear layers in NF4 instead of bitsandbytes'" in done.stderr
    assert {"AdoptedLinear4bit", "LoraLinear4bit"} == set(eval(done.stdout.splitlines()[-1]))
