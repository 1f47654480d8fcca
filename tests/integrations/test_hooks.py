"""Importing qlora_ext changes nothing of other libraries; the first 4-bit weight integrates them, whatever the order.

Integrations are found when their library is imported, even if other code searched for it before.
"""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest
import torch

import qlora_ext

PRELUDE = """
import importlib, importlib.util, sys, threading
import qlora_ext
assert "transformers" not in sys.modules
assert "diffusers" not in sys.modules
NAME = "transformers.quantizers.auto"
"""
CHECK = """
from transformers import AutoModelForCausalLM
assert AutoModelForCausalLM.__module__ in sys.modules
from transformers.quantizers import auto
assert "qlora_ext.integrations.transformers" in sys.modules
assert type(auto.__spec__.loader).__name__ == "SourceFileLoader"
assert auto.__loader__ is auto.__spec__.loader
"""
LOOKS = {
    "no search": "",
    "find_spec": "assert importlib.util.find_spec(NAME) is not None",
    "find_spec twice": "assert all(importlib.util.find_spec(NAME) is not None for _ in range(2))",
    "its source": """
spec = importlib.util.find_spec(NAME)
assert "class AutoHfQuantizer" in spec.loader.get_source(NAME)
assert spec.loader.get_filename(NAME).endswith("auto.py")
""",
    "threads": """
package = importlib.util.find_spec("transformers.quantizers").submodule_search_locations
missing = []
def look():
    for _ in range(100):
        if sys.meta_path[0].find_spec(NAME, package) is None and NAME not in sys.modules:
            missing.append(NAME)
threads = [threading.Thread(target=look) for _ in range(4)]
for t in threads: t.start()
for t in threads: t.join()
assert not missing
""",
}


# The patches of the list that are installed, as a function of a script.
INSTALLED = """
import inspect, pkgutil

def installed():
    from qlora_ext.integrations import _patches
    found = set()
    for name in _patches.PATCHES:
        module, _, path = name.partition(":")
        owner, _, attribute = path.rpartition(".")
        function = inspect.getattr_static(pkgutil.resolve_name(f"{module}:{owner}" if owner else module), attribute)
        function = getattr(function, "fget", None) or getattr(function, "__func__", function)
        if getattr(getattr(function, "__code__", None), "co_filename", "") == _patches.__file__:
            found.add(name)
    return found
"""
CHANGES_NOTHING = """
import sys
import torch
threads, finders = torch.get_num_threads(), [*sys.meta_path]
import qlora_ext
from qlora_ext._internal import hooks
assert torch.get_num_threads() == threads
assert [finder for finder in sys.meta_path if finder not in finders] == [hooks._WATCHER]
assert {*hooks._WATCHER.waiting} == {"transformers.quantizers.auto", "diffusers.quantizers.auto"}

import accelerate, diffusers, diffusers.models.modeling_utils, gguf, peft, torch.distributed.fsdp, transformers
from peft import prepare_model_for_kbit_training as prepare
import transformers.integrations.gguf.gguf_config_mapping, transformers.modeling_utils
from qlora_ext.integrations import _patches
assert hooks._WATCHER not in sys.meta_path
assert installed() == set()

qlora_ext.quantize(torch.zeros(2, 64))
expected = {name for name, patch in _patches.PATCHES.items() if patch.versions.partition(" ")[0] != "peft"}
if torch.__version__ >= "2.12":
    expected -= {"torch.distributed.fsdp._fully_shard._fsdp_param:nn.Parameter"}
assert expected <= installed(), expected - installed()
assert prepare is peft.prepare_model_for_kbit_training
assert "peft.utils.other:prepare_model_for_kbit_training" in installed()
"""
WEIGHT_FIRST = """
import sys
import torch, qlora_ext
{first}
assert "peft" not in sys.modules
from peft import PeftModel
assert "peft.peft_model:PeftModel.load_adapter" in installed()
"""


def run_script(script: str, *arguments: str) -> str:
    run = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_importing_changes_nothing() -> None:
    for library in ("peft", "diffusers", "gguf", "accelerate"):
        pytest.importorskip(library, reason=f"{library} is not installed")
    run_script(INSTALLED + CHANGES_NOTHING)


@pytest.mark.parametrize("how", ["made", "loaded"])
def test_libraries_imported_after_the_first_weight_are_integrated(how: str, tmp_path: pathlib.Path) -> None:
    pytest.importorskip("peft", reason="PEFT is not installed")
    torch.save(qlora_ext.quantize(torch.zeros(2, 64)), tmp_path / "weight.pt")
    first = "qlora_ext.nn.Linear4bit(64, 2)" if how == "made" else "torch.load(sys.argv[1])"
    run_script(INSTALLED + WEIGHT_FIRST.format(first=first), str(tmp_path / "weight.pt"))


def test_importing_is_fast() -> None:
    """Within a third of the CPU time of importing torch; it takes a fifth."""
    script = (
        "import time; begin = time.process_time(); import torch; middle = time.process_time(); import qlora_ext\n"
        "print((time.process_time() - middle) / (middle - begin))"
    )
    assert min(float(run_script(script)) for _ in range(3)) < 1 / 3


@pytest.mark.parametrize("look", LOOKS)
def test_looking_for_a_library_does_not_disable_its_integration(look: str) -> None:
    run_script(PRELUDE + LOOKS[look] + CHECK)


def test_a_library_that_failed_to_import_once_is_integrated_the_second_time(tmp_path) -> None:
    (tmp_path / "half_broken.py").write_text("import os\nif 'READY' not in os.environ: raise ImportError('not yet')\n")
    (tmp_path / "its_integration.py").write_text("done = True\n")
    script = f"""
import os, sys
sys.path.insert(0, {str(tmp_path)!r})
from qlora_ext._internal import hooks
hooks.after_import("half_broken", "its_integration")
try:
    import half_broken
except ImportError as error:
    assert str(error) == "not yet"
assert "its_integration" not in sys.modules
os.environ["READY"] = "1"
import half_broken
assert "its_integration" in sys.modules
"""
    run_script(script)
