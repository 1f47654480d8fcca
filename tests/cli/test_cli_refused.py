"""What the commands refuse in one sentence, before they read the model or write anything: a row for each mistake."""

from __future__ import annotations

import pathlib
import shlex
from typing import Any

import pytest
import torch

import qlora_app
from commands import SMALL, Paths, base

DEEP = "[" * 100_000
MANY = "9" * 31
# What is typed after a correct command line, and a part of the sentence.
FINETUNE = {
    "--rank 0": "--rank 0",
    "--rank -3": "--rank -3",
    "--rank two": "two",
    f"--rank {10**15}": "--rank",
    "--dropout 1": "--dropout 1",
    "--dropout nan": "--dropout nan",
    "--lr 0": "--lr 0",
    "--lr nan": "--lr nan",
    "--lr 1e300": "--lr",
    "--alpha inf": "--alpha inf",
    "--alpha 1e300": "--alpha",
    "--batch-size 0": "--batch-size 0",
    f"--batch-size {MANY}": "--batch-size",
    "--max-steps 0": "--max-steps 0",
    f"--max-steps {MANY}": "--max-steps",
    f"--seq-len {MANY}": "--seq-len",
    f"--eval-size {MANY}": "--eval-size",
    f"--seed {2**32}": "--seed",
    "--epochs -1": "--epochs -1",
    "--epochs 1 --max-steps 5": "give one of them",
    "--beta 0": "--beta 0",
    "--beta 0.2": "--beta is an option of DPO",
    "--block-size 48": "48",
    "--dtype int8": "--dtype int8",
    "--device quantum": "--device quantum",
    "--optimizer sgdd": "--optimizer sgdd",
    "--target-modules nowhere": "nowhere",
    "--target-modules q_proj,nowhere": "nowhere",
    "--no-such-option": "--no-such-option",
    "--method dpo": "rows with prompt, chosen and rejected",
    "--method dpo --neftune-alpha 5": "--neftune-alpha: not supported with DPO",
    "--force": "--resume",
    "--warmup-steps 3 --warmup-ratio 0.1": "--warmup-steps and --warmup-ratio",
    "--warmup-ratio 1": "--warmup-ratio 1.0: expected",
    "--lr-schedule constant --warmup-steps 3": "--lr-schedule constant has no warm-up",
    "--lr-schedule cosin": "did you mean cosine?",
    "--weight-decay -1": "--weight-decay -1.0: expected",
    "--max-grad-norm nan": "--max-grad-norm nan: expected",
    "--layers 2": "--layers 2: expected layers from 0 to 1, got 2",
    "--layers 1-0": "--layers 1-0: expected layer numbers",
    "--layers x": "--layers x: expected layer numbers",
    "--modules-to-save nowhere": "--modules-to-save nowhere: no module",
    "--modules-to-save mlp": "--modules-to-save mlp: its linear layers are 4-bit",
    "--chunked-loss --modules-to-save lm_head": "--chunked-loss: the output head is trained too",
    "--merge-aware --dora": "remove --dora",
    "--max-memory 8GB --dora": "--max-memory: the planner does not support --dora",
    "--max-memory 8GB --layers 0": "--max-memory: the planner does not support --layers",
    "--report-to tensorbord": "--report-to tensorbord: expected one of none, ",
    "--resident 1GB": "--resident 1GB needs --stream",
    "--stream disk --resident some": "--resident: expected a size such as 24GB",
    "--stream tape": "tape",
    "--data package:no": "unknown package",
    "--data missing.jsonl": "no such file",
    **{  # which a shell passes for an unset variable
        f"{option} ''": f"{option}: the value is empty"
        for option in ("--init-adapter", "--max-memory", "--modules-to-save", "--layers", "--resident")
    },
}
GENERATE = {
    "--seed -1": "--seed",
    f"--seed {2**32}": "--seed",
    f"--max-new-tokens {MANY}": "--max-new-tokens",
    **{f"--temperature {value}": "--temperature" for value in ("inf", "nan", "1e-320", "1e300", "-1")},
    "--prompt '\udcff'": "prompt",
}
TINY = "--sizes hidden=64,intermediate=64,layers=1,heads=4"
SMOL = "--model smollm2-135m"
PLAN = {
    "--rank 0": "--rank 0",
    f"{SMOL} --rank {MANY}": "--rank",
    f"{SMOL} --seq-len {2**40}": "--seq-len",
    f"{SMOL} --devices {MANY}": "--devices",
    f"{SMOL} --batch-size {2**31}": "--batch-size",
    f"{SMOL} --memory {'9' * 400}": "--memory",
    f"{SMOL} --memory 0": "--memory",
    "--memory lots": "--memory lots",
    "--optimizer sgdd": "--optimizer sgdd",
    "--dtype int4": "--dtype int4",
    "--sizes hidden=64": "missing",
    "--sizes hidden=64,intermediate=128,layers=2,heads=5": "multiple",
    "--sizes hidden=²,layers=1": "--sizes",
    f"--sizes hidden={10**20},intermediate=1,layers=1,heads=1": "--sizes",
    f"{TINY},kv-heads=0": "--sizes",
    f"{TINY},kv-heads=3": "--sizes",
    f"{TINY},vocab=0": "--sizes",
    "--model ./nowhere": "./nowhere",
    "--model llama-7b --target-modules nowhere": "nowhere",
    f"{SMOL} --plot ''": "--plot: the name is empty",
    f"{TINY} --resident 1GB": "--resident 1GB needs --stream",
    f"{TINY} --link fast": "--link fast: expected a size",
    f"{TINY} --flops -1": "--flops -1: expected a size",
    f"{TINY} --max-memory 0GB": "--max-memory 0GB: expected a size",
    f"{TINY} --offload-checkpoints": "needs --grad-checkpointing",
    f"{TINY} --mlp-chunk -1": "--mlp-chunk -1: expected",
    "--adapters 0": "--adapters 0: expected 1 to 100",
    "--sweep dora=true,false": "--sweep dora: the planner",
    "--sweep rank=1,2 --max-memory 8GB": "remove --sweep",
}
CHAT = {
    "--adapter nowhere": "no such directory",
    "--system 'be brief'": "no chat template",
    "--temperature -1": "--temperature",
}
SERVE = {
    "--port 65536": "--port",
    "--sequences 0": "--sequences",
    "--context 1": "--context",
    "--api-key 'a b'": "--api-key",
    "--host 'no such host'": "--host",
    "--adapter =x": "--adapter",
    "--adapter nowhere": "--adapter",
    "--cors localhost:3000": "--cors",
    "--cors http://localhost:3000/": "--cors",
}
COMMANDS = {"finetune": FINETUNE, "generate": GENERATE, "plan": PLAN, "chat": CHAT, "serve": SERVE}


# The mistake that is found in the model itself.
FOUND_LATE = "--chunked-loss --modules-to-save lm_head"


@pytest.fixture
def never_read(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.callspec.params.get("typed") != FOUND_LATE:
        load = "qlora_app.models.loading.Loader.while_loading"
        monkeypatch.setattr(load, lambda *a: pytest.fail("the model was read"))


@pytest.mark.usefixtures("never_read")
@pytest.mark.parametrize(
    ("command", "typed"),
    [
        pytest.param(command, typed, id=f"{command} {typed[:60]}")
        for command, rows in COMMANDS.items()
        for typed in rows
    ],
)
def test_options(refused: Any, paths: Paths, tmp_path: pathlib.Path, command: str, typed: str) -> None:
    if command == "serve":
        pytest.importorskip("uvicorn", reason="uvicorn is not installed")
    model = ["--model", paths["model"]]
    more = {
        "finetune": [*base(paths), "--output", tmp_path / "run", *SMALL],
        "generate": [*model, "--prompt", "1"],
        "chat": model,
        "serve": model,
    }
    assert COMMANDS[command][typed] in refused(command, *more.get(command, []), *shlex.split(typed))
    assert list(tmp_path.iterdir()) == []


# The same from Python: a function, its options, and the error.
PYTHON: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    (qlora_app.finetune, {"rank": 0}, ValueError, "rank 0: expected a value of at least 1"),
    (qlora_app.finetune, {"rank": "2"}, TypeError, "finetune: expected rank to be an integer of 64 bits, got 2"),
    (qlora_app.finetune, {"ranks": 2}, TypeError, "unexpected keyword argument 'ranks'"),
    (qlora_app.finetune, {"former_steps": (1,)}, TypeError, "unexpected keyword argument 'former_steps'"),
    (qlora_app.finetune, {"epochs": 1.0, "max_steps": 3}, ValueError, "^epochs and max_steps "),
    (qlora_app.finetune, {"force": True}, ValueError, "force needs resume"),
    (qlora_app.finetune, {"model": "/nowhere"}, ValueError, "model /nowhere: no such file or directory"),
    (qlora_app.finetune, {"data": "/nowhere.jsonl"}, ValueError, "data /nowhere.jsonl: no such file or directory"),
    (qlora_app.finetune, {"target_modules": "nothing"}, ValueError, "nothing: no layer of the model has that name"),
    (
        qlora_app.finetune,
        {"sweep": {"rank": ["2"]}},
        TypeError,
        "sweep: expected rank to be an integer of 64 bits, got",
    ),
    (qlora_app.finetune, {"sweep": "rank=2,3"}, TypeError, "expected a mapping of options to lists of values, got str"),
    (qlora_app.finetune, {"sweep": {"rank": 2}}, ValueError, "sweep rank: expected a list of values, got 2"),
    (qlora_app.finetune, {"sweep": {"rank": []}}, ValueError, "sweep rank: no values"),
    (qlora_app.finetune, {"sweep": {}}, ValueError, "sweep: no option"),
    (qlora_app.plan, {"rank": 0}, ValueError, "^rank 0: expected 1 to"),
    (qlora_app.plan, {"device": "tpu"}, ValueError, "^device tpu: expected one of cuda, cpu"),
    (qlora_app.plan, {"max_memory": "8GB", "adapters": 2}, ValueError, "plans one adapter; remove sweep and adapters"),
    (qlora_app.plan, {"sizes": "hidden=64", "model": "llama-7b"}, ValueError, "^model and sizes exclude each other"),
    (qlora_app.plan, {"rank": "8"}, TypeError, "^plan: expected rank to be an integer"),
    (qlora_app.plan, {"ranck": 8}, TypeError, r"^plan\(\) got an unexpected keyword argument 'ranck'"),
]


@pytest.mark.usefixtures("never_read")
@pytest.mark.parametrize(("function", "options", "error", "message"), PYTHON)
def test_options_in_python(
    paths: Paths, tmp_path: pathlib.Path, function: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    correct = {"model": paths["model"], "data": paths["data"], "output": tmp_path / "run"}
    with pytest.raises(error, match=message):
        function(**{**(correct if function is qlora_app.finetune else {}), **options})
    assert list(tmp_path.iterdir()) == []


def test_cuda_without_a_device(refused: Any, paths: Paths, tmp_path: pathlib.Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    assert "no CUDA here" in refused("finetune", *base(paths), "--output", tmp_path / "run", "--device", "cuda")


# Files of data, and a part of the sentence; test_cli_data.py has what is wrong with a row.
DATA = {
    "empty.jsonl": (b"", "empty"),
    "blank.txt": (b" \n\n", "empty"),
    "broken.jsonl": (b'{"text": "a"}\n{"text": \n', "line 2"),
    "columns.jsonl": (b'{"words": "a"}\n', "line 1"),
    "list.jsonl": (b"[1, 2]\n", "line 1"),
    "one.jsonl": (b'{"text": "a single text"}\n', "--data"),
    "silent.jsonl": (b'{"messages": [{"role": "user", "content": "hello"}]}\n', "--data"),
    "binary.txt": (b"\xff\xfe\x00\x01", "UTF-8"),
    "table.csv": (b"a,b\n", "--data"),
    "types.jsonl": (b'{"instruction": "a", "input": 5, "output": "b"}', "line 1"),
    "deep.jsonl": (b'{"text": "a"}\n' + DEEP.encode(), "line 2"),
    "surrogate.jsonl": (b'{"text": "\\ud800"}', "surrogate"),
    "surrogates.jsonl": (
        b'{"messages": [{"role": "user", "content": "\\udfff"}, {"role": "assistant", "content": ""}]}', "surrogate",
    ),
    "digits.jsonl": (b'{"text": 1' + b"0" * 5000 + b"}", "digits"),
    "role.jsonl": (b'{"messages": [{"role": 5, "content": "a"}]}', "line 1"),
    "long.jsonl": (b"{}" + b" " * 100_000 + b"x", "line 1"),
    "escape.jsonl": (b'{"text": "' + b"q" * 9 + b'"}\n\x1b[2J', "line 2"),
    "questions.jsonl": (
        b'{"prompt": "' + b"q" * 300 + b'", "completion": "r"}\n', "1 dropped: the answer begins beyond --seq-len 48",
    ),
    "talks.jsonl": (
        b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}', "no chat template",
    ),
}  # fmt: skip


@pytest.mark.usefixtures("never_read")
@pytest.mark.parametrize("name", DATA)
def test_data(refused: Any, paths: Paths, tmp_path: pathlib.Path, name: str) -> None:
    content, said = DATA[name]
    (tmp_path / name).write_bytes(content)
    model = ["--model", paths["model"], *SMALL, "--output", tmp_path / "run"]
    sentence = refused("finetune", *model, "--data", tmp_path / name)
    assert said in sentence
    assert "\x1b" not in sentence
    assert len(sentence) < 600
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["x" * 300, "a\x00b", "", "~no-such-user/x", "x/" * 3000])
def test_names_that_no_file_has(refused: Any, paths: Paths, tmp_path: pathlib.Path, name: str) -> None:
    output = tmp_path / "run"
    for arguments in (
        ["quantize", "--model", name, "--output", output],
        ["plan", "--model", name],
        ["check", "--model", paths["model"], "--data", name],
        ["finetune", "--model", paths["model"], "--data", name, "--output", output],
        ["generate", "--adapter", name, "--prompt", "1"],
        ["adapters", name],
    ):
        sentence = refused(*arguments)
        assert len(sentence) < 400
        assert name or arguments[0] not in ("check", "finetune") or "--data: the name is empty" in sentence
    assert not output.exists()
