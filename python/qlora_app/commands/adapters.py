"""``qlora-ext adapters``: lists the adapters in a directory, with their bases and perplexities."""

from __future__ import annotations

import argparse
import datetime
import json
import pathlib
import sys
from typing import Any

from qlora_ext.untrusted import printable, read_json

from ..errors import UserError, path_named
from ..models.adapter_files import config_of, record_of
from ..terminal.tables import aligned

_COLUMNS = ("adapter", "base", "fingerprint", "rank", "alpha", "date", "steps", "perplexity")


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "adapters",
        help="list adapters",
        description="Lists the adapters below a directory, except those in a run's checkpoints: the base, the "
        "beginning of its 4-bit fingerprint, rank, alpha, date, steps, and held-out perplexity before and after. "
        "Damaged adapters are reported on stderr, and the exit code is then 2.",
    )
    parser.add_argument("directory", metavar="DIR")
    parser.add_argument("--json", action="store_true", help="print one complete JSON object per adapter")
    parser.set_defaults(run=run)


def describe(adapter: pathlib.Path) -> dict[str, Any]:
    """The properties of an adapter that its files record; None for those that they do not.

    Raises:
        UserError: a file is damaged.
    """
    from qlora_ext.integrations.peft import BASE_FILE

    config, record = config_of(adapter), record_of(adapter)
    path = adapter / BASE_FILE
    base = read_json(path, {"fingerprint?": str, "format_version?": int}) if path.is_file() else {}
    metrics = record.get("metrics") or {}
    saved = datetime.datetime.fromtimestamp((adapter / "adapter_config.json").stat().st_mtime, datetime.timezone.utc)
    return {
        "adapter": str(adapter),
        "base": record.get("model") or config.get("base_model_name_or_path"),
        "fingerprint": base.get("fingerprint"),
        "format_version": base.get("format_version"),
        "rank": config.get("r"),
        "alpha": config.get("lora_alpha"),
        "date": record.get("date") or saved.isoformat(timespec="seconds"),
        "steps": metrics.get("steps"),
        "perplexity_before": metrics.get("perplexity_before"),
        "perplexity_after": metrics.get("perplexity_after"),
    }


def find_all(directory: pathlib.Path) -> list[pathlib.Path]:
    """The adapter directories below ``directory``, including itself."""
    found = [path.parent for path in directory.rglob("adapter_config.json")]
    return sorted(p for p in found if not any(part.startswith(("checkpoint-", ".partial-")) for part in p.parts))


def _cells(adapter: dict[str, Any], root: pathlib.Path) -> list[str]:
    before, after = adapter["perplexity_before"], adapter["perplexity_after"]
    shown = {
        **adapter,
        "adapter": str(pathlib.Path(adapter["adapter"]).relative_to(root)),
        "fingerprint": (adapter["fingerprint"] or "")[:12],
        "date": adapter["date"][:16].replace("T", " "),
        "perplexity": " -> ".join(f"{x:.2f}" for x in (before, after) if x is not None),
    }
    return ["" if shown[column] is None else printable(shown[column]) for column in _COLUMNS]


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; see the module's text."""
    root = path_named(arguments.directory, "DIR")
    if not root.is_dir():
        raise UserError(f"{arguments.directory}: no such directory")
    adapters, damaged = [], []
    for path in find_all(root):
        try:
            adapters.append(describe(path))
        except (UserError, OSError) as error:
            damaged.append(str(error))
    if not adapters and not damaged:
        raise UserError(f"{arguments.directory}: there is no adapter in that directory")
    if arguments.json:
        for adapter in adapters:
            print(json.dumps(adapter))
    elif adapters:
        for line in aligned([list(_COLUMNS), *(_cells(adapter, root) for adapter in adapters)]):
            print(line)
    for message in damaged:
        print(f"qlora-ext adapters: {printable(message)}", file=sys.stderr)
    return 2 if damaged else 0
