"""What runs the tests: the quick ones, the jobs of .ci/run, and the workflows that call them."""

from __future__ import annotations

import json
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from quick import LONG

ROOT = pathlib.Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


# Collects with `--quick`, and prints the ids of all tests and of those that would run.
COLLECT = """
import json, sys
import pytest

class Record:
    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items):
        self.everything = [item.nodeid for item in items]

    def pytest_collection_finish(self, session):
        self.quick = [item.nodeid for item in session.items]

record = Record()
options = ["--collect-only", "-qq", "--quick", "-p", "no:xdist", "-p", "no:cacheprovider"]
status = pytest.main(options, plugins=[record])
print(json.dumps([record.everything, record.quick]))
sys.exit(status)
"""


@pytest.mark.slow
def test_every_folder_has_quick_tests(request: pytest.FixtureRequest) -> None:
    out = subprocess.run([sys.executable, "-c", COLLECT], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert out.returncode == 0, out.stdout + out.stderr
    everything, quick = json.loads(out.stdout.splitlines()[-1])
    assert set(quick) < set(everything)
    here = {item.nodeid for item in request.session.items}
    assert here <= set(everything)  # pytest-xdist, too, needs ids that are the same in each process
    folders = {test.split("/")[1] for test in everything}
    assert {"attack", "cli", "cuda", "cudasim", "integrations", "kernels", "nn", "operators", "project"} <= folders
    assert {test.split("/")[1] for test in quick} == folders
    functions = [test.partition("[")[0] for test in quick]
    assert len(functions) == len(set(functions))
    assert LONG.issubset(test.partition("[")[0] for test in everything)
    assert LONG.isdisjoint(functions)


@pytest.mark.skipif(not (ROOT / ".ci" / "run").exists(), reason=".ci is not in this tree")
def test_the_workflow_runs_jobs_that_exist() -> None:
    unknown = subprocess.run([ROOT / ".ci/run", "nosuchjob"], capture_output=True, text=True)
    assert unknown.returncode == 2
    assert "unknown job nosuchjob" in unknown.stderr
    jobs = re.findall(r"^#   (\w+) +", (ROOT / ".ci/run").read_text(), re.MULTILINE)
    for name, wanted in {"nightly": {*jobs}, "ci": {"tests", "arm", "cuda", "docs"}}.items():
        workflow = (ROOT / f".github/workflows/{name}.yml").read_text()
        listed = [job for jobs in re.findall(r"job: \[(.*?)\]", workflow) for job in jobs.split(", ")]
        named = re.findall(r"run: \.ci/run (?:--since \S+ )?(\w+)$", workflow, re.MULTILINE)
        assert {*listed, *named} == wanted


@pytest.mark.skipif(not (ROOT / ".ci" / "run").exists(), reason=".ci is not in this tree")
def test_every_file_concerns_jobs_and_folders_that_exist() -> None:
    script = (ROOT / ".ci/run").read_text()
    function = re.search(r"^concerned\(\) \{\n.*?^\}\n", script, re.MULTILINE | re.DOTALL)
    assert function is not None
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    if not files:
        pytest.skip("this tree is no clone")
    loop = 'while read -r file; do concerned "$file"; done'
    out = subprocess.run(["bash", "-c", function[0] + loop], input=files, capture_output=True, text=True, check=True)
    words = set(out.stdout.split())
    assert {"tests", "arm", "cuda", "docs", "simulator"} <= words
    folders = {word for word in words if "/" in word}
    assert all((ROOT / folder).is_dir() for folder in folders)
    tested = {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")}
    assert {f"tests/{name}" for name in tested - {"cudasim"}} <= folders


@pytest.mark.skipif(shutil.which("actionlint") is None, reason="actionlint is not installed")
@pytest.mark.skipif(not WORKFLOWS, reason="the workflows are not in this tree")
def test_workflows_are_valid() -> None:
    result = subprocess.run(["actionlint", *WORKFLOWS], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
