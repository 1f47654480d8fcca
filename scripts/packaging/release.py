"""Makes everything that a release consists of: sdist, wheels, notes, bill of materials and checksums, in dist/.

What is published is what two builds in different directories agree on, byte for byte.
"""

from __future__ import annotations

import argparse
import filecmp
import hashlib
import pathlib
import re
import shutil
import sys
from collections.abc import Sequence

import sbom
import wheels

ROOT = wheels.ROOT
_VERSION_PLACES = {
    "pyproject.toml": r'^version = "(.+)"$',
    "CHANGELOG.md": r"^## \[(\d.+?)\] - \d{4}-\d\d-\d\d$",
}


def versions(root: pathlib.Path) -> dict[str, str | None]:
    """The version by each file that states it; None of a changelog whose changes are unreleased."""
    found: dict[str, str | None] = {}
    for name, pattern in _VERSION_PLACES.items():
        match = re.search(pattern, (root / name).read_text(), re.MULTILINE)
        found[name] = match[1] if match else None
    return found


def notes(changelog: str, heading: str) -> str:
    """What the changelog says under ``## [heading]``."""
    match = re.search(rf"^## \[{re.escape(heading)}\].*?\n(.*?)(?=^## \[|\Z)", changelog, re.MULTILINE | re.DOTALL)
    return match[1].strip() + "\n" if match else ""


def checksums(paths: Sequence[pathlib.Path]) -> str:
    """As ``sha256sum --check`` reads them."""
    return "".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in paths)


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/release", description=__doc__)
    wheels.add_arguments(parser)
    parser.add_argument("--draft", action="store_true", help="of a tree with changes, for a version without a date yet")
    parser.add_argument("--once", action="store_true", help="do not build a second time and compare")
    arguments = parser.parse_args()

    stated = versions(ROOT)
    version = stated["pyproject.toml"]
    if not arguments.draft:
        if set(stated.values()) != {version}:
            sys.exit(f"the files disagree about the version: {stated}")
        if wheels.run("git", "status", "--porcelain", cwd=ROOT):
            sys.exit("there are changes that are not committed")
    assert version is not None
    if arguments.out.is_dir() and any(arguments.out.iterdir()):
        sys.exit(f"{arguments.out} is not empty: move what is there, it is no part of this release")
    made, skipped = wheels.make_all(arguments)
    if skipped and not arguments.draft:
        sys.exit(f"no headers of Python {', '.join(skipped)}")
    if not arguments.once:
        again = argparse.Namespace(**vars(arguments))
        again.work = arguments.work.with_name(arguments.work.name + "-in-another-directory")
        again.out = again.work / "dist"
        made_again, _ = wheels.make_all(again)
        different = [a.name for a, b in zip(made, made_again, strict=True) if not filecmp.cmp(a, b, shallow=False)]
        if different:
            sys.exit(f"two builds differ in {', '.join(different)}: compare {arguments.out} with {again.out}")
        shutil.rmtree(again.work)
        print("two builds in different directories: equal")

    changelog = (ROOT / "CHANGELOG.md").read_text()
    notes_file = arguments.out / "RELEASE_NOTES.md"
    notes_file.write_text(notes(changelog, version) or notes(changelog, "Unreleased"))
    bill = arguments.out / f"qlora_ext-{version}.cdx.json"
    bill.write_text(sbom.document(version, sbom.files(made)))
    sums = arguments.out / "SHA256SUMS"
    sums.write_text(checksums([*made, bill]))
    print(sums.read_text(), end="")


if __name__ == "__main__":
    main()
