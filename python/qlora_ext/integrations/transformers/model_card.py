"""Writes the model card of a saved 4-bit model, which says what loading it requires."""

from __future__ import annotations

import os
import pathlib
from typing import Any

from .._patches import extend
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


@extend("transformers.modeling_utils:PreTrainedModel.save_pretrained")
def save_pretrained(
    original: Any,
    self: Any,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    *args: Any,
    **kwargs: Any,
) -> Any:
    saved = original(self, save_directory, is_main_process, *args, **kwargs)
    method = getattr(getattr(self.config, "quantization_config", None), "quant_method", None)
    adapter_alone = getattr(self, "_hf_peft_config_loaded", False)
    card = pathlib.Path(save_directory, "README.md")
    if is_main_process and method == METHOD and not adapter_alone and not card.exists():
        card.write_text(_CARD.format(method=METHOD, needs=NEEDS), encoding="utf-8")
    return saved
