"""Settings of glibc's allocator that make training steps on a CPU faster.

A compiled step allocates one block of temporary memory, some hundred MiB, and
frees it when it ends. By default glibc returns such a block to the kernel, and
the next step causes a page fault for each of its pages again.
docs/decisions/09-memory-of-a-step.md says what that costs.
"""

import ctypes

# Constants of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_LARGEST_INT = 2**31 - 1

# Set in the environment of a new process, this makes glibc ask for pages of 2
# MiB where the kernel offers them: one page fault in place of 512.
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def keep_freed_memory() -> bool:
  """Makes glibc keep freed blocks of any size.

  Call it when a program that trains starts: the whole process then keeps the
  largest amount of memory that it ever used.

  Returns:
    Whether the C library is glibc and accepted the settings.

  Example:
    >>> kept = keep_freed_memory()
  """
  mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
  if mallopt is None:
    return False
  # All blocks must come from one growing heap: other arenas are too small for
  # them, and a block mapped by itself is unmapped when it is freed.
  settings = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, _LARGEST_INT))
  return all([mallopt(name, value) == 1 for name, value in settings])
