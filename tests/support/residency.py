"""How much of a stretch of memory the system holds: unlike the figures of a process, nothing else in it changes them."""

import ctypes
import errno
import mmap

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]


def resident_bytes(address, num_bytes):
    """Of `num_bytes` from `address`, the start of a page; 0 where not all of it is mapped."""
    pages = (ctypes.c_ubyte * -(-num_bytes // mmap.PAGESIZE))()
    if _LIBC.mincore(address, num_bytes, ctypes.addressof(pages)) != 0:
        assert ctypes.get_errno() == errno.ENOMEM
        return 0
    return sum(page & 1 for page in pages) * mmap.PAGESIZE
