"""Models larger than memory: the frozen 4-bit base streams in, block by block."""

from .sizes import parse_size
from .streaming import SOURCES, Streaming, state_of, stream, streaming_of

__all__ = ["SOURCES", "Streaming", "parse_size", "state_of", "stream", "streaming_of"]
