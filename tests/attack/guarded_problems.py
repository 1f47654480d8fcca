"""Random problems of every operator, on fenced inputs: a child of test_guard_pages.py.

Each problem runs three times: on ordinary tensors, on tensors that end where mapped memory ends, and on tensors that
begin where it begins, with different numbers of threads and different bytes in new memory. The bits must be the same.
"""

from __future__ import annotations

import ctypes
import random

import torch

from campaign import Problem, serve
from fences import fenced, fill_new_memory
from random_problems import CPU_KERNELS, KERNEL_VARIABLE, OPS, Draw, bits, by_name, call_by_kernel, draw, in_order

_INT8_KERNELS = ["few_tokens_int8", "many_tokens_int8"]


def guarded(rng: random.Random) -> Problem:
    d = Draw(rng)
    name, arguments = draw(d, rng, on_cpu=True)
    operator = getattr(OPS, name)
    kernel = d.choose("kernel", ["", "", *CPU_KERNELS, *_INT8_KERNELS]) if "linear" in name else ""
    if "activations" in by_name(name, arguments):
        options = {"activations": d.choose("activations", ["exact", "int8"])}
        arguments = in_order(name, by_name(name, arguments) | options)

    def run() -> str | None:
        torch.set_num_threads(rng.randint(1, 3))
        fill_new_memory(0x5A)
        first = call_by_kernel(operator, arguments, KERNEL_VARIABLE["cpu"], kernel)
        if first is None:
            first = call_by_kernel(operator, arguments, KERNEL_VARIABLE["cpu"], "")
        expected = bits(first)
        for at_end in (True, False):
            torch.set_num_threads(rng.randint(1, 3))
            fill_new_memory(0xA7 if at_end else 0)
            with fenced(arguments, at_end) as moved:
                got = bits(operator(*moved))
            for i, (a, b) in enumerate(zip(expected, got, strict=True)):
                if not torch.equal(a, b):
                    place = int((a != b).nonzero()[0])
                    return f"output {i}: other bits on other memory, from byte {place} of {a.numel()}; at_end={at_end}"
        return None

    return f"{name} {' '.join(d.said)}", run


def broken(how: str) -> Problem:
    """Faults that the fences must detect: reads after and before a tensor, a write to it, and an unwritten output."""

    def run() -> str | None:
        if how == "unwritten":
            fill_new_memory(0x5A)
            first = bits(torch.empty(5000))[0].clone()
            fill_new_memory(0xA7)
            return None if torch.equal(first, bits(torch.empty(5000))[0]) else "an unwritten output shows"
        with fenced([torch.zeros(1000)], at_end=how == "behind") as (t,):
            if how == "write":
                t.zero_()
            else:
                at = t.data_ptr() + (t.nbytes if how == "behind" else -1)
                return f"read {ctypes.c_char.from_address(at).value!r}"
        return None

    return how, run


BREAKS = ["behind", "before", "write", "unwritten"]

if __name__ == "__main__":
    serve({"guarded": guarded, **{how: lambda _, how=how: broken(how) for how in BREAKS}})
