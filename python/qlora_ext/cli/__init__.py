"""The console command ``qlora-ext``: fine-tune, generate, quantize, merge and plan from a shell."""

from __future__ import annotations

import sys

if sys.platform == "win32":  # files are locked and flushed with POSIX functions
    raise ImportError(
        "the command qlora-ext needs Linux or macOS; on Windows, run it in the Windows Subsystem for Linux"
    )

from .main import main

__all__ = ["main"]
