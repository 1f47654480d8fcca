"""GPT-2's ``Conv1D`` layers that bitsandbytes has quantized."""

from __future__ import annotations

import bitsandbytes as bnb

from ..transformers.conv1d import Conv1D4bit
from .layers import ADOPTED, FromBitsandbytes


class AdoptedConv1D4bit(FromBitsandbytes, Conv1D4bit, bnb.nn.Linear4bit):
    """A ``Conv1D4bit`` that replaces a ``bnb.nn.Linear4bit``; see ``AdoptedLinear4bit``."""


ADOPTED[Conv1D4bit] = AdoptedConv1D4bit
