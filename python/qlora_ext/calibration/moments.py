"""Second moments of the inputs of a model's layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

# Each expert's moments include this many tokens of the layer's average. Experts with few tokens then do not overfit
# them, and experts without tokens get the average.
_PRIOR_TOKENS = 64


@dataclasses.dataclass
class Moments:
    """The sum of x xᵀ over ``tokens`` rows x [K], in float32."""

    sum: Tensor
    tokens: int = 0

    @classmethod
    def empty(cls, size: int, device: torch.device) -> Moments:
        return cls(torch.zeros(size, size, dtype=torch.float32, device=device))

    def add(self, x: Tensor) -> None:
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        self.sum.addmm_(rows.T, rows)
        self.tokens += len(rows)

    @property
    def mean(self) -> Tensor:
        return self.sum / max(self.tokens, 1)


class ExpertMoments:
    """The moments of the inputs of each expert of a layer, and of all of them."""

    def __init__(self, experts: int, size: int, device: torch.device) -> None:
        self.all = Moments.empty(size, device)
        self.own = [Moments.empty(size, device) for _ in range(experts)]

    def add(self, expert: int, x: Tensor) -> None:
        self.own[expert].add(x)
        self.all.add(x)

    def of(self, expert: int) -> Moments:
        """The moments on which expert ``expert`` is calibrated."""
        own = self.own[expert]
        return Moments(own.sum + self.all.mean * _PRIOR_TOKENS, own.tokens + _PRIOR_TOKENS)


class Gathering:
    """Hooks that gather the moments of layers' inputs while batches run through a model.

    Layers whose input is the same tensor share its moments.

    Args:
        layers: by name.
        token_mask: for each batch the tokens that are not padding, bool [B, T], or None if all count.

    Attributes:
        found: moments by the names of layer and weight. Layers that no batch reached are missing.
    """

    def __init__(self, layers: Mapping[str, nn.Module], token_mask: Iterable[Tensor | None]) -> None:
        self._token_mask = iter(token_mask)
        self._mask: Tensor | None = None
        self.found: dict[tuple[str, str], Moments | ExpertMoments] = {}
        self._this_batch: list[tuple[Tensor, Moments]] = []
        self._handles = [
            module.register_forward_pre_hook(
                self._experts(name) if hasattr(module, "down_proj") else self._linear(name), with_kwargs=True
            )
            for name, module in layers.items()
        ]

    def next_batch(self) -> None:
        """Must be called before each batch."""
        self._this_batch.clear()
        token_mask = next(self._token_mask)
        self._mask = None if token_mask is None else token_mask.flatten()

    def _row_mask(self, rows: Tensor) -> Tensor | None:
        """Which of a layer's input rows count; None if all do, or if the rows are not the tokens of the batch."""
        token_mask = self._mask
        return token_mask if token_mask is not None and len(token_mask) == len(rows) else None

    def stop(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._this_batch.clear()

    def _linear(self, name: str) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x: Tensor = args[0] if args else next(iter(kwargs.values()))
            for tensor, moments in self._this_batch:
                if tensor is x:
                    self.found.setdefault((name, "weight"), moments)
                    return
            own = self.found.setdefault((name, "weight"), Moments.empty(x.shape[-1], x.device))
            assert isinstance(own, Moments)
            rows = x.detach().reshape(-1, x.shape[-1])
            token_mask = self._row_mask(rows)
            own.add(rows if token_mask is None else rows[token_mask.to(rows.device)])
            self._this_batch.append((x, own))

        return see

    def _experts(self, name: str) -> Callable[..., None]:
        """A hook for transformers' stacked experts, which take hidden_states, top_k_index and top_k_weights."""

        def see(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = dict(zip(("hidden_states", "top_k_index"), args, strict=False)) | kwargs
            hidden, index = given["hidden_states"], given["top_k_index"]
            first = "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"
            weight, bias = getattr(module, first), getattr(module, f"{first}_bias", None)
            transposed = bool(getattr(module, "is_transposed", False))
            token_mask = self._row_mask(hidden)
            for expert in index.unique().tolist():
                if expert >= len(weight):
                    continue  # not routed to any expert
                routed = (index == expert).any(-1)
                x = hidden[routed if token_mask is None else routed & token_mask.to(routed.device)]
                w = weight[expert].T if transposed else weight[expert]
                h = nn.functional.linear(x.to(w.dtype), w, None if bias is None else bias[expert])
                h = module._apply_gate(h) if first == "gate_up_proj" else module.act_fn(h)
                for projection, rows in ((first, x), ("down_proj", h)):
                    self._of_experts(name, projection, len(weight), rows).add(expert, rows)

        return see

    def _of_experts(self, name: str, projection: str, experts: int, x: Tensor) -> ExpertMoments:
        key = (name, projection)
        if key not in self.found:
            self.found[key] = ExpertMoments(experts, x.shape[-1], x.device)
        found = self.found[key]
        assert isinstance(found, ExpertMoments)
        return found
