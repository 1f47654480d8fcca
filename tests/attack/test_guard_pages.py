"""No operator reads past its inputs, writes to them, or leaves an output unwritten, on any instruction set.

Outputs are torch's, from malloc. glibc's check of the bytes after each allocation is used if available.
"""

from __future__ import annotations

import ctypes
import os
import re

import pytest

from campaign import assert_survived, attack, count
from qlora_ext import _C

SCRIPT = "guarded_problems.py"
PROBLEMS = 80  # for an instruction set


def checked_malloc() -> dict[str, str]:
    """The environment in which free() checks for writes after an allocation, unless malloc is already replaced."""
    library = "libc_malloc_debug.so.0"  # since glibc 2.34
    try:
        ctypes.CDLL(library)
    except OSError:
        return {}
    return {} if "LD_PRELOAD" in os.environ else {"LD_PRELOAD": library, "MALLOC_CHECK_": "3"}


@pytest.mark.parametrize("isa", _C.cpu_isas())
def test_operators_stay_inside_their_tensors(isa: str) -> None:
    assert_survived(attack(SCRIPT, "guarded", count(PROBLEMS), QLORA_CPU_ISA=isa, **checked_malloc()))


@pytest.mark.parametrize(
    ("broken", "end"),
    [
        *((how, "died: SIGSEGV|AddressSanitizer: SEGV") for how in ("behind", "before", "write")),
        ("unwritten", "wrong: an unwritten output shows"),
    ],
)
def test_the_fences_hold(broken: str, end: str) -> None:
    (fault,) = attack(SCRIPT, broken, 1).faults
    assert re.search(end, fault), fault
