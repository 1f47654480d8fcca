"""Bills of materials in CycloneDX JSON: what a wheel is made of, and what a release consists of."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import os
import pathlib
import re
import subprocess
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

NAME = "qlora_ext"


def component(name: str, version: str, license: str, purl: str, description: str) -> dict[str, Any]:
    return {
        "type": "library",
        "bom-ref": purl,
        "name": name,
        "version": version,
        "description": description,
        "licenses": [{"expression": license}],
        "purl": purl,
    }


def ours(version: str) -> dict[str, Any]:
    text = "QLoRA for PyTorch: fused NF4 + LoRA kernels for CPU and CUDA, forward and backward"
    return component(NAME, version, "Apache-2.0", f"pkg:pypi/{NAME.replace('_', '-')}@{version}", text)


def document(version: str, components: Sequence[dict[str, Any]]) -> str:
    """The same text for the same parts, at the time of the last change."""
    epoch = int(os.environ["SOURCE_DATE_EPOCH"])
    subject = ours(version)
    parts = list(components)
    bill = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "timestamp": datetime.datetime.fromtimestamp(epoch, datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "component": subject,
        },
        "components": parts,
        "dependencies": [
            {"ref": subject["bom-ref"], "dependsOn": [part["bom-ref"] for part in parts if part["type"] == "library"]}
        ],
    }
    serial = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps(bill, sort_keys=True))
    return json.dumps({"serialNumber": f"urn:uuid:{serial}", **bill}, indent=2, sort_keys=True) + "\n"


def compiled_in(compiler: str, torch_root: pathlib.Path) -> list[dict[str, Any]]:
    """What of others is inside the libraries."""
    gcc = subprocess.run([compiler, "-dumpfullversion"], capture_output=True, text=True, check=True).stdout.strip()
    pybind11 = importlib.metadata.version("pybind11")
    [torch] = re.findall(r"^__version__ = '([0-9.]+)", (torch_root / "version.py").read_text(), re.MULTILINE)
    runtime = "GPL-3.0-or-later WITH GCC-exception-3.1"
    return [
        component("libstdc++", gcc, runtime, f"pkg:generic/gcc/libstdc%2B%2B@{gcc}", "GCC's, linked statically"),
        component("libgcc", gcc, runtime, f"pkg:generic/gcc/libgcc@{gcc}", "GCC's, linked statically"),
        component("pybind11", pybind11, "BSD-3-Clause", f"pkg:pypi/pybind11@{pybind11}", "headers, compiled into _C"),
        component("torch", torch, "BSD-3-Clause", f"pkg:pypi/torch@{torch}", "headers of its stable ABI, compiled in"),
    ]


def files(paths: Iterable[pathlib.Path]) -> list[dict[str, Any]]:
    """Each of ``paths`` as a component, with its SHA-256."""
    return [
        {
            "type": "file",
            "bom-ref": path.name,
            "name": path.name,
            "hashes": [{"alg": "SHA-256", "content": hashlib.sha256(path.read_bytes()).hexdigest()}],
        }
        for path in paths
    ]
