"""The console command, driven as a process on a tiny random Llama and text of our own."""

from __future__ import annotations

import json
import os
import pathlib
import random
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from qlora_ext.cli import main
from tiny_models import save_tiny_llama

Paths = dict[str, pathlib.Path]
COMMAND = [sys.executable, "-c", "import sys; from qlora_ext.cli import main; sys.exit(main())"]
# Adapters of rank 2 on short texts; more than one epoch, dropout, and steps that no checkpoint falls on.
SMALL = ["--rank", "2", "--seq-len", "48", "--batch-size", "2", "--lr", "0.003", "--dropout", "0.1", "--eval-size", "4"]
RUN = [*SMALL, "--max-steps", "11", "--save-steps", "4"]


def environment() -> dict[str, str]:
    # One thread: a step of the tiny model is too short to share, least of all on a busy machine.
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def command(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, env=environment(), timeout=300, **options
    )


def here(*arguments: object) -> None:
    """The command in this process, for where a process of its own would only cost time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert main([str(argument) for argument in arguments]) == 0
    finally:
        torch.set_num_threads(threads)


def base(paths: Paths) -> list[object]:
    return ["--model", paths["model"], "--data", paths["data"]]


def finetune(paths: Paths, output: pathlib.Path, *more: object) -> subprocess.CompletedProcess[str]:
    return command("finetune", *base(paths), "--output", output, *more)


def adapter_bytes(run: pathlib.Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def read_lines(path: pathlib.Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="session")
def paths(tmp_path_factory: pytest.TempPathFactory) -> Paths:
    """A model, another of the same shape, and pairs to learn: counting on from a number."""
    root = tmp_path_factory.mktemp("cli")
    save_tiny_llama(root / "model", 0)
    save_tiny_llama(root / "other", 1)
    numbers = random.Random(0)
    with (root / "pairs.jsonl").open("w") as file:
        for i in range(18):
            counted = " ".join(str(i + j) for j in range(numbers.randint(3, 9)))
            file.write(json.dumps({"prompt": f"count {i}", "completion": counted}) + "\n")
    return {"root": root, "model": root / "model", "other": root / "other", "data": root / "pairs.jsonl"}


@pytest.fixture(scope="session")
def whole_run(paths: Paths) -> pathlib.Path:
    """A run that nothing interrupted."""
    run = paths["root"] / "whole"
    result = finetune(paths, run, *RUN)
    assert result.returncode == 0, result.stderr
    (run / "stdout.txt").write_text(result.stdout)
    return run


def test_finetune_tells_what_it_did(whole_run: pathlib.Path) -> None:
    told = (whole_run / "stdout.txt").read_text()
    for part in ("weights", "trainable parameters", "tokens/s", "left", "before training", "after training"):
        assert part in told
    assert str(whole_run / "adapter") in told
    record = json.loads((whole_run / "adapter" / "qlora_run.json").read_text())
    assert record["metrics"]["perplexity_after"] < 0.9 * record["metrics"]["perplexity_before"]
    steps = [line for line in read_lines(whole_run / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 12))
    assert all(line["tokens_per_second"] > 0 for line in steps)
    assert (whole_run / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_checkpoints_hold_no_base_weight(whole_run: pathlib.Path) -> None:
    import safetensors.torch

    assert sorted(path.name for path in whole_run.glob("checkpoint-*")) == ["checkpoint-11", "checkpoint-8"]
    saved = safetensors.torch.load_file(whole_run / "checkpoint-8" / "adapter_model.safetensors")
    assert saved
    assert all("lora_" in name for name in saved)
    adapter = sum(t.nbytes for t in saved.values())
    assert (whole_run / "checkpoint-8" / "optimizer.pt").stat().st_size < 3 * adapter + 64 * 1024


def test_evaluation_changes_nothing(paths: Paths, whole_run: pathlib.Path) -> None:
    run = paths["root"] / "evaluated"
    here("finetune", *base(paths), "--output", run, *RUN, "--eval-steps", "3")
    measured = [line["step"] for line in read_lines(run / "metrics.jsonl") if "eval_perplexity" in line]
    assert measured == [0, 3, 6, 9, 11]
    assert adapter_bytes(run) == adapter_bytes(whole_run)


def start(paths: Paths, run: pathlib.Path, *more: str) -> subprocess.Popen[bytes]:
    arguments = ["finetune", *base(paths), "--output", run, *RUN, *more]
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=environment(),
        # Ctrl-C must work whatever these tests inherited: a shell starts what it puts in the background without it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for_step(process: subprocess.Popen[bytes], run: pathlib.Path, step: int) -> None:
    deadline = time.monotonic() + 120
    metrics = run / "metrics.jsonl"
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.is_file() and max(line["step"] for line in read_lines(metrics)) >= step:
            return
        time.sleep(0.002)
    raise AssertionError(f"step {step} was not reached (exit code {process.poll()})")


def test_killed_and_resumed_gives_the_same_adapter(paths: Paths, whole_run: pathlib.Path) -> None:
    run = paths["root"] / "killed"
    process = start(paths, run)
    wait_for_step(process, run, 6)
    process.kill()
    process.communicate()
    assert not (run / "adapter").exists()
    result = command("finetune", "--output", run, "--resume")
    assert result.returncode == 0, result.stderr
    assert "going on after step" in result.stdout
    assert adapter_bytes(run) == adapter_bytes(whole_run)
    steps = [line["step"] for line in read_lines(run / "metrics.jsonl") if "loss" in line]
    assert steps == list(range(1, 12))


def test_ctrl_c_says_how_to_go_on(paths: Paths) -> None:
    run = paths["root"] / "interrupted"
    process = start(paths, run)
    wait_for_step(process, run, 5)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "step 4 is saved" in stderr.decode() or "step 8 is saved" in stderr.decode()
    assert f"--output {run} --resume" in stderr.decode()
    assert b"Traceback" not in stderr


@pytest.mark.slow
def test_killed_again_and_again(paths: Paths, whole_run: pathlib.Path) -> None:
    """Whatever the moment, what lies under a final name is whole, and the end is the same."""
    import safetensors.torch

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
        process.communicate()
        for checkpoint in run.glob("checkpoint-*"):
            safetensors.torch.load_file(checkpoint / "adapter_model.safetensors")
            torch.load(checkpoint / "optimizer.pt", weights_only=True)
            json.loads((checkpoint / "trainer_state.json").read_text())
    result = command("finetune", "--output", run, "--resume")
    assert result.returncode == 0, result.stderr
    assert adapter_bytes(run) == adapter_bytes(whole_run)


def test_a_finished_run_resumes_to_the_same_adapter(paths: Paths, whole_run: pathlib.Path) -> None:
    before = adapter_bytes(whole_run)
    here("finetune", "--output", whole_run, "--resume")
    assert adapter_bytes(whole_run) == before


def test_memory_levers_learn_as_well(paths: Paths, whole_run: pathlib.Path) -> None:
    run = paths["root"] / "levers"
    here("finetune", *base(paths), "--output", run, *RUN, "--grad-checkpointing", "--chunked-loss", "--grad-accum", "2")
    metrics = json.loads((run / "adapter" / "qlora_run.json").read_text())["metrics"]
    assert metrics["perplexity_after"] < 0.9 * metrics["perplexity_before"]


def test_generate_quantize_merge(paths: Paths, whole_run: pathlib.Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The adapter says the same on the model quantized while loading, on the saved 4-bit model, and merged."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    root = paths["root"]
    ask = ["--prompt", "count 3", "--max-new-tokens", "12", "--dtype", "float32"]
    answer = command("generate", "--adapter", whole_run, *ask)
    assert answer.returncode == 0, answer.stderr
    assert len(answer.stdout.strip()) > 1

    here("quantize", "--model", paths["model"], "--output", root / "model4")
    assert "import qlora_ext" in (root / "model4" / "README.md").read_text()
    capfd.readouterr()
    here("generate", "--adapter", whole_run, "--model", root / "model4", *ask)
    assert capfd.readouterr().out == answer.stdout

    here("merge", "--adapter", whole_run, "--output", root / "merged", "--dtype", "float32")
    assert not list((root / "merged").glob(".partial*"))
    config = json.loads((root / "merged" / "config.json").read_text())
    assert "quantization_config" not in config
    model = AutoModelForCausalLM.from_pretrained(root / "merged")
    tokenizer = AutoTokenizer.from_pretrained(root / "merged")
    prompt = tokenizer("count 3\n", return_tensors="pt")["input_ids"]
    out = model.generate(input_ids=prompt, max_new_tokens=12, do_sample=False)
    assert tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True).strip() == answer.stdout.strip()


def test_merge_is_bfloat16_by_default(paths: Paths, whole_run: pathlib.Path) -> None:
    import safetensors.torch

    here("merge", "--adapter", whole_run, "--output", paths["root"] / "merged16")
    saved = safetensors.torch.load_file(paths["root"] / "merged16" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}


def test_info() -> None:
    result = command("info")
    assert result.returncode == 0
    for part in ("version", "cpu_isa", "transformers"):
        assert part in result.stdout


def test_help_names_every_command() -> None:
    result = command("--help")
    assert result.returncode == 0
    for name in ("finetune", "generate", "quantize", "merge", "info"):
        assert name in result.stdout


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]):
    """Runs the command in this process; it must end with exit code 2 and one sentence, which is returned."""

    def run(*arguments: object) -> str:
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse
            status = stop.code
        out, err = capfd.readouterr()
        assert status == 2, err
        assert err.count("\n") == 1, err
        assert err.startswith("qlora-ext")
        assert "Traceback" not in out + err
        return err

    return run


def test_bad_numbers_and_names(refused, paths: Paths, tmp_path: pathlib.Path) -> None:
    output = tmp_path / "run"
    good = ["finetune", "--model", paths["model"], "--data", paths["data"], "--output", output]
    for bad, named in (
        (["--rank", "0"], "--rank 0"),
        (["--rank", "-3"], "--rank -3"),
        (["--rank", "two"], "two"),
        (["--dropout", "1"], "--dropout 1"),
        (["--dropout", "nan"], "--dropout nan"),
        (["--lr", "0"], "--lr 0"),
        (["--lr", "nan"], "--lr nan"),
        (["--alpha", "inf"], "--alpha inf"),
        (["--batch-size", "0"], "--batch-size 0"),
        (["--max-steps", "0"], "--max-steps 0"),
        (["--block-size", "48"], "48"),
        (["--dtype", "int8"], "--dtype int8"),
        (["--device", "quantum"], "--device quantum"),
        (["--optimizer", "sgdd"], "--optimizer sgdd"),
        (["--target-modules", "nowhere"], "nowhere"),
        (["--target-modules", "q_proj,nowhere"], "nowhere"),
        (["--no-such-option"], "--no-such-option"),
    ):
        assert named in refused(*good, *bad)
    assert not list(tmp_path.iterdir())


def test_cuda_without_a_device_is_refused(refused, paths: Paths, tmp_path: pathlib.Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    arguments = ["--model", paths["model"], "--data", paths["data"], "--output", tmp_path / "run"]
    assert "no CUDA here" in refused("finetune", *arguments, "--device", "cuda")


def test_bad_data(refused, paths: Paths, tmp_path: pathlib.Path) -> None:
    output = tmp_path / "run"
    contents = {
        "empty.jsonl": b"",
        "blank.txt": b" \n\n",
        "broken.jsonl": b'{"text": "a"}\n{"text": \n',
        "columns.jsonl": b'{"words": "a"}\n',
        "list.jsonl": b"[1, 2]\n",
        "one.jsonl": b'{"text": "a single text"}\n',
        "binary.txt": b"\xff\xfe\x00\x01",
        "table.csv": b"a,b\n",
        "broken.dict.dz": b"no dictionary",
        "silent.jsonl": b'{"messages": [{"role": "user", "content": "hello"}]}\n',
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    told = {
        name: refused("finetune", "--model", paths["model"], "--data", tmp_path / name, "--output", output)
        for name in (*contents, "missing.jsonl")
    }
    assert "empty" in told["empty.jsonl"]
    assert "empty" in told["blank.txt"]
    assert "line 2" in told["broken.jsonl"]
    assert "line 1" in told["columns.jsonl"]
    assert "no such file" in told["missing.jsonl"]
    assert "UTF-8" in told["binary.txt"]
    assert "unknown package" in refused(
        "finetune", "--model", paths["model"], "--data", "package:no", "--output", output
    )
    assert not output.exists()


def test_bad_models(refused, paths: Paths, tmp_path: pathlib.Path) -> None:
    import shutil

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


def test_bad_adapters(refused, paths: Paths, whole_run: pathlib.Path, tmp_path: pathlib.Path) -> None:
    import shutil

    def copy(name: str) -> pathlib.Path:
        return pathlib.Path(shutil.copytree(whole_run / "adapter", tmp_path / name))

    def ask(adapter: pathlib.Path, *more: object) -> str:
        return refused("generate", "--adapter", adapter, "--prompt", "count 3", "--max-new-tokens", "2", *more)

    assert "another 4-bit base" in ask(whole_run, "--model", paths["other"])
    assert main(["generate", "--adapter", str(whole_run), "--prompt", "1", "--max-new-tokens", "2", "--force",
                 "--model", str(paths["other"])]) == 0  # fmt: skip
    cut = copy("cut") / "adapter_model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    assert "damaged" in ask(cut.parent)
    unreadable = copy("unreadable")
    (unreadable / "adapter_config.json").write_text('{"r": ')
    ask(unreadable)
    (copy("weightless") / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors" in ask(tmp_path / "weightless")
    assert "no such directory" in ask(tmp_path / "missing")
    assert "another 4-bit base" in refused(
        "merge", "--adapter", whole_run, "--output", tmp_path / "merged", "--model", paths["other"]
    )
    assert not (tmp_path / "merged").exists()


def test_a_run_is_not_overwritten(refused, paths: Paths, whole_run: pathlib.Path) -> None:
    before = adapter_bytes(whole_run)
    arguments = ["--model", paths["model"], "--data", paths["data"], "--output", whole_run]
    assert "--resume" in refused("finetune", *arguments)
    assert "begun with" in refused("finetune", "--output", whole_run, "--resume", "--rank", "5")
    assert "not empty" in refused("quantize", "--model", paths["model"], "--output", whole_run)
    assert adapter_bytes(whole_run) == before


def limit_file_size(size: int):
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


@pytest.mark.parametrize("step", ["adapter", "model"])
def test_a_write_that_fails_leaves_nothing(paths: Paths, tmp_path: pathlib.Path, step: str) -> None:
    """A limit on file sizes stands for a disk that fills up while a large file is written."""
    output = tmp_path / "out"
    if step == "adapter":
        arguments = ["finetune", "--model", paths["model"], "--data", paths["data"], "--output", output, *RUN]
    else:
        arguments = ["quantize", "--model", paths["model"], "--output", output]
    result = command(*arguments, preexec_fn=limit_file_size(10_000))
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    assert str(output) in result.stderr
    assert not list(tmp_path.rglob(".partial*"))
    # Weights that were quantized wait beside the output for the command to go on.
    assert {path.parent.name for path in tmp_path.rglob("*.safetensors")} <= {"out.weights"}
    assert not output.exists() or step == "adapter"


def test_a_full_disk_is_told(paths: Paths, tmp_path: pathlib.Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs privileges")
    try:
        result = command("quantize", "--model", paths["model"], "--output", small / "out")
        assert result.returncode == 2, result.stderr
        assert "full" in result.stderr
        assert not list(small.iterdir())
        result = finetune(paths, small / "run", *RUN)
        assert result.returncode == 2, result.stderr
        assert "full" in result.stderr
        assert not list(small.rglob("*.safetensors"))
    finally:
        subprocess.run(["umount", small], check=True)


def test_packed_rows_do_not_see_each_other(paths: Paths) -> None:
    """The loss over packed rows is that over the rows one by one, with the transformers model's own loss."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import qlora_ext
    from qlora_ext.cli.data import encode, pack, read_examples
    from qlora_ext.cli.loss import learnt_loss
    from qlora_ext.cli.training import collate

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
