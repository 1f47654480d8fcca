"""transformers (>= 5.0): ``QLoRAConfig`` and the quantizer behind ``from_pretrained(..., quantization_config=...)``.

Loading quantizes each weight when it is read. A model saved afterwards is 4-bit, and loads as such. Checkpoints of
other 4-bit formats load with ``QLoRAConfig()``, and are saved in theirs. This package is imported automatically with
transformers' own quantizers, so ``import qlora_ext`` is enough for saved models to load.
"""

from .config import FORMAT_VERSION, METHOD, QLoRAConfig
from .conv1d import Conv1D4bit
from .quantizer import QLoRAQuantizer, attach, save_in_our_format

__all__ = ["FORMAT_VERSION", "METHOD", "Conv1D4bit", "QLoRAConfig", "QLoRAQuantizer", "attach", "save_in_our_format"]
