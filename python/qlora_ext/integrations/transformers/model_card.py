"""Writes the model card of a saved 4-bit model, which says what loading it requires."""

from __future__ import annotations

import pathlib

from ...formats import EXACT
from .config import METHOD, NEEDS

_CARD = """---
library_name: transformers
tags:
- {method}
- 4-bit
- nf4
---

# A 4-bit model (NF4), saved by {method}

Install the package (`pip install {method}`), and run `{needs}` before loading the model:

```python
{needs}
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/directory")
```

`quantization_config` in `config.json` describes the quantization.{more}
"""
_INT8 = (
    ' On a CPU, its 4-bit layers round their inputs to int8; `QLoRAConfig(activations="exact")` as '
    "`quantization_config` makes them compute exactly."
)


class OursMetadata(dict[str, str]):
    """The metadata of a file in our format, beside which ``save_pretrained`` writes a card.

    Attributes:
        activations: those of the model.
    """

    def __init__(self, activations: str) -> None:
        super().__init__()
        self.activations = activations


def write_card(directory: pathlib.Path, activations: str) -> None:
    """Writes the card of a model into ``directory``, unless there is one."""
    card = directory / "README.md"
    if not card.exists():
        more = "" if activations == EXACT else _INT8
        card.write_text(_CARD.format(method=METHOD, needs=NEEDS, more=more), encoding="utf-8")
