"""How this process holds the memory it frees."""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt(3)."""
_MOST_BYTES = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let the C library keep freed memory for the next tensors instead of giving it back to the system at once.

    A network on a CPU frees and takes the same large tensors in every step, and pages that were given back have to be
    taken and cleared again: up to a sixth of the time of sampling. Returns False where the C library is not glibc and
    nothing was changed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all(mallopt(parameter, _MOST_BYTES) == 1 for parameter in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD))
