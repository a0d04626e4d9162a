"""Memory that one step frees stays at hand for the next.

A step makes and frees the same buffers every time. Out of the box glibc hands large ones back to
the system, and the next step waits while it gets them again page by page. What that costs shows in
`benchmarks.train_step`, where "memory kept" is a step by hand without it.
"""

from __future__ import annotations

import ctypes
import os
import platform
from functools import cache

# the numbers of mallopt's options in glibc's malloc.h
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
# bytes; blocks up to this come from the heap, and glibc takes no larger threshold
FROM_HEAP = 32 * 2**20
KEPT = 512 * 2**20
_USERS_OWN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


@cache
def keep_freed_memory() -> bool:
    """Have this process keep up to 512 MB of freed memory; returns whether it does.

    It holds for the whole process from then on. Left alone are other C libraries than glibc, and a
    glibc that the user has set by its environment variables (`MALLOC_TRIM_THRESHOLD_`,
    `MALLOC_MMAP_THRESHOLD_`, `GLIBC_TUNABLES`).
    """
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in _USERS_OWN):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_MMAP_THRESHOLD, FROM_HEAP)) and bool(mallopt(_TRIM_THRESHOLD, KEPT))
