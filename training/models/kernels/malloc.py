"""How the process's C library treats freed memory."""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt(3)."""
_MAX_BYTES = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let the C library reuse freed memory for the next tensors instead of returning it to the system at once.

    A network on a CPU frees and allocates the same large tensors in every step, and returned pages have to be mapped
    and zeroed again: up to a sixth of sampling time. Returns False, and changes nothing, where the C library is not
    glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all(mallopt(parameter, _MAX_BYTES) == 1 for parameter in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD))
