"""Plans the memory of a fine-tuning run before anything is loaded: its peak, whether it fits, how to reduce it.

A training step runs on fake tensors, which have shapes but no memory. No weight is read.

Example:
    >>> from qlora_app import planning
    >>> config = planning.families.config_of_sizes("hidden=64,intermediate=128,layers=2,heads=4,vocab=512")
    >>> job = planning.Job(config, seq_len=128, batch_size=2)
    >>> total = sum(planning.peak_memory(job).values())
    >>> change, saving = planning.savings(job)[0]
"""

from ..models import families
from .blocks import Streamed, place, streamed
from .memory import OPTIMIZERS, Job, peak_memory
from .search import Switched, choose, largest_model, longest_context, savings

__all__ = [
    "OPTIMIZERS",
    "Job",
    "Streamed",
    "Switched",
    "choose",
    "families",
    "largest_model",
    "longest_context",
    "peak_memory",
    "place",
    "savings",
    "streamed",
]
