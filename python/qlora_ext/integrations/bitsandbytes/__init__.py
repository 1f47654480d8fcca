"""bitsandbytes: its layers and models run by our operators, and saved in its own form.

``qlora_ext.adopt`` takes over the layers of a model that is loaded, ``qlora_ext.take_over_bitsandbytes`` has
``BitsAndBytesConfig`` load ours, ``save_pretrained`` writes one of our models as bitsandbytes would, and ``state_dict``
is what bitsandbytes would have in the place of a model's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..._internal.lazy import lazily
from .state import state_dict

if TYPE_CHECKING:
    from .saving import save_pretrained

__all__ = ["save_pretrained", "state_dict"]

__getattr__, __dir__ = lazily(__name__, {"save_pretrained": ".saving"}, __all__)  # it needs transformers
