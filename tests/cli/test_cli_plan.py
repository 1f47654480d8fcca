"""The planner is compared with measured peaks on this machine and the QLoRA paper's figures; adapters are listed."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, MixtralConfig

import qlora_app
import qlora_ext
from commands import here
from qlora_app.main import main
from qlora_app.outputs.files import write_json
from qlora_app.planning import families, memory
from qlora_ext import dtypes

SIZES = "hidden=512,intermediate=1536,layers=10,heads=8,kv-heads=4,vocab=16000"

LEVERS = ["none", "chunked_loss", "grad_checkpointing", "float32"]  # the last one in addition to the third
BATCH = {"batch_size": 2, "seq_len": 256}

# Runs a step of the planned job with each option, and prints by how many bytes memory rose above model and optimizer.
STEP = """
import json, sys, torch
from transformers import AutoModelForCausalLM
from peft import LoraConfig, get_peft_model
import qlora_ext
from qlora_app.planning import families
from qlora_app.models.loss import learnt_loss

def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024

sizes, options, levers = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3:]
config = families.config_of_sizes(sizes)
model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
qlora_ext.quantize_model(model)
model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear")).train()

def step(batch, length, chunked):
    ids = torch.randint(0, 1000, (batch, length))
    learnt_loss(model, {"input_ids": ids, "labels": ids}, None, chunked).backward()
    model.zero_grad(set_to_none=True)

rises = {}
for lever in levers:
    if lever == "grad_checkpointing":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if lever == "float32":  # dense weights stay in bfloat16
        qlora_ext.nn.set_compute_dtype(model, torch.float32)
    step(1, 32, lever == "chunked_loss")  # what the libraries set up once
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    step(options["batch_size"], options["seq_len"], lever == "chunked_loss")
    rises[lever] = status("VmHWM") - before
print(json.dumps(rises))
"""


def planned(config: object, **options: object) -> dict[str, float]:
    job = memory.Job(config=config, **options)
    return memory.split(job, memory.peaks(job))


def of_the_step(parts: dict[str, float]) -> float:
    return sum(parts[key] for key in ("gradients", "activations", "logits", "workspace"))


@pytest.fixture(scope="module")
def measured() -> dict[str, int]:
    """The rise of a process's resident memory by option, with glibc set to return pages immediately."""
    if not pathlib.Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux's /proc to measure a peak")
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "PATH": "/usr/bin:/bin"}
    run = subprocess.run(
        [sys.executable, "-c", STEP, SIZES, json.dumps(BATCH), *LEVERS], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    found: dict[str, int] = json.loads(run.stdout)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("lever", LEVERS)
def test_plan_is_the_measured_peak(measured: dict[str, int], lever: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within 10%."""
    options = BATCH | ({lever: True} if lever != "none" else {})
    if lever == "float32":
        monkeypatch.setattr(dtypes, "native_bfloat16", lambda: False)
        options = BATCH | {"grad_checkpointing": True, "host": True}
    foreseen = of_the_step(planned(families.config_of_sizes(SIZES), **options))
    assert foreseen == pytest.approx(measured[lever], rel=0.1)


def test_static_parts_are_those_of_a_real_model() -> None:

    sizes = "hidden=64,intermediate=128,layers=9,heads=4,vocab=200"
    parts = planned(families.config_of_sizes(sizes), rank=3, seq_len=16)
    model = AutoModelForCausalLM.from_config(families.config_of_sizes(sizes), dtype=torch.bfloat16)
    qlora_ext.quantize_model(model)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=3, target_modules="all-linear"))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert parts["adapters"] == 4 * trainable
    assert parts["optimizer state"] == 8 * trainable
    weights = parts["base weights"] + parts["scales"] + parts["other weights"] + parts["adapters"]
    assert weights == pytest.approx(total, abs=0.5)


def test_the_line_through_few_layers_meets_a_deep_model() -> None:
    config = families.config_of_sizes("hidden=64,intermediate=128,layers=20,heads=4,vocab=200")
    job = memory.Job(config=config, seq_len=64)
    direct = memory.split(job, memory._measure(job, 20))
    assert sum(planned(config, seq_len=64).values()) == pytest.approx(sum(direct.values()), rel=0.01)


@pytest.mark.parametrize(
    ("model", "gigabytes"), [("llama-7b", 6.9), ("llama-13b", 11.3), ("llama-33b", 24.7), ("llama-65b", 45.0)]
)
def test_papers_footprints(model: str, gigabytes: float) -> None:
    """Dettmers et al. (2023), figure 6: batch 1, 512 tokens, rank 64 on all layers, gradient checkpointing."""
    config, options = families.config(model), {"rank": 64, "batch_size": 1, "seq_len": 512}
    total = sum(planned(config, **options, grad_checkpointing=True).values())
    assert total / 1e9 == pytest.approx(gigabytes, rel=0.1)
    if model == "llama-65b":  # which the paper trains on a GPU of 48 GB
        assert total < 48e9 < sum(planned(config, **options).values())


def test_double_quantization_costs_0_127_bits() -> None:
    parts = planned(families.config("llama-7b"), seq_len=16)
    assert 4 * parts["scales"] / parts["base weights"] == pytest.approx(8 / 64 + 32 / (64 * 256), rel=1e-3)


def test_advice_makes_it_fit(tmp_path: pathlib.Path) -> None:
    small = ("plan", "--sizes", "hidden=64,intermediate=128,layers=9,heads=4,vocab=200", "--seq-len", "512")
    planned = json.loads(here(*small, "--json"))
    assert planned["fits"]
    assert planned == qlora_app.plan(sizes=small[2], seq_len=512, grad_checkpointing=False, rank=None)
    assert planned["total"] == pytest.approx(sum(planned["bytes"].values()))
    picture = tmp_path / "plan.png"
    tight = here(*small, "--memory", f"{0.8 * planned['total'] / 1e6:.3f}MB", "--plot", picture)
    assert "does not fit" in tight
    assert "--grad-checkpointing saves" in tight
    assert "and then it fits" in tight
    assert picture.read_bytes().startswith(b"\x89PNG")
    saved = json.loads(here(*small, "--json", "--grad-checkpointing"))
    assert saved["total"] < 0.8 * planned["total"]


def test_hub_style_names() -> None:
    assert families.known("meta-llama/Llama-2-70b-chat-hf")
    assert families.known("huggyllama/llama-7b")
    assert families.known("meta-llama/Meta-Llama-3-8B-Instruct")
    assert not families.known("some/thing-1b")


def test_adapters_are_listed(tmp_path: pathlib.Path) -> None:
    for name, record in (
        ("first", {"model": "base-a", "date": "2025-01-02T03:04:05+00:00",
                   "metrics": {"steps": 7, "perplexity_before": 20.0, "perplexity_after": 10.0}}),
        ("checkpoint-5", {"model": "base-a"}),
    ):  # fmt: skip
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "adapter_config.json", {"r": 16, "lora_alpha": 32})
        write_json(tmp_path / name / "qlora_base.json", {"fingerprint": "0123456789abcdef", "format_version": 1})
        write_json(tmp_path / name / "qlora_run.json", record)
    (tmp_path / "foreign").mkdir()
    write_json(tmp_path / "foreign" / "adapter_config.json", {"r": 4, "base_model_name_or_path": "base-b"})
    table = here("adapters", tmp_path).splitlines()
    assert table[0].split() == ["adapter", "base", "fingerprint", "rank", "alpha", "date", "steps", "perplexity"]
    cells = table[1].split()
    assert cells == ["first", "base-a", "0123456789ab", "16", "32", "2025-01-02", "03:04", "7", "20.00", "->", "10.00"]
    assert table[2].startswith("foreign  base-b")
    assert len(table) == 3
    records = [json.loads(line) for line in here("adapters", tmp_path, "--json").splitlines()]
    assert [record["fingerprint"] for record in records] == ["0123456789abcdef", None]


def test_no_adapter_to_list(capfd: pytest.CaptureFixture[str], tmp_path: pathlib.Path) -> None:
    assert main(["adapters", str(tmp_path)]) == 2
    assert "no adapter" in capfd.readouterr().err
    (tmp_path / "adapter_config.json").write_text("[]")
    assert main(["adapters", str(tmp_path)]) == 2
    assert main(["adapters", str(tmp_path / "missing")]) == 2


def test_experts_and_their_adapters_are_counted() -> None:

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MixtralConfig(**sizes, num_hidden_layers=2, vocab_size=128, num_local_experts=4)
    parts = planned(config, rank=4, target_modules=["q_proj"], seq_len=16)
    model = qlora_ext.quantize_model(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16))
    state = model.state_dict()
    scale_names = {n for n in state if "absmax" in n or "nested" in n}
    scales = sum(state[n].nbytes for n in scale_names)
    uint8 = sum(t.nbytes for n, t in state.items() if t.dtype == torch.uint8 and n not in scale_names)
    assert uint8 > 2 * 4 * 3 * 64 * 96 / 2
    assert (parts["base weights"], parts["scales"]) == (uint8, scales)
    assert parts["activations"] > 0


def test_experts_of_known_families() -> None:
    for name, billions in (("mistralai/Mixtral-8x7B-v0.1", 46.7), ("Qwen/Qwen3-30B-A3B", 30.5)):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(families.config(name))
        assert model.num_parameters() / 1e9 == pytest.approx(billions, abs=0.06)
