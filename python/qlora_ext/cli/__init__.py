"""The console command ``qlora-ext``: fine-tune, generate, quantize, merge and plan from a shell."""

from __future__ import annotations

from .main import main

__all__ = ["main"]
