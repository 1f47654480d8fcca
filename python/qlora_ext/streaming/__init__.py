"""Models larger than memory: the frozen 4-bit base streams in, block by block."""

from .sizes import parse_size
from .streaming import SOURCES, Streaming, stream, streaming_of

__all__ = ["SOURCES", "Streaming", "parse_size", "stream", "streaming_of"]
