"""``Embedding4bit``: a 4-bit embedding table that decodes only the requested rows; and an output head tied to it."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..form import Form, FormKeywords
from ..weight import Weight4bit, has_values
from ..weight_ops import FUNCTIONS, implements
from .linear import Linear4bit
from .packed import PackedWeight4bit

if TYPE_CHECKING:
    from typing_extensions import Unpack


def decode_rows(w4: Weight4bit, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Decodes the requested rows of a 4-bit table [V, D], bit for bit equal to ``w4.dequantize(dtype)[rows]``.

    Args:
        rows: row numbers [...], int32 or int64.

    Returns:
        [..., D] in ``dtype``.

    Raises:
        IndexError: a row is out of range. In a graph compiled by Inductor, torch's own embedding raises a RuntimeError
            instead; on CUDA, a device-side assertion fails. TypeError: ``rows`` is not int32 or int64.
    """
    if rows.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"rows: expected row numbers, int32 or int64, got {rows.dtype}")
    count, width = w4.shape
    index = rows.reshape(-1).long()
    aligned = width % w4.block_size == 0
    # Row numbers cannot be read while a graph is traced, from fake tensors, or inside torch.func.
    readable = has_values(index) and not torch._C._functorch.is_functorch_wrapped_tensor(index)
    if index.is_cpu and readable and index.numel():
        low, high = index.aminmax()
        if low < 0 or high >= count:
            raise IndexError(f"rows: expected row numbers from 0 to {count - 1}, got {int(low)} to {int(high)}")
    elif not aligned:
        # torch checks the indices of an embedding everywhere, also in compiled graphs. Looking the numbers up in a
        # table of themselves makes the following code depend on that check.
        numbers = torch.arange(count, dtype=torch.int64, device=index.device)
        index = nn.functional.embedding(index, numbers.unsqueeze(1)).squeeze(1)
    # A row overlaps `span` blocks. They contain nothing else if the width is a multiple of the block size.
    first = index * width // w4.block_size
    span = width // w4.block_size if aligned else -(-(width - 1) // w4.block_size) + 1
    blocks = first.unsqueeze(1) + torch.arange(span, dtype=torch.int64, device=index.device)
    if aligned:
        packed = nn.functional.embedding(index, w4.packed)
    else:
        # Blocks have an even number of elements, so each begins on a byte. Values after the table's end are not used.
        half = w4.block_size // 2
        at = (first * half).unsqueeze(1) + torch.arange(span * half, dtype=torch.int64, device=index.device)
        packed = w4.packed.reshape(-1)[at.clamp_max(w4.packed.numel() - 1)]
        blocks = blocks.clamp_max(w4.absmax.numel() - 1)

    def gathered(t: Tensor | None, at: Tensor) -> Tensor | None:
        return None if t is None else t[at].reshape(-1)

    nested = blocks // w4.nested_block_size
    out: Tensor = torch.ops.qlora.dequantize_nf4(
        packed,
        gathered(w4.absmax, blocks),
        gathered(w4.nested_absmax, nested),
        w4.nested_offset,
        w4.block_size,
        1,  # each gathered scale has its own nested scale
        [index.numel(), span * w4.block_size],
        dtype,
        w4.code,
        w4.scale_table,
        gathered(w4.block_offsets, blocks),
        gathered(w4.offset_scale, nested),
    )
    if not aligned:
        begin = (index * width - first * w4.block_size).unsqueeze(1)
        out = out.gather(1, begin + torch.arange(width, dtype=torch.int64, device=index.device))
    return w4.columns_in_order(out).reshape(*rows.shape, width)


@implements(FUNCTIONS, nn.functional.embedding)
def _embedding(
    ids: Tensor, weight: Any, padding_idx: int | None = None, max_norm: float | None = None, **_: Any
) -> Any:
    if not isinstance(weight, Weight4bit) or max_norm is not None:
        return NotImplemented
    return decode_rows(weight, ids, weight.dtype)


@functools.cache
def is_scaled(kind: type[nn.Embedding]) -> bool:
    """Whether embeddings of the class ``kind`` multiply the rows of the table by ``embed_scale``, and do nothing else.

    This is tried with a small table. Other subclasses may use their table in any way.
    """
    with torch.inference_mode(False), torch.no_grad():
        table = torch.arange(12, dtype=torch.float32, device="cpu").view(4, 3)
        ids = torch.tensor([[2, 0], [3, 2]], dtype=torch.int64, device="cpu")
        scale = torch.tensor(3, dtype=torch.float32, device="cpu")
        probe: Any = kind.__new__(kind)
        vars(probe).update(vars(nn.Embedding(4, 3, device="meta")), _parameters={}, weight=table, embed_scale=scale)
        try:
            return torch.equal(probe(ids), table[ids] * scale)
        except Exception:  # an arbitrary forward
            return False


def is_table(module: nn.Module) -> bool:
    """Whether ``Embedding4bit`` can replace ``module``: an ``nn.Embedding``, or one that scales its rows, as Gemma's.

    Example:
        >>> qlora_ext.nn.is_table(nn.Embedding(4, 4)), qlora_ext.nn.is_table(nn.Linear(4, 4))
        (True, False)
    """
    kind: Any = type(module)
    if kind is nn.Embedding or not isinstance(module, nn.Embedding):
        return kind is nn.Embedding
    return isinstance(getattr(module, "scalar_embed_scale", None), float) and is_scaled(kind)


class Embedding4bit(PackedWeight4bit, nn.Embedding):
    """An embedding with a frozen 4-bit table: ids [...] to rows [..., D]. Only the requested rows are decoded.

    Its packed state is that of a ``Linear4bit`` whose weight is the table [V, D], with the same names and guarantees.
    It has no trainable parameters and no gradient. Rows are multiplied by ``embed_scale`` if it stands for an embedding
    that has one, such as Gemma's.

    Args:
        num_embeddings, embedding_dim: V and D.
        padding_idx: an attribute without effect; its row is decoded like any other.
        compute_dtype: of the rows.
        device: of the packed state; "meta" allocates nothing.
        form: ``block_size``, ``double_quant``, ``nested_block_size``, ``code``, ``scales`` and ``offsets``, as in
            ``Linear4bit``.

    Example:
        >>> table = qlora_ext.nn.Embedding4bit.from_embedding(nn.Embedding(1000, 64))
        >>> table(torch.tensor([[3, 999]])).shape
        torch.Size([1, 2, 64])
        >>> table(torch.tensor([1000]))
        Traceback (most recent call last):
        IndexError: rows: expected row numbers from 0 to 999, got 1000 to 1000
    """

    packed_is_tied = True
    dense_class: type[nn.Embedding] = nn.Embedding
    scalar_embed_scale: float | None = None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        compute_dtype: torch.dtype = torch.bfloat16,
        *,
        device: torch.device | str | None = None,
        **form: Unpack[FormKeywords],
    ) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self._set_form(Form.of(**form), compute_dtype)
        if padding_idx is not None and not isinstance(padding_idx, int):
            raise TypeError(f"padding_idx: expected a row number, got {padding_idx!r}")
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise ValueError(f"padding_idx: expected a row of {num_embeddings}, got {padding_idx}")
        self.padding_idx = padding_idx % num_embeddings if padding_idx is not None else None
        # Attributes of nn.Embedding that other code may read.
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        self._register_packed(device)

    @property
    def packed_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"weight": (self.num_embeddings, self.embedding_dim)}

    @classmethod
    def from_embedding(
        cls,
        embedding: nn.Embedding,
        compute_dtype: torch.dtype | None = None,
        **form: Unpack[FormKeywords],
    ) -> Embedding4bit:
        """Quantizes an ``nn.Embedding``.

        Args:
            compute_dtype: as in the constructor; the default is the dtype of ``embedding``.
            form: as in the constructor.

        Raises:
            TypeError: ``embedding`` is not a dense ``nn.Embedding``. ValueError: it has ``max_norm``, with which
                lookups change the table; or as from ``quantize_nf4``.
        """
        if isinstance(embedding, Embedding4bit) or not isinstance(embedding, nn.Embedding):
            raise TypeError(f"embedding: expected an nn.Embedding, got {type(embedding).__name__}")
        if embedding.max_norm is not None:
            raise ValueError(f"embedding: expected max_norm=None, got {embedding.max_norm}")
        sizes = embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx
        module = cls(*sizes, compute_dtype or embedding.weight.dtype, device="meta", **form)
        module.stand_for(embedding)
        module.set_weight(module.quantize(embedding.weight))
        return module.train(embedding.training)

    def stand_for(self, embedding: nn.Embedding) -> None:
        """Scales rows as the dense ``embedding`` does, and records its class, which ``to_embedding`` returns."""
        self.dense_class = type(embedding)
        self.scalar_embed_scale = getattr(embedding, "scalar_embed_scale", None)

    @property
    def embed_scale(self) -> Tensor | None:
        """What multiplies the rows; None if nothing does."""
        scale = self.scalar_embed_scale
        return None if scale is None else torch.full((), scale, dtype=torch.float32, device=self.weight.device)

    if TYPE_CHECKING:

        def __call__(self, ids: Tensor) -> Tensor: ...

    def forward(self, ids: Tensor) -> Tensor:
        held = self._parameters["weight"]
        w4 = held if isinstance(held, Weight4bit) else self.packed_weight()
        rows, scale = decode_rows(w4, ids, self.compute_dtype), self.embed_scale
        return rows if scale is None else rows * scale.to(rows.dtype)

    def to_embedding(self, dtype: torch.dtype | None = None, weight: Tensor | None = None) -> nn.Embedding:
        """The dense embedding for this one, without gradient: the decoded table, or ``weight`` [V, D] if given."""
        weight = self.dequantize(dtype) if weight is None else weight.detach().to(dtype or self.weight_dtype)
        scale = self.embed_scale
        options: dict[str, Any] = {} if scale is None else {"embed_scale": self.scalar_embed_scale}
        with torch.device("meta"):
            dense = self.dense_class(self.num_embeddings, self.embedding_dim, self.padding_idx, **options)
        dense.weight = nn.Parameter(weight, requires_grad=False)
        if scale is not None:
            dense.embed_scale = scale
        return dense.train(self.training)

    def to_dense(self, dtype: torch.dtype | None = None) -> nn.Module:
        return self.to_embedding(dtype)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f"padding_idx={self.padding_idx}, "
        return f"{self.num_embeddings}, {self.embedding_dim}, {padding}{self.form}"


class TiedLinear4bit(Linear4bit):
    """An output head on the table of an ``Embedding4bit``: logits = x · tableᵀ + bias.

    Its ``weight`` is the table's own parameter, and the scales are the table's. Both are stored once, in the table's
    state.

    Args:
        embedding: the table.
        bias: [V] or None.

    Example:
        >>> table = qlora_ext.nn.Embedding4bit.from_embedding(nn.Embedding(1000, 64))
        >>> head = qlora_ext.nn.TiedLinear4bit(table)
        >>> head(torch.randn(3, 64)).shape, head.weight is table.weight
        (torch.Size([3, 1000]), True)
    """

    packed_is_tied = True

    def __init__(self, embedding: Embedding4bit, bias: nn.Parameter | None = None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings
        self.__dict__["embedding"] = embedding  # not a submodule, because it belongs to another module
        self.compute_dtype, self._exposed_dtype = embedding.compute_dtype, embedding.weight_dtype
        self.weight = embedding.weight
        self.register_parameter("bias", bias)
        self.train(embedding.training)

    @property
    def embedding(self) -> Embedding4bit:
        """The module that owns the table."""
        table: Embedding4bit = self.__dict__["embedding"]
        return table

    forms: Any = property(lambda head: head.embedding.forms)

    def _parts(self, name: str) -> dict[str, str]:
        return {"packed": name}  # the scales are in the table's state

    def expose(self) -> None:
        self.embedding.expose()
        self._parameters["weight"] = self.embedding._parameters["weight"]

    def join(self) -> None:
        self.embedding.join()
        self._parameters["weight"] = self.embedding._parameters["weight"]

    def packed_state(self) -> dict[str, Tensor]:
        return {**self.embedding.packed_state(), **super().packed_state()}

    def matrices_of(self, dense: nn.Module) -> dict[str, Tensor]:
        return {}  # the weight is the table's

    def set_weight(self, w4: Weight4bit) -> None:
        raise ValueError("w4: expected a layer with a weight of its own, got a head that is tied to an embedding")
