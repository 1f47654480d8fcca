"""The protocol of checkpoint formats: a ``Format`` turns the tensors of one weight into a ``Weight4bit`` and back."""

from __future__ import annotations

import abc
import dataclasses
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..dtype_names import name_of
from ..form import Form
from ..formats import is_integer
from ..ops import check_shape
from ..untrusted import excerpt
from ..weight import Weight4bit

# What to do where a format is not supported.
LOAD_ORIGINAL = "load the model's original checkpoint instead, which is quantized while it loads"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a checkpoint's configuration says about its packed weights.

    Attributes:
        group_size: elements of a row that share a scale; None: the whole row.
        group_rows: rows that share their scales; None: all.
        symmetric: whether there are no zero points.
        scale_dtype: the dtype of scales that are not 8-bit codes. ``Format.read`` takes it from the scales themselves;
            a caller that knows the file's sets it (``dataclasses.replace``) before it asks for the form. FP8 weights
            have scales that are E8M0 codes if it is float8_e8m0fnu or uint8.
        scale_shape: the shape of the scales in the file, if it is known. It may lack dimensions of 1.
        zero_point_bias: what is added to a stored zero point.
        reorders: whether the columns of weights may belong to groups in any order.
        bits: of the codes. Weights of 2 or 3 bits can only be decoded.
        code: the name of a code that is not integer.
        layers: for modules with settings of their own, these settings, by name.
    """

    group_size: int | None
    group_rows: int | None = 1
    symmetric: bool = True
    scale_dtype: torch.dtype = torch.bfloat16
    scale_shape: tuple[int, ...] | None = None
    zero_point_bias: int = 0
    reorders: bool = False
    bits: int = 4
    code: str = ""
    layers: Mapping[str, Settings] = dataclasses.field(default_factory=dict)


class Format(abc.ABC):
    """One format of packed weights in safetensors files.

    Attributes:
        name: in messages, and where the format has one, in configurations.
        codes: the name of the tensor with the codes.
        code_dtypes: the dtypes that it may have, as safetensors names them. A tensor of that name with another dtype
            is a dense weight.
        has_stacks: whether a tensor may hold a stack of matrices [E, N, K].
        retained: names of tensors that decoding does not need, or that ``write`` cannot make from the weight. The
            module that holds the weight keeps those that the file has, and passes them to ``write``.
    """

    name: str
    codes: str
    code_dtypes: tuple[str, ...] = ("U8", "I8", "I32", "U32")
    has_stacks = False
    retained: tuple[str, ...] = ()

    @abc.abstractmethod
    def settings_of(self, config: Mapping[str, Any]) -> Settings:
        """The settings in a checkpoint's ``quantization_config``.

        Raises:
            ValueError: the configuration is damaged, or describes weights that this format does not serve.
        """

    def parse(self, key: str) -> tuple[str, str]:
        """The name of the dense weight to which a file's tensor belongs, and the tensor's name in the format."""
        module, _, tensor = key.rpartition(".")
        return f"{module}.weight", tensor

    def retains(self, name: str, tensor: Tensor) -> bool:
        """Whether ``tensor`` is retained, as most formats know by its name."""
        return name in self.retained

    @abc.abstractmethod
    def tensors(self, settings: Settings) -> dict[str, bool]:
        """The names of the tensors of one weight, relative to it, and whether they are required."""

    @abc.abstractmethod
    def form(self, settings: Settings, shape: Sequence[int]) -> Form:
        """The form of a weight of that shape, before its tensors are read.

        Raises:
            ValueError: the format has no weights of that shape.
        """

    @abc.abstractmethod
    def read(
        self, tensors: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype, settings: Settings, where: str
    ) -> Weight4bit:
        """The weight of that shape whose tensors these are.

        Args:
            tensors: by their names in ``self.tensors``.
            dtype: of the decoded weight.
            where: the name of the weight's module or file, for messages.

        Raises:
            ValueError: a tensor is missing, unexpected or invalid; the message names ``where`` and the tensor.
        """

    @abc.abstractmethod
    def check_scales(self, w4: Weight4bit, settings: Settings, retained: Mapping[str, Tensor]) -> None:
        """Checks that ``write`` can store the scales of ``w4``, a weight of ``form``.

        Raises:
            ValueError: ``read`` would not give them back.
        """

    @abc.abstractmethod
    def write(self, w4: Weight4bit, settings: Settings, retained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors, bit for bit, from which ``read`` made ``w4``, with those in ``retained``."""


class Given:
    """The tensors of one weight, checked as they are taken.

    Args:
        names: the names of the format's tensors, and whether they are required.

    Raises:
        ValueError: a required tensor is missing, one is not among ``names``, or the tensors are on several devices.
    """

    def __init__(self, tensors: Mapping[str, Tensor], names: Mapping[str, bool], kind: str, where: str) -> None:
        self._tensors, self._kind, self._where = tensors, kind, excerpt(where, 200)
        for name, required in names.items():
            if required and name not in tensors:
                found = ", ".join(sorted(map(excerpt, tensors))) or "none"
                raise ValueError(f"{self._where}: expected the tensor {name} of {kind} too, found {found}")
        for name, t in tensors.items():
            if name not in names:
                raise ValueError(f"{self._where}: expected only {', '.join(names)} of {kind}, got {excerpt(name)} too")
            if not isinstance(t, Tensor) or t.layout != torch.strided or t.is_meta or t.is_quantized:
                self.refuse(name, "a dense tensor with its values", reprlib.repr(t))
        devices = {str(t.device) for t in tensors.values()}
        if len(devices) > 1:
            raise ValueError(f"{self._where}: expected tensors on one device, got {', '.join(sorted(devices))}")

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def refuse(self, name: str, expected: str, found: str) -> NoReturn:
        """Raises the ValueError that says what was expected of a tensor."""
        raise ValueError(f"{self._where}: expected {name} to be {expected}, got {found}")

    def dtype_of(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def take(self, name: str, shape: Sequence[int], *dtypes: torch.dtype) -> Tensor:
        """The tensor of that shape and one of the dtypes."""
        t = self._tensors[name].detach()
        if t.dtype not in dtypes or t.shape != torch.Size(shape):
            kinds = " or ".join(name_of(dtype) for dtype in dtypes)
            self.refuse(name, f"{kinds} {list(shape)}", f"{name_of(t.dtype)} {list(t.shape)}")
        return t

    def take_finite(self, name: str, shape: Sequence[int], *dtypes: torch.dtype) -> Tensor:
        """``take``, for finite values."""
        t = self.take(name, shape, *dtypes)
        if not bool(t.isfinite().all()):
            self.refuse(name, "finite", "NaN or infinite values")
        return t

    def take_factor(self, name: str) -> Tensor:
        """A single float32 value, finite and above 0, as a scalar."""
        t = self._tensors[name].detach()
        if t.dtype != torch.float32 or t.numel() != 1 or t.ndim > 1:
            self.refuse(name, "one float32 value", f"{name_of(t.dtype)} {list(t.shape)}")
        if not 0 < t.item() < float("inf"):
            self.refuse(name, "finite and above 0", str(t.item()))
        return t.reshape(())


def check_repeats(name: str, stored: Tensor, found: Tensor) -> None:
    """Rejects ``found``, with an entry per block, if the entries per group in the checkpoint give ``stored`` instead.

    Raises:
        ValueError: they differ.
    """
    if not torch.equal(stored, found):
        raise ValueError(f"expected the same {name} in all blocks of a group, which the checkpoint stores once")


def retained_of(kind: Format, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of a weight's tensors that its module keeps."""
    return {name: t for name, t in tensors.items() if kind.retains(name, t)}


def matrix_of(kind: str, shape: Sequence[int]) -> tuple[int, int]:
    """``shape`` as rows and columns of at least 1."""
    check_shape("shape", shape)
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"shape: expected rows and columns of at least 1 for {kind}, got {list(shape)}")
    return shape[0], shape[1]


def check_bits(bits: int, served: Sequence[int], source: str) -> None:
    """Raises a ValueError unless the codes have as many bits as one of ``served``."""
    if bits not in served:
        expected = " or ".join(map(str, served))
        raise ValueError(f"{source}: expected {expected} bits, got {bits}, which are not supported; {LOAD_ORIGINAL}")


def group_size_of(config: Mapping[str, Any], source: str) -> int | None:
    """The group_size of AWQ's and GPTQ's configurations, where -1 stands for a whole row."""
    size: int = config["group_size"]
    if size != -1 and size < 1:
        raise ValueError(f"{source}: expected a group_size of 1 or more, or -1, got {size}")
    return None if size == -1 else size


def tile_of(sizes: Any, source: str) -> tuple[int, int]:
    """The rows and columns of the tiles that share a scale.

    Raises:
        ValueError: ``sizes`` are no such numbers.
    """
    if not isinstance(sizes, list | tuple) or len(sizes) != 2 or not all(is_integer(n) and n > 0 for n in sizes):
        raise ValueError(f"{source}: expected the rows and columns of a tile, got {excerpt(sizes)}")
    return sizes[0], sizes[1]
