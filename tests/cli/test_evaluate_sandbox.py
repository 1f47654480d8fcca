"""Programs that a model writes have limits, and pass only by running to their end."""

from __future__ import annotations

import pathlib
import time

import pytest

pytest.importorskip("resource", reason="this system has no resource limits")

from qlora_app.evaluation.sandbox import Outcome, run


def outcome(program: str, seconds: float = 10.0) -> str:
    return run(program, seconds).reason


def isolated() -> bool:
    found: Outcome = run("")
    assert found.passed
    return found.isolated


def needs_isolation() -> None:
    if not isolated():
        pytest.skip("this system allows no unprivileged user namespaces")


@pytest.mark.parametrize(
    "program",
    ["x = 1", "print('x' * 10**6)", "open('a', 'w').write('b'); assert open('a').read() == 'b'", "import tempfile\n"
     "with tempfile.TemporaryFile() as file:\n    file.write(b'x')"],
)  # fmt: skip
def test_a_program_that_runs_to_its_end_passes(program: str) -> None:
    assert outcome(program) == "passed"


@pytest.mark.parametrize(
    "program",
    ["assert 1 == 2", "raise SystemExit", "import sys; sys.exit(0)", "import os; os._exit(0)", "def f(:", "exit(0)",
     "import os; os.write(3, b'isolated\\n'); os._exit(0)", "import ctypes; ctypes.string_at(0)", "x = '\\0'; 1 / 0"],
)  # fmt: skip
def test_a_program_that_ends_otherwise_fails(program: str) -> None:
    assert outcome(program) == "failed"


@pytest.mark.parametrize("program", ["while True: pass", "import time; time.sleep(60)", "input(); import time\n"])
def test_time_is_limited(program: str) -> None:
    start = time.monotonic()
    assert outcome(program, 0.7) == ("failed" if "input" in program else "timed out")  # there is no input to wait for
    assert time.monotonic() - start < 8


def test_processes_that_a_program_leaves_are_ended(tmp_path: pathlib.Path) -> None:
    """A process of its own session outlives its group, but not the namespace, whose processes cannot write here."""
    needs_isolation()
    mark = tmp_path / "mark"
    run(f"import os, time\nif os.fork() == 0:\n    os.setsid(); time.sleep(1); open({str(mark)!r}, 'w')", 5)
    time.sleep(1.5)
    assert not mark.exists()


@pytest.mark.parametrize(
    "program",
    ["x = bytearray(2 << 30)", "x = []\nwhile True: x.append('y' * 10**7)",
     "with open('a', 'wb') as file:\n    for _ in range(64): file.write(bytes(1 << 20)); file.flush()"],
)  # fmt: skip
def test_memory_and_disk_are_limited(program: str) -> None:
    assert outcome(program) == "failed"


def test_a_program_sees_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "value")
    assert outcome("import os; assert 'SECRET' not in os.environ and os.listdir('.') == []") == "passed"


def test_a_program_cannot_write_elsewhere(tmp_path: pathlib.Path) -> None:
    needs_isolation()
    (tmp_path / "own").write_text("kept")
    for action in ("open({!r}, 'w')", "import os; os.remove({!r})", "import os; os.chmod({!r}, 0o777)"):
        assert outcome(action.format(str(tmp_path / "own"))) == "failed"
    assert (tmp_path / "own").read_text() == "kept"
    undone = "import ctypes; assert ctypes.CDLL(None).mount(b'', b'/', None, ctypes.c_ulong(0x1020), None) == 0"
    assert outcome(undone) == "failed"


def test_a_program_has_no_network() -> None:
    needs_isolation()
    served = "import socket; s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen(); a = s.getsockname()"
    assert outcome(f"{served}; socket.create_connection(a, 1)") == "failed"
    assert outcome(f"{served}; import os; assert [i[1] for i in socket.if_nameindex()] == ['lo']") == "passed"
