"""The kernels that QLORA_CUDA_KERNEL can force on bfloat16 problems, and what in cuda/tuning decides between them."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator

SPLITS = (1, 2, 3, 4, 6, 8)
MULTICAST = (1, 2)  # of sm90 and sm100
TILES = {  # operator -> kernel -> its parameter of tiles, with the values to try
    "linear_nf4": {
        "few_tokens": ("tokens", (4, 8, 16)),
        "tensor_cores": ("tokens", (16, 32, 64)),
        "sm90": ("tokens", (64, 128)),
        "sm100": ("tokens", (64, 128, 256)),
    },
    "linear_nf4_dx": {
        "tensor_cores": ("tokens", (8, 16, 32, 64)),
        "sm90": ("tokens", (64, 128, 256)),
        "sm100": ("tokens", (64, 128, 256)),
    },
    "linear_nf4_dlora": {"tensor_cores": ("ranks", (16, 32, 64))},
}
PANELS = (1024, 2048, 4096)

SM80, SM90, SM100, STREAM, ANY, GEMM, LIBRARY = (
    f"cuda/tuning/{name}.h" for name in ("sm80", "sm90", "sm100", "stream", "generic", "gemm", "library")
)
BETWEEN = {  # two kernels -> what says from how many tokens each of them runs
    frozenset({"sm90", "gemm"}): ("is_ahead", SM90),
    frozenset({"sm90", "library"}): ("is_ahead", SM90),
    frozenset({"sm90", "tensor_cores"}): ("is_ahead", SM90),
    frozenset({"sm90", "few_tokens"}): ("is_ahead", SM90),
    frozenset({"sm100", "gemm"}): ("is_ahead", SM100),
    frozenset({"sm100", "library"}): ("is_ahead", SM100),
    frozenset({"sm100", "tensor_cores"}): ("is_ahead", SM100),
    frozenset({"sm100", "few_tokens"}): ("kFewestTokens", SM100),
    frozenset({"few_tokens", "tensor_cores"}): ("most_few_tokens", SM80),
    frozenset({"tensor_cores", "gemm"}): ("kAhead", GEMM),
    frozenset({"few_tokens", "gemm"}): ("kAhead", GEMM),
    frozenset({"library", "gemm"}): ("kAhead", GEMM),
    frozenset({"tensor_cores", "library"}): ("kCrossovers", LIBRARY),
    frozenset({"few_tokens", "library"}): ("kCrossovers", LIBRARY),
}
WITHIN = {  # kernel, operator and parameter -> what chooses it
    ("sm90", "linear_nf4", "tokens"): ("kTileCycles", SM90),
    ("sm90", "linear_nf4", "splits"): ("kSplitCycles", SM90),
    ("sm90", "linear_nf4", "multicast"): ("kMulticastCycles", SM90),
    ("sm90", "linear_nf4_dx", "tokens"): ("kTileCycles", SM90),
    ("sm90", "linear_nf4_dx", "splits"): ("kSplitCycles", SM90),
    ("sm90", "linear_nf4_dx", "multicast"): ("kMulticastCycles", SM90),
    ("sm100", "linear_nf4", "tokens"): ("forward_stage", SM100),
    ("sm100", "linear_nf4", "splits"): ("kSplitCycles", SM90),
    ("sm100", "linear_nf4", "multicast"): ("kL2Bytes", SM100),
    ("sm100", "linear_nf4_dx", "tokens"): ("dx_stage", SM100),
    ("sm100", "linear_nf4_dx", "splits"): ("kSplitCycles", SM90),
    ("sm100", "linear_nf4_dx", "multicast"): ("kL2Bytes", SM100),
    ("few_tokens", "linear_nf4", "tokens"): ("few_tokens_config", SM80),
    ("few_tokens", "linear_nf4", "splits"): ("forward_splits", SM80),
    ("few_tokens", "linear_nf4", "ctas"): ("forward_streams", STREAM),
    ("tensor_cores", "linear_nf4", "tokens"): ("forward_tokens", SM80),
    ("tensor_cores", "linear_nf4", "splits"): ("forward_splits", SM80),
    ("tensor_cores", "linear_nf4", "ctas"): ("forward_streams", STREAM),
    ("tensor_cores", "linear_nf4_dx", "tokens"): ("dx_tokens", SM80),
    ("tensor_cores", "linear_nf4_dx", "splits"): ("dx_splits", ANY),
    ("tensor_cores", "linear_nf4_dlora", "ranks"): ("dlora_tile", SM80),
    ("tensor_cores", "linear_nf4_dlora", "splits"): ("dlora_splits", ANY),
    ("gemm", "linear_nf4", "panel"): ("panels_time", GEMM),
    ("gemm", "linear_nf4_dx", "panel"): ("panels_time", GEMM),
    ("library", "linear_nf4", "panel"): ("library_time", LIBRARY),
    ("library", "linear_nf4", "splits"): ("splits_within_l2", LIBRARY),
    ("library", "linear_nf4_dx", "panel"): ("library_time", LIBRARY),
    ("library", "linear_nf4_dx", "splits"): ("splits_within_l2", LIBRARY),
}


def candidates(operator: str) -> Iterator[str]:
    """Values of QLORA_CUDA_KERNEL to try. A card or a problem may refuse some of them, with a ValueError."""
    for kernel, (tile, values) in TILES[operator].items():
        ends = [f",multicast={ctas}" for ctas in MULTICAST] if kernel in ("sm90", "sm100") else [""]
        yield from (
            f"{kernel}:{tile}={value},splits={splits}{end}" for value in values for splits in SPLITS for end in ends
        )
    if operator != "linear_nf4_dlora":
        for kernel in ("gemm", "library"):
            yield from (kernel, *(f"{kernel}:panel={panel}" for panel in PANELS))
        yield "library:splits=2"


def parse(choice: str) -> tuple[str, dict[str, int]]:
    """A kernel's name and parameters, from what QLORA_PRINT_KERNELS prints or QLORA_CUDA_KERNEL takes."""
    name, *pairs = re.split("[ :,]", choice)
    return name, {key: int(value) for key, value in (pair.split("=") for pair in pairs)}


def to_change(operator: str, chosen: str, best: str) -> str:
    """Where cuda/tuning would have to choose differently, so that `best` runs instead of `chosen`."""
    (one, has), (other, wants) = parse(chosen), parse(best)
    if one != other:
        places = [BETWEEN[frozenset({one, other})]]
    else:
        places = [WITHIN[one, operator, key] for key, value in wants.items() if has.get(key, value) != value]
        if "ctas" in has and "splits" in wants:
            places.append(WITHIN[one, operator, "ctas"])
    return ", ".join(f"{name} in {file}" for name, file in dict.fromkeys(places)) or "nothing"


def stderr_of(call: Callable[[], object]) -> str:
    """What `call` writes to stderr, also from C++, where QLORA_PRINT_KERNELS prints."""
    with tempfile.TemporaryFile("w+") as file:
        stderr = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            call()
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
        file.seek(0)
        return file.read()


def printed_choice(call: Callable[[], object]) -> str:
    """The kernel and parameters with which `call` runs; QLORA_PRINT_KERNELS must be set, and the problem be new."""
    found = re.findall(r"^qlora: .* -> (.*)$", stderr_of(call), re.M)
    if not found:
        raise RuntimeError("no kernel was printed: is QLORA_PRINT_KERNELS set before the first call?")
    return str(found[-1])
