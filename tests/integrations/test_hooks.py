"""Integrations are installed when their library is imported, even if other code searched for it before."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

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


@pytest.mark.parametrize("look", LOOKS)
def test_looking_for_a_library_does_not_disable_its_integration(look: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", PRELUDE + LOOKS[look] + CHECK], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


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
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
