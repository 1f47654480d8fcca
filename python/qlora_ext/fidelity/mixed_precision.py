"""Mixed precision: chooses the layers to leave in 16 bits, those whose 4 bits cost the most loss per byte."""

from __future__ import annotations

from collections.abc import Iterable

from ..sizes import bytes_of
from .layer_costs import LayerCost


def _expected(budget: object) -> ValueError:
    return ValueError(
        f"budget: expected a number of layers, a share such as '5%' or a size such as '200MB', got {budget!r}"
    )


def allowance(budget: int | str, total_bytes: int) -> tuple[int | None, float]:
    """The number of layers (None: any number) and the additional bytes that a budget allows.

    Args:
        budget: a number of layers, or a limit on their additional bytes: a share of ``total_bytes`` ("5%") or a size
            ("200MB", "1GiB").
        total_bytes: size of the model with every layer in 4 bits.

    Raises:
        ValueError: ``budget`` is none of these.

    Example:
        >>> qlora_ext.fidelity.allowance("5%", 1000), qlora_ext.fidelity.allowance(3, 1000)
        ((None, 50.0), (3, inf))
    """
    if isinstance(budget, bool) or not isinstance(budget, (int, str)):
        raise _expected(budget)
    text = str(budget).strip()
    if text.isdecimal():
        return int(text), float("inf")
    if text.endswith("%"):
        share = bytes_of(text[:-1].strip())
        if share is None or text[:-1].strip()[-1].isalpha():
            raise _expected(budget)
        return None, share / 100 * total_bytes
    size = bytes_of(text)
    if size is None or not text[-1].isalpha():
        raise _expected(budget)
    return None, size


def choose(layers: Iterable[LayerCost], total_bytes: int, budget: int | str) -> list[LayerCost]:
    """The layers to leave dense: in the order of falling loss per byte, each one that still fits the budget.

    Args:
        total_bytes, budget: as in ``allowance``.
    """
    count, room = allowance(budget, total_bytes)
    chosen: list[LayerCost] = []
    candidates = [layer for layer in layers if layer.extra_bytes > 0]
    for layer in sorted(candidates, key=lambda layer: layer.loss / layer.extra_bytes, reverse=True):
        if len(chosen) == count:
            break
        if layer.extra_bytes <= room:
            room -= layer.extra_bytes
            chosen.append(layer)
    return chosen
