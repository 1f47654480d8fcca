"""``qlora-ext serve`` as a command: its options, and the answers of a tiny model with an adapter."""

from __future__ import annotations

import concurrent.futures
import http.client
import json
import pathlib
import shutil
import signal
import socket
import time
from typing import Any

import pytest

pytest.importorskip("starlette", reason="starlette is not installed")
pytest.importorskip("uvicorn", reason="uvicorn is not installed")

from commands import Paths
from forks import Command
from qlora_app.main import main
from qlora_ext.untrusted import printable

OPTIONS = ["--compile", "never", "--dtype", "float32"]


def ask(port: int, model: str, **fields: Any) -> Any:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    message = {"role": "user", "content": "count 3"}
    body = {"model": model, "messages": [message], "temperature": 0, "max_tokens": 8, **fields}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    reply = connection.getresponse()
    assert reply.status == 200
    return json.loads(reply.read())


def wait_for_server(process: Command, port: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), 30).close()
            return
        except ConnectionRefusedError:
            time.sleep(0.02)
    raise AssertionError(process.wait().stderr)


@pytest.fixture
def louder(finished_run: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """Another adapter: the run's with a larger factor."""
    directory = pathlib.Path(shutil.copytree(finished_run / "adapter", tmp_path / "v1.2"))
    config = directory / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 500}))
    return directory


def test_answers_are_those_of_generate(
    finished_run: pathlib.Path, louder: pathlib.Path, paths: Paths, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also while other clients ask the base and another adapter. Ctrl-C ends the server."""
    models = {"model": ["--model", paths["model"]], "whole": ["--adapter", finished_run], "v1.2": ["--adapter", louder]}
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    adapters = ["--adapter", finished_run, "--adapter", louder]
    process = Command("serve", *adapters, "--port", port, "--context", "100", "--reproducible", *OPTIONS)
    try:
        wait_for_server(process, port)
        with concurrent.futures.ThreadPoolExecutor() as clients:
            answers = list(clients.map(ask, [port] * 6, [*models, *models]))
        whole = ask(port, "whole", max_tokens=10**6)
        process.send(signal.SIGINT)
        done = process.wait(30)
    finally:
        if process.poll() is None:
            process.kill()
    texts = [answer["choices"][0]["message"]["content"] for answer in answers]
    assert len(set(texts)) == len(models)
    capfd.readouterr()
    for i, model in enumerate(models.values()):
        assert main(["generate", *map(str, model), "--max-new-tokens", "8", *OPTIONS, "count 3"]) == 0
        assert texts[i] == texts[i + 3]
        assert printable(texts[i].strip(), lines=True) == capfd.readouterr().out[:-1]
    assert whole["usage"]["total_tokens"] <= 100
    assert done.returncode == 0, done.stderr
    assert f"serving model, whole, v1.2 at http://127.0.0.1:{port}/v1" in done.stderr
    assert done.stderr.splitlines()[-1] == "qlora-ext: stopped"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), 5)


def test_invalid_arguments_are_rejected(
    refused: Any, paths: Paths, finished_run: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Errors are raised before the model loads."""
    monkeypatch.setattr("qlora_app.models.loading.Loader.while_loading", lambda *a: pytest.fail("the model was read"))
    model = ["--model", paths["model"]]
    assert "adapter" in refused("serve", "--model", finished_run)  # it is one
    twice = refused("serve", "--adapter", finished_run, "--adapter", finished_run / "adapter")
    assert f"two models would have the name {finished_run.name}" in twice
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "Address already in use" in refused("serve", *model, "--port", str(taken.getsockname()[1]))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'qlora_ext[serve]'" in refused("serve", *model)


def test_an_address_for_everybody_without_a_key(
    paths: Paths, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    class Loaded(Exception):
        pass

    def load(*_: object) -> None:
        raise Loaded

    monkeypatch.setattr("qlora_app.models.loading.Loader.while_loading", load)
    arguments = ["serve", "--model", str(paths["model"]), "--host", "0.0.0.0", "--port", "0", "--cors", "*"]
    assert main(arguments) == 1
    warned = capfd.readouterr().err
    assert "lets other machines use this server" in warned
    assert "lets all web pages use this server" in warned
    monkeypatch.setenv("QLORA_API_KEY", "secret")
    assert main(arguments) == 1
    assert "warning" not in capfd.readouterr().err
