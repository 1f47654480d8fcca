"""Which layers to leave in 16 bits when only some can be: those whose 4 bits cost the most loss per byte."""

from __future__ import annotations

from collections.abc import Iterable

from .._internal.sizes import bytes_of
from .layers import LayerCost


def _expected(budget: object) -> ValueError:
    return ValueError(
        f"budget: expected a number of layers, a share such as '5%' or a size such as '200MB', got {budget!r}"
    )


def allowance(budget: int | str, whole: int) -> tuple[int | None, float]:
    """What a budget allows: so many layers (None: any number), and bytes.

    Args:
        budget: a number of layers, or what all of them may take more than in 4 bits: a share of ``whole`` ("5%"), or a
            size ("200MB", "1GiB").
        whole: bytes of the model with every layer in 4 bits.

    Raises:
        ValueError: it is none of these.

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
        return None, share / 100 * whole
    size = bytes_of(text)
    if size is None or not text[-1].isalpha():
        raise _expected(budget)
    return None, size


def choose(layers: Iterable[LayerCost], whole: int, budget: int | str) -> list[LayerCost]:
    """The layers to leave dense: by falling loss per byte, each that the ``budget`` still has room for.

    Args:
        budget, whole: as in ``allowance``.
    """
    count, room = allowance(budget, whole)
    kept: list[LayerCost] = []
    candidates = [layer for layer in layers if layer.extra_bytes > 0]
    for layer in sorted(candidates, key=lambda layer: layer.loss / layer.extra_bytes, reverse=True):
        if len(kept) == count:
            break
        if layer.extra_bytes <= room:
            room -= layer.extra_bytes
            kept.append(layer)
    return kept
