"""bench/run.py and the programs that it runs on a card: steps that hang or fail, and what needs no card to be right."""

from __future__ import annotations

import contextlib
import importlib
import os
import pathlib
import re
import shlex
import signal
import sys
import time

import pytest

import worker_faults
from qlora_ext import _C

ROOT = pathlib.Path(__file__).parents[2]
BENCH = ROOT / "bench"
sys.path.append(str(BENCH))

import cuda_crossover
import cuda_micro
import cuda_ncu
import cuda_static
import run
from lib import cuda_choices, cuda_steps, nvidia_smi, results_files, steps
from lib.steps import Outcome, Step

FORGETFUL = """
import pathlib, subprocess, sys, time
child = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print(flush=True); time.sleep(60)"
process = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE)
process.stdout.readline()
pathlib.Path(sys.argv[1]).write_text(str(process.pid))
time.sleep(float(sys.argv[2]))
"""


def python(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", code, *arguments]


def is_gone(pid: int) -> bool:
    """Whether the process has ended within a second; nobody may have waited for it."""
    for _ in range(100):
        status = pathlib.Path(f"/proc/{pid}/stat")
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] in "ZX":
            return True
        time.sleep(0.01)
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="process states are read from /proc")
@pytest.mark.parametrize("hangs", [True, False], ids=["stopped", "passed"])
def test_no_child_of_a_step_survives_it(hangs: bool, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "GRACE", 0.2)
    pid = tmp_path / "pid"
    result = steps.run(Step("forgetful", python(FORGETFUL, str(pid), "60" if hangs else "0")), 3.0)
    assert result.outcome is (Outcome.FAILED if hangs else Outcome.PASSED)
    assert result.reason == ("stopped after 3 s" if hangs else "")
    assert is_gone(int(pid.read_text()))


def test_an_interrupted_step_may_print_what_it_has_found(capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a background job of a shell
    code = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('3 failures')"
    try:
        result = steps.run(Step("tests", python(code)), 4.0)  # in which a busy machine starts Python, too
    finally:
        signal.signal(signal.SIGINT, before)
    assert str(result) == "tests: failed: stopped after 4 s"
    assert capfd.readouterr().out == "3 failures\n"


def test_each_result_is_saved_before_the_next_step(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "saved"
    reads = python("import pathlib, sys; sys.exit(pathlib.Path(sys.argv[1]).read_text() != 'a: passed')", str(path))
    saved: list[str] = []

    def save(result: steps.Result) -> None:
        saved.append(str(result))
        path.write_text(saved[-1])

    steps.run_all([Step("a", python("pass")), Step("b", reads)], 60.0, save)
    assert saved == ["a: passed", "b: passed"]


FAULTY = """
import os, time
import pytest

pytestmark = pytest.mark.cuda
context = {"lost": False}


@pytest.mark.parametrize("i", range(6))
def test_kernel(i):
    if i == 1:
        context["lost"] = True
    if context["lost"]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    if i == 3:
        os.read(os.pipe()[0], 1)  # in C, until the process ends
    assert i != 4, "an ordinary failure"
"""


def test_tests_of_a_card_survive_a_hang_and_a_lost_context(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    pytest.importorskip("pytest_timeout", reason="pytest-timeout is not installed")
    (tmp_path / "test_faulty.py").write_text(FAULTY)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # other plugins take seconds to import
    monkeypatch.setattr(cuda_steps, "SECONDS_PER_TEST", 10)
    monkeypatch.setattr(cuda_steps, "SIMULATED", False)
    options = ["-c", os.devnull, "--rootdir", str(tmp_path), "-p", "xdist", "-p", "timeout"]
    result = steps.run(Step("tests", cuda_steps.pytest(str(tmp_path), *options)), 120.0)
    assert str(result) == "tests: failed: exit status 1"
    text = capfd.readouterr().out
    assert "3 failed, 3 passed" in text
    outcomes = re.findall(r"(PASSED|FAILED) \S+\[(\d)\]", text.partition("FAILURES")[0])  # each as it ended
    assert sorted(outcomes, key=lambda one: one[1]) == [
        ("PASSED", "0"), ("FAILED", "1"), ("PASSED", "2"), ("FAILED", "3"), ("FAILED", "4"), ("PASSED", "5")
    ]  # fmt: skip
    for reason in ("an illegal memory access", "crashed while running", "an ordinary failure"):
        assert reason in text


def test_errors_that_lose_a_context_are_known() -> None:
    ours = "linear_nf4: CUDA launch failed: cudaErrorMisalignedAddress (misaligned address)"
    for text in (ours, "CUDA error: device-side assert triggered", "CUDA error: unspecified launch failure"):
        assert worker_faults.LOST.search(text)
    for text in ("CUDA launch failed: cudaErrorInvalidValue (invalid argument)", "CUDA out of memory"):
        assert not worker_faults.LOST.search(text)


def test_every_step_is_named_with_what_became_of_it(capfd: pytest.CaptureFixture[str]) -> None:
    good, bad = python("pass"), python("raise SystemExit(7)")
    some = [
        Step("a", good),
        Step("b", bad, may_fail=True),
        Step("c", bad),
        Step("d", good, missing="no nvcc"),
        Step("e", good),
    ]
    results = steps.run_all(some, 60.0)
    assert [r.outcome.name for r in results] == ["PASSED", "MAY_FAIL", "FAILED", "NOT_RUN", "PASSED"]
    assert steps.summary(results) == 1
    text = capfd.readouterr().out
    assert "of 5 steps, 2 passed, 1 failed, 1 failed, as it may, 1 not run" in text
    for line in ("b: failed, as it may: exit status 7", "c: failed: exit status 7", "d: not run: no nvcc"):
        assert f"   {line}\n" in text
    assert steps.summary([results[0], results[1]]) == 0
    assert steps.summary([results[0], results[3]]) == 1  # half of the input is no success


def test_time_that_one_step_leaves_goes_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[float | None] = []

    def run(step: Step, seconds: float | None) -> steps.Result:
        limits.append(seconds)
        return steps.Result(step, Outcome.PASSED)

    monkeypatch.setattr(steps, "run", run)
    steps.run_all([Step("a", [], 1.0), Step("b", [], 3.0)], 100.0)
    assert limits == pytest.approx([25.0, 100.0], abs=1.0)


@pytest.mark.parametrize("tiny", [True, False])
@pytest.mark.parametrize(("capability", "arch"), [("9.0", "90"), ("10.3", "100")])
def test_the_steps_of_a_card_are_programs_and_tests_that_exist(
    capability: str, arch: str, tiny: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvidia_smi, "query", lambda field: capability)
    found = [*cuda_steps.steps(10.0, tiny), *cuda_steps.counters(5.0, tiny), *cuda_steps.sanitizers()]
    assert [pathlib.Path(word).name for word in found[0].command[1:]] == ["cuda_static.py", "--arch", arch]
    assert len({step.name for step in found}) == len(found)
    for step in found:
        assert "-x" not in step.command
        for word in step.command:
            path, _, test = word.partition("::")
            if path.startswith(str(ROOT)):
                assert pathlib.Path(path).exists()
            if test:
                assert f"\ndef {test}(" in pathlib.Path(path).read_text()
    tests = next(step.command for step in found if step.name == "tests")
    assert {"-n", "--max-worker-restart=100", "--timeout-method=thread", "cuda"} <= set(tests)
    assert (str(ROOT / "tests") in tests) is not tiny
    assert [step.may_fail for step in found[-8:]] == [False] * 4 + [True] * 4
    monkeypatch.setattr(nvidia_smi, "query", lambda field: "8.0")
    assert [step.may_fail for step in cuda_steps.sanitizers()] == [False] * 4


def test_a_step_without_its_libraries_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_steps.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(cuda_steps.shutil, "which", lambda name: None)
    steps = [*cuda_steps.steps(10.0, True), *cuda_steps.counters(5.0, True), *cuda_steps.sanitizers()]
    missing = {step.name: step.missing for step in steps}
    assert missing["tests"] == "not installed: pytest, xdist, pytest_timeout"
    assert missing["training, Llama"] == "not installed: transformers, peft"
    assert missing["microbenchmarks"] == "nvcc is not on PATH (the CUDA toolkit has it)"
    assert missing["compute-sanitizer racecheck"] == "compute-sanitizer is not on PATH (the CUDA toolkit has it)"
    assert missing["crossover"] is None


@pytest.fixture
def smi(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """A stand-in for nvidia-smi, and the list of its calls."""
    calls = tmp_path / "calls"
    program = tmp_path / "nvidia-smi"
    program.write_text(
        f'#!/bin/sh\necho "$*" >> {shlex.quote(str(calls))}\n'
        'case "$*" in *clocks.max.sm*) echo "1980 MHz" ;; *default_app*) echo "[N/A]" ;;\n'
        '*gpu=name*) echo "NVIDIA Test-1" ;;\n'
        "*-lms*) echo 1500; echo 1755; echo 1800; sleep 60 ;; *unknown*) exit 6 ;; esac\nexit ${SMI_STATUS:-0}\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return calls


def test_clocks_are_unlocked_at_the_end(smi: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = nvidia_smi.locked_clocks("default")
    assert lock.__enter__() == "SM clock locked at 1980 MHz until the end of this run"
    assert smi.read_text().endswith("-i 0 -lgc 1980\n")
    assert not lock.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert smi.read_text().endswith("-i 0 -rgc\n")
    smi.unlink()
    monkeypatch.setenv("SMI_STATUS", "4")  # no permission
    with nvidia_smi.locked_clocks("1500") as done:
        assert done.startswith("clocks are not locked")
    assert smi.read_text() == "-i 0 -lgc 1500\n"


def test_the_command_reports_failures_and_unlocks_the_clocks(
    smi: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    bad = Step("broken", python("raise SystemExit(3)"))
    monkeypatch.setattr(cuda_steps, "steps", lambda minutes, tiny: [bad, Step("good", python("pass"))])
    options = ["--device", "cuda", "--minutes", "1", "--sanitizer-minutes", "0", "--ncu-minutes", "0"]
    options += ["--lock-clocks", "1410"]
    monkeypatch.setattr(results_files, "WRITTEN", tmp_path)
    monkeypatch.setattr(sys, "argv", ["run.py", *options])
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as status:
            run.main()
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert status.value.code == 1
    assert [call for call in smi.read_text().splitlines() if "gc" in call] == ["-i 0 -lgc 1410", "-i 0 -rgc"]
    rows = results_files.sections(tmp_path / "nvidia_test_1.json")["cuda_run"]["rows"]
    assert [(row["step"], row["result"], row["reason"]) for row in rows] == [
        ("broken", "failed", "exit status 3"),
        ("good", "passed", ""),
    ]
    text = capfd.readouterr().out
    assert "of 2 steps, 1 passed, 1 failed\n   broken: failed: exit status 3\n" in text


def test_clocks_beside_a_row(smi: pathlib.Path) -> None:
    assert nvidia_smi.query("clocks.max.sm") == "1980 MHz"
    assert nvidia_smi.query("unknown") == "unknown to this nvidia-smi"
    clocks = nvidia_smi.Clocks()
    try:
        end = time.monotonic() + 10
        while len(clocks._samples) < 3 and time.monotonic() < end:
            time.sleep(0.01)
        assert clocks.row() == {"SM MHz": 1755.0}
        assert clocks.row() == {"SM MHz": "no sample"}
    finally:
        clocks._process.kill()
        clocks._process.wait()


def test_without_nvidia_smi_everything_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvidia_smi.shutil, "which", lambda name: None)
    assert nvidia_smi.query("name") == nvidia_smi.Clocks().row()["SM MHz"] == nvidia_smi.MISSING
    with nvidia_smi.locked_clocks("default") as done:
        assert done == f"clocks are not locked: {nvidia_smi.MISSING}"


def test_a_sweep_names_places_that_exist() -> None:
    for name, file in {*cuda_choices.BETWEEN.values(), *cuda_choices.WITHIN.values()}:
        assert name in (ROOT / file).read_text(), f"{name} is not in {file}"
    sm90 = "sm90 tokens=64 rows=128 splits=4 multicast=1"
    change = cuda_choices.to_change
    assert change("linear_nf4", sm90, "sm90:tokens=64,splits=2") == "kSplitCycles in cuda/tuning/sm90.h"
    assert change("linear_nf4", sm90, "sm90:tokens=64,splits=4,multicast=2") == "kMulticastCycles in cuda/tuning/sm90.h"
    assert change("linear_nf4", sm90, "library:panel=1024") == "is_ahead in cuda/tuning/sm90.h"
    assert change("linear_nf4", sm90, "sm90:tokens=64,splits=4") == "nothing"
    stream, best = "few_tokens tokens=4 rows=128 ctas=108", "few_tokens:tokens=4,splits=2"
    assert change("linear_nf4", stream, best) == "forward_streams in cuda/tuning/stream.h"
    best = "tensor_cores:tokens=32,splits=1"
    assert change("linear_nf4_dx", "tensor_cores tokens=64 columns=256 splits=2", best) == (
        "dx_tokens in cuda/tuning/sm80.h, dx_splits in cuda/tuning/generic.h"
    )


@pytest.mark.parametrize("operator", cuda_choices.TILES)
@pytest.mark.parametrize("card", ["sm80", "sm90", "sm100", "sm120"])
def test_a_sweep_tries_every_kernel_that_a_card_may_choose(operator: str, card: str) -> None:
    chosen, tried = set(), set()
    for m in (1, 16, 33, 64, 1024):
        accepted: set[str] = set()
        for forced in cuda_choices.candidates(operator):
            with contextlib.suppress(ValueError):
                accepted |= set(_C.choose(operator, "bfloat16", m, 4096, 4096, device=card, kernel=forced))
        best = _C.choose(operator, "bfloat16", m, 4096, 4096, device=card)[0]
        assert best in accepted
        chosen.add(best)
        tried |= accepted
    for one in chosen:
        assert all(frozenset({one, other}) in cuda_choices.BETWEEN for other in tried - {one})


def test_a_crossover_names_its_constant_and_file() -> None:
    assert cuda_crossover.crossover({64: [1.2, 1.1], 128: [0.9, 1.1, 0.8], 256: [0.9, 0.9]}) == 128
    assert cuda_crossover.crossover({64: [0.9], 128: [1.1]}) is None
    assert cuda_crossover.setting((9, 0), 2048, "H100") == (
        "kMostTokens in cuda/tuning/sm90.h: `inline constexpr int64_t kMostTokens = 2047;  // H100: measured`"
    )
    assert cuda_crossover.setting((8, 0), 256, "A100") == (
        "kCrossovers in cuda/tuning/library.h: `{80, 256},  // A100: measured`"
    )
    assert "{120, kNever}," in cuda_crossover.setting((12, 0), None, "RTX 5090")


def test_every_rule_that_machine_code_breaks_is_told() -> None:
    kernels = [
        cuda_static.Kernel("spills", 120, stack=8, spills=24, waits=3),
        cuda_static.Kernel("moves", 90, registers=160, moved_registers=208, early_loads=(4, 3)),
        cuda_static.Kernel("good", 80, waits=9, early_loads=(3, 3)),
    ]
    names = {"spills": "linear_nf4_few_tokens_kernel<T>", "moves": "dx", "good": "absmax"}
    assert cuda_static.complaints(kernels, names) == [
        "bytes of spills and local memory: linear_nf4_few_tokens_kernel<T> (sm_120): 32",
        "more than 2 global loads in a row before the first product: linear_nf4_few_tokens_kernel<T> (sm_120): 3",
        "other than 168 registers at launch, before setmaxnreg: dx (sm_90): 160",
        "loads that were moved before the wait for the previous launch: dx (sm_90): 1",
    ]
    assert cuda_static.complaints(kernels[2:], names) == []


def test_loads_before_the_first_wait_are_counted() -> None:
    """A loop's later waits find nothing left to wait for, and what never waits reads nothing of the launch before."""
    load, wait = cuda_static.Node(True, False, None, True), cuda_static.Node(False, True, None, True)
    branch, back = cuda_static.Node(False, False, "end", True), cuda_static.Node(False, False, "loop", False)
    assert cuda_static.loads_before_waits([load, load], {}) is None
    assert cuda_static.loads_before_waits([load, wait, load, back], {"loop": 1}) == 1
    assert cuda_static.loads_before_waits([branch, load, wait, back, load], {"loop": 1, "end": 4}) == 1
    ptx = "ld.param.u64 %rd1, [p];\nld.global.nc.u32 %r1, [%rd1];\nld.u16 %rs1, [%rd2];\nld.global.u32 %r2, [%rd3];"
    assert [node.is_load for node in cuda_static.ptx_nodes(ptx)[0]] == [False, False, True, True]


def test_rows_of_nsight_compute() -> None:
    names = ["ID", "Kernel Name", "lts__t_bytes.sum", "launch__waves_per_multiprocessor"]
    lines = [names, ["", "", "byte", ""]]
    kernels = ["low_rank<int>(Args)", "linear_nf4_sm90(Args)"]
    lines += [[str(i), kernel, f"{i},000", "0.5"] for i, kernel in enumerate(kernels)]
    output = "==PROF== Connected\n" + "\n".join(",".join(f'"{cell}"' for cell in line) for line in lines)
    found = list(cuda_ncu.rows(output, cuda_ncu.TINY[0]))
    assert [(row["operator"], row["M"], row["kernel"], row["L2 (byte)"]) for row in found] == [
        ("linear_nf4", 1, "low_rank<int>", "0000"),
        ("linear_nf4", 1, "linear_nf4_sm90", "1000"),
    ]
    with pytest.raises(RuntimeError, match="profiled no kernel"):
        list(cuda_ncu.rows(output.rsplit("\n", 2)[0], cuda_ncu.TINY[0]))
    with pytest.raises(RuntimeError, match="no table: ==ERROR== no permission"):
        list(cuda_ncu.rows("==ERROR== no permission", cuda_ncu.TINY[0]))
    assert len(cuda_ncu.METRICS) == 12
    assert len(cuda_ncu.PROBLEMS) == 10


NCU = r"""
import sys, time
time.sleep(60 if "7" in sys.argv[-1].split(",") else 0)
print('"ID","Kernel Name","lts__t_bytes.sum"\n"","","byte"\n"0","few_tokens(Args)","1,000"')
"""


def test_a_problem_under_ncu_has_a_limit(tmp_path: pathlib.Path) -> None:
    program = tmp_path / "ncu"
    program.write_text(f"#!{sys.executable}\n{NCU}")
    program.chmod(0o755)
    found = cuda_ncu.profiled(str(program), ["lts__t_bytes.sum"], ("linear_nf4", 64, 64, 1), 60.0)
    assert [(row["kernel"], row["L2 (byte)"]) for row in found] == [("few_tokens", "1000")]
    with pytest.raises(RuntimeError, match="stopped after 2 s"):
        cuda_ncu.profiled(str(program), ["lts__t_bytes.sum"], ("linear_nf4", 64, 64, 7), 2.0)


def run_on_the_cpu(program: str, *arguments: str) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("peft", reason="PEFT is not installed")
    module = importlib.import_module(program)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "STEPS", 5, raising=False)  # the fifth step sees the first one's tokens again
        patch.setattr(sys, "argv", [program, *arguments, "--tiny", "--device", "cpu"])
        module.main()


@pytest.mark.parametrize("kind", ["llama", "experts"])
def test_a_training_step_of_every_contender(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    run_on_the_cpu("cuda_step", kind)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("base: ")]
    assert [row.split("  ")[0] for row in rows][:2] == ["base: qlora_ext", "base: bf16 LoRA"]
    assert all("tokens/s: not measured" in row for row in rows)


def test_decoding_of_every_contender(capsys: pytest.CaptureFixture[str]) -> None:
    run_on_the_cpu("cuda_decode")
    ours = capsys.readouterr().out.splitlines()[0]
    assert ours.startswith("base: qlora_ext  tokens: ")
    assert ours.endswith("  tokens/s, eager: not measured")
    assert len(set(ours.split("  ")[1].split()[1:])) > 2  # they follow the prompt


def test_contenders_that_learn_different_things_are_an_error() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("peft", reason="PEFT is not installed")
    import cuda_step

    after = f"loss after {cuda_step.STEPS} steps"
    good = {"qlora_ext": {"loss at first": 9.0, after: 8.0}, "bitsandbytes": {"loss at first": 9.0, after: 8.01}}
    cuda_step.check_losses(good)
    with pytest.raises(AssertionError, match="differ"):
        cuda_step.check_losses({**good, "bf16 LoRA": {"loss at first": 9.0, after: 5.0}})
    with pytest.raises(AssertionError, match="bitsandbytes has learnt nothing"):
        cuda_step.check_losses({**good, "bitsandbytes": {"loss at first": 8.0, after: 8.0}})


@pytest.mark.cuda
@pytest.mark.skipif(cuda_steps.shutil.which("nvcc") is None, reason="nvcc is not on PATH")
def test_the_microbenchmarks_compile_and_run() -> None:
    found = {str(row["what"]): row["value"] for row in cuda_micro.rows("all")}
    loads = [found["LDC, 32 addresses per warp"], found["LDS.128, 4 equal lanes"]]
    if cuda_steps.SIMULATED:  # the simulator's clocks are no measurement
        assert loads == ["not measured"] * 2
    else:
        assert min(float(str(cycles)) for cycles in loads) > 0
    if "active clusters of 1" in found:  # since compute capability 9.0
        assert int(str(found["active clusters of 1"])) > 0
        assert "TMA from L2, multicast to pairs: bytes that leave L2" in found
