"""Keeps the C allocator from handing freed buffers back to the kernel between steps.

A step on the CPU allocates and frees its activations anew. By default glibc returns large ones to the kernel at once,
so each step takes hundreds of page faults, whose price (most of all inside a virtual machine) then hides in its time: a
tax no GPU engine pays, since those keep their own pools. Only glibc offers the switch; elsewhere nothing changes.
"""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_LARGEST_MMAP = 2**25  # older glibc refuses more
_NEVER = 2**30
_GROW_BYTES = 2**26


def keep_freed_memory() -> bool:
    """Have this process reuse freed memory. True if the allocator took the request; it holds until the process ends."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    wanted = ((_MMAP_THRESHOLD, _LARGEST_MMAP), (_TRIM_THRESHOLD, _NEVER), (_TOP_PAD, _GROW_BYTES))
    return all([bool(mallopt(what, value)) for what, value in wanted])
