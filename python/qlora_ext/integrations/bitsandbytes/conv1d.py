"""GPT-2's ``Conv1D``, where bitsandbytes quantized it."""

from __future__ import annotations

import bitsandbytes as bnb

from ..transformers.conv1d import Conv1D4bit
from .layers import ADOPTED, FromBitsandbytes


class AdoptedConv1D4bit(FromBitsandbytes, Conv1D4bit, bnb.nn.Linear4bit):
    """A ``Conv1D4bit`` of ours in the place of a ``bnb.nn.Linear4bit``; see ``AdoptedLinear4bit``."""


ADOPTED[Conv1D4bit] = AdoptedConv1D4bit
