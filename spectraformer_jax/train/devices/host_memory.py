"""Freed memory that stays with the process instead of going back.

A compiled step on a CPU asks for one block of temporary memory, some hundred
MiB, and frees it when it ends. By default glibc gives such a block back to the
kernel, which hands out zeroed pages again at the next step, a fault for each.
docs/decisions/09-memory-of-a-step.md says what that costs.
"""

import ctypes

# Of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_LARGEST_INT = 2**31 - 1

# For the environment of a process to be started: glibc then asks for pages of 2
# MiB where the kernel has them on demand, one fault for 512 of the small ones.
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def keep_freed_memory() -> bool:
  """Tells glibc to keep freed blocks, whatever their size.

  For programs that train, at their start: it holds for the whole process, which
  then keeps the largest amount it ever had in use.

  Returns:
    Whether there is a glibc that has done so.

  Example:
    >>> kept = keep_freed_memory()
  """
  mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
  if mallopt is None:
    return False
  # Blocks come from one growing heap: other arenas are too small for them, and
  # mappings of their own end with them.
  settings = (
    (_ARENA_MAX, 1),
    (_MMAP_MAX, 0),
    (_TRIM_THRESHOLD, _LARGEST_INT),
  )
  return all([mallopt(name, value) == 1 for name, value in settings])
