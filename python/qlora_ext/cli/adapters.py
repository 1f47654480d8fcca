"""``qlora-ext adapters``: the adapters in a directory, with what they were trained on and how well."""

from __future__ import annotations

import argparse
import datetime
import json
import pathlib
from typing import Any

from .adapter import RECORD
from .errors import UserError
from .models import read_json

_COLUMNS = ("adapter", "base", "fingerprint", "rank", "alpha", "date", "steps", "perplexity")


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "adapters",
        help="list adapters",
        description="Lists the adapters below a directory, without those in a run's checkpoints: the base, the "
        "beginning of its 4-bit fingerprint, rank, alpha, date, steps, held-out perplexity before and after.",
    )
    parser.add_argument("directory", metavar="DIR")
    parser.add_argument("--json", action="store_true", help="print one JSON object an adapter, in full")
    parser.set_defaults(run=run)


def _optional(path: pathlib.Path) -> dict[str, Any]:
    found = read_json(path) if path.is_file() else {}
    if not isinstance(found, dict):
        raise UserError(f"cannot read {path}: expected an object")
    return found


def describe(adapter: pathlib.Path) -> dict[str, Any]:
    """What the files of one adapter say about it; None for what they do not say."""
    from ..integrations.peft import BASE_FILE

    config, base, record = (_optional(adapter / name) for name in ("adapter_config.json", BASE_FILE, RECORD))
    metrics = record.get("metrics", {})
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
    """The adapter directories below ``directory``, itself included."""
    found = [path.parent for path in directory.rglob("adapter_config.json")]
    return sorted(p for p in found if not any(part.startswith(("checkpoint-", ".partial-")) for part in p.parts))


def _cells(adapter: dict[str, Any], root: pathlib.Path) -> list[str]:
    before, after = adapter["perplexity_before"], adapter["perplexity_after"]
    shown = {
        **adapter,
        "adapter": str(pathlib.Path(adapter["adapter"]).relative_to(root)),
        "fingerprint": (adapter["fingerprint"] or "")[:12],
        "date": adapter["date"][:16].replace("T", " "),
        "perplexity": "" if after is None else f"{before:.2f} -> {after:.2f}",
    }
    return ["" if shown[column] is None else str(shown[column]) for column in _COLUMNS]


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; see the module's text."""
    root = pathlib.Path(arguments.directory).expanduser()
    if not root.is_dir():
        raise UserError(f"{arguments.directory}: no such directory")
    adapters = [describe(path) for path in find_all(root)]
    if not adapters:
        raise UserError(f"{arguments.directory}: there is no adapter in that directory")
    if arguments.json:
        for adapter in adapters:
            print(json.dumps(adapter))
        return 0
    rows = [list(_COLUMNS), *(_cells(adapter, root) for adapter in adapters)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0
