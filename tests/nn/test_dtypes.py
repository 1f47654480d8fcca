"""The automatic compute dtype: bfloat16 only on processors with bfloat16 arithmetic, with the same 4-bit weights."""

from __future__ import annotations

import json
import pathlib
import shutil
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import qlora_ext
from commands import RUN, Paths, base, command, here
from qlora_app.errors import UserError
from qlora_app.models.devices import parse_computing_dtype
from qlora_ext import dtypes
from qlora_ext.gguf import blocks
from qlora_ext.nn import layers_of
from tiny_models import make

CPU = torch.device("cpu")


def without_bfloat16() -> None:
    """Simulates a processor without bfloat16 arithmetic."""
    dtypes.native_bfloat16 = lambda: False


def with_bfloat16() -> None:
    dtypes.native_bfloat16 = lambda: True


@pytest.fixture(params=[False, True], ids=["float32", "integers"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """In which dtype 4-bit layers multiply on a simulated processor without bfloat16 arithmetic."""
    monkeypatch.setattr(dtypes, "native_bfloat16", lambda: False)
    monkeypatch.setattr(dtypes, "integer_products", lambda: request.param)
    return torch.bfloat16 if request.param else torch.float32


@pytest.fixture
def laptop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dtypes, "native_bfloat16", lambda: False)


@pytest.mark.parametrize(
    ("isa", "limit", "native"),
    [
        ("avx512_bf16", None, True),
        ("amx_bf16", None, True),
        ("neon_bf16", None, True),
        ("neon_i8mm", None, True),
        ("avx_vnni", None, False),
        ("avx512", None, False),
        ("avx2", None, False),
        ("scalar", None, False),
        ("avx512_bf16", "AVX2", False),
        ("avx512_bf16", "avx512_core_vnni", False),
        ("avx512_bf16", "AVX512_CORE_BF16", True),
        ("amx_bf16", "AVX512_CORE_AMX", True),
        ("amx_bf16", "ALL", True),
    ],
)
def test_native_bfloat16(monkeypatch: pytest.MonkeyPatch, isa: str, limit: str | None, native: bool) -> None:
    monkeypatch.setattr(dtypes._C, "cpu_isa", lambda: isa)
    monkeypatch.delenv("DNNL_MAX_CPU_ISA", raising=False)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    if limit is not None:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert dtypes.native_bfloat16() is native


@pytest.mark.parametrize("native", [False, True])
def test_computing_dtype(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    monkeypatch.setattr(dtypes, "native_bfloat16", lambda: native)
    chosen = torch.bfloat16 if native else torch.float32
    assert dtypes.computing_dtype(torch.bfloat16, CPU) == chosen
    assert dtypes.computing_dtype(torch.bfloat16, None) == chosen
    assert dtypes.computing_dtype(torch.bfloat16, "cuda") == torch.bfloat16
    assert dtypes.computing_dtype(torch.float16, CPU) == torch.float16
    assert dtypes.computing_dtype(torch.float32, CPU) == torch.float32


def test_the_dtype_of_4bit_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
    for integers in (False, True):
        monkeypatch.setattr(dtypes, "integer_products", lambda integers=integers: integers)
        for device in (CPU, "cpu", None):
            assert dtypes.layers_dtype(bf16, f32, device) == (bf16 if integers else f32)
            for dtype in (bf16, f16, f32):  # the model's own dtype
                assert dtypes.layers_dtype(dtype, dtype, device) == dtype
        assert dtypes.layers_dtype(bf16, f32, "cuda") == f32
        assert dtypes.layers_dtype(bf16, f16, "cuda") == f16


@pytest.mark.parametrize(
    ("isa", "integers"), [("scalar", False), ("avx2", True), ("avx512", True), ("avx512_bf16", False)]
)
def test_integer_products(monkeypatch: pytest.MonkeyPatch, isa: str, integers: bool) -> None:
    choose = dtypes._C.choose
    monkeypatch.setattr(dtypes._C, "choose", lambda *problem: choose(*problem, isa=isa))
    assert dtypes.integer_products() == integers


def test_4bit_layers_multiply_in_bfloat16_in_a_float32_model() -> None:
    torch.manual_seed(0)
    dense = torch.nn.Sequential(torch.nn.Embedding(100, 320), torch.nn.Linear(320, 256), torch.nn.Linear(256, 64))
    model = qlora_ext.quantize_model(dense, embeddings=True)
    ids = torch.arange(64)
    exact = model(ids)
    qlora_ext.nn.multiply_in_bfloat16(model)
    assert [layer.compute_dtype for _, layer in layers_of(model)] == [torch.float32, torch.bfloat16, torch.bfloat16]
    y = model(ids)
    assert y.dtype == torch.float32
    assert 0 < (y - exact).norm() < 4e-3 * exact.norm()
    assert torch.equal(model.float()(ids), exact)


@pytest.mark.parametrize(
    ("form", "integers"),
    [(blocks.form_of("Q4_0"), True), (blocks.form_of("Q4_1"), True), (qlora_ext.Form(block_size=16), False),
     (qlora_ext.Form("nf4", "float32", offsets="float32"), False)],
)  # fmt: skip
def test_layers_that_integers_do_not_serve_stay_in_float32(form: qlora_ext.Form, integers: bool) -> None:
    model = qlora_ext.quantize_model(torch.nn.Sequential(torch.nn.Linear(64, 48)), **form.keywords)
    qlora_ext.nn.multiply_in_bfloat16(model)
    assert model[0].compute_dtype == (torch.bfloat16 if integers else torch.float32)


@pytest.mark.parametrize(("capability", "lacks_bfloat16"), [((7, 5), True), ((8, 0), False), ((12, 0), False)])
def test_computing_dtype_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], lacks_bfloat16: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla T4")
    chosen = torch.float16 if lacks_bfloat16 else torch.bfloat16
    gpu = torch.device("cuda")
    for device in (gpu, "cuda:0"):
        assert dtypes.computing_dtype(torch.bfloat16, device) == chosen
        assert dtypes.computing_dtype(torch.float32, device) == torch.float32
    assert qlora_ext.QLoRAConfig().computing_dtype(torch.bfloat16, gpu) == chosen
    assert qlora_ext.QLoRAConfig(compute_dtype="bfloat16").computing_dtype(torch.bfloat16, gpu) == torch.bfloat16
    assert parse_computing_dtype("auto", gpu) == chosen
    if lacks_bfloat16:
        with pytest.raises(UserError, match="^--dtype bf16: Tesla T4 has no bfloat16 arithmetic; use float16"):
            parse_computing_dtype("bf16", gpu)
    else:
        assert parse_computing_dtype("bf16", gpu) == torch.bfloat16


def loaded(path: pathlib.Path, **options: object) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, **options)
    return model


def computes_in(model: torch.nn.Module) -> set[torch.dtype]:
    return {layer.compute_dtype for _, layer in layers_of(model)}


def test_a_model_without_bfloat16(
    products: torch.dtype, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    make("llama").bfloat16().save_pretrained(tmp_path / "dense")
    model = loaded(tmp_path / "dense", quantization_config=qlora_ext.QLoRAConfig())
    assert computes_in(model) == {products}
    assert type(model.lm_head) is qlora_ext.nn.Linear16bit  # multiplies in float32 either way
    assert {layer.weight_dtype for _, layer in layers_of(model)} == {torch.bfloat16}
    assert model.dtype == torch.bfloat16
    assert model.dequantize().dtype == torch.bfloat16

    model = loaded(tmp_path / "dense", quantization_config=qlora_ext.QLoRAConfig(compute_dtype="auto"))
    model.save_pretrained(tmp_path / "4bit")
    assert json.loads((tmp_path / "4bit/config.json").read_text())["quantization_config"]["compute_dtype"] == "auto"
    again = loaded(tmp_path / "4bit")
    assert computes_in(again) == {products}
    monkeypatch.setattr(dtypes, "native_bfloat16", lambda: True)
    elsewhere = loaded(tmp_path / "4bit")
    assert computes_in(elsewhere) == {torch.bfloat16}
    for name, tensor in model.state_dict().items():
        assert torch.equal(elsewhere.state_dict()[name], tensor), name


def test_an_explicit_compute_dtype_is_used(laptop: None, tmp_path: pathlib.Path) -> None:
    make("llama").bfloat16().save_pretrained(tmp_path / "dense")
    model = loaded(tmp_path / "dense", quantization_config=qlora_ext.QLoRAConfig(compute_dtype="bfloat16"))
    assert computes_in(model) == {torch.bfloat16}
    model.save_pretrained(tmp_path / "4bit")
    assert computes_in(loaded(tmp_path / "4bit")) == {torch.bfloat16}


def adapter(run: pathlib.Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def test_a_run_without_bfloat16(paths: Paths, finished_run: pathlib.Path, tmp_path: pathlib.Path) -> None:
    run = tmp_path / "run"
    printed = command("finetune", *base(paths), "--output", run, *RUN, before=without_bfloat16)
    assert printed.returncode == 0, printed.stderr
    assert "computing in float32 on cpu, because the processor has no bfloat16 arithmetic" in printed.stdout
    # The 4-bit base is that of a machine with bfloat16, and the adapter can be used there.
    fingerprints = [json.loads((r / "adapter" / "qlora_base.json").read_text()) for r in (run, finished_run)]
    assert fingerprints[0] == fingerprints[1]
    for machine in (with_bfloat16, without_bfloat16):
        answer = command("generate", "--adapter", run, "--prompt", "count", "--max-new-tokens", 2, before=machine)
        assert answer.returncode == 0, answer.stderr


def test_a_run_is_resumed_in_its_original_dtype(paths: Paths, tmp_path: pathlib.Path) -> None:
    """A run started without bfloat16 and resumed on a machine that has it gives the same adapter, bit for bit."""
    complete, cut = tmp_path / "whole", tmp_path / "cut"
    assert command("finetune", *base(paths), "--output", complete, *RUN, before=without_bfloat16).returncode == 0
    shutil.copytree(complete, cut)
    for name in ("adapter", "checkpoint-11"):  # as if it had stopped after step 8
        shutil.rmtree(cut / name)
    printed = command("finetune", "--output", cut, "--resume", before=with_bfloat16)
    assert printed.returncode == 0, printed.stderr
    assert "computing in float32 on cpu, as at the start of the run" in printed.stdout
    assert all(torch.equal(tensor, adapter(complete)[name]) for name, tensor in adapter(cut).items())


def test_calibration_without_bfloat16_saves_bfloat16(
    paths: Paths, tmp_path: pathlib.Path, laptop: None, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--calibrate", paths["data"], "--calibration-tokens", 512]
    here("quantize", "--model", paths["model"], "--output", tmp_path / "4bit", *options)
    config = json.loads((tmp_path / "4bit" / "config.json").read_text())
    assert config["quantization_config"]["compute_dtype"] == "auto"
    saved = load_file(tmp_path / "4bit" / "model.safetensors")
    floats = {name: t.dtype for name, t in saved.items() if t.is_floating_point() and "absmax" not in name}
    assert {dtype for name, dtype in floats.items() if "nested" not in name} == {torch.bfloat16}


def test_the_planner_uses_the_automatic_dtype(paths: Paths, laptop: None, capsys: pytest.CaptureFixture[str]) -> None:
    def other_weights(*more: str) -> float:
        capsys.readouterr()
        here("plan", "--model", paths["model"], "--seq-len", 32, "--json", "--memory", "1GB", *more)
        found: float = json.loads(capsys.readouterr().out)["bytes"]["other weights"]
        return found

    stored, wider = (other_weights("--device", "cpu", "--dtype", dtype) for dtype in ("bfloat16", "float32"))
    # Embeddings and heads are stored in bfloat16; norms are computed in float32.
    assert stored < other_weights("--device", "cpu") < 1.02 * stored < wider
    assert other_weights("--device", "cuda") == other_weights("--device", "cuda", "--dtype", "bfloat16")


def test_computing_in_another_dtype_keeps_float16_scales() -> None:
    dense = torch.nn.Sequential(torch.nn.Linear(64, 48).bfloat16())
    model = qlora_ext.quantize_model(dense, **blocks.form_of("Q4_0").keywords)
    assert model[0].absmax.dtype == torch.float16
    before = model[0].weight4bit.dequantize(torch.float32)
    with qlora_ext.nn.computing_in(model, torch.float32), torch.no_grad():
        assert model[0].absmax.dtype == torch.float16
        assert model(torch.ones(64)).dtype == torch.float32
    assert torch.equal(model[0].weight4bit.dequantize(torch.float32), before)


def test_computing_in_another_dtype_for_a_while() -> None:
    """Wider parameters do not change, and all others are restored bit for bit."""
    model = qlora_ext.quantize_model(make("llama").bfloat16())
    model.model.norm.float()
    torch.nn.init.normal_(model.model.norm.weight)
    model.model.layers[0].self_attn.q_proj.to(torch.float16)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    form = {name: layer.compute_dtype for name, layer in layers_of(model)}
    ids = torch.arange(8)[None]
    for dtype in (torch.bfloat16, torch.float32):
        with qlora_ext.nn.computing_in(model, dtype):
            assert computes_in(model) == {dtype}
            assert model.lm_head.weight.dtype == dtype
            assert model.model.norm.weight.dtype == torch.float32
        assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
        assert {name: t.dtype for name, t in model.state_dict().items()} == {n: t.dtype for n, t in before.items()}
        assert {name: layer.compute_dtype for name, layer in layers_of(model)} == form
    with qlora_ext.nn.computing_in(model, torch.float32), torch.no_grad():
        assert model(ids).logits.dtype == torch.float32


@pytest.mark.parametrize("options", [[], ["--4bit"], ["--4bit", "--calibrate"]], ids=["dense", "4bit", "calibrated"])
def test_merge_measures_in_the_automatic_dtype(
    paths: Paths,
    finished_run: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[object],
) -> None:
    """It saves in ``--dtype``. Without calibration, both kinds of processors give the same model."""
    from qlora_ext.fidelity import comparison
    from qlora_ext.integrations import peft as our_peft

    measured: list[torch.dtype] = []
    logits_of, merge_calibrated = comparison.logits_of, our_peft.merge_calibrated

    def logits(*arguments: Any, **inputs: Any) -> torch.Tensor:
        found = logits_of(*arguments, **inputs)
        measured.append(found.dtype)
        return found

    def calibrated(model: torch.nn.Module, calibration: object, compute_dtype: torch.dtype) -> torch.nn.Module:
        measured.append(compute_dtype)
        merged: torch.nn.Module = merge_calibrated(model, calibration, compute_dtype)
        return merged

    monkeypatch.setattr(comparison, "logits_of", logits)
    monkeypatch.setattr(our_peft, "merge_calibrated", calibrated)
    more = [paths["data"], "--calibration-tokens", 512] if "--calibrate" in options else []
    saved = {}
    for native in (False, True):
        monkeypatch.setattr(dtypes, "native_bfloat16", lambda native=native: native)
        output = tmp_path / str(native)
        measured.clear()
        here("merge", "--adapter", finished_run, "--output", output, "--evaluate", *options, *more)
        assert set(measured) == {torch.bfloat16 if native else torch.float32}
        assert len(measured) > 1 + bool(more)
        saved[native] = load_file(output / "model.safetensors")
        assert json.loads((output / "config.json").read_text())["dtype"] == "bfloat16"
    assert {n: (t.dtype, t.shape) for n, t in saved[True].items()} == {
        n: (t.dtype, t.shape) for n, t in saved[False].items()
    }
    if not more:
        assert all(torch.equal(t, saved[True][name]) for name, t in saved[False].items())
