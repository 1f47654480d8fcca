"""Writes the model card of a saved 4-bit model, which says what loading it requires."""

from __future__ import annotations

import pathlib

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

`quantization_config` in `config.json` describes the quantization.
"""


class OursMetadata(dict[str, str]):
    """The metadata of a file in our format, beside which ``save_pretrained`` writes a card."""


def write_card(directory: pathlib.Path) -> None:
    """Writes the card into ``directory``, unless there is one."""
    card = directory / "README.md"
    if not card.exists():
        card.write_text(_CARD.format(method=METHOD, needs=NEEDS), encoding="utf-8")
