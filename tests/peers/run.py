"""Runs tests of other libraries with our layers in their models, and compares the results with ``expected.yaml``.

``scripts/peers`` starts it. A test counts if it passes with dense layers and has layers that can be 4-bit. Of the tests
that count, exactly those that ``expected.yaml`` lists may fail with 4-bit layers.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import pathlib
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterable
from typing import Any

import yaml

HERE = pathlib.Path(__file__).parent
EXPECTED = HERE / "expected.yaml"
BUILD = HERE.parents[1] / "build" / "peers"
HEADER = """\
# The tests of other libraries that `scripts/peers` runs, and those that fail with our layers: a row for each reason.
# `scripts/peers --record` rewrites this file. It adds a new failure to the first row whose `match`, a regular
# expression, is found in the test's name or error, or else to a row without a reason, which fails every run until it
# has one.
"""
Outcomes = dict[str, dict[str, Any]]  # what plugin.py writes: "outcome", "why" and "layers" of each test
Row = dict[str, Any]  # "reason", "match" and "tests", as in expected.yaml


def unpack(name: str, suite: dict[str, Any]) -> pathlib.Path | None:
    """The directory of the library's source distribution, or None, after printing why its tests cannot run."""
    version, note = suite["version"], suite.get("note", "")
    directory = BUILD / f"{name}-{version}"
    if not directory.exists():
        options = ["--quiet", "--no-deps", "--no-binary", name, "--dest", str(BUILD), f"{name}=={version}"]
        command = [sys.executable, "-m", "pip", "download", *options]
        if subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode:
            print(f"{name}: skipped, because pip gets no source distribution of {version}. {note}")
            return None
        with tarfile.open(BUILD / f"{name}-{version}.tar.gz") as archive:
            archive.extractall(BUILD, filter="data")
    missing = [file for file in suite["files"] if not (directory / file).exists()]
    if missing:
        print(f"{name}: skipped, because the source distribution of {version} lacks {missing[0]}. {note}")
        return None
    (directory / "tests" / "__init__.py").touch()  # of tests, source distributions have only files named test*.py
    return directory


def run(directory: pathlib.Path, suite: dict[str, Any], layers: str, *chosen: str) -> Outcomes:
    """Runs the tests chosen by options of plugin.py, with "dense" or "4bit" layers."""
    outcomes, log = directory / f"{layers}.json", directory / f"{layers}.log"
    outcomes.unlink(missing_ok=True)
    quiet = ["-q", "--tb=short", "--no-header", "-r=", "--disable-warnings", "-p", "no:cacheprovider", "-n", "auto"]
    ours = ["-c", "/dev/null", "--rootdir", ".", "-p", "plugin", "--layers", layers, "--outcomes", str(outcomes)]
    command = [sys.executable, "-m", "pytest", *quiet, *ours, *suite.get("options", []), *chosen, *suite["files"]]
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(BUILD / "hub"), "PYTHONPATH": path}
    print(f"  with {layers} layers: {log}", flush=True)
    with log.open("w") as output:
        process = subprocess.run(command, cwd=directory, env=environment, stdout=output, stderr=output, check=False)
    if process.returncode > 1 or not outcomes.exists():
        sys.exit(f"pytest failed with status {process.returncode}: see {log}")
    found: Outcomes = json.loads(outcomes.read_text())
    return found


def first_line(outcome: dict[str, Any]) -> str:
    return str(outcome["why"]).strip().split("\n")[0]


def print_counts(title: str, reasons: Iterable[str]) -> None:
    """Prints how often each reason occurs."""
    counts = collections.Counter(reasons)
    print(f"  {title}: {sum(counts.values())}")
    for reason, count in counts.most_common():
        print(f"    {count:4} {reason[:150]}")


def that_count(dense: Outcomes) -> list[str]:
    """The tests that pass with dense layers and have layers that can be 4-bit. Prints why the others are left out."""
    for outcome, title in (("skipped", "skipped by the library"), ("failed", "fail with dense layers")):
        reasons = (first_line(found) for found in dense.values() if found["outcome"] == outcome)
        print_counts(f"left out, {title}", reasons)
    passed = [test for test, found in dense.items() if found["outcome"] == "passed"]
    count = sorted(test for test in passed if dense[test]["layers"])
    print(f"  left out, no layer can be 4-bit: {len(passed) - len(count)}")
    return count


def row_of(test: str, why: str, rows: list[Row]) -> Row:
    """The row that lists a failed test, if its error matches, or else the first that matches, or a new one."""
    matching = [row for row in rows if re.search(row["match"], f"{test}\n{why}")]
    if not matching:
        matching.append({"reason": "", "match": re.escape(why.strip().split("\n")[0][:80]), "tests": []})
        rows.extend(matching)
    return next((row for row in matching if test in row["tests"]), matching[0])


def compare(rows: list[Row], count: list[str], found: Outcomes, recorded: bool) -> tuple[list[str], list[Row]]:
    """Prints a row for each reason, and what is unexpected.

    Args:
        recorded: whether ``rows`` are of the same tests, and must list all that fail.

    Returns:
        What is unexpected, and the rows as they would be without anything unexpected.
    """
    listed = {test for row in rows for test in row["tests"]}
    rows = list(rows)
    failed: dict[int, list[str]] = collections.defaultdict(list)  # by the row's number
    unexpected = [f"listed, but left out: {test}" for test in sorted(listed.difference(count)) if recorded]
    for test in count:
        outcome = found.get(test, {"outcome": "failed", "why": "did not run"})
        if outcome["outcome"] == "passed":
            unexpected += [f"unexpected pass: {test}"] if test in listed else []
            continue
        row = row_of(test, outcome["why"], rows)
        failed[rows.index(row)].append(test)
        if not row["reason"] or (recorded and test not in row["tests"]):
            unexpected.append(f"unexpected failure: {test}: {first_line(outcome)}")
    print(f"  {len(count) - sum(map(len, failed.values()))} of {len(count)} pass with 4-bit layers")
    for number, tests in sorted(failed.items()):
        print(f"    {len(tests):4} {rows[number]['reason'] or 'no reason yet: ' + rows[number]['match']}")
    for line in unexpected:
        print(f"  {line}")
    return unexpected, [{**rows[number], "tests": tests} for number, tests in sorted(failed.items())]


def main() -> None:
    suites: dict[str, dict[str, Any]] = yaml.safe_load(EXPECTED.read_text())
    parser = argparse.ArgumentParser(prog="scripts/peers", description=__doc__)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"which to run: {', '.join(suites)} (default: all)")
    parser.add_argument("--sample", type=int, help="run so many cases of each test (default: as recorded)")
    parser.add_argument("--seed", type=int, help="of the sample (default: as recorded)")
    parser.add_argument("--record", action="store_true", help="rewrite tests/peers/expected.yaml")
    parser.add_argument("--requirements", action="store_true", help="only print the recorded versions of the libraries")
    arguments = parser.parse_args()
    unknown = {*arguments.suites} - {*suites}
    if unknown:
        parser.error(f"SUITE: expected one of {', '.join(suites)}, got {min(unknown)}")
    if arguments.requirements:
        print(*(f"{name}=={suite['version']}" for name, suite in suites.items()), sep="\n")
        return
    import hub  # imports transformers

    hub.make(BUILD / "hub")
    unexpected, ran = [], False
    for name in arguments.suites or suites:
        suite = suites[name]
        directory = unpack(name, suite)
        if directory is None:
            continue
        ran = True
        asked = {key: getattr(arguments, key) for key in ("sample", "seed")}
        wanted = {key: suite[key] if value is None else value for key, value in asked.items()}
        print(f"{name} {suite['version']}: up to {wanted['sample']} cases of each test, seed {wanted['seed']}")
        dense = run(directory, suite, "dense", *(f"--{key}={value}" for key, value in wanted.items()))
        count = that_count(dense)
        only = directory / "count.json"
        only.write_text(json.dumps(count))
        found = run(directory, suite, "4bit", "--only", str(only))
        news, rows = compare(suite["rows"], count, found, all(suite[key] == wanted[key] for key in wanted))
        unexpected += news
        suite.update(wanted, rows=rows)
    if not ran:
        sys.exit("no tests ran: see above")
    if arguments.record:
        EXPECTED.write_text(HEADER + yaml.safe_dump(suites, sort_keys=False, width=1000, allow_unicode=True))
    elif unexpected:
        sys.exit(f"{len(unexpected)} unexpected results: see above")


if __name__ == "__main__":
    main()
