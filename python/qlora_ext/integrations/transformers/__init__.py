"""transformers (>= 5.0): ``QLoRAConfig`` and the quantizer behind ``from_pretrained(..., quantization_config=...)``.

Loading quantizes weight by weight as the checkpoint is read; a model directory saved afterwards holds the 4-bit state
and loads as such; one that bitsandbytes saved loads with ``QLoRAConfig()``. This package is imported by itself as soon
as transformers loads its own quantizers, so that ``import qlora_ext`` is enough for saved models to be recognised.
"""

from .config import FORMAT_VERSION, METHOD, QLoRAConfig
from .conv1d import Conv1D4bit
from .quantizer import QLoRAQuantizer, attach

__all__ = ["FORMAT_VERSION", "METHOD", "Conv1D4bit", "QLoRAConfig", "QLoRAQuantizer", "attach"]
