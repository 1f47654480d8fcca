"""bitsandbytes: our operators run its layers and models, and our models can be saved in its format.

``qlora_ext.adopt`` converts the layers of a loaded model. ``qlora_ext.take_over_bitsandbytes`` makes
``BitsAndBytesConfig`` load our layers. ``save_pretrained`` writes one of our models in bitsandbytes' format, and
``state_dict`` returns a model's state in that format.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..._internal.lazy import lazily
from .state import state_dict

if TYPE_CHECKING:
    from .saving import save_pretrained

__all__ = ["save_pretrained", "state_dict"]

__getattr__, __dir__ = lazily(__name__, {"save_pretrained": ".saving"}, __all__)  # it needs transformers
