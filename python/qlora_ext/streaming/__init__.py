"""Models larger than device memory: streams the frozen 4-bit base block by block."""

from .activation_offload import offload_checkpoints
from .mlp import chunk_mlp, dense_mlps
from .streaming import SOURCES, Streaming, state_of, stream, streaming_of

__all__ = [
    "SOURCES",
    "Streaming",
    "chunk_mlp",
    "dense_mlps",
    "offload_checkpoints",
    "state_of",
    "stream",
    "streaming_of",
]
